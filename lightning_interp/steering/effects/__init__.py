"""What steering does: metrics, scores of paths, studies and their figures."""
