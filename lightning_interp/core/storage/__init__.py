"""Files that are crash-safe, known by their content, and runs that go on where they stopped."""
