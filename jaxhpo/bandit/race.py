"""Trials that race for training steps: the state machine behind successive halving and Hyperband.

The timetable is static (`schedule`); what is found out on the way is only who moves up. The state has one record a
slot of the bank: who is kept there, in which rung, and what loss came of it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.bandit.sampling import Sampling, Training, given_up
from jaxhpo.bandit.schedule import Bracket, kept, schedule
from jaxhpo.method import Count, Initializer, Method, Trials, count, failed, ranked, where_rows
from jaxhpo.space import Space

PyTree = Any
MOST_TRIALS = 10**6


class Place(NamedTuple):
    """Where a trial stands; i32, one entry a row or a slot."""

    bracket: jax.Array
    """-1 is nobody"""
    rung: jax.Array
    """rung of the bracket"""
    member: jax.Array
    """which of the rung's members"""
    trial: jax.Array
    """number in the order of all starts; breaks ties"""


class Kept(NamedTuple):
    """The record of every slot of the bank, leading axis = slots."""

    place: Place
    unit: jax.Array
    """float[slots, dims]"""
    loss: jax.Array
    """float[slots]: at the end of the rung, +inf where the trial failed"""
    done: jax.Array
    """bool[slots]: nothing is left to train in the present rung"""
    aux: PyTree
    """the sampler's memory of the trial"""


class Row(NamedTuple):
    """What a row of an ask remembers."""

    place: Place
    slot: jax.Array
    """i32[batch]: slot that holds the trial's record"""
    ends: jax.Array
    """bool[batch]: whether the steps of this ask end the rung"""
    reached: jax.Array
    """i32[batch]: steps that a trial has behind it at the end of the rung"""
    aux: PyTree
    """the sampler's memory of the trial"""


class State(NamedTuple):
    """State of a race."""

    round: Count
    kept: Kept
    sampler: PyTree
    """who chooses configurations"""


def _put(records: PyTree, slot: jax.Array, rows: PyTree) -> PyTree:
    return jax.tree.map(lambda record, row: record.at[slot].set(row, mode="drop"), records, rows)


def _rank(kept_: Kept) -> jax.Array:
    """Rank of every slot among the done trials of its bracket, by loss, ties to the one that started first."""
    n = kept_.loss.shape[0]
    group = jnp.where(kept_.done, kept_.place.bracket, np.iinfo(np.int32).max)
    operands = (group, kept_.loss, kept_.place.trial, jnp.arange(n, dtype=jnp.int32))
    group, _, _, slot = jax.lax.sort(operands, num_keys=3)
    position = jnp.arange(n, dtype=jnp.int32)
    first = jnp.concatenate([jnp.ones(1, bool), group[1:] != group[:-1]])
    return jnp.zeros(n, jnp.int32).at[slot].set(position - jax.lax.cummax(jnp.where(first, position, 0)))


class _Tables(NamedTuple):
    """What is known of every bracket and rung beforehand."""

    kept: np.ndarray
    """i32[brackets, rungs]: how many move up"""
    reached: np.ndarray
    """i32[brackets, rungs]: steps behind a trial at the end"""
    level: np.ndarray
    """i32[brackets, rungs]: these, counted from the lowest of all rungs"""
    offset: np.ndarray
    """i32[brackets]: where a bracket's members begin in an array of all members"""
    members: int
    """members of all first rungs"""


def levels_of(brackets: tuple[Bracket, ...]) -> list[int]:
    """The numbers of steps at which trials are compared, ascending."""
    return sorted({rung.steps for ladder in brackets for rung in ladder})


def _tables(brackets: tuple[Bracket, ...]) -> _Tables:
    shape = len(brackets), max(map(len, brackets))
    up, reached = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, ladder in enumerate(brackets):
        for i, rung in enumerate(ladder):
            up[b, i], reached[b, i] = kept(ladder, i), rung.steps
    sizes = np.array([ladder[0].members for ladder in brackets])
    level = np.searchsorted(levels_of(brackets), reached).astype(np.int32)
    return _Tables(up, reached, level, (np.cumsum(sizes) - sizes).astype(np.int32), int(sizes.sum()))


def _climb(kept_: Kept, standing: jax.Array, tables: _Tables) -> Kept:
    """Frees the slots of those who cannot move up any more, and moves up the best where a rung is complete."""
    place = kept_.place
    rank = _rank(kept_)
    target = jnp.where(place.bracket >= 0, standing[place.bracket], -1)
    hopeful = kept_.done & jnp.isfinite(kept_.loss) & (rank < jnp.asarray(tables.kept)[place.bracket, place.rung])
    promoted = hopeful & (target == place.rung + 1)
    stays = (target == place.rung) & (hopeful | ~kept_.done)
    return kept_._replace(
        place=place._replace(
            bracket=jnp.where(stays | promoted, place.bracket, -1),
            rung=place.rung + promoted,
            member=jnp.where(promoted, rank, place.member),
        ),
        done=kept_.done & ~promoted,
    )


