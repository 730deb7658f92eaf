"""How the particles of a swarm move: random numbers, velocities, neighbourhoods, and choices without order.

Clerc and Kennedy (2002), The particle swarm: explosion, stability, and convergence in a multidimensional complex space,
IEEE TEC 6(1). Zambrano-Bigiarini, Clerc and Rojas (2013), Standard Particle Swarm Optimisation 2011 at CEC-2013: a
baseline for future PSO improvements, section II.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.draws import halves, hashed_bits
from jaxhpo.space import Space
from jaxhpo.variation import another_level, differs, one_dim, with_subtrees

INFORMANTS = 3


class Settings(NamedTuple):
    """Numeric settings of a particle swarm."""

    inertia: jax.Array
    """float[]: share of the velocity that is kept, w"""
    cognitive: jax.Array
    """float[]: pull of the particle's own best point, c1"""
    social: jax.Array
    """float[]: pull of the best point in its neighbourhood, c2"""
    max_velocity: jax.Array
    """float[]: of each coordinate, in widths of the space"""
    damping: jax.Array
    """float[] in [0, 1]: share of the velocity that is left, turned round, after a bound was hit"""
    recall: jax.Array
    """float[] in [0, 1]: chance that a choice without order is taken from the particle's own best point"""
    imitation: jax.Array
    """float[] in [0, 1]: chance that it is taken from the neighbourhood's best point"""
    mutation: jax.Array
    """float[] in [0, 1]: chance that it is drawn anew"""


def uniforms(seed: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two independent arrays of uniform numbers in (0, 1), hashed: threefry would take longer than all else.

    Args:
      seed: u32[2], drawn afresh by `jax.random.bits` for every call.
      shape: of both.
    """
    # Worked out once, and as one long array: XLA takes several times as long for short rows.
    return halves(lax.optimization_barrier(hashed_bits(seed, math.prod(shape))).reshape(shape))


def constricted(
    settings: Settings, x: jax.Array, v: jax.Array, best: jax.Array, leader: jax.Array, r1: jax.Array, r2: jax.Array
) -> jax.Array:
    """The next velocity by Clerc and Kennedy (2002), float[batch, dims] like all arguments."""
    return settings.inertia * v + settings.cognitive * r1 * (best - x) + settings.social * r2 * (leader - x)


def spherical(
    settings: Settings,
    x: jax.Array,
    v: jax.Array,
    best: jax.Array,
    leader: jax.Array,
    leads: jax.Array,
    normal: jax.Array,
    radius: jax.Array,
) -> jax.Array:
    """The next velocity by SPSO-2011: a point of the hypersphere around the centre of gravity of three points.

    Args:
      settings: of the swarm.
      x, v, best, leader: float[batch, dims], the three points and the velocity.
      leads: bool[batch, 1], whether the particle itself is the best of its neighbourhood.
      normal: float[batch, dims], the direction; 0 in dims that have no part in it.
      radius: float[batch, 1] in [0, 1], share of the distance between x and the centre.
    """
    pulls = settings.cognitive * (best - x) + jnp.where(leads, 0, settings.social * (leader - x))
    to_centre = pulls / jnp.where(leads, 2, 3)  # from x to G
    norm = lambda y: jnp.sqrt((y * y).sum(1, keepdims=True))  # noqa: E731
    scale = radius * norm(to_centre) / jnp.maximum(norm(normal), jnp.finfo(x.dtype).tiny)
    return settings.inertia * v + to_centre + scale * normal


def informants(draw: jax.Array, particles: int) -> jax.Array:
    """Whom else each particle asks for its best point: i32[particles, 3], drawn with replacement."""
    bits = hashed_bits(draw, particles * INFORMANTS)
    return (bits % particles).astype(jnp.int32).reshape(particles, INFORMANTS)


def leaders(topology: str, loss: jax.Array, draw: jax.Array, rows: jax.Array) -> jax.Array:
    """The particle in the neighbourhood of each of `rows` that has the best point, itself among equals: i32[batch]."""
    n = loss.shape[0]
    if topology == "global":
        first = jnp.argmin(loss)
        return jnp.where(loss[first] < loss[rows], first, rows)
    is_ring = topology == "ring"
    others = jnp.stack([(rows - 1) % n, (rows + 1) % n], axis=1) if is_ring else informants(draw, n)[rows]
    neighbours = jnp.concatenate([rows[:, None], others], axis=1)
    at = jnp.argmin(loss[neighbours], axis=1)
    return jnp.take_along_axis(neighbours, at[:, None], axis=1)[:, 0]


def choose(
    space: Space, settings: Settings, seed: jax.Array, x: jax.Array, best: jax.Array, leader: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Choices without order, which cannot be moved: kept, inherited together with what is below them, or drawn anew.

    Returns:
      float[batch, dims], `x` with the new choices; bool[batch, dims], the choices and all that came with them.
    """
    at = np.flatnonzero(space.categorical)
    chance, level = uniforms(seed, (x.shape[0], len(at)))
    wish = lambda mask: jnp.zeros(x.shape, bool).at[:, at].set(mask)  # noqa: E731
    recalls, imitates = chance < settings.recall, chance < settings.recall + settings.imitation
    mutates = chance < settings.recall + settings.imitation + settings.mutation
    from_best = with_subtrees(space, wish(recalls), x, best)
    child = jnp.where(from_best, best, x)
    from_leader = with_subtrees(space, wish(imitates & ~recalls), child, leader)
    child = jnp.where(from_leader, leader, child)
    child = child.at[:, at].set(jnp.where(mutates & ~imitates, level, child[:, at]))
    return child, from_best | from_leader | space.categorical


def without_repeats(space: Space, seed: jax.Array, unit: jax.Array, known: tuple[jax.Array, ...]) -> jax.Array:
    """`unit` with another level in one live dim wherever it decodes to one of the `known` points of its row.

    Then it may be another of them, which is rare enough.
    """
    live = space.active(unit) if space.nesting else None
    is_new = functools.reduce(jnp.logical_and, [differs(space, unit, y, live) for y in known])
    which, to = uniforms(seed, unit.shape)
    here = one_dim(space, live, which[:, 0]) & ~is_new[:, None]
    return jnp.where(here, another_level(space, unit, to), unit)
