"""Models from anywhere: hub, folders, adapters, .gguf files, Python packages."""
