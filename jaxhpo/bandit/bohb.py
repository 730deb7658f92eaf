"""BOHB: Hyperband or ASHA, whose configurations come from a model of what trials reached with the most training.

Reference: Falkner, Klein and Hutter (2018), BOHB: robust and efficient hyperparameter optimization at scale, ICML,
Algorithm 2. The model over all budgets at once orders trials first by how far they got, as Optuna does.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxhpo.bandit.sampling import WIDTH, inner_of, largest, pooled
from jaxhpo.bandit.schedulers import scheduled
from jaxhpo.checks import one_of, real, whole
from jaxhpo.method import Method
from jaxhpo.sequential.tpe import tpe
from jaxhpo.space import Space, working_dtype

MODELS = {"largest": largest, "pooled": pooled}


def bohb(
    space: Any,
    *,
    max_steps: int,
    eta: int = 3,
    min_steps: int = 1,
    batch: int = 64,
    scheduler: str = "asha",
    cycles: int = 1,
    in_flight: int | None = None,
    paused: int | None = None,
    sampler: Callable = tpe,
    model: str = "largest",
    enough: int | None = None,
    random_fraction: float = 0.0,
) -> Method:
    """Trials that race for training steps, chosen by a model of what those before them reached.

    Every number of steps at which trials are compared has a model of its own, which learns of a trial when it has
    trained that long. The one with the most steps that knows `enough` trials chooses. Trials that may still get there
    are pending for it, those in training and the paused ones, and those that were given up before have failed. Each
    model remembers about 1,024 trials: the latest, and the best quarter of those before.

    Args:
      space: a search space, or the tree that describes it.
      max_steps: training steps of a trial that is never stopped, at least 1.
      eta: at least 2; one trial in `eta` moves up.
      min_steps: training steps after which a trial can be stopped first, at least 1 and at most `max_steps`.
      batch: lanes; trials that train side by side.
      scheduler: "asha", see `asha`, or "hyperband", see `hyperband`.
      cycles: of Hyperband, how often its brackets are run.
      in_flight: of Hyperband, how many brackets may run at the same time; all if not given.
      paused: of ASHA, trials beside those in the lanes whose training states are kept.
      sampler: builder of the models, called as `sampler(space, batch=...)`: any black-box method that goes on.
      model: "largest", as above; or "pooled", one model for all numbers of steps, for which trials that got further
        are better than those that did not: for methods that only look at the order of losses, as `tpe` does. It is
        told of a trial at each.
      enough: trials with a finite loss that a model needs before it may choose; `dims + 3`, at least 8, if not given.
      random_fraction: share of trials that are chosen by chance, in [0, 1]. BOHB's authors take a third; `tpe` explores
        by itself.

    Returns:
      A `Method`, which with Hyperband ends by itself. Its settings are `{"sampler": ..., "random_fraction": ...}`.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> trainable = hpo.Trainable(
      ...     init=lambda key, h: 1.0, step=lambda key, x, h: x * h["rate"], evaluate=lambda x, h: x)
      >>> method = hpo.bohb({"rate": hpo.Float(0.5, 1.0)}, max_steps=27, batch=8)
      >>> result = hpo.minimize(trainable, method, key=jax.random.key(0), steps=2000, progress=False)
      >>> result.best_hparams["rate"] < 0.501
      True

    Reference:
      Falkner, Klein and Hutter (2018), BOHB: robust and efficient hyperparameter optimization at scale.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    one_of("model", model, MODELS)
    enough = max(space.dims + 3, 8) if enough is None else whole("enough", enough, 1)
    chance = real("random_fraction", random_fraction, 0, 1, "a third is usual for models that never explore")
    inner, settings = inner_of(sampler, space, min(batch, WIDTH))
    return scheduled(
        "bohb",
        scheduler,
        space,
        lambda levels: MODELS[model](inner, space, levels, batch, enough),
        {"sampler": settings, "random_fraction": jnp.asarray(chance, working_dtype())},
        max_steps=max_steps,
        eta=eta,
        min_steps=min_steps,
        batch=batch,
        cycles=cycles,
        in_flight=in_flight,
        paused=paused,
    )
