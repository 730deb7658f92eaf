"""Many studies of one method as one program, a chunk of rounds at a time.

Each has a key of its own and is the study that `minimize` runs with that key. All of them run the same rounds, so one
that has spent its budget goes on until the last one has; what it did beyond is left out.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.engine.budget import OPEN_GROWTH, OPEN_ROWS, Budget, capacity
from jaxhpo.engine.device import Plan
from jaxhpo.engine.lanes import Bank, Incumbent, Told, make_lanes
from jaxhpo.method import Method, Trials, ask_key, axes, trial_keys
from jaxhpo.space import working_dtype
from jaxhpo.study import Trace, first_state, trace_of
from jaxhpo.trainable import Trainable, hoist, unjitted

PyTree = Any
# Traces of all studies come to the host at once, so a chunk has fewer rounds than one of a single study.
MOST_ROUNDS = 64
CHUNK_SECONDS = 1.0


class Timed(NamedTuple):
    """What many studies saw, and how long it took."""

    trace: Trace
    """arrays of NumPy with leading axes [rounds, repeats, batch]"""
    seconds: float
    """wall-clock time of the rounds, without compiling"""
    ask_seconds: float
    """the part of it that is the method's own: the same rounds, told the same losses, without a trial"""
    compile_seconds: float


class Price(NamedTuple):
    """What trials cost, in training steps, or in trials of an objective that does not train."""

    whole: float
    """of a trial whose rows carry no steps"""
    gradient: float
    """how many times as much a step, or a trial, costs with its derivative"""

    def of(self, method: Method, trials: Trials) -> np.ndarray:
        """The cost of each row, 0 where it is padding: f64[...], shaped like `trials.steps`."""
        steps = np.asarray(trials.steps, float)
        if method.slots:
            through = np.minimum(steps, method.lookback) if method.uses_gradients else 0
            return np.where(trials.active, steps + (self.gradient - 1) * through, 0.0)
        return np.where(trials.active, self.one(method), 0.0)

    def one(self, method: Method) -> float:
        """The cost of a trial whose rows carry no steps."""
        return self.whole * (self.gradient if method.uses_gradients else 1.0)

    def trials(self, method: Method, budget: float) -> float:
        """How many trials end a study of that budget; no number where they carry steps of their own."""
        if method.slots:
            return math.inf
        return math.ceil(budget / self.one(method) - 1e-9)


class _Carry(NamedTuple):
    """What all studies know between two rounds."""

    states: PyTree
    """of the method, with a leading axis of repeats except at counts"""
    bank: Bank
    """of all studies: those of the r-th are the slots from r * method.slots on"""
    incumbent: Incumbent


class _Programs(NamedTuple):
    start: Callable
    """(keys, settings) -> carry"""
    run: Callable
    """(carry, keys, first, rounds, told, losses) -> (carry, traces [most, repeats, batch, ...]); donates the carry"""
    reserve: Callable
    """(carry, capacity) -> carry with room for so many rows"""


def _round(problem: Any, method: Method, repeats: int, lanes: int | None, along: PyTree) -> tuple[Callable, Callable]:
    """`() -> (bank, incumbent)` and a round of all studies, whose trials run side by side as rows of one ask."""
    slots, batch = method.slots, method.batch
    side_by_side = method._replace(batch=repeats * batch, slots=repeats * slots)
    width = repeats * min(lanes or batch, batch)
    runner = make_lanes(unjitted(problem), side_by_side, width, even=False)
    ask = jax.vmap(method.ask, in_axes=(0, along), out_axes=(0, along))
    tell = jax.vmap(method.tell, in_axes=(along, 0, 0, 0), out_axes=along)
    first = slots * np.arange(repeats, dtype=np.int32)[:, None]
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(repeats * batch, *x.shape[2:]), tree)  # noqa: E731
    apart = lambda tree: jax.tree.map(lambda x: x.reshape(repeats, batch, *x.shape[1:]), tree)  # noqa: E731

    def round_(
        keys: jax.Array, round: jax.Array, carry: _Carry, told: jax.Array, losses: jax.Array
    ) -> tuple[_Carry, Trace]:
        trials, states = ask(jax.vmap(ask_key, (0, None))(keys, round), carry.states)
        rows = trials._replace(
            source=jnp.where(trials.source < 0, -1, trials.source + first),
            slot=jnp.where(trials.slot < slots, trials.slot + first, repeats * slots),
        )

        def run() -> tuple[Bank, Incumbent, Told]:
            return runner.run(carry.bank, carry.incumbent, flat(jax.vmap(trial_keys)(keys, trials)), flat(rows))

        def rehearse() -> tuple[Bank, Incumbent, Told]:
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run)[2])
            return carry.bank, carry.incumbent, nothing._replace(losses=flat(losses))

        bank, incumbent, outcome = jax.lax.cond(told, rehearse, run)
        outcome = apart(outcome)
        states = tell(states, trials, outcome.losses, outcome.gradients)
        trace = jax.vmap(functools.partial(trace_of, method))(trials, outcome)
        return _Carry(states, bank, incumbent), trace

    return runner.init, round_


