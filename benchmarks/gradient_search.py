"""Descent against search: three continuous hyperparameters of training, by what each way of looking costs.

    python benchmarks/gradient_search.py

Softmax regression, or an MLP of one hidden layer, on 300 of scikit-learn's digits: full-batch descent with momentum
from fixed initial parameters, 100 steps; learning rate, 1 - momentum and weight decay by the cross-entropy of a
validation set. TPE has 200 trials; its lowest loss is what descent has to reach. A trial of TPE costs 1, one of descent
the measured time of its value and gradient over that of plain training, in 8 lanes or in 1, the larger of the two.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo as hpo
from jaxhpo.demo import digits

SPACE = {
    "lr": hpo.Float(1e-3, 3.0, log=True),
    "friction": hpo.Float(0.01, 1.0, log=True),  # 1 - momentum
    "decay": hpo.Float(1e-6, 1e-1, log=True),
}
STEPS, TRIALS, STARTS = 100, 200, 8
TRUST, FAST = hpo.trust_region(), optax.adam(0.5)
METHODS = {
    "adam(0.5)": lambda: hpo.gradient(SPACE, FAST, STARTS),
    "adam(0.5), halving=1": lambda: hpo.gradient(SPACE, FAST, STARTS, halving=1),
    "trust_region": lambda: hpo.gradient(SPACE, TRUST, STARTS),
    "trust_region, halving=1": lambda: hpo.gradient(SPACE, TRUST, STARTS, halving=1),
    "trust_region, halving=2": lambda: hpo.gradient(SPACE, TRUST, STARTS, halving=2),
}


def training(hidden, rows):
    """Full-batch descent with momentum; softmax regression where `hidden` is 0."""
    data = digits(0)
    train = tuple(jnp.asarray(d[:rows]) for d in data.train)
    valid = tuple(map(jnp.asarray, data.valid))
    sizes = (64, hidden, 10) if hidden else (64, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    first = [
        (jax.random.normal(k, (n, m)) / np.sqrt(n) * (hidden > 0), jnp.zeros(m))
        for k, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]

    def cross_entropy(params, data):
        x = data[0]
        for a, b in params[:-1]:
            x = jax.nn.tanh(x @ a + b)
        a, b = params[-1]
        return optax.softmax_cross_entropy_with_integer_labels(x @ a + b, data[1]).mean()

    def step(key, s, h):
        params, velocity = s
        slopes = jax.grad(cross_entropy)(params, train)
        velocity = jax.tree.map(lambda v, g, p: (1 - h["friction"]) * v + g + h["decay"] * p, velocity, slopes, params)
        return jax.tree.map(lambda p, v: p - h["lr"] * v, params, velocity), velocity

    init = lambda key, h: (first, jax.tree.map(jnp.zeros_like, first))  # noqa: E731
    return hpo.Trainable(init, step, lambda s, h: cross_entropy(s[0], valid))


def multiples(trainable, lanes, repeats=9):
    """Value and gradient over plain training by adjoint, in as many lanes: medians of runs in turn."""
    space = hpo.Space(SPACE)
    h, key = space.decode(jnp.full((lanes, 3), 0.5)), jax.random.key(0)
    took = {}
    runs = {"plain": hpo.unroll(trainable, STEPS)}
    runs |= {n: jax.value_and_grad(hpo.unroll(trainable, STEPS, a), 1) for n, a in ADJOINTS.items()}
    compiled = {n: jax.jit(jax.vmap(r, (None, 0))).lower(key, h).compile() for n, r in runs.items()}
    for turn in range(repeats + 1):
        for name, run in compiled.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(key, h))
            if turn:
                took.setdefault(name, []).append(time.perf_counter() - begun)
    plain = statistics.median(took.pop("plain"))
    return plain, {n: statistics.median(t) / plain for n, t in took.items()}


ADJOINTS = {"Reverse": hpo.Reverse(), "Forward": hpo.Forward()}


def curve(losses, active):
    """The lowest loss so far, by trials: float[trials]."""
    losses = np.where(active, losses, np.inf).ravel()[np.asarray(active).ravel()]
    return np.minimum.accumulate(np.where(np.isfinite(losses), losses, np.inf))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=0)
    parser.add_argument("--rows", type=int, default=300, help="training examples, at most 1077")
    parser.add_argument("--adjoint", default="", help="Reverse or Forward; the cheaper one in 8 lanes if not given")
    parser.add_argument("--multiple", type=float, default=0.0, help="measured now if not given")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    trainable = training(options.hidden, options.rows)
    cost, adjoint = options.multiple, options.adjoint or "Reverse"
    if not cost:
        for lanes in (8, 1):
            plain, times = multiples(trainable, lanes)
            print(f"{lanes} lanes: plain training {plain * 1e3:.1f} ms,", {n: f"{t:.2f}x" for n, t in times.items()})
            best = options.adjoint or min(times, key=times.get)
            adjoint, cost = (best, times[best]) if lanes == 8 else (adjoint, max(cost, times[adjoint]))
    print(f"{adjoint} counts {cost:.2f} trainings: {TRIALS / 2 / cost:.0f} for half of {TRIALS}", flush=True)
    plain, unrolled = hpo.unroll(trainable, STEPS), hpo.unroll(trainable, STEPS, ADJOINTS[adjoint])
    keys = [jax.random.key(seed) for seed in range(options.seeds)]
    aims = {}
    for batch in (8, 1):
        run = jax.jit(hpo.study(plain, hpo.tpe(SPACE, batch=batch), rounds=TRIALS // batch))
        curves = np.array([curve(t.losses, t.trials.active) for t in (run(k)[1] for k in keys)])
        aims[batch] = curves[:, -1]
        print(
            f"tpe, batch {batch}: lowest of 200 {np.median(aims[batch]):.5f}, of 100 {np.median(curves[:, 99]):.5f}",
            flush=True,
        )
    columns = ("descent", "loss at half the cost", "cost to batch 8", "to batch 1", "seeds at half: batch 8", "batch 1")
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    for name in options.methods:
        build, rounds = METHODS[name], 50 if "halving" in name else 8
        run = jax.jit(hpo.study(unrolled, build(), rounds=rounds, lanes=1 if "halving" in name else None))
        curves = [curve(t.losses, t.trials.active) for t in (run(k)[1] for k in keys)]
        half = int(TRIALS / 2 / cost)
        at_half = np.array([c[min(half, len(c)) - 1] for c in curves])
        reached = {
            b: [np.argmax(c <= aim) + 1 if c[-1] <= aim else np.inf for c, aim in zip(curves, aims[b], strict=True)]
            for b in aims
        }
        share = {b: statistics.median(np.array(r) * cost / TRIALS) for b, r in reached.items()}
        good = {b: sum(x <= half for x in r) for b, r in reached.items()}
        print(
            f"| `{name}` | {np.median(at_half):.5f} | {share[8]:.2f} | {share[1]:.2f} | {good[8]} | {good[1]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
