"""A controller of the learning rate against constant rates and cosines, on runs that none of them has seen.

    python benchmarks/controller.py

An MLP of 64-64-64-10 (leaky ReLU) on scikit-learn's digits, gradient descent with momentum 0.9 on batches of 64,
rates from 0.001 to 10, of which the high ones diverge. The agent learns on keys of its own; the best of 100 constant
rates and of 100 pairs of peak and warm-up of a cosine are chosen by their mean loss on other keys (`--repeats` of
them). All train 20 networks with keys that are new to them, initialisation and batches, and are compared by the
validation loss at the end: the intervals are those of Student's t over the pairs.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypertuning import cosine, interval, split

import jaxhpo as hpo

RATE = {"low": 1e-3, "high": 10.0, "log": True}
SIZES = (64, 64, 64, 10)
SPACE = {"lr": hpo.Float(**RATE)}


def predict(params, x):
    for w, b in params[:-1]:
        x = jax.nn.leaky_relu(x @ w + b, 0.1)
    return x @ params[-1][0] + params[-1][1]


def cross_entropy(params, data):
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, data[0]), data[1]).mean()


def training(data):
    """Momentum on batches of 64; `h["lr"]` is the rate of now, or has those of all steps."""

    def init(key, h):
        keys = jax.random.split(key, len(SIZES) - 1)
        shapes = zip(keys, SIZES[:-1], SIZES[1:], strict=True)
        params = [(jax.random.normal(k, (a, b)) * np.sqrt(2 / a), jnp.zeros(b)) for k, a, b in shapes]
        return params, jax.tree.map(jnp.zeros_like, params), jnp.int32(0)

    def step(key, state, h):
        params, velocity, reached = state
        rows = jax.random.randint(key, (64,), 0, len(data.train[1]))
        slopes = jax.grad(cross_entropy)(params, jax.tree.map(lambda d: d[rows], data.train))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, slopes)
        lr = h["lr"] if h["lr"].ndim == 0 else h["lr"][reached]
        return jax.tree.map(lambda p, v: p - lr * v, params, velocity), velocity, reached + 1

    return hpo.Trainable(init, step, lambda state, h: cross_entropy(state[0], data.valid))


def best_of(objective, space, expand, options, seed):
    """The best of random points by the mean over some keys, and the seconds it takes."""
    begun = time.perf_counter()
    method = hpo.random(space, batch=options.trials)
    result = hpo.minimize(
        lambda key, h: objective(key, expand(h)),
        method,
        key=jax.random.key(seed),
        trials=options.trials,
        repeats=options.repeats,
        progress=False,
    )
    return result.best_hparams, time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--every", type=int, default=10, help="steps between two actions")
    parser.add_argument("--lanes", type=int, default=64, help="networks that the agent trains at once")
    parser.add_argument("--runs", type=int, default=250, help="that the agent learns from, in every lane")
    parser.add_argument("--trials", type=int, default=100, help="constants, and cosines")
    parser.add_argument("--repeats", type=int, default=4, help="keys by which those are chosen")
    parser.add_argument("--keys", type=int, default=20, help="unseen, to judge by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the split and the searches")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for seed in options.seeds:
        run(options, seed)


def run(options, seed):
    steps, every = options.steps, options.every
    trainable = training(split(seed, 800, 500))
    method = hpo.controller(SPACE, every=every, max_steps=steps, batch=options.lanes)
    begun = time.perf_counter()
    study = jax.jit(hpo.study(trainable, method, rounds=options.runs * steps // every))
    compiled = study.lower(jax.random.key(seed)).compile()
    middle = time.perf_counter()
    state, trace = jax.block_until_ready(compiled(jax.random.key(seed)))
    done = time.perf_counter()
    diverged = ~np.isfinite(trace.losses)
    ends = (np.asarray(trace.reached) == steps) & ~diverged
    parts = [x[on] for x, on in zip(*(np.array_split(a, 10) for a in (trace.losses, ends)), strict=True)]
    print(
        f"seed {seed}: the agent learned from {int(trace.trials.id.max()) + 1} runs in {done - middle:.0f} s "
        f"(compiling {middle - begun:.0f} s); {diverged.mean():.1%} of the stretches diverged, "
        f"{diverged[-steps:].mean():.1%} of the last"
    )
    print("  their median loss at the end:", " ".join(f"{np.median(x):.3f}" for x in parts if x.size))

    objective = hpo.unroll(trainable, steps)
    pair = {"peak": hpo.Float(**RATE), "warm_up": hpo.Float(0.0, 0.5)}
    constant, by_constant = best_of(objective, SPACE, lambda h: h, options, seed)
    annealed, by_cosine = best_of(objective, pair, lambda h: {"lr": cosine(h, steps)}, options, seed)
    keys = jax.random.split(jax.random.key(10_000 + seed), options.keys)
    judge = jax.jit(jax.vmap(objective, (0, None)))
    learned, schedules = jax.jit(
        jax.vmap(hpo.controlled(trainable, SPACE, state.policy, every=every, max_steps=steps))
    )(keys)
    found = {
        f"the best constant of {options.trials}": judge(keys, {"lr": jnp.float32(constant["lr"])}),
        f"the best cosine of {options.trials}": judge(keys, {"lr": jnp.float32(cosine(annealed, steps))}),
    }
    learned = np.asarray(learned, float)
    print(f"  chosen: {constant}, {annealed} in {by_constant:.0f} s and {by_cosine:.0f} s")
    print("  learned rates, median:", " ".join(f"{x:.3g}" for x in np.median(schedules["lr"], 0)))
    print("| | validation loss | lower by, 95% interval |\n|---|---|---|")
    print(f"| the learned policy | {learned.mean():.4f} | |")
    for name, losses in found.items():
        print(f"| {name} | {losses.mean():.4f} | {interval(np.asarray(losses, float) - learned)} |", flush=True)


if __name__ == "__main__":
    main()
