"""Trials that are promoted one by one: the state machine behind ASHA.

No lane ever waits. All train the same number of steps a round, the greatest common divisor of the rungs; in the round
after a trial has reached its rung, its lane goes to a trial that may move up, or to a new one. What is found out on the
way is who moves up and when, so nothing but the rungs is known beforehand.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.bandit import ladder as ladders
from jaxhpo.bandit.ladder import NOWHERE, Entries, Ladder
from jaxhpo.bandit.sampling import Sampling, Training, given_up
from jaxhpo.method import Initializer, Method, PyTree, Trials, failed, ranked, where_rows
from jaxhpo.space import Space


class Kept(NamedTuple):
    """The record of every slot of the bank, leading axis = slots."""

    trial: jax.Array
    """i32[slots]: who is kept there, -1 is nobody"""
    rung: jax.Array
    """i32[slots]: which rung it has reached, or is to reach next"""
    left: jax.Array
    """i32[slots]: steps until it reaches it, 0 for one that is paused"""
    unit: jax.Array
    """float[slots, dims]"""
    loss: jax.Array
    """float[slots]: of a paused trial"""
    aux: PyTree
    """the sampler's memory of the trial"""


class Row(NamedTuple):
    """What a row of an ask remembers."""

    trial: jax.Array
    """i32[batch]: its number"""
    slot: jax.Array
    """i32[batch]: where it is kept"""
    rung: jax.Array
    """i32[batch]: which the trial is to reach next"""
    left: jax.Array
    """i32[batch]: steps that are left to it after those of this ask"""
    aux: PyTree
    """the sampler's memory of the trial"""


class State(NamedTuple):
    """State of asynchronous successive halving."""

    kept: Kept
    ladder: Ladder
    sampler: PyTree
    """who chooses configurations"""
    started: jax.Array
    """i32[]: trials so far"""


def promotable(kept: Kept, rank: jax.Array, reached: jax.Array, eta: int, refill: bool) -> jax.Array:
    """Which paused trials may move up: bool[slots].

    Those among the best `1/eta` of all that have reached their rung may (Algorithm 2). With `refill`, also the best
    that are still there, as long as fewer than `1/eta` have moved up because others were given up.
    """
    there, top = kept.trial >= 0, reached.shape[0] - 1
    paused = there & (kept.left == 0) & jnp.isfinite(kept.loss)
    quota = reached[kept.rung] // eta
    if not refill:
        return paused & (rank < quota)
    rungs = jnp.arange(top + 1, dtype=jnp.int32)[:, None]
    on_the_way = (there & (kept.left > 0) & (kept.rung == rungs)).sum(1, dtype=jnp.int32)
    moved = (reached + on_the_way)[jnp.minimum(kept.rung + 1, top)]
    lower = (paused & (kept.rung == rungs)).sum(1, dtype=jnp.int32)
    place = _order(paused, kept.rung, rank) - (jnp.cumsum(lower) - lower)[kept.rung]
    return paused & ((rank < quota) | (moved + place < quota))


def _starts_away(kept: Kept, rank: jax.Array, reached: jax.Array, eta: int) -> jax.Array:
    """About how many trials have to start until a paused one may move up, if none is better: float[slots]."""
    lacking = (eta * (rank + 1) - reached[kept.rung]).astype(kept.loss.dtype)
    return lacking * jnp.asarray([float(eta) ** k for k in range(reached.shape[0])], lacking.dtype)[kept.rung]


def _order(eligible: jax.Array, *keys: jax.Array) -> jax.Array:
    """The place of every slot among the eligible ones, by the keys: i32[slots]; others come last."""
    n = eligible.shape[0]
    slot = jnp.arange(n, dtype=jnp.int32)
    *_, sorted_ = lax.sort(((~eligible).astype(jnp.int32), *keys, slot), num_keys=1 + len(keys))
    return jnp.zeros(n, jnp.int32).at[sorted_].set(slot)


