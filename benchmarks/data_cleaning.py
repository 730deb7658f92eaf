"""Data cleaning (Franceschi et al. 2017, section 5.1): a weight for each training example, tuned through training.

    python benchmarks/data_cleaning.py --data digits,mnist

Half of the training labels are moved to another class; 100 examples are clean. Softmax regression is trained on the
weighted examples, equally much of every label, and the loss on the clean ones is descended by the gradient through
all of its steps, in all the weights at once. Its score is the area under the ROC curve of the weights as a test for
labels that were not moved. Then of every label the half with the higher weights is kept, and trained on together with
the clean examples.

Beside it: training on the clean examples alone, on all (moved labels too) and the clean ones, and on those whose labels
were not moved and the clean ones. Decay and steps of all four are chosen by 4-fold cross-validation over the clean
examples; "favoured" are those best on the test set, which nobody can choose.
"""

import argparse
import functools
import gzip
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import jaxhpo as hpo

SHARED = Path(__file__).parents[2] / "shared" / "data"
CLEAN, FOLDS = 100, 4
RATE, STEPS = 0.3, 60
DECAY = {"digits": 0.01, "mnist": 0.03}  # chosen on other splits, by the area under the curve
DECAYS, LENGTHS = (3e-2, 1e-2, 3e-3, 1e-3, 1e-4), (30, 60, 200)
OUTER, STRIDE = 40, 0.2


class Split(NamedTuple):
    """Training examples of which half have another label, clean ones, and those of the test."""

    x: np.ndarray
    y: np.ndarray
    moved: np.ndarray
    clean: tuple
    test: tuple


def images(data, folder):
    """Rows of pixels with a constant one, labels, and how many to train on."""
    if data == "digits":
        x, y = load_digits(return_X_y=True)
        return np.c_[x / 16, np.ones(len(x))].astype(np.float32), y.astype(np.int32), 1200
    read = lambda name, skip: np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=skip)  # noqa: E731
    y = read("t10k-labels-idx1-ubyte.gz", 8).astype(np.int32)
    x = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(y), -1)
    return np.c_[x / 255, np.ones(len(x))].astype(np.float32), y, 3000


def split(data, seed, folder=SHARED):
    """A random split, half of its training labels moved to any of the other classes."""
    x, y, n = images(data, folder)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x, y = x[order], y[order]
    moved = np.zeros(n, bool)
    moved[rng.permutation(n)[: n // 2]] = True
    labels = np.where(moved, (y[:n] + rng.integers(1, 10, n)) % 10, y[:n])
    clean = slice(n, n + CLEAN)
    return Split(x[:n], labels, moved, (x[clean], y[clean]), (x[n + CLEAN :], y[n + CLEAN :]))


def cross_entropy(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, y)


def evened(weights, y):
    """The weights as shares of the loss, with as much of every label."""
    is_label = jax.nn.one_hot(y, 10)
    return weights / jnp.maximum(is_label @ (weights @ is_label), 1e-6) / 10


def regression(x, y, clean, decay):
    """Softmax regression by full-batch descent with momentum, each example with a weight of its own."""

    def loss(w, h):
        return evened(h["weights"], y) @ cross_entropy(w, x, y) + decay * (w**2).sum()

    def init(key, h):
        return {"w": jnp.zeros((x.shape[1], 10)), "velocity": jnp.zeros((x.shape[1], 10))}

    def step(key, s, h):
        velocity = 0.9 * s["velocity"] - RATE * jax.grad(loss)(s["w"], h)
        return {"w": s["w"] + velocity, "velocity": velocity}

    return hpo.Trainable(init, step, lambda s, h: cross_entropy(s["w"], *clean).mean())


def find(s, decay, outer):
    """The weights after some steps of descent."""
    n = len(s.y)
    objective = hpo.unroll(regression(*map(jnp.asarray, s[:2]), s.clean, decay), STEPS)
    # Every step is equally long, but goes far only in the weights of which much depends.
    optimizer = optax.chain(optax.normalize_by_update_norm(STRIDE * np.sqrt(n)), optax.scale(-1.0))
    method = hpo.gradient({"weights": hpo.Array(n, 0.0, 1.0)}, optimizer, starts=1, patience=1e6)
    begin = [{"weights": np.full(n, 0.5)}]
    result = hpo.minimize(objective, method, key=jax.random.key(0), trials=outer, initial=begin, progress=False)
    return np.asarray(result.trials.hparams["weights"][-1]), result.best_loss


@functools.partial(jax.jit, static_argnames="steps")
def trained(x, y, weights, decay, steps):
    """The parameters, as in `regression`."""
    trainable, h = regression(x, y, (x, y), decay), {"weights": weights}
    state = jax.lax.fori_loop(0, steps, lambda i, s: trainable.step(None, s, h), trainable.init(None, h))
    return state["w"]


def judge(s, weights):
    """Test accuracy after training on weighted examples and the clean ones: as chosen on these, and favoured."""
    x, y = np.concatenate([s.x, s.clean[0]]), np.concatenate([s.y, s.clean[1]])
    fold = np.arange(CLEAN) % FOLDS
    right = lambda w, x, y: ((x @ w).argmax(1) == y).mean()  # noqa: E731
    chosen, test = [], []
    for steps in LENGTHS:
        for decay in DECAYS:
            run = functools.partial(trained, x, y, decay=decay, steps=steps)
            held = 0.0
            for k in range(FOLDS):
                w = np.asarray(run(np.concatenate([weights, fold != k]).astype(np.float32)))
                held += right(w, s.clean[0][fold == k], s.clean[1][fold == k]) / FOLDS
            chosen.append(held)
            test.append(right(np.asarray(run(np.concatenate([weights, np.ones(CLEAN)]).astype(np.float32))), *s.test))
    return test[int(np.argmax(chosen))], max(test)


def kept(s, weights):
    """Of every label the half with the higher weights."""
    middle = np.array([np.median(weights[s.y == label]) for label in range(10)])
    return weights > middle[s.y]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--folder", type=Path, default=SHARED, help="where the images of MNIST are")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="seed of the first split")
    parser.add_argument("--outer", type=int, default=OUTER, help="steps of the descent")
    options = parser.parse_args()
    for data in options.data.split(","):
        if data == "mnist" and not options.folder.exists():
            print(f"no MNIST in {options.folder}")
            continue
        rows = []
        for seed in range(options.first, options.first + options.splits):
            s, begun = split(data, seed, options.folder), time.perf_counter()
            weights, loss = find(s, DECAY[data], options.outer)
            took, auc = time.perf_counter() - begun, roc_auc_score(~s.moved, weights)
            which = (np.zeros(len(s.y)), np.ones(len(s.y)), ~s.moved, kept(s, weights))
            precision = (~s.moved)[which[-1]].mean()
            rows.append([auc, precision, *np.ravel([judge(s, w) for w in which])])
            print(f"{data} split {seed}: {took:.0f} s, loss {loss:.3f},", *np.round(rows[-1], 4), flush=True)
        mean = np.mean(rows, axis=0)
        print(
            f"{data}, mean of {len(rows)}: AUROC {mean[0]:.4f}, share of labels kept that were not moved {mean[1]:.4f}"
        )
        print("| trained on clean examples and | test accuracy | favoured |\n|---|---|---|")
        for name, own, best in zip(
            ("nothing", "all", "those not moved", "those found"), mean[2::2], mean[3::2], strict=True
        ):
            print(f"| {name} | {own:.4f} | {best:.4f} |")


if __name__ == "__main__":
    main()
