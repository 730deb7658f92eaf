"""What trials have reached each rung, and where a loss stands among theirs.

The record is sorted, but for what was told last: that waits in a buffer, which is merged into it when it is full. So a
rank costs a binary search and a glance at the buffer, however much was told.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.history import buckets
from jaxhpo.method import Count, count
from jaxhpo.space import working_dtype

BUFFER = 512
NOWHERE = -1


class Entries(NamedTuple):
    """One entry for every trial that has reached a rung."""

    rung: jax.Array
    """i32[n], `NOWHERE` where there is no entry"""
    loss: jax.Array
    """float[n], +inf where the trial failed"""
    trial: jax.Array
    """i32[n]: its number; breaks ties"""


class Ladder(NamedTuple):
    """The record of all rungs."""

    sorted: Entries
    """[capacity]: the highest rung first, then by loss and trial; if it is full, the worst of the lowest rung leave"""
    buffer: Entries
    """[buffer]: what is not merged yet"""
    reached: jax.Array
    """i32[rungs]: how many trials have reached each rung, entries that have left included"""
    waiting: Count
    """i32[]: rows of the buffer that are written"""


def _none(n: int) -> Entries:
    nobody = jnp.full(n, NOWHERE, jnp.int32)
    return Entries(nobody, jnp.full(n, jnp.inf, working_dtype()), nobody)


def empty(rungs: int, batch: int) -> Ladder:
    """The record of no trials, of which usually `batch` are told at once."""
    size = max(BUFFER, batch)
    return Ladder(_none(buckets(size)[-1]), _none(size), jnp.zeros(rungs, jnp.int32), count())


def reserve(ladder: Ladder, capacity: int) -> Ladder:
    """`ladder` with room for at least that many entries; never less than it has."""
    more = buckets(capacity)[-1] - ladder.sorted.rung.shape[0]
    if more <= 0:
        return ladder
    return ladder._replace(sorted=jax.tree.map(lambda x, y: jnp.concatenate([x, y]), ladder.sorted, _none(more)))


def merged(entries: Entries, more: Entries) -> Entries:
    """As many sorted entries, of both: those that stand first."""
    together = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), entries, more)
    rung, loss, trial = lax.sort((-together.rung, together.loss, together.trial), num_keys=3)
    return jax.tree.map(lambda x, y: x[: y.shape[0]], Entries(-rung, loss, trial), entries)


def insert(ladder: Ladder, entries: Entries) -> Ladder:
    """`ladder` with some entries more."""
    rows, size = entries.rung.shape[0], ladder.buffer.rung.shape[0]
    if rows > size:
        first, rest = (jax.tree.map(lambda x, s=s: x[s], entries) for s in (slice(size), slice(size, None)))
        return insert(insert(ladder, first), rest)
    is_full = ladder.waiting.value + rows > size
    # The predicate is a count: under `vmap` this stays a branch.
    held = lax.cond(
        is_full, lambda x, y: (merged(x, y), _none(size)), lambda x, y: (x, y), ladder.sorted, ladder.buffer
    )
    at = jnp.where(is_full, 0, ladder.waiting.value)
    write = lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, 0)  # noqa: E731
    rungs = jnp.arange(ladder.reached.shape[0], dtype=jnp.int32)
    here = (entries.rung == rungs[:, None]).sum(1, dtype=jnp.int32)
    return Ladder(held[0], jax.tree.map(write, held[1], entries), ladder.reached + here, Count(at + rows))


def _before(a: Entries, b: Entries) -> jax.Array:
    """Whether `a` stands before `b` in the record."""
    later = (a.loss < b.loss) | ((a.loss == b.loss) & (a.trial < b.trial))
    return (a.rung > b.rung) | ((a.rung == b.rung) & later)


def rank(ladder: Ladder, entries: Entries) -> jax.Array:
    """How many of the trials that have reached its rung stand before each entry, by loss, ties by trial: i32[n]."""
    size = ladder.sorted.rung.shape[0]

    def halve(i: jax.Array, position: jax.Array) -> jax.Array:
        further = position + (jnp.int32(1) << (steps - 1 - i))
        probe = jax.tree.map(lambda x: x[jnp.minimum(further, size) - 1], ladder.sorted)
        return jnp.where((further <= size) & _before(probe, entries), further, position)

    steps = int(np.log2(size)) + 1
    position = lax.fori_loop(0, steps, halve, jnp.zeros(entries.rung.shape, jnp.int32))
    in_buffer = jax.tree.map(lambda x: x[:, None], ladder.buffer)
    waiting = (in_buffer.rung == entries.rung) & _before(in_buffer, entries)
    found = position - _higher(ladder, entries.rung) + waiting.sum(0, dtype=jnp.int32)
    # Behind the end of a full record, nobody knows how many have left.
    return jnp.where(position < size, found, ladder.reached[entries.rung])


def _higher(ladder: Ladder, rung: jax.Array) -> jax.Array:
    """How many sorted entries are of a rung above: i32[n]."""
    rungs = jnp.arange(ladder.reached.shape[0], dtype=jnp.int32)
    in_buffer = (ladder.buffer.rung[:, None] == rungs).sum(0, dtype=jnp.int32)
    return jnp.where(rungs > rung[:, None], ladder.reached - in_buffer, 0).sum(1, dtype=jnp.int32)
