"""A whole training run as one objective, which can be differentiated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxhpo.checks import whole
from jaxhpo.gradient.exact import Reverse
from jaxhpo.trainable import Trainable, unjitted


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A training run as an objective `(key, hparams) -> loss`; equal where all three of its parts are."""

    trainable: Trainable
    """how it trains"""
    steps: int
    """how long"""
    adjoint: Callable
    """how the derivative is taken, `(trainable, steps) -> objective`"""

    def __call__(self, key: jax.Array, hparams: Any) -> jax.Array:
        return self.adjoint(unjitted(self.trainable), self.steps)(key, hparams)


def unroll(trainable: Trainable, steps: int, adjoint: Callable | None = None) -> Unrolled:
    """The loss after `steps` training steps, as an objective `(key, hparams) -> loss`.

    Args:
      trainable: how to train.
      steps: training steps, at least 1.
      adjoint: how the derivative is taken: `Reverse`, `Forward`, `Truncated`, `Implicit`, `Online`, or any function
        `(trainable, steps) -> objective`. `Reverse()` if not given.

    Returns:
      A pure function of a trial's key and hyperparameters, with the keys that a study gives the same trial. It can be
      hashed, and is equal to another one of the same parts.

    Raises:
      ValueError, TypeError: `steps` is out of its range, `trainable` is none, or the adjoint does not suit them.

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
    adjoint = Reverse() if adjoint is None else adjoint
    if not callable(adjoint) or isinstance(adjoint, type):
        raise TypeError(f"adjoint must be one such as hpo.Reverse() or hpo.Forward(), got {adjoint!r}")
    adjoint(trainable, steps)
    return Unrolled(trainable, steps, adjoint)
