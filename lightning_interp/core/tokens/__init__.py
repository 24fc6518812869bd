"""Which tokens: rows as batches, what a pass knows of its tokens, and selectors that choose among them."""
