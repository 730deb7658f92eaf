"""A whole training run as one objective, which can be differentiated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.checks import whole
from jaxhpo.trainable import Trainable


def unroll(trainable: Trainable, steps: int, adjoint: Callable | None = None) -> Callable:
    """The loss after `steps` training steps, as an objective `(key, hparams) -> loss`.

    Args:
      trainable: how to train.
      steps: training steps, at least 1.
      adjoint: how the derivative is taken, `(trainable, steps) -> objective`; plain reverse mode if not given.

    Returns:
      A pure function of a trial's key and hyperparameters, with the keys that a study gives the same trial.

    Raises:
      ValueError, TypeError: `steps` is out of its range, or `trainable` is none.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> descent = hpo.Trainable(
      ...     lambda key, h: jnp.float32(1.0), lambda key, x, h: x - h["lr"] * x, lambda x, h: x**2)
      >>> round(float(jax.grad(hpo.unroll(descent, steps=2), 1)(jax.random.key(0), {"lr": jnp.float32(0.5)})["lr"]), 3)
      -0.5
    """
    if not isinstance(trainable, Trainable):
        raise TypeError(f"trainable must be a Trainable(init, step, evaluate), got {trainable!r}")
    steps = whole("steps", steps, 1)
    if adjoint is not None:
        return adjoint(trainable, steps)

    def objective(key: jax.Array, hparams: Any) -> jax.Array:
        def step(state: Any, reached: jax.Array) -> tuple[Any, None]:
            return trainable.step(jax.random.fold_in(key, reached), state, hparams), None

        state = trainable.init(jax.random.fold_in(key, 0), hparams)
        state, _ = jax.lax.scan(step, state, jnp.arange(1, steps + 1))
        return trainable.evaluate(state, hparams)

    return objective
