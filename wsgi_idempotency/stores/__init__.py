"""Where the records live."""
