"""Derivatives of a training run by the chain rule: backward, forward, and of its last steps only.

Griewank and Walther (2008), Evaluating derivatives, chapter 12: memory for time by checkpoints. Franceschi et al.
(2017), Forward and reverse gradient-based hyperparameter optimization. Shaban et al. (2019), Truncated back-propagation
for bilevel optimization.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.checks import whole
from jaxhpo.gradient.floats import forward_mode, split_floats
from jaxhpo.trainable import Trainable

PyTree = Any


def begin(trainable: Trainable, key: jax.Array, hparams: PyTree) -> PyTree:
    """The training state before the first step."""
    return trainable.init(jax.random.fold_in(key, 0), hparams)


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """What is kept of a step for the way back; the rest costs less to compute again than to write and to read."""
    return primitive.name in ("dot_general", "conv_general_dilated")


def train(
    trainable: Trainable,
    key: jax.Array,
    hparams: PyTree,
    state: PyTree,
    first: int,
    last: int,
    segment: int | None = None,
    backward: bool = False,
) -> PyTree:
    """The training state after the steps from `first` to `last`, both included.

    Args:
      trainable: how to train.
      key: of the trial.
      hparams: of the trial.
      state: before the first of them.
      first, last: the steps that they reach.
      segment: steps of which only the first state is kept for the way back; all are if not given.
      backward: whether there will be a way back.
    """

    def step(state: PyTree, reached: jax.Array) -> tuple[PyTree, None]:
        return trainable.step(jax.random.fold_in(key, reached), state, hparams), None

    # Between the iterations of a scan nothing is there that could be shared, so nothing has to prevent it.
    taken = jax.checkpoint(step, prevent_cse=False, policy=_is_product) if backward else step

    def stretch(state: PyTree, reached: jax.Array) -> PyTree:
        return jax.lax.scan(taken, state, reached)[0]

    reached = jnp.arange(first, last + 1)
    if segment is None or segment >= len(reached):
        return stretch(state, reached)
    segments = len(reached) // segment
    whole, rest = jnp.split(reached, [segments * segment])
    kept = jax.checkpoint(stretch, prevent_cse=False)
    state, _ = jax.lax.scan(lambda s, r: (kept(s, r), None), state, whole.reshape(segments, segment))
    return stretch(state, rest) if len(rest) else state


def root_segment(steps: int) -> int:
    """About the square root of `steps`, and where there is one near it a divisor, which leaves no remainder."""
    root = math.isqrt(steps - 1) + 1 if steps > 1 else 1
    near = [n for n in range(max(root // 2, 1), 2 * root + 1) if steps % n == 0]
    return min(near, key=lambda n: abs(math.log(n / root)), default=root)


def _segment(checkpoint: str | int, steps: int) -> int | None:
    if isinstance(checkpoint, str):
        return None if checkpoint == "none" else root_segment(steps)
    return checkpoint


def _check(checkpoint: Any) -> None:
    if isinstance(checkpoint, str):
        if checkpoint not in ("none", "sqrt"):
            raise ValueError(f"checkpoint must be 'none', 'sqrt' or a length of segments, got {checkpoint!r}")
    else:
        whole("checkpoint", checkpoint, 1, "or say 'none' or 'sqrt'")


@dataclasses.dataclass(frozen=True)
class Reverse:
    """The exact derivative by reverse mode: for any number of hyperparameters.

    Args:
      checkpoint: "none" keeps the state and the matrix products and convolutions of every step, memory proportional to
        the steps. "sqrt" keeps the state at the begin of about sqrt(steps) segments and computes each again on the way
        back: memory proportional to sqrt(steps), for one more training run. An int, at least 1, is the length of the
        segments; 1 keeps the state of every step alone, which is fast where memory is slow.

    Raises:
      ValueError, TypeError: `checkpoint` is none of these.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> decay = hpo.Trainable(lambda key, h: h["x"], lambda key, x, h: x * 0.9, lambda x, h: x**2)
      >>> objective = hpo.unroll(decay, steps=10, adjoint=hpo.Reverse(checkpoint="sqrt"))
      >>> round(float(jax.grad(objective, 1)(jax.random.key(0), {"x": jnp.float32(1.0)})["x"]), 4)  # 2 * 0.9**20
      0.2432

    Reference:
      Griewank and Walther (2008), Evaluating derivatives.
    """

    checkpoint: str | int = "none"

    def __post_init__(self) -> None:
        _check(self.checkpoint)

    def __call__(self, trainable: Trainable, steps: int) -> Callable:
        segment = _segment(self.checkpoint, steps)

        def objective(key: jax.Array, hparams: PyTree) -> jax.Array:
            state = train(trainable, key, hparams, begin(trainable, key, hparams), 1, steps, segment, True)
            return trainable.evaluate(state, hparams)

        return objective


@dataclasses.dataclass(frozen=True)
class Forward:
    """The exact derivative by forward mode: memory does not depend on the steps, for few hyperparameters.

    The state's derivatives with respect to every number that is differentiated with respect to are carried along in one
    pass, so time and memory grow with how many there are. Evaluation without a derivative carries none. It works in
    `jax.grad`, `jax.jvp`, `jax.jit` and `jax.vmap`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> decay = hpo.Trainable(lambda key, h: h["x"], lambda key, x, h: x * 0.9, lambda x, h: x**2)
      >>> objective = hpo.unroll(decay, steps=10, adjoint=hpo.Forward())
      >>> round(float(jax.grad(objective, 1)(jax.random.key(0), {"x": jnp.float32(1.0)})["x"]), 4)  # 2 * 0.9**20
      0.2432

    Reference:
      Franceschi et al. (2017), Forward and reverse gradient-based hyperparameter optimization.
    """

    def __call__(self, trainable: Trainable, steps: int) -> Callable:
        def objective(key: jax.Array, hparams: PyTree) -> jax.Array:
            values, rebuild = split_floats(hparams)

            def loss(values: list[jax.Array]) -> jax.Array:
                h = rebuild(values)
                return trainable.evaluate(train(trainable, key, h, begin(trainable, key, h), 1, steps), h)

            return forward_mode(loss, loss, values, "Forward()")

        return objective


@dataclasses.dataclass(frozen=True)
class Truncated:
    """The derivative of the last steps only: less memory and time, and steadier where long runs explode. Biased.

    What the first steps made of the hyperparameters counts as given. With `k` the number of steps it is exact.

    Args:
      k: how many of the last steps, at least 1, at most the steps of the run.
      checkpoint: of those, as in `Reverse`.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> slide = hpo.Trainable(lambda key, h: jnp.float32(0), lambda key, x, h: x + h["v"], lambda x, h: x)
      >>> objective = hpo.unroll(slide, steps=10, adjoint=hpo.Truncated(3))
      >>> float(jax.grad(objective, 1)(jax.random.key(0), {"v": jnp.float32(1.0)})["v"])
      3.0

    Reference:
      Shaban et al. (2019), Truncated back-propagation for bilevel optimization.
    """

    k: int
    checkpoint: str | int = "none"

    def __post_init__(self) -> None:
        whole("k", self.k, 1)
        _check(self.checkpoint)

    def __call__(self, trainable: Trainable, steps: int) -> Callable:
        whole("k", self.k, 1, f"the run has no more steps than {steps}", most=steps)
        if self.k == steps:
            return Reverse(self.checkpoint)(trainable, steps)
        segment = _segment(self.checkpoint, self.k)

        def objective(key: jax.Array, hparams: PyTree) -> jax.Array:
            given = jax.lax.stop_gradient(split_floats(hparams).values)
            before = split_floats(hparams).rebuild(given)
            state = train(trainable, key, before, begin(trainable, key, before), 1, steps - self.k)
            values, rebuild = split_floats(state)
            state = rebuild(jax.lax.stop_gradient(values))
            state = train(trainable, key, hparams, state, steps - self.k + 1, steps, segment, True)
            return trainable.evaluate(state, hparams)

        return objective
