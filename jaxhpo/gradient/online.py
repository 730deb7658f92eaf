"""Hyperparameters that learn while the model does.

Baydin, Cornish, Martinez Rubio, Schmidt and Wood (2018), Online learning rate adaptation with hypergradient descent:
the derivative of the last step. Franceschi, Donini, Frasconi and Pontil (2017), Forward and reverse gradient-based
hyperparameter optimization, section 3.3 (RTHO): the derivative of all steps so far.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxhpo.checks import whole
from jaxhpo.gradient.exact import begin, train
from jaxhpo.gradient.floats import forward_mode, split_floats
from jaxhpo.gradient.tangents import Line, carry_init, carry_loss, carry_step
from jaxhpo.space import Space
from jaxhpo.trainable import Trainable

PyTree = Any
EDGE = 1e-6


def _coordinates(space: Space | None, hparams: PyTree) -> tuple[jax.Array, Callable]:
    """What moves, float[n], and the hyperparameters there."""
    floats = split_floats(hparams)
    if space is None:
        if not floats.values:
            raise TypeError(
                f"Online moves float arrays, and hparams has none: {hparams!r}; write jnp.float32(0.1), or give space"
            )
        flat, unravel = ravel_pytree(floats.values)
        return flat, lambda at: floats.rebuild(unravel(at))
    unit = space.encode(hparams)
    # A bound has a slope too.
    unit += jax.lax.stop_gradient(jnp.clip(unit, EDGE, 1 - EDGE) - unit)
    given = space.flatten(hparams)

    def place(at: jax.Array) -> PyTree:
        moved = space.flatten(space.decode(jax.nn.sigmoid(at)))
        real = [leaf.parameter.kind == "real" for leaf in space.leaves]
        return space.fill(space.unflatten([m if r else g for m, g, r in zip(moved, given, real, strict=True)]))

    return jax.scipy.special.logit(unit), place


@dataclasses.dataclass(frozen=True)
class Online:
    """Hyperparameters that move while training goes on: after every window of steps, down the slope of `evaluate`.

    The objective's value is the loss after all steps. Its derivative is with respect to the hyperparameters of the
    first window, all moves held as they were (forward mode, a second training run). A move whose slopes are not finite
    is not made.

    Args:
      window: steps between two moves, at least 1. What is left of the steps when no whole window remains ends the run.
      optimizer: what moves the hyperparameters, an `optax.GradientTransformation`; `optax.adam(0.02)` if not given.
      space: what they are from: they then move in the logit of its unit cube, so within their bounds and, where `log`
        is set, by factors; only real parameters move. If not given, all float arrays in `hparams` move, by their
        values.
      memory: whether slopes are of all steps since the first (RTHO), or else of the last window alone; with a window
        of one step that is the method of Baydin et al.

    Raises:
      ValueError, TypeError: an argument is not what it should be.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> descent = hpo.Trainable(
      ...     lambda key, h: jnp.ones(2), lambda key, x, h: x - h["lr"] * x, lambda x, h: (x**2).sum())
      >>> run = hpo.Online(window=5, space={"lr": hpo.Float(1e-4, 1.0, log=True)}).run(descent, steps=50)
      >>> loss, schedule = run(jax.random.key(0), {"lr": jnp.float32(0.01)})
      >>> schedule["lr"].shape, bool(schedule["lr"][-1] > schedule["lr"][0])
      ((10,), True)

    Reference:
      Franceschi et al. (2017), Forward and reverse gradient-based hyperparameter optimization. Baydin et al. (2018),
      Online learning rate adaptation with hypergradient descent.
    """

    window: int
    optimizer: optax.GradientTransformation | None = None
    space: Any = None
    memory: bool = True

    def __post_init__(self) -> None:
        whole("window", self.window, 1)
        if self.optimizer is not None and not callable(getattr(self.optimizer, "update", None)):
            raise TypeError(f"optimizer must be an optax.GradientTransformation, got {self.optimizer!r}")
        if not isinstance(self.memory, bool | np.bool_):
            raise TypeError(f"memory must be True or False, got {self.memory!r}")
        if self.space is not None:
            object.__setattr__(self, "space", Space.of(self.space))

    def __call__(self, trainable: Trainable, steps: int) -> Callable:
        def objective(key: jax.Array, hparams: PyTree) -> jax.Array:
            values, rebuild = split_floats(hparams)

            def learning(values: list[jax.Array]) -> jax.Array:
                return self._learn(trainable, steps, key, rebuild(values))[0]

            def frozen(values: list[jax.Array]) -> jax.Array:
                _, moves = self._learn(trainable, steps, key, rebuild(jax.lax.stop_gradient(values)))
                return self._follow(trainable, steps, key, rebuild(values), jax.lax.stop_gradient(moves))

            return forward_mode(learning, frozen, values, "Online")

        return objective

    def run(self, trainable: Trainable, steps: int) -> Callable:
        """A function `(key, hparams) -> (loss, schedule)`.

        `schedule` is shaped like `hparams`; what moves has a leading axis, its values in every window, the last of them
        in the steps that are left over, if there are any.
        """
        steps = whole("steps", steps, 1)

        def learn(key: jax.Array, hparams: PyTree) -> tuple[jax.Array, PyTree]:
            loss, moves = self._learn(trainable, steps, key, hparams)
            start, place = _coordinates(self.space, hparams)
            shape = split_floats(place(start))
            values = jax.vmap(lambda move: split_floats(place(start + move)).values)(moves)
            return loss, shape.rebuild(values)

        return learn

    def _learn(self, trainable: Trainable, steps: int, key: jax.Array, hparams: PyTree) -> tuple[jax.Array, jax.Array]:
        """The loss, and by how much the coordinates of each window differ from the first: float[windows, n]."""
        optimizer = optax.adam(0.02) if self.optimizer is None else self.optimizer
        start, place = _coordinates(self.space, hparams)
        windows = steps // self.window
        directions = jnp.eye(start.size, dtype=start.dtype)

        def window(carry: tuple, reached: jax.Array) -> tuple[tuple, jax.Array]:
            carried, move, opt_state = carry
            line = Line(place, start + move, directions)
            carried = carried if self.memory else carried.still()
            carried, _ = jax.lax.scan(lambda c, r: (carry_step(trainable, key, r, c, line), None), carried, reached)
            _, slopes = carry_loss(trainable, carried, line)
            ok = jnp.isfinite(slopes).all()
            updates, moved = optimizer.update(jnp.where(ok, slopes, 0).astype(start.dtype), opt_state, line.at)
            keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
            return (carried, keep(move + updates, move), jax.tree.map(keep, moved, opt_state)), move

        first = carry_init(trainable, key, Line(place, start, directions))
        carry = first, jnp.zeros_like(start), optimizer.init(start)
        reached = jnp.arange(1, windows * self.window + 1).reshape(windows, self.window)
        (carried, move, _), moves = jax.lax.scan(window, carry, reached)
        state, hparams = carried.state, place(start + (moves[-1] if windows else move))
        if windows * self.window < steps:
            moves, hparams = jnp.concatenate([moves, move[None]]), place(start + move)
            state = train(trainable, key, hparams, state, windows * self.window + 1, steps)
        return trainable.evaluate(state, hparams), moves

    def _follow(self, trainable: Trainable, steps: int, key: jax.Array, hparams: PyTree, moves: jax.Array) -> jax.Array:
        """The loss where the moves are known."""
        start, place = _coordinates(self.space, hparams)

        def step(state: PyTree, reached: jax.Array) -> tuple[PyTree, None]:
            hparams = place(start + moves[(reached - 1) // self.window])
            return trainable.step(jax.random.fold_in(key, reached), state, hparams), None

        state = begin(trainable, key, place(start + moves[0]))
        state, _ = jax.lax.scan(step, state, jnp.arange(1, steps + 1))
        return trainable.evaluate(state, place(start + moves[-1]))