@functools.lru_cache(maxsize=16)
def _programs(plan: Plan, repeats: int, impl: str, most: int, room: int) -> _Programs:
    problem, method, lanes, *_ = plan.parts
    begin = lambda key, settings: first_state(method, key, settings, room, None)  # noqa: E731
    along = axes(jax.eval_shape(begin, jax.random.key(0, impl=impl), method.settings))
    empty, round_ = _round(problem, method, repeats, lanes, along)

    @jax.jit
    def start(keys: jax.Array, settings: PyTree) -> _Carry:
        return _Carry(jax.vmap(begin, in_axes=(0, None), out_axes=along)(keys, settings), *empty())

    def chunk(
        carry: _Carry, keys: jax.Array, first: jax.Array, rounds: jax.Array, told: jax.Array, losses: jax.Array
    ) -> tuple[_Carry, Trace]:
        shape = jax.eval_shape(lambda c: round_(keys, first, c, told, losses[0])[1], carry)
        traces = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shape)

        def body(i: jax.Array, loop: tuple[_Carry, Trace]) -> tuple[_Carry, Trace]:
            carry, trace = round_(keys, first + i, loop[0], told, losses[i])
            return carry, jax.tree.map(lambda all_, one: all_.at[i].set(one), loop[1], trace)

        return jax.lax.fori_loop(0, rounds, body, (carry, traces))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl=impl), repeats))
    carry = jax.eval_shape(start, keys, method.settings)
    losses = np.zeros((most, repeats, method.batch), working_dtype())
    example = keys, np.int32(0), np.int32(1), np.asarray(False), losses
    hoisted, data = hoist(chunk, carry, *example)
    run = jax.jit(hoisted, donate_argnums=1).lower(data, carry, *example).compile()

    def reserve(carry: _Carry, capacity: int) -> _Carry:
        grow = jax.vmap(lambda state: method.reserve(state, capacity), in_axes=(along,), out_axes=along)
        return carry._replace(states=jax.jit(grow)(carry.states))

    return _Programs(start, functools.partial(run, data), reserve)


