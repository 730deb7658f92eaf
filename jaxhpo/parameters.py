"""The parameters a search space is built from.

Each is a plain description: nothing is checked until a `Space` wraps the tree, because only then is the path
of a parameter in the user's tree known, and an error without it helps nobody.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from jaxhpo.scalars import check_interval, number, same


class Parameter:
    """A leaf of a search space. Use one of its subclasses."""

    @property
    def kind(self) -> str:
        """What it decodes to: "real", "index", the values of numeric options ("float", "int", "bool") or "relaxed"."""
        return "index"

    @property
    def dims(self) -> int:
        """How many dims of the unit cube it takes."""
        return 1

    @property
    def levels(self) -> int:
        """How many values each of its dims has, 0 where it is real."""
        return 0

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of what it decodes to at one point."""
        return ()

    @property
    def signature(self) -> Hashable:
        """All of it that compiled code can see."""
        return type(self), self.kind, self.levels, self.value_shape

    def check(self) -> None:
        """Raises ValueError or TypeError when the description is no valid parameter."""

    def native(self, value: np.ndarray) -> Any:
        """What it decodes to at one point, as the Python value that the user means."""
        raise NotImplementedError

    def parse(self, value: Any) -> Any:
        """The inverse of `native`; raises ValueError for what is not a value of this parameter."""
        raise NotImplementedError


class _Interval(Parameter):
    low: float
    high: float
    log: bool

    @property
    def kind(self) -> str:
        return "real"

    @property
    def signature(self) -> Hashable:
        return super().signature, number(self.low), number(self.high), bool(self.log)

    def check(self) -> None:
        check_interval(self.low, self.high, self.log)


@dataclasses.dataclass(frozen=True)
class Float(_Interval):
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

    def native(self, value: np.ndarray) -> float:
        return float(value)

    def parse(self, value: Any) -> float:
        x = number(value)
        if x is None or isinstance(x, bool) or not number(self.low) <= x <= number(self.high):
            raise ValueError(f"it must be a number in [{self.low}, {self.high}]")
        return float(x)


@dataclasses.dataclass(frozen=True)
class Array(_Interval):
    """An array of real numbers, each in [low, high]: that many dims at once, which compile as one.

    Args:
      shape: shape of the array; an int is a vector.
      low: lower bound of every entry, inclusive.
      high: upper bound of every entry, inclusive.
      log: log-uniform entries; needs low > 0.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = hpo.Space({"weights": hpo.Array((2, 2), 0.0, 4.0)})
      >>> space.native(space.decode(jax.numpy.array([0.0, 0.25, 0.5, 1.0])))["weights"].tolist()
      [[0.0, 1.0], [2.0, 4.0]]
    """

    shape: int | tuple[int, ...]
    low: float
    high: float
    log: bool = False

    @staticmethod
    def like(template: Any, low: float, high: float, log: bool = False) -> Any:
        """A parameter for every number in a pytree, such as a weight decay for every weight of a network.

        Args:
          template: a pytree of arrays, or of anything with a shape, such as `jax.eval_shape` returns.
          low: lower bound, inclusive.
          high: upper bound, inclusive.
          log: log-uniform; needs low > 0.

        Returns:
          The same tree with an `Array` in place of each array, a `Float` where that has no axes.

        Example:
          >>> import jax.numpy as jnp, jaxhpo as hpo
          >>> params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
          >>> hpo.Space({"decay": hpo.Array.like(params, 1e-5, 1.0, log=True)}).dims
          650
        """

        def parameter(leaf: Any) -> Parameter:
            shape = np.shape(leaf)
            return Array(shape, low, high, log) if shape else Float(low, high, log)

        return jax.tree.map(parameter, template)

    @property
    def dims(self) -> int:
        return math.prod(self.value_shape)

    @property
    def value_shape(self) -> tuple[int, ...]:
        return tuple(self.shape) if isinstance(self.shape, Sequence) else (self.shape,)

    def check(self) -> None:
        super().check()
        sizes: tuple[Any, ...] = self.value_shape
        if not sizes or any(isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1 for n in sizes):
            raise ValueError(f"shape must be positive integers, got {self.shape!r}; use Float for a single number")

    def native(self, value: np.ndarray) -> np.ndarray:
        return np.array(value)

    def parse(self, value: Any) -> np.ndarray:
        array = np.asarray(value)
        array = np.broadcast_to(array, self.value_shape) if array.ndim == 0 else array
        numeric = array.dtype.kind in "iuf" and array.shape == self.value_shape
        array = array.astype(float) if numeric else np.array(np.nan)
        if not np.all((array >= number(self.low)) & (array <= number(self.high))):
            raise ValueError(f"it must be {self.value_shape} numbers, or one for all, in [{self.low}, {self.high}]")
        return array


