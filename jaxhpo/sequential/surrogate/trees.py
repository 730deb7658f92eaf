"""The forest as a surrogate: grown afresh at every ask, from all trials.

A tree has no posterior that a trial on its way could condition. Around such trials the forest is made sure of what it
expects, the more so the nearer they are, as in the local penalisation of Gonzalez, Dai, Hennig and Lawrence (2016),
Batch Bayesian optimization via local penalization.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo.history import History, buckets
from jaxhpo.sequential.surrogate import forest
from jaxhpo.sequential.surrogate.surrogate import Plan, Prediction, Surrogate
from jaxhpo.sequential.surrogate.targets import distances, transformed
from jaxhpo.space import Space

TREES = 64
TAIL = 1.0
NEAR = 0.1


class Posterior(NamedTuple):
    """A forest, and the trials that are on their way."""

    forest: forest.Forest
    best: jax.Array
    """float[1]: the lowest target"""
    waiting: jax.Array
    """float[waiting, dims] in [0, 1]"""
    counts: jax.Array
    """bool[waiting]: those that are there"""


def plans(capacity: int) -> tuple[Plan, ...]:
    """What is done at each size of a history with that capacity."""
    return tuple(Plan(min(size, capacity), steps=0, rounds=8) for size in buckets(capacity))


@functools.lru_cache(maxsize=256)
def surrogate(space: Space) -> Surrogate:
    """The forest as a `Surrogate`, without settings."""

    def observe(
        key: jax.Array, settings: tuple, model: tuple, history: History, level: int, newest: int, waiting: int
    ) -> tuple[tuple, Posterior]:
        del settings, newest
        rows = plans(history.losses.shape[0])[level].rows
        unit, losses, mask = (x[:rows] for x in history[:3])
        distance, finite = distances(losses, mask)[0], mask & jnp.isfinite(losses)
        targets, _ = transformed(distance, finite, mask, jnp.log(jnp.asarray(TAIL, unit.dtype)))
        best = jnp.where(finite.any(), jnp.min(targets, where=finite, initial=jnp.inf), 0)
        none = jnp.full((waiting, space.dims), 0.5, unit.dtype), jnp.zeros(waiting, bool)
        return model, Posterior(forest.fit(key, space, unit, targets, mask, trees=TREES), best[None], *none)

    def nearness(unit: jax.Array, point: jax.Array) -> jax.Array:
        """How near points are to one, in the units in which 1 / e of what is not known is left: float[c]."""
        a, b = forest.coordinates(space, unit), forest.coordinates(space, point)
        apart = jnp.where(jnp.asarray(space.categorical), (a != b).astype(a.dtype), a - b)
        return (apart**2).sum(-1) / (NEAR**2 * math.sqrt(space.dims))

    def predict(posterior: Posterior, unit: jax.Array) -> Prediction:
        mean, std = forest.predict(posterior.forest, space, unit)
        if posterior.counts.size:
            left = jax.vmap(lambda point: -jnp.expm1(-nearness(unit, point)))(posterior.waiting)
            std = std * jnp.sqrt(jnp.where(posterior.counts[:, None], left, 1).prod(0))
        return Prediction(mean[None], std[None] ** 2, ())

    def fantasize(
        posterior: Posterior, turn: jax.Array, unit: jax.Array, normal: jax.Array, counts: jax.Array
    ) -> tuple:
        del normal
        at = posterior.counts.shape[0] + turn
        waiting, is_there = posterior.waiting.at[at].set(unit), posterior.counts.at[at].set(counts)
        return posterior._replace(waiting=waiting, counts=is_there), unit

    def updated(
        posterior: Posterior, before: Prediction, unit: jax.Array, link: jax.Array, turn: jax.Array
    ) -> Prediction:
        del posterior, turn
        return before._replace(variance=before.variance * -jnp.expm1(-nearness(unit, link)))

    def draw(key: jax.Array, posterior: Posterior, before: Prediction, unit: jax.Array) -> jax.Array:
        del before
        return forest.sample_tree(key, posterior.forest, space, unit)

    return Surrogate(
        plans=plans,
        init=lambda key, settings, capacity: (),
        reserve=lambda model, capacity: model,
        observe=observe,
        predict=predict,
        std=lambda posterior, variance: jnp.sqrt(jnp.maximum(variance, forest.LEAST_VARIANCE)),
        fantasize=fantasize,
        updated=updated,
        draw=draw,
    )
