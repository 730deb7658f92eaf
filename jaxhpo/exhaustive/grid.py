"""Grid search: the full factorial of a few values of every parameter.

Fisher (1935), The Design of Experiments, chapter VI. A conditional parameter counts only where it is live, so the grid
of a `OneOf` is the sum of its branches' grids, that of independent parameters their product. A cell's number is read
as digits in this mixed radix on the device; no table of cells exists.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.checks import whole
from jaxhpo.method import Count, Method, PyTree, Trials, black_box, count
from jaxhpo.parameters import Int, OneOf
from jaxhpo.space import Leaf, Space

MAX_CELLS = 2**30
POINTS = 5


class State(NamedTuple):
    """How far the grid is."""

    asked: Count
    """i32[]: cells asked for so far"""


class _Layout(NamedTuple):
    """The mixed radix, one entry a dim unless said otherwise."""

    cells: int  # of the whole grid
    radix: np.ndarray  # number of digits; of a OneOf, the cells of all its branches
    stride: np.ndarray  # cells of the siblings behind it
    parent: np.ndarray  # dim of the OneOf it depends on, -1 = none
    offset: np.ndarray  # first cell of its branch in the parent's
    depth: int  # of the nesting
    choices: np.ndarray  # dims that are a OneOf
    starts: np.ndarray  # [choices, branches]: first cell of every branch
    first: np.ndarray  # of its values
    values: np.ndarray  # all values, as points of the unit interval


def _spread(levels: int, points: int, position: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`points` distinct levels, ends included, as near to evenly spread as distinct ones can be."""
    if points >= levels:
        return np.arange(levels)
    if points == 1:
        return position(np.array([0.5]))
    chosen = position(np.linspace(0, 1, points))
    steps = np.arange(points)
    chosen = np.maximum.accumulate(chosen - steps) + steps
    return np.minimum(chosen, levels - points + steps)


def _values(leaf: Leaf, levels: int, points: int) -> np.ndarray:
    """The grid of one parameter, in the unit interval: a level is its middle."""
    parameter = leaf.parameter
    if not levels:
        return np.linspace(0, 1, points) if points > 1 else np.array([0.5])
    if not (isinstance(parameter, Int) and parameter.log):
        chosen = _spread(levels, points, lambda u: np.round(u * (levels - 1)).astype(np.int64))
        return (chosen + 0.5) / levels
    low = parameter.low
    ends = np.log([low, low + levels - 1])
    chosen = _spread(levels, points, lambda u: np.round(np.exp(ends[0] * (1 - u) + ends[1] * u)).astype(np.int64) - low)
    owned = np.log([low - 0.5, low + levels - 0.5])
    return (np.log(chosen + low) - owned[0]) / (owned[1] - owned[0])


def _points(space: Space, points: int | Mapping[str, int]) -> tuple[int, ...]:
    """The number of values of every leaf, checked."""
    given = dict(points) if isinstance(points, Mapping) else {}
    adjustable = {x.path for x in space.leaves if not space.levels[x.start] or isinstance(x.parameter, Int)}
    for path in given:
        if path not in adjustable:
            raise ValueError(f"points has {path!r}, but only these parameters take a number: {sorted(adjustable)}")
    default = POINTS if isinstance(points, Mapping) else points
    counts = []
    for leaf in space.leaves:
        levels = int(space.levels[leaf.start])
        number = whole(f"points of '{leaf.path}'", given.get(leaf.path, default), 1)
        is_free = not levels or isinstance(leaf.parameter, Int)
        counts.append(min(number, levels or number) if is_free else levels)
    return tuple(counts)


def _layout(space: Space, counts: tuple[int, ...]) -> _Layout:
    radix, stride, offset = ([1] * space.dims for _ in range(3))
    parent = np.repeat([x.parent for x in space.leaves], [x.size for x in space.leaves])
    cells: dict[tuple[int, int], int] = {}  # of the subtree below (dim of a OneOf, branch)
    starts: dict[int, list[int]] = {}
    for leaf, number in zip(reversed(space.leaves), reversed(counts), strict=True):
        if isinstance(leaf.parameter, OneOf):
            each = [cells.get((leaf.start, b), 1) for b in range(number)]
            starts[leaf.start] = [sum(each[:b]) for b in range(number)]
            number = sum(each)
        subtree = (leaf.parent, leaf.branch)
        for dim in reversed(range(leaf.start, leaf.start + leaf.size)):
            radix[dim], stride[dim] = number, cells.get(subtree, 1)
            cells[subtree] = number * stride[dim]
    total = cells[(-1, 0)]
    if total > MAX_CELLS:
        raise ValueError(_too_many(space, counts, total))
    for leaf in space.leaves:
        begin = starts[leaf.parent][leaf.branch] if leaf.parent >= 0 else 0
        offset[leaf.start : leaf.start + leaf.size] = [begin] * leaf.size
    values = [
        _values(leaf, int(space.levels[leaf.start]), number) for leaf, number in zip(space.leaves, counts, strict=True)
    ]
    first = np.cumsum([0] + [len(v) for v in values[:-1]])
    width = max((len(x) for x in starts.values()), default=1)
    choices = sorted(starts)
    above, depth = parent, 0
    while (above >= 0).any():
        above, depth = np.where(above >= 0, parent[above], -1), depth + 1
    integers = functools.partial(np.asarray, dtype=np.int32)
    return _Layout(
        cells=total,
        radix=integers(radix),
        stride=integers(stride),
        parent=parent,
        offset=integers(offset),
        depth=depth,
        choices=integers(choices),
        starts=integers([starts[c] + [MAX_CELLS] * (width - len(starts[c])) for c in choices]).reshape(-1, width),
        first=integers(np.repeat(first, [x.size for x in space.leaves])),
        values=np.concatenate(values),
    )


