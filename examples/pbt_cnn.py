"""Population-based training of a small CNN: the result is a network, and the schedule that trained it.

pip install "jaxhpo[demo]"
python examples/pbt_cnn.py

Networks train side by side on scikit-learn's digits. Every few steps the worst of them copy the weights of the best,
and vary the learning rate, momentum, weight decay and dropout that came with them.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhpo as hpo

space = {
    "lr": hpo.Float(1e-3, 1.0, log=True),
    "friction": hpo.Float(0.02, 1.0, log=True),  # 1 - momentum
    "decay": hpo.Float(1e-6, 1e-2, log=True),
    "dropout": hpo.Float(0.0, 0.5),
}


def model(h):
    return hpo.CNN(10, max_channels=8, dropout=h["dropout"])


def optimizer(h):
    return optax.chain(optax.add_decayed_weights(h["decay"]), optax.sgd(h["lr"], momentum=1 - h["friction"]))


class Outcome(NamedTuple):
    """What came of it."""

    accuracy: float
    schedule: hpo.Schedule
    retrained: float
    """median accuracy of other networks trained by the schedule"""


def split():
    """The images of the digits as (train, valid, test), each inputs and labels."""
    images, y = load_digits(return_X_y=True)
    x = (images / 16).astype("float32").reshape(-1, 8, 8)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    return (x, y), (x_valid, y_valid), (x_test, y_test)


def accuracy(state, data):
    """Of a network on some images."""
    logits = model({"dropout": 0.0}).apply({"params": state.params}, data[0])
    return jnp.mean(logits.argmax(-1) == data[1])


def main(argv=None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--every", type=int, default=40, help="training steps between two exploits")
    parser.add_argument("--steps", type=int, default=800, help="training steps of a network")
    options = parser.parse_args(argv)

    train, valid, test = split()
    trainable = hpo.flax_trainable(
        model=model,
        optimizer=optimizer,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=train,
        valid=valid,
        batch_size=32,
    )
    method = hpo.pbt(space, population=options.population, every=options.every, max_steps=options.steps)
    result = hpo.minimize(trainable, method, key=jax.random.key(0))

    schedule = result.best_schedule()
    keys = jax.random.split(jax.random.key(1), 5)
    fresh = jax.vmap(lambda key: accuracy(hpo.replay(trainable, schedule, key).state, test))(keys)
    outcome = Outcome(float(accuracy(result.best_state, test)), schedule, float(jnp.median(fresh)))
    print(schedule.table())
    print(f"validation loss {result.best_loss:.4f}, test accuracy {outcome.accuracy:.4f}")
    print(f"five other networks, trained by the same schedule: median test accuracy {outcome.retrained:.4f}")
    return outcome


if __name__ == "__main__":
    main()
