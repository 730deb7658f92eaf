"""Lines through a point along one coordinate: where a round asks on them, and how the bracket of a coordinate closes.

Kiefer (1953), Sequential minimax search for a maximum, for one point a round; even spacing for more, as in Avriel and
Wilde (1966), Optimal search for a maximum with sequences of simultaneous function evaluations. Only comparisons of
losses decide.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.space import Space
from jaxhpo.variation import levels

ONE_SIDED = 0.1
"""a side shorter than this share of the other one needs no point"""


class Bracket(NamedTuple):
    """What is known of the line along every coordinate: float[starts, dims] each; a loss of -inf is not told."""

    low: jax.Array
    """nearest told coordinate below the incumbent's, or how far below it to look; may lie outside of the cube"""
    high: jax.Array
    """the same above"""
    low_loss: jax.Array
    """loss at `low`, +inf where the trial failed"""
    high_loss: jax.Array
    """loss at `high`"""


def unknown(x: jax.Array, span: jax.Array) -> Bracket:
    """Brackets that hold the share `span` of the lines through x on either side of it."""
    nothing = jnp.full(x.shape, -jnp.inf, x.dtype)
    return Bracket((1 - span) * x, 1 - (1 - span) * (1 - x), nothing, nothing)


class Lines(NamedTuple):
    """What the lines through the incumbents have left to ask; [starts, dims] each."""

    below: jax.Array
    """float: length of the side below the incumbent"""
    above: jax.Array
    """float: and above"""
    fewer: jax.Array
    """i32: points that can go below: levels not told, or a whole ask where the dim is real"""
    more: jax.Array
    """i32: and above"""
    room: jax.Array
    """i32: points that can go on the line, 0 where it is done or the dim is not live"""
    level: jax.Array
    """i32: of the incumbent"""


def lines(
    space: Space, x: jax.Array, bracket: Bracket, told: jax.Array, section: jax.Array, resolution: jax.Array, batch: int
) -> Lines:
    """What there is to ask on every line; of a categorical of which `told` options were told, the other ones."""
    below, above = sides(x, bracket, section)
    fewer = more = room = jnp.where(jnp.maximum(below, above) > resolution, batch, 0)
    level = jnp.zeros(x.shape, jnp.int32)
    if space.levels.any():
        level, low, high = levels(space, jnp.clip(jnp.stack([x, bracket.low, bracket.high]), 0, 1))
        fewer = jnp.maximum(level - low - (bracket.low_loss > -jnp.inf), 0)
        more = jnp.maximum(high - level - (bracket.high_loss > -jnp.inf), 0)
        rest = jnp.maximum(jnp.asarray(space.levels, jnp.int32) - 1 - told, 0)
        # Where the dtype holds no point between x and its bracket, more levels than it can tell apart are left.
        tells_apart = jnp.maximum(below, above) > jnp.finfo(x.dtype).eps
        ordered = jnp.where(tells_apart, fewer + more, 0)
        options = jnp.minimum(jnp.where(jnp.asarray(space.categorical), rest, ordered), batch)
        is_real = jnp.asarray(space.levels == 0)
        fewer, more, room = (jnp.where(is_real, room, z) for z in (fewer, more, options))
    return Lines(below, above, fewer, more, jnp.where(space.active(x), room, 0), level)


