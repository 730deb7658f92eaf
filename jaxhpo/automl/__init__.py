"""Search for the structure of networks, and agents that learn to tune."""

from jaxhpo.automl import nas

__all__ = ["nas"]
