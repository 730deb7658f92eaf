"""Which method to use: our own methods ranked among themselves on seven kinds of problem.

    python benchmarks/which_method.py --suite SUITE.py --data DATA --rows ROWS           # all kinds, then the ranking
    python benchmarks/which_method.py --suite SUITE.py --data DATA --rows ROWS --kinds mixed --only 'tpe;gp_ei'
    python benchmarks/which_method.py --rows ROWS --score                                # only the ranking
    python benchmarks/which_method.py --rows ROWS --check                                # only what is recommended

real                 12 functions of BBOB, 5 dims, 100 evaluations one at a time
real_long            the same, 5,000 evaluations, populations of 50
mixed                4 functions of BBOB's mixed-integer suite, 5 tasks of LCBench, 3 tables of MLPs, 100 evaluations
categorical          2 tables of FCNet, NAS-Bench-201 on 3 data sets, NAS-Bench-Macro, 100 evaluations
budgets              5 tasks of LCBench, 52 epochs a trial, at equal epochs, of 20 trials in all; `fidelity_quality.py`
differentiable       LCBench's surrogate, 7 hyperparameters, and training on digits, 3 as in `gradient_search.py`, at a
                     cost of 100 evaluations; a value and gradient costs 4 of them
differentiable_many  training on digits with 100 to 640 hyperparameters, at a cost of 400 evaluations

ROWS is a folder with a file of rows for each kind, in the form of `quality.py`, to which a run appends; of rows of the
same problem, method and seed the last counts. A method's rank on a problem is 1 + the sum over the others of
P(other is lower) + P(equal) / 2, over pairs of seeds; what is printed is the mean over problems, its 90% interval in
bootstraps over problems and seeds, and the share of bootstraps in which the method is first. A method is within noise
of the first if the 90% interval of the difference of their mean ranks, in the same bootstraps, has 0 in it. `--check`
exits with 1 if a recommendation, which are those of the README, is neither first nor within noise.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fidelity_quality import EPOCHS, FULL, TASKS, incumbents, lcbench, lcbench_methods, load_lcbench, surrogate
from gradient_search import SPACE as TRAINING_SPACE
from population_quality import LONG
from quality import load_suite, record

import jaxhpo as hpo
from jaxhpo.demo import digits

GRADIENT_COST = 4
BOOTSTRAPS = 500


class Kind(NamedTuple):
    """The marks, indices of best-so-far curves, by what had been spent there."""

    marks: dict
    seeds: int


SHORT_MARKS = {"30": 2, "50": 4, "100": 9}
KINDS = {
    "real": Kind(SHORT_MARKS, 5),
    "real_long": Kind({"1,500": 2, "2,500": 4, "5,000": 9}, 5),
    "mixed": Kind(SHORT_MARKS, 5),
    "categorical": Kind(SHORT_MARKS, 10),
    "budgets": Kind({"3 x 52": 2, "5 x 52": 4, "10 x 52": 9, "20 x 52": 19}, 5),
    "differentiable": Kind(SHORT_MARKS, 5),
    "differentiable_many": Kind({"40": 0, "100": 1, "200": 4, "400": 9}, 3),
}
# By kind and mark: the method, as in the README's table.
RECOMMENDED = {
    "real": dict.fromkeys(SHORT_MARKS, "gp_ei"),
    "real_long": dict.fromkeys(KINDS["real_long"].marks, "differential_evolution"),
    "mixed": dict.fromkeys(SHORT_MARKS, "gp_ei"),
    "categorical": dict.fromkeys(SHORT_MARKS, "gp_ei"),
    "budgets": dict.fromkeys(("3 x 52", "5 x 52", "10 x 52"), "asha") | {"20 x 52": "gp_ei"},
    "differentiable": dict.fromkeys(SHORT_MARKS, "gp_ei"),
    "differentiable_many": dict.fromkeys(KINDS["differentiable_many"].marks, "gradient"),
}

SEARCH = {
    "random": lambda space: hpo.random(space, batch=1),
    "quasirandom": lambda space: hpo.quasirandom(space, batch=1),
    "annealing": lambda space: hpo.annealing(space, chains=1, batch=1),
    "coordinate_descent": lambda space: hpo.coordinate_descent(space, batch=2),
    "genetic": lambda space: hpo.genetic(space, population=10, batch=1),
    "differential_evolution": lambda space: hpo.differential_evolution(space, population=10, batch=1),
    "particle_swarm": lambda space: hpo.particle_swarm(space, particles=10, batch=1),
    "cma_es": lambda space: hpo.cma_es(space, batch=1),
    "regularized_evolution": lambda space: hpo.regularized_evolution(space),
    "reinforce": lambda space: hpo.reinforce(space, batch=1),
    "tpe": lambda space: hpo.tpe(space, batch=1),
    "forest": lambda space: hpo.bayesian(space, surrogate="forest", batch=1),
    "gp_ei": lambda space: hpo.gp_ei(space, batch=1),
}
# Two points in each of 5 dims are the finest grid of no more than 100 points.
GRID = {"grid": lambda space: hpo.grid(space, points=2, batch=1)}
EXTRA_LONG = {
    "random": lambda space: hpo.random(space, batch=50),
    "grid": lambda space: hpo.grid(space, points=5, batch=50),
    "tpe": lambda space: hpo.tpe(space, batch=50),
}
DESCENT, TRUST = optax.adam(0.5), hpo.trust_region()
DESCENTS = {
    "gradient": lambda space: hpo.gradient(space, DESCENT, starts=2),
    "gradient, trust_region": lambda space: hpo.gradient(space, TRUST, starts=2),
    "gradient, trust_region, halving": lambda space: hpo.gradient(space, TRUST, starts=4, halving=1),
    "polish(genetic)": lambda space: hpo.polish(hpo.genetic(space, population=10, batch=2), DESCENT, every=1),
    "polish(tpe)": lambda space: hpo.polish(hpo.tpe(space, batch=2), DESCENT, every=1),
    "gp_ei(gradients=True)": lambda space: hpo.gp_ei(space, gradients=True, batch=1),
}
MANY, CLOSE = 400, optax.adam(0.1)
# Without `trust_region`, which takes at most 512 parameters.
DESCENTS_MANY = {
    "gradient": lambda space: hpo.gradient(space, DESCENT, starts=1),
    "gradient, 4 starts": lambda space: hpo.gradient(space, DESCENT, starts=4),
    "gradient, adam(0.1)": lambda space: hpo.gradient(space, CLOSE, starts=1),
    "polish(genetic)": lambda space: hpo.polish(hpo.genetic(space, population=10, batch=2), DESCENT, every=1),
}
# Black-box methods beside the descents. A Gaussian process of hundreds of dims is not meant for it.
BESIDE = ("random", "quasirandom", "coordinate_descent", "genetic", "differential_evolution", "cma_es", "tpe", "gp_ei")
BESIDE_MANY = ("random", "coordinate_descent", "genetic", "cma_es", "tpe")


def tables(data):
    """Problems of `quality.py`: NAS-Bench-201 on three data sets, after 12 epochs, and NAS-Bench-Macro."""
    cells, macro = np.load(Path(data) / "nasbench201.npz"), np.load(Path(data) / "nas_bench_macro.npz")
    order = np.argsort(cells["ops"].astype(int) @ 5 ** np.arange(6)[::-1])
    losses = {
        f"nasbench201-{name}": 100 - np.asarray(cells["val12"][i], float)[order].reshape((5,) * 6)
        for i, name in enumerate(("cifar10", "cifar100", "imagenet16"))
    }
    losses["nasbench-macro"] = 100 - macro["test_acc"].mean(-1).astype(float)

    def problem(name, loss):
        space = [(f"edge{i}", "cat", [f"op{k}" for k in range(n)]) for i, n in enumerate(loss.shape)]
        return name, space, lambda c: float(loss[tuple(int(c[n][2:]) for n, *_ in space)])

    return [problem(*item) for item in losses.items()]


def problems_of(kind, options):
    """The problems of a kind that are functions of the host."""
    blackbox = load_suite(options.suite, "visible")
    if kind.startswith("real"):
        return [p for p in blackbox if not p[0].startswith("bbob-mixint")]
    training = load_suite(options.suite, "visible_hpo")
    if kind == "mixed":
        return [p for p in blackbox + training if p[0].startswith(("bbob-mixint", "lcbench", "mlp"))]
    return [p for p in training if p[0].startswith("fcnet")] + tables(options.data)


def chosen(methods, options):
    return {n: b for n, b in methods.items() if not options.only or n in options.only.split(";")}


def append(path, rows):
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def run_host(kind, options, path):
    """Kinds whose problems are functions of the host."""
    long = kind == "real_long"
    methods = LONG | EXTRA_LONG if long else SEARCH | (GRID if kind == "real" else {})
    evaluations = 5000 if long else 100
    seeds = options.seeds or KINDS[kind].seeds
    record(problems_of(kind, options), chosen(methods, options), seeds, evaluations, evaluations // 10, path)


def run_budgets(kind, options, path):
    """Training with budgets, and the same training to the end of each trial."""
    weights, tasks, space = load_lcbench(options.suite, options.data)
    ladder, rule = {"max_steps": EPOCHS, "batch": 1}, hpo.MedianRule(EPOCHS, every=4)
    stepped = lcbench_methods(space) | {
        "successive_halving": lambda: hpo.successive_halving(space, trials=200, min_steps=1, **ladder),
        "early_stopping(tpe)": lambda: hpo.early_stopping(hpo.tpe(space, batch=1), rule),
    }
    whole = {n: (lambda n=n: SEARCH[n](space)) for n in ("quasirandom", "tpe", "gp_ei", "forest", "coordinate_descent")}
    for name, build in chosen(stepped | whole, options).items():
        began, method = time.perf_counter(), build()
        stretch = EPOCHS if name in whole else rule.every if name.startswith("early_stopping") else 1
        rounds = method.rounds or FULL * EPOCHS // stretch

        def one(task, key, method=method, rounds=rounds, name=name):
            trainable = lcbench(weights, task)
            trace = hpo.study(hpo.unroll(trainable, EPOCHS) if name in whole else trainable, method, rounds)(key)[1]
            final = jax.vmap(jax.vmap(lambda h: surrogate(weights, task, h, jnp.float32(EPOCHS))))(trace.trials.hparams)
            steps = jnp.full_like(trace.trials.steps, EPOCHS) if name in whole else trace.trials.steps
            steps = jnp.where(trace.trials.active, steps, 0)
            return steps, steps if name in whole else trace.reached, trace.losses, final

        seeds = options.seeds or KINDS[kind].seeds
        run = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
        out = jax.device_get(run(tasks, jax.vmap(jax.random.key)(np.arange(seeds))))
        marks = EPOCHS * np.arange(1, FULL + 1)
        append(path, [
            {"problem": f"lcbench-{TASKS[t]}", "peer": f"jaxhpo-{name}", "seed": s}
            | {"best": [round(v, 6) for v in incumbents(*(x[t, s] for x in out), marks)]}
            for t in range(len(TASKS))
            for s in range(seeds)
        ])  # fmt: skip
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


def cross_entropy(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, y)


def regression(rows, rates, decays, weights, steps=100):
    """(split, hparams) -> validation loss of softmax regression by full-batch descent with momentum on digits.

    `rates(h, t)` is the learning rate of a step, `decays(h)` broadcasts with the parameters, `weights(h)` float[rows].
    """

    def loss(data, h, friction):
        (x, y), valid = data

        def training_loss(w):
            share = weights(h)
            return share @ cross_entropy(w, x[:rows], y[:rows]) / rows + (decays(h) * w**2).sum() / 2

        def step(state, t):
            w, velocity = state
            velocity = (1 - friction(h)) * velocity + jax.grad(training_loss)(w)
            return (w - rates(h, t) * velocity, velocity), None

        w = jnp.zeros((data[0][0].shape[1], 10))
        (w, _), _ = jax.lax.scan(step, (w, w), jnp.arange(steps))
        return cross_entropy(w, *valid).mean()

    return loss


def splits(number):
    """Training and validation sets of some splits of the digits, a leading axis of splits."""
    found = [digits(seed) for seed in range(number)]

    def stack(part):
        size = min(len(getattr(d, part)[1]) for d in found)
        return tuple(jnp.stack([jnp.asarray(getattr(d, part)[i][:size]) for d in found]) for i in (0, 1))

    return stack("train"), stack("valid")


def noisy(data, rows, share=0.4):
    """The same with some of the labels in use moved to the next class."""
    (x, y), valid = data
    moved = (jnp.arange(y.shape[1]) < share * rows).astype(y.dtype)
    return (x, (y + moved) % 10), valid


def differentiable(options):
    """Families of problems of few hyperparameters: {name: (names of problems, arguments, space, objective)}."""
    weights, tasks, space = load_lcbench(options.suite, options.data)
    train = regression(300, lambda h, t: h["lr"], lambda h: h["decay"], lambda h: jnp.ones(300))
    return {
        "lcbench": (
            [f"lcbench-{t}" for t in TASKS],
            tasks,
            space,
            lambda task, h: surrogate(weights, task, h, jnp.float32(EPOCHS)),
        ),
        "digits": (
            [f"digits-{i}" for i in range(4)],
            splits(4),
            hpo.Space(TRAINING_SPACE),
            lambda data, h: train(data, h, lambda h: h["friction"]),
        ),
    }


def differentiable_many(options):
    """The same with a hyperparameter for each step, each parameter and each example."""
    friction, one = lambda h: 0.1, lambda n: lambda h: jnp.ones(n)
    data = splits(2)
    schedule = regression(300, lambda h, t: h["lr"][t], lambda h: 1e-3, one(300))
    decay = regression(100, lambda h, t: 0.3, lambda h: h["decay"].reshape(64, 10), one(100))
    example = regression(300, lambda h, t: 0.3, lambda h: 1e-2, lambda h: h["weights"])
    return {
        "schedule": (
            ["schedule-0", "schedule-1"],
            data,
            hpo.Space({"lr": hpo.Array(100, 1e-3, 3.0, log=True)}),
            lambda data, h: schedule(data, h, friction),
        ),
        "decay": (
            ["decay-0", "decay-1"],
            data,
            hpo.Space({"decay": hpo.Array(640, 1e-5, 1.0, log=True)}),
            lambda data, h: decay(data, h, friction),
        ),
        "weights": (
            ["weights-0", "weights-1"],
            noisy(data, 300),
            hpo.Space({"weights": hpo.Array(300, 0.0, 1.0)}),
            lambda data, h: example(data, h, friction),
        ),
    }


def run_device(kind, options, path):
    """Kinds whose problems are pure functions; a family and all its seeds are one program."""
    many = kind == "differentiable_many"
    cost = MANY if many else 100
    search = {n: SEARCH[n] for n in (BESIDE_MANY if many else BESIDE)}
    methods = chosen(search | (DESCENTS_MANY if many else DESCENTS), options)
    seeds = options.seeds or KINDS[kind].seeds
    keys = jax.vmap(jax.random.key)(np.arange(seeds))
    families = differentiable_many(options) if many else differentiable(options)
    for family, (names, arguments, space, objective) in families.items():
        for name, build in methods.items():
            began, method = time.perf_counter(), build(space)
            price = GRADIENT_COST if method.uses_gradients else 1
            rounds = -(-cost // price // method.batch) if "halving" not in name else cost // price

            def one(argument, key, method=method, rounds=rounds, objective=objective):
                trace = hpo.study(lambda key, h: objective(argument, h), method, rounds)(key)[1]
                return trace.losses, trace.trials.active

            losses, active = jax.device_get(jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(arguments, keys))
            rows = []
            for p, problem in enumerate(names):
                for s in range(seeds):
                    told = losses[p, s][active[p, s]]
                    best = np.minimum.accumulate(np.where(np.isfinite(told), told, np.inf))
                    at = [max(k * cost // 10 // price, 1) for k in range(1, 11)]
                    best = [round(float(best[min(k, len(best)) - 1]), 6) for k in at]
                    rows.append({"problem": problem, "peer": f"jaxhpo-{name}", "seed": s, "best": best})
            append(path, rows)
            print(f"{family}, {name}: {time.perf_counter() - began:.1f} s", flush=True)


def load(path):
    """Curves of a file of rows, {method: {problem: float[seeds, marks]}}: of methods that have all problems."""
    rows: dict = {}
    for row in map(json.loads, path.open()):
        found = rows.setdefault(row["peer"].removeprefix("jaxhpo-"), {})
        found.setdefault(row["problem"], {})[row["seed"]] = row["best"]
    problems = sorted({p for found in rows.values() for p in found})
    for name in [n for n, found in rows.items() if sorted(found) != problems]:
        print(f"{path.stem}: {name} is left out: it has {len(rows.pop(name))} of {len(problems)} problems")
    return {
        n: {p: np.array([found[p][s] for s in sorted(found[p])], float) for p in problems} for n, found in rows.items()
    }


def comparisons(losses):
    """Of pairs of runs on a problem, 1 where the other is lower, 1/2 where they are equal, 0 elsewhere.

    Args:
      losses: for each method float[seeds]; some may have fewer seeds than others.

    Returns:
      float[methods, seeds, methods, seeds], 0 where there is no such seed.
    """
    x = np.full((len(losses), max(map(len, losses))), np.nan)
    for row, found in zip(x, losses, strict=True):
        row[: len(found)] = found
    mine, others = x[:, :, None, None], x[None, None]
    return (others < mine) + (others == mine) / 2


def mean_ranks(compared, seeds, generator=None):
    """Mean rank of each method over problems, float[methods]; in a bootstrap where there is a generator.

    Args:
      compared: `comparisons` of each problem.
      seeds: for each problem i64[methods], how many there are.
    """
    drawn = range(len(compared)) if generator is None else generator.integers(0, len(compared), len(compared))
    total = np.zeros(len(seeds[0]))
    for p in drawn:
        share = np.zeros(compared[p].shape[:2])
        for row, n in zip(share, seeds[p], strict=True):
            row[:n] = 1 / n if generator is None else np.bincount(generator.integers(0, n, n), minlength=n) / n
        beaten = np.einsum("ia,iajb,jb->ij", share, compared[p], share, optimize=True)
        np.fill_diagonal(beaten, 0)
        total += 1 + beaten.sum(1)
    return total / len(compared)


class Standing(NamedTuple):
    """What is known of a method at a mark."""

    rank: float
    low: float
    high: float
    first: float
    """share of bootstraps in which it has the lowest mean rank"""
    is_within: bool
    """whether the difference to the first is within noise; of the first True"""


def standings(curves, mark):
    """Of every method a `Standing`, the lowest rank first."""
    names, problems = list(curves), list(next(iter(curves.values())))
    losses = [[curves[n][p][:, mark] for n in names] for p in problems]
    compared, seeds = [comparisons(x) for x in losses], [np.array([len(y) for y in x]) for x in losses]
    point, generator = mean_ranks(compared, seeds), np.random.default_rng(0)
    drawn = np.array([mean_ranks(compared, seeds, generator) for _ in range(BOOTSTRAPS)])
    behind = np.quantile(drawn - drawn[:, [point.argmin()]], 0.05, axis=0)
    is_lowest = drawn == drawn.min(1, keepdims=True)
    first = (is_lowest / is_lowest.sum(1, keepdims=True)).mean(0)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    found = {
        n: Standing(*map(float, x), bool(y <= 0))
        for n, *x, y in zip(names, point, low, high, first, behind, strict=True)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].rank))


def ranking(kind, curves):
    """Prints the table of a kind, in the order of its last mark."""
    marks = KINDS[kind].marks
    at = {mark: standings(curves, index) for mark, index in marks.items()}
    problems = next(iter(curves.values()))
    seeds = sorted({len(x) for found in curves.values() for x in found.values()})
    print(f"\n{kind}: {len(problems)} problems, {', '.join(map(str, seeds))} seeds")
    print("| method | " + " | ".join(marks) + " |\n|" + "---|" * (1 + len(marks)))
    for name in at[list(marks)[-1]]:
        cells = []
        for mark in marks:
            x = at[mark][name]
            text = f"{x.rank:.1f} [{x.low:.1f}, {x.high:.1f}]" + (f" {x.first:.0%}" if x.first >= 0.005 else "")
            cells.append(f"**{text}**" if next(iter(at[mark])) == name else f"{text} =" if x.is_within else text)
        print(f"| `{name}` | " + " | ".join(cells) + " |")
    return at


def check(kind, at):
    """Whether what is recommended for a kind is first, or within noise of the first, at every mark it is for."""
    is_good = True
    for mark, name in RECOMMENDED.get(kind, {}).items():
        x, first = at[mark].get(name), next(iter(at[mark]))
        good = x is not None and x.is_within
        is_good &= good
        what = "has not been run" if x is None else f"ranks {x.rank:.2f}, {first} {at[mark][first].rank:.2f}"
        where = "first" if name == first else "within noise of the first" if good else "NOT within noise of the first"
        print(f"{kind}, {mark}: {name} {what}: {where}")
    return is_good


RUNS = {"budgets": run_budgets} | dict.fromkeys(("real", "real_long", "mixed", "categorical"), run_host)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", help="Python file with the problems, as in `quality.py`")
    parser.add_argument("--data", help="folder with lcbench_weights.npz, nasbench201.npz and nas_bench_macro.npz")
    parser.add_argument("--rows", required=True, help="folder to which rows are appended, and of which they are scored")
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--only", help="methods, separated by semicolons")
    parser.add_argument("--seeds", type=int, help="as many as the kind says if not given")
    parser.add_argument("--score", action="store_true", help="run nothing")
    parser.add_argument("--check", action="store_true", help="run nothing, print only what is recommended")
    options = parser.parse_args()
    kinds, folder = options.kinds.split(","), Path(options.rows)
    if not (options.score or options.check):
        if not (options.suite and options.data):
            parser.error("running needs --suite and --data")
        folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            print(kind, flush=True)
            RUNS.get(kind, run_device)(kind, options, folder / f"{kind}.jsonl")
    is_good = True
    for kind in kinds:
        path = folder / f"{kind}.jsonl"
        if not path.exists():
            print(f"{kind}: no rows")
            is_good &= kind not in RECOMMENDED
            continue
        curves = load(path)
        if options.check:
            marks = {m: KINDS[kind].marks[m] for m in RECOMMENDED.get(kind, {})}
            at = {mark: standings(curves, index) for mark, index in marks.items()}
        else:
            at = ranking(kind, curves)
        is_good &= check(kind, at)
    if options.check and not is_good:
        sys.exit(1)


if __name__ == "__main__":
    main()
