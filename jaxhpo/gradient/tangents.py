"""A training state with its derivatives, carried forward step by step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo.gradient.exact import begin
from jaxhpo.gradient.floats import push, split_floats
from jaxhpo.trainable import Trainable

PyTree = Any


class Carried(NamedTuple):
    """A training state and where it would move if the hyperparameters did."""

    state: PyTree
    tangents: list[jax.Array]
    """[n, ...] of each of its float arrays: derivatives along n directions"""

    def still(self) -> "Carried":
        """The same state as if no hyperparameter had made it."""
        return self._replace(tangents=jax.tree.map(jnp.zeros_like, self.tangents))


class Line(NamedTuple):
    """Hyperparameters as a function of coordinates, and directions in them."""

    place: Callable
    """(coordinates) -> hparams"""
    at: PyTree
    """coordinates, float arrays"""
    along: PyTree
    """the same with a leading axis: n directions"""


def _parts(state: PyTree) -> tuple[list[jax.Array], PyTree]:
    return split_floats(state).values, state


def carry_init(trainable: Trainable, key: jax.Array, line: Line) -> Carried:
    """The state before the first step."""

    def first(at: PyTree) -> tuple[list[jax.Array], PyTree]:
        return _parts(jax.tree.map(jnp.asarray, begin(trainable, key, line.place(at))))

    values, tangents, state = push(first, (line.at,), (line.along,))
    return Carried(split_floats(state).rebuild(values), tangents)


def carry_step(trainable: Trainable, key: jax.Array, reached: jax.Array, carried: Carried, line: Line) -> Carried:
    """The state after the step that reaches `reached`; `key` is the trial's."""
    values, rebuild = split_floats(carried.state)

    def step(values: list[jax.Array], at: PyTree) -> tuple[list[jax.Array], PyTree]:
        return _parts(trainable.step(jax.random.fold_in(key, reached), rebuild(values), line.place(at)))

    values, tangents, state = push(step, (values, line.at), (carried.tangents, line.along))
    return Carried(split_floats(state).rebuild(values), tangents)


def carry_loss(trainable: Trainable, carried: Carried, line: Line) -> tuple[jax.Array, jax.Array]:
    """The loss of the state, float[], and its slopes, float[n]."""
    values, rebuild = split_floats(carried.state)

    def loss(values: list[jax.Array], at: PyTree) -> tuple[jax.Array, None]:
        return trainable.evaluate(rebuild(values), line.place(at)), None

    value, slopes, _ = push(loss, (values, line.at), (carried.tangents, line.along))
    return value, slopes
