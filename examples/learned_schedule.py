"""An agent that learns to set the learning rate while networks train.

pip install "jaxhpo[demo]"
python examples/learned_schedule.py

Every lane trains an MLP on digits. The agent watches the validation losses and sets the rate of the next steps; runs
whose rate was too high diverge and start afresh. What it has learned is a policy: saved, read back, and used on a task
that it has not seen, a wider network on other digits, against the rates that are best when they stay as they are.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhpo as hpo

SPACE = {"lr": hpo.Float(1e-3, 10.0, log=True)}


def cross_entropy(params, data):
    a, b, c = params
    logits = jax.nn.leaky_relu(jax.nn.leaky_relu(data[0] @ a, 0.1) @ b, 0.1) @ c
    return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()


def training(train, valid, width):
    """Momentum on batches of 64 digits."""
    train, shapes = jax.tree.map(jnp.asarray, train), ((64, width), (width, width), (width, 10))

    def init(key, h):
        params = [jax.random.normal(k, s) * np.sqrt(2 / s[0]) for k, s in zip(jax.random.split(key, 3), shapes)]  # noqa: B905
        return params, jax.tree.map(jnp.zeros_like, params)

    def step(key, state, h):
        params, velocity = state
        rows = jax.random.randint(key, (64,), 0, len(train[1]))
        gradient = jax.grad(cross_entropy)(params, (train[0][rows], train[1][rows]))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        return jax.tree.map(lambda p, v: p - h["lr"] * v, params, velocity), velocity

    return hpo.Trainable(init, step, lambda state, h: cross_entropy(state[0], valid))


class Outcome(NamedTuple):
    """Mean validation losses on the new task at the end of training, and the rates that the policy sets."""

    learned: float
    constant: float
    rates: np.ndarray


def main(arguments: list[str] | None = None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=64, help="networks that train side by side")
    parser.add_argument("--runs", type=int, default=150, help="that the agent learns from, in every lane")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--every", type=int, default=10, help="steps between two actions")
    parser.add_argument("--out", default="learned_schedule.msgpack", help="file for the policy")
    options = parser.parse_args(arguments)
    lengths = {"every": options.every, "max_steps": options.steps}

    x, y = load_digits(return_X_y=True)
    x, other_x, y, other_y = train_test_split((x / 16).astype("float32"), y, test_size=0.5, stratify=y, random_state=0)
    digits, others = ((d[0][:600], d[1][:600], d[0][600:], d[1][600:]) for d in ((x, y), (other_x, other_y)))

    method = hpo.controller(SPACE, **lengths, batch=options.lanes)
    study = hpo.study(
        training(digits[:2], digits[2:], 64), method, rounds=options.runs * options.steps // options.every
    )
    state, trace = jax.jit(study)(jax.random.key(0))
    Path(options.out).write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(state.policy)))
    print(
        f"{int(trace.trials.id.max()) + 1} runs, {np.mean(~np.isfinite(trace.losses)):.1%} of their stretches diverged"
    )

    policy = serialization.msgpack_restore(Path(options.out).read_bytes())
    task, keys = training(others[:2], others[2:], 96), jax.random.split(jax.random.key(1), 20)
    losses, schedules = jax.jit(jax.vmap(hpo.controlled(task, SPACE, policy, **lengths)))(keys)
    rates = np.median(schedules["lr"], axis=0)

    constants = {"lr": jnp.geomspace(1e-3, 1.0, 16)}
    of_rate = jax.vmap(jax.vmap(hpo.unroll(task, options.steps), (0, None)), (None, 0))
    constant = np.nan_to_num(np.asarray(jax.jit(of_rate)(keys, constants).mean(1)), nan=np.inf)
    print(f"best of 16 constant rates, {constants['lr'][constant.argmin()]:.3g}: validation loss {constant.min():.4f}")
    print(f"the learned policy: validation loss {losses.mean():.4f}")
    print("rates:", " ".join(f"{lr:.3g}" for lr in rates))
    return Outcome(float(losses.mean()), float(constant.min()), rates)


if __name__ == "__main__":
    main()