@functools.lru_cache(maxsize=128)
def _functions(
    space: Space,
    brackets: tuple[Bracket, ...],
    batch: int,
    in_flight: int,
    sampling: Sampling,
) -> tuple[Callable, Callable, Callable, Callable]:
    tables, plan = _tables(brackets), schedule(brackets, batch, in_flight)
    rounds, slots = plan.rounds, plan.slots

    def init(key: jax.Array, settings: PyTree) -> State:
        sampler = sampling.init(key, settings)
        unit, aux = sampling.blank(sampler, slots)
        nobody = jnp.full(slots, -1, jnp.int32)
        record = Kept(
            place=Place(nobody, nobody, nobody, nobody),
            unit=unit,
            loss=jnp.full(slots, jnp.inf, unit.dtype),
            done=jnp.zeros(slots, bool),
            aux=aux,
        )
        return State(count(), record, sampler)

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        now = jnp.minimum(state.round.value, rounds - 1)
        table = jax.tree.map(lambda column: jnp.asarray(column)[now], plan.table)
        planned = (table.bracket >= 0) & (state.round.value < rounds)
        fresh = planned & table.fresh
        records = _climb(state.kept, table.standing, tables)

        level = jnp.asarray(tables.level)
        training = Training(
            records.unit,
            level[records.place.bracket, records.place.rung],
            records.aux,
            (records.place.bracket >= 0) & ~records.done,
        )
        held = state.kept
        left = (held.place.bracket >= 0) & (records.place.bracket < 0) & jnp.isfinite(held.loss)
        reached = level[held.place.bracket, held.place.rung]
        sampler = given_up(space, sampling, state.sampler, held.unit, held.aux, reached, left)
        drawn, aux, sampler = sampling.ask(key, sampler, fresh, level[table.bracket, table.rung], training)

        at = jnp.asarray(tables.offset)[table.bracket] + table.member
        owner = records.place.bracket
        mine = jnp.where(owner >= 0, jnp.asarray(tables.offset)[owner] + records.place.member, tables.members)
        holder = (
            jnp.full(tables.members, slots, jnp.int32).at[mine].set(jnp.arange(slots, dtype=jnp.int32), mode="drop")
        )
        free = jnp.nonzero(owner < 0, size=batch, fill_value=slots)[0].astype(jnp.int32)
        turn = jnp.cumsum(fresh) - 1
        slot = jnp.where(fresh, free[turn], jnp.where(planned, holder[at], slots))
        active = fresh | (planned & (slot < slots) & ~records.done[jnp.minimum(slot, slots - 1)])
        held = jax.tree.map(lambda x: x[jnp.minimum(slot, slots - 1)], records)
        trial = jnp.where(fresh, table.trial, held.place.trial)
        place = Place(table.bracket, table.rung, table.member, trial)
        unit = jnp.where(fresh[:, None], drawn, held.unit)
        aux = where_rows(fresh, aux, held.aux)
        begun = Kept(place, unit, jnp.full(batch, jnp.inf, unit.dtype), jnp.zeros(batch, bool), aux)
        records = _put(records, jnp.where(fresh, slot, slots), begun)

        trials = Trials(
            hparams=space.decode(unit),
            unit=unit,
            id=jnp.where(active, trial, -1),
            steps=jnp.where(planned, table.steps, 0),
            source=jnp.where(active & ~fresh, slot, -1),
            slot=jnp.where(active, slot, slots),
            active=active,
            aux=Row(place, slot, table.ends, jnp.asarray(tables.reached)[table.bracket, table.rung], aux),
        )
        # A failed member leaves a gap; active rows come first, then the gaps, then what was never planned.
        order = jnp.argsort(2 - planned.astype(jnp.int32) - active, stable=True)
        trials = jax.tree.map(lambda x: x[order], trials)
        return trials, State(Count(state.round.value + 1), records, sampler)

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        row: Row = trials.aux
        owner = state.kept.place.trial[jnp.minimum(row.slot, slots - 1)]
        vacant = state.kept.place.bracket[jnp.minimum(row.slot, slots - 1)] < 0
        # A row without steps is a result that was known beforehand: only the sampler learns from it.
        trained = trials.steps > 0
        known = trials.active & trained & (vacant | (owner == row.place.trial))
        told = Kept(
            row.place, trials.unit, ranked(losses).astype(trials.unit.dtype), row.ends | failed(losses), row.aux
        )
        records = _put(state.kept, jnp.where(known, row.slot, slots), told)
        learns = trials.active & (~trained | (known & (row.ends | failed(losses))))
        seen = trials._replace(aux=row.aux, active=learns, steps=row.reached)
        level = jnp.asarray(tables.level)
        level = jnp.where(trained, level[row.place.bracket, row.place.rung], level.max())
        first = ~trained | (row.place.rung == 0)
        return State(state.round, records, sampling.tell(state.sampler, seen, losses, level, first))

    def reserve(state: State, capacity: int) -> State:
        return state._replace(sampler=sampling.reserve(state.sampler, capacity))

    return init, ask, tell, reserve


def race(
    name: str,
    space: Space,
    brackets: tuple[Bracket, ...],
    *,
    batch: int,
    in_flight: int,
    sampling: Sampling,
    settings: PyTree,
) -> Method:
    """A `Method` in which the trials of `brackets` race, and `sampling` with its `settings` chooses them."""
    trials = sum(ladder[0].members for ladder in brackets)
    if trials > MOST_TRIALS:
        raise ValueError(
            f"'{name}' would start {trials:,} trials, more than {MOST_TRIALS:,}; raise min_steps, or lower max_steps"
        )
    init, ask, tell, reserve = _functions(space, brackets, batch, in_flight, sampling)
    plan = schedule(brackets, batch, in_flight)
    return Method(
        name=name,
        space=space,
        settings=settings,
        init=Initializer(init, settings),
        ask=ask,
        tell=tell,
        batch=batch,
        slots=plan.slots,
        rounds=plan.rounds,
        reserve=reserve,
    )
