"""What a gradient through training costs: memory and time of the adjoints.

  python benchmarks/hypergradients.py --parts memory,time

memory  temporary memory of the compiled value-and-gradient, by steps
time    value-and-gradient over plain training: an MLP of 64-128-10, batches of 64, run in turn, medians; what compiling
        takes apart
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxhpo as hpo

KEY = jax.random.key(0)
ADJOINTS = {
    'Reverse("none")': (hpo.Reverse(), 4.0),
    "Reverse(1)": (hpo.Reverse(1), None),
    'Reverse("sqrt")': (hpo.Reverse("sqrt"), 5.0),
    "Truncated(100)": (hpo.Truncated(100), None),
    "Forward()": (hpo.Forward(), 3.0),
    "Implicit(steps=20)": (hpo.Implicit(steps=20), 1.5),
}


def training(rows):
    """SGD with momentum on digits by hand: what a step does apart from the network is next to nothing."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    train, valid = (x[:rows], y[:rows]), (x[1400:], y[1400:])

    def cross_entropy(params, data):
        hidden = jax.nn.tanh(data[0] @ params["a"] + params["b"])
        logits = hidden @ params["c"] + params["d"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()

    def loss(params, h, data):
        squares = sum((p**2).sum() for p in jax.tree.leaves(params))
        return cross_entropy(params, data) + jnp.exp(h["log_decay"]) * squares

    def init(key, h):
        a, c = (
            jax.random.normal(k, shape) / 8
            for k, shape in zip(jax.random.split(key), [(64, 128), (128, 10)], strict=True)
        )
        params = {"a": a, "b": jnp.zeros(128), "c": c, "d": jnp.zeros(10)}
        return {"params": params, "velocity": jax.tree.map(jnp.zeros_like, params), "step": jnp.int32(0)}

    def step(key, s, h):
        start = (s["step"] * 64) % (rows - 63)
        batch = jax.tree.map(lambda d: jax.lax.dynamic_slice_in_dim(d, start, 64), train)
        grads = jax.grad(loss)(s["params"], h, batch)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, s["velocity"], grads)
        params = jax.tree.map(lambda p, v: p - 0.05 * v, s["params"], velocity)
        return {"params": params, "velocity": velocity, "step": s["step"] + 1}

    return hpo.Trainable(
        init,
        step,
        lambda s, h: cross_entropy(s["params"], valid),
        params=lambda s: s["params"],
        training_loss=lambda params, h: loss(params, h, train),
    )


HPARAMS = {"log_decay": jnp.float32(-7.0)}


def gradient(trainable, steps, adjoint):
    """The compiled value-and-gradient, and the seconds that it took to compile."""
    begun = time.perf_counter()
    run = jax.jit(jax.value_and_grad(hpo.unroll(trainable, steps, adjoint), 1)).lower(KEY, HPARAMS).compile()
    return run, time.perf_counter() - begun


def memory(rows):
    trainable = training(rows)
    print("| temporary memory, MB | 100 steps | 400 | 1,600 |\n|---|---|---|---|")
    for name, (adjoint, _) in ADJOINTS.items():
        sizes = [
            gradient(trainable, steps, adjoint)[0].memory_analysis().temp_size_in_bytes / 1e6
            for steps in (100, 400, 1600)
        ]
        print(f"| `{name}` | " + " | ".join(f"{size:.2f}" for size in sizes) + " |", flush=True)


def seconds(run):
    begun = time.perf_counter()
    jax.block_until_ready(run(KEY, HPARAMS))
    return time.perf_counter() - begun


def times(rows, steps, repeats):
    trainable = training(rows)
    plain = jax.jit(hpo.unroll(trainable, steps)).lower(KEY, HPARAMS).compile()
    runs = {name: gradient(trainable, steps, adjoint) for name, (adjoint, _) in ADJOINTS.items()}
    for run in [plain, *(run for run, _ in runs.values())]:
        seconds(run)
    took = {name: [] for name in ["plain", *runs]}
    for _ in range(repeats):
        took["plain"].append(seconds(plain))
        for name, (run, _) in runs.items():
            took[name].append(seconds(run))
    base = statistics.median(took["plain"])
    print(f"plain training: {base * 1e3:.0f} ms for {steps} steps; {rows} training examples")
    print("| adjoint | of plain training | at most | compile, s |\n|---|---|---|---|")
    for name, (_, compiling) in runs.items():
        ratio = statistics.median(np.array(took[name]) / np.array(took["plain"]))
        aim = ADJOINTS[name][1]
        print(f"| `{name}` | {ratio:.2f}x | {f'{aim:g}x' if aim else ''} | {compiling:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="memory,time")
    parser.add_argument("--rows", type=int, default=1024, help="training examples, at most 1400")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if "memory" in parts:
        memory(options.rows)
    if "time" in parts:
        times(options.rows, options.steps, options.repeats)


if __name__ == "__main__":
    main()
