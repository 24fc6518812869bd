"""Rewards of texts, from any scorer, on any number of processes."""
