"""Early stopping: any black-box method on learning curves, where a rule gives up the trials that promise nothing.

Every lane trains a trial in stretches of equal length. After each the rule looks at the curve; in the round after a
trial has stopped, failed or come to its end, its lane goes to a new one, so no lane ever waits.

References: Golovin et al. (2017), Google Vizier: a service for black-box optimization, KDD, section 3.2. Domhan,
Springenberg and Hutter (2015), Speeding up automatic hyperparameter optimization of deep neural networks by
extrapolation of learning curves, IJCAI.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.bandit.rules import Record, Rule, Verdict, beat, complete, no_record
from jaxhpo.bandit.sampling import Inner, Waiting, functions_of
from jaxhpo.method import Initializer, Method, PyTree, Trials, endless, failed, keep, where_rows
from jaxhpo.space import Space


class Lane(NamedTuple):
    """The trial that trains in every lane, which is also its slot of the bank; leading axis = batch."""

    trial: jax.Array
    """i32[batch]: its number, -1 is nobody"""
    reached: jax.Array
    """i32[batch]: stretches behind it"""
    curve: jax.Array
    """float[batch, stretches]: the loss after each of them, 0 after those that are to come"""
    unit: jax.Array
    """float[batch, dims]"""
    aux: PyTree
    """the method's memory of the trial"""


class Row(NamedTuple):
    """What a row of an ask remembers: its trial before this stretch."""

    lane: jax.Array
    """i32[batch]"""
    trial: jax.Array
    reached: jax.Array
    curve: jax.Array
    aux: PyTree


class State(NamedTuple):
    """State of a method whose trials may be stopped."""

    lanes: Lane
    record: Record
    method: tuple[jax.Array, ...]
    """leaves of the method's state"""
    started: jax.Array
    """i32[]: trials so far"""
    rule: PyTree
    """settings of the rule"""


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, inner: Inner, batch: int, every: int, stretches: int, judge: Callable
) -> tuple[Callable, Callable, Callable, Callable]:
    lane = np.arange(batch, dtype=np.int32)

    def init(key: jax.Array, settings: PyTree) -> State:
        method = inner.init(key, settings["method"])
        unit, aux = inner.blank(method, batch)
        curve = jnp.zeros((batch, stretches), unit.dtype)
        lanes = Lane(jnp.full(batch, -1, jnp.int32), jnp.zeros(batch, jnp.int32), curve, unit, aux)
        return State(lanes, no_record(stretches, unit.dtype), inner.hidden(method), jnp.int32(0), settings["rule"])

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        lanes, fresh = state.lanes, state.lanes.trial < 0
        training = Waiting(lanes.unit, ~fresh, lanes.aux)

        unit, aux, method = inner.drawn(key, state.method, fresh.sum(dtype=jnp.int32), batch, training)
        turn = jnp.cumsum(fresh, dtype=jnp.int32) - 1
        unit, aux = jax.tree.map(lambda x: x[turn], (unit, aux))
        begun = Lane(state.started + turn, jnp.zeros_like(turn), jnp.zeros_like(lanes.curve), unit, aux)
        lanes = where_rows(fresh, begun, lanes)
        trials = Trials(
            hparams=space.decode(lanes.unit),
            unit=lanes.unit,
            id=lanes.trial,
            steps=jnp.full(batch, every, jnp.int32),
            source=jnp.where(fresh, -1, lane),
            slot=jnp.asarray(lane),
            active=jnp.ones(batch, bool),
            aux=Row(jnp.asarray(lane), lanes.trial, lanes.reached, lanes.curve, lanes.aux),
        )
        started = state.started + fresh.sum(dtype=jnp.int32)
        return trials, state._replace(lanes=lanes, method=method, started=started)

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        row: Row = trials.aux
        # A row without steps is a result that was known beforehand: it has no curve.
        trained = trials.active & (trials.steps > 0)
        known = trials.active & ~trained
        owner = state.lanes.trial[row.lane]
        ours = trained & ((owner < 0) | (owner == row.trial))
        broken = failed(losses)
        measured = jnp.where(broken, 0, losses).astype(row.curve.dtype)
        newest = jnp.arange(stretches, dtype=jnp.int32) == row.reached[:, None]
        curve, reached = jnp.where(newest, measured[:, None], row.curve), row.reached + 1
        alive = ours & ~broken
        done = alive & (reached >= stretches)
        record = beat(complete(state.record, curve, done), losses, known)
        verdict: Verdict = judge(state.rule, curve, reached, record)
        stops = alive & ~done & verdict.stops
        ended = done | stops | (ours & broken)

        told = Lane(jnp.where(ended, -1, row.trial), reached, curve, trials.unit, row.aux)
        at = jnp.where(ours, row.lane, batch)
        lanes = jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), state.lanes, told)
        outcome = jnp.where(stops, verdict.loss, losses).astype(losses.dtype)
        seen = trials._replace(aux=row.aux, active=ended | known)
        method = inner.told(state.method, seen, outcome)
        started = jnp.maximum(state.started, jnp.where(trained, row.trial, -1).max() + 1)
        return State(lanes, record, method, started, state.rule)

    def reserve(state: State, capacity: int) -> State:
        return state._replace(method=inner.hidden(inner.reserve(inner.shown(state.method), capacity)))

    return init, ask, tell, keep if inner.reserve is keep else reserve


