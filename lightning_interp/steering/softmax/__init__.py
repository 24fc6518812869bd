"""The information geometry of the softmax, and dual steering."""
