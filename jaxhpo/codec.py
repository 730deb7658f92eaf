"""The codec between points of the unit cube and the values of parameters: one vectorised pass, whatever the dims.

A real parameter is uniform, or log-uniform: z = centre * exp(w * (u - 1/2)) with w = log(high / low), which keeps small
relative errors at both ends. Levels have equal shares, floor(u * levels), and those of a log integer the shares of
the reals that round to them: floor(base * expm1(w * u)) counts up from low = base + 1/2.

A point decodes to the same bits in every program. XLA rounds a product and a sum once where they meet in a kernel, and
whether they do depends on shapes and on what is around them, barriers or not: so a clip stands between each product and
what follows it. Its exp differs between the body and the tail of a loop, its expm1 does not. What is not within a
program is compiled as one.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.parameters import Int
from jaxhpo.scalars import number


class Leaf(NamedTuple):
    """One parameter of the tree and the dims that belong to it."""

    parameter: Any
    """the `Parameter`"""
    path: str
    """its place in the user's tree, as in "optimizer.sgd.momentum"; "value" where it is the whole tree"""
    keys: tuple
    """the key path of its value in a decoded tree"""
    start: int
    """first dim"""
    size: int
    """number of dims"""
    parent: int
    """dim of the `OneOf` that this leaf depends on, -1 = always live"""
    branch: int
    """the level of that dim at which it is live"""
    kind: str
    """what it decodes to, as `Parameter.kind`"""


def inward(parameter: Any, dtype: np.dtype) -> tuple[float, float]:
    """The smallest and largest number of `dtype`, normal or 0, in the bounds of `parameter`, by exact arithmetic."""
    low, high = (Fraction(*number(bound).as_integer_ratio()) for bound in (parameter.low, parameter.high))
    return 0.0 - _below(-low, dtype), _below(high, dtype)


def _below(x: Fraction, dtype: np.dtype) -> float:
    tiny = Fraction(float(np.finfo(dtype).tiny))
    if abs(x) < tiny:
        return float(-tiny) if x < 0 else 0.0
    with np.errstate(over="ignore"):
        nearest = dtype.type(float(x))
    is_above = not np.isfinite(nearest) or Fraction(float(nearest)) > x
    return float(np.nextafter(nearest, dtype.type(-np.inf)) if is_above else nearest)


def _log_ratio(low: float, high: float) -> float:
    return math.log1p((high - low) / low) if high < 2 * low else math.log(high) - math.log(low)


def _exp(x: jax.Array) -> jax.Array:
    growth = jnp.expm1(jnp.abs(x)) + 1
    return jnp.where(x < 0, 1 / growth, growth)


@jax.custom_jvp
def _confine(x: jax.Array, low: Any, high: Any) -> jax.Array:
    """Clips away rounding errors, for which a gradient must not vanish: else a descent could not leave a bound."""
    return jnp.clip(x, low, high)


@_confine.defjvp
def _confine_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _confine(*primals), tangents[0]


class _Reals(NamedTuple):
    """Constants of dims that are real."""

    low: np.ndarray  # lower end of the interval, divided by `scale`, in the logarithm where `log`
    width: np.ndarray  # of that interval, rounded up
    log: np.ndarray
    scale: np.ndarray  # a power of 2 that keeps the ends and their distance normal and below 4; where `log`, the centre
    floor: np.ndarray  # smallest and largest value to be decoded
    ceiling: np.ndarray


def _real_row(leaf: Leaf, dtype: np.dtype) -> tuple:
    """`_Reals` of one leaf."""
    if leaf.kind != "real":
        return 0, 1, False, 1, 0, 1
    p = leaf.parameter
    floor, ceiling = inward(p, dtype)
    if not floor < ceiling:
        raise ValueError(
            f"space parameter '{leaf.path}': fewer than two numbers of {dtype} lie between low={p.low!r} and "
            f"high={p.high!r}; widen them, enable float64, or use a constant"
        )
    if p.log:
        width = _log_ratio(floor, ceiling)
        return -width / 2, width, True, math.sqrt(floor) * math.sqrt(ceiling), floor, ceiling
    limit = -int(np.finfo(dtype).minexp)
    exponent = math.frexp(max(abs(floor), abs(ceiling)))[1] - 1
    scale = 2.0 ** min(max(exponent, -limit), limit)
    low, high = dtype.type(floor / scale), dtype.type(ceiling / scale)
    width = high - low
    if low + width < high:
        width = np.nextafter(width, dtype.type(np.inf))
    return low, width, False, scale, floor, ceiling


class _Levels(NamedTuple):
    """Constants of dims with levels."""

    number: np.ndarray  # how many levels
    top: np.ndarray  # the last level, rounded down where it is no number of the dtype
    log: np.ndarray
    base: np.ndarray  # of log integers: low - 1/2, and the logarithm of (high + 1/2) / (low - 1/2)
    width: np.ndarray
    first: np.ndarray  # i32, value of level 0
    step: np.ndarray  # i32


