"""What is asked of a student, how answers and logits are read, and what the differences can carry."""
