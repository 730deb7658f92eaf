"""Errors for what a user gives or lacks: the parameter, the value and the remedy."""

import importlib
import math
import numbers
from collections.abc import Collection
from typing import Any

import jax


def whole(name: str, value: Any, low: int, remedy: str = "", most: int | None = None) -> int:
    """`value` as an int of at least `low` and, if it is given, at most `most`.

    Raises:
      TypeError, ValueError: it is none.
    """
    hint = f"; {remedy}" if remedy else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}{hint}")
    number = int(value)
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}{hint}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}{hint}")
    return number


def real(name: str, value: Any, low: float, high: float, remedy: str = "") -> float:
    """`value` as a float in [`low`, `high`].

    Raises:
      TypeError, ValueError: it is none.
    """
    hint = f"; {remedy}" if remedy else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}{hint}")
    number = float(value)
    if math.isnan(number) or not low <= number <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}{hint}")
    return number


def one_of(name: str, value: Any, options: Collection) -> Any:
    """`value`, which is one of `options`.

    Raises:
      ValueError: it is none.
    """
    if value not in options:
        raise ValueError(f"{name} must be one of {list(options)}, got {value!r}")
    return value


def one_key(key: Any, remedy: str = "") -> jax.Array:
    """`key`, which is one typed PRNG key, traced or not.

    Raises:
      TypeError: it is none.
    """
    if isinstance(key, jax.Array) and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    raise TypeError(f"key must be one PRNG key, got {key!r}; say jax.random.key(0){remedy}")


def concrete_key(key: Any, caller: str) -> jax.Array:
    """`key`, which is one typed PRNG key and is not traced, for a function of the host.

    Raises:
      TypeError: it is none.
    """
    if isinstance(key, jax.core.Tracer):
        raise TypeError(f"{caller} runs on the host, not under a transformation; inside jit or vmap use hpo.study")
    return one_key(key)


def optional(module: str, purpose: str) -> Any:
    """A module of the extra `plot`, or an error that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} needs {package}; install it with: pip install 'jaxhpo[plot]'") from error
