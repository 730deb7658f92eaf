"""What methods that move points share: bounds by reflection, moves between levels, and what is inherited together.

All of it works on points of the unit cube, whole populations at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.draws import bits, uniform
from jaxhpo.space import Space


def reflect(unit: jax.Array) -> jax.Array:
    """Points mirrored at the bounds of the unit cube, as often as it takes: float[..., dims] in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxhpo.variation import reflect
      >>> reflect(jnp.array([0.25, -0.25, 1.25, -2.75])).tolist()
      [0.25, 0.25, 0.75, 0.75]
    """
    folded = jnp.abs(unit - 2 * jnp.round(unit / 2))
    return jnp.minimum(folded, 1)


def levels(space: Space, unit: jax.Array) -> jax.Array:
    """The level of every dim, 0 where it is real: i32[..., dims] for float[..., dims]."""
    has_levels = np.flatnonzero(space.levels)
    return jnp.zeros(unit.shape, jnp.int32).at[..., has_levels].set(space.level(unit))


def snapped(space: Space, unit: jax.Array) -> jax.Array:
    """Points with their levels in the middle: float[..., dims]."""
    has_levels = np.flatnonzero(space.levels)
    if not has_levels.size:
        return unit
    return unit.at[..., has_levels].set(space.middle(space.level(unit)).astype(unit.dtype))


def with_subtrees(space: Space, take: jax.Array, mine: jax.Array, yours: jax.Array) -> jax.Array:
    """Which coordinates a child takes from its second parent, where a `OneOf` carries its subtree along.

    Where the parents have chosen different branches, everything below the switch comes from where the choice came
    from: a branch whose parent never ran it holds nothing that was learned.

    Args:
      space: whose dims they are.
      take: bool[..., dims], wished for dim by dim.
      mine: float[..., dims], the first parent.
      yours: float[..., dims], the second parent.

    Returns:
      bool[..., dims].
    """
    if not space.nesting:
        return take
    is_below, parent = jnp.asarray(space.parent >= 0), np.maximum(space.parent, 0)
    differ = levels(space, mine) != levels(space, yours)
    follows = jnp.zeros(take.shape, bool)
    for _ in range(space.nesting):
        follows = is_below & (differ | follows)[..., parent]
        take = jnp.where(follows, take[..., parent], take)
    return take


def differs(space: Space, a: jax.Array, b: jax.Array, live: jax.Array | None) -> jax.Array:
    """Whether two points decode to something else: bool[n] for float[n, dims].

    Args:
      space: whose points they are.
      a: float[n, dims].
      b: float[n, dims].
      live: bool[n, dims], the dims that count; all if not given.
    """
    other, has_levels = a != b, np.flatnonzero(space.levels)
    if has_levels.size:
        other = other.at[..., has_levels].set(space.level(a) != space.level(b))
    return (other if live is None else other & live).any(-1)


def one_dim(space: Space, live: jax.Array | None, uniform: jax.Array) -> jax.Array:
    """A dim of each row that can change, any of those with the same chance: bool[n, dims], all False where none can.

    Args:
      space: whose dims they are.
      live: bool[n, dims], the dims that count; all if not given.
      uniform: float[n] in [0, 1).
    """
    changeable = np.flatnonzero(space.levels != 1)
    if live is not None:
        free = live & (space.levels != 1)
        turn = jnp.cumsum(free, axis=1)
        return free & (turn == 1 + (uniform * turn[:, -1]).astype(jnp.int32)[:, None])
    if not changeable.size:
        return jnp.zeros((*uniform.shape, space.dims), bool)
    index = jnp.asarray(changeable)[(uniform * changeable.size).astype(jnp.int32)]
    return jnp.arange(space.dims) == index[:, None]


def collapsed(
    space: Space, unit: jax.Array, loss: jax.Array, tolerance: jax.Array, is_member: jax.Array | None = None
) -> jax.Array:
    """Whether all members are one point, in the dims that are live: bool[]; not before all have a finite loss.

    Args:
      space: whose points they are.
      unit: float[population, dims].
      loss: float[population], +inf where none is known.
      tolerance: float[], range in a real dim below which it counts as one.
      is_member: bool[population], the rows that count, the first one among them; all if not given.
    """
    counts = jnp.ones(loss.shape, bool) if is_member is None else is_member
    inside = lambda x: jnp.where(counts[:, None], x, x[0])  # noqa: E731
    has_levels = np.flatnonzero(space.levels)
    apart = inside(unit).max(0) - inside(unit).min(0) >= tolerance
    if has_levels.size:
        level = inside(space.level(unit))
        apart = apart.at[has_levels].set((level != level[0]).any(0))
    return (jnp.isfinite(loss) | ~counts).all() & ~(apart & space.active(unit[0])).any()


def latin_hypercube(key: jax.Array, n: int, dims: int) -> jax.Array:
    """Random points of which each of n equal slices of every dim holds one: float[n, dims].

    McKay, Beckman and Conover (1979), A comparison of three methods for selecting values of input variables.
    """
    key_order, key_within = jax.random.split(key)
    order = jnp.argsort(bits(key_order, (n, dims)), axis=0)
    return (order + uniform(bits(key_within, (n, dims)))) / n


def another_level(space: Space, unit: jax.Array, uniform: jax.Array) -> jax.Array:
    """Coordinates in the middle of another level of their dim; real dims, and those with one level, stay as they are.

    Args:
      space: whose dims they are.
      unit: float[..., dims] in [0, 1].
      uniform: float[..., dims] in [0, 1), which of the other levels.
    """
    has_levels = np.flatnonzero(space.levels > 0)
    number = space.levels[has_levels].astype(np.int32)
    level = space.level(unit)
    step = 1 + jnp.minimum((uniform[..., has_levels] * (number - 1)).astype(jnp.int32), number - 2)
    moved = jnp.where(number > 1, space.middle((level + step) % number), unit[..., has_levels])
    return unit.at[..., has_levels].set(moved)


def polynomial_mutation(x: jax.Array, uniform: jax.Array, eta: jax.Array) -> jax.Array:
    """Coordinates in [0, 1] moved by a polynomial of degree `eta` that ends at the bounds; inward from a bound.

    Deb and Goyal (1996), A combined genetic adaptive search (GeneAS) for engineering design.
    """
    outward = ((x <= 0) & (uniform < 0.5)) | ((x >= 1) & (uniform > 0.5))
    u = jnp.where(outward, 1 - uniform, uniform)
    is_down = u < 0.5
    tail, room = jnp.where(is_down, 2 * u, 2 * (1 - u)), jnp.where(is_down, 1 - x, x)
    step = 1 - (tail + (1 - tail) * room ** (eta + 1)) ** (1 / (eta + 1))
    return jnp.clip(jnp.where(is_down, x - step, x + step), 0, 1)


def mutate(space: Space, unit: jax.Array, at: jax.Array, uniform: jax.Array, eta: jax.Array) -> jax.Array:
    """Points mutated in at most one dim: reals by a polynomial, integers too but by a level at least, others anyhow.

    Args:
      space: whose dims they are.
      unit: float[n, dims] in [0, 1].
      at: bool[n, dims], at most one dim in a row.
      uniform: float[n] in (0, 1).
      eta: float[], distribution index.
    """
    x = jnp.where(at, unit, 0).sum(-1)
    y = polynomial_mutation(x, uniform, eta)
    moved = jnp.where(at, y[:, None], unit)
    has_levels = np.flatnonzero(space.levels)
    if not has_levels.size:
        return moved
    number, before = space.levels[has_levels].astype(np.int32), space.level(unit)
    step = jnp.where((y > x)[:, None], 1, -1)
    step = jnp.where((before + step < 0) | (before + step >= number), -step, step)
    near = space.middle(jnp.clip(before + step, 0, number - 1))
    is_stuck = at[:, has_levels] & (space.level(moved) == before)
    moved = moved.at[:, has_levels].set(jnp.where(is_stuck, near, moved[:, has_levels]))
    if not space.categorical.any():
        return moved
    jumped = another_level(space, unit, jnp.broadcast_to(uniform[:, None], unit.shape))
    return jnp.where(at & space.categorical, jumped, moved)


def best_rows(member: jax.Array, losses: jax.Array, active: jax.Array, members: int) -> tuple[jax.Array, jax.Array]:
    """The best of the told rows of every member, the first of equals.

    Args:
      member: i32[rows], the member that a row speaks of.
      losses: float[rows], +inf where a trial failed.
      active: bool[rows], the others are padding.
      members: how many there are.

    Returns:
      i32[members], its row, any where it has none; bool[members], whether it has one.
    """
    rows = jnp.arange(losses.shape[0], dtype=jnp.int32)
    at = jnp.where(active, member, members)
    best = jnp.full(members, jnp.inf, losses.dtype).at[at].min(losses, mode="drop")
    is_best = active & (losses == best[jnp.minimum(at, members - 1)])
    row = jnp.full(members, losses.shape[0], jnp.int32).at[jnp.where(is_best, at, members)].min(rows, mode="drop")
    return jnp.minimum(row, losses.shape[0] - 1), row < losses.shape[0]
