"""The comparison on the command line: the thirteen methods of the field tune a Flax MLP on scikit-learn's digits."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import optax
from rich.console import Console

from jaxhpo.automl import regularized_evolution, reinforce
from jaxhpo.bandit import hyperband
from jaxhpo.checks import one_of, whole
from jaxhpo.compare import compare
from jaxhpo.comparison import Comparison
from jaxhpo.demo import SPACE, Digits, digits, trainable
from jaxhpo.exhaustive import grid
from jaxhpo.gradient import gradient, unroll
from jaxhpo.method import Method
from jaxhpo.population import genetic, particle_swarm
from jaxhpo.sequential import bayesian, coordinate_descent, gp_ei, tpe
from jaxhpo.space import Space
from jaxhpo.stochastic import annealing, random

STEPS, BATCH = 81, 8


def _hyperband(space: Space, trials: int) -> Method:
    # A cycle takes as many steps as seven trainings.
    return hyperband(space, max_steps=STEPS, min_steps=STEPS // 9, batch=BATCH, cycles=trials // 7 + 1)


METHODS: dict[str, Callable[[Space, int], Method]] = {
    "grid": lambda space, trials: grid(space, points=2, batch=BATCH),
    "random": lambda space, trials: random(space, batch=BATCH),
    "annealing": lambda space, trials: annealing(space, batch=BATCH),
    "bayesian": lambda space, trials: bayesian(space, surrogate="forest", batch=BATCH),
    "tpe": lambda space, trials: tpe(space, batch=BATCH),
    "gp_ei": lambda space, trials: gp_ei(space, batch=BATCH),
    "coordinate_descent": lambda space, trials: coordinate_descent(space, batch=BATCH),
    "genetic": lambda space, trials: genetic(space, batch=BATCH),
    "particle_swarm": lambda space, trials: particle_swarm(space, batch=BATCH),
    "hyperband": _hyperband,
    "gradient": lambda space, trials: gradient(space, optax.adam(0.1), starts=BATCH // 2),
    "regularized_evolution": lambda space, trials: regularized_evolution(space, population=2 * BATCH, batch=BATCH),
    "reinforce": lambda space, trials: reinforce(space, batch=BATCH),
}


def field(
    data: Digits,
    key: jax.Array,
    methods: Sequence[str] = tuple(METHODS),
    *,
    trials: int = 48,
    repeats: int = 10,
    progress: bool | None = None,
) -> Comparison:
    """The methods of the field on the networks of the demo, each with as many training steps.

    Args:
      data: digits.
      key: PRNG key.
      methods: names in `METHODS`.
      trials: what each repeat may spend, in whole trainings of 81 steps.
      repeats: of each method.
      progress: as in `compare`.
    """
    space = Space(SPACE)
    built = {name: METHODS[name](space, trials) for name in methods}
    problem = unroll(trainable(data), steps=STEPS)
    return compare(problem, built, key=key, trials=trials, repeats=repeats, progress=progress)


def show_field(
    seed: int = 0,
    path: str | Path = "comparison.html",
    methods: Sequence[str] = tuple(METHODS),
    *,
    trials: int = 48,
    repeats: int = 10,
    progress: bool | None = None,
) -> Comparison:
    """Runs the comparison, prints its tables and writes its page; arguments as in `field`."""
    trials, repeats = whole("trials", trials, 1), whole("repeats", repeats, 1)
    methods = [one_of("methods", name, METHODS) for name in dict.fromkeys(methods)]
    console, begun = Console(), time.perf_counter()
    data = digits(seed)
    console.print(
        f"{len(methods)} methods tune MLPs on {len(data.train[0])} digits: {Space(SPACE).dims} hyperparameters, some "
        f"conditional; {trials} trainings of {STEPS} steps for each of {repeats} repeats."
    )
    comparison = field(data, jax.random.key(seed), methods, trials=trials, repeats=repeats, progress=progress)
    name, _, loss = comparison.best()
    facts = {
        "problem": f"validation cross-entropy of an MLP on {len(data.valid[0])} digits",
        "budget": f"{trials} trainings of {STEPS} steps for each repeat",
        "lowest loss of all": f"{loss:.4g}, by {name}",
        "time": f"{time.perf_counter() - begun:.0f} s",
        "device": f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    console.print(comparison.table())
    console.print(comparison.times())
    for fact, value in facts.items():
        console.print(f"[bold]{fact}[/bold]: {value}")
    written = comparison.report(path, title="jaxhpo: the methods of the field on digits", facts=facts)
    console.print(f"[bold]report[/bold]: {written.absolute()}", soft_wrap=True)
    return comparison
