"""Observers to hand to ``on_event``: what they need is imported with the one that is asked for.

Each module has an ``observe`` with its defaults, and a class for those who want it otherwise.
"""