@dataclasses.dataclass(frozen=True)
class Int(Parameter):
    """An integer among low, low + step, ..., up to high.

    Args:
      low: lower bound, inclusive, within 32 bits.
      high: upper bound, within 32 bits, inclusive where low + k * step meets it.
      log: log-uniform: a level owns the reals that round to it, so 1 has a larger share than 2; needs low >= 1 and
        step == 1. Otherwise levels have equal shares.
      step: distance of neighbouring levels, at least 1.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = hpo.Space(hpo.Int(16, 256, step=16))
      >>> [space.native(space.decode(jax.numpy.array([u]))) for u in (0.0, 0.5, 1.0)]
      [16, 144, 256]
    """

    low: int
    high: int
    log: bool = False
    step: int = 1

    @property
    def levels(self) -> int:
        return (int(self.high) - int(self.low)) // int(self.step) + 1

    @property
    def signature(self) -> Hashable:
        return super().signature, int(self.low), int(self.high), bool(self.log), int(self.step)

    def check(self) -> None:
        check_interval(self.low, self.high, self.log)
        for name, given in (("low", self.low), ("high", self.high), ("step", self.step)):
            value = number(given)
            if value is None or isinstance(value, bool) or value != value // 1:
                raise TypeError(f"{name} must be an integer, got {given!r}; use Float for real numbers")
            if not -(2**31) <= value < 2**31:
                raise ValueError(f"{name} must fit 32 bits, got {given!r}; use Float, or Ordinal for a list of levels")
        if self.step < 1:
            raise ValueError(f"step must be at least 1, got {self.step!r}; levels count up from low")
        if self.log and self.step != 1:
            raise ValueError(f"log=True needs step=1, got step={self.step!r}; list the levels with Ordinal instead")
        if self.levels >= 2**31:
            raise ValueError(f"at most {2**31 - 1} levels fit 32 bits, got {self.levels}; raise step")

    def native(self, value: np.ndarray) -> int:
        return int(value)

    def parse(self, value: Any) -> int:
        x = number(value)
        if x is None or isinstance(x, bool) or not self.low <= x <= self.high or (x - int(self.low)) % int(self.step):
            levels = f"{self.low} plus a multiple of {self.step} " if self.step != 1 else "an integer "
            raise ValueError(f"it must be {levels}in [{self.low}, {self.high}]")
        return int(x)


class _Choice(Parameter):
    options: Sequence[Any]

    @functools.cached_property
    def kind(self) -> str:
        values = [number(option) for option in self.options]
        if all(isinstance(value, bool) for value in values):
            return "bool"
        if any(value is None or isinstance(value, bool) for value in values):
            return "index"
        integers = all(isinstance(value, int) and -(2**31) <= value < 2**31 for value in values)
        return "int" if integers else "float"

    @property
    def levels(self) -> int:
        return len(self.options)

    @property
    def signature(self) -> Hashable:
        visible = self.kind in ("float", "int", "bool")
        return super().signature, tuple(number(option) for option in self.options) if visible else ()

    def check(self) -> None:
        if not isinstance(self.options, Sequence) or isinstance(self.options, str):
            raise TypeError(f"options must be a sequence, got {self.options!r}; write them as a tuple")
        if not self.options:
            raise ValueError(f"options must not be empty, got {self.options!r}; name at least one")
        hashed: set[Hashable] = set()
        unhashable: list[Any] = []
        for option in self.options:
            value = number(option)
            if isinstance(option, Parameter):
                raise TypeError(f"options must be values, got {option!r}; use OneOf for a choice between subtrees")
            if value is not None and value != value:
                raise ValueError(f"options must be equal to themselves, got {option!r}; use None for a missing value")
            key = (isinstance(value, bool), option if value is None else value)
            try:
                is_twice = key in hashed
                hashed.add(key)
            except TypeError:
                is_twice = any(same(option, other) for other in unhashable)
                unhashable.append(option)
            if is_twice:
                raise ValueError(f"options must differ from each other, got {option!r} twice; drop one")

    def native(self, value: np.ndarray) -> Any:
        if self.kind == "relaxed":
            return self.options[int(np.argmax(value))]
        if self.kind == "index":
            return self.options[int(value)]
        x = value.item()
        return min(self.options, key=lambda o: -1.0 if number(o) == x else abs(float(number(o)) - float(x)))

    def parse(self, value: Any) -> Any:
        for i, option in enumerate(self.options):
            if same(option, value):
                return {"index": i, "relaxed": np.arange(self.levels) == i}.get(self.kind, number(option))
        raise ValueError(f"it must be one of {tuple(self.options)}")


@dataclasses.dataclass(frozen=True)
class Categorical(_Choice):
    """One of several options without an order.

    In traced code it is the option's value if all options are numbers (or all are booleans), else its index; outside
    it is the option itself.

    Args:
      options: the options, of any type, each different from the others.
      relaxed: decode to weights f32[len(options)] instead: one-hot from black-box methods, soft from gradient ones.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = hpo.Space({"act": hpo.Categorical(("relu", "gelu")), "dropout": hpo.Categorical((0.0, 0.5))})
      >>> hparams = space.decode(jax.numpy.array([0.9, 0.9]))
      >>> int(hparams["act"]), float(hparams["dropout"])
      (1, 0.5)
      >>> space.native(hparams)
      {'act': 'gelu', 'dropout': 0.5}
    """

    options: Sequence[Any]
    relaxed: bool = False

    @functools.cached_property
    def kind(self) -> str:
        return "relaxed" if self.relaxed else super().kind

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.levels,) if self.relaxed else ()


@dataclasses.dataclass(frozen=True)
class Ordinal(_Choice):
    """One of several options in a meaningful order, such as batch sizes 16, 64, 256.

    Args:
      options: the options from one end to the other; decoded like those of `Categorical`.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = hpo.Space(hpo.Ordinal((16, 64, 256)))
      >>> int(space.decode(jax.numpy.array([0.5])))
      64
    """

    options: Sequence[Any]


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

    @property
    def levels(self) -> int:
        return len(self.branches)

    @property
    def signature(self) -> Hashable:
        return super().signature, tuple(self.branches)

    def check(self) -> None:
        if not self.branches:
            raise ValueError("OneOf needs at least one branch, got none; name one, as in OneOf(sgd={})")
        if "choice" in self.branches:
            raise ValueError("no branch of a OneOf may be called 'choice', that is where its index goes; rename it")

    def native(self, value: np.ndarray) -> str:
        return list(self.branches)[int(value)]

    def parse(self, value: Any) -> int:
        names = list(self.branches)
        if value not in names:
            raise ValueError(f"'choice' must be one of {names}")
        return names.index(value)
