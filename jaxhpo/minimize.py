"""The shell around a study: budgets, progress, checkpoints, and what the user gets back."""

import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxhpo.checks import concrete_key, whole
from jaxhpo.engine.budget import Budget, Tally, ends, read_budget
from jaxhpo.engine.checkpoint import Directory, describe
from jaxhpo.engine.device import Device
from jaxhpo.engine.digest import canonical, digest
from jaxhpo.engine.external import External, Host
from jaxhpo.engine.problem import check, check_call
from jaxhpo.engine.processes import Alone, Together, processes_of
from jaxhpo.engine.progress import Bar, Report, share
from jaxhpo.gradient import Unrolled, find_nonfinite
from jaxhpo.method import Method
from jaxhpo.records import Records, joined, recorded, refuse_minus_infinity
from jaxhpo.result import Result
from jaxhpo.space import Space, working_dtype
from jaxhpo.study import Initial, read_initial
from jaxhpo.trainable import Trainable, repeated

PyTree = Any
EXPLODED = 1e4
REMEDY = (
    "unroll fewer steps, let the derivative go back only a part of them (hpo.unroll with adjoint=hpo.Truncated(k)), or "
    "give the Adam that trains an eps_root such as 1e-8, without which the slope of its square root is infinite at 0"
)


class AllTrialsFailed(RuntimeError):
    """Not one trial had a finite loss; `result` holds what they were."""

    def __init__(self, message: str, result: Result):
        super().__init__(message)
        self.result = result


def minimize(
    problem: Callable | Trainable | External,
    method: Method,
    *,
    key: jax.Array,
    trials: int | None = None,
    steps: int | None = None,
    rounds: int | None = None,
    repeats: int = 1,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    directory: str | os.PathLike | None = None,
    initial: Sequence | None = None,
    target: float | None = None,
    time_limit: float | None = None,
    patience: int | None = None,
    callbacks: Callable[[Report], Any] | Sequence[Callable[[Report], Any]] = (),
    progress: bool | None = None,
) -> Result:
    """Searches for the hyperparameters with the lowest loss.

    The result is a function of the arguments alone, bit for bit, unless `time_limit` or a callback ends the study. It
    depends neither on `lanes` nor on `mesh`, nor on whether it was killed and resumed.

    Args:
      problem: an objective `(key, hparams) -> loss`; a `Trainable`, where the method's trials carry steps; or
        `external(fn)`.
      method: how to search.
      key: the study's PRNG key.
      trials: budget of trials, at least 1. This and the other two budgets end the study after the round that
        reaches them.
      steps: budget of training steps of all trials together.
      rounds: budget of asks.
      repeats: how many times each trial is run, with keys of its own; the mean of the losses is told.
      lanes: how many trials run side by side, at least 1; the method's batch if not given. Fewer need less memory.
      mesh: devices over which the lanes are spread: `jax.make_mesh((8,), ("lanes",))`. They may be those of several
        processes, on several hosts, after `jax.distributed.initialize(...)` in each: all of them call `minimize` with
        the same arguments and get the same `Result`. The first one alone reads and writes `directory`, looks at
        its clock for `time_limit`, calls the callbacks and shows progress. If one of them dies, the others end with an
        error: on CPUs at their next exchange, on GPUs when `heartbeat_timeout_seconds` of `initialize` (100 if not
        given) have passed, and then wait at most `shutdown_timeout_seconds` (300) at exit. Start them again, or fewer
        of them, with the same `directory`.
      directory: where to keep checkpoints. A study that is there already is resumed; the data and the code of the
        problem are not compared.
      initial: points of native Python values, which take the place of the method's first ones, or `(point, loss)`
        pairs of known results, which it is told. One list may have both. One number stands for all entries of an
        `Array`.
      target: a loss to stop at.
      time_limit: seconds after which to stop, seen between two chunks of rounds.
      patience: trials without a lower loss after which to stop.
      callbacks: called with a `Report` after each chunk of rounds; one that returns True ends the study.
      progress: whether to show a progress bar; on a terminal only if not given.

    Returns:
      A `Result`.

    Raises:
      ValueError, TypeError: an argument is wrong; the message has its name, its value and the remedy.
      AllTrialsFailed: no trial had a finite loss.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = {"x": hpo.Float(-5, 5), "y": hpo.Int(0, 3)}
      >>> loss = lambda key, h: h["x"] ** 2 + h["y"]
      >>> result = hpo.minimize(loss, hpo.random(space, batch=16), key=jax.random.key(0), trials=256)
      >>> result.best_hparams["y"], len(result.trials.id)
      (0, 256)
    """
    started = time.perf_counter()
    key, repeats = concrete_key(key, "minimize"), whole("repeats", repeats, 1)
    if isinstance(problem, External):
        check_call(method, lanes, mesh)
        if isinstance(processes_of(mesh), Together):
            raise ValueError("mesh has devices of several processes, but an external function has its own workers")
        if repeats > 1:
            raise ValueError(f"repeats={repeats} is for JAX problems; average inside the external function")
    else:
        if isinstance(problem, Trainable) or callable(problem):
            problem = repeated(problem, repeats) if repeats > 1 else problem
        check(problem, method, lanes=lanes, mesh=mesh)
    callbacks = (callbacks,) if callable(callbacks) else tuple(callbacks)
    budget = read_budget(method, trials, steps, rounds, target, patience, time_limit)
    given = read_initial(method, initial)
    processes, store = processes_of(mesh), None
    described = functools.partial(describe, method, key, given, repeats, problem)
    # How much time is left may differ, the clock of the first process counts.
    call = {
        "budget": budget._replace(time_limit=0),
        "lanes": lanes,
        "directory": directory is None,
        "callbacks": len(callbacks),
    }
    processes.check_alike(lambda: described() | {name: digest(canonical(value)) for name, value in call.items()})
    if directory is not None:
        store = processes.once(lambda: Directory(directory, described()))
    driver: Device | Host
    if isinstance(problem, External):
        driver = Host(problem, method, key, budget, initial=given, journal=store.journal if store else None)
    else:
        driver = Device(problem, method, key, budget, lanes=lanes, mesh=mesh, initial=given)
    try:
        result = _Shell(driver, method, budget, given, store, callbacks, processes, started).run(progress)
    except AllTrialsFailed as error:
        culprit = _culprit(problem, method, key, error.result.trials)
        raise AllTrialsFailed(f"{error}; {culprit}" if culprit else str(error), error.result) from None
    finally:
        driver.close()
    _warn_of_gradients(result.trials, functools.partial(_culprit, problem, method, key, result.trials))
    return result


