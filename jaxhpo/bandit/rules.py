"""Rules that stop a trial by its learning curve: what `early_stopping` asks after every stretch of training.

References: Golovin, Solnik, Moitra, Kochanski, Karro and Sculley (2017), Google Vizier: a service for black-box
optimization, KDD, section 3.2.2. Domhan, Springenberg and Hutter (2015), Speeding up automatic hyperparameter
optimization of deep neural networks by extrapolation of learning curves, IJCAI.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo.bandit import curves as learning
from jaxhpo.checks import real, whole
from jaxhpo.method import ranked
from jaxhpo.space import working_dtype

ROOM = 256


class Record(NamedTuple):
    """What is known of the trials that ran to their end."""

    curves: jax.Array
    """float[ROOM, stretches]: losses of the newest, in a ring"""
    completed: jax.Array
    """i32[]: how many there were"""
    best: jax.Array
    """float[]: their lowest last loss, +inf where there is none"""


class Verdict(NamedTuple):
    """What a rule says of every row."""

    stops: jax.Array
    """bool[rows]"""
    loss: jax.Array
    """float[rows]: what the method is told of the trial if it stops"""


def no_record(stretches: int, dtype: jnp.dtype) -> Record:
    """The record of no trials."""
    return Record(jnp.zeros((ROOM, stretches), dtype), jnp.int32(0), jnp.asarray(jnp.inf, dtype))


def complete(record: Record, curves: jax.Array, done: jax.Array) -> Record:
    """The record with the curves, float[rows, stretches], of the rows that are `done`, bool[rows], in their order."""
    turn = jnp.cumsum(done, dtype=jnp.int32) - 1
    number = done.sum(dtype=jnp.int32)
    # Of more rows than there is room for, the last ones stay: no place is written twice.
    fits = done & (turn >= number - ROOM)
    place = jnp.where(fits, (record.completed + turn) % ROOM, ROOM)
    best = jnp.where(done, curves[:, -1], jnp.inf).min(initial=jnp.inf)
    return Record(
        record.curves.at[place].set(curves, mode="drop"),
        record.completed + number,
        jnp.minimum(record.best, best),
    )


def beat(record: Record, losses: jax.Array, known: jax.Array) -> Record:
    """The record with results that were known beforehand, rows of which there are no curves, as losses to beat."""
    best = jnp.where(known, ranked(losses), jnp.inf).min().astype(record.best.dtype)
    return record._replace(best=jnp.minimum(record.best, best))


class MedianSettings(NamedTuple):
    """What the median rule compares by; float[] each."""

    warmup: jax.Array
    least: jax.Array
    quantile: jax.Array


class ExtrapolationSettings(NamedTuple):
    """What the extrapolation rule compares by; float[] each."""

    warmup: jax.Array
    probability: jax.Array


def running_averages(curves: jax.Array) -> jax.Array:
    """The mean of every curve up to each of its stretches: float[rows, stretches]."""
    return jnp.cumsum(curves, axis=1) / jnp.arange(1, curves.shape[1] + 1, dtype=curves.dtype)


def quantile_of(values: jax.Array, held: jax.Array, q: jax.Array) -> jax.Array:
    """The quantile `q` of the first `held`, i32[], columns of float[rows, n], interpolated linearly: float[rows]."""
    columns = jnp.arange(values.shape[1], dtype=jnp.int32)
    ordered = jnp.sort(jnp.where(columns < held, values, jnp.inf), axis=1)
    last = jnp.maximum(held - 1, 0)
    place = jnp.clip(q, 0, 1) * last
    low = jnp.floor(place).astype(jnp.int32)
    share = (place - low).astype(values.dtype)
    below, above = ordered[:, low], ordered[:, jnp.minimum(low + 1, last)]
    return below + share * (above - below)


@functools.cache
def _median_judge(every: int, averaged: bool) -> Callable:
    def judge(settings: MedianSettings, curves: jax.Array, reached: jax.Array, record: Record) -> Verdict:
        stretches, rows = curves.shape[1], curves.shape[0]
        others = running_averages(record.curves) if averaged else record.curves
        at = jnp.clip(reached - 1, 0, stretches - 1)
        known = jnp.arange(stretches, dtype=jnp.int32) < reached[:, None]
        best = jnp.where(known, curves, jnp.inf).min(1)
        middle = quantile_of(others.T[at], jnp.minimum(record.completed, ROOM), settings.quantile)
        acts = (record.completed >= jnp.maximum(settings.least, 1)) & (reached * every >= settings.warmup)
        return Verdict(acts & (best > middle), curves[jnp.arange(rows), at])

    return judge


@functools.cache
def _extrapolation_judge(every: int) -> Callable:
    def judge(settings: ExtrapolationSettings, curves: jax.Array, reached: jax.Array, record: Record) -> Verdict:
        ahead = learning.forecast(curves, reached)
        known = jnp.arange(curves.shape[1], dtype=jnp.int32) < reached[:, None]
        lowest = jnp.where(known, curves, jnp.inf).min(1)
        # A prediction is no result: it may warn of a trial, but not recommend it beyond what was measured.
        loss = jnp.maximum(learning.expected(ahead), lowest)
        acts = (reached >= learning.FEWEST) & (reached * every >= settings.warmup) & jnp.isfinite(record.best)
        hopeless = learning.chance_below(ahead, record.best) < settings.probability
        return Verdict(acts & hopeless, loss)

    return judge


def _stretches(max_steps: int, every: int) -> None:
    whole("max_steps", max_steps, 1)
    whole(
        "every", every, 1, f"it is the steps between two looks at a trial, so max_steps={max_steps} at most", max_steps
    )
    if max_steps % every:
        fewer = max_steps // every * every
        raise ValueError(
            f"max_steps must be a multiple of every={every}, got {max_steps}; say max_steps={fewer} or {fewer + every}"
        )


def _traced(*values: float) -> list[jax.Array]:
    return [jnp.asarray(value, working_dtype()) for value in values]


@dataclass(frozen=True)
class MedianRule:
    """Stops a trial whose best loss so far is worse than the median of the completed trials at the same step.

    Each completed trial counts with the mean of its losses up to that step. What is told of a trial that stops is its
    last loss: it was measured, and being worse than the median it misleads nobody.

    Args:
      max_steps: training steps of a trial that is never stopped, at least 1; a multiple of `every`.
      every: steps between two looks at a trial, at least 1.
      warmup: steps, at least 0, before which no trial is stopped.
      least: completed trials, in [1, 256], before which no trial is stopped. The newest 256 are remembered.
      quantile: in [0, 1]; 0.5 is the median, 0.25 asks a trial to be in the best quarter.
      averaged: if False, a completed trial counts with its loss at the step, as in Optuna's `MedianPruner`.

    Raises:
      ValueError, TypeError: a number is out of its range.

    Example:
      >>> import jaxhpo as hpo
      >>> hpo.MedianRule(max_steps=100, every=10, warmup=20).least
      5

    Reference:
      Golovin et al. (2017), Google Vizier: a service for black-box optimization, section 3.2.2.
    """

    max_steps: int
    every: int
    warmup: float = 0
    least: float = 5
    quantile: float = 0.5
    averaged: bool = True

    def __post_init__(self) -> None:
        _stretches(self.max_steps, self.every)
        real("warmup", self.warmup, 0, float("inf"))
        real("least", self.least, 1, ROOM)
        real("quantile", self.quantile, 0, 1)

    @property
    def settings(self) -> MedianSettings:
        """The numbers that are traced."""
        return MedianSettings(*_traced(self.warmup, self.least, self.quantile))

    @property
    def judge(self) -> Callable:
        """(settings, curves, reached, record) -> verdict."""
        return _median_judge(self.every, bool(self.averaged))


@dataclass(frozen=True)
class ExtrapolationRule:
    """Stops a trial that will hardly be better at its end than the best of the completed trials.

    The last loss is predicted from the losses so far by an ensemble of curves, powers, exponentials and others, each
    weighted by how well it fits. A trial stops when the probability that it ends below the lowest last loss of all
    completed trials, known results included, is less than `probability`. It is looked at from its fourth stretch on.

    What is told of a trial that stops is the last loss that is expected of it, so that the method can compare it with
    completed ones, but never one below the lowest that was measured.

    Args:
      max_steps: training steps of a trial that is never stopped; a multiple of `every`, at least five times as much.
      every: steps between two looks at a trial, at least 1.
      warmup: steps, at least 0, before which no trial is stopped.
      probability: in [0, 1]; 0 never stops a trial.

    Raises:
      ValueError, TypeError: a number is out of its range.

    Example:
      >>> import jaxhpo as hpo
      >>> hpo.ExtrapolationRule(max_steps=100, every=10).probability
      0.05

    Reference:
      Domhan, Springenberg and Hutter (2015), Speeding up automatic hyperparameter optimization of deep neural networks
      by extrapolation of learning curves.
    """

    max_steps: int
    every: int
    warmup: float = 0
    probability: float = 0.05

    def __post_init__(self) -> None:
        _stretches(self.max_steps, self.every)
        if self.max_steps <= learning.FEWEST * self.every:
            raise ValueError(
                f"every must be less than max_steps / {learning.FEWEST}, got every={self.every} with max_steps="
                f"{self.max_steps}; a curve is extrapolated from {learning.FEWEST} points or more"
            )
        real("warmup", self.warmup, 0, float("inf"))
        real("probability", self.probability, 0, 1)

    @property
    def settings(self) -> ExtrapolationSettings:
        """The numbers that are traced."""
        return ExtrapolationSettings(*_traced(self.warmup, self.probability))

    @property
    def judge(self) -> Callable:
        """(settings, curves, reached, record) -> verdict."""
        return _extrapolation_judge(self.every)


Rule = MedianRule | ExtrapolationRule
