"""A weight decay for every weight of a network: 4,810 hyperparameters, tuned by gradients through training.

pip install "jaxhpo[demo]"
python examples/per_parameter_decay.py

A network trains on few digits and is judged on others. Random search finds the best single weight decay; from there
descent along the hypergradient moves a decay for each weight and bias on its own. Both are then trained again with
other keys and compared on digits that neither has seen.
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

WIDTH = 64


def init(key, h):
    a, c = jax.random.split(key)
    params = {
        "a": jax.random.normal(a, (64, WIDTH)) / 8,
        "b": jnp.zeros(WIDTH),
        "c": jax.random.normal(c, (WIDTH, 10)) / 8,
        "d": jnp.zeros(10),
    }
    return params, jax.tree.map(jnp.zeros_like, params)


def predict(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"] + params["d"]


def cross_entropy(params, data):
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, data[0]), data[1]).mean()


def training(train, valid):
    """Gradient descent with momentum on the whole training set."""

    def loss(params, decay):
        penalties = jax.tree.map(lambda d, p: jnp.sum(d * p**2) / 2, decay, params)
        return cross_entropy(params, train) + sum(jax.tree.leaves(penalties))

    def step(key, state, h):
        params, velocity = state
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, jax.grad(loss)(params, h["decay"]))
        return jax.tree.map(lambda p, v: p - 0.3 * v, params, velocity), velocity

    return hpo.Trainable(init, step, lambda state, h: cross_entropy(state[0], valid))


class Outcome(NamedTuple):
    """Test cross-entropy of networks trained with other keys, and the decays by which."""

    single: float
    each: float
    decay: dict


def main(arguments: list[str] | None = None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="of random search")
    parser.add_argument("--rounds", type=int, default=50, help="steps of descent")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    options = parser.parse_args(arguments)

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split((x / 16).astype("float32"), y, train_size=900, stratify=y, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, train_size=200, stratify=y, random_state=0)
    objective = hpo.unroll(training((x, y), (x_valid, y_valid)), options.steps)

    shapes, _ = jax.eval_shape(init, jax.random.key(0), None)
    everywhere = lambda decay: {"decay": jax.tree.map(lambda _: decay, shapes)}  # noqa: E731
    bounds = {"low": 1e-5, "high": 1.0, "log": True}
    single = hpo.minimize(
        lambda key, h: objective(key, everywhere(h["decay"])),
        hpo.random({"decay": hpo.Float(**bounds)}, batch=options.trials),
        key=jax.random.key(0),
        trials=options.trials,
    )
    start = everywhere(single.best_hparams["decay"])

    space = {"decay": hpo.Array.like(shapes, **bounds)}
    method = hpo.gradient(space, optax.adam(0.2), starts=1)
    each = hpo.minimize(objective, method, key=jax.random.key(1), rounds=options.rounds, initial=[start])

    judged = jax.vmap(hpo.unroll(training((x, y), (x_test, y_test)), options.steps), (0, None))
    keys = jax.random.split(jax.random.key(2), 10)
    test = jax.jit(lambda h: judged(keys, h).mean())
    losses = [float(test(jax.tree.map(jnp.float32, h))) for h in (start, each.best_hparams)]
    decay = each.best_hparams["decay"]
    print(f"one decay of {start['decay']['a']:.2g}: test cross-entropy {losses[0]:.4f}")
    print(f"{each.space.dims} decays: test cross-entropy {losses[1]:.4f}; by pixel, as a median over hidden units:")
    print(np.array2string(np.log10(np.median(decay["a"], axis=1)).reshape(8, 8), precision=1, suppress_small=True))
    return Outcome(*losses, decay)


if __name__ == "__main__":
    main()
