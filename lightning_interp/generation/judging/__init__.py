"""Judges of a trait from 0 to 100, what makes one fit to be believed, and whether a text is coherent at all."""
