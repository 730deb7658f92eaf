"""What a value is, as text: the same in every process for equal values."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxhpo.parameters import OneOf


def name_of(value: Any) -> str:
    """A function or class by where it is defined, anything else by its type."""
    known = value if hasattr(value, "__qualname__") else type(value)
    return f"{known.__module__}.{known.__qualname__}"


def canonical(value: Any, opaque: Callable[[Any], str] = name_of) -> str:
    """Text that is equal for equal values.

    Args:
      value: a tree of parameters, numbers, strings, arrays and containers.
      opaque: text for anything else, such as a function.
    """
    inner = lambda x: canonical(x, opaque)  # noqa: E731
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, OneOf):
        return f"OneOf{inner(value.branches)}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{inner(k)}:{inner(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"{name_of(value)}[" + ",".join(map(inner, value)) + "]"
    if isinstance(value, set | frozenset):
        return f"{name_of(value)}[" + ",".join(sorted(map(inner, value))) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{name_of(value)}{inner(fields)}"
    return opaque(value)


def program(fn: Callable, *example: Any) -> str:
    """A pure function as text: its operations and the constants in them."""
    closed = jax.make_jaxpr(fn)(*example)
    return re.sub(r" at 0x[0-9a-f]+", "", str(closed.jaxpr)) + canonical(closed.consts)


def digest(text: str) -> str:
    """Sixteen characters that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