def _level_row(leaf: Leaf, dtype: np.dtype) -> tuple:
    """`_Levels` of one leaf."""
    p, count = leaf.parameter, max(leaf.parameter.levels, 1)
    top = _below(Fraction(count - 1), dtype)
    if not isinstance(p, Int):
        return count, top, False, 1, 1, 0, 1
    low, step = int(p.low), int(p.step)
    base, width = (low - 0.5, _log_ratio(low - 0.5, low + count - 0.5)) if p.log else (1, 1)
    return count, top, bool(p.log), base, width, low, step


class _Options(NamedTuple):
    """The options of several parameters, one after the other."""

    owner: np.ndarray  # which of the parameters
    level: np.ndarray  # i32, which of its options
    first: np.ndarray  # [parameters], where its options start
    last: np.ndarray  # i32[parameters], its last level
    values: np.ndarray | None  # of numeric options


def _options(leaves: Sequence[Leaf], kind: str, dtype: np.dtype) -> _Options:
    counts = np.array([leaf.parameter.levels for leaf in leaves])
    first = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(leaves)), counts)
    level = np.arange(counts.sum()) - first[owner]
    values = None if kind == "relaxed" else np.concatenate([_values(leaf, dtype) for leaf in leaves])
    return _Options(owner, level.astype(np.int32), first, (counts - 1).astype(np.int32), values)


