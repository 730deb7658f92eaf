"""How soon methods that stop trials early find good ones, on surrogates and tables of learning curves.

    python benchmarks/fidelity_quality.py --suite SUITE.py --data DATA --out OUT.jsonl      # LCBench
    python benchmarks/fidelity_quality.py --suite SUITE.py --data DATA --only asha --seeds 10
    python benchmarks/fidelity_quality.py --data DATA --taskset                             # TaskSet

LCBench: five tasks, 52 epochs, one trial at a time. After each 52 epochs spent, the error at epoch 52 of the incumbent:
the trial that got furthest, of those the one with the lowest error there; the running minimum of that. All seeds and
tasks are one `vmap`. TaskSet: how many steps until a method has what the best of 81 random configurations reaches when
all of them are trained to the end, as a share of the steps that this takes.
"""

import argparse
import functools
import importlib.util
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxhpo as hpo

EPOCHS, FULL = 52, 20
TASKS = ("3945", "34539", "126026", "167168", "189354")
CURVE, CONFIGURATIONS = 50, 81


def lcbench_methods(space):
    """The methods under comparison, one trial at a time."""
    ladder = {"max_steps": EPOCHS, "batch": 1}
    return {
        "hyperband": lambda: hpo.hyperband(space, **ladder, cycles=3, in_flight=1),
        "asha": lambda: hpo.asha(space, **ladder),
        "bohb": lambda: hpo.bohb(space, **ladder),
        "bohb_hyperband": lambda: hpo.bohb(space, **ladder, scheduler="hyperband", cycles=3, in_flight=1),
        "bohb_pooled": lambda: hpo.bohb(space, **ladder, model="pooled"),
        "dehb": lambda: hpo.dehb(space, **ladder),
        "random": lambda: hpo.successive_halving(space, trials=1, min_steps=EPOCHS, **ladder),
    }


def surrogate(weights, task, hparams, epoch):
    """The validation error of LCBench, in percent, by the network of YAHPO Gym (Pfisterer et al. 2022).

    Args:
      weights: its arrays, by name.
      task: i32[], row of the table of tasks.
      hparams: dict of scalars.
      epoch: float[] from 1 to 52.
    """
    w = weights
    inputs = jnp.stack([epoch if n == "epoch" else jnp.asarray(hparams[n], jnp.float32) for n in w["in_names"]])
    z = jnp.where(w["in_log"], jnp.log(jnp.maximum(inputs, 0) + 1e-12), inputs)
    h = jnp.concatenate([w["embds_fct.0.weight"][task], (z - w["in_sub"]) / w["in_div"]])

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def normal(x, name):
        deviation = jnp.sqrt(w[f"{name}.running_var"] + 1e-5)
        return (x - w[f"{name}.running_mean"]) / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    h = linear(h, "first_layer")
    for i in range(3):
        value, gate = jnp.split(linear(normal(h, f"layers.{i}.norm"), f"layers.{i}.linear0"), 2)
        h = h + linear(value * jax.nn.relu(gate), f"layers.{i}.linear1")
    y = jax.nn.sigmoid(linear(jax.nn.relu(normal(h, "last_normalization")), "head"))
    y = y * w["out_mul"] + w["out_add"]
    y = jnp.where(w["out_exp"], jnp.exp(jnp.minimum(y, 80)) - 1e-12, y)
    return 100 - y[list(w["out_names"]).index("val_accuracy")]


def lcbench(weights, task):
    """Training on LCBench: the state is the epoch."""
    return hpo.Trainable(
        init=lambda key, h: jnp.float32(0),
        step=lambda key, epoch, h: epoch + 1,
        evaluate=lambda epoch, h: surrogate(weights, task, h, epoch),
    )


def load_lcbench(suite_path, data):
    """The surrogate's arrays, the rows of the tasks, and the search space."""
    spec = importlib.util.spec_from_file_location("suite", suite_path)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    raw = dict(np.load(Path(data) / "lcbench_weights.npz"))
    weights = {k: jnp.asarray(v, np.float32) if v.dtype.kind == "f" else v for k, v in raw.items()}
    tasks = np.array([list(raw["task_ids"]).index(t) for t in TASKS], np.int32)
    kinds = {"float": hpo.Float, "int": hpo.Int}
    space = hpo.Space({n: kinds[kind](low, high, log=log) for n, kind, low, high, log in suite.LCSPACE})

    rng = np.random.default_rng(0)
    unit = rng.random((200, space.dims))
    hparams, epochs, which = space.decode(unit), rng.integers(1, EPOCHS + 1, 200), rng.integers(0, len(TASKS), 200)
    ours = jax.vmap(functools.partial(surrogate, weights))(tasks[which], hparams, epochs.astype(np.float32))
    native = [{n: float(hparams[n][i]) for n in hparams} for i in range(200)]
    theirs = [
        100 - suite.lcbench(TASKS[t], x, e)["val_accuracy"] for t, x, e in zip(which, native, epochs, strict=True)
    ]
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    return weights, tasks, space


