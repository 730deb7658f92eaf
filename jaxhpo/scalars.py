"""What counts as a real number, when two values are one, and what makes bounds valid."""

import numbers
import sys
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


def check_interval(low: Any, high: Any, log: Any) -> None:
    """Raises ValueError or TypeError when these are not the bounds of a parameter."""
    for name, given in (("low", low), ("high", high)):
        value = number(given)
        if value is None or isinstance(value, bool):
            raise TypeError(f"{name} must be a real number, got {given!r}; use Categorical for other values")
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise ValueError(f"{name} must be finite, got {given!r}; search the logarithm (log=True) of a wide range")
    if not number(low) < number(high):
        raise ValueError(f"low must be below high, got low={low!r} and high={high!r}; swap them, or use a constant")
    if not isinstance(log, bool | np.bool_):
        raise TypeError(f"log must be True or False, got {log!r}; name further arguments, as in step=2")
    if log and number(low) <= 0:
        raise ValueError(f"log=True needs low > 0, got low={low!r}; raise low or drop log=True")
