"""An exhaustive check of the protocol: every interleaving of a few clients, up to bounds.

``database``
    the statements of the store as PostgreSQL runs them, on one row.
``clients``
    the real middleware, made a state machine: what it asks next, given what it was answered.
``search``
    all states that clients, crashes, clocks and lost answers can bring about, breadth
    first, and the promises that hold in each of them.
``transactions``
    the same in transaction mode, and where both modes meet under one key.
"""
