"""Lanes: many trials run as one program.

Whatever a problem is, its lanes take the rows of an ask chunk by chunk, so one compiled program of a fixed width
serves every round. The training states that may go on live in a bank; a row reads its source slot and writes its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxhpo.method import Method, Trials, example, ranked, where_rows
from jaxhpo.space import Space, working_dtype
from jaxhpo.trainable import Trainable

PyTree = Any


class Bank(NamedTuple):
    """Training states that may go on, leading axis = slots."""

    states: PyTree
    reached: jax.Array
    """i32[slots]: steps behind each"""
    trial: jax.Array
    """i32[slots]: id of the trial that has each"""


class Incumbent(NamedTuple):
    """The lowest finite loss so far and the training state that had it."""

    loss: jax.Array
    state: PyTree


class Told(NamedTuple):
    """What came of the rows of an ask, leading axis = batch."""

    losses: jax.Array
    reached: jax.Array
    """i32[batch]: steps behind each trial"""
    parent: jax.Array
    """i32[batch]: id of the trial whose training state each has continued, its own where it went on, -1 if fresh"""
    gradients: PyTree = None
    """shaped like `hparams`, where the method uses them"""


class Lanes(NamedTuple):
    """A problem, ready to run the rows of a method's asks."""

    init: Callable
    """() -> (bank, incumbent), both empty"""
    run: Callable
    """(bank, incumbent, keys, trials) -> (bank, incumbent, told)"""
    restore: Callable
    """(state) -> the training state as the user's functions know it"""


class _Row(NamedTuple):
    key: jax.Array
    hparams: PyTree
    id: jax.Array
    steps: jax.Array
    source: jax.Array
    slot: jax.Array
    active: jax.Array


def over_devices(mesh: Mesh, rows: bool = True) -> NamedSharding:
    """Leading axis over all devices of a mesh, or with `rows=False` a copy on each."""
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(automatic, PartitionSpec(mesh.axis_names) if rows else PartitionSpec())


def make_lanes(
    problem: Callable | Trainable,
    method: Method,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    even: bool = True,
) -> Lanes:
    """The lanes in which `problem` runs for `method`.

    Args:
      problem: an objective `(key, hparams) -> loss`, or a `Trainable`; checked already.
      method: who asks.
      lanes: width; the method's batch if not given.
      mesh: devices over which the lanes are spread.
      even: whether the active rows of an ask all run the same number of steps, as those of one study do.
    """
    width = min(lanes or method.batch, method.batch)
    if mesh is not None:
        width = math.ceil(width / mesh.size) * mesh.size
    chunks = math.ceil(method.batch / width)

    def spread(tree: PyTree) -> PyTree:
        if mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, over_devices(mesh))

    def copied(tree: PyTree) -> PyTree:
        if mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, over_devices(mesh, rows=False))

    def cut(rows: _Row) -> _Row:
        spare = chunks * width - method.batch
        padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], spare, 0)]) if spare else x, rows)
        if spare:
            padded = padded._replace(
                active=padded.active.at[method.batch :].set(False),
                steps=padded.steps.at[method.batch :].set(0),
                slot=padded.slot.at[method.batch :].set(method.slots),
            )
        return jax.tree.map(lambda x: x.reshape(chunks, width, *x.shape[1:]), padded)

    def join(told: Told, active: jax.Array) -> Told:
        told = copied(jax.tree.map(lambda x: x.reshape(chunks * width, *x.shape[2:])[: method.batch], told))
        # What a lane without a trial computed depends on the chunks, so nobody gets to see it.
        return told._replace(
            losses=jnp.where(active, told.losses, jnp.nan),
            reached=jnp.where(active, told.reached, 0),
            parent=jnp.where(active, told.parent, -1),
        )

    part: Callable = functools.partial(_training, even=even) if isinstance(problem, Trainable) else _evaluation
    slots = math.ceil(method.slots / mesh.size) * mesh.size if mesh else method.slots
    init, settle, chunk, restore = part(problem, method, width, slots, spread, copied)

    def run(bank: Bank, incumbent: Incumbent, keys: jax.Array, trials: Trials) -> tuple[Bank, Incumbent, Told]:
        # Else the method's own sums would be split over the devices too, and be rounded in another order.
        rows = copied(_Row(keys, *(getattr(trials, name) for name in _Row._fields[1:])))
        if chunks == 1:
            (bank, incumbent), told = chunk((bank, incumbent), jax.tree.map(lambda x: x[0], cut(rows)))
            return bank, incumbent, join(jax.tree.map(lambda x: x[None], told), trials.active)
        # Rows that are not kept come first, while the states that they read are what they were.
        order = jnp.argsort(jnp.where(rows.active, rows.slot < method.slots, 2), stable=True)
        bank, parts = settle(bank, cut(jax.tree.map(lambda x: x[order], rows)))
        (bank, incumbent), told = jax.lax.scan(chunk, (bank, incumbent), parts)
        told = jax.tree.map(lambda x: x[jnp.argsort(order)], join(told, trials.active[order]))
        return bank, incumbent, told

    return Lanes(init, run, restore)


