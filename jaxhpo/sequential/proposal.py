"""Where an acquisition function is highest: many candidates, then a climb from the best of them.

Half of the candidates are anywhere, the others are the best trials with some of their dims moved, by distances of all
orders of magnitude. The climb follows gradients in real dims, and those of integers with many levels as if they were
real, by Adam with a step that shrinks; then neighbours are tried, one level changed at a time.

Reference: Kingma and Ba (2015), Adam. Hutter, Hoos and Leyton-Brown (2011), Sequential model-based optimization for
general algorithm configuration, section 4.3: candidates near the best trials, and neighbours.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtri

from jaxhpo.draws import bits, halves, hashed_bits, uniform
from jaxhpo.space import Space
from jaxhpo.variation import another_level, one_dim, reflect

SMALLEST, LARGEST = 1e-3, 0.5
JUMPS = 0.3
FIRST_STEP, LAST_STEP = 0.05, 5e-4
DECAY, DECAY_SQUARE = 0.8, 0.95
MANY_LEVELS = 4
NEIGHBOURS = 16


def candidates(key: jax.Array, space: Space, leaders: jax.Array, number: int) -> jax.Array:
    """Points to try an acquisition at: float[number, dims].

    Args:
      key: of all draws.
      space: whose points they are.
      leaders: float[some, dims], around which half of them are.
      number: how many.
    """
    near, dims = number // 2, space.dims
    # One draw for all: each takes a tenth of a second to compile.
    drawn = bits(key, ((number + 2 * near) * dims + 3 * near,))
    by_row, drawn = uniform(drawn[: 3 * near]).reshape(3, near, 1), drawn[3 * near :].reshape(-1, dims)
    anywhere, normal = uniform(drawn[:number]), ndtri(uniform(drawn[number : number + near]))
    is_moved, jumps = halves(drawn[number + near :])
    how_many, how_far, which = by_row
    base = leaders[jnp.arange(near) % leaders.shape[0]]
    live = space.active(base) if space.nesting else None
    moved = reflect(base + SMALLEST * (LARGEST / SMALLEST) ** how_far * normal)
    if space.levels.any():
        moved = jnp.where((jumps < JUMPS) & (space.levels > 0), anywhere[:near], moved)
    moves = (is_moved < 1 / dims + how_many * (1 - 1 / dims)) | one_dim(space, live, which[:, 0])
    return anywhere.at[:near].set(jnp.where(moves, moved, base))


def climbed(value: Callable, space: Space, unit: jax.Array, steps: int) -> jax.Array:
    """Points after some steps along the gradient of `value`, in the dims that have one: float[n, dims].

    Args:
      value: float[n, dims] -> float[n], each row of its own.
      space: whose points they are.
      unit: float[n, dims], where to start.
      steps: at least 1.
    """
    climbs = (space.levels == 0) | ((space.levels > MANY_LEVELS) & ~space.categorical)
    if not climbs.any():
        return unit
    gradient = jax.grad(lambda points: value(points).sum())

    def step(i: jax.Array, carry: tuple) -> tuple:
        unit, mean, square = carry
        slope = gradient(unit)
        slope = jnp.where(jnp.isfinite(slope) & jnp.asarray(climbs), slope, 0)
        mean = DECAY * mean + (1 - DECAY) * slope
        square = DECAY_SQUARE * square + (1 - DECAY_SQUARE) * slope**2
        size = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (i / steps)
        direction = mean / (1 - DECAY ** (i + 1)) / (jnp.sqrt(square / (1 - DECAY_SQUARE ** (i + 1))) + 1e-8)
        return jnp.clip(unit + size * direction, 0, 1), mean, square

    none = jnp.zeros_like(unit)
    return lax.fori_loop(0, steps, step, (unit, none, none))[0]


def neighboured(
    seed: jax.Array, value: Callable, space: Space, unit: jax.Array, moves: np.ndarray, rounds: int
) -> jax.Array:
    """Points, or better ones that differ from them in one dim at a time: float[n, dims].

    Args:
      seed: u32[2], which neighbours are tried.
      value: float[m, dims] -> float[m], each row of its own.
      space: whose points they are.
      unit: float[n, dims], where to start.
      moves: bool[dims], which of the dims may change.
      rounds: how often.
    """
    if not moves.any():
        return unit
    n, dims = unit.shape
    one_level = jnp.asarray(np.where(space.levels > 0, 1 / np.maximum(space.levels, 1), 0), unit.dtype)
    choices = jnp.asarray(np.flatnonzero(moves))
    rows = NEIGHBOURS * n

    def step(i: jax.Array, unit: jax.Array) -> jax.Array:
        drawn = hashed_bits(seed + i.astype(jnp.uint32), rows * (dims + 1))
        where, far = halves(drawn[:rows])
        which, sign = halves(drawn[rows:].reshape(rows, dims))
        from_ = jnp.tile(unit, (NEIGHBOURS, 1))
        by = jnp.maximum(one_level, SMALLEST * (LARGEST / SMALLEST) ** far[:, None]) * jnp.where(sign < 0.5, -1, 1)
        other = reflect(from_ + by)
        if space.categorical.any():
            other = jnp.where(jnp.asarray(space.categorical), another_level(space, from_, which), other)
        is_moved = jnp.arange(dims) == choices[(where * choices.size).astype(jnp.int32)][:, None]
        tried = jnp.where(is_moved, other, from_)
        values = value(jnp.concatenate([unit, tried])).reshape(1 + NEIGHBOURS, n)
        all_ = jnp.concatenate([unit[None], tried.reshape(NEIGHBOURS, n, dims)])
        return jnp.take_along_axis(all_, jnp.argmax(values, axis=0)[None, :, None], axis=0)[0]

    return lax.fori_loop(0, rounds, step, unit)
