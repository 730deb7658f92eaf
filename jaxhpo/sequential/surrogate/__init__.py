"""Models of what was told."""