def early_stopping(method: Method, rule: Rule) -> Method:
    """Early stopping: a black-box method on learning curves, where a rule gives up the trials that promise nothing.

    Every lane trains a trial in stretches of `rule.every` steps, up to `rule.max_steps`. After each the rule sees its
    losses. When a trial has stopped, failed or come to its end, the method is told, and its lane goes to a new trial.
    The others, which still train, are pending to the method.

    Args:
      method: a black-box method that does not end by itself, such as `hpo.tpe(space, batch=16)`; its batch is the
        number of lanes.
      rule: when to stop, `hpo.MedianRule(...)` or `hpo.ExtrapolationRule(...)`, which says too what the method is told
        of a trial that stops. Known results go to the method, and are losses to beat.

    Returns:
      A `Method` that goes on until a budget ends the study, most naturally `steps`. Its settings are
      `{"method": method.settings, "rule": ...}`, the latter the thresholds of the rule.

    Raises:
      TypeError, ValueError: `rule` is no rule, or the method cannot be asked for trials one by one.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> trainable = hpo.Trainable(
      ...     init=lambda key, h: 1.0, step=lambda key, x, h: x * h["rate"], evaluate=lambda x, h: x)
      >>> method = hpo.early_stopping(
      ...     hpo.tpe({"rate": hpo.Float(0.5, 1.0)}, batch=8), hpo.MedianRule(max_steps=20, every=2))
      >>> result = hpo.minimize(trainable, method, key=jax.random.key(0), steps=2000, progress=False)
      >>> result.best_hparams["rate"] < 0.51
      True

    Reference:
      Golovin et al. (2017), Google Vizier: a service for black-box optimization, section 3.2. Domhan, Springenberg and
      Hutter (2015), Speeding up automatic hyperparameter optimization of deep neural networks by extrapolation of
      learning curves.
    """
    _check(method, rule)
    stretches = rule.max_steps // rule.every
    inner = functions_of(method)
    init, ask, tell, reserve = _functions(method.space, inner, method.batch, rule.every, stretches, rule.judge)
    settings = {"method": method.settings, "rule": rule.settings}
    return Method(
        name="early_stopping",
        space=method.space,
        settings=settings,
        init=Initializer(init, settings),
        ask=ask,
        tell=tell,
        batch=method.batch,
        slots=method.batch,
        reserve=reserve,
    )


def _check(method: Method, rule: Rule) -> None:
    endless(
        method,
        "hpo.tpe(space, batch=16)",
        "so it stops trials itself; give a black-box method, such as hpo.tpe(space)",
        "but lanes are refilled one by one; give a method that goes on, such as hpo.random(space)",
    )
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rule must be a MedianRule or an ExtrapolationRule, got {rule!r}; say hpo.MedianRule(max_steps=100, "
            "every=10)"
        )
    if method.uses_gradients:
        raise ValueError(
            f"method '{method.name}' learns from gradients, which a training run does not give; build it without them"
        )