def _too_many(space: Space, counts: tuple[int, ...], cells: int) -> str:
    leaves = zip(space.leaves, counts, strict=True)
    largest, number = max(leaves, key=lambda pair: pair[0].size * math.log(pair[1]))
    entries = f" in each of {largest.size} entries" if largest.size > 1 else ""
    fewer = {largest.path: 1 if largest.size > 1 else 2}
    return (
        f"a grid of about 10^{math.log10(cells):.0f} cells, more than {MAX_CELLS}; most from parameter "
        f"'{largest.path}' with {number} values{entries}: give fewer points, such as points={fewer}, or use quasirandom"
    )


def _unit(space: Space, layout: _Layout, cell: jax.Array) -> jax.Array:
    """Cells by their number, i32[batch], as points of the unit cube; dims that are not live are 0.5."""
    whole = jnp.broadcast_to(cell[:, None], (cell.shape[0], space.dims))
    digit = whole // layout.stride % layout.radix
    for _ in range(layout.depth):
        within = jnp.where(layout.parent < 0, whole, digit[:, layout.parent] - layout.offset)
        digit = within // layout.stride % layout.radix
    branch = (digit[:, layout.choices, None] >= layout.starts).sum(axis=-1, dtype=jnp.int32) - 1
    digit = digit.at[:, layout.choices].set(branch)
    unit = jnp.asarray(layout.values, jnp.result_type(float))[layout.first + digit]
    return jnp.where(space.active(unit), unit, jnp.asarray(0.5, unit.dtype))


@functools.lru_cache(maxsize=256)
def _functions(space: Space, counts: tuple[int, ...], batch: int) -> tuple[Callable, Callable, Callable, int]:
    layout = _layout(space, counts)

    def init(key: jax.Array, settings: PyTree = None) -> State:
        del key, settings
        return State(asked=count())

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del key, pending
        asked = state.asked.value
        cell = asked + jnp.arange(batch, dtype=jnp.int32)
        trials = black_box(space, _unit(space, layout, cell), first=asked, active=cell < layout.cells)
        return trials, State(asked=Count(jnp.minimum(asked + batch, layout.cells)))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del trials, losses, gradients
        return state

    return init, ask, tell, -(-layout.cells // batch)


def grid(space: PyTree, *, points: int | Mapping[str, int] = POINTS, batch: int = 16) -> Method:
    """Grid search: every combination once, the last parameter fastest; it ends by itself.

    Options of a `Categorical` or `Ordinal` and branches of a `OneOf` are all in the grid; a parameter of a branch only
    together with that branch.

    Args:
      space: a pytree of parameters, or a `Space`.
      points: values of every real parameter, ends included, evenly spread (in the logarithm where `log`), and of every
        `Int` that has more levels; an int, or a dict from path ("optimizer.sgd.momentum") to int with 5 elsewhere.
      batch: trials per ask; the last ask is filled up with padding.

    Returns:
      A `Method` without settings, whose `rounds` is the number of asks that cover the grid.

    Raises:
      ValueError: the grid has more than 2**30 cells, or `points` is not valid.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.grid({"lr": hpo.Float(0.0, 1.0), "act": hpo.Categorical(("relu", "gelu"))}, points=3, batch=6)
      >>> trials, _ = method.ask(jax.random.key(1), method.init(jax.random.key(0)))
      >>> [method.space.native(trials.hparams, i) for i in (0, 5)], method.rounds
      ([{'act': 'relu', 'lr': 0.0}, {'act': 'gelu', 'lr': 1.0}], 1)

    Reference:
      Fisher (1935), The Design of Experiments.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    init, ask, tell, rounds = _functions(space, _points(space, points), batch)
    return Method("grid", space, (), init, ask, tell, batch, rounds=rounds)