def incumbents(steps, reached, losses, final, budget):
    """The running minimum of the incumbent's final error after each of the budgets, arrays [rounds, batch]."""
    spent = np.cumsum(steps.sum(1))
    best, curve, at = (-1, np.inf, np.inf), [], 0
    lowest = np.inf
    for mark in budget:
        while at < len(spent) and spent[at] <= mark:
            for s, r, x, f in zip(steps[at], reached[at], losses[at], final[at], strict=True):
                if s > 0 and np.isfinite(x) and (r, -x) > (best[0], -best[1]):
                    best = (int(r), float(x), float(f))
            at += 1
        lowest = min(lowest, best[2])
        curve.append(lowest)
    return curve


def run_lcbench(options):
    weights, tasks, space = load_lcbench(options.suite, options.data)
    methods = lcbench_methods(space)
    names = options.only.split(",") if options.only else methods
    for name in names:
        began, method = time.perf_counter(), methods[name]()
        rounds = method.rounds or FULL * EPOCHS

        def one(task, key, method=method, rounds=rounds):
            _, trace = hpo.study(lcbench(weights, task), method, rounds)(key)
            final = jax.vmap(jax.vmap(lambda h: surrogate(weights, task, h, jnp.float32(EPOCHS))))(trace.trials.hparams)
            steps = jnp.where(trace.trials.active, trace.trials.steps, 0)
            return steps, trace.reached, trace.losses, final

        keys = jax.vmap(jax.random.key)(np.arange(options.first, options.first + options.seeds))
        run = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
        out = jax.device_get(run(tasks, keys))
        marks = EPOCHS * np.arange(1, FULL + 1)
        rows = [
            {"problem": f"lcbench-{TASKS[t]}", "peer": f"jaxhpo-{name}", "seed": options.first + s}
            | {"best": [round(v, 6) for v in incumbents(*(x[t, s] for x in out), marks)]}
            for t in range(len(TASKS))
            for s in range(options.seeds)
        ]
        if options.out:
            with Path(options.out).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{name}: {time.perf_counter() - began:.1f} s, {rounds} rounds", flush=True)


def taskset_methods(space):
    """The methods under comparison, one trial at a time, and how many rounds they get."""
    ladder = {"max_steps": CURVE, "batch": 1}
    return {
        "asha": (hpo.asha(space, **ladder), 2000),
        "successive_halving": (hpo.successive_halving(space, trials=CONFIGURATIONS, min_steps=1, **ladder), None),
        "hyperband": (hpo.hyperband(space, **ladder, cycles=2, in_flight=1), None),
    }


def recorded(curves):
    """Training on a table float[rows, 1 + steps] of validation losses, from before the first step on; NaN is a run that
    diverged."""
    return hpo.Trainable(
        init=lambda key, h: jnp.int32(0),
        step=lambda key, step, h: step + 1,
        evaluate=lambda step, h: curves[h["row"], step],
    )


def run_taskset(options):
    data = np.load(Path(options.data) / "taskset_text12.npz")
    tasks = [name for name in data.files if f"{name}|hp" in data.files]
    valid = jnp.asarray(np.stack([data[name][:, 1] for name in tasks]), jnp.float32)
    space = hpo.Space({"row": hpo.Int(0, valid.shape[1] - 1)})
    keys = jax.vmap(jax.random.key)(np.arange(options.first, options.first + options.seeds))
    print(f"{len(tasks)} tasks, {np.isnan(valid).any((1, 2)).sum()} of them with diverged runs")

    def all_of(curves, key):
        method = hpo.random(space, batch=CONFIGURATIONS)
        objective = hpo.unroll(recorded(curves), CURVE)
        return jnp.nanmin(hpo.study(objective, method, 1)(key)[1].losses)

    everywhere = lambda one: jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))  # noqa: E731
    goal = np.median(everywhere(all_of)(valid, keys), axis=1)
    full = CURVE * CONFIGURATIONS
    for name, (method, rounds) in taskset_methods(space).items():

        def one(curves, key, method=method, rounds=rounds):
            trace = hpo.study(recorded(curves), method, rounds)(key)[1]
            return jnp.where(trace.trials.active, trace.trials.steps, 0), trace.losses

        steps, losses = jax.device_get(everywhere(one)(valid, keys))
        spent = np.cumsum(steps.sum(-1), axis=-1)
        there = np.where(np.isfinite(losses), losses, np.inf).min(-1) <= goal[:, None, None]
        share = np.where(there.any(-1), spent[*np.ogrid[: len(tasks), : len(keys)], there.argmax(-1)] / full, np.inf)
        by_task = np.median(share, axis=1)
        there, budget = np.isfinite(share).mean(), spent[..., -1].max() / full
        print(
            f"{name}: median {np.median(share):.3f} of the steps, {by_task.max():.3f} in the worst task; "
            f"{there:.0%} of the runs get there within {budget:.2f} of the steps"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taskset", action="store_true", help="TaskSet instead of LCBench")
    parser.add_argument("--suite", help="Python file with LCBench's space and its surrogate in NumPy")
    parser.add_argument("--data", required=True, help="folder with lcbench_weights.npz and taskset_text12.npz")
    parser.add_argument("--out", help="file to which the rows are appended")
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    options = parser.parse_args()
    run_taskset(options) if options.taskset else run_lcbench(options)


if __name__ == "__main__":
    main()
