"""Whose weights: rows of a module that come from another source."""
