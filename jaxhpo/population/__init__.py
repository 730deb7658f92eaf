"""Population search: many candidates that learn from one another."""
