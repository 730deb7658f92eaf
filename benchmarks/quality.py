"""How good the optima are that methods find on a suite of problems: best-so-far curves as rows of JSON.

A suite is a Python file with `SUITES`, a dict of functions that return a list of `(name, space, fn)`: space is a list
of `(name, "float" | "int", low, high, log)` or `(name, "cat", options)`, fn takes a dict and returns a float, lower is
better. A row is {"problem", "peer", "seed", "best": [best so far at every checkpoint]}.
"""

import importlib.util
import json
import time
from pathlib import Path

import jax
import numpy as np

import jaxhpo as hpo


def load_suite(path, name):
    """The problems of the suite `name` in the Python file `path`."""
    spec = importlib.util.spec_from_file_location("suite", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SUITES[name]()


def tree_of(space):
    """The search space of a problem."""
    kinds = {"float": hpo.Float, "int": hpo.Int}
    return {
        name: hpo.Categorical(tuple(rest[0])) if kind == "cat" else kinds[kind](rest[0], rest[1], log=rest[2])
        for name, kind, *rest in space
    }


class Runner:
    """Runs methods by hand on functions of the host; what is alike in two problems is compiled once."""

    def __init__(self):
        self.jitted = {}

    def _jit(self, function):
        return self.jitted.setdefault(function, jax.jit(function))

    def curve(self, build, problem, seed, evaluations, every):
        """Best-so-far after each `every` of `evaluations`; `build(space)` gives the method."""
        _, space, fn = problem
        method, key = build(hpo.Space(tree_of(space))), jax.random.key(seed)
        options = {name: rest[0] for name, kind, *rest in space if kind == "cat"}
        init, ask, tell = (self._jit(f) for f in (method.init, method.ask, method.tell))
        state = method.reserve(init(hpo.ask_key(key)), evaluations)
        seen = []
        for round in range(10**9):
            trials, state = ask(hpo.ask_key(key, round), state)
            hparams = jax.device_get(trials.hparams)
            columns = {name: hparams[name].tolist() for name, *_ in space}
            for name, values in options.items():
                if isinstance(values[0], str):
                    columns[name] = [values[i] for i in columns[name]]
            active = int(trials.active.sum())
            rows = [{name: column[i] for name, column in columns.items()} for i in range(active)]
            losses = [fn(row) for row in rows]
            seen += losses
            if len(seen) >= evaluations or not active:
                break
            losses += [np.nan] * (method.batch - active)
            state = tell(state, trials, np.asarray(losses, trials.unit.dtype))
        best = np.minimum.accumulate(np.where(np.isfinite(seen), seen, np.inf))
        return [float(best[min(k, len(best)) - 1]) for k in range(every, evaluations + 1, every)]


def record(problems, methods, seeds, evaluations, every, out):
    """Appends a row for every problem, method and seed to the file `out`; `methods` is {name: build}."""
    runner = Runner()
    with Path(out).open("a") as file:
        for name, build in methods.items():
            began = time.perf_counter()
            for problem in problems:
                for seed in range(seeds):
                    best = [round(value, 6) for value in runner.curve(build, problem, seed, evaluations, every)]
                    row = {"problem": problem[0], "peer": f"jaxhpo-{name}", "seed": seed, "best": best}
                    file.write(json.dumps(row) + "\n")
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
