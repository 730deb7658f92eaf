"""ASHA: asynchronous successive halving, in which no lane waits for a rung to fill.

Reference: Li, Jamieson, Rostamizadeh, Gonina, Ben-tzur, Hardt, Recht and Talwalkar (2020), A system for massively
parallel hyperparameter tuning, MLSys, Algorithm 2.
"""

from collections.abc import Callable
from typing import Any

from jaxhpo.bandit.sampling import WIDTH, inner_of, one
from jaxhpo.bandit.schedulers import scheduled
from jaxhpo.checks import whole
from jaxhpo.method import Method
from jaxhpo.space import Space
from jaxhpo.stochastic.random import random


def asha(
    space: Any,
    *,
    max_steps: int,
    eta: int = 3,
    min_steps: int = 1,
    batch: int = 64,
    paused: int | None = None,
    sampler: Callable = random,
) -> Method:
    """Asynchronous successive halving: every lane trains a promoted trial or a new one, at every moment.

    The rungs are at `min_steps`, `eta * min_steps`, ... and `max_steps`. When a lane is free, the best trial of the
    highest rung that is among the best `1/eta` of those that have reached it moves up; if there is none, a new trial
    starts. All lanes that are free in a round are filled as if one after the other.

    A round runs the greatest common divisor of `min_steps` and `max_steps` in steps, so make `max_steps` a multiple.

    Args:
      space: a search space, or the tree that describes it.
      max_steps: training steps of a trial that is never stopped, at least 1.
      eta: at least 2; of the trials that have reached a rung, the best `1/eta` move up.
      min_steps: training steps of the lowest rung, at least 1 and at most `max_steps`.
      batch: lanes; trials that train side by side.
      paused: trials beside them whose training states are kept, since they may still move up. If there are more, those
        that will wait longest are given up; where that leaves a rung with fewer that may move up than `1/eta`, the best
        that are there do. With 0, a trial goes on at once or stops for good. If not given, as many as lanes, and at
        least 16.
      sampler: builder of the method that chooses the configurations, called as `sampler(space, batch=batch)`. It is
        told each trial once, when it has reached the lowest rung.

    Returns:
      A `Method` that goes on until a budget ends the study, most naturally `steps`.

    Raises:
      ValueError, TypeError: a number is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> trainable = hpo.Trainable(
      ...     init=lambda key, h: 1.0, step=lambda key, x, h: x * h["rate"], evaluate=lambda x, h: x)
      >>> method = hpo.asha({"rate": hpo.Float(0.5, 1.0)}, max_steps=27, batch=8)
      >>> result = hpo.minimize(trainable, method, key=jax.random.key(0), steps=2000, progress=False)
      >>> result.best_hparams["rate"] < 0.51
      True

    Reference:
      Li et al. (2020), A system for massively parallel hyperparameter tuning.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    inner, settings = inner_of(sampler, space, min(batch, WIDTH))
    return scheduled(
        "asha",
        "asha",
        space,
        lambda levels: one(inner, planned=False),
        {"sampler": settings},
        max_steps=max_steps,
        eta=eta,
        min_steps=min_steps,
        batch=batch,
        paused=paused,
    )
