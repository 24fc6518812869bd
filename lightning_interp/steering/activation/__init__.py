"""Directions, affine maps and projections, added to activations at any site."""
