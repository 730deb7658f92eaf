"""The parameters a search space is built from.

Each is a plain description: nothing is checked until a `Space` wraps the tree, because only then is the path
of a parameter in the user's tree known, and an error without it helps nobody.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_LEVELS = 2**31 - 1


def _is_real(value: Any) -> bool:
    return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, (bool, np.bool_))


def _is_integer(value: Any) -> bool:
    return _is_real(value) and float(value).is_integer()


class Parameter:
    """A leaf of a search space. Use one of its subclasses."""

    def check(self) -> None:
        """Raises ValueError or TypeError when the description is no valid parameter."""


def _check_bounds(parameter: Any) -> None:
    low, high = parameter.low, parameter.high
    for name, value in (("low", low), ("high", high)):
        if not _is_real(value):
            raise TypeError(f"{name} must be a real number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")
    if not low < high:
        raise ValueError(f"low must be below high, got low={low!r} and high={high!r}; swap them, or use a constant")
    if parameter.log and low <= 0:
        raise ValueError(f"log=True needs low > 0, got low={low!r}; raise low or drop log=True")


@dataclasses.dataclass(frozen=True)
class Float(Parameter):
    """A real number in [low, high].

    Args:
      low: lower bound, inclusive.
      high: upper bound, inclusive.
      log: uniform in the logarithm instead of in the value; needs low > 0.

    Example:
      >>> import jaxhpo as hpo
      >>> hpo.Space({"lr": hpo.Float(1e-5, 1e-1, log=True)}).dims
      1
    """

    low: float
    high: float
    log: bool = False

    def check(self) -> None:
        _check_bounds(self)


@dataclasses.dataclass(frozen=True)
class Int(Parameter):
    """An integer among low, low + step, ..., up to high.

    Args:
      low: lower bound, inclusive.
      high: upper bound, inclusive where low + k * step meets it.
      log: log-uniform, each level owning what rounds to it; needs low >= 1 and step == 1. Otherwise levels have
        equal shares.
      step: distance of neighbouring levels, at least 1.
    """

    low: int
    high: int
    log: bool = False
    step: int = 1

    @property
    def levels(self) -> int:
        return (int(self.high) - int(self.low)) // int(self.step) + 1

    def check(self) -> None:
        _check_bounds(self)
        for name, value in (("low", self.low), ("high", self.high), ("step", self.step)):
            if not _is_integer(value):
                raise TypeError(f"{name} must be an integer, got {value!r}; use Float for real numbers")
            if not -(2**31) <= value < 2**31:
                raise ValueError(f"{name} must fit 32 bits, got {value!r}")
        if self.step < 1:
            raise ValueError(f"step must be at least 1, got {self.step!r}")
        if self.log and self.step != 1:
            raise ValueError(f"log=True needs step=1, got step={self.step!r}; list the levels with Ordinal instead")
        if self.levels > MAX_LEVELS:
            raise ValueError(f"at most {MAX_LEVELS} levels, got {self.levels}; raise step")


class _Choice(Parameter):
    options: tuple

    def check(self) -> None:
        if not isinstance(self.options, Sequence) or isinstance(self.options, str):
            raise TypeError(f"options must be a sequence, got {self.options!r}")
        if not self.options:
            raise ValueError(f"options must not be empty, got {self.options!r}; name at least one")
        for i, option in enumerate(self.options):
            if isinstance(option, Parameter):
                raise TypeError(f"options must be values, got {option!r}; use OneOf for a choice between subtrees")
            if any(_same(option, other) for other in self.options[:i]):
                raise ValueError(f"options must differ from each other, got {option!r} twice; drop one")


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
    except (ValueError, TypeError):
        return False


@dataclasses.dataclass(frozen=True)
class Categorical(_Choice):
    """One of several options without an order.

    In traced code it is the option's value if all options are numbers (or all are booleans), else its index; outside
    it is the option itself.

    Args:
      options: the options, of any type, each different from the others.
      relaxed: decode to weights f32[len(options)] instead: one-hot from black-box methods, soft from gradient ones.
    """

    options: tuple
    relaxed: bool = False


@dataclasses.dataclass(frozen=True)
class Ordinal(_Choice):
    """One of several options in a meaningful order, such as batch sizes 16, 64, 256.

    Args:
      options: the options from one end to the other; decoded like those of `Categorical`.
    """

    options: tuple


@dataclasses.dataclass(frozen=True)
class Array(Parameter):
    """An array of real numbers, each in [low, high]: that many dims at once.

    Args:
      shape: shape of the array; an int is a vector.
      low: lower bound of every entry, inclusive.
      high: upper bound of every entry, inclusive.
      log: log-uniform entries; needs low > 0.
    """

    shape: int | tuple[int, ...]
    low: float
    high: float
    log: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.shape,) if isinstance(self.shape, int) else tuple(self.shape)

    def check(self) -> None:
        _check_bounds(self)
        if not self.sizes or any(not _is_integer(n) or n < 1 for n in self.sizes):
            raise ValueError(f"shape must be positive integers, got {self.shape!r}")


class OneOf(Parameter):
    """A choice between named subtrees, of which only the chosen one matters.

    Decodes to `{"choice": index, name: subtree, ...}` in traced code, where every branch has values, and to
    `{"choice": name, name: subtree}` outside, where only the live branch is shown.

    Args:
      **branches: the subtrees by name; each is a pytree of parameters and constants, `{}` if it has none.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = hpo.Space(hpo.OneOf(sgd={"momentum": hpo.Float(0.0, 0.99)}, adam={"b1": hpo.Float(0.8, 0.99)}))
      >>> space.native(space.decode(jax.numpy.array([0.7, 0.5, 0.5])))["choice"]
      'adam'
    """

    def __init__(self, **branches: Any):
        self.branches = branches

    def __repr__(self) -> str:
        return f"OneOf({', '.join(f'{k}={v!r}' for k, v in self.branches.items())})"

    def check(self) -> None:
        if not self.branches:
            raise ValueError("OneOf needs at least one branch, got none")
        if "choice" in self.branches:
            raise ValueError("no branch of a OneOf may be called 'choice', that is where its index goes; rename it")
