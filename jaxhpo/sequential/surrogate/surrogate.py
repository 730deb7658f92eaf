"""What a surrogate is to Bayesian optimization: pure functions that learn from a history and predict."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class Plan(NamedTuple):
    """How much is done where the history has a size."""

    rows: int
    """rows of the history, at most"""
    candidates: int = 800
    """points at which the acquisition is tried first"""
    starts: int = 8
    """points from which it is climbed"""
    steps: int = 20
    """of the climb along gradients; 0 where the surrogate has none"""
    rounds: int = 2
    """of trying neighbours"""
    members: int = 1
    """models in the ensemble"""
    period: int = 1
    """trials told between two changes of the hyperparameters"""


class Prediction(NamedTuple):
    """What is expected at candidates, in the units of the surrogate's targets."""

    mean: jax.Array
    """float[members, candidates]"""
    variance: jax.Array
    """float[members, candidates], in the units of `Surrogate.std`"""
    link: PyTree
    """what `Surrogate.updated` needs"""


class Surrogate(NamedTuple):
    """A surrogate of a space. Posteriors are what `observe` returns; they have the field `best`, float[members]."""

    plans: Callable
    """(capacity) -> the `Plan` of each size of a history with that capacity; the last may not know all of it"""
    init: Callable
    """(key, settings, capacity) -> model, what is kept between two asks"""
    reserve: Callable
    """(model, capacity) -> model"""
    observe: Callable
    """(key, settings, model, history, level, newest, waiting) -> (model, posterior) of all that was told: `level` is
    the index of the plan, `newest` the rows told in an ask, and the posterior has room for `waiting` fantasies"""
    predict: Callable
    """(posterior, unit[candidates, dims]) -> Prediction, differentiable where the plans have steps"""
    std: Callable
    """(posterior, variance) -> float[members, candidates]"""
    fantasize: Callable
    """(posterior, turn, unit[dims], normal[members], counts) -> (posterior, link): as if the loss there were known to
    be what each member draws; no change where `counts`, bool[], is False. `turn`, i32[], counts the room for fantasies
    from its end: -waiting is the first"""
    updated: Callable
    """(posterior, prediction, unit[candidates, dims], link, turn) -> the prediction after a fantasy"""
    draw: Callable
    """(key, posterior, prediction, unit[candidates, dims]) -> float[candidates]: a function drawn from the posterior"""
