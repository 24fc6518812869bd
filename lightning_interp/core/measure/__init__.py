"""Random choices by key, looks that disturb nothing, and estimates with their intervals."""
