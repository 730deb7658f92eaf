"""Which points were tried already: compared by a hash of what they decode to, and all points of a small space."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.draws import scramble
from jaxhpo.space import Space


def everything(space: Space, most: int) -> np.ndarray | None:
    """All points of a space without real dims, one for each combination of levels, if there are at most `most`.

    Returns:
      float[points, dims], the middles of the levels, or `None`.
    """
    if (space.levels == 0).any() or np.prod(space.levels.astype(float)) > most:
        return None
    combinations = np.array(list(itertools.product(*map(range, space.levels))))
    return np.asarray((combinations + 0.5) / space.levels)


def canonical(space: Space, unit: jax.Array, unused: float = -1.0) -> jax.Array:
    """Points of which those that decode to the same are equal.

    Args:
      space: whose points they are.
      unit: float[..., dims] in [0, 1].
      unused: what stands in dims that are not live.

    Returns:
      float[..., dims]: levels in their middle.
    """
    has_levels = np.flatnonzero(space.levels)
    if has_levels.size:
        unit = unit.at[..., has_levels].set(space.middle(space.level(unit)).astype(unit.dtype))
    return jnp.where(space.active(unit), unit, unused) if space.nesting else unit


def fingerprints(space: Space, unit: jax.Array) -> jax.Array:
    """A hash of what points decode to: u32[...] for float[..., dims]; two that differ share it once in 4e9 times."""
    points = canonical(space, unit).astype(jnp.float32) + 0.0
    dim = lax.iota(jnp.uint32, space.dims) * jnp.uint32(0x9E3779B9)
    mixed = scramble(lax.bitcast_convert_type(points, jnp.uint32) + dim)
    return scramble(mixed.sum(-1, dtype=jnp.uint32))


def among(code: jax.Array, known: jax.Array, mask: jax.Array) -> jax.Array:
    """Which of the hashes u32[n] are in u32[m] where `mask`, bool[m], is True: bool[n]."""
    return ((code[:, None] == known) & mask).any(-1)
