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
from jaxhpo.method import INIT_ROUND, bare


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


round_keys = jax.jit(jax.vmap(hpo.ask_key, in_axes=(0, None)))


class Runner:
    """Runs methods on functions of the host, all seeds of a problem as one program that equal problems share."""

    def __init__(self):
        self.jitted = {}

    def _batched(self, method, capacity):
        """`init` with room for `capacity` trials, `ask` and `tell`, with a leading axis of seeds; counts have none."""
        key = method.ask, capacity
        if key not in self.jitted:
            along = hpo.axes(jax.eval_shape(method.init, jax.random.key(0)))
            begin = lambda key, settings: method.reserve(bare(method.init)(key, settings), capacity)  # noqa: E731
            self.jitted[key] = (
                jax.jit(jax.vmap(begin, in_axes=(0, None), out_axes=along)),
                jax.jit(jax.vmap(method.ask, in_axes=(0, along), out_axes=(0, along))),
                jax.jit(jax.vmap(method.tell, in_axes=(along, 0, 0), out_axes=along)),
            )
        return self.jitted[key]

    def curves(self, build, problem, seeds, evaluations, every):
        """Best-so-far of every seed after each `every` of `evaluations`; `build(space)` gives the method.

        Seed s is the study of `jax.random.key(s)`. Rows that an ask has beyond `evaluations` do not count.
        """
        _, space, fn = problem
        method = build(hpo.Space(tree_of(space)))
        init, ask, tell = self._batched(method, evaluations)
        keys = jax.vmap(jax.random.key)(np.arange(seeds))
        state = init(round_keys(keys, INIT_ROUND), method.settings)
        options = {name: rest[0] for name, kind, *rest in space if kind == "cat"}
        seen = [[] for _ in range(seeds)]
        for round in range(10**9):
            trials, state = ask(round_keys(keys, round), state)
            hparams, active = jax.device_get((trials.hparams, trials.active))
            columns = {name: hparams[name].reshape(-1).tolist() for name, *_ in space}
            for name, values in options.items():
                if isinstance(values[0], str):
                    columns[name] = [values[i] for i in columns[name]]
            losses = np.full(active.shape, np.nan)
            for i in np.flatnonzero(active):
                losses.flat[i] = fn({name: column[i] for name, column in columns.items()})
            for row, on, told in zip(seen, active, losses, strict=True):
                row += told[on].tolist()
            if min(map(len, seen)) >= evaluations or not active.any():
                break
            state = tell(state, trials, losses.astype(trials.unit.dtype))
        marks = range(every, evaluations + 1, every)
        best = [np.minimum.accumulate(np.where(np.isfinite(row), row, np.inf)) for row in seen]
        return [[float(b[min(k, len(b)) - 1]) for k in marks] for b in best]


def record(problems, methods, seeds, evaluations, every, out):
    """Appends a row for every problem, method and seed to the file `out`; `methods` is {name: build}."""
    runner = Runner()
    with Path(out).open("a") as file:
        for name, build in methods.items():
            began = time.perf_counter()
            for problem in problems:
                for seed, best in enumerate(runner.curves(build, problem, seeds, evaluations, every)):
                    best = [round(value, 6) for value in best]
                    row = {"problem": problem[0], "peer": f"jaxhpo-{name}", "seed": seed, "best": best}
                    file.write(json.dumps(row) + "\n")
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
