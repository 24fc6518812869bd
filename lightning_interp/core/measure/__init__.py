"""Random choices by key, looks that disturb nothing, sums over processes, estimates, their intervals, and searches."""
