"""Text and preferences for training, as rows, token ids and batches."""
