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
# Newer releases would otherwise make a folder in the home of whoever runs the demo, and
# share it with every other gunicorn there. Older ones pass over a name they don't know.
control_socket_disable = True
