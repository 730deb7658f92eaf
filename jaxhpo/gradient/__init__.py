"""Gradients through training."""

from jaxhpo.gradient.unroll import unroll

__all__ = ["unroll"]
