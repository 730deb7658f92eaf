"""Gradients through training."""

from jaxhpo.gradient.check_gradient import GradientCheck, check_gradient
from jaxhpo.gradient.exact import Forward, Reverse, Truncated
from jaxhpo.gradient.gradient import gradient
from jaxhpo.gradient.implicit import Implicit
from jaxhpo.gradient.online import Online
from jaxhpo.gradient.path import NonFinite, find_nonfinite
from jaxhpo.gradient.polish import polish
from jaxhpo.gradient.trust_region import trust_region
from jaxhpo.gradient.unroll import Unrolled, unroll

__all__ = [
    "Forward",
    "GradientCheck",
    "Implicit",
    "NonFinite",
    "Online",
    "Reverse",
    "Truncated",
    "Unrolled",
    "check_gradient",
    "find_nonfinite",
    "gradient",
    "polish",
    "trust_region",
    "unroll",
]
