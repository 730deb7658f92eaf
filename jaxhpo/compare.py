"""Every method on the same problem at the same cost, each several times as one program."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.checks import concrete_key, real, whole
from jaxhpo.comparison import Comparison, Runs
from jaxhpo.engine.external import External, check_external
from jaxhpo.engine.problem import check, check_call, check_slope
from jaxhpo.engine.progress import Bar
from jaxhpo.engine.repeats import Price, ask_seconds, run_repeats
from jaxhpo.gradient import Unrolled
from jaxhpo.method import Method
from jaxhpo.minimize import AllTrialsFailed, minimize
from jaxhpo.records import Records, recorded, refuse_minus_infinity
from jaxhpo.study import Trace
from jaxhpo.trainable import Trainable

PyTree = Any


class _Task(NamedTuple):
    """A problem, and what may be spent on it."""

    problem: Any
    budget: float
    unit: str
    price: Price

    def part(self, method: Method) -> Any:
        """What the method runs: the training itself where its trials carry steps."""
        return self.problem.trainable if isinstance(self.problem, Unrolled) and method.slots else self.problem


def compare(
    problem: Any,
    methods: Mapping[str, Method] | Sequence[Method],
    *,
    key: jax.Array,
    trials: int | None = None,
    steps: int | None = None,
    repeats: int = 10,
    gradient_cost: float = 4.0,
    lanes: int | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Runs every method several times on the same problem at the same cost.

    The repeats of a method are one program. Repeat `r` is the study of `minimize` with the key `fold_in(key, r)` and
    what the budget buys, up to rounding, so it may be looked into by itself; all methods have the same keys. Its
    warnings, such as of gradients that are not finite, are given there only.

    Methods of every kind are compared on training: give `unroll(trainable, steps)`, where `steps` is what a whole
    training is. Methods whose trials carry steps get the trainable itself, the others the unrolled objective, and what
    all of them spend is training steps.

    Args:
      problem: an objective `(key, hparams) -> loss`; one that `unroll` made; a `Trainable`, for methods whose trials
        carry steps; `external(fn)`, whose repeats run in its pool one after the other; or a dict of several problems
        by name, all on the space of the methods.
      methods: by name, or a sequence, whose names are those of the builders.
      key: PRNG key.
      trials: what each repeat may spend, in trials, at least 1; of unrolled training, in whole trainings.
      steps: what each repeat may spend, in training steps, where there is training. One of the two is given. A study
        ends with the round that reaches its budget, and nothing beyond it counts. A method that ends by itself, such as
        a grid, may spend less, which the table says.
      repeats: how many times each method runs, at least 1.
      gradient_cost: how many times as much a trial, or a step, costs with its derivative, from 1 to 100. Methods that
        use gradients get so many times fewer of them.
      lanes: how many trials of a repeat run side by side, at least 1; the method's batch if not given. Fewer need less
        memory: of all repeats as many training states are live. Not for `external`, which has workers.
      progress: whether to show a progress bar; on a terminal only if not given.

    Returns:
      A `Comparison`.

    Raises:
      ValueError, TypeError: an argument is wrong, or a method does not suit a problem, before anything runs; or a loss
        was -inf.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = {"x": hpo.Float(-5.0, 5.0)}
      >>> methods = {"wide": hpo.random(space, batch=8), "grid": hpo.grid(space, points=32, batch=8)}
      >>> comparison = hpo.compare(lambda key, h: abs(h["x"] - 1), methods, key=jax.random.key(0), trials=32, repeats=3)
      >>> name, hparams, loss = comparison.best()
      >>> len(comparison.runs["problem"][name].trials)
      3
    """
    key, repeats = concrete_key(key, "compare"), whole("repeats", repeats, 1)
    cost = real("gradient_cost", gradient_cost, 1.0, 100.0)
    named = _named(methods)
    problems = problem if isinstance(problem, Mapping) else {"problem": problem}
    if not problems:
        raise ValueError(f"problem must have at least one problem, got {problem!r}")
    tasks = {_name("problem", name): _task(value, trials, steps, cost) for name, value in problems.items()}
    for name, task in tasks.items():
        for label, method in named.items():
            with _noted(label, name):
                _check(task, label, method, lanes)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(repeats))
    runs: dict[str, dict[str, Runs]] = {}
    begun = time.perf_counter()
    with Bar("compare", progress) as bar:
        for i, (name, task) in enumerate(tasks.items()):
            runs[name] = {}
            for j, (label, method) in enumerate(named.items()):
                facts = f"{label} on {name}" if len(tasks) > 1 else label

                def show(share: float, done: int = i * len(named) + j, facts: str = facts) -> None:
                    used = (done + share) / (len(tasks) * len(named))
                    bar.draw(used, facts, time.perf_counter() - begun)

                show(0.0)
                run = _external if isinstance(task.problem, External) else _device
                with _noted(label, name):
                    runs[name][label] = run(task, method, keys, lanes, show)
    return Comparison(runs, {n: t.budget for n, t in tasks.items()}, {n: t.unit for n, t in tasks.items()})