@functools.lru_cache(maxsize=128)
def _functions(
    space: Space, rungs: tuple[int, ...], eta: int, batch: int, paused: int, sampling: Sampling
) -> tuple[Callable, Callable, Callable, Callable]:
    slots, top = batch + paused, len(rungs) - 1
    stretches = np.diff((0, *rungs)).astype(np.int32)
    quantum = math.gcd(*stretches.tolist())

    def init(key: jax.Array, settings: PyTree) -> State:
        sampler = sampling.init(key, settings)
        unit, aux = sampling.blank(sampler, slots)
        nobody, zeros = jnp.full(slots, -1, jnp.int32), jnp.zeros(slots, jnp.int32)
        kept = Kept(nobody, zeros, zeros, unit, jnp.full(slots, jnp.inf, unit.dtype), aux)
        return State(kept, ladders.empty(len(rungs), batch), sampler, jnp.int32(0))

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        kept = state.kept
        rank = ladders.rank(state.ladder, Entries(kept.rung, kept.loss, kept.trial))
        training = (kept.trial >= 0) & (kept.left > 0)
        hopeful = promotable(kept, rank, state.ladder.reached, eta, refill=paused > 0)
        lanes = batch - training.sum(dtype=jnp.int32)
        promoted = hopeful & (_order(hopeful, -kept.rung, rank) < lanes)
        waits = (kept.trial >= 0) & ~training & ~promoted
        away = _starts_away(kept, rank, state.ladder.reached, eta)
        stays = waits & (_order(waits, away, -kept.rung) < paused)
        sampler = given_up(space, sampling, state.sampler, kept.unit, kept.aux, kept.rung, waits & ~stays)
        free = ~(training | promoted | stays)
        begins = free & (jnp.cumsum(free, dtype=jnp.int32) <= lanes - promoted.sum(dtype=jnp.int32))
        rung = jnp.where(begins, 0, kept.rung + promoted)
        trains = training | promoted | begins
        kept = kept._replace(
            trial=jnp.where(free, -1, kept.trial),
            rung=rung,
            left=jnp.where(promoted | begins, jnp.asarray(stretches)[rung], kept.left),
        )

        slot = jnp.nonzero(trains, size=batch, fill_value=0)[0].astype(jnp.int32)
        fresh = begins[slot]
        others = Training(kept.unit, kept.rung + stays, kept.aux, (trains | stays) & ~begins)
        unit, aux, sampler = sampling.ask(key, sampler, fresh, jnp.zeros(batch, jnp.int32), others)
        held = jax.tree.map(lambda x: x[slot], kept)
        row = held._replace(
            trial=jnp.where(fresh, state.started + jnp.cumsum(fresh, dtype=jnp.int32) - 1, held.trial),
            unit=jnp.where(fresh[:, None], unit, held.unit),
            aux=where_rows(fresh, aux, held.aux),
        )
        kept = jax.tree.map(lambda old, new: old.at[slot].set(new), kept, row)
        trials = Trials(
            hparams=space.decode(row.unit),
            unit=row.unit,
            id=row.trial,
            steps=jnp.full(batch, quantum, jnp.int32),
            source=jnp.where(fresh, -1, slot),
            slot=slot,
            active=jnp.ones(batch, bool),
            aux=Row(row.trial, slot, row.rung, row.left - quantum, row.aux),
        )
        return trials, State(kept, state.ladder, sampler, state.started + fresh.sum(dtype=jnp.int32))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        row: Row = trials.aux
        # A row without steps is a result that was known beforehand: only the sampler learns from it.
        trained = trials.active & (trials.steps > 0)
        held = jax.tree.map(lambda x: x[row.slot], state.kept._replace(aux=()))
        expected = (held.trial == row.trial) & (held.rung == row.rung) & (held.left == row.left + quantum)
        ours = trained & ((held.trial < 0) | expected)
        broken = failed(losses)
        ended = ours & ((row.left <= 0) | broken)
        leaves = ended & (broken | (row.rung == top))
        loss = ranked(losses).astype(state.kept.loss.dtype)
        told = Kept(jnp.where(leaves, -1, row.trial), row.rung, row.left, trials.unit, loss, row.aux)
        slot = jnp.where(ours, row.slot, slots)
        kept = jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), state.kept, told)
        entries = Entries(jnp.where(ended, row.rung, NOWHERE), jnp.where(ended, loss, jnp.inf), row.trial)
        known = trials.active & ~trained
        seen = trials._replace(aux=row.aux, active=ended | known, steps=jnp.asarray(rungs, jnp.int32)[row.rung])
        level = jnp.where(known, top, row.rung)
        sampler = sampling.tell(state.sampler, seen, losses, level, known | (row.rung == 0))
        started = jnp.maximum(state.started, jnp.where(trained, row.trial, -1).max() + 1)
        return State(kept, ladders.insert(state.ladder, entries), sampler, started)

    def reserve(state: State, capacity: int) -> State:
        ladder, sampler = ladders.reserve(state.ladder, capacity), sampling.reserve(state.sampler, capacity)
        return state._replace(ladder=ladder, sampler=sampler)

    return init, ask, tell, reserve


def promotion(
    name: str,
    space: Space,
    rungs: tuple[int, ...],
    eta: int,
    *,
    batch: int,
    paused: int,
    sampling: Sampling,
    settings: PyTree,
) -> Method:
    """A `Method` that promotes the best `1/eta` of each rung; `sampling` with its `settings` chooses the trials."""
    init, ask, tell, reserve = _functions(space, rungs, eta, batch, paused, sampling)
    initializer = Initializer(init, settings)
    return Method(name, space, settings, initializer, ask, tell, batch, slots=batch + paused, reserve=reserve)
