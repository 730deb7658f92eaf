"""The record of told trials that methods learn from: fixed capacity, a mask, and cost that follows the count.

Rows are written a whole batch at a time, padding included, so that the count does not depend on what was told. Work on
the record runs on the smallest prefix of a few fixed sizes, its buckets, that holds the count (`on_bucket`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.method import Count, count, ranked
from jaxhpo.space import working_dtype

SMALLEST = 64
GROWTH = 4
BEST = 0.25


class History(NamedTuple):
    """Told trials, oldest first."""

    unit: jax.Array
    """float[capacity, dims], 0.5 in rows that hold no trial"""
    losses: jax.Array
    """float[capacity], +inf where the trial failed and in rows that hold none"""
    mask: jax.Array
    """bool[capacity]: rows that hold a finished trial, failed ones included"""
    count: Count  # type: ignore[assignment]  # not the count of tuples
    """i32[]: rows appended so far, padding, failures and rows that made room included"""

    @property
    def succeeded(self) -> jax.Array:
        """bool[capacity]: rows that hold a trial with a finite loss."""
        return self.mask & jnp.isfinite(self.losses)

    @property
    def failed(self) -> jax.Array:
        """bool[capacity]: rows that hold a failed trial."""
        return self.mask & ~jnp.isfinite(self.losses)


def buckets(capacity: int, growth: int = GROWTH) -> tuple[int, ...]:
    """The sizes that a record of at least `capacity` rows is worked on at; the last one is its capacity.

    Args:
      capacity: rows wanted, at least 1.
      growth: ratio of neighbouring sizes. A size costs about a second of compile time, so 4; a method whose cost is
        cubic in the rows takes 2.

    Example:
      >>> from jaxhpo import history
      >>> history.buckets(1000)
      (64, 256, 1024)
    """
    sizes = [SMALLEST]
    while sizes[-1] < capacity:
        sizes.append(sizes[-1] * growth)
    return tuple(sizes)


def empty(dims: int, capacity: int = SMALLEST, growth: int = GROWTH) -> History:
    """A record of no trials, with room for at least `capacity` rows."""
    size, dtype = buckets(capacity, growth)[-1], working_dtype()
    return History(jnp.full((size, dims), 0.5, dtype), jnp.full(size, jnp.inf, dtype), jnp.zeros(size, bool), count())


def reserve(history: History, capacity: int, growth: int = GROWTH) -> History:
    """`history` with room for at least `capacity` rows, rounded up to a bucket; never less than it has."""
    more = buckets(capacity, growth)[-1] - history.losses.shape[0]
    if more <= 0:
        return history
    return History(
        jnp.pad(history.unit, ((0, more), (0, 0)), constant_values=0.5),
        jnp.pad(history.losses, (0, more), constant_values=jnp.inf),
        jnp.pad(history.mask, (0, more)),
        history.count,
    )


def append(history: History, unit: jax.Array, losses: jax.Array, active: jax.Array) -> History:
    """`history` with a batch of told trials behind its last row.

    Where it has no room for the whole batch, the oldest trials that are not among the best quarter leave.

    Args:
      history: the record.
      unit: float[batch, dims] in [0, 1].
      losses: float[batch]; NaN and the infinities are failures.
      active: bool[batch]; the other rows are padding, and nothing in them is read.

    Raises:
      ValueError: the batch has more rows than the record.
    """
    capacity, batch = history.losses.shape[0], unit.shape[0]
    if batch > capacity:
        raise ValueError(f"{batch} rows told at once, but the history holds {capacity}; reserve(state, {batch}) first")
    dtype = history.losses.dtype
    rows = (
        jnp.where(active[:, None], unit.astype(dtype), 0.5),
        jnp.where(active, ranked(losses.astype(dtype)), jnp.inf),
        active,
    )
    told = history.count.value
    # The predicate is a count: under `vmap` it is not batched, and this stays a branch.
    held = lax.cond(told + batch > capacity, functools.partial(_make_room, rows=batch), lambda h: h, history[:3])
    start = jnp.minimum(told, capacity - batch)
    write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    unit, losses, mask = map(write, held, rows)
    return History(unit, losses, mask, Count(told + batch))


def _make_room(held: tuple[jax.Array, ...], rows: int) -> tuple[jax.Array, ...]:
    """Moves the `rows` rows that can best be spared to the end; the order of the others stays."""
    _, losses, mask = held
    capacity = losses.shape[0]
    by_loss = jnp.argsort(losses, stable=True)
    best = jnp.zeros(capacity, bool).at[by_loss[: int(capacity * BEST)]].set(True) & mask & jnp.isfinite(losses)
    worth = mask.astype(jnp.int32) + best
    spared = jnp.argsort(worth, stable=True)[:rows]
    leaves = jnp.zeros(capacity, bool).at[spared].set(True)
    order = jnp.argsort(leaves, stable=True)
    return tuple(x[order] for x in held)


def held(history: History) -> jax.Array:
    """How many of the first rows may hold a trial: i32[]."""
    return jnp.minimum(history.count.value, history.mask.shape[0])


def on_bucket(function: Callable, history: History, *operands: Any, growth: int = GROWTH) -> Any:
    """`function` of the smallest bucket of `history` that holds its count.

    Args:
      function: (history, *operands) -> pytree whose shapes do not depend on the history's capacity.
      history: the record; `function` gets its first rows, and its count.
      *operands: passed on.
      growth: as in `buckets`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxhpo import history
      >>> record = history.append(
      ...     history.empty(dims=1, capacity=1000), jnp.zeros((3, 1)), jnp.array([3.0, 1.0, 2.0]), jnp.ones(3, bool))
      >>> history.on_bucket(lambda h: jnp.array([h.losses.min(), h.losses.shape[0]]), record).tolist()
      [1.0, 64.0]
    """
    rows, told = (history.unit, history.losses, history.mask), history.count

    def of_rows(rows: tuple[jax.Array, jax.Array, jax.Array], *args: Any) -> Any:
        return function(History(*rows, told), *args)

    return on_prefix(of_rows, rows, told, *operands, growth=growth)


def on_prefix(function: Callable, rows: Any, told: Count, *operands: Any, growth: int = GROWTH) -> Any:
    """`function` of the smallest bucket of `rows`, a pytree of arrays [capacity, ...], that holds a count.

    Args:
      function: (rows, *operands) -> pytree whose shapes do not depend on the capacity.
      rows: of which `function` gets the first ones.
      told: how many of them there are; more than the capacity are all of them.
      *operands: passed on.
      growth: as in `buckets`.
    """
    capacity = jax.tree.leaves(rows)[0].shape[0]
    sizes = tuple(size for size in buckets(capacity, growth) if size < capacity) + (capacity,)

    def branch(size: int) -> Callable:
        return lambda rows, *args: function(jax.tree.map(lambda x: x[:size], rows), *args)

    # Not `lax.clamp` or a table look-up: comparisons of a count stay unbatched under `vmap`, whatever else is batched.
    index = sum((told.value > size).astype(jnp.int32) for size in sizes[:-1])
    return lax.switch(index, [branch(size) for size in sizes], rows, *operands)
