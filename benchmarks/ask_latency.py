"""How long a model-based method takes to ask and be told, beside Optuna and BoTorch, in one run.

    python benchmarks/ask_latency.py                          # everything, 64 asks each
    python benchmarks/ask_latency.py --slow-asks 8            # peers that take seconds an ask do 8 of the 64
    python benchmarks/ask_latency.py --only tpe --parts latency,growth
    python benchmarks/ask_latency.py --stand-in random        # where a method of ours does not exist yet

`latency`  Mean and 95th percentile of one ask and tell, refits included, after warm-up, with so many trials told
           before: uniform points of a rotated ellipsoid in 10 real dims. Contenders take turns, ask by ask, in one
           process and with as many threads as they like. CPU time says more on a machine that is shared.
`first`    Seconds to the first ask in a fresh process, after the imports: init, compile, run, at default capacity.
`growth`   Traces while a history grows from 1 to 1,000 trials by hand, with `reserve` at every doubling.
`study`    A whole study of 1,000 trials as one program: compile and run time apart.
`vmap`     256 studies side by side: time for each of them.

Prints Markdown. A peer that is not installed is left out with a note.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import jaxhpo as hpo
from jaxhpo.method import black_box

DIMS, WARM_UP = 10, 2
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMS, DIMS)))[0]
AXES = np.logspace(0, 2, DIMS)
SPACE = hpo.Space({"x": hpo.Array(DIMS, 0.0, 1.0)})
SIZES = {"tpe": (100, 1000, 5000), "gp_ei": (100, 500, 1000)}
BATCH, BATCH_TOLD = 64, 1000
PARTS = ("latency", "first", "growth", "study", "vmap")
SLOW = ("Optuna GPSampler", "BoTorch")


def ellipsoid(x):
    """The loss at float[..., 10], NumPy or JAX."""
    return (((x - 0.35) @ TURN.astype(x.dtype)) ** 2 * AXES.astype(x.dtype)).sum(-1)


def history(told):
    return np.random.default_rng(told).uniform(size=(told, DIMS))


def builder(name, stand_in):
    """`hpo.<name>`, or what stands in for it, or `None`."""
    return getattr(hpo, name, None) or getattr(hpo, stand_in or "", None)


def label(name, build):
    return f"`{name}`" if build is getattr(hpo, name, None) else f"a stand-in for `{name}`"


# Contenders: functions of the number of trials told and the batch that return `step() -> None`, one round of ask and
# tell. The loss is a matter of microseconds and counts.


def ours(build, told, batch, room):
    method, key = build(SPACE, batch=batch), jax.random.key(0)
    ask = jax.jit(lambda round, state: method.ask(hpo.ask_key(key, round), state))
    tell = jax.jit(method.tell)
    state = method.reserve(method.init(hpo.ask_key(key)), told + room)
    unit = jnp.asarray(history(told), jnp.float32)
    row = method.ask(key, state)[0].aux
    aux = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (told, *x.shape[1:])), row)
    state = tell(state, black_box(SPACE, unit, jnp.int32(0), aux=aux), ellipsoid(unit))
    rounds = iter(range(sys.maxsize))

    def step():
        nonlocal state
        trials, state = ask(np.int32(next(rounds)), state)
        state = jax.block_until_ready(tell(state, trials, ellipsoid(np.asarray(trials.unit))))

    return step


def optuna_sampler(sampler, told, batch, room):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [f"x{i}" for i in range(DIMS)]
    uniform = dict.fromkeys(names, optuna.distributions.FloatDistribution(0.0, 1.0))
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=0))
    study.add_trials(
        optuna.trial.create_trial(
            params=dict(zip(names, map(float, x), strict=True)), distributions=uniform, value=float(ellipsoid(x))
        )
        for x in history(told)
    )

    def step():
        asked = []
        for _ in range(batch):
            trial = study.ask()
            asked.append((trial, np.array([trial.suggest_float(name, 0.0, 1.0) for name in names])))
        for trial, x in asked:
            study.tell(trial, float(ellipsoid(x)))

    return step


def botorch(told, batch, room):
    import torch
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    x = torch.tensor(history(told))
    y = torch.tensor(-ellipsoid(x.numpy())[:, None])
    bounds = torch.stack([torch.zeros(DIMS), torch.ones(DIMS)]).double()

    def step():
        nonlocal x, y
        model = SingleTaskGP(x, y, outcome_transform=Standardize(1))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        acquisition = LogExpectedImprovement(model, best_f=y.max())
        new, _ = optimize_acqf(acquisition, bounds=bounds, q=batch, num_restarts=10, raw_samples=512)
        x, y = torch.cat([x, new]), torch.cat([y, torch.tensor(-ellipsoid(new.numpy())[:, None])])

    return step


PEERS = {
    "tpe": {"Optuna TPESampler": ("optuna", functools.partial(optuna_sampler, "TPESampler"))},
    "gp_ei": {
        "Optuna GPSampler": ("torch", functools.partial(optuna_sampler, "GPSampler")),
        "BoTorch": ("botorch", botorch),
    },
}


@functools.cache
def importable(module):
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"not compared with {module}: {error}", file=sys.stderr)
        return False
    return True


def contenders(name, build):
    found = {label(name, build): functools.partial(ours, build)} if build else {}
    return found | {peer: make for peer, (module, make) in PEERS[name].items() if importable(module)}


def latency(name, build, told, batch, a):
    """Rows of the table of one method at one size."""
    asks = a.asks if batch == 1 else max(1, a.asks // 8)
    share = {peer: a.slow_asks if peer in SLOW else asks for peer in contenders(name, build)}
    room = (asks + WARM_UP) * batch
    steps = {peer: make(told, batch, room) for peer, make in contenders(name, build).items()}
    times = {peer: [] for peer in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for turn in range(asks):
        for peer, step in steps.items():
            if turn * share[peer] // asks == (turn - 1) * share[peer] // asks:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            times[peer].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows, first = [], None
    for peer, found in times.items():
        wall, cpu = 1e3 * np.array(found).T
        figures = (wall.mean(), np.percentile(wall, 95), cpu.mean())
        first = first or figures
        ratio = " | ".join(f"{theirs / mine:.3g}x" for mine, theirs in zip(first, figures, strict=True))
        what = f"{told}" + (f", batch {batch}" if batch > 1 else "")
        rows.append(f"| {peer} | {what} | {len(found)} | " + " | ".join(f"{x:.1f}" for x in figures) + f" | {ratio} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def first_ask(build):
    """Seconds that init and the first ask take; to be called in a fresh process."""
    begun = time.perf_counter()
    method, key = build(SPACE, batch=1), jax.random.key(0)
    state = jax.jit(method.init)(hpo.ask_key(key))
    jax.block_until_ready(jax.jit(method.ask)(hpo.ask_key(key, 0), state))
    return time.perf_counter() - begun


def fresh_first_ask(name, stand_in):
    command = [sys.executable, __file__, "--first-ask", name] + (["--stand-in", stand_in] if stand_in else [])
    begun = time.perf_counter()
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return answer, time.perf_counter() - begun


def growth(build, trials):
    """Traces of ask and of tell, and seconds in all, while a history grows by hand."""
    method, key, traces = build(SPACE, batch=1), jax.random.key(0), {"ask": 0, "tell": 0}

    def counted(which):
        def traced(*args):
            traces[which] += 1
            return getattr(method, which)(*args)

        return jax.jit(traced)

    ask, tell, begun = counted("ask"), counted("tell"), time.perf_counter()
    state, capacity = method.init(hpo.ask_key(key)), 1
    for told in range(trials):
        if told == capacity:
            capacity *= 2
            state = method.reserve(state, capacity)
        asked, state = ask(hpo.ask_key(key, told), state)
        state = tell(state, asked, ellipsoid(np.asarray(asked.unit)))
    jax.block_until_ready(state)
    return traces["ask"], traces["tell"], time.perf_counter() - begun


def compiled(function, *args):
    """`function` compiled, and the seconds that took."""
    begun = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - begun


def seconds(program, *args):
    begun = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - begun


def whole_study(build, trials):
    run = hpo.study(lambda key, h: ellipsoid(h["x"]), build(SPACE, batch=1), rounds=trials)
    program, compiling = compiled(run, jax.random.key(0))
    return compiling, seconds(program, jax.random.key(1))


def side_by_side(build, studies, trials):
    run = hpo.study(lambda key, h: ellipsoid(h["x"]), build(SPACE, batch=1), rounds=trials)
    alone, _ = compiled(run, jax.random.key(0))
    program, compiling = compiled(jax.vmap(run), jax.random.split(jax.random.key(0), studies))
    together = seconds(program, jax.random.split(jax.random.key(1), studies))
    return compiling, together / studies, seconds(alone, jax.random.key(1))


def version(module):
    return f"{module} {importlib.import_module(module).__version__}" if importable(module) else f"no {module}"


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--only", default="tpe,gp_ei")
    a.add_argument("--parts", default=",".join(PARTS))
    a.add_argument("--asks", type=int, default=64)
    a.add_argument("--slow-asks", type=int, default=None, help="asks of peers that take seconds each; all if not given")
    a.add_argument("--sizes", help="trials told before, such as 100,1000, instead of the usual ones")
    a.add_argument("--trials", type=int, default=1000, help="of `growth` and `study`")
    a.add_argument("--studies", type=int, default=256, help="of `vmap`, of 100 trials each")
    a.add_argument("--stand-in", help="method of ours to run where one does not exist")
    a.add_argument("--first-ask", help=argparse.SUPPRESS)
    a = a.parse_args()
    a.slow_asks = min(a.slow_asks or a.asks, a.asks)
    if a.first_ask:
        print(json.dumps(first_ask(builder(a.first_ask, a.stand_in))))
        return
    warnings.filterwarnings("ignore")
    names, parts = a.only.split(","), a.parts.split(",")
    builds = {name: builder(name, a.stand_in) for name in names}
    rows = {part: [] for part in PARTS}

    def add(part, row):
        rows[part].append(row)
        print(part, row, file=sys.stderr, flush=True)

    load = os.getloadavg()[0]
    for name, build in builds.items():
        if build is None:
            print(f"hpo.{name} does not exist; only its peers are run", file=sys.stderr)
        if "latency" in parts:
            sizes = [int(n) for n in a.sizes.split(",")] if a.sizes else SIZES[name]
            for told in sizes:
                rows["latency"] += latency(name, build, told, 1, a)
            if name == "tpe" and not a.sizes:
                rows["latency"] += latency(name, build, BATCH_TOLD, BATCH, a)
        if build is None:
            continue
        if "first" in parts:
            first, process = fresh_first_ask(name, a.stand_in)
            add("first", f"| {label(name, build)} | {first:.2f} | {process:.2f} |")
        if "growth" in parts:
            asks, tells, took = growth(build, a.trials)
            add("growth", f"| {label(name, build)} | {a.trials} | {asks} | {tells} | {took:.1f} |")
        if "study" in parts:
            compiling, running = whole_study(build, a.trials)
            add("study", f"| {label(name, build)} | {a.trials} | {compiling:.2f} | {running:.2f} |")
        if "vmap" in parts and name == "tpe":
            compiling, each, alone = side_by_side(build, a.studies, 100)
            figures = f"{compiling:.2f} | {1e3 * each:.1f} | {1e3 * alone:.1f}"
            add("vmap", f"| {label(name, build)} | {a.studies} x 100 trials | {figures} |")

    device = jax.devices()[0].device_kind
    print(
        f"{os.cpu_count()} cores, {device}, jax {jax.__version__}, {version('optuna')}, {version('botorch')}; load "
        f"{load:.1f} before, {os.getloadavg()[0]:.1f} after.\n"
    )
    heads = {
        "latency": ("", "told", "asks", "mean, ms", "p95, ms", "CPU, ms", "times ours: mean", "p95", "CPU"),
        "first": ("", "first ask, s", "whole process, s"),
        "growth": ("", "trials", "traces of ask", "of tell", "in all, s"),
        "study": ("one study", "trials", "compile, s", "run, s"),
        "vmap": ("", "studies", "compile, s", "each, ms", "one alone, ms"),
    }
    for part, head in heads.items():
        if rows[part]:
            print("\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows[part], ""]))


if __name__ == "__main__":
    main()