def _values(leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    """The numeric options of a leaf, of which no two may be one number in `dtype`."""
    options = leaf.parameter.options
    seen: dict[Any, Any] = {}
    values = []
    for option in options:
        try:
            with np.errstate(over="ignore"):
                value = dtype.type(number(option))
        except OverflowError:
            value = dtype.type(np.inf)
        other = seen.setdefault(value.item(), option)
        if other is not option or np.isinf(value) and abs(number(option)) != math.inf:
            raise ValueError(
                f"space parameter '{leaf.path}': option {option!r} is {value!r} in {dtype}"
                f"{f', and so is {other!r}' if other is not option else ''}; enable float64, or write it as a string"
            )
        values.append(value)
    return np.array(values, dtype)


def _best(options: _Options, x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The level i32[..., parameters] of the option that is x or nearest to it, or the one of largest weight."""
    score = x
    if options.values is not None:
        near = x[..., options.owner]
        score = jnp.where(near == options.values, 1, -jnp.abs(near.astype(dtype) - options.values.astype(dtype)))
    lead = x.shape[:-1]
    best = jnp.full((*lead, len(options.last)), -jnp.inf, dtype).at[..., options.owner].max(score)
    level = jnp.where(score == best[..., options.owner], options.level, options.last[options.owner])
    return jnp.broadcast_to(options.last, best.shape).at[..., options.owner].min(level)


class _Group(NamedTuple):
    """The leaves that decode alike."""

    kind: str
    members: list[int]  # their places among the leaves
    columns: np.ndarray  # their dims
    widths: list[int]  # entries of what each decodes to
    options: _Options | None


class Codec:
    """Between `unit` and the values of the leaves, for one working dtype.

    `decode(unit)` is the value of every leaf, each [..., *value_shape], for float[..., dims]; `encode(values)` is its
    inverse, the middle of a level; `level(unit)` is i32[..., dims], 0 where a dim is real.

    Args:
      leaves: the parameters, in the order of their dims.
      dtype: float32 or float64.

    Raises:
      ValueError: an interval or the options of a leaf cannot be told apart in `dtype`.
    """

    def __init__(self, leaves: Sequence[Leaf], dtype: np.dtype):
        self.leaves = leaves
        self.dtype = dtype
        integer, boolean = np.dtype(np.int32), np.dtype(bool)
        self.dtypes = {
            "real": dtype, "float": dtype, "relaxed": dtype, "index": integer, "int": integer, "bool": boolean,
        }  # fmt: skip
        sizes = [leaf.size for leaf in leaves]

        def per_dim(rows: list[tuple], dtypes: list[np.dtype]) -> list[np.ndarray]:
            columns = zip(zip(*rows, strict=True), dtypes, strict=True)
            return [np.repeat(np.array(values, dtype), sizes) for values, dtype in columns]

        self._reals = _Reals(
            *per_dim([_real_row(leaf, dtype) for leaf in leaves], [dtype, dtype, boolean] + [dtype] * 3)
        )
        kinds = [dtype, dtype, boolean, dtype, dtype, integer, integer]
        self._levels = _Levels(*per_dim([_level_row(leaf, dtype) for leaf in leaves], kinds))
        self.decode, self.encode, self.level = (
            jax.jit(function, inline=True) for function in (self._decode, self._encode, self._level)
        )
        self._groups = [self._group(kind) for kind in self.dtypes if any(leaf.kind == kind for leaf in leaves)]

    def _group(self, kind: str) -> _Group:
        members = [i for i, leaf in enumerate(self.leaves) if leaf.kind == kind]
        leaves = [self.leaves[i] for i in members]
        columns = np.concatenate([np.arange(leaf.start, leaf.start + leaf.size) for leaf in leaves])
        widths = [math.prod(leaf.parameter.value_shape) for leaf in leaves]
        has_options = kind not in ("real", "index")
        return _Group(
            kind, members, columns, widths, _options(leaves, kind, self.dtypes[kind]) if has_options else None
        )

    def _level(self, unit: jax.Array, columns: Any = slice(None)) -> jax.Array:
        c = self._at(self._levels, columns)
        index = jnp.floor(jnp.where(c.log, c.base * jnp.expm1(jnp.minimum(c.width * unit, c.width)), c.number * unit))
        return jnp.clip(index, 0, c.top).astype(jnp.int32)

    def middle(self, level: jax.Array, columns: Any = slice(None)) -> jax.Array:
        """The inverse of `_level`: coordinates in the middle of a level's share."""
        c = self._at(self._levels, columns)
        above = level.astype(self.dtype) + 0.5
        return jnp.where(c.log, jnp.log1p(above / c.base) / c.width, above / c.number)

    def _decode(self, unit: jax.Array) -> list[jax.Array]:
        values: dict[int, jax.Array] = {}
        for group in self._groups:
            flat = self._decoded(group, _take(unit, group.columns))
            parts = jax.lax.split(flat, group.widths, axis=flat.ndim - 1)
            for i, part in zip(group.members, parts, strict=True):
                values[i] = part.reshape(unit.shape[:-1] + self.leaves[i].parameter.value_shape)
        return [values[i] for i in range(len(self.leaves))]

    def _encode(self, values: Sequence[Any]) -> jax.Array:
        shapes = [leaf.parameter.value_shape for leaf in self.leaves]
        values = [jnp.asarray(value, self.dtypes[leaf.kind]) for value, leaf in zip(values, self.leaves, strict=True)]
        lead = np.broadcast_shapes(*(v.shape[: v.ndim - len(shape)] for v, shape in zip(values, shapes, strict=True)))
        parts = []
        for group in self._groups:
            columns = [
                jnp.broadcast_to(values[i], lead + shapes[i]).reshape(*lead, width)
                for i, width in zip(group.members, group.widths, strict=True)
            ]
            parts.append(self._encoded(group, jnp.concatenate(columns, axis=-1)))
        order = np.argsort(np.concatenate([group.columns for group in self._groups]))
        return _confine(_take(jnp.concatenate(parts, axis=-1), order), 0, 1)

    @functools.cached_property
    def middles(self) -> list[np.ndarray]:
        """The values of the leaves in the middle of the unit cube."""
        return [np.asarray(value) for value in self.decode(np.full(len(self._levels.number), 0.5, self.dtype))]

    def cast(self, leaf: Leaf, value: Any) -> np.ndarray:
        """One value of a leaf, within its bounds, as `decode` would return it."""
        if leaf.kind == "real":
            value = np.clip(value, *inward(leaf.parameter, self.dtype))
        return np.asarray(value).astype(self.dtypes[leaf.kind])

    def _decoded(self, group: _Group, unit: jax.Array) -> jax.Array:
        """What the leaves of a group decode to, side by side."""
        if group.kind == "real":
            r = self._at(self._reals, group.columns)
            mix = _confine(r.width * unit, 0, r.width) + r.low
            z = jnp.where(r.log, _exp(mix), mix) * r.scale
            return _confine(z, r.floor, r.ceiling)
        level, options = self._level(unit, group.columns), group.options
        if options is None:
            c = self._at(self._levels, group.columns)
            return c.first + c.step * level
        if options.values is None:
            return (level[..., options.owner] == options.level).astype(self.dtype)
        return jnp.asarray(options.values)[options.first + level]

    def _encoded(self, group: _Group, x: jax.Array) -> jax.Array:
        """The inverse of `_decoded`."""
        if group.kind == "real":
            r = self._at(self._reals, group.columns)
            mix = x / r.scale
            ratio = jnp.where(r.log, jnp.maximum(mix, np.finfo(self.dtype).tiny), 1)
            return (jnp.where(r.log, jnp.log(ratio), mix) - r.low) / r.width
        if group.options is not None:
            return self.middle(_best(group.options, x, self.dtype), group.columns)
        c = self._at(self._levels, group.columns)
        above = jnp.maximum(x, c.first).astype(np.uint32) - c.first.astype(np.uint32)  # may not fit i32
        return self.middle((above // c.step.astype(np.uint32)).astype(np.int32), group.columns)

    @staticmethod
    def _at(constants: Any, columns: Any) -> Any:
        return type(constants)(*(x[columns] for x in constants))


def _take(x: jax.Array, columns: np.ndarray) -> jax.Array:
    """x[..., columns], as a slice where that does: XLA gathers one by one."""
    start, stop = int(columns[0]), int(columns[-1]) + 1
    if np.array_equal(columns, np.arange(start, stop)):
        return x[..., start:stop]
    return x[..., columns]