@contextlib.contextmanager
def _noted(method: str, problem: str) -> Iterator[None]:
    """Errors say which method on which problem they came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This came up in {method!r} on {problem!r}.")
        raise


def _named(methods: Any) -> dict[str, Method]:
    if isinstance(methods, Method | str) or not isinstance(methods, Mapping | Sequence):
        given = f"the method '{methods.name}'" if isinstance(methods, Method) else repr(methods)
        raise TypeError(f"methods must be a list or a dict of methods, got {given}; put it in a list")
    pairs = list(methods.items()) if isinstance(methods, Mapping) else [(getattr(m, "name", ""), m) for m in methods]
    if not pairs:
        raise ValueError("methods must have at least one method, got none")
    named: dict[str, Method] = {}
    for name, method in pairs:
        check_call(method, None, None)
        if name in named:
            raise ValueError(f"methods has two called {name!r}; give a dict with a name for each")
        named[_name("methods", name)] = method
    return named


def _name(what: str, name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"names in {what} must be strings, got {name!r}")
    return name


def _task(problem: Any, trials: int | None, steps: int | None, gradient_cost: float) -> _Task:
    if (trials is None) == (steps is None):
        raise ValueError(f"give one of trials and steps, got trials={trials!r} and steps={steps!r}")
    given = whole("trials", trials, 1) if steps is None else whole("steps", steps, 1)
    if isinstance(problem, Unrolled):
        budget = given * problem.steps if steps is None else given
        return _Task(problem, budget, "training steps", Price(problem.steps, gradient_cost))
    if isinstance(problem, Trainable):
        if steps is None:
            raise ValueError(
                f"trials={trials} was given, but trials of a Trainable may differ in length; give steps, or say what a "
                "whole training is: hpo.unroll(trainable, steps=500)"
            )
        return _Task(problem, given, "training steps", Price(1, gradient_cost))
    if trials is None:
        raise ValueError(f"steps={steps} was given, but problem={problem!r} does not train in steps; give trials")
    return _Task(problem, given, "trials", Price(1, gradient_cost))


def _check(task: _Task, name: str, method: Method, lanes: int | None) -> None:
    if isinstance(task.problem, External):
        check_external(method)
        if lanes is not None:
            raise ValueError(f"lanes={lanes} is for JAX problems; an external function has its own workers")
    else:
        check(task.part(method), method, lanes=lanes)
        if method.uses_gradients and not method.slots:
            check_slope(task.part(method), method)
    if not method.slots and task.price.one(method) > task.budget:
        raise ValueError(
            f"the budget of {task.budget:g} {task.unit} is below what one trial of {name!r} costs, "
            f"{task.price.one(method):g}; raise trials or steps, or leave out the method"
        )


def _device(task: _Task, method: Method, keys: jax.Array, lanes: int | None, show: Callable[[float], None]) -> Runs:
    timed = run_repeats(task.part(method), method, keys, task.budget, task.price, lanes=lanes, report=show)
    cost = task.price.of(method, timed.trace.trials)
    parts: list[tuple[Records, np.ndarray]] = []
    used = np.zeros(2)
    for r in range(len(keys)):
        spent = np.cumsum(cost[:, r].sum(-1))
        rounds = min(int(np.searchsorted(spent, task.budget - 1e-9)) + 1, len(spent))
        trace: Trace = jax.tree.map(lambda x: x[:rounds, r], timed.trace)  # noqa: B023
        records = recorded(trace, 0)
        refuse_minus_infinity(method.space, records)
        parts.append((records, np.cumsum(cost[:rounds, r][trace.trials.active])))
        used += _lane_steps(trace, min(lanes or method.batch, method.batch))
    asks = timed.trace.losses.shape[0] * len(keys)
    ran = int((np.where(timed.trace.trials.active, timed.trace.trials.id, -1).max((0, 2)) + 1).sum())
    return Runs(
        space=method.space,
        trials=tuple(records for records, _ in parts),
        cost=tuple(spent for _, spent in parts),
        lanes_used=float(used[0] / max(used[1], 1)),
        ask_seconds=timed.ask_seconds / asks,
        trial_seconds=timed.seconds / max(ran, 1),
        seconds=timed.seconds,
        compile_seconds=timed.compile_seconds,
        errors=({},) * len(keys),
    )


def _lane_steps(trace: Trace, lanes: int) -> np.ndarray:
    """f64[2]: steps of all trials together, and of all lanes that there was time for."""
    active, steps = trace.trials.active, np.maximum(trace.trials.steps, 1)
    length = np.where(active, steps, 0)
    width = np.ceil(active.sum(-1) / lanes) * lanes
    return np.array([length.sum(), (width * length.max(-1)).sum()])


def _external(task: _Task, method: Method, keys: jax.Array, lanes: int | None, show: Callable[[float], None]) -> Runs:
    del lanes
    found, errors, seconds = [], [], 0.0
    for r, key in enumerate(keys):
        try:
            result = minimize(task.problem, method, key=key, trials=int(task.budget), progress=False)
        except AllTrialsFailed as error:
            result = error.result
        found.append(result.trials)
        errors.append(result.errors)
        seconds += result.seconds
        show((r + 1) / len(keys))
    rounds = max(int(records.round.max()) + 1 for records in found)
    losses = np.full((rounds, len(keys), method.batch), np.nan, found[0].loss.dtype)
    for r, records in enumerate(found):
        place = np.arange(len(records.round)) - np.searchsorted(records.round, records.round)
        losses[records.round, r, place] = records.loss
    ran = sum(records.size for records in found)
    return Runs(
        space=method.space,
        trials=tuple(found),
        cost=tuple(np.arange(1.0, len(records.loss) + 1) for records in found),
        lanes_used=sum(len(records.loss) for records in found) / losses.size,
        ask_seconds=ask_seconds(method, keys, losses) / (rounds * len(keys)),
        trial_seconds=seconds / max(ran, 1),
        seconds=seconds,
        compile_seconds=0.0,
        errors=tuple(errors),
    )