class _Shell:
    """One call of `minimize`."""

    def __init__(
        self,
        driver: Device | Host,
        method: Method,
        budget: Budget,
        initial: Initial | None,
        store: Directory | None,
        callbacks: Sequence[Callable],
        processes: Alone,
        started: float,
    ):
        self.driver, self.method, self.budget, self.store, self.callbacks = driver, method, budget, store, callbacks
        self.processes, self.started = processes, started
        self.tally = Tally()
        self.parts: list[Records] = []
        if initial is not None and len(initial.known_losses):
            self.parts = [_known(initial)]
            finite = initial.known_losses[np.isfinite(initial.known_losses)]
            self.tally = Tally(best=float(np.min(finite, initial=math.inf)))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def run(self, progress: bool | None) -> Result:
        self._resume()
        stopped = self.processes.once(self._ends)
        with Bar(self.method.name, progress if self.processes.first else False) as bar:
            while stopped is None:
                before, begun = self.tally, self.seconds
                trace, self.tally = self.driver.advance(self.tally, self.budget.time_limit - self.seconds)
                self.parts.append(recorded(trace, before.rounds))
                refuse_minus_infinity(self.method.space, self.parts[-1])
                stopped, is_due = self.processes.once(lambda: (self._ends(), self._is_due()))
                if self.store and isinstance(self.driver, Device) and (stopped or is_due):
                    self._save(self.store)
                report = self._report()
                if self.processes.once(functools.partial(self._call, report)):
                    stopped = stopped or "callback"
                done = self.tally.steps - before.steps or self.tally.trials - before.trials
                bar.show(share(self.budget, self.tally, self.seconds), report, done / max(self.seconds - begun, 1e-9))
        return self._result(stopped)

    def _ends(self) -> str | None:
        return ends(self.method, self.budget, self.tally, self.seconds)

    def _is_due(self) -> bool:
        return self.store is not None and self.store.due(time.monotonic())

    def _call(self, report: Report) -> bool:
        return any([callback(report) is True for callback in self.callbacks])

    def _resume(self) -> None:
        if not self.store or not isinstance(self.driver, Device):
            return
        content = self.processes.once(self.store.load)
        if content is None:
            return
        self.driver.load(_unpacked(content["study"], self.driver.save()))
        rounds, trials, steps, best, improved = _unpacked(content["tally"], list(self.tally))
        self.tally = Tally(int(rounds), int(trials), int(steps), float(best), int(improved))
        leaves, shape = jax.tree.flatten(_blank(self.method.space))
        self.parts = [jax.tree.unflatten(shape, _unpacked(content["records"], leaves))]

    def _save(self, store: Directory) -> None:
        assert isinstance(self.driver, Device)
        self.parts = [joined(self.parts)]
        content = {
            "study": _packed(self.driver.save()),
            "tally": _packed(self.tally),
            "records": _packed(jax.tree.leaves(self.parts[0])),
        }
        self.processes.once(lambda: store.save(self.tally.rounds, content))

    def _report(self) -> Report:
        hparams = None
        if self.callbacks and math.isfinite(self.tally.best):
            self.parts = [joined(self.parts)]
            hparams = self.method.space.native(self.parts[0].hparams, int(self.parts[0].best(1)[0]))
        t = self.tally
        return Report(t.trials, t.steps, t.rounds, t.best, hparams, self.seconds)

    def _result(self, stopped: str) -> Result:
        records = joined(self.parts) if self.parts else _blank(self.method.space)
        best = records.best(1)
        seconds, compile_seconds = self.processes.agree((self.seconds, self.driver.compile_seconds))
        result = Result(
            space=self.method.space,
            trials=records,
            best_hparams=self.method.space.native(records.hparams, int(best[0])) if len(best) else None,
            best_loss=float(records.loss[best[0]]) if len(best) else math.nan,
            best_state=self.driver.best_state() if len(best) and records.round[best[0]] >= 0 else None,
            errors=self.driver.errors if isinstance(self.driver, Host) else {},
            stopped=stopped,
            seconds=seconds,
            compile_seconds=compile_seconds,
            method_state=self.driver.method_state(),
        )
        if not len(best):
            why = next(iter(result.errors.values()), "every loss was NaN or infinite")
            if records.soft is not None and records.soft.any():
                why = "every finite loss was that of soft weights, which are no choice: run until they are one option"
            if not self.tally.trials:
                raise AllTrialsFailed(f"no trial ended before time_limit={self.budget.time_limit}; raise it", result)
            raise AllTrialsFailed(
                f"all {self.tally.trials} trials of '{self.method.name}' failed ({why}); try one of them by hand, they "
                "are in this error's .result",
                result,
            )
        return result


