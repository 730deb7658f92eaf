"""Islands: several populations of one method, each by itself, that now and then pass their best trial to a neighbour.

The ring of Tanese (1989), Distributed genetic algorithms, and Whitley, Rana and Heckendorn (1999), The island model
genetic algorithm: on separability, population size and convergence. A migrant is told to the next island like any
trial of its own, so the islands may be of any black-box method.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.checks import whole
from jaxhpo.method import (
    Count,
    Initializer,
    Method,
    PyTree,
    Trials,
    axes,
    bare,
    black_box,
    count,
    endless,
    is_count,
    keep,
    ranked,
    where_rows,
)
from jaxhpo.space import Space


class Best(NamedTuple):
    """The best trial ever told on each island."""

    trials: Trials
    """its row, leading axes [islands, 1]; active from when it is told until it is sent"""
    loss: jax.Array
    """float[islands], +inf where there is none"""
    gradients: PyTree
    """shaped like `hparams`, leading axes [islands, 1]; () where the method takes none"""


class State(NamedTuple):
    """State of the islands."""

    states: PyTree
    """of the method, leading axis islands but at counts"""
    best: Best
    asks: Count
    """i32[]: asks so far"""


class Row(NamedTuple):
    """What a row of an ask remembers."""

    island: jax.Array
    """i32[n * batch]"""
    aux: PyTree
    """the method's own memory of the row"""


def with_counts(state: PyTree, counts: PyTree) -> PyTree:
    """`state` with the counts of another state of the same method."""
    return jax.tree.map(lambda x, y: x if is_count(x) else y, counts, state, is_leaf=is_count)


def without_counts(state: PyTree) -> PyTree:
    """`state` with nothing in the place of its counts."""
    return jax.tree.map(lambda x: () if is_count(x) else x, state, is_leaf=is_count)


