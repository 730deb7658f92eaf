"""Search for the structure itself, and agents that learn to tune."""

from jaxhpo.automl.regularized_evolution import regularized_evolution

__all__ = ["regularized_evolution"]
