"""Architecture search on tables of trained networks: NAS-Bench-201 and NAS-Bench-Macro.

    python benchmarks/nas_bench.py --folder DATA --parts 201,macro
    python benchmarks/nas_bench.py --folder DATA --only 'random;reinforce'

201    500 independent searches as one `vmap`, each of 12,000 s of simulated cost, a network's 12-epoch training time
       being 12/200 of that of 200 epochs (CIFAR-10). What is told, and what the winner is chosen by, is the accuracy on
       the validation set of CIFAR-10 after 12 epochs; what is reported, the mean test accuracy after 200 epochs on
       three data sets. The network whose training crosses the budget counts, as in the published figures.
macro  evaluations until the best of 6,561 networks is found, 100 seeds, one trial an ask.

The tables are `nasbench201.npz` and `nas_bench_macro.npz`, as the docstrings of `load_201` and `load_macro` say.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxhpo as hpo

BUDGET = 12_000
OPERATIONS = ("none", "skip_connect", "conv_1x1", "conv_3x3", "avg_pool_3x3")
PUBLISHED = {
    "random": (93.70, 71.04, 44.57),
    "regularized_evolution": (93.92, 71.84, 45.54),
    "reinforce": (93.85, 71.71, 45.24),
    "bohb": (93.61, 70.85, 44.42),
}
METHODS = {
    "random": lambda space: hpo.random(space, batch=1),
    "regularized_evolution": lambda space: hpo.regularized_evolution(space),
    "regularized_evolution, 10 members, samples of 3": lambda space: hpo.regularized_evolution(
        space, population=10, sample=3
    ),
    "regularized_evolution, points may come again": lambda space: hpo.regularized_evolution(space, distinct=False),
    "reinforce": lambda space: hpo.reinforce(space, batch=1),
    "reinforce, autoregressive": lambda space: hpo.reinforce(space, policy="autoregressive", batch=4),
    "ppo": lambda space: hpo.ppo(space, batch=4),
    "genetic": lambda space: hpo.genetic(space, population=10, batch=1),
    "differential_evolution": lambda space: hpo.differential_evolution(space, population=10, batch=1),
    "annealing": lambda space: hpo.annealing(space, chains=1, batch=1),
    "coordinate_descent": lambda space: hpo.coordinate_descent(space, batch=1),
    "tpe": lambda space: hpo.tpe(space, batch=1),
}
# The three blocks of NAS-Bench-Macro are in the order of their size, which a categorical cannot say.
ORDERED = {
    "tpe, blocks in order": lambda space: hpo.tpe(space, batch=1),
    "gp_ei, blocks in order": lambda space: hpo.gp_ei(space, batch=1),
}
MACRO = METHODS | ORDERED | {"gp_ei": lambda space: hpo.gp_ei(space, batch=1)}


def load_201(folder):
    """The table of NAS-Bench-201 in the order of its operations as digits, the first edge the highest.

    `ops` is i8[15625, 6] with the names of its numbers in `op_names`; `val12` and `test200_mean` are float[3, 15625]
    in per cent, `train_time` float[3, 15625] in seconds; CIFAR-10 comes first, then CIFAR-100 and ImageNet16-120.
    """
    data = np.load(Path(folder) / "nasbench201.npz")
    edges, names = data["ops"].astype(int), data["op_names"]
    order = np.argsort(edges @ 5 ** np.arange(6)[::-1])
    valid, cost = data["val12"][0, order], data["train_time"][0, order] * 12 / 200
    return list(map(str, names)), jnp.asarray(valid), np.asarray(cost), np.asarray(data["test200_mean"][:, order])


def load_macro(folder):
    """Mean test accuracy in per cent, float[6561], of NAS-Bench-Macro: `test_acc` is float[3] * 8 + [seeds]."""
    return jnp.asarray(np.load(Path(folder) / "nas_bench_macro.npz")["test_acc"].mean(-1).ravel(), jnp.float32)


def place(h, options):
    """The row of a table: the choices as digits, the first the highest."""
    index = jnp.int32(0)
    for name in sorted(h):
        index = index * options + h[name]
    return index


def searches(method, table, options, rounds, seeds):
    """Rows of the table in the order in which some searches try them: i32[seeds, trials], and the seconds."""
    study = hpo.study(lambda key, h: -table[place(h, options)], method, rounds=rounds)

    def run(key):
        return place(study(key)[1].trials.hparams, options).reshape(-1)

    keys = jax.random.split(jax.random.key(0), seeds)
    begun = time.perf_counter()
    compiled = jax.jit(jax.vmap(run)).lower(keys).compile()
    middle = time.perf_counter()
    found = np.asarray(compiled(keys))
    return found, middle - begun, time.perf_counter() - middle


def final(tried, valid, cost, test):
    """Final test accuracies of the networks that searches choose: float[3, seeds], and how many networks each tries."""
    spent = np.cumsum(cost[tried], axis=1)
    counts = spent - cost[tried] < BUDGET
    best = np.where(counts, np.asarray(valid)[tried], -np.inf).argmax(1)
    return test[:, tried[np.arange(len(tried)), best]], counts.sum(1)


def bench_201(options, methods):
    names, valid, cost, test = load_201(options.folder)
    space = {f"edge{i}": hpo.Categorical(tuple(range(5))) for i in range(6)}
    most = int(np.ceil(BUDGET / cost.min()))
    print(f"NAS-Bench-201, {', '.join(names)}: {options.searches} searches in one vmap; optimum {test.max(1).round(2)}")
    print("| method | CIFAR-10 | CIFAR-100 | ImageNet16-120 | published | networks | compile, s | run, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, build in methods.items():
        method = build(space)
        for trials in (options.trials, most):
            rounds = -(-trials // method.batch)
            tried, compiling, running = searches(method, valid, 5, rounds, options.searches)
            if cost[tried].sum(1).min() >= BUDGET:
                break
        accuracy, networks = final(tried, valid, cost, test)
        shown = " | ".join(f"{a.mean():.2f} ± {a.std():.2f}" for a in accuracy)
        published = " / ".join(f"{x:.2f}" for x in PUBLISHED.get(name, ()))
        print(
            f"| `{name}` | {shown} | {published} | {networks.mean():.0f} | {compiling:.1f} | {running:.1f} |",
            flush=True,
        )


def bench_macro(options, methods):
    table = load_macro(options.folder)
    blocks = tuple(range(3))
    print(f"NAS-Bench-Macro: evaluations until {float(table.max()):.3f} is found, {options.seeds} seeds")
    print(
        f"| method | median | quartiles | found within {options.evaluations} | compile, s | run, s |\n"
        "|---|---|---|---|---|---|"
    )
    for name, build in methods.items():
        kind = hpo.Ordinal if name in ORDERED else hpo.Categorical
        method = build({f"layer{i}": kind(blocks) for i in range(8)})
        rounds = -(-options.evaluations // method.batch)
        tried, compiling, running = searches(method, table, 3, rounds, options.seeds)
        is_best = tried == int(table.argmax())
        needed = np.where(is_best.any(1), 1 + is_best.argmax(1), np.inf)
        low, middle, high = np.quantile(needed, [0.25, 0.5, 0.75], method="higher")
        print(f"| `{name}` | {middle:.0f} | {low:.0f} to {high:.0f} | {is_best.any(1).mean():.0%} | {compiling:.1f} | "
              f"{running:.1f} |", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where the tables are")
    parser.add_argument("--parts", default="201,macro")
    parser.add_argument("--only", help="methods, separated by semicolons")
    parser.add_argument("--searches", type=int, default=500, help="on NAS-Bench-201")
    parser.add_argument("--trials", type=int, default=160, help="of each; more where that does not spend the budget")
    parser.add_argument("--seeds", type=int, default=100, help="on NAS-Bench-Macro")
    parser.add_argument("--evaluations", type=int, default=100, help="on NAS-Bench-Macro")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {jax.local_device_count()} device")
    for part in options.parts.split(","):
        bench, methods = {"201": (bench_201, METHODS), "macro": (bench_macro, MACRO)}[part]
        only = options.only.split(";") if options.only else methods
        bench(options, {name: methods[name] for name in only if name in methods})


if __name__ == "__main__":
    main()
