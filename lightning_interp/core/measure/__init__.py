"""Random choices by key, looks that disturb nothing, sums over processes, and estimates with their intervals."""