def sides(x: jax.Array, bracket: Bracket, section: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far a line reaches below and above x, no further than its bounds are of use: of the shape of x."""
    below, above = x / section, (1 - x) / section
    return jnp.clip(x - bracket.low, 0, below), jnp.clip(bracket.high - x, 0, above)


def split(n: jax.Array, below: jax.Array, above: jax.Array) -> jax.Array:
    """How many of n points go below the incumbent, by the lengths of both sides; one point goes to the longer one."""
    share = jnp.round(n * below / jnp.maximum(below + above, jnp.finfo(below.dtype).tiny)).astype(jnp.int32)
    least = (below > ONE_SIDED * above).astype(jnp.int32)
    most = n - (above > ONE_SIDED * below)
    return jnp.where(n == 1, (below > above).astype(jnp.int32), jnp.clip(share, jnp.minimum(least, most), most))


def place(
    i: jax.Array, points: jax.Array, n: jax.Array, length: jax.Array, bound: jax.Array, fresh: jax.Array, section
) -> jax.Array:
    """Distance from the incumbent of the i-th of so many points on one side of it.

    Args:
      i: i32[...], from 1 on, outwards.
      points: i32[...], how many there are on this side.
      n: i32[...], and on both sides.
      length: float[...], of the side.
      bound: float[...], distance of the bound of the cube, at which the outermost point stays.
      fresh: bool[...], whether the line is asked for the first time: its ends are bounds, not points that were told,
        so the gap outside of the last point is half a gap.
      section: float[], the share of the side at which a single point goes.
    """
    gaps = points + jnp.where(fresh, 0.5, 1.0)
    at = jnp.where((n == 1) & ~fresh, section, i / gaps)
    last = jnp.where((n == 1) & ~fresh, section, points / gaps)
    return at * jnp.minimum(length, bound / jnp.maximum(last, section))


def distinct(offset: jax.Array, segment: jax.Array, i: jax.Array, points: jax.Array, room: jax.Array) -> jax.Array:
    """Offsets in levels, each larger than the one before it in its segment, from 1 to `room`: i32[starts, rows].

    Args:
      offset: i32[starts, rows], wished for, not decreasing in a segment.
      segment: i32[starts, rows], rows of one number are on one side of one line, next to each other.
      i: i32[starts, rows], from 1 on in every segment.
      points: i32[starts, rows], length of the segment.
      room: i32[starts, rows], at least `points`.
    """

    def largest(a: tuple, b: tuple) -> tuple:
        return b[0], jnp.where(a[0] == b[0], jnp.maximum(a[1], b[1]), b[1])

    slack = lax.associative_scan(largest, (segment, jnp.maximum(offset - i, 0)), axis=1)[1]
    return jnp.minimum(i + slack, room - points + i)


def along(values: jax.Array, d: jax.Array) -> jax.Array:
    """`values` of dims d: [starts, rows] for [starts, dims] and i32[starts, rows]."""
    return jnp.take_along_axis(values, d, axis=1)


def points(
    space: Space,
    x: jax.Array,
    left: Lines,
    fresh: jax.Array,
    cursor: jax.Array,
    section: jax.Array,
    d: jax.Array,
    i: jax.Array,
    n: jax.Array,
) -> jax.Array:
    """The i-th of n points on the line along d.

    Args:
      space: whose dims they are.
      x: float[starts, dims], the incumbents.
      left: what their lines have left.
      fresh: bool[starts, dims], whether a line is asked for the first time.
      cursor: i32[starts, dims], the first option of a categorical to ask.
      section: float[], as in `place`.
      d: i32[starts, rows]; rows of the same one are next to each other.
      i: i32[starts, rows], from 0 on; a row where it is negative is without a meaning.
      n: i32[starts, rows], not more than there is room for.

    Returns:
      float[starts, rows, dims], levels at their middles.
    """
    below, above, fewer, more = (along(z, d) for z in left[:4])
    under = jnp.clip(split(n, below, above), n - more, fewer)
    is_low = i < under
    i_side, n_side = jnp.where(is_low, i, i - under) + 1, jnp.where(is_low, under, n - under)
    here, mine = along(x, d), jnp.arange(space.dims) == d[..., None]
    length, bound = jnp.where(is_low, below, above), jnp.where(is_low, here, 1 - here)
    distance = place(i_side, n_side, n, length, bound, along(fresh, d), section)
    unit = jnp.where(mine, jnp.clip(here + jnp.where(is_low, -distance, distance), 0, 1)[..., None], x[:, None])
    if not space.levels.any():
        return unit
    has_levels, own = np.flatnonzero(space.levels), along(left.level, d)
    wished = jnp.where(mine, levels(space, unit), 0).sum(-1)
    segment = jnp.where(i < 0, -1, 2 * d + is_low)
    offset = distinct(jnp.abs(wished - own), segment, i_side, n_side, jnp.where(is_low, fewer, more))
    number, option = jnp.maximum(jnp.asarray(space.levels, jnp.int32), 1)[d], along(cursor, d)
    option = (option + i + (i >= (own - option) % number)) % number
    ordered = jnp.clip(own + jnp.where(is_low, -offset, offset), 0, number - 1)
    new = jnp.where(jnp.asarray(space.categorical)[d], option, ordered)
    moved = space.middle(jnp.where(mine, new[..., None], left.level[:, None])[..., has_levels])
    return unit.at[..., has_levels].set(jnp.where(mine[..., has_levels], moved, x[:, None, has_levels]))


def reopen(space: Space, bracket: Bracket, x: jax.Array, changed: jax.Array) -> Bracket:
    """Brackets with room for the neighbouring levels, which may be better once other coordinates have moved.

    Args:
      space: whose dims they are.
      bracket: around x.
      x: float[starts, dims].
      changed: bool[starts, dims], where other coordinates have.
    """
    is_ordered = (space.levels > 0) & ~space.categorical
    if not is_ordered.any():
        return bracket
    has_levels = np.flatnonzero(space.levels)
    last = space.levels[has_levels].astype(np.int32) - 1
    near = space.middle(jnp.clip(space.level(x) + jnp.array([[[-1]], [[1]]]), 0, last))
    below, above = jnp.broadcast_to(x, (2, *x.shape)).at[..., has_levels].set(near)
    lower, upper = (changed & is_ordered & z for z in (bracket.low >= below, bracket.high <= above))
    return Bracket(
        low=jnp.where(lower, below, bracket.low),
        high=jnp.where(upper, above, bracket.high),
        low_loss=jnp.where(lower, -jnp.inf, bracket.low_loss),
        high_loss=jnp.where(upper, -jnp.inf, bracket.high_loss),
    )


class Told(NamedTuple):
    """Rows of a tell that lie on a line through their start's point."""

    on: jax.Array
    """bool[rows]: whether they do; the rest of the row counts only then"""
    start: jax.Array
    """i32[rows]"""
    coordinate: jax.Array
    """i32[rows]: along which one"""
    at: jax.Array
    """float[rows]: where on it"""
    loss: jax.Array
    """float[rows], +inf where the trial failed"""


def close(bracket: Bracket, x: jax.Array, loss: jax.Array, pivot: jax.Array, rows: Told, widen: jax.Array) -> Bracket:
    """Brackets after a tell: the nearest points on either side of the best one.

    Where the incumbent has moved to the outermost point of its line, the bracket widens to that side: it reaches
    `widen` times as far as to the nearest point of the other side. A line with a better point than x that is not the
    best of all coordinates stays as it is.

    Args:
      bracket: before.
      x: float[starts, dims], the incumbents before.
      loss: float[starts], theirs.
      pivot: float[starts, dims], where their lines were found to be best: differs from x in one coordinate at most.
      rows: what was told on lines through x.
      widen: float[].
    """
    starts, dims = x.shape
    moved = pivot != x
    here = jnp.where(rows.on, rows.start, starts), rows.coordinate
    pivots = pivot[rows.start, rows.coordinate]
    line_best = jnp.full((starts, dims), jnp.inf, x.dtype).at[here].min(rows.loss, mode="drop")
    waits = (line_best < loss[:, None]) & ~moved
    left = (jnp.where(rows.on & (rows.at < pivots), rows.start, starts), rows.coordinate)
    right = (jnp.where(rows.on & (rows.at > pivots), rows.start, starts), rows.coordinate)
    none = jnp.full((starts, dims), -jnp.inf, x.dtype)

    def nearest(index: tuple, sign: int, old: jax.Array, old_loss: jax.Array) -> tuple[jax.Array, ...]:
        """Seen with the axis mirrored for the upper side, so that nearest is largest."""
        told = none.at[index].max(sign * rows.at, mode="drop")
        own = moved & (sign * x < sign * pivot)
        near = jnp.where(own, jnp.maximum(told, sign * x), told)
        same = jnp.where(sign * rows.at == near[rows.start, rows.coordinate], rows.loss, jnp.inf)
        near_loss = (-none).at[index].min(same, mode="drop")
        near_loss = jnp.where(own & (sign * x == near), loss[:, None], near_loss)
        return near, near_loss, sign * old, old_loss

    low, low_loss, old_low, old_low_loss = nearest(left, 1, bracket.low, bracket.low_loss)
    high, high_loss, old_high, old_high_loss = nearest(right, -1, bracket.high, bracket.high_loss)

    def end(near, near_loss, old, old_loss, own, other) -> tuple[jax.Array, jax.Array]:
        reach = jnp.where(moved & jnp.isfinite(other), own - widen * (-other - own), own)
        outermost = jnp.minimum(old, reach)
        at = jnp.where(moved, jnp.where(jnp.isfinite(near), near, outermost), jnp.maximum(near, old))
        value = jnp.where(at == near, near_loss, jnp.where(at == old, old_loss, -jnp.inf))
        return jnp.where(waits, old, at), jnp.where(waits, old_loss, value)

    new_low, new_low_loss = end(low, low_loss, old_low, old_low_loss, pivot, high)
    new_high, new_high_loss = end(high, high_loss, old_high, old_high_loss, -pivot, low)
    return Bracket(new_low, -new_high, new_low_loss, new_high_loss)
