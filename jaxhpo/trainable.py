"""Training as pure functions of one trial, and lanes: many trials trained as one program."""

from collections.abc import Callable
from typing import Any, NamedTuple

PyTree = Any


class Trainable(NamedTuple):
    """How one trial trains: pure JAX functions, which the engine batches.

    Data sets that the functions close over become arguments of the compiled program.
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
