"""Metropolis' rule at temperatures in units of the spread of the losses, and what chains do to each other by it.

Metropolis et al. (1953), Equation of State Calculations by Fast Computing Machines, J. Chem. Phys. 21.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spread(NamedTuple):
    """Typical difference between the loss of a proposal and that of its chain."""

    log: jax.Array
    """float[]: its logarithm"""
    weight: jax.Array
    """float[]: how many differences it stands for, at most the memory"""


def spread_of(spread: Spread, difference: jax.Array, mask: jax.Array, memory: jax.Array) -> Spread:
    """`spread` after more differences, of which those of 0 and those that are not finite say nothing."""
    size = jnp.abs(difference)
    counts = mask & (size > 0) & jnp.isfinite(size)
    new = counts.sum(dtype=size.dtype)
    weight = jnp.maximum(jnp.minimum(spread.weight + new, memory), new)
    total = jnp.where(counts, jnp.log(jnp.where(counts, size, 1)), 0).sum()
    return Spread(spread.log + (total - new * spread.log) / jnp.maximum(weight, 1), weight)


def accepts(difference: jax.Array, uniform: jax.Array, temperature: jax.Array, spread: Spread) -> jax.Array:
    """Metropolis' rule."""
    # Exact at a difference of 0, and without NaN where the temperature is as small as numbers get.
    heat = jnp.maximum(temperature * jnp.exp(spread.log), jnp.finfo(difference.dtype).tiny)
    return (difference <= 0) | ((spread.weight > 0) & (uniform < jnp.exp(-difference / heat)))


def exchanges(
    temperature: jax.Array, loss: jax.Array, rung: jax.Array, uniform: jax.Array, odd: jax.Array, spread: Spread
) -> tuple[jax.Array, jax.Array]:
    """Which chains exchange their rungs, and with which.

    Args:
      temperature: float[chains], in units of the spread.
      loss: float[chains].
      rung: i32[chains], a permutation.
      uniform: float[chains], of which a pair uses the one at its lower rung.
      odd: i32[], 0 pairs the rungs (0, 1), (2, 3), ..., 1 pairs (1, 2), (3, 4), ...
      spread: of the losses.

    Returns:
      bool[chains] and i32[chains].
    """
    chains = rung.shape[0]
    partner = ((rung + odd) ^ 1) - odd
    exists = (partner >= 0) & (partner < chains)
    partner = jnp.clip(partner, 0, chains - 1)
    other = jnp.zeros(chains, jnp.int32).at[rung].set(jnp.arange(chains, dtype=jnp.int32))[partner]
    both = exists & jnp.isfinite(loss) & jnp.isfinite(loss[other])
    gap = jnp.where(both, loss - loss[other], 0) / jnp.exp(spread.log)
    drive = (1 / temperature - 1 / temperature[other]) * gap
    return both & (jnp.log(uniform[jnp.minimum(rung, partner)]) < drive), other


def follows(temperature: jax.Array, loss: jax.Array, other: jax.Array, uniform: jax.Array, spread: Spread) -> jax.Array:
    """Which chains go on from the current points of others, of losses `other`, by Metropolis' rule: bool[chains]."""
    both = jnp.isfinite(loss) & jnp.isfinite(other)
    return both & accepts(jnp.where(both, other - loss, 0), uniform, temperature, spread)
