"""Workers, networks and databases that fail on a schedule, and a proof of what came of it.

``python -m chaos --seconds 60 --seed 1`` from ``tests/``, or ``tox -e chaos -- --seconds 60``.
"""
