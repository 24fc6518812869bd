"""Where in a decoder: its structure, its components, the places whose activations have a name."""
