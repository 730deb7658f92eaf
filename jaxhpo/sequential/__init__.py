"""Sequential search: where the next trials are chosen by what all earlier ones have shown."""
