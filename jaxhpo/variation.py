"""What methods that move points share: bounds by reflection, cheap random numbers, and what is inherited together.

All of it works on points of the unit cube, whole populations at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.space import Space, working_dtype


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


def two_uniforms(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two independent arrays of uniform numbers from one draw of 32 bits, at 2^16 values each, never 0 or 1.

    Drawing random numbers is most of the work of a generation, and 16 bits are enough for weights and decisions.
    """
    bits = jax.random.bits(key, shape, jnp.uint32)
    middle = lambda x: (x.astype(working_dtype()) + 0.5) * 2.0**-16  # noqa: E731
    return middle(bits >> 16), middle(bits & 0xFFFF)


def levels(space: Space, unit: jax.Array) -> jax.Array:
    """The level of every dim, 0 where it is real: i32[..., dims] for float[..., dims]."""
    has_levels = np.flatnonzero(space.levels)
    return jnp.zeros(unit.shape, jnp.int32).at[..., has_levels].set(space.level(unit))


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
