"""Problems that are not JAX: any Python function, evaluated in a pool of processes or threads."""

import concurrent.futures as futures
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pickle
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.checks import whole
from jaxhpo.engine.budget import OPEN_GROWTH, OPEN_ROWS, Budget, Tally, begin, capacity, proceed
from jaxhpo.method import Method, Trials, ask_key
from jaxhpo.study import Initial, Trace, begin_with, first_state

PyTree = Any


@dataclasses.dataclass(frozen=True)
class External:
    """A function to be evaluated outside JAX; made by `external`."""

    fn: Callable
    workers: int
    pool: str


def external(fn: Callable, workers: int = 1, pool: Literal["process", "thread"] = "process") -> External:
    """Any Python function as a problem for `minimize`.

    Trials are told in the order of their ids, and what an ask knows depends on the number of workers only, so the
    result does not depend on timing. An exception makes a failed trial; its text is in `Result.errors`.

    Args:
      fn: hyperparameters as native Python values, in the shape of the space -> loss, lower is better.
      workers: evaluations at the same time, at least 1.
      pool: "process" for spawned processes, for which `fn` must be importable, or "thread".

    Raises:
      ValueError, TypeError: `fn` cannot be sent to a process, or a value is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> sphere = hpo.external(lambda h: h["x"] ** 2, workers=2, pool="thread")
      >>> hpo.minimize(sphere, hpo.random({"x": hpo.Float(-1, 1)}), key=jax.random.key(0), trials=32).best_loss < 0.1
      True
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of one dict, got {fn!r}")
    if pool not in ("process", "thread"):
        raise ValueError(f"pool must be 'process' or 'thread', got {pool!r}")
    if pool == "process":
        try:
            pickle.dumps(fn)
        except Exception as error:
            raise ValueError(
                f"fn={fn!r} cannot be sent to another process ({error}); define it at the top level of a module, or "
                "say pool='thread'"
            ) from error
    return External(fn, whole("workers", workers, 1), pool)


def check_external(method: Method) -> None:
    """Sees that a method can search a problem that is not JAX.

    Raises:
      TypeError: it cannot.
    """
    if method.slots or method.uses_gradients:
        raise TypeError(
            f"problem is external, but '{method.name}' trains in stretches or needs gradients; use hpo.random"
        )


class Outcome(NamedTuple):
    """What came of one evaluation."""

    loss: float
    error: str | None = None


def _outcome(future: futures.Future) -> Outcome | None:
    """What came of an evaluation, `None` where its process died."""
    try:
        return Outcome(float(future.result()))
    except (BrokenProcessPool, futures.CancelledError):
        return None
    except (Exception, SystemExit) as error:
        return Outcome(math.nan, f"{type(error).__name__}: {error}")


class _Workers:
    """A pool that outlives the death of a worker: what ran then is run again, each alone.

    It is sent the user's function itself, so a process imports JAX only if that function does.
    """

    def __init__(self, problem: External):
        self.problem = problem
        self.pool: Any = None
        self.sound = False

    def _executor(self) -> Any:
        if self.pool is None:
            if self.problem.pool == "thread":
                self.pool = futures.ThreadPoolExecutor(self.problem.workers)
            else:
                spawn = multiprocessing.get_context("spawn")
                self.pool = futures.ProcessPoolExecutor(self.problem.workers, mp_context=spawn)
        return self.pool

    def submit(self, hparams: PyTree) -> futures.Future:
        try:
            return self._executor().submit(self.problem.fn, hparams)
        except BrokenProcessPool:
            self.pool = None
            return self._executor().submit(self.problem.fn, hparams)

    def again_alone(self, hparams: PyTree) -> Outcome:
        """Evaluates once more, in a process of its own.

        Raises:
          RuntimeError: no process can be started at all.
        """
        spawn = multiprocessing.get_context("spawn")
        if not self.sound:
            with futures.ProcessPoolExecutor(1, mp_context=spawn) as probe:
                self.sound = _outcome(probe.submit(abs, 0)) is not None
        if not self.sound:
            raise RuntimeError(
                "the worker processes die as they start; in a script, call hpo.minimize below "
                "`if __name__ == '__main__':`, since each worker imports the script, or say external(fn, pool='thread')"
            )
        with futures.ProcessPoolExecutor(1, mp_context=spawn) as alone:
            return _outcome(alone.submit(self.problem.fn, hparams)) or Outcome(
                math.nan, "the worker process died, or what it raised cannot be unpickled"
            )

    def close(self) -> None:
        if self.pool is not None:
            for process in list((getattr(self.pool, "_processes", None) or {}).values()):
                process.terminate()
            self.pool.shutdown(wait=False, cancel_futures=True)


class Journal:
    """Outcomes on disk, one line each, written before they are told; found again by trial and point."""

    def __init__(self, path: Path | None):
        self.path, self.lock = path, threading.Lock()
        self.outcomes: dict[tuple[int, int], Outcome] = {}
        if path is not None and path.exists():
            text = path.read_text()
            for line in text.splitlines():
                # The last line may have been cut off by a kill.
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    trial = int(entry["id"]), int(entry["point"])
                    self.outcomes[trial] = Outcome(float(entry["loss"]), entry["error"])
            if text and not text.endswith("\n"):
                self._write("\n")

    def add(self, trial: tuple[int, int], outcome: Outcome) -> None:
        """Writes down what came of a trial; any thread may call it."""
        with self.lock:
            if trial not in self.outcomes:
                self.outcomes[trial] = outcome
                entry = {"id": trial[0], "point": trial[1], "loss": outcome.loss, "error": outcome.error}
                self._write(json.dumps(entry) + "\n")

    def _write(self, text: str) -> None:
        if self.path is None:
            return
        try:
            with open(self.path, "a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            warnings.warn(f"{self.path} could not be written ({error}); the study goes on", stacklevel=2)


def _trials(host: Trials) -> list[tuple[int, int]]:
    """What tells the rows of an ask from any other: id and checksum of the point."""
    return [(id, zlib.crc32(unit.tobytes())) for id, unit in zip(host.id.tolist(), host.unit, strict=True)]


class Host:
    """Drives a study whose problem is any Python function.

    Up to `ahead` rounds are asked for before the oldest of them is told; those are `pending` in the next ask. With one
    worker nothing is pending, and the study is the one that a loop by hand gives.
    """

    def __init__(
        self,
        problem: External,
        method: Method,
        key: jax.Array,
        budget: Budget,
        *,
        initial: Initial | None,
        journal: Path | None,
    ):
        check_external(method)
        self.method, self.key, self.budget, self.initial = method, key, budget, initial
        self.workers, self.journal = _Workers(problem), Journal(journal)
        self.ahead = 0 if problem.workers == 1 else math.ceil(2 * problem.workers / method.batch)
        self.errors: dict[int, str] = {}
        self.compile_seconds = 0.0
        self.ask, self.tell = jax.jit(method.ask), jax.jit(method.tell)
        self.asked: list[tuple[Trials, dict[futures.Future, int]]] = []
        rows = capacity(method, budget, initial)
        self.known = initial.known_rows(method.batch) if initial else 0
        self.open, self.room = rows is None, OPEN_ROWS if rows is None else rows
        self.state = first_state(method, key, method.settings, self.room, initial)
        self.rounds = 0
        empty = jax.eval_shape(lambda s: method.ask(key, s)[0], self.state)
        self.blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)._replace(
            id=jnp.full(method.batch, -1, jnp.int32)
        )

    def _submit(self) -> None:
        pending = [trials for trials, _ in self.asked]
        args: tuple = ()
        if self.ahead:
            pending = [self.blank] * (self.ahead - len(pending)) + pending
            args = (jax.tree.map(lambda *x: jnp.concatenate(x), *pending),)
        trials, self.state = self.ask(ask_key(self.key, self.rounds), self.state, *args)
        if self.initial is not None and len(self.initial.unit):
            trials = begin_with(self.initial, trials)
        self.rounds += 1
        host = jax.device_get(trials)
        running: dict[futures.Future, int] = {}
        for i, trial in enumerate(_trials(host)):
            if host.active[i] and trial not in self.journal.outcomes:
                future = self.workers.submit(self.method.space.native(host.hparams, i))
                future.add_done_callback(functools.partial(self._write_down, trial))
                running[future] = i
        self.asked.append((trials, running))

    def _write_down(self, trial: tuple[int, int], future: futures.Future) -> None:
        with contextlib.suppress(BaseException):  # `_collect` sees it again, where it can be raised
            outcome = _outcome(future)
            if outcome is not None:
                self.journal.add(trial, outcome)

    def _collect(self, host: Trials, running: dict[futures.Future, int], seconds_left: float) -> None:
        with contextlib.suppress(futures.TimeoutError):
            for future in futures.as_completed(running, None if seconds_left == math.inf else max(seconds_left, 0)):
                row = running[future]
                outcome = _outcome(future)
                if outcome is None:
                    outcome = self.workers.again_alone(self.method.space.native(host.hparams, row))
                self.journal.add(_trials(host)[row], outcome)

    def advance(self, tally: Tally, seconds_left: float) -> tuple[Trace, Tally]:
        """Tells one more round, or of a round that time has run out on, what is known."""
        more = lambda: self.rounds < self.budget.rounds and len(self.asked) <= self.ahead  # noqa: E731
        while more() and (not self.asked or self._last_id() + 1 < self.budget.trials):
            self._submit()
        trials, running = self.asked.pop(0)
        host = jax.device_get(trials)
        self._collect(host, running, seconds_left)
        found = [self.journal.outcomes.get(trial) for trial in _trials(host)]
        known = host.active & [outcome is not None for outcome in found]
        told_of = [outcome if k else None for outcome, k in zip(found, known, strict=True)]
        self.errors |= {id: o.error for id, o in zip(host.id.tolist(), told_of, strict=True) if o and o.error}
        losses = np.array([o.loss if o else math.nan for o in told_of]).astype(host.unit.dtype)
        order = np.argsort(~known, kind="stable")
        told = jax.tree.map(lambda x: x[order], trials._replace(active=jnp.asarray(known)))
        while self.open and (tally.rounds + 1) * self.method.batch + self.known > self.room:
            self.room *= OPEN_GROWTH
            self.state = self.method.reserve(self.state, self.room)
        self.state = self.tell(self.state, told, jnp.asarray(losses[order]))
        none = np.zeros(len(losses), np.int32)
        trace = Trace(jax.device_get(told)._replace(aux=()), none, losses[order], none - 1)
        meter = jax.device_get(begin(tally).after(trace))
        return jax.tree.map(lambda x: np.asarray(x)[None], trace), proceed(tally, meter, 0)

    def _last_id(self) -> int:
        return int(np.max(np.asarray(self.asked[-1][0].id)))

    def method_state(self) -> PyTree:
        """The method's state."""
        return self.state

    def best_state(self) -> None:
        """No training state is known."""

    def close(self) -> None:
        """Ends the pool, whatever still runs in it."""
        self.workers.close()