def _evaluation(
    objective: Callable, method: Method, width: int, slots: int, spread: Callable, copied: Callable
) -> tuple[Callable, Callable, Callable, Callable]:
    del slots, copied
    space, dtype = method.space, working_dtype()
    nobody = jnp.zeros(0, jnp.int32)
    nothing = Bank((), nobody, nobody), Incumbent(jnp.asarray(jnp.inf, dtype), ())

    def one(key: jax.Array, hparams: PyTree) -> tuple[jax.Array, PyTree]:
        if method.uses_gradients:
            return value_and_gradient(space, objective, key, hparams)
        return jnp.asarray(objective(key, space.fill(hparams)), dtype), None

    def chunk(carry: tuple[Bank, Incumbent], rows: _Row) -> tuple[tuple[Bank, Incumbent], Told]:
        bank, incumbent = carry
        idle = jnp.zeros(width, jnp.int32)

        def evaluate() -> Told:
            keys, hparams = spread((rows.key, rows.hparams))
            losses, gradients = jax.vmap(one)(keys, hparams)
            return Told(losses, idle, idle - 1, gradients)

        def skip() -> Told:
            gradients = jax.tree.map(jnp.zeros_like, rows.hparams) if method.uses_gradients else None
            return Told(jnp.full(width, jnp.nan, dtype), idle, idle - 1, gradients)

        told = jax.lax.cond(rows.active.any(), evaluate, skip)
        lowest = jnp.min(jnp.where(rows.active, ranked(told.losses), jnp.inf))
        return (bank, incumbent._replace(loss=jnp.minimum(incumbent.loss, lowest))), told

    return lambda: nothing, lambda bank, rows: (bank, rows), chunk, lambda state: None


def value_and_gradient(space: Space, objective: Callable, key: jax.Array, hparams: PyTree) -> tuple[jax.Array, PyTree]:
    """The loss of one trial and its gradient, shaped like `hparams` and zero at leaves that are not floats."""
    loss = lambda h: (jnp.asarray(objective(key, space.fill(h)), working_dtype()), None)  # noqa: E731
    (value, _), gradient = _with_gradient(loss, hparams)
    return value, gradient


def _with_gradient(loss: Callable, hparams: PyTree) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    """What `loss(hparams) -> (value, aux)` returns, and the gradient of the value."""
    leaves, treedef = jax.tree.flatten(hparams)
    real = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

    def of_floats(floats: list[jax.Array]) -> tuple[jax.Array, PyTree]:
        floats_ = iter(floats)
        return loss(jax.tree.unflatten(treedef, [next(floats_) if r else x for r, x in zip(real, leaves, strict=True)]))

    out, slopes = jax.value_and_grad(of_floats, has_aux=True)([x for r, x in zip(real, leaves, strict=True) if r])
    slopes_ = iter(slopes)
    gradient = [next(slopes_) if r else jnp.zeros_like(x) for r, x in zip(real, leaves, strict=True)]
    return out, jax.tree.unflatten(treedef, gradient)


