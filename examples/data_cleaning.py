"""Find wrong labels: half of those of the digits are moved, and a weight for each example is tuned through training.

pip install "jaxhpo[demo]"
python examples/data_cleaning.py

A hundred examples with right labels are enough: how much each of the others helps to predict these is the gradient of
their loss, through all the steps of training, by the weights. Franceschi et al. (2017), Forward and reverse
gradient-based hyperparameter optimization.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import jaxhpo as hpo


class Outcome(NamedTuple):
    auroc: float
    """of the weights, as a test for labels that are right"""
    clean: float
    """test accuracy after training on the clean examples alone"""
    noisy: float
    """on them and all others"""
    found: float
    """on them and those found"""


def cross_entropy(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, y)


def regression(train, valid, decay):
    """Softmax regression on weighted examples, with as much of every label."""
    x, y = train
    is_label = jax.nn.one_hot(y, 10)

    def loss(w, h):
        of_label = is_label @ (h["weights"] @ is_label)
        return (h["weights"] / jnp.maximum(of_label, 1e-6) / 10) @ cross_entropy(w, x, y) + decay * (w**2).sum()

    def init(key, h):
        return jnp.zeros((65, 10)), jnp.zeros((65, 10))

    def step(key, state, h):
        w, velocity = state
        velocity = 0.9 * velocity - 0.3 * jax.grad(loss)(w, h)
        return w + velocity, velocity

    return hpo.Trainable(init, step, lambda state, h: cross_entropy(state[0], *valid).mean())


def main(argv: list[str] | None = None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1200, help="training examples, at most 1400")
    parser.add_argument("--rounds", type=int, default=40, help="gradients of all weights")
    parser.add_argument("--steps", type=int, default=60, help="training steps behind each")
    options = parser.parse_args(argv)
    n, rng = options.examples, np.random.default_rng(0)

    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, y = np.c_[x / 16, np.ones(len(x))].astype(np.float32)[order], y[order]
    train, valid, test = slice(0, n), slice(n, n + 100), slice(n + 100, None)
    is_moved = rng.permutation(n) < n // 2
    labels = np.where(is_moved, (y[train] + rng.integers(1, 10, n)) % 10, y[train])

    objective = hpo.unroll(regression((x[train], labels), (x[valid], y[valid]), 0.01), options.steps)
    # Steps of one length: a weight goes far if much depends on it.
    optimizer = optax.chain(optax.normalize_by_update_norm(0.2 * np.sqrt(n)), optax.scale(-1.0))
    method = hpo.gradient({"weights": hpo.Array(n, 0.0, 1.0)}, optimizer, starts=1)
    even = [{"weights": np.full(n, 0.5)}]
    result = hpo.minimize(objective, method, key=jax.random.key(0), trials=options.rounds, initial=even)
    weights = result.trials.hparams["weights"][-1]

    middle = np.array([np.median(weights[labels == label]) for label in range(10)])
    is_found = weights > middle[labels]
    both = np.concatenate([x[train], x[valid]]), np.concatenate([labels, y[valid]])
    trained = regression(both, (x[valid], y[valid]), 0.003)

    @jax.jit
    def accuracy(kept):
        h = {"weights": jnp.concatenate([kept, jnp.ones(100)])}
        w, _ = jax.lax.fori_loop(0, 100, lambda i, s: trained.step(None, s, h), trained.init(None, h))
        return ((x[test] @ w).argmax(1) == y[test]).mean()

    kept = (np.zeros(n), np.ones(n), is_found)
    outcome = Outcome(
        float(roc_auc_score(~is_moved, weights)), *(float(accuracy(jnp.asarray(k, jnp.float32))) for k in kept)
    )
    print(f"{n} weights: area under the ROC curve {outcome.auroc:.4f}")
    print(f"{(~is_moved)[is_found].mean():.1%} of the {is_found.sum()} labels kept are right")
    print(f"test accuracy {outcome.clean:.4f} by 100 clean examples, {outcome.noisy:.4f} with all others,", end=" ")
    print(f"{outcome.found:.4f} with those found")
    return outcome


if __name__ == "__main__":
    main()
