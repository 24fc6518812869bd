"""Concepts: pairs of tokens, class means, and linear probes."""
