"""The demo: Hyperband tunes a Flax MLP on scikit-learn's digits. `examples/tune_flax_mlp.py` is its short form."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console

from jaxhpo.bandit import hyperband
from jaxhpo.checks import optional
from jaxhpo.flax import flax_trainable, select_optimizer
from jaxhpo.minimize import minimize
from jaxhpo.modules import MLP
from jaxhpo.parameters import Categorical, Float, Int, OneOf
from jaxhpo.records import show
from jaxhpo.result import Result
from jaxhpo.space import Space
from jaxhpo.trainable import Trainable

PyTree = Any

SPACE = {
    "width": Int(32, 128, log=True),
    "depth": Int(1, 3),
    "activation": Categorical(("relu", "gelu", "silu", "tanh")),
    "dropout": Float(0.0, 0.5),
    "optimizer": OneOf(
        sgd={"lr": Float(1e-2, 1.0, log=True), "momentum": Float(0.0, 0.99)},
        adam={"lr": Float(1e-3, 1e-1, log=True), "b1": Float(0.8, 0.99)},
    ),
}


class Digits(NamedTuple):
    """Inputs float32[n, 64] in [0, 1] and targets i32[n]: 60% to train, 20% to choose by, 20% to judge by."""

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def digits(seed: int) -> Digits:
    """scikit-learn's digits, split with the classes in equal shares."""
    datasets = optional("sklearn.datasets", "the demo")
    split = optional("sklearn.model_selection", "the demo").train_test_split
    x, y = datasets.load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    x, x_test, y, y_test = split(x, y, test_size=0.2, stratify=y, random_state=seed)
    x, x_valid, y, y_valid = split(x, y, test_size=0.25, stratify=y, random_state=seed)
    return Digits((x, y), (x_valid, y_valid), (x_test, y_test))


def model(h: PyTree) -> MLP:
    """The network of one trial."""
    return MLP(10, 128, 3, width=h["width"], depth=h["depth"], activation=h["activation"], dropout=h["dropout"])


def optimizer(h: PyTree) -> optax.GradientTransformation:
    """The optimizer of one trial."""
    return select_optimizer(
        h["optimizer"],
        {"sgd": lambda h: optax.sgd(h["lr"], h["momentum"]), "adam": lambda h: optax.adam(h["lr"], h["b1"])},
    )


def trainable(data: Digits) -> Trainable:
    """How one network trains; its loss is the cross-entropy on the validation set."""
    return flax_trainable(
        model=model,
        optimizer=optimizer,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=data.train,
        valid=data.valid,
        batch_size=64,
    )


def tune(data: Digits, key: jax.Array, progress: bool | None = None) -> Result:
    """Hyperband over the networks."""
    method = hyperband(SPACE, max_steps=486, min_steps=6, batch=64, cycles=2)
    return minimize(trainable(data), method, key=key, progress=progress)


def accuracy(result: Result, data: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of the examples that the winner, as it was trained in the study, gets right."""
    logits = model(result.best_hparams).apply({"params": result.best_state.params}, data[0])
    return float(np.mean(np.asarray(logits).argmax(-1) == data[1]))


def demo(seed: int = 0, path: str | Path = "report.html", progress: bool | None = None) -> float:
    """Runs the demo.

    Args:
      seed: of the split and of the study.
      path: where the report goes.
      progress: as in `minimize`.

    Returns:
      The test accuracy of the winner.
    """
    console, begun = Console(), time.perf_counter()
    data = digits(seed)
    console.print(
        f"Hyperband tunes MLPs on {len(data.train[0])} digits: {Space(SPACE).dims} hyperparameters, some conditional."
    )
    result = tune(data, jax.random.key(seed), progress)
    correct = accuracy(result, data.test)
    trials, seconds = len(np.unique(result.trials.id)), time.perf_counter() - begun
    winner = ", ".join(f"{name} {show(value)}" for name, value in result.best_hparams.items() if name != "optimizer")
    chosen = result.best_hparams["optimizer"]
    live = ", ".join(f"{name} {show(value)}" for name, value in chosen[chosen["choice"]].items())
    facts = {
        "winner": f"{winner}, {chosen['choice']} with {live}",
        "test accuracy": f"{correct:.2%} of {len(data.test[0])} digits that were never looked at",
        "networks": f"{trials} networks in {seconds:.0f} s, of which compiling took {result.compile_seconds:.0f} s",
        "device": f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    console.print(result.table())
    for name, fact in facts.items():
        console.print(f"[bold]{name}[/bold]: {fact}")
    written = result.report(path, title="jaxhpo: a Flax MLP on digits", facts=facts)
    console.print(f"[bold]report[/bold]: {written.absolute()}", soft_wrap=True)
    return correct
