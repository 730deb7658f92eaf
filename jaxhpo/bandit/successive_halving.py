"""Successive halving: train many trials briefly, and the best of them, again and again, longer.

Reference: Jamieson and Talwalkar (2016), Non-stochastic best arm identification and hyperparameter optimization,
AISTATS, Figure 3.
"""

from collections.abc import Callable
from typing import Any

from jaxhpo.bandit.race import race
from jaxhpo.bandit.sampling import inner_of, one
from jaxhpo.bandit.schedule import halving
from jaxhpo.checks import whole
from jaxhpo.method import Method
from jaxhpo.space import Space
from jaxhpo.stochastic.random import random


def successive_halving(
    space: Any,
    *,
    trials: int,
    max_steps: int,
    eta: int = 3,
    min_steps: int | None = None,
    batch: int = 64,
    sampler: Callable = random,
) -> Method:
    """One bracket: `trials` start, after each rung the best `1/eta` go on `eta` times as long, up to `max_steps`.

    Args:
      space: a search space, or the tree that describes it.
      trials: configurations that start, at least 1.
      max_steps: training steps of the last rung, at least 1.
      eta: at least 2; how many times fewer trials and more steps each rung has than the one below.
      min_steps: training steps of the first rung; if not given, the trials reach `max_steps` when one is left.
      batch: lanes; trials that train side by side.
      sampler: builder of the method that chooses the configurations, called as `sampler(space, batch=batch)`.

    Returns:
      A method that ends by itself.

    Raises:
      ValueError, TypeError: a number is out of its range.

    Example:
      >>> import jaxhpo as hpo
      >>> hpo.successive_halving({"lr": hpo.Float(1e-4, 1, log=True)}, trials=27, max_steps=27, batch=9).rounds
      6

    Reference:
      Jamieson and Talwalkar (2016), Non-stochastic best arm identification and hyperparameter optimization.
    """
    trials, max_steps = whole("trials", trials, 1), whole("max_steps", max_steps, 1, most=2**31 - 1)
    eta, batch = whole("eta", eta, 2), whole("batch", batch, 1)
    if min_steps is None:
        rungs = 0
        while trials >= eta ** (rungs + 1) and max_steps >= eta ** (rungs + 1):
            rungs += 1
        min_steps = max_steps // eta**rungs
    min_steps = whole("min_steps", min_steps, 1)
    if min_steps > max_steps:
        raise ValueError(f"min_steps must be at most max_steps={max_steps}, got {min_steps}; lower it")
    bracket = halving(trials, min_steps, max_steps, eta)
    space = Space.of(space)
    inner, settings = inner_of(sampler, space, batch)
    sampling, settings = one(inner, planned=True), {"sampler": settings}
    return race("successive_halving", space, (bracket,), batch=batch, in_flight=1, sampling=sampling, settings=settings)
