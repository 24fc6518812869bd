"""What stands between a recipe and its user: finding recipes, reading settings, terminal output, stored results."""
