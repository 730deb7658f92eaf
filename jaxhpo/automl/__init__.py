"""Search for the structure itself."""

from jaxhpo.automl.darts import darts

__all__ = ["darts"]
