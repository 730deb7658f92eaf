"""One-shot search: weights that all architectures share, trained by sampled paths.

References:
  Z. Guo, X. Zhang, H. Mu, W. Heng, Z. Liu, Y. Wei, J. Sun, "Single Path One-Shot Neural Architecture Search with
    Uniform Sampling", ECCV 2020.
  G. Bender, P.-J. Kindermans, B. Zoph, V. Vasudevan, Q. Le, "Understanding and Simplifying One-Shot Architecture
    Search", ICML 2018.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.checks import one_key, whole
from jaxhpo.space import Space, working_dtype
from jaxhpo.trainable import Trainable, hoist

PyTree = Any


def train_supernet(
    trainable: Trainable, space: PyTree, steps: int, *, key: jax.Array, initial: PyTree | None = None
) -> PyTree:
    """Trains one network each of whose steps is that of another architecture, drawn uniformly.

    One compiled program. Optimizers without momentum are the better ones here: others also move the weights of what a
    step has not drawn.

    Args:
      trainable: training whose hyperparameters are points of `space`, such as `flax_trainable` with
        `model=lambda h: nas.build(network, h)`.
      space: the architectures; hyperparameters of training belong in it as constants.
      steps: training steps, at least 1.
      key: PRNG key of the initial weights, the batches and the paths.
      initial: native point whose initial weights all architectures get. Default the upper end of every parameter,
        which in the spaces of this package is the largest network.

    Returns:
      The train state.

    Raises:
      TypeError: `trainable` is no `Trainable`, or `key` is not one PRNG key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> mean = hpo.Trainable(  # of the options that are drawn
      ...     init=lambda key, h: jnp.zeros(2),
      ...     step=lambda key, s, h: s + jnp.array([h["x"], 1.0]),
      ...     evaluate=lambda s, h: (s[0] / s[1] - h["x"]) ** 2)
      >>> space, key = {"x": hpo.Ordinal((0, 1, 2))}, jax.random.key(0)
      >>> state = train_supernet(mean, space, 300, key=key)
      >>> hpo.minimize(shared_weights(mean, state), hpo.grid(space), key=key).best_hparams
      {'x': 1}
    """
    _check(trainable)
    key = one_key(key)
    space, steps = Space.of(space), whole("steps", steps, 1)
    largest = space.decode(jnp.ones(space.dims, working_dtype())) if initial is None else space.read(initial)

    def train(key: jax.Array) -> PyTree:
        path_key, train_key = jax.random.split(key)

        def step(state: PyTree, i: jax.Array) -> tuple[PyTree, None]:
            path = space.fill(space.decode(space.sample(jax.random.fold_in(path_key, i), 1)[0]))
            return trainable.step(jax.random.fold_in(train_key, i), state, path), None

        state = trainable.init(jax.random.fold_in(train_key, 0), space.fill(largest))
        return jax.lax.scan(step, state, jnp.arange(1, steps + 1))[0]

    run, data = hoist(train, key)
    return jax.jit(run)(data, key)


def shared_weights(trainable: Trainable, state: PyTree) -> Callable:
    """The objective that scores an architecture by the weights of a supernet: nothing is trained, so it is fast.

    Args:
      trainable: that of `train_supernet`.
      state: what it returned.

    Returns:
      `(key, hparams) -> loss`, for any method. The order of architectures is only like that after training each alone;
      train the best ones again.

    Raises:
      TypeError: `trainable` is no `Trainable`.
    """
    _check(trainable)

    def objective(key: jax.Array, hparams: PyTree) -> jax.Array:
        return trainable.evaluate(state, hparams)

    return objective


def _check(trainable: Trainable) -> None:
    if not isinstance(trainable, Trainable):
        raise TypeError(
            f"trainable must be a Trainable, got {trainable!r}; make one by hpo.flax_trainable(model=..., ...)"
        )
