"""Do the assumptions hold: compliance, placebo, third rewrites, side effects."""
