"""The chain rule between hyperparameters and the unit cube."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.codec import Leaf
from jaxhpo.parameters import Int
from jaxhpo.space import PyTree, Space


def is_integer(leaf: Leaf) -> bool:
    """Whether a leaf is an `Int`, and not an option of a choice that happens to be one."""
    return isinstance(leaf.parameter, Int)


def _integer_rates(leaf: Leaf) -> tuple[float, float]:
    """A and w of the slope A exp(w u) of the real number behind an integer along its coordinate u."""
    p, count = leaf.parameter, leaf.parameter.levels
    if not p.log:
        return float(int(p.step) * count), 0.0
    base = int(p.low) - 0.5
    width = math.log((base + count) / base)
    return base * width, width


def by_unit(space: Space, unit: jax.Array, gradients: PyTree) -> jax.Array:
    """Gradients by hyperparameters as gradients by the unit cube: float[batch, dims].

    An integer counts as the real number that it was rounded from. A choice has no slope: its dims have 0, and so have
    integers whose gradients are no floats.

    Args:
      space: whose points they are.
      unit: float[batch, dims] in [0, 1].
      gradients: shaped like the hyperparameters.
    """
    parts = space.flatten(gradients)
    slopes = jnp.zeros_like(unit)
    real = [i for i, leaf in enumerate(space.leaves) if leaf.kind == "real"]
    if real:

        def reals(unit: jax.Array) -> list[jax.Array]:
            values = space.flatten(space.decode(unit))
            return [values[i] for i in real]

        (slopes,) = jax.vjp(reals, unit)[1]([parts[i].astype(unit.dtype) for i in real])
    whole = [
        i for i, leaf in enumerate(space.leaves) if is_integer(leaf) and jnp.issubdtype(parts[i].dtype, jnp.floating)
    ]
    if whole:
        columns = np.array([space.leaves[i].start for i in whole])
        scale, width = np.array([_integer_rates(space.leaves[i]) for i in whole]).astype(unit.dtype).T
        rates = scale * jnp.exp(width * unit[..., columns])
        slopes = slopes.at[..., columns].set(rates * jnp.stack([parts[i].astype(unit.dtype) for i in whole], axis=-1))
    return slopes


def relaxed(space: Space, tree: PyTree) -> jax.Array:
    """The weights of all relaxed choices side by side, or their gradients: float[batch, options]."""
    parts = [x for leaf, x in zip(space.leaves, space.flatten(tree), strict=True) if leaf.kind == "relaxed"]
    return jnp.concatenate(parts, axis=-1)


def norms(space: Space, unit: jax.Array, gradients: PyTree) -> jax.Array:
    """Lengths of gradients by the unit cube and the weights of relaxed choices: float[batch], inf where not finite."""
    slopes = jnp.where(space.active(unit), by_unit(space, unit, gradients), 0)
    if any(leaf.kind == "relaxed" for leaf in space.leaves):
        chosen = [leaf for leaf in space.leaves if leaf.kind == "relaxed"]
        live = jnp.repeat(
            space.active(unit)[..., np.array([leaf.start for leaf in chosen])],
            np.array([leaf.parameter.levels for leaf in chosen]),
            axis=-1,
            total_repeat_length=sum(leaf.parameter.levels for leaf in chosen),
        )
        weights = jnp.where(live, relaxed(space, gradients), 0).astype(slopes.dtype)
        slopes = jnp.concatenate([slopes, weights], axis=-1)
    # Scaled, since the square of a slope of 1e20 is no float32.
    most = jnp.max(jnp.abs(slopes), axis=-1, initial=0)
    scale = jnp.where(most > 0, most, 1)
    length = scale * jnp.sqrt(jnp.sum((slopes / scale[:, None]) ** 2, axis=-1))
    return jnp.where(jnp.isfinite(most), length, jnp.inf)
