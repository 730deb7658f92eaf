"""A swarm in which every particle is a Flax network in training: all of them, all rounds, one compiled program.

pip install "jaxhpo[demo]"
python examples/pso_flax.py --out swarm.png

The particles move in the plane of the learning rate and the momentum of SGD, and are drawn to the networks that had the
lowest validation loss so far. The picture shows them round by round, over the losses of a grid of networks.
"""

import argparse
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhpo as hpo

space = {
    "lr": hpo.Float(1e-3, 10.0, log=True),
    "friction": hpo.Float(0.01, 1.0, log=True),  # 1 - momentum
}


def model(h):
    return nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(10)])


def optimizer(h):
    return optax.sgd(h["lr"], momentum=1 - h["friction"])


class Compiles:
    """Counts the programs that XLA compiles for whole chunks of a study."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, seconds, fun_name="", **_):
        self.count += event.endswith("backend_compile_duration") and fun_name == "jit(run)"


class Outcome(NamedTuple):
    """What came of it."""

    accuracy: float
    compiles: int
    networks: int


def split():
    """The digits as (train, valid, test), each inputs and labels."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split((x / 16).astype("float32"), y, test_size=0.2, stratify=y, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    return (x, y), (x_valid, y_valid), (x_test, y_test)


def accuracy(trainable, key, hparams, steps, test):
    """Of one more network with these hyperparameters."""
    step = lambda i, state: trainable.step(jax.random.fold_in(key, i), state, hparams)  # noqa: E731
    state = jax.lax.fori_loop(1, steps + 1, step, trainable.init(key, hparams))
    logits = model(hparams).apply({"params": state.params}, test[0])
    return float(jnp.mean(logits.argmax(-1) == test[1]))


def draw(swarm, particles, landscape, out):
    """The positions of all particles in six rounds, and where they came from."""
    lr, friction, loss = (np.asarray(column).reshape(-1, particles) for column in (*columns(swarm), swarm.trials.loss))
    rounds = np.unique(np.linspace(0, (len(lr) - 1) ** 0.6, 6).round(3) ** (1 / 0.6)).round().astype(int)
    figure = Figure(figsize=(9.2, 5.8), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    levels = np.geomspace(0.1, 4, 14)
    side = 0 if landscape is None else int(len(landscape.trials.id) ** 0.5)
    for axis, round in zip(axes.flat, rounds, strict=False):
        if landscape is not None:
            order = np.lexsort(columns(landscape))
            below = [column[order].reshape(side, side) for column in (*columns(landscape), landscape.trials.loss)]
            below[2] = np.clip(np.nan_to_num(below[2], nan=9.0, posinf=9.0), levels[0], levels[-1])
            shown = axis.contourf(
                np.log10(below[0]), np.log10(below[1]), below[2], levels, norm=LogNorm(), cmap="bone", extend="both"
            )
        x, y = np.log10(lr), np.log10(friction)
        for back in range(min(round, 2)):
            at = slice(round - back - 1, round - back + 1)
            axis.plot(x[at], y[at], color="#e8730c", linewidth=1.0, alpha=0.6 - 0.35 * back, solid_capstyle="round")
        axis.scatter(x[round], y[round], s=26, color="#e8730c", edgecolor="white", linewidth=0.7, zorder=3)
        best = np.unravel_index(np.nanargmin(loss[: round + 1]), loss[: round + 1].shape)
        axis.scatter(x[best], y[best], s=150, marker="*", color="#2375d6", edgecolor="white", linewidth=0.8, zorder=4)
        axis.set_title(f"round {round + 1}: best loss {loss[best]:.3f}", fontsize=10, loc="left")
        axis.set_xticks([-3, -2, -1, 0, 1], ["0.001", "0.01", "0.1", "1", "10"])
        axis.set_yticks([-2, -1, 0], ["0.99", "0.9", "0"])
        axis.set_xlim(-3, 1)
        axis.set_ylim(-2, 0)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    for axis in axes[:, 0]:
        axis.set_ylabel("momentum")
    if landscape is not None:
        bar = figure.colorbar(shown, ax=axes, label="validation loss", ticks=[0.1, 0.2, 0.5, 1, 2, 4], pad=0.01)
        bar.ax.set_yticklabels(["0.1", "0.2", "0.5", "1", "2", "4"])
        bar.ax.minorticks_off()
    figure.savefig(out, dpi=100, pil_kwargs={"optimize": True})


def columns(result):
    return np.asarray(result.trials.hparams["lr"]), np.asarray(result.trials.hparams["friction"])


def main(argv=None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120, help="training steps of a network")
    parser.add_argument("--grid", type=int, default=20, help="networks a side in the background; 0 for none")
    parser.add_argument("--out", default="swarm.png", help="where the picture goes")
    options = parser.parse_args(argv)

    train, valid, test = split()
    trainable = hpo.flax_trainable(
        model=model,
        optimizer=optimizer,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=train,
        valid=valid,
        batch_size=64,
    )
    objective = hpo.unroll(trainable, steps=options.steps)

    compiles = Compiles()
    method = hpo.particle_swarm(space, particles=options.particles, batch=options.particles)
    result = hpo.minimize(objective, method, key=jax.random.key(0), rounds=options.rounds)
    outcome = Outcome(
        accuracy(trainable, jax.random.key(1), result.best_hparams, options.steps, test),
        compiles.count,
        len(result.trials.id),
    )

    landscape = None
    if options.grid:
        method = hpo.grid(space, points=options.grid, batch=options.grid)
        landscape = hpo.minimize(objective, method, key=jax.random.key(2))
    draw(result, options.particles, landscape, options.out)
    print(result.table())
    print(f"{outcome.networks} networks trained by {outcome.compiles} compiled program; the swarm is in {options.out}")
    print(f"test accuracy {outcome.accuracy:.4f} with {result.best_hparams}")
    return outcome


if __name__ == "__main__":
    main()
