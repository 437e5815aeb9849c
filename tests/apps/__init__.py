"""WSGI applications for the servers of the tests, and what the tests hold of them."""