def _culprit(problem: Any, method: Method, key: jax.Array, records: Records) -> str:
    """What was not finite in the first trial of unrolled training that failed, or whose gradient did; else ""."""
    norms = np.zeros(len(records.id)) if records.gradient_norm is None else records.gradient_norm
    rows = np.flatnonzero((records.failed | np.isinf(norms)) & (records.round >= 0))
    if not isinstance(problem, Unrolled) or not len(rows):
        return ""
    row, trials_key = rows[0], jax.random.split(key)[1]
    hparams = method.space.fill(jax.tree.map(lambda x: jax.numpy.asarray(x[row]), records.hparams))
    try:
        found = find_nonfinite(problem, hparams, key=jax.random.fold_in(trials_key, records.id[row]))
    except (TypeError, jax.errors.JaxRuntimeError):  # no float to look along, or no memory for the way back
        return ""
    return f"in trial {records.id[row]}, {found}" if found else ""


def _warn_of_gradients(records: Records, culprit: Callable[[], str]) -> None:
    """Warns of gradients that are of no use, and of descents that left the numbers that are finite."""
    if records.gradient_norm is None:
        return
    norms, losses = records.gradient_norm[~records.failed], records.loss[~records.failed]
    if np.isnan(norms).all():
        return
    lost, failed = int(np.isinf(norms).sum()), int(records.failed.sum())
    where = culprit() if lost or failed else ""
    if lost or where:
        counts = [
            f"{lost} of {len(losses)} trials had a finite loss but a gradient that is NaN or infinite" * bool(lost),
            f"{failed} of {len(records.loss)} trials had no finite loss" * bool(failed),
            where,
        ]
        warnings.warn("; ".join([*filter(None, counts), REMEDY]), stacklevel=3)
        return
    # In the unit cube a slope as large as the losses goes through all of them from one end of a parameter to the other.
    steep = np.nanmax(norms) / max(float(np.ptp(losses) + np.median(np.abs(losses))), np.finfo(losses.dtype).tiny)
    if steep > EXPLODED:
        warnings.warn(
            f"gradients explode: the largest is {np.nanmax(norms):.3g} by the unit cube, {steep:.2g} times the range "
            f"of the losses; {REMEDY}",
            stacklevel=3,
        )


def _packed(leaves: Sequence) -> dict[str, np.ndarray]:
    """Arrays by name, as orbax takes them: without those that are empty."""
    return {f"{i:05}": np.asarray(x) for i, x in enumerate(leaves) if np.size(x)}


def _unpacked(content: dict[str, np.ndarray], template: Sequence) -> list[np.ndarray]:
    """The inverse of `_packed`; `template` has the empty arrays."""
    return [np.asarray(content.get(f"{i:05}", x)) for i, x in enumerate(template)]


def _blank(space: Space) -> Records:
    trials = jax.eval_shape(lambda: space.decode(jax.numpy.zeros((0, space.dims))))
    empty = np.zeros(0, np.int32)
    hparams = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), trials)
    dtype = working_dtype()
    none = np.zeros(0, dtype)
    return Records(empty, empty, np.zeros((0, space.dims), dtype), hparams, empty, none, empty, none, empty > 0)


def _known(initial: Initial) -> Records:
    n = len(initial.known_losses)
    rows = np.arange(n, dtype=np.int32)
    losses = initial.known_losses.astype(initial.known_unit.dtype)
    none = np.full(n, -1, np.int32)
    unknown, hard = np.full(n, np.nan, losses.dtype), np.zeros(n, bool)
    return Records(none, -1 - rows, initial.known_unit, initial.known_hparams, 0 * rows, losses, none, unknown, hard)
