"""What every method rests on: where things are in a model, which tokens, and hooks that always come off."""
