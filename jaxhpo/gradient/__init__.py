"""Gradients through training."""

from jaxhpo.gradient.gradient import gradient
from jaxhpo.gradient.polish import polish
from jaxhpo.gradient.unroll import unroll

__all__ = ["gradient", "polish", "unroll"]
