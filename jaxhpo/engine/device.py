"""A study on the device, a chunk of rounds at a time.

One program runs every chunk, those of a resumed study too: how many rounds it runs is an argument. So a study that
was killed takes the same path, bit for bit, as one that was not.
"""

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhpo.engine.budget import OPEN_GROWTH, OPEN_ROWS, Budget, Limits, Meter, Tally, begin, capacity, limits, proceed
from jaxhpo.engine.digest import canonical
from jaxhpo.engine.lanes import Bank, Incumbent, over_devices
from jaxhpo.engine.processes import processes_of
from jaxhpo.method import Method, bare
from jaxhpo.space import working_dtype
from jaxhpo.study import Carry, Engine, Initial, Trace, make_engine
from jaxhpo.trainable import Trainable, hoist

PyTree = Any
MOST_ROUNDS = 256
CHUNK_SECONDS = 0.5


class Program(NamedTuple):
    """A compiled chunk."""

    run: Callable
    """(carry, key, round, meter, limits) -> (carry, traces, meter); donates the carry"""
    seconds: float
    """it took to trace and compile"""


def _chunk(engine: Engine, most: int) -> Callable:
    def chunk(
        carry: Carry, key: jax.Array, round: jax.Array, meter: Meter, limits: Limits
    ) -> tuple[Carry, Trace, Meter]:
        shape = jax.eval_shape(lambda c: engine.round(key, round, c)[1], carry)
        traces = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shape)

        def body(loop: tuple[Carry, Trace, Meter]) -> tuple[Carry, Trace, Meter]:
            carry, traces, meter = loop
            carry, trace = engine.round(key, round + meter.rounds, carry)
            traces = jax.tree.map(lambda all_, one: all_.at[meter.rounds].set(one), traces, trace)
            return carry, traces, meter.after(trace)

        return jax.lax.while_loop(lambda loop: loop[2].within(limits), body, (carry, traces, meter))

    return chunk


class Plan:
    """What a compiled study depends on; equal when the compiled code can be shared."""

    def __init__(self, problem: Any, method: Method, lanes: int | None, mesh: Mesh | None, initial: Initial | None):
        self.parts = (problem, method, lanes, mesh, initial)
        self.mesh = mesh
        functions = bare(method.init), method.ask, method.tell, method.reserve
        shapes = method.batch, method.slots, method.uses_gradients, method.lookback, lanes, mesh, working_dtype()
        # Constants end up in the program: equal arrays are the same, functions only if they are the same object.
        content = canonical((method.space.tree, initial), opaque=lambda value: f"{id(value)}")
        self.key = (problem if isinstance(problem, Hashable) else id(problem), functions, shapes, content)

    @property
    def everywhere(self) -> Any:
        """A copy on each device of the mesh."""
        return None if self.mesh is None else over_devices(self.mesh, rows=False)

    @property
    def placement(self) -> Carry | None:
        """Where the parts of a carry are: the bank over the devices of the mesh, the rest on each."""
        if self.mesh is None:
            return None
        everywhere = self.everywhere
        return Carry(
            everywhere, Bank(over_devices(self.mesh), everywhere, everywhere), Incumbent(everywhere, everywhere)
        )

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.key == other.key


@functools.lru_cache(maxsize=16)
def engine_of(plan: Plan) -> Engine:
    """The plan's two functions, made once."""
    return make_engine(*plan.parts)


@functools.lru_cache(maxsize=16)
def _start(plan: Plan, room: int) -> Callable:
    engine = engine_of(plan)
    return jax.jit(lambda key, settings: engine.start(key, settings, room), out_shardings=plan.placement)


def lower(plan: Plan, most: int, carry: Carry, key: jax.Array) -> tuple[jax.stages.Lowered, list]:
    """The program of a chunk of at most `most` rounds, not yet compiled, and the arrays that it is to be given first.

    Args:
      plan: the study.
      most: rounds that there is room for in the traces.
      carry: the study between two rounds, or its shapes.
      key: the study's key, or its shape.
    """
    example = key, np.int32(0), begin(Tally()), limits(Budget(), Tally(), 1)
    chunk, data = hoist(_chunk(engine_of(plan), most), carry, *example)
    options: dict[str, Any] = {"donate_argnums": 1}
    if plan.mesh is not None:
        inputs = plan.everywhere, plan.placement, *[plan.everywhere] * len(example)
        options |= {"in_shardings": inputs, "out_shardings": (plan.placement, plan.everywhere, plan.everywhere)}
    data = processes_of(plan.mesh).place(data, plan.everywhere)
    return jax.jit(chunk, **options).lower(data, carry, *example), data


