"""Hyperband: brackets of successive halving that differ in how early they stop trials, interleaved in the lanes.

Reference: Li, Jamieson, DeSalvo, Rostamizadeh and Talwalkar (2018), Hyperband: a novel bandit-based approach to
hyperparameter optimization, JMLR 18(185), Algorithm 1; the sizes of the brackets are those of its Table 1.
"""

from collections.abc import Callable
from typing import Any

from jaxhpo.bandit.sampling import inner_of, one
from jaxhpo.bandit.schedulers import scheduled
from jaxhpo.checks import whole
from jaxhpo.method import Method
from jaxhpo.space import Space
from jaxhpo.stochastic.random import random


def hyperband(
    space: Any,
    *,
    max_steps: int,
    eta: int = 3,
    min_steps: int = 1,
    batch: int = 64,
    cycles: int = 1,
    in_flight: int | None = None,
    sampler: Callable = random,
) -> Method:
    """Hyperband, all of its brackets at once.

    A promoted trial continues from the training state it had. The bank keeps `batch` states and, for every bracket
    in flight, those of the trials that leave its first rung.

    Args:
      space: a search space, or the tree that describes it.
      max_steps: training steps of a trial that is never stopped, at least 1.
      eta: at least 2; each rung has `1/eta` of the trials of the one below, and `eta` times the steps.
      min_steps: training steps of the shortest rung, at least 1 and at most `max_steps`.
      batch: lanes; trials that train side by side.
      cycles: how often the set of brackets is run; the more of them are interleaved, the fuller the lanes.
      in_flight: brackets that may run at the same time, at least 1; all if not given. Fewer need less memory.
      sampler: builder of the method that chooses the configurations, called as `sampler(space, batch=batch)`. It is
        told each trial once, at the end of its first rung.

    Returns:
      A method that ends by itself.

    Raises:
      ValueError, TypeError: a number is out of its range.

    Example:
      >>> import jaxhpo as hpo
      >>> hpo.hyperband({"lr": hpo.Float(1e-4, 1, log=True)}, max_steps=81, batch=16).rounds
      25

    Reference:
      Li, Jamieson, DeSalvo, Rostamizadeh and Talwalkar (2018), Hyperband: a novel bandit-based approach to
      hyperparameter optimization.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    inner, settings = inner_of(sampler, space, batch)
    return scheduled(
        "hyperband",
        "hyperband",
        space,
        lambda levels: one(inner, planned=True),
        {"sampler": settings},
        max_steps=max_steps,
        eta=eta,
        min_steps=min_steps,
        batch=batch,
        cycles=cycles,
        in_flight=in_flight,
    )
