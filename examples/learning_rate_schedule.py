"""A learning rate for every step of training, tuned by gradients through all of them.

pip install "jaxhpo[demo]"
python examples/learning_rate_schedule.py

Random search finds the best constant rate for a short training. From there descent along the hypergradient moves the
rate of each step; every training has a key of its own, so what is learned is good for any initialisation and order of
the data. Both schedules then train networks with other keys, compared on digits that were not seen before.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhpo as hpo

ADAM = optax.scale_by_adam(eps_root=1e-8)  # without eps_root its derivative is infinite where a gradient is 0


def init(key, h):
    a, b = jax.random.split(key)
    params = {"a": jax.random.normal(a, (64, 64)) / 8, "b": jax.random.normal(b, (64, 10)) / 8}
    return params, ADAM.init(params), jnp.int32(0)


def cross_entropy(params, data):
    logits = jnp.tanh(data[0] @ params["a"]) @ params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()


def training(train, valid):
    """Adam on minibatches of 64 digits."""
    train = jax.tree.map(jnp.asarray, train)

    def step(key, state, h):
        params, adam, reached = state
        rows = jax.random.choice(key, len(train[1]), (64,), replace=False)
        gradient = jax.grad(cross_entropy)(params, (train[0][rows], train[1][rows]))
        updates, adam = ADAM.update(gradient, adam)
        return jax.tree.map(lambda p, u: p - h["lr"][reached] * u, params, updates), adam, reached + 1

    return hpo.Trainable(init, step, lambda state, h: cross_entropy(state[0], valid))


def smooth(width):
    """Gradients as weighted means over neighbouring steps: noise is averaged, a trend is not."""

    def update(gradient, params):
        del params
        t = jnp.arange(gradient.size)
        kernel = jnp.exp(-(((t[:, None] - t) / width) ** 2) / 2)
        return kernel @ gradient / kernel.sum(1)

    return optax.stateless(update)


class Outcome(NamedTuple):
    """Test cross-entropy of networks trained with other keys, and the rates by which."""

    constant: float
    tuned: float
    rates: np.ndarray


def main(arguments: list[str] | None = None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="of random search")
    parser.add_argument("--rounds", type=int, default=65, help="steps of descent")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    options = parser.parse_args(arguments)

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split((x / 16).astype("float32"), y, test_size=0.3, stratify=y, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.4, stratify=y, random_state=0)
    objective = hpo.unroll(training((x, y), (x_valid, y_valid)), options.steps)

    constant = hpo.minimize(
        lambda key, h: objective(key, {"lr": jnp.full(options.steps, h["lr"])}),
        hpo.random({"lr": hpo.Float(1e-4, 0.1, log=True)}, batch=options.trials),
        key=jax.random.key(0),
        trials=options.trials,
    )
    space = {"lr": hpo.Array(options.steps, 1e-4, 0.1, log=True)}
    rate = optax.linear_schedule(0.25, 0, options.rounds)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), smooth(options.steps / 20), optax.adam(rate, 0.9, 0.95))
    method = hpo.gradient(space, optimizer, starts=1)
    start = {"lr": constant.best_hparams["lr"]}
    tuned = hpo.minimize(objective, method, key=jax.random.key(1), rounds=options.rounds, initial=[start])
    rates = tuned.trials.hparams["lr"][-1]

    judged = jax.vmap(hpo.unroll(training((x, y), (x_test, y_test)), options.steps), (0, None))
    keys = jax.random.split(jax.random.key(2), 20)
    test = jax.jit(lambda lr: judged(keys, {"lr": lr}).mean())
    losses = [float(test(jnp.broadcast_to(jnp.float32(lr), options.steps))) for lr in (start["lr"], rates)]
    print(f"constant rate {start['lr']:.3g}: test cross-entropy {losses[0]:.4f}")
    print(f"a rate for each step: test cross-entropy {losses[1]:.4f}")
    print("rates:", " ".join(f"{lr:.3f}" for lr in rates))
    return Outcome(*losses, rates)


if __name__ == "__main__":
    main()
