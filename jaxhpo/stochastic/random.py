"""Random search: every trial is an independent uniform point of the unit cube.

Bergstra and Bengio (2012), Random Search for Hyper-Parameter Optimization, JMLR 13.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxhpo.checks import whole
from jaxhpo.method import Count, Method, PyTree, Trials, black_box, count
from jaxhpo.space import Space


class State(NamedTuple):
    """How many trials there were."""

    asked: Count
    """i32[]: trials asked for so far"""


@functools.lru_cache(maxsize=256)
def _functions(space: Space, batch: int) -> tuple[Callable, Callable, Callable]:
    def init(key: jax.Array, settings: PyTree = None) -> State:
        del key, settings
        return State(asked=count())

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        asked = state.asked.value
        return black_box(space, space.sample(key, batch), first=asked), State(asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del trials, losses, gradients
        return state

    return init, ask, tell


def random(space: PyTree, *, batch: int = 16) -> Method:
    """Random search.

    Args:
      space: a pytree of parameters, or a `Space`.
      batch: trials per ask.

    Returns:
      A `Method` without settings.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.random({"lr": hpo.Float(1e-4, 1.0, log=True)}, batch=4)
      >>> trials, _ = method.ask(jax.random.key(1), method.init(jax.random.key(0)))
      >>> trials.id.tolist(), bool((trials.hparams["lr"] <= 1.0).all())
      ([0, 1, 2, 3], True)

    Reference:
      Bergstra and Bengio (2012), Random Search for Hyper-Parameter Optimization.
    """
    space, batch = Space.of(space, most=None), whole("batch", batch, 1)
    init, ask, tell = _functions(space, batch)
    return Method("random", space, (), init, ask, tell, batch)
