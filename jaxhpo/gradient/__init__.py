"""Gradients through training."""

from jaxhpo.gradient.exact import Forward, Reverse, Truncated
from jaxhpo.gradient.implicit import Implicit
from jaxhpo.gradient.online import Online
from jaxhpo.gradient.unroll import Unrolled, unroll

__all__ = ["Forward", "Implicit", "Online", "Reverse", "Truncated", "Unrolled", "unroll"]
