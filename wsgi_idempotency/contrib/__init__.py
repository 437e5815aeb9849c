"""Thin fits for frameworks. Each is optional, and imported only by who uses it."""
