"""What counts as a real number, and when two values are one."""

import numbers
from typing import Any

import jax
import numpy as np


def number(value: Any) -> Any:
    """`value` as a Python number if it is a real one (NumPy scalars and arrays without axes too), else None."""
    scalar = isinstance(value, np.generic | np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer)
    if scalar and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, numbers.Real) else None


def same(a: Any, b: Any) -> bool:
    """Whether two options are one: equal numbers are, `True` and `1` are not."""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x == y and isinstance(x, bool) == isinstance(y, bool)
    if hasattr(a, "shape") or hasattr(b, "shape"):
        return getattr(a, "shape", None) == getattr(b, "shape", None) and bool(np.all(a == b))
    try:
        return a is b or bool(a == b)
    except (ValueError, TypeError):
        return False