class Raw(NamedTuple):
    """A `Trainable` whose states are plain numeric arrays: typed keys in them unwrapped, weak types made strong."""

    init: Callable
    """(trial key, hparams) -> state"""
    step: Callable
    """(trial key, state, hparams, the step that it reaches) -> state"""
    evaluate: Callable
    """(state, hparams) -> loss"""
    shape: PyTree
    """of a state"""
    restore: Callable
    """(state) -> the training state as the user's functions know it"""


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def raw_of(trainable: Trainable, space: Space, hparams: PyTree) -> Raw:
    """`trainable` as the engine runs it, for hyperparameters of `space` with the shapes of `hparams`."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def unwrap(state: PyTree) -> PyTree:
        plain = lambda x: jax.random.key_data(x) if _is_key(x) else jax.lax.convert_element_type(x, x.dtype)  # noqa: E731
        return jax.tree.map(lambda x: plain(jnp.asarray(x)), state)

    impls: list[Any] = []

    def first(key: jax.Array, hparams: PyTree) -> PyTree:
        state = trainable.init(key, space.fill(hparams))
        impls[:] = [jax.random.key_impl(x) if _is_key(jnp.asarray(x)) else None for x in jax.tree.leaves(state)]
        return state

    jax.eval_shape(first, key, hparams)

    def wrap(state: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(state)
        keyed = [
            x if impl is None else jax.random.wrap_key_data(x, impl=impl) for x, impl in zip(leaves, impls, strict=True)
        ]
        return jax.tree.unflatten(treedef, keyed)

    def init(key: jax.Array, hparams: PyTree) -> PyTree:
        return unwrap(trainable.init(jax.random.fold_in(key, 0), space.fill(hparams)))

    def step(key: jax.Array, state: PyTree, hparams: PyTree, reaches: jax.Array) -> PyTree:
        return unwrap(trainable.step(jax.random.fold_in(key, reaches), wrap(state), space.fill(hparams)))

    def evaluate(state: PyTree, hparams: PyTree) -> jax.Array:
        return jnp.asarray(trainable.evaluate(wrap(state), space.fill(hparams)), working_dtype())

    return Raw(init, step, evaluate, jax.eval_shape(init, key, hparams), wrap)


def _training(
    trainable: Trainable, method: Method, width: int, slots: int, spread: Callable, copied: Callable, even: bool
) -> tuple[Callable, Callable, Callable, Callable]:
    raw = raw_of(trainable, method.space, example(method)[1])
    dtype = working_dtype()

    def init() -> tuple[Bank, Incumbent]:
        bank = Bank(
            spread(jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), raw.shape)),
            jnp.zeros(slots, jnp.int32),
            jnp.full(slots, -1, jnp.int32),
        )
        nobody = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), raw.shape)
        return bank, Incumbent(jnp.asarray(jnp.inf, dtype), nobody)

    def settle(bank: Bank, rows: _Row) -> tuple[Bank, _Row]:
        """Copies the states that move to where they are to be trained, so that no chunk reads what another wrote."""
        moves = rows.active & (rows.source >= 0) & (rows.slot != rows.source) & (rows.slot < method.slots)

        def move(bank: Bank, part: tuple[_Row, jax.Array]) -> tuple[Bank, None]:
            row, moves = part
            to = jnp.where(moves, row.slot, slots)
            copy = lambda x: x.at[to].set(x[jnp.maximum(row.source, 0)], mode="drop")  # noqa: E731
            return jax.lax.cond(moves.any(), lambda b: jax.tree.map(copy, b), lambda b: b, bank), None

        bank, _ = jax.lax.scan(move, bank, (rows, moves))
        return bank, rows._replace(source=jnp.where(moves, rows.slot, rows.source))

    def end(key: jax.Array, state: PyTree, hparams: PyTree, reached: jax.Array) -> tuple[jax.Array, PyTree, PyTree]:
        """The loss of one trial, its training state and the gradient, after the steps that the gradient is through."""

        def loss(hparams: PyTree) -> tuple[jax.Array, PyTree]:
            step = lambda s, i: (raw.step(key, s, hparams, reached + i + 1), None)  # noqa: E731
            after, _ = jax.lax.scan(step, state, jnp.arange(method.lookback)) if method.lookback else (state, None)
            return raw.evaluate(after, hparams), after

        if not method.uses_gradients:
            return *loss(hparams), None
        (value, after), gradient = _with_gradient(loss, hparams)
        return value, after, gradient

    def chunk(carry: tuple[Bank, Incumbent], rows: _Row) -> tuple[tuple[Bank, Incumbent], Told]:
        keys, hparams = spread((rows.key, rows.hparams))
        fresh = rows.source < 0
        # Each device knows which rows move, so that no leaf of the bank has to ask for it.
        source, slot = copied((jnp.maximum(rows.source, 0), jnp.where(rows.active, rows.slot, slots)))

        def started(states: PyTree) -> PyTree:
            return where_rows(fresh, jax.vmap(raw.init)(keys, hparams), states)

        def train(carry: tuple[Bank, Incumbent]) -> tuple[tuple[Bank, Incumbent], Told]:
            bank, incumbent = carry
            before = jnp.where(fresh, 0, bank.reached[source])
            parent = jnp.where(fresh, -1, bank.trial[source])
            states = jax.tree.map(lambda x: x[source], bank.states)
            states = spread(jax.lax.cond((fresh & rows.active).any(), started, lambda s: s, states))

            unseen = (jnp.max(rows.steps) if even else rows.steps) - method.lookback

            def step(i: jax.Array, states: PyTree) -> PyTree:
                after = jax.vmap(raw.step)(keys, states, hparams, before + i + 1)
                return spread(after if even else where_rows(i < unseen, after, states))

            states = jax.lax.fori_loop(0, jnp.max(unseen), step, states)
            losses, states, gradients = jax.vmap(end)(keys, states, hparams, before + unseen)
            states, losses, reached = copied((spread(states), losses, before + rows.steps))
            keep = lambda record, row: record.at[slot].set(row, mode="drop")  # noqa: E731
            bank = jax.tree.map(keep, bank, Bank(states, reached, rows.id))
            bank = bank._replace(states=spread(bank.states))
            soft = method.space.soft(rows.hparams) if method.uses_gradients else None
            counts = rows.active if soft is None else rows.active & ~soft
            standing = jnp.where(counts, ranked(losses), jnp.inf)
            winner = jnp.argmin(standing)
            better = standing[winner] < incumbent.loss
            take = lambda new, old: jnp.where(better, new[winner], old)  # noqa: E731
            incumbent = Incumbent(
                jnp.where(better, standing[winner], incumbent.loss), jax.tree.map(take, states, incumbent.state)
            )
            return (bank, incumbent), Told(losses, reached, parent, gradients)

        def idle(carry: tuple[Bank, Incumbent]) -> tuple[tuple[Bank, Incumbent], Told]:
            nothing = jnp.zeros(width, jnp.int32)
            gradients = jax.tree.map(jnp.zeros_like, hparams) if method.uses_gradients else None
            return carry, Told(jnp.full(width, jnp.nan, dtype), nothing, nothing - 1, gradients)

        return jax.lax.cond((rows.steps > 0).any(), train, idle, carry)

    return init, settle, chunk, raw.restore
