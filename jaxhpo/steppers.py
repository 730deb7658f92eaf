"""Optimizers of optax as methods keep them: shared by what is compiled, each step for many vectors at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class Parts(NamedTuple):
    """What an optimizer is made of: equal for the same object, so that what is compiled is shared."""

    init: Callable
    update: Callable
    takes_loss: bool
    """whether `update` takes more than gradients, such as `value`"""


@functools.lru_cache(maxsize=256)
def stepper(parts: Parts) -> tuple[Callable, Callable]:
    """An optimizer for many vectors, each on its own.

    Returns:
      `begin(points)`, its states, and `step(points, states, gradients, losses)`, the steps and the states after them;
      all with a leading axis.
    """

    def step(point: jax.Array, state: PyTree, gradient: jax.Array, loss: jax.Array) -> tuple[jax.Array, PyTree]:
        more = {"value": loss, "grad": gradient} if parts.takes_loss else {}
        updates, after = parts.update(gradient, state, point, **more)
        same = lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype)  # noqa: E731
        return updates, jax.tree.map(same, after, state)

    return jax.vmap(parts.init), jax.vmap(step)


def parts_of(optimizer: Any) -> Parts:
    """What an optax optimizer is made of.

    Raises:
      TypeError: it is none.
    """
    init, update = getattr(optimizer, "init", None), getattr(optimizer, "update", None)
    if not callable(init) or not callable(update):
        raise TypeError(f"optimizer must be an optax optimizer, got {optimizer!r}; say optax.adam(0.05)")
    parts = Parts(init, update, isinstance(optimizer, optax.GradientTransformationExtraArgs))
    begin, step = stepper(parts)
    try:
        jax.eval_shape(lambda x: step(x, begin(x), x, x[:, 0]), jax.ShapeDtypeStruct((1, 2), jnp.float32))
    except TypeError as error:
        if "keyword-only argument" not in str(error):
            raise
        raise TypeError(
            "optimizer calls the objective itself, as line searches do, but here each step is one trial; say "
            "hpo.trust_region(), or optax.adam(0.05)"
        ) from error
    return parts
