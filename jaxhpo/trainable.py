"""Training as pure functions of one trial."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Trainable(NamedTuple):
    """How one trial trains: pure JAX functions, which the engine batches.

    Data sets that the functions close over become arguments of the compiled program. The key of `init` is
    `fold_in(trial_key, 0)`, that of the step that reaches `s` is `fold_in(trial_key, s)`.

    Example:
      >>> import jax.numpy as jnp, jaxhpo as hpo
      >>> trainable = hpo.Trainable(
      ...     init=lambda key, hparams: jnp.float32(3.0),
      ...     step=lambda key, x, hparams: x - hparams["lr"] * 2 * x,
      ...     evaluate=lambda x, hparams: x**2,
      ... )
    """

    init: Callable
    """(key, hparams) -> train_state"""
    step: Callable
    """(key, train_state, hparams) -> train_state"""
    evaluate: Callable
    """(train_state, hparams) -> loss, a scalar, lower is better; NaN means that the trial failed"""
    params: Callable | None = None
    """(train_state) -> params, for implicit differentiation"""
    training_loss: Callable | None = None
    """(params, hparams) -> loss over the full training data, for implicit differentiation"""


def hoist(fn: Callable, *example: Any) -> tuple[Callable, list]:
    """`fn` as a function of its arguments and of the arrays it closes over, and those arrays."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*example)
    treedef = jax.tree.structure(shape)

    def run(consts: list, *args: Any) -> Any:
        return jax.tree.unflatten(treedef, jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(args)))

    return run, closed.consts


def unjitted(problem: Any) -> Any:
    """A problem without a `jit` around its functions, inside which the arrays that they close over are hidden."""
    if isinstance(problem, Trainable):
        return Trainable._make(fn and unjitted(fn) for fn in problem)
    is_jitted = isinstance(problem, type(jax.jit(unjitted)))
    return problem.__wrapped__ if is_jitted else problem


@functools.lru_cache(maxsize=16)
def repeated(problem: Callable | Trainable, repeats: int) -> Callable | Trainable:
    """The same problem with every trial run `repeats` times, on keys split from its own; its loss is their mean."""
    if not isinstance(problem, Trainable):

        def objective(key: jax.Array, hparams: PyTree) -> jax.Array:
            return jnp.mean(jax.vmap(problem, (0, None))(jax.random.split(key, repeats), hparams))

        return objective

    def init(key: jax.Array, hparams: PyTree) -> PyTree:
        return jax.vmap(problem.init, (0, None))(jax.random.split(key, repeats), hparams)

    def step(key: jax.Array, states: PyTree, hparams: PyTree) -> PyTree:
        return jax.vmap(problem.step, (0, 0, None))(jax.random.split(key, repeats), states, hparams)

    def evaluate(states: PyTree, hparams: PyTree) -> jax.Array:
        return jnp.mean(jax.vmap(problem.evaluate, (0, None))(states, hparams))

    return Trainable(init, step, evaluate)
