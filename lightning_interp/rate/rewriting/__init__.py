"""Who rewrites, what is asked for, and the store that keeps every answer."""
