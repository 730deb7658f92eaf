"""DEHB: ASHA or Hyperband, whose configurations come from differential evolution across the rungs.

Reference: Awad, Mallik and Hutter (2021), DEHB: evolutionary Hyperband for scalable, robust and efficient
hyperparameter optimization, IJCAI. As there, every number of steps has a population of its own, and what did well with
few steps enters the ones above. Here it does so as a trial that is promoted, with the training state that it has, and
new trials are children of the population with the most steps that is complete.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.bandit.sampling import WIDTH, inner_of, largest
from jaxhpo.bandit.schedulers import scheduled
from jaxhpo.checks import real, whole
from jaxhpo.method import Method
from jaxhpo.population.differential_evolution import ADAPTIVE, Row, State, differential_evolution
from jaxhpo.space import Space, working_dtype


def adopted(state: State, row: Row, elsewhere: jax.Array, by_chance: jax.Array) -> Row:
    """What differential evolution remembers of trials that it did not ask for.

    Each competes in the place where its parent is in the population that it comes from. If chance has chosen it, or as
    long as there are empty places, it competes with one of the worst members.

    Args:
      state: the population.
      row: of all trials.
      elsewhere: bool[rows], those that this population has not asked for.
      by_chance: bool[rows], those of them that no population has.
    """
    moves = elsewhere & (by_chance | ~complete(state))
    turn = jnp.cumsum(moves, dtype=jnp.int32) - 1
    number = min(moves.shape[0], state.loss.shape[0])
    worst = lax.top_k(state.loss, number)[1].astype(jnp.int32)
    return Row(
        member=jnp.where(moves, worst[jnp.clip(turn, 0, number - 1)], row.member),
        start=jnp.where(elsewhere, state.start, row.start),
        weight=jnp.where(elsewhere, 0, row.weight),
        rate=jnp.where(elsewhere, 0, row.rate),
    )


def complete(state: State) -> jax.Array:
    """Whether a trial is known for every member: bool[]."""
    return jnp.isfinite(state.loss).all()


def dehb(
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
    strategy: str = ADAPTIVE,
    population: int | None = None,
    random_fraction: float = 0.2,
) -> Method:
    """Trials that race for training steps, made by differential evolution from those that trained longest.

    Every number of steps at which trials are compared has a population of `differential_evolution`. First, trials are
    chosen by chance; they enter a population in the place of its worst member when they have trained that long. New
    trials are children of the population with the most steps that is complete, and each competes with its parent's
    place in all populations that it reaches.

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
      strategy: of `differential_evolution`.
      population: members for each number of steps, at least 4; 4 a dim, but 20 to 100, if not given.
      random_fraction: share of trials that are chosen by chance, in [0, 1].

    Returns:
      A `Method`, which with Hyperband ends by itself. Its settings are `{"sampler": ..., "random_fraction": ...}`.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> trainable = hpo.Trainable(
      ...     init=lambda key, h: 1.0, step=lambda key, x, h: x * h["rate"], evaluate=lambda x, h: x)
      >>> method = hpo.dehb({"rate": hpo.Float(0.5, 1.0)}, max_steps=27, batch=8)
      >>> result = hpo.minimize(trainable, method, key=jax.random.key(0), steps=2000, progress=False)
      >>> result.best_hparams["rate"] < 0.51
      True

    Reference:
      Awad, Mallik and Hutter (2021), DEHB: evolutionary Hyperband for scalable, robust and efficient hyperparameter
      optimization.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    members = min(max(4 * space.dims, 20), 100) if population is None else whole("population", population, 4)
    chance = real("random_fraction", random_fraction, 0, 1, "0.2 is usual")

    def sampler(space: Space, batch: int) -> Method:
        return differential_evolution(space, strategy=strategy, population=members, batch=batch)

    inner, settings = inner_of(sampler, space, min(batch, WIDTH))
    return scheduled(
        "dehb",
        scheduler,
        space,
        lambda levels: largest(inner, space, levels, batch, members, adopted, complete),
        {"sampler": settings, "random_fraction": jnp.asarray(chance, working_dtype())},
        max_steps=max_steps,
        eta=eta,
        min_steps=min_steps,
        batch=batch,
        cycles=cycles,
        in_flight=in_flight,
        paused=paused,
    )
