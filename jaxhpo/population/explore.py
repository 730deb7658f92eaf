"""Explore: how a member that has copied another's training state departs from its hyperparameters.

Jaderberg et al. (2017), Population based training of neural networks, section 4.1.1: perturbation by a factor, and
resampling; additive noise as in their Figure 2. Options without order have no neighbour: they are drawn anew with some
probability, and where that chooses another branch of a `OneOf`, all that belongs to it is drawn anew.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from jaxhpo.codec import inward
from jaxhpo.parameters import Int
from jaxhpo.space import Space
from jaxhpo.variation import one_dim, reflect, with_subtrees


class Ladder(NamedTuple):
    """What multiplying the value of a dim by a factor means in the unit cube, float64[dims]."""

    offset: np.ndarray
    """low / (high - low) where values are uniform"""
    width: np.ndarray
    """log(high / low) where they are log-uniform, 0 elsewhere"""
    first: np.ndarray
    """value of level 0"""
    step: np.ndarray
    """distance of levels, 0 where they have no values to multiply"""


class Draws(NamedTuple):
    """Random numbers for the copies of one ask."""

    unit: jax.Array
    """float[n, dims] in (0, 1): points drawn anew"""
    anew: jax.Array
    """float[n, dims] in (0, 1): against the probability to be drawn anew"""
    which: jax.Array
    """float[n, dims] in (0, 1): which factor, or where in the normal distribution"""
    dim: jax.Array
    """float[n] in (0, 1): the dim that is drawn anew in any case"""


@functools.lru_cache(maxsize=128)
def ladder(space: Space) -> Ladder:
    """The constants of `perturb`."""
    offset, width, first, step = np.zeros((4, space.dims))
    for leaf in space.leaves:
        p, dims = leaf.parameter, slice(leaf.start, leaf.start + leaf.size)
        if leaf.kind == "real":
            low, high = inward(p, np.dtype(np.float64))
            width[dims] = np.log(high) - np.log(low) if p.log else 0
            offset[dims] = low / (high - low)
        elif isinstance(p, Int):
            first[dims], step[dims] = p.low, p.step
    return Ladder(offset, width, first, step)


def multiplied(space: Space, unit: jax.Array, factor: jax.Array) -> jax.Array:
    """Points whose values are multiplied, and clipped to their bounds; options without order stay.

    An integer moves to the nearest level, at least to the next one in the direction of the factor; an ordinal to its
    neighbour, up where the factor is above 1.

    Args:
      space: whose points they are.
      unit: float[n, dims].
      factor: float[n, dims], positive.
    """
    c = Ladder(*(x.astype(unit.dtype) for x in ladder(space)))
    plain = (unit + c.offset) * factor - c.offset
    in_log = unit + jnp.log(factor) / np.where(c.width > 0, c.width, 1)
    moved = jnp.clip(jnp.where(c.width > 0, in_log, plain), 0, 1)
    at = np.flatnonzero(space.levels)
    if not at.size:
        return moved
    level, top = space.level(unit), (space.levels[at] - 1).astype(np.int32)
    step, first = np.where(c.step[at] > 0, c.step[at], 1), c.first[at]
    value = first + step * level.astype(unit.dtype)
    change = value * (factor[:, at] - 1)
    direction = jnp.sign(jnp.where((c.step[at] > 0) & (value != 0), change, factor[:, at] - 1))
    size = jnp.where(c.step[at] > 0, jnp.round(jnp.abs(change) / step), 0)
    by = (direction * jnp.clip(size, 1, 2.0**30)).astype(jnp.int32)
    stepped = space.middle(level + jnp.clip(by, -level, top - level)).astype(unit.dtype)
    return moved.at[:, at].set(jnp.where(space.categorical[at], unit[:, at], stepped))


def drawn_anew(space: Space, unit: jax.Array, fresh: jax.Array, mask: jax.Array) -> jax.Array:
    """`unit` with the coordinates of `fresh` where `mask`, and below a `OneOf` that chooses another branch thereby."""
    chosen = jnp.where(mask | ~jnp.asarray(space.categorical), fresh, unit)
    return jnp.where(with_subtrees(space, mask, unit, chosen), chosen, unit)


def perturb(space: Space, unit: jax.Array, draws: Draws, factors: jax.Array, probability: jax.Array) -> jax.Array:
    """Every value multiplied by one of `factors`, float[k], or drawn anew with some probability: float[n, dims]."""
    k = factors.shape[0]
    factor = factors[jnp.minimum((draws.which * k).astype(jnp.int32), k - 1)]
    return drawn_anew(space, multiplied(space, unit, factor), draws.unit, draws.anew < probability)


def resample(space: Space, unit: jax.Array, draws: Draws, probability: jax.Array) -> jax.Array:
    """Values drawn anew with some probability, at least one that is live; the others stay: float[n, dims]."""
    always = one_dim(space, space.active(unit) if space.nesting else None, draws.dim)
    return drawn_anew(space, unit, draws.unit, (draws.anew < probability) | always)


def add(space: Space, unit: jax.Array, draws: Draws, noise: jax.Array, probability: jax.Array) -> jax.Array:
    """Normal noise of standard deviation `noise` in the unit cube, reflected at its bounds: float[n, dims].

    Options without order are drawn anew with some probability.
    """
    categorical = jnp.asarray(space.categorical)
    moved = jnp.where(categorical, unit, reflect(unit + noise * ndtri(draws.which)))
    return drawn_anew(space, moved, draws.unit, categorical & (draws.anew < probability))
