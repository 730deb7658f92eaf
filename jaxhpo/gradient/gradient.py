"""Gradient descent on hyperparameters: many starts, each with an optimizer of its own, as one batch.

Maclaurin, Duvenaud and Adams (2015), Gradient-based hyperparameter optimization through reversible learning: descent
along hypergradients, also in thousands of hyperparameters. Franceschi et al. (2017), Forward and reverse gradient-based
hyperparameter optimization. Liu, Simonyan and Yang (2019), DARTS: differentiable architecture search, for choices that
are relaxed to softmax weights. Where the descent happens is said in `jaxhpo/coordinates.py`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo import coordinates as at
from jaxhpo.checks import real, whole
from jaxhpo.draws import bits, uniform
from jaxhpo.method import (
    Count,
    Initializer,
    Method,
    PyTree,
    Trials,
    black_box,
    count,
    failed,
    ranked,
    where_rows,
)
from jaxhpo.space import Space, working_dtype
from jaxhpo.steppers import Parts, parts_of, stepper
from jaxhpo.variation import best_rows, latin_hypercube


class Settings(NamedTuple):
    """Numeric settings of gradient descent."""

    temperature: jax.Array
    """float[]: of the softmax of relaxed choices, at first"""
    final_temperature: jax.Array
    """float[]: and in the last step before they are one option"""
    anneal: jax.Array
    """float[]: steps after which they are one option"""
    patience: jax.Array
    """float[]: steps that a start may take before it can be replaced, those of annealing not counted"""
    replaced: jax.Array
    """float[] in [0, 1]: share of the starts, the worst, that are"""


class State(NamedTuple):
    """State of gradient descent; leading axis starts."""

    point: jax.Array
    """float[starts, size]: where each is, in unconstrained coordinates"""
    optimizer: PyTree
    """what the optimizer keeps"""
    best: jax.Array
    """float[starts]: lowest loss since each began, soft weights not counted, +inf before there is one"""
    age: jax.Array
    """i32[starts]: steps since each began"""
    life: jax.Array
    """i32[starts]: how often each has begun anew"""
    renewed: jax.Array
    """bool[starts]: those that begin anew at the next ask"""
    settings: Settings
    asks: Count
    """i32[]: asks so far"""
    asked: Count
    """i32[]: trials asked for so far"""


class Row(NamedTuple):
    """What a row of an ask remembers: a step is taken by the first row that is told of it."""

    start: jax.Array
    """i32[batch]"""
    life: jax.Array
    """i32[batch]: of the start when it was asked for"""
    age: jax.Array
    """i32[batch]: of the start when it was asked for"""


def temperatures(settings: Settings, age: jax.Array) -> jax.Array:
    """The temperature of relaxed choices after some steps: float[n], 0 where they are one option."""
    part = age.astype(settings.anneal.dtype) / jnp.maximum(settings.anneal - 1, 1)
    cooled = settings.temperature * (settings.final_temperature / settings.temperature) ** part
    return jnp.where(age < settings.anneal, cooled, 0)


def ranks(best: jax.Array) -> jax.Array:
    """The place of each start among all, 0 for the one with the lowest loss: i32[starts]."""
    mine, index = best[:, None], jnp.arange(best.shape[0])
    return jnp.sum((best < mine) | ((best == mine) & (index < index[:, None])), axis=1, dtype=jnp.int32)


def worst(state: State, anneals: bool) -> jax.Array:
    """Which starts had their chance and are among the worst, never the best one: bool[starts]."""
    starts, rank = state.best.shape[0], ranks(state.best)
    is_worst = (rank >= starts - jnp.round(state.settings.replaced * starts)) & (rank > 0)
    return is_worst & (state.age >= state.settings.patience + (state.settings.anneal if anneals else 0))


@functools.lru_cache(maxsize=256)
def _functions(space: Space, starts: int, halving: int, parts: Parts) -> tuple[Callable, Callable, Callable]:
    c = at.coordinates(space)
    begin, step = stepper(parts)
    anneals, leaves = bool(len(c.owner)), len(space.leaves)
    moves = anneals or bool(c.moves.any())

    def init(key: jax.Array, settings: Settings) -> State:
        point = at.begin(c, at.spread(c, latin_hypercube(key, starts, leaves)))
        none = jnp.zeros(starts, jnp.int32)
        return State(
            point=point,
            optimizer=begin(point),
            best=jnp.full(starts, jnp.inf, point.dtype),
            age=none,
            life=none,
            renewed=none > 0,
            settings=settings,
            asks=count(),
            asked=count(),
        )

    def renew(key: jax.Array, state: State) -> State:
        # Where nothing can move, each trial is a start of its own.
        which = state.renewed | worst(state, anneals) if moves else (state.asked.value > 0) | state.renewed
        point = where_rows(which, at.begin(c, uniform(bits(key, (starts, leaves)))), state.point)
        return state._replace(
            point=point,
            optimizer=where_rows(which, begin(point), state.optimizer),
            best=jnp.where(which, jnp.inf, state.best),
            age=jnp.where(which, 0, state.age),
            life=state.life + which,
            renewed=jnp.zeros(starts, bool),
        )

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        state, asks, asked = renew(key, state), state.asks.value, state.asked.value
        start, number = jnp.arange(starts, dtype=jnp.int32), jnp.int32(starts)
        if halving:
            start = jnp.argsort(ranks(state.best)).astype(jnp.int32)
            number = jnp.maximum(starts >> jnp.minimum(asks // halving, 30), 1)
        point, age = state.point[start], state.age[start]
        row = Row(start, state.life[start], age)
        trials = black_box(space, at.unit_of(c, point), asked, jnp.arange(starts) < number, row)
        soft = at.weights(c, point, temperatures(state.settings, age)) if anneals else None
        trials = trials._replace(hparams=at.differentiable(c, trials.hparams, soft))
        return trials, state._replace(asks=Count(asks + 1), asked=Count(asked + number))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        row: Row = trials.aux
        losses = losses.astype(state.best.dtype)
        mine = jnp.clip(row.start, 0, starts - 1)
        is_now = (row.life == state.life[mine]) & (row.age == state.age[mine])
        # What was told may be of another point: a result that was known, came late, or is that of another island.
        is_there = ~at.is_at(c, state.point[mine], trials.unit)
        soft = space.soft(trials.hparams) if anneals else None
        is_soft = jnp.zeros_like(is_there) if soft is None else soft
        # A loss of soft weights is that of no choice.
        is_better = is_there & ~is_soft & (ranked(losses) < state.best[mine])
        which, has_row = best_rows(mine, ranked(losses), trials.active & (is_better | (is_now & ~is_there)), starts)
        unit, loss, slope = jax.tree.map(lambda x: x[which], (trials.unit, losses, gradients))
        is_news = has_row & is_better[which]
        there = jnp.where(is_news[:, None], unit, 0.5)
        point = where_rows(is_news, at.vector(c, there), state.point)
        optimizer = where_rows(is_news, begin(point), state.optimizer)
        age = jnp.where(is_news, 0, state.age)
        life = state.life + is_news
        takes, is_failed = has_row, failed(loss)
        best = jnp.where(takes & ~is_soft[which], jnp.minimum(state.best, ranked(loss)), state.best)
        if gradients is None:
            renewed = state.renewed | (takes & is_failed)
            return state._replace(point=point, optimizer=optimizer, best=best, age=age, life=life, renewed=renewed)
        heat = temperatures(state.settings, age) if anneals else None
        slope = at.slopes(c, point, at.unit_of(c, point), heat, slope)
        is_failed |= ~jnp.isfinite(slope).all(axis=1)
        steps_on = takes & ~is_failed
        slope, value = jnp.where(steps_on[:, None], slope, 0), jnp.where(steps_on, loss, 0)
        steps, after = step(point, optimizer, slope, value)
        steps_on &= jnp.isfinite(steps).all(axis=1)
        return state._replace(
            point=where_rows(steps_on, at.moved(c, point, steps, age < state.settings.anneal), point),
            optimizer=where_rows(steps_on, after, optimizer),
            best=best,
            age=age + steps_on,
            life=life,
            renewed=state.renewed | (takes & ~steps_on),
        )

    return init, ask, tell


def gradient(
    space: PyTree,
    optimizer: optax.GradientTransformation,
    starts: int = 8,
    *,
    patience: float = 25,
    replaced: float = 0.25,
    temperature: float = 1.0,
    final_temperature: float = 0.1,
    anneal: float = 25,
    halving: int = 0,
) -> Method:
    """Gradient descent from many starts, for objectives that can be differentiated, such as those of `unroll`.

    Every trial is one step of a start, along the gradient by v = logit(u) of the place u of each parameter in the unit
    cube: learning rates of about 0.1 suit `adam`, whatever the parameters. One start goes on from its last point, a
    step whose loss or gradient is not finite makes it begin anew elsewhere, and so do the worst of them that had their
    chance, never the best.

    - An `Int` is a whole number as a float in `hparams`, so that its slope reaches the real number behind it
      (straight-through); the loss is that of the whole number.
    - A `Categorical(relaxed=True)` is softmax weights in `hparams`, which are cooled and, after `anneal` steps, one
      option for good. Losses of soft weights are recorded, but are never the best: a start needs more than `anneal`
      steps for one that counts.
    - Other choices are spread over the starts and stay as they are until a start begins anew. A space of nothing else
      is searched at random.
    - An `Array` begins with one number for all of its entries, which then move one by one. There may be many
      thousands; a step costs as much as they are many.

    Args:
      space: a pytree of parameters, or a `Space`, of any number of dims.
      optimizer: any optax optimizer that does not call the objective itself. It sees one vector for each start. Keep
        it in a variable: with the same object a second method compiles nothing.
      starts: descents side by side, the batch, at least 1.
      patience: steps that a start takes before it can be replaced, at least 1.
      replaced: share of the starts, in [0, 1], that are given up for new ones, rounded to a whole number of starts.
      temperature: of the softmax of relaxed choices at first, above 0.
      final_temperature: and at the end of annealing, above 0.
      anneal: steps of annealing, at least 0; 0 is one option from the beginning.
      halving: asks after which the worse half of the starts stops, and half of the rest after as many again, until one
        goes on: where each step is a training run. The rows of an ask are fewer then, and with `lanes=1` in `minimize`
        those that are not there cost nothing. 0 is never. Soft weights tell no start from another: where there are
        some, more than `anneal`.

    Returns:
      A `Method` whose settings are the five numbers before `halving`.

    Raises:
      ValueError, TypeError: an argument is out of its range, or an integer has more digits than a float.

    Example:
      >>> import jax, optax, jaxhpo as hpo
      >>> space = {"lr": hpo.Float(1e-4, 1.0, log=True), "width": hpo.Int(1, 64), "kind": hpo.Categorical(("a", "b"))}
      >>> def loss(key, h):
      ...     return jax.numpy.log(h["lr"] / 0.01) ** 2 + ((h["width"] - 20) / 8) ** 2 + h["kind"]
      >>> result = hpo.minimize(loss, hpo.gradient(space, optax.adam(0.1)), key=jax.random.key(0), trials=400)
      >>> result.best_hparams["kind"], result.best_hparams["width"], round(result.best_hparams["lr"], 3)
      ('a', 20, 0.01)

    Reference:
      Maclaurin, Duvenaud and Adams (2015), Gradient-based hyperparameter optimization through reversible learning.
      Franceschi et al. (2017), Forward and reverse gradient-based hyperparameter optimization.
    """
    space, starts = Space.of(space, most=None), whole("starts", starts, 1)
    parts = parts_of(optimizer)
    array = functools.partial(jnp.asarray, dtype=working_dtype())
    settings = Settings(
        temperature=array(real("temperature", temperature, 1e-6, 1e6, "1 is usual")),
        final_temperature=array(real("final_temperature", final_temperature, 1e-6, 1e6, "0.1 is usual")),
        anneal=array(real("anneal", anneal, 0, 1e6, "25 is usual")),
        patience=array(real("patience", patience, 1, 1e6, "25 is usual")),
        replaced=array(real("replaced", replaced, 0, 1, "0.25 is usual")),
    )
    halving = whole("halving", halving, 0, "1 or 2 is usual, 0 is never")
    init, ask, tell = _functions(space, starts, halving, parts)
    return Method(
        "gradient", space, settings, Initializer(init, settings), ask, tell, batch=starts, uses_gradients=True
    )
