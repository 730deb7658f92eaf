"""When a study ends: its budgets, and how much of them is used."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxhpo.checks import whole
from jaxhpo.method import Method, ranked
from jaxhpo.space import working_dtype
from jaxhpo.study import Initial, Trace

UNLIMITED = 2**31 - 1
MOST_ROWS, OPEN_ROWS, OPEN_GROWTH = 2**20, 8192, 8


class Budget(NamedTuple):
    """What ends a study, after the round that reaches it."""

    trials: float = math.inf
    steps: float = math.inf
    rounds: float = math.inf
    target: float = -math.inf
    patience: float = math.inf
    """fresh trials since the last improvement"""
    time_limit: float = math.inf
    """seconds"""


class Tally(NamedTuple):
    """How far a study is."""

    rounds: int = 0
    trials: int = 0
    """fresh ids"""
    steps: int = 0
    """training steps of all trials together"""
    best: float = math.inf
    """lowest finite loss"""
    improved: int = 0
    """trials when `best` was last improved"""


class Limits(NamedTuple):
    """What is left of a budget, as a compiled chunk sees it."""

    rounds: ArrayLike
    trials: ArrayLike
    steps: ArrayLike
    target: ArrayLike
    patience: ArrayLike


def read_budget(
    method: Method,
    trials: int | None,
    steps: int | None,
    rounds: int | None,
    target: float | None,
    patience: int | None,
    time_limit: float | None,
) -> Budget:
    """A budget from what the user gave.

    Raises:
      ValueError, TypeError: a number is out of its range, or nothing would ever end the study.
    """
    named = {"trials": trials, "steps": steps, "rounds": rounds, "patience": patience}
    given: dict[str, Any] = {name: whole(name, value, 1) for name, value in named.items() if value is not None}
    for name, value in {"target": target, "time_limit": time_limit}.items():
        if value is None:
            continue
        if not isinstance(value, int | float | np.number) or math.isnan(value):
            raise TypeError(f"{name} must be a number, got {value!r}")
        given[name] = float(value)
    if "target" in given:
        given["target"] = float(working_dtype().type(given["target"]))
    if given.get("time_limit", 1) <= 0:
        raise ValueError(f"time_limit must be above 0 seconds, got {time_limit!r}")
    if "steps" in given and not method.slots:
        raise ValueError(f"steps={steps} was given, but the trials of '{method.name}' carry no steps; give trials")
    if not given and method.rounds is None:
        example = "steps=10_000" if method.slots else "trials=256"
        raise ValueError(f"'{method.name}' does not end by itself; give a budget, such as {example}")
    if method.rounds is not None:
        given["rounds"] = min(given.get("rounds", math.inf), method.rounds)
    return Budget(**given)


def ends(method: Method, budget: Budget, tally: Tally, seconds: float) -> str | None:
    """Why the study is over, `None` if it is not."""
    if tally.rounds >= budget.rounds:
        return "method" if budget.rounds == method.rounds else "rounds"
    reached = {
        "target": tally.best <= budget.target,
        "trials": tally.trials >= budget.trials,
        "steps": tally.steps >= budget.steps,
        "patience": tally.trials - tally.improved >= budget.patience,
        "time_limit": seconds >= budget.time_limit,
    }
    return next((name for name, over in reached.items() if over), None)


def capacity(method: Method, budget: Budget, initial: Initial | None) -> int | None:
    """How many rows will be told at most, if that is known and there can be room for it."""
    asks = budget.rounds
    if not method.slots:
        asks = min(asks, math.ceil(budget.trials / method.batch) if budget.trials < math.inf else math.inf)
    rows = asks * method.batch + (initial.known_rows(method.batch) if initial else 0)
    return None if rows > MOST_ROWS else int(rows)


def limits(budget: Budget, tally: Tally, rounds: int) -> Limits:
    """What is left, for a chunk of at most so many rounds."""
    whole_ = lambda x: np.int32(min(x, UNLIMITED))  # noqa: E731
    return Limits(
        rounds=whole_(min(rounds, budget.rounds - tally.rounds)),
        trials=whole_(budget.trials),
        steps=whole_(budget.steps - tally.steps),
        target=working_dtype().type(budget.target),
        patience=whole_(budget.patience),
    )


class Meter(NamedTuple):
    """The tally inside a compiled chunk; `steps` counts from its beginning."""

    rounds: Any
    trials: Any
    steps: Any
    best: Any
    improved: Any

    def after(self, trace: Trace) -> "Meter":
        """The tally after one more round."""
        active = trace.trials.active
        counts = active if trace.soft is None else active & ~trace.soft
        best = jnp.min(jnp.where(counts, ranked(trace.losses), jnp.inf))
        trials = jnp.maximum(self.trials, jnp.max(jnp.where(active, trace.trials.id, -1)) + 1)
        # Saturates: a chunk may run more steps than an i32 counts.
        more = jnp.sum(jnp.where(active, trace.trials.steps, 0), dtype=jnp.int32)
        steps = jnp.where(self.steps > UNLIMITED - more, UNLIMITED, self.steps + more)
        is_better = best < self.best
        # Trials at soft weights cannot be better, so they are not what a study is impatient about.
        is_better |= False if trace.soft is None else ~counts.any()
        improved = jnp.where(is_better, trials, self.improved)
        return Meter(self.rounds + 1, trials, steps, jnp.minimum(self.best, best), improved)

    def within(self, limits: Limits) -> jax.Array:
        """Whether another round is to be run."""
        return (
            (self.rounds < limits.rounds)
            & (self.trials < limits.trials)
            & (self.steps < limits.steps)
            & (self.best > limits.target)
            & (self.trials - self.improved < limits.patience)
        )


def begin(tally: Tally) -> Meter:
    """The meter of a chunk that goes on from `tally`."""
    best = working_dtype().type(tally.best)
    return Meter(np.int32(0), np.int32(tally.trials), np.int32(0), best, np.int32(tally.improved))


def proceed(tally: Tally, meter: Meter, steps: int) -> Tally:
    """The tally after a chunk in which all trials together ran `steps` training steps."""
    return Tally(
        rounds=tally.rounds + int(meter.rounds),
        trials=int(meter.trials),
        steps=tally.steps + steps,
        best=float(meter.best),
        improved=int(meter.improved),
    )