@functools.lru_cache(maxsize=16)
def _program(plan: Plan, most: int, shapes: tuple, treedef: Any) -> Program:
    begun = time.perf_counter()
    lowered, data = lower(plan, most, *jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*shape) for shape in shapes]))
    return Program(functools.partial(lowered.compile(), data), time.perf_counter() - begun)


class Device:
    """Drives a study whose problem is JAX."""

    def __init__(
        self,
        problem: Callable | Trainable,
        method: Method,
        key: jax.Array,
        budget: Budget,
        *,
        lanes: int | None,
        mesh: Mesh | None,
        initial: Initial | None,
    ):
        self.plan = Plan(problem, method, lanes, mesh, initial)
        self.processes = processes_of(mesh)
        self.method, self.budget = method, budget
        rows = capacity(method, budget, initial)
        self.open = rows is None
        self.known = initial.known_rows(method.batch) if initial else 0
        self.room = OPEN_ROWS if rows is None else rows
        asks = MOST_ROUNDS if rows is None else rows // method.batch
        # Powers of 2, so that studies of about the same length share a program.
        self.most = min(1 << max(asks - 1, 0).bit_length(), MOST_ROUNDS)
        self.pace = 1.0
        self.compile_seconds = 0.0
        self.key, settings = self.processes.place((key, method.settings), self.plan.everywhere)
        self.carry = _start(self.plan, self.room)(self.key, settings)

    def _compiled(self) -> Program:
        leaves, treedef = jax.tree.flatten((self.carry, self.key))
        before = _program.cache_info().misses
        program = _program(self.plan, self.most, tuple((x.shape, x.dtype) for x in leaves), treedef)
        self.compile_seconds += program.seconds if _program.cache_info().misses > before else 0.0
        return program

    def advance(self, tally: Tally, seconds_left: float) -> tuple[Trace, Tally]:
        """Runs some rounds: the trace of them, arrays of NumPy with leading axis rounds, and the tally after them."""
        while self.open and (tally.rounds + self.most) * self.method.batch + self.known > self.room:
            self.room *= OPEN_GROWTH
            self._reserve()
        program = self._compiled()
        most = self.processes.agree(max(1, min(int(self.pace), self.most)))
        bounds = limits(self.budget, tally, most)
        begun = time.perf_counter()
        out = program.run(self.carry, self.key, np.int32(tally.rounds), begin(tally), bounds)
        self.carry, traces, meter = jax.block_until_ready(out)
        spent = max(time.perf_counter() - begun, 1e-6)
        traces, meter = jax.device_get((traces, meter))
        rounds = int(meter.rounds)
        self.pace = min(rounds * min(4.0, min(CHUNK_SECONDS, max(seconds_left, 0) + 1e-3) / spent), self.most)
        trace = jax.tree.map(lambda x: x[:rounds], traces)
        steps = np.where(trace.trials.active, trace.trials.steps, 0).sum(dtype=np.int64)
        return trace, proceed(tally, meter, int(steps))

    def _reserve(self) -> None:
        grow = jax.jit(lambda state: self.method.reserve(state, self.room), out_shardings=self.plan.everywhere)
        self.carry = self.carry._replace(state=grow(self.carry.state))

    def save(self) -> list[np.ndarray]:
        """What the study has to remember, as a list of arrays."""
        carry = self.processes.fetch(self.carry)
        # Slots beyond the method's own only fill up the devices, of which there may be others next time.
        bank = jax.tree.map(lambda x: x[: self.method.slots], carry.bank)
        return [np.asarray(x) for x in jax.tree.leaves(carry._replace(bank=bank))]

    def load(self, leaves: list[np.ndarray]) -> None:
        """Goes on from what `save` gave."""
        carry: Carry = jax.tree.unflatten(jax.tree.structure(self.carry), leaves)
        spare = len(self.carry.bank.reached) - len(carry.bank.reached)
        bank = jax.tree.map(lambda x: np.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1))), carry.bank)
        self.carry = self.processes.place(carry._replace(bank=bank), self.plan.placement)
        self._reserve()

    def best_state(self) -> PyTree:
        """The training state with the lowest loss."""
        return engine_of(self.plan).restore(self.processes.local(self.carry.incumbent.state))

    def method_state(self) -> PyTree:
        """The method's state."""
        return self.processes.local(self.carry.state)

    def close(self) -> None:
        """Nothing to release."""