class _Runner:
    """Many studies, driven together."""

    def __init__(
        self, problem: Any, method: Method, keys: jax.Array, budget: float, price: Price, lanes: int | None = None
    ):
        self.plan, self.method, self.keys = Plan(problem, method, lanes, None, None), method, keys
        self.impl = str(jax.random.key_impl(keys))
        self.limit = math.inf if method.rounds is None else method.rounds
        rows = capacity(method, Budget(trials=price.trials(method, budget), rounds=self.limit), None)
        # No study has more rounds than steps.
        self.room = min(OPEN_ROWS, math.ceil(budget) * method.batch) if rows is None else max(rows, method.batch)
        asks = min(self.room // method.batch, MOST_ROUNDS)
        self.most = 1 << (asks - 1).bit_length()
        self.compile_seconds = 0.0
        self.begin()

    def begin(self) -> None:
        """Puts all studies before their first round."""
        self.carry, self.round, self.seconds = None, 0, 0.0
        begun = time.perf_counter()
        self.carry = jax.block_until_ready(self._programs().start(self.keys, self.method.settings))
        self.compile_seconds += time.perf_counter() - begun

    def _programs(self) -> _Programs:
        return _programs(self.plan, len(self.keys), self.impl, self.most, self.room)

    def _grow(self, rows: int) -> None:
        begun = time.perf_counter()
        while rows > self.room:
            self.room *= OPEN_GROWTH
        self.carry = jax.block_until_ready(self._programs().reserve(self.carry, self.room))
        self.compile_seconds += time.perf_counter() - begun

    def advance(self, rounds: int, losses: np.ndarray | None = None) -> Trace:
        """Runs so many rounds, at most `most`; `losses` are told in the place of running trials, if they are given."""
        if (self.round + rounds) * self.method.batch > self.room:
            self._grow((self.round + rounds) * self.method.batch)
        told = np.zeros((self.most, len(self.keys), self.method.batch), working_dtype())
        if losses is not None:
            told[:rounds] = losses
        run = self._programs().run
        begun = time.perf_counter()
        out = run(self.carry, self.keys, np.int32(self.round), np.int32(rounds), np.asarray(losses is not None), told)
        self.carry, traces = jax.block_until_ready(out)
        self.seconds += time.perf_counter() - begun
        self.round += rounds
        return jax.tree.map(lambda x: x[:rounds], jax.device_get(traces))

    def rehearse(self, losses: np.ndarray) -> float:
        """Asks and tells from the beginning as with these losses, without a trial; gradients are told as 0.

        Args:
          losses: float[rounds, repeats, batch], what studies have told.

        Returns:
          Wall-clock seconds, without compiling.
        """
        self.begin()
        for first in range(0, len(losses), self.most):
            part = losses[first : first + self.most]
            self.advance(len(part), part)
        return self.seconds


def run_repeats(
    problem: Callable | Trainable,
    method: Method,
    keys: jax.Array,
    budget: float,
    price: Price,
    *,
    lanes: int | None = None,
    report: Callable[[float], Any] = lambda share: None,
) -> Timed:
    """Runs the studies of all keys side by side until each has spent its budget or the method has ended.

    Args:
      problem: an objective `(key, hparams) -> loss` or a `Trainable`; checked already.
      method: how to search.
      keys: key[repeats], of each study.
      budget: what each may spend, by `price`; it ends with the round that reaches it.
      price: what trials cost.
      lanes: how many trials of one study run side by side; the method's batch if not given.
      report: called with the share of the budget that is spent.
    """
    runner = _Runner(problem, method, keys, budget, price, lanes)
    traces: list[Trace] = []
    spent, dearest, pace = np.zeros(len(keys)), 1.0, 1.0
    while runner.round < runner.limit and spent.min() < budget:
        left = math.ceil((budget - spent.min()) / dearest)
        rounds, before = int(max(1, min(runner.most, runner.limit - runner.round, left, pace))), runner.seconds
        traces.append(runner.advance(rounds))
        pace = rounds * min(4.0, CHUNK_SECONDS / max(runner.seconds - before, 1e-6))
        cost = price.of(method, traces[-1].trials).sum(-1)
        spent, dearest = spent + cost.sum(0), max(dearest, float(cost.max()))
        report(min(float(spent.min()) / budget, 1.0))
    trace = jax.tree.map(lambda *x: np.concatenate(x), *traces)
    seconds, compile_seconds = runner.seconds, runner.compile_seconds
    return Timed(trace, seconds, runner.rehearse(trace.losses), compile_seconds)


def _idle(key: jax.Array, hparams: PyTree) -> jax.Array:
    del key, hparams
    return jnp.zeros(())


def ask_seconds(method: Method, keys: jax.Array, losses: np.ndarray) -> float:
    """How long a method takes to ask and tell by itself, in studies that something else ran.

    Args:
      method: of a problem that is not JAX.
      keys: key[repeats], of each study.
      losses: float[rounds, repeats, batch], what they told.

    Returns:
      Wall-clock seconds, without compiling.
    """
    return _Runner(_idle, method, keys, len(losses) * method.batch, Price(1, 1)).rehearse(losses)
