"""Gradients through training."""

from jaxhpo.gradient.gradient import gradient
from jaxhpo.gradient.unroll import unroll

__all__ = ["gradient", "unroll"]
