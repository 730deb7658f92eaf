"""A forest of randomised regression trees: the surrogate for mixed, conditional and many dims, and for many trials.

Geurts, Ernst and Wehenkel (2006), Extremely randomized trees, section 2.1: every node draws a threshold in each of some
dims at random and keeps the one that reduces the variance of the targets the most. Hutter, Xu, Hoos and Leyton-Brown
(2014), Algorithm runtime prediction: methods and evaluation, for the mean and the variance of the
forest (the law of total variance) and for thresholds anywhere between two values that were seen, which make the trees
differ, and the forest uncertain, in the gaps between trials.

All trees grow together, level by level. A tree keeps its rows in an order in which each node owns a range, so that a
node is known by where its range starts, sums over a node are differences of running sums, and a level of a tree of any
shape is an array with an entry for each row. Two things differ from the papers. A threshold lies between the values
of two rows of the node, drawn at random, not between its extremes: trees stay shallow where trials crowd together. And
the levels of a categorical get a random order, afresh at every depth of every tree, in which they are split like
numbers: a random subset of them goes to the left.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.draws import bits, scramble, uniform
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import levels, snapped

NOT_LIVE = -1.0
CATEGORICAL = 2.0
PRIOR_ROWS = 1.0
LEAST_VARIANCE = 1e-6
LEAST_GAIN = 1e-12
MORE = 4
TOGETHER = 16
BLOCK = 32


class Forest(NamedTuple):
    """Trees as tables: the entry [d, t, s] is the node of tree t at depth d whose rows start at s."""

    split: jax.Array
    """i32[depth, trees, rows]: the dim that a node splits, plus `dims` times which of its tries it was"""
    threshold: jax.Array
    """float[depth, trees, rows]: rows up to it go to the left, which starts where the node does"""
    right: jax.Array
    """i32[depth, trees, rows]: where the right child starts; where the node does if it has none"""
    order: jax.Array
    """u32[depth, trees]: what the order of levels is hashed from"""
    mean: jax.Array
    """float[trees, rows]: of the targets in the leaf that starts here"""
    variance: jax.Array
    """float[trees, rows]: of the targets in the leaf, drawn towards that of the nodes above it"""
    size: jax.Array
    """i32[trees, rows]: how many rows the leaf has"""


class _Nodes(NamedTuple):
    """What every row of the growing trees knows of its node; float or i32[trees, rows]."""

    row: jax.Array
    """the row of the data that is kept in this place"""
    start: jax.Array
    size: jax.Array
    mean: jax.Array
    prior: jax.Array
    """the variance that is expected of the node, from those above it"""


class _Draws(NamedTuple):
    """Random choices at one depth."""

    where: jax.Array
    """float[trees, 2] in (0, 1): which two rows of a node have the thresholds between them"""
    between: jax.Array
    """float[trees, k] in (0, 1): how far from the lower one"""
    order: jax.Array
    """u32[trees]: of the levels"""
    dims: jax.Array | None
    """i32[trees, k]: dims that are tried; `None` where all are"""


def coordinates(space: Space, unit: jax.Array) -> jax.Array:
    """What trees split, float[..., dims]: equal for points that decode to the same.

    A real coordinate is itself, an ordered level its middle, a level without order its number from 2 up, and what is
    not live is -1.
    """
    values = snapped(space, jnp.asarray(unit, working_dtype()))
    if space.categorical.any():
        values = jnp.where(space.categorical, levels(space, unit) + CATEGORICAL, values)
    return jnp.where(space.active(unit), values, NOT_LIVE) if space.nesting else values


def _ordered(space: Space, values: jax.Array, order: jax.Array) -> jax.Array:
    """`coordinates` with the levels of categoricals as numbers in (0, 1), in a random order that `order` decides."""
    if not space.categorical.any():
        return values
    drawn = scramble(values.astype(jnp.int32).astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + order)
    return jnp.where(values >= CATEGORICAL, uniform(drawn), values)


def _running_sums(values: jax.Array) -> jax.Array:
    """Sums over all rows up to each, float[trees, rows, k], by two products of matrices: `cumsum` takes four times."""
    trees, rows, k = values.shape
    short = -rows % BLOCK
    blocks = jnp.pad(values, ((0, 0), (0, short), (0, 0))).reshape(trees, -1, BLOCK, k)
    within = jnp.tril(jnp.ones((BLOCK, BLOCK), values.dtype))
    before = jnp.tril(jnp.ones((blocks.shape[1],) * 2, values.dtype), -1)
    inside = jnp.einsum("ij,tbjk->tbik", within, blocks, precision="highest")
    sums = inside + jnp.einsum("ij,tjk->tik", before, inside[:, :, -1], precision="highest")[:, :, None]
    return sums.reshape(trees, -1, k)[:, :rows]


def _at(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[t, index[t]]` of every tree t: [trees, n, ...] for [trees, rows, ...] and i32[trees, n]."""
    trees, rows = table.shape[:2]
    first = jnp.arange(trees, dtype=jnp.int32)[:, None] * rows
    return table.reshape(trees * rows, *table.shape[2:])[first + index]


