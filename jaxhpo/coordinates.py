"""Where descent happens: an unconstrained space behind smooth bijectors, in which every point is in the user's bounds.

A real number or an integer has the coordinate v = logit(u) of its place u in the unit cube, where log scales are even
already. A relaxed choice has a logit for each option. A descent moves both as one vector; other choices stand still.

Reference: Bengio, Léonard and Courville (2013), Estimating or propagating gradients through stochastic neurons for
conditional computation: the straight-through estimator, by which an integer has the slope of the real number behind it.
Liu, Simonyan and Yang (2019), DARTS: choices relaxed to softmax weights.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.chain import by_unit, is_integer, relaxed
from jaxhpo.space import PyTree, Space, working_dtype

LIMIT = 12.0
MARGIN = 1e-3
FAVOUR = 0.5
CLOSE = 1e-6


class Coordinates(NamedTuple):
    """The coordinates of one space: the facts about it that the functions below need."""

    space: Space
    leaf: np.ndarray
    """i32[dims]: the leaf of each dim"""
    moves: np.ndarray
    """bool[dims]: dims of real numbers and integers"""
    relaxed: np.ndarray
    """i32[choices]: dims of relaxed choices"""
    owner: np.ndarray
    """i32[options]: which of the relaxed choices an option is of"""
    place: np.ndarray
    """i32[options]: which of its options it is"""

    @property
    def size(self) -> int:
        """Length of the vector that a descent moves."""
        return self.space.dims + len(self.owner)


@functools.lru_cache(maxsize=256)
def coordinates(space: Space) -> Coordinates:
    """The coordinates of `space`.

    Raises:
      ValueError: an integer has levels that no float of the working dtype is equal to.
    """
    sizes = [leaf.size for leaf in space.leaves]
    most = 2 ** (np.finfo(working_dtype()).nmant + 1)
    for leaf in filter(is_integer, space.leaves):
        p = leaf.parameter
        if max(abs(int(p.low)), abs(int(p.high))) > most:
            raise ValueError(
                f"space parameter '{leaf.path}': descent moves integers as {working_dtype()}, in which those beyond "
                f"{most} have gaps, got low={p.low!r} and high={p.high!r}; use Float, or enable float64"
            )
    counts = [leaf.parameter.levels for leaf in space.leaves if leaf.kind == "relaxed"]
    return Coordinates(
        space,
        leaf=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        moves=np.repeat([leaf.kind == "real" or is_integer(leaf) for leaf in space.leaves], sizes),
        relaxed=np.array([leaf.start for leaf in space.leaves if leaf.kind == "relaxed"], np.int32),
        owner=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        place=np.concatenate([np.arange(n, dtype=np.int32) for n in counts] or [np.zeros(0, np.int32)]),
    )


def begin(c: Coordinates, uniform: jax.Array) -> jax.Array:
    """Points to begin at: float[n, size].

    Args:
      c: the coordinates.
      uniform: float[n, leaves] in [0, 1], one number for all entries of an array; the option of a relaxed choice that
        it falls on is favoured a little.
    """
    return vector(c, uniform[:, c.leaf])


def spread(c: Coordinates, drawn: jax.Array) -> jax.Array:
    """Latin hypercube draws, float[n, leaves], with choices in the middles of their strata.

    Only so n points meet every option of a choice that has no more than n.
    """
    n = drawn.shape[0]
    is_choice = jnp.asarray([leaf.kind != "real" and not is_integer(leaf) for leaf in c.space.leaves])
    return jnp.where(is_choice, (jnp.floor(drawn * n) + 0.5) / n, drawn)


def vector(c: Coordinates, unit: jax.Array) -> jax.Array:
    """The coordinates of points of the unit cube: float[n, size] for float[n, dims].

    Reals at a bound are moved inward a little, where there is a slope to leave it by. A relaxed choice favours its
    option a little.
    """
    least = jnp.asarray(np.where(c.space.levels == 0, MARGIN, 1 / (1 + np.exp(LIMIT))), unit.dtype)
    inside = jnp.clip(unit, least, 1 - least)
    point = jnp.log(inside) - jnp.log1p(-inside)
    if not len(c.owner):
        return point
    chosen = levels(c, unit)[:, c.owner] == c.place
    return jnp.concatenate([point, jnp.where(chosen, FAVOUR, 0).astype(point.dtype)], axis=1)


def levels(c: Coordinates, unit: jax.Array) -> jax.Array:
    """The options of the relaxed choices: i32[n, choices] for float[n, dims]."""
    return c.space.level(unit)[:, np.searchsorted(np.flatnonzero(c.space.levels), c.relaxed)]


def favourite(c: Coordinates, point: jax.Array) -> jax.Array:
    """The options of the relaxed choices with the highest logits, the first of equals: i32[n, choices]."""
    logits = point[:, c.space.dims :]
    n, choices = logits.shape[0], len(c.relaxed)
    best = jnp.full((n, choices), -jnp.inf, logits.dtype).at[:, c.owner].max(logits)
    place = jnp.where(logits == best[:, c.owner], c.place, len(c.place))
    return jnp.full((n, choices), len(c.place), jnp.int32).at[:, c.owner].min(place)


def unit_of(c: Coordinates, point: jax.Array) -> jax.Array:
    """The points of the unit cube that vectors stand for: float[n, dims] for float[n, size]."""
    unit = jax.nn.sigmoid(point[:, : c.space.dims])
    if not len(c.owner):
        return unit
    counts = c.space.levels[c.relaxed]
    return unit.at[:, c.relaxed].set((favourite(c, point) + 0.5).astype(unit.dtype) / counts)


def is_at(c: Coordinates, point: jax.Array, unit: jax.Array) -> jax.Array:
    """Whether points of the unit cube are those of vectors: bool[n]."""
    return jnp.max(jnp.abs(unit_of(c, point) - unit), axis=1) <= CLOSE


def weights(c: Coordinates, point: jax.Array, temperature: jax.Array) -> jax.Array:
    """The weights of the options of relaxed choices: float[n, options].

    Args:
      c: the coordinates.
      point: float[n, size].
      temperature: float[n] of the softmax; 0 is one-hot.
    """
    logits, choices = point[:, c.space.dims :], len(c.relaxed)
    heat = jnp.where(temperature > 0, temperature, 1)[:, None]
    best = jnp.full((logits.shape[0], choices), -jnp.inf, logits.dtype).at[:, c.owner].max(logits)
    mass = jnp.exp((logits - best[:, c.owner]) / heat)
    soft = mass / jnp.zeros_like(best).at[:, c.owner].add(mass)[:, c.owner]
    hard = (favourite(c, point)[:, c.owner] == c.place).astype(logits.dtype)
    return jnp.where(temperature[:, None] > 0, soft, hard)


def differentiable(c: Coordinates, hparams: PyTree, weights: jax.Array | None = None) -> PyTree:
    """Decoded hyperparameters with integers as floats, and with the weights of relaxed choices if they are given."""
    values = c.space.flatten(hparams)
    counts = [leaf.parameter.levels for leaf in c.space.leaves if leaf.kind == "relaxed"]
    soft = iter(jax.lax.split(weights, counts, axis=1) if weights is not None and counts else ())

    def value(leaf: int, x: jax.Array) -> jax.Array:
        if is_integer(c.space.leaves[leaf]):
            return x.astype(working_dtype())
        return next(soft, x) if c.space.leaves[leaf].kind == "relaxed" else x

    return c.space.unflatten([value(i, x) for i, x in enumerate(values)])


def slopes(
    c: Coordinates, point: jax.Array, unit: jax.Array, temperature: jax.Array | None, gradients: PyTree
) -> jax.Array:
    """Gradients by the coordinates: float[n, size], 0 where nothing is to move.

    Args:
      c: the coordinates.
      point: float[n, size], where they were taken.
      unit: float[n, dims], the same.
      temperature: float[n] of the softmax; logits do not move where it is 0, nor if it is not given.
      gradients: shaped like the hyperparameters, integers as floats.
    """
    live = jnp.asarray(c.moves) & c.space.active(unit) if c.space.nesting else jnp.asarray(c.moves)
    inside = jax.nn.sigmoid(point[:, : c.space.dims])
    slope = jnp.where(live, by_unit(c.space, unit, gradients) * inside * (1 - inside), 0)
    if not len(c.owner):
        return slope
    if temperature is None:
        return jnp.pad(slope, ((0, 0), (0, len(c.owner))))
    soft, heat = weights(c, point, temperature), temperature[:, None]
    by_weight = relaxed(c.space, gradients).astype(slope.dtype)
    mean = jnp.zeros((soft.shape[0], len(c.relaxed)), soft.dtype).at[:, c.owner].add(soft * by_weight)
    by_logit = soft * (by_weight - mean[:, c.owner]) / jnp.where(heat > 0, heat, 1)
    return jnp.concatenate([slope, jnp.where(heat > 0, by_logit, 0)], axis=1)


def moved(c: Coordinates, point: jax.Array, step: jax.Array, anneals: jax.Array) -> jax.Array:
    """Points after a step, in the coordinates that move: float[n, size].

    Args:
      c: the coordinates.
      point: float[n, size].
      step: float[n, size].
      anneals: bool[n], where logits move as well.
    """
    moves = jnp.asarray(np.concatenate([c.moves, np.zeros(len(c.owner), bool)]))
    is_logit = jnp.asarray(np.arange(c.size) >= c.space.dims)
    return jnp.where(moves | (is_logit & anneals[:, None]), jnp.clip(point + step, -LIMIT, LIMIT), point)
