"""Where in a decoder: its structure, components and head, places whose activations have a name, and which model."""
