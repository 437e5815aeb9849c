"""How gunicorn serves the demo.

Given by name, so that neither a ``gunicorn.conf.py`` in the directory the demo is started
from nor ``GUNICORN_CMD_ARGS`` has a say.
"""

from wsgi_idempotency.demo.shop import SECONDS

worker_class = "gthread"
# A browser opens connections ahead of need and leaves them idle, which would keep a
# single-threaded worker from anything else.
threads = 8
loglevel = "warning"
proc_name = "wsgi-idempotency-demo"
graceful_timeout = SECONDS + 2  # seconds; a charge that has begun is finished