def _before(sums: jax.Array, start: jax.Array) -> jax.Array:
    """The running sums at the row before each node's first."""
    return jnp.where((start > 0)[..., None], _at(sums, jnp.maximum(start - 1, 0)), 0)


def _tries(space: Space, splits: int) -> np.ndarray:
    """The splits that every node tries if it tries all dims, i32[k]: the dim, and `dims` times which try it is.

    A categorical has more of them, for the many ways to part its levels, as long as all are about twice `splits`.
    """
    least = -(-splits // space.dims)
    spare = max(2 * splits - least * space.dims, 0) // max(space.categorical.sum(), 1)
    more = np.minimum(least * np.clip(space.levels - 1, 1, MORE), least + spare)
    number = np.where(space.categorical, more, least)
    return np.concatenate([d + space.dims * np.arange(n) for d, n in enumerate(number)]).astype(np.int32)


def _columns(
    space: Space, values: jax.Array, row: jax.Array, tries: np.ndarray | jax.Array, order: jax.Array
) -> jax.Array:
    """The coordinates of some rows in the dims that are tried: float[trees, rows, k] for i32[trees, rows].

    Args:
      space: whose dims they are.
      values: float[n, dims].
      row: i32[trees, rows].
      tries: i32[k], or i32[trees, k] for each tree.
      order: u32[trees].
    """
    orders = (order[:, None] + (tries // space.dims).astype(np.uint32))[:, None]
    if tries.ndim == 1:
        return _ordered(space, values[:, tries % space.dims][row], orders)
    return _ordered(space, values.reshape(-1)[row[..., None] * space.dims + tries[:, None]], orders)


def _pick(columns: jax.Array, best: jax.Array) -> jax.Array:
    return jnp.take_along_axis(columns, best[..., None], -1)[..., 0]


def _grow(
    space: Space, values: jax.Array, target: jax.Array, splits: int, leaf: int, nodes: _Nodes, draws: _Draws
) -> tuple[_Nodes, tuple[jax.Array, ...]]:
    """Splits every node of one depth, and how: the tables of a `Forest` at that depth."""
    trees, rows = nodes.row.shape
    k = draws.between.shape[1]
    tries = _tries(space, splits) if draws.dims is None else draws.dims
    row, start, size, place = nodes.row, nodes.start, nodes.size, jnp.arange(rows, dtype=jnp.int32)
    one = (draws.where[:, :1] * size).astype(jnp.int32)
    other = (one + 1 + (draws.where[:, 1:] * (size - 1)).astype(jnp.int32)) % size
    at = lambda rows: _columns(space, values, rows, tries, draws.order)  # noqa: E731
    here, ends = at(row), (at(_at(row, start + one)), at(_at(row, start + other)))
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    threshold = low + draws.between[:, None] * (high - low)
    is_left = here <= threshold

    residual = target[row] - nodes.mean
    share = is_left.astype(values.dtype)
    terms = [share, share * residual[..., None], (residual * residual)[..., None]]
    sums = _running_sums(jnp.concatenate(terms, -1))
    before = _before(sums, start)
    totals = _at(sums, start + size - 1) - before
    left, gain = totals[..., :k], totals[..., k : 2 * k]
    right = size[..., None] - left
    allowed = (left >= leaf) & (right >= leaf) & (low < high)
    # The variance of the targets that goes away, in the residuals from the node's mean.
    reduction = jnp.where(allowed, gain * gain / jnp.maximum(left * right, 1), 0)
    best = jnp.argmax(reduction, -1).astype(jnp.int32)

    parts = _pick(reduction, best) > LEAST_GAIN
    lefts, sum_left = _pick(left, best).astype(jnp.int32), _pick(gain, best)
    goes_left = _pick(is_left, best)
    rank = _pick(sums[..., :k], best).astype(jnp.int32) - _pick(before[..., :k], best).astype(jnp.int32)
    moved = jnp.where(goes_left, start + rank - 1, place + lefts - rank)
    moved = jnp.where(parts, moved, place) + jnp.arange(trees, dtype=jnp.int32)[:, None] * rows
    row = jnp.zeros(trees * rows, jnp.int32).at[moved.reshape(-1)].set(row.reshape(-1), unique_indices=True)

    middle = jnp.where(parts, start + lefts, start)
    is_right = parts & (place >= middle)
    rights = jnp.maximum(size - lefts, 1)
    change = jnp.where(is_right, -sum_left / rights, sum_left / jnp.maximum(lefts, 1))
    children = _Nodes(
        row=row.reshape(trees, rows),
        start=jnp.where(is_right, middle, start),
        size=jnp.where(parts, jnp.where(is_right, rights, lefts), size),
        mean=nodes.mean + jnp.where(parts, change, 0),
        prior=jnp.where(parts, _shrunk(totals[..., -1], size, nodes.prior), nodes.prior),
    )
    tried = jnp.asarray(tries)[best] if draws.dims is None else jnp.take_along_axis(draws.dims, best, 1)
    return children, (tried, _pick(threshold, best), middle)


def _shrunk(squares: jax.Array, size: jax.Array, prior: jax.Array) -> jax.Array:
    """The variance of `size` targets whose squared residuals sum to `squares`, and of one more that has the prior."""
    return (jnp.maximum(squares, 0) + PRIOR_ROWS * prior) / (size + PRIOR_ROWS)


def _subsamples(key: jax.Array, mask: jax.Array, trees: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """Rows for each tree, i32[trees, rows], and how many of those are live: all, or random ones where that is more."""
    key_order, key_from = jax.random.split(key)
    order = jnp.argsort(jnp.where(mask, bits(key_order, mask.shape) >> 1, jnp.uint32(2**32 - 1)))
    live = mask.sum(dtype=jnp.int32)
    first = (uniform(bits(key_from, (trees,))) * live).astype(jnp.int32)
    turn = (first[:, None] + jnp.arange(rows, dtype=jnp.int32)) % jnp.maximum(live, 1)
    return order[turn].astype(jnp.int32), jnp.minimum(live, rows)


def _grown(
    space: Space,
    values: jax.Array,
    target: jax.Array,
    splits: int,
    leaf: int,
    live: jax.Array,
    row: jax.Array,
    draws: _Draws,
) -> Forest:
    """Some trees of the forest, from their rows i32[trees, rows], of which the first `live` are theirs."""
    trees, rows = row.shape
    place = jnp.arange(rows, dtype=jnp.int32)
    is_live = place < live
    whole = lambda x: jnp.broadcast_to(x, (trees, rows))  # noqa: E731
    mean = jnp.where(is_live, target[row], 0).sum(1, keepdims=True) / jnp.maximum(live, 1)
    # Places without a row are leaves of their own: nothing ever comes to them.
    root = _Nodes(
        row=row,
        start=whole(jnp.where(is_live, 0, place)),
        size=whole(jnp.where(is_live, live, 1)),
        mean=whole(mean),
        prior=whole(jnp.ones_like(mean)),
    )
    grow = functools.partial(_grow, space, values, target, splits, leaf)
    leaves, (split, threshold, right) = lax.scan(grow, root, draws)
    residual = target[leaves.row] - leaves.mean
    sums = _running_sums(jnp.where(is_live, residual * residual, 0)[..., None])
    squares = (_at(sums, leaves.start + leaves.size - 1) - _before(sums, leaves.start))[..., 0]
    size = whole(jnp.where(is_live, leaves.size, 0))
    return Forest(split, threshold, right, draws.order, leaves.mean, _shrunk(squares, size, leaves.prior), size)


def fit(
    key: jax.Array,
    space: Space,
    unit: jax.Array,
    target: jax.Array,
    mask: jax.Array,
    *,
    trees: int = 64,
    depth: int | None = None,
    rows: int = 1024,
    splits: int = 10,
    leaf: int = 2,
) -> Forest:
    """A forest that has learned the rows that `mask` marks.

    Args:
      key: of the random choices.
      space: whose points they are.
      unit: float[n, dims] in [0, 1].
      target: float[n], finite where marked, of mean 0 and variance 1: what is expected of a tree without rows.
      mask: bool[n]; nothing is read of the other rows.
      trees: how many, at least 1.
      depth: of the trees, 2 more than binary ones of single rows would have if not given.
      rows: what a tree learns from at most, at least 1: all rows up to this number, else that many random ones.
      splits: how many splits a node tries at least: in every dim, or in that many random ones where there are more.
      leaf: rows in a leaf at least.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> from jaxhpo.sequential.surrogate import forest
      >>> space = hpo.Space({"x": hpo.Float(0, 1), "kind": hpo.Categorical(("a", "b"))})
      >>> unit = space.sample(jax.random.key(0), 64)
      >>> target = jnp.where(unit[:, 1] < 0.5, 1.0, -1.0)
      >>> trees = forest.fit(jax.random.key(1), space, unit, target, jnp.ones(64, bool), trees=16)
      >>> mean, std = forest.predict(trees, space, jnp.array([[0.5, 0.25], [0.5, 0.75]]))
      >>> mean.round(1).tolist()
      [1.0, -1.0]
    """
    rows = min(rows, unit.shape[0])
    depth = (rows - 1).bit_length() + 2 if depth is None else depth
    values, target = coordinates(space, unit), jnp.where(mask, target, 0).astype(working_dtype())
    key_rows, key_dims, key_splits, key_order = jax.random.split(key, 4)
    row, live = _subsamples(key_rows, mask, trees, rows)
    tries_all = space.dims <= splits
    k = _tries(space, splits).size if tries_all else splits
    # A few trees at a time, as many as fit in a processor's cache.
    groups = trees // TOGETHER if trees % TOGETHER == 0 else 1
    group = (groups, depth, trees // groups)
    drawn = uniform(bits(key_splits, (*group, 2 + k)))
    # One dim out of each of k equal ranges of them: a sort of random numbers would take longer than the trees.
    which = (jnp.arange(k) + uniform(bits(key_dims, (*group, k)))) * (space.dims / k)
    draws = _Draws(
        where=drawn[..., :2],
        between=drawn[..., 2:],
        order=bits(key_order, group),
        dims=None if tries_all else jnp.minimum(which.astype(jnp.int32), space.dims - 1),
    )

    def grove(own: tuple[jax.Array, _Draws]) -> Forest:
        return _grown(space, values, target, splits, leaf, live, *own)

    found = lax.map(grove, (row.reshape(groups, -1, rows), draws))
    by_depth = [jnp.moveaxis(x, 0, 1).reshape(depth, trees, *x.shape[3:]) for x in found[:4]]
    return Forest(*by_depth, *(x.reshape(trees, rows) for x in found[4:]))


def _leaf(forest: Forest, space: Space, unit: jax.Array) -> jax.Array:
    """Where the leaf starts that each point falls in: i32[trees, c]."""
    values = coordinates(space, unit)
    flat, first = values.reshape(-1), jnp.arange(unit.shape[0], dtype=jnp.int32) * space.dims

    def descend(start: jax.Array, depth: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        split, threshold, right, order = depth
        tried = _at(split, start)
        orders = order[:, None] + (tried // space.dims).astype(jnp.uint32)
        value = _ordered(space, flat[first + tried % space.dims], orders)
        return jnp.where(value <= _at(threshold, start), start, _at(right, start)), None

    start = jnp.zeros((forest.mean.shape[0], unit.shape[0]), jnp.int32)
    return lax.scan(descend, start, (forest.split, forest.threshold, forest.right, forest.order))[0]


def predict(forest: Forest, space: Space, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and the standard deviation of the forest: float[c] each, for points float[c, dims].

    The variance is that of the trees' means and the mean of the leaves' variances.
    """
    leaf = _leaf(forest, space, unit)
    means = _at(forest.mean, leaf)
    mean = means.mean(0)
    variance = ((means - mean) ** 2).mean(0) + _at(forest.variance, leaf).mean(0)
    return mean, jnp.sqrt(jnp.maximum(variance, LEAST_VARIANCE))


def sample_tree(key: jax.Array, forest: Forest, space: Space, unit: jax.Array) -> jax.Array:
    """What one tree, drawn at random, predicts: float[c] for points float[c, dims]; for Thompson sampling."""
    tree = jax.random.randint(key, (), 0, forest.mean.shape[0], jnp.int32)
    alone = lambda axis: lambda table: lax.dynamic_slice_in_dim(table, tree, 1, axis)  # noqa: E731
    one = Forest(*map(alone(1), forest[:4]), *map(alone(0), forest[4:]))
    return _at(one.mean, _leaf(one, space, unit))[0]