def turns(island: jax.Array, active: jax.Array, islands: int) -> jax.Array:
    """Which of the active rows of its island a row is, and `rows` where it is padding: i32[rows]."""
    is_of = active[:, None] & (island[:, None] == jnp.arange(islands))
    turn = jnp.cumsum(is_of, axis=0, dtype=jnp.int32) - 1
    return jnp.where(active, jnp.where(is_of, turn, 0).sum(1, dtype=jnp.int32), island.shape[0])


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, n: int, every: int, batch: int, uses_gradients: bool, parts: tuple[Callable, ...]
) -> tuple[Callable, ...]:
    inner_init, inner_ask, inner_tell, inner_reserve = parts

    def tell_each(states: PyTree, trials: Trials, losses: jax.Array, gradients: PyTree) -> PyTree:
        """Tells every island its own row of the arrays [islands, rows, ...]."""
        along = axes(states)
        arguments = (trials, losses, gradients) if uses_gradients else (trials, losses)
        return jax.vmap(inner_tell, (along, *(0 for _ in arguments)), along)(states, *arguments)

    def init(key: jax.Array, settings: PyTree) -> State:
        one = jax.eval_shape(inner_init, key, settings["method"])
        states = jax.vmap(inner_init, (0, None), axes(one))(jax.random.split(key, n), settings["method"])
        row, _ = jax.eval_shape(inner_ask, key, one)
        none = jax.tree.map(lambda x: jnp.zeros((n, 1, *x.shape[1:]), x.dtype), row)
        slopes = none.hparams if uses_gradients else ()
        return State(states, Best(none, jnp.full(n, jnp.inf, none.unit.dtype), slopes), count())

    def migrate(state: State) -> State:
        best = state.best
        # The ring: island i gets what island i - 1 has found.
        trials, loss, gradients = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), best)
        states = tell_each(state.states, trials, loss[:, None], gradients)
        sent = best.trials._replace(active=jnp.zeros((n, 1), bool))
        return state._replace(states=states, best=best._replace(trials=sent))

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        asks = state.asks.value
        if n > 1:
            # The predicate is a count: under `vmap` it stays a branch.
            state = lax.cond((asks > 0) & (asks % every == 0), migrate, lambda s: s, state)
        along = axes(state.states)
        keys, islands = jax.random.split(key, n), jnp.arange(n, dtype=jnp.int32)

        def ask_one(key: jax.Array, state: PyTree, island: jax.Array) -> tuple[Trials, PyTree]:
            if pending is None:
                return inner_ask(key, state)
            mine = pending.active & (pending.aux.island == island)
            return inner_ask(key, state, pending._replace(active=mine, aux=pending.aux.aux))

        rows, states = jax.vmap(ask_one, (0, along, 0), (0, along))(keys, state.states, islands)
        rows = jax.tree.map(lambda x: x.reshape(n * batch, *x.shape[2:]), rows)
        trials = black_box(space, rows.unit, asks * (n * batch), aux=Row(jnp.repeat(islands, batch), rows.aux))
        # A method that descends gives its integers as floats and its choices as weights.
        return trials._replace(hparams=rows.hparams), state._replace(states=states, asks=Count(asks + 1))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        row: Row = trials.aux
        losses = losses.astype(state.best.loss.dtype)
        told = trials._replace(aux=row.aux), losses, gradients if uses_gradients else ()
        rows = losses.shape[0]
        # One island gets all rows; each of several gets at most a batch at once, as it asked for them.
        width = rows if n == 1 else min(rows, batch)
        turn = turns(row.island, trials.active, n)

        def tell_wave(states: PyTree, wave: jax.Array) -> PyTree:
            place = turn - wave * width
            here = (place >= 0) & (place < width) & trials.active
            at = jnp.where(here, row.island * width + place, n * width)
            source = jnp.full(n * width, rows, jnp.int32).at[at].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
            grid = jnp.minimum(source, rows - 1).reshape(n, width)
            wave_trials, wave_losses, wave_gradients = jax.tree.map(lambda x: x[grid], told)
            active = (source < rows).reshape(n, width)
            return tell_each(states, wave_trials._replace(active=active), wave_losses, wave_gradients)

        states = tell_wave(state.states, jnp.int32(0))
        if rows > width:
            # More rows of one island than it asks for at once: only where several asks were mixed. Counts may not
            # depend on who was told how much, so they move once a tell.
            most = jnp.where(trials.active, turn, 0).max() // width
            counts = states

            def more(carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
                moved = tell_wave(with_counts(carry[0], counts), carry[1])
                return without_counts(moved), carry[1] + 1

            left, _ = lax.while_loop(lambda c: c[1] <= most, more, (without_counts(states), jnp.int32(1)))
            states = with_counts(left, counts)
        return State(states, better(state.best, told, row.island), state.asks)

    def better(best: Best, told: tuple[Trials, jax.Array, PyTree], island: jax.Array) -> Best:
        trials, losses, gradients = told
        is_of = trials.active & (island == jnp.arange(n)[:, None])
        candidates = jnp.where(is_of, ranked(losses), jnp.inf)
        at, least = candidates.argmin(axis=1), candidates.min(axis=1)
        is_better = least < best.loss
        row, slopes = jax.tree.map(lambda x: x[at][:, None], (trials, gradients))
        return Best(
            where_rows(is_better, row, best.trials),
            jnp.where(is_better, least, best.loss),
            where_rows(is_better, slopes, best.gradients),
        )

    def reserve(state: State, capacity: int) -> State:
        asks = -(-capacity // (n * batch))
        along = axes(state.states)
        room = jax.vmap(lambda one: inner_reserve(one, asks * batch + asks // every), (along,), along)
        return state._replace(states=room(state.states))

    return init, ask, tell, keep if inner_reserve is keep else reserve


def islands(method: Method, n: int, every: int) -> Method:
    """Islands: `n` populations of a method, each by itself, that pass their best trial to a neighbour now and then.

    Every `every` asks each island is told the best trial of the one before it in a ring, if that has become better
    since the last time. So they explore apart and still profit from one another.

    Args:
      method: a black-box method that does not end by itself, such as `hpo.genetic(space)`.
      n: islands, at least 1.
      every: asks between migrations, at least 1.

    Returns:
      A `Method` with `n` times the batch of `method`. Its settings are `{"method": method.settings}`, those of every
      island.

    Raises:
      TypeError, ValueError: an argument is out of its range, or the method cannot live on islands.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = hpo.Space({"x": hpo.Float(-1.0, 1.0)})
      >>> method = hpo.islands(hpo.genetic(space, population=10, batch=10), n=4, every=5)
      >>> result = hpo.minimize(lambda key, h: (h["x"] - 0.5) ** 2, method, key=jax.random.key(0), trials=400)
      >>> round(result.best_hparams["x"], 2)
      0.5

    Reference:
      Tanese (1989), Distributed genetic algorithms. Whitley, Rana and Heckendorn (1999), The island model genetic
      algorithm: on separability, population size and convergence.
    """
    endless(
        method,
        "hpo.genetic(space)",
        "which cannot migrate; give a black-box method, such as hpo.genetic(space), and train in its objective with "
        "hpo.unroll",
        "and learns from no neighbour; give one that goes on, such as hpo.genetic(space)",
    )
    n, every = whole("n", n, 1), whole("every", every, 1, "a large number is never to migrate")
    parts = (bare(method.init), method.ask, method.tell, method.reserve)
    init, ask, tell, reserve = _functions(method.space, n, every, method.batch, method.uses_gradients, parts)
    settings = {"method": method.settings}
    return Method(
        name="islands",
        space=method.space,
        settings=settings,
        init=Initializer(init, settings),
        ask=ask,
        tell=tell,
        batch=n * method.batch,
        uses_gradients=method.uses_gradients,
        reserve=reserve,
    )
