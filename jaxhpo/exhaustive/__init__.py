"""Exhaustive search: every point of a grid."""

from jaxhpo.exhaustive.grid import grid

__all__ = ["grid"]
