"""Steering vectors: found from contrasting texts, kept in files, checked against a model."""
