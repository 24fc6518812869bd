"""What is done to activations, and that it comes off again."""
