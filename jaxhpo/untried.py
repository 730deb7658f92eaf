"""Which points were tried already: compared by a hash of what they decode to, and all points of a small space."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.draws import scramble
from jaxhpo.space import Space
from jaxhpo.variation import snapped

NOT_LIVE = 0xFFFFFFFF


def everything(space: Space, most: int) -> jax.Array | None:
    """All points of a space without real dims, one for each combination of levels, if there are at most `most`.

    Returns:
      float[points, dims], the middles of the levels, or `None`.
    """
    if not space.levels.all() or np.prod(space.levels, dtype=float) > most:
        return None
    combinations = np.stack(np.meshgrid(*map(np.arange, space.levels), indexing="ij"), -1)
    return space.middle(jnp.asarray(combinations.reshape(-1, space.dims), jnp.int32))


def canonical(space: Space, unit: jax.Array, unused: float = -1.0) -> jax.Array:
    """Points of which those that decode to the same are equal.

    Args:
      space: whose points they are.
      unit: float[..., dims] in [0, 1].
      unused: what stands in dims that are not live.

    Returns:
      float[..., dims]: levels in their middle.
    """
    unit = snapped(space, unit)
    return jnp.where(space.active(unit), unit, unused) if space.nesting else unit


def fingerprints(space: Space, unit: jax.Array) -> jax.Array:
    """A hash of what points decode to: u32[...] for float[..., dims]; two that differ share it once in 4e9 times."""
    # Of levels, not of their middles: how those are rounded may differ from one program to another.
    values = lax.bitcast_convert_type(unit.astype(jnp.float32) + 0.0, jnp.uint32)
    has_levels = np.flatnonzero(space.levels)
    if has_levels.size:
        values = values.at[..., has_levels].set(space.level(unit).astype(jnp.uint32))
    values = jnp.where(space.active(unit), values, jnp.uint32(NOT_LIVE)) if space.nesting else values
    dim = lax.iota(jnp.uint32, space.dims) * jnp.uint32(0x9E3779B9)
    return scramble(scramble(values + dim).sum(-1, dtype=jnp.uint32))


def among(code: jax.Array, known: jax.Array, mask: jax.Array) -> jax.Array:
    """Which of the hashes u32[n] are in u32[m] where `mask`, bool[m], is True: bool[n]."""
    return ((code[:, None] == known) & mask).any(-1)
