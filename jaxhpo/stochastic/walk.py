"""Steps of a random walk in the unit cube: where it starts, and how it moves in mixed and conditional spaces."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.draws import uniform
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import another_level, differs, latin_hypercube, levels, one_dim, reflect


def triangular(bits: jax.Array) -> jax.Array:
    """Numbers in (-1, 1), the likelier the nearer to 0, from the upper 24 of 32 bits: the sum of two uniform ones."""
    total = ((bits >> 20) + ((bits >> 8) & 0xFFF)).astype(jnp.int32)
    return (total - 4095).astype(working_dtype()) * 2.0**-12


def starts(space: Space, key: jax.Array, chains: int) -> jax.Array:
    """First points, the middles of the cells of a Latin hypercube: of one chain the middle of the space.

    On average the middle is nearer to an optimum than any other point. Levels without an order have no middle.
    """
    unit = latin_hypercube(key, chains, space.dims)
    middle = (jnp.minimum(jnp.floor(unit * chains), chains - 1) + 0.5) / chains
    return jnp.where(space.categorical, unit, middle)


def proposals(
    space: Space,
    unit: jax.Array,
    step: jax.Array,
    turns: jax.Array,
    turn: jax.Array,
    bits: jax.Array,
    pick: jax.Array,
    rate: jax.Array,
) -> jax.Array:
    """Points near those of `unit` that never decode to the same: float[rows, dims].

    Args:
      space: whose dims they are.
      unit: float[rows, dims].
      step: float[rows], longest step of a coordinate.
      turns: bool[rows], rows that are to move by `turn` instead.
      turn: float[rows, dims].
      bits: u32[rows, dims], random.
      pick: float[rows] in [0, 1), which coordinate moves if no other one does.
      rate: float[dims], probability that a coordinate moves; at least one does.
    """
    chosen = ((bits & 0xFF).astype(jnp.int32).astype(unit.dtype) + 0.5) * 2.0**-8 < rate
    stepped, turns = step[:, None] * triangular(bits), turns[:, None]
    if not space.levels.any():
        forced = jnp.arange(space.dims) == (pick * space.dims).astype(jnp.int32)[:, None]
        chosen |= forced & ~chosen.any(axis=1, keepdims=True)
        return reflect(unit + jnp.where(turns, turn, jnp.where(chosen, stepped, 0)))

    other = another_level(space, unit, uniform(bits))
    wished = reflect(unit + stepped)
    moved = jnp.where(chosen, jnp.where(space.categorical, other, wished), unit)
    moved = jnp.where(turns, reflect(unit + turn), moved)
    return repaired(space, unit, moved, wished, other, pick, bits)


def repaired(
    space: Space,
    unit: jax.Array,
    moved: jax.Array,
    wished: jax.Array,
    other: jax.Array,
    pick: jax.Array,
    bits: jax.Array,
) -> jax.Array:
    """`moved` with one coordinate changed where it decodes to the same as `unit`, and branches that come to life drawn.

    Args:
      space: whose dims they are.
      unit: float[rows, dims], before.
      moved: float[rows, dims], after.
      wished: float[rows, dims], where a coordinate goes that is changed and has no levels.
      other: float[rows, dims], the same for categoricals.
      pick: float[rows] in [0, 1), which of the coordinates that can change.
      bits: u32[rows, dims], random.
    """
    has_levels, level = space.levels > 0, levels(space, unit)
    live = space.active(unit) if space.nesting else None
    forced = one_dim(space, live, pick) & ~differs(space, moved, unit, live)[:, None]
    # One level up or down, at the ends inward; the sign is that of the step.
    top = jnp.asarray(np.maximum(space.levels - 1, 0), jnp.int32)
    up = level + jnp.where(bits >> 31 == 1, 1, -1)
    near = jnp.where((up < 0) | (up > top), 2 * level - up, up)[:, np.flatnonzero(has_levels)]
    near = unit.at[:, np.flatnonzero(has_levels)].set(space.middle(near))
    nudged = jnp.where(space.categorical, other, jnp.where(has_levels, near, wished))
    moved = jnp.where(forced, nudged, moved)
    if not space.nesting:
        return moved
    return jnp.where(space.active(moved) & ~space.active(unit), uniform(bits), moved)
