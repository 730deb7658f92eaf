"""Polishing: a black-box method whose best trials are refined by gradient descent, and which learns what they become.

A memetic algorithm: Moscato (1989), On evolution, search, optimization, genetic algorithms and martial arts. What the
descent finds is told to the method as its own trials, so its population inherits it: Lamarckian evolution.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhpo import coordinates as at
from jaxhpo.checks import real, whole
from jaxhpo.method import (
    Count,
    Initializer,
    Method,
    PyTree,
    Trials,
    bare,
    black_box,
    count,
    endless,
    failed,
    keep,
    ranked,
    where_rows,
)
from jaxhpo.space import Space, working_dtype
from jaxhpo.steppers import Parts, parts_of, stepper


class Settings(NamedTuple):
    """Numeric settings of polishing."""

    patience: jax.Array
    """float[]: steps without a lower loss after which a descent ends"""
    radius: jax.Array
    """float[]: distance in the unit cube, by the coordinate that differs most, below which two trials count as one"""


class Leaders(NamedTuple):
    """The descents, the one with the lowest loss first; leading axis leaders."""

    point: jax.Array
    """float[leaders, size]: where each goes next, in unconstrained coordinates"""
    optimizer: PyTree
    """what the optimizer keeps"""
    loss: jax.Array
    """float[leaders]: lowest loss of each, +inf where there is none"""
    age: jax.Array
    """i32[leaders]: steps since each began"""
    stalled: jax.Array
    """i32[leaders]: steps since its lowest loss"""
    token: jax.Array
    """i32[leaders]: by which its rows are known"""


class State(NamedTuple):
    """State of polishing."""

    method: PyTree
    """of the black-box method"""
    leaders: Leaders
    tokens: jax.Array
    """i32[]: how many were given out"""
    settings: Settings
    asks: Count
    """i32[]: asks so far"""


class Row(NamedTuple):
    """What a row of an ask remembers."""

    token: jax.Array
    """i32[batch]: of the descent that it belongs to, -1 where the method itself has asked"""
    age: jax.Array
    """i32[batch]: of that descent"""
    aux: PyTree
    """the method's own memory of the row"""


def distances(space: Space, unit: jax.Array) -> jax.Array:
    """How far points are apart by the coordinate that differs most, 1 where a choice does: float[n, n]."""
    apart = jnp.abs(unit[:, None] - unit[None])
    has_levels = np.flatnonzero(space.categorical)
    if has_levels.size:
        level = space.level(unit)[:, np.searchsorted(np.flatnonzero(space.levels), has_levels)]
        apart = apart.at[..., has_levels].set((level[:, None] != level[None]).astype(unit.dtype))
    if space.nesting:
        live = space.active(unit)
        apart = jnp.where(live[:, None] & live[None], apart, 0)
    return apart.max(-1)


def selected(space: Space, leaders: Leaders, unit: jax.Array, number: int, radius: jax.Array) -> Leaders:
    """The `number` best of some descents, of which none is close to a better one.

    Args:
      space: whose points they are.
      leaders: at least that many, in any order.
      unit: float[n, dims], where each is.
      number: how many to keep.
      radius: float[], what is close.
    """
    n = leaders.loss.shape[0]
    order = jnp.argsort(leaders.loss, stable=True)
    is_close = distances(space, unit[order]) < radius
    is_again = (is_close & jnp.tril(jnp.ones((n, n), bool), -1)).any(1)
    loss = jnp.where(is_again, jnp.inf, leaders.loss[order])
    kept = jnp.argsort(loss, stable=True)[:number]
    best: Leaders = jax.tree.map(lambda x: x[order[kept]], leaders)
    return best._replace(loss=loss[kept])


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space,
    batch: int,
    every: int,
    number: int,
    optimizer: Parts,
    uses_gradients: bool,
    parts: tuple[Callable, ...],
) -> tuple[Callable, ...]:
    inner_init, inner_ask, inner_tell, inner_reserve = parts
    c = at.coordinates(space)
    begin, step = stepper(optimizer)

    def init(key: jax.Array, settings: dict) -> State:
        point = at.begin(c, jnp.full((number, len(space.leaves)), 0.5, working_dtype()))
        none = jnp.zeros(number, jnp.int32)
        leaders = Leaders(point, begin(point), jnp.full(number, jnp.inf, point.dtype), none, none, none - 1)
        return State(
            inner_init(key, settings["method"]), leaders, jnp.zeros((), jnp.int32), settings["polish"], count()
        )

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        asks, leaders = state.asks.value, state.leaders
        waiting = () if pending is None else (pending._replace(aux=pending.aux.aux),)
        rows, inner = inner_ask(key, state.method, *waiting)
        # Where there is no descent, the row of the method stays.
        descends = jnp.isfinite(leaders.loss) & ((asks + 1) % every == 0)
        unit = rows.unit.at[:number].set(jnp.where(descends[:, None], at.unit_of(c, leaders.point), rows.unit[:number]))
        row = Row(
            token=jnp.full(batch, -1, jnp.int32).at[:number].set(jnp.where(descends, leaders.token, -1)),
            age=jnp.zeros(batch, jnp.int32).at[:number].set(leaders.age),
            aux=rows.aux,
        )
        trials = black_box(space, unit, asks * batch, aux=row)
        own = jnp.zeros(batch, bool).at[:number].set(descends)
        asked = (at.differentiable(c, hparams) for hparams in (trials.hparams, rows.hparams))
        trials = trials._replace(hparams=where_rows(own, *asked))
        return trials, state._replace(method=inner, asks=Count(asks + 1))

    def advance(
        point: jax.Array, states: PyTree, unit: jax.Array, losses: jax.Array, gradients: PyTree
    ) -> tuple[jax.Array, PyTree, jax.Array]:
        """The next points of some descents, what their optimizers keep, and whether they can go on: bool[n]."""
        fine = ~failed(losses)
        if gradients is None:
            return point, states, fine
        slope = at.slopes(c, point, unit, None, gradients)
        fine &= jnp.isfinite(slope).all(1)
        steps, after = step(point, states, jnp.where(fine[:, None], slope, 0), jnp.where(fine, losses, 0))
        fine &= jnp.isfinite(steps).all(1)
        return (
            where_rows(fine, at.moved(c, point, steps, jnp.zeros(fine.shape, bool)), point),
            where_rows(fine, after, states),
            fine,
        )

    def descend(state: State, trials: Trials, losses: jax.Array, gradients: PyTree) -> tuple[Leaders, jax.Array]:
        """The descents after their rows, and which rows those were."""
        leaders, row = state.leaders, trials.aux
        is_of = trials.active & (row.token == leaders.token[:, None]) & (row.age == leaders.age[:, None])
        is_of &= jnp.isfinite(leaders.loss)[:, None]
        which, has_row = jnp.argmax(is_of, axis=1), is_of.any(1)
        unit, loss, slope = jax.tree.map(lambda x: x[which], (trials.unit, losses, gradients))
        takes = has_row & at.is_at(c, leaders.point, unit)
        point, states, fine = advance(
            leaders.point, leaders.optimizer, at.unit_of(c, leaders.point), jnp.where(takes, loss, 0), slope
        )
        is_lower = takes & (ranked(loss) < leaders.loss)
        stalled = jnp.where(is_lower, 0, leaders.stalled + takes)
        ends = takes & (~fine | (stalled >= state.settings.patience))
        leaders = Leaders(
            point=where_rows(takes, point, leaders.point),
            optimizer=where_rows(takes, states, leaders.optimizer),
            loss=jnp.where(ends, jnp.inf, jnp.where(is_lower, loss, leaders.loss)),
            age=leaders.age + (0 if gradients is None else takes),
            stalled=stalled,
            token=leaders.token,
        )
        return leaders, (is_of & takes[:, None]).any(0)

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        losses = losses.astype(state.leaders.loss.dtype)
        leaders, is_step = descend(state, trials, losses, gradients)
        # All other results can be where a descent begins, those that nobody has asked for, too.
        is_new = trials.active & ~is_step & ~failed(losses)
        soft = space.soft(trials.hparams)
        is_new = is_new if soft is None else is_new & ~soft
        unit, loss = jnp.where(is_new[:, None], trials.unit, 0.5), jnp.where(is_new, losses, 0)
        first = at.vector(c, unit)
        point, states, fine = advance(first, begin(first), at.unit_of(c, first), loss, gradients)
        rows = jnp.arange(losses.shape[0], dtype=jnp.int32)
        new = Leaders(point, states, jnp.where(is_new & fine, losses, jnp.inf), 0 * rows, 0 * rows, state.tokens + rows)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), leaders, new)
        # A new one is where it was told, not where it goes: so that it is not taken for another.
        places = jnp.concatenate([at.unit_of(c, leaders.point), unit])
        told = (gradients,) if uses_gradients and gradients is not None else ()
        return state._replace(
            method=inner_tell(state.method, trials._replace(aux=trials.aux.aux), losses, *told),
            leaders=selected(space, both, places, number, state.settings.radius),
            tokens=state.tokens + losses.shape[0],
        )

    def reserve(state: State, capacity: int) -> State:
        return state._replace(method=inner_reserve(state.method, capacity))

    return init, ask, tell, keep if inner_reserve is keep else reserve


def polish(
    method: Method,
    optimizer: optax.GradientTransformation,
    every: int,
    *,
    leaders: int | None = None,
    patience: float = 10,
    radius: float = 0.02,
) -> Method:
    """A black-box method whose best trials are refined by gradient descent.

    Every `every` asks, the first rows are steps of descents from the best distinct trials, in the coordinates and with
    the conventions of `gradient`; the others, and all rows of the other asks, are what the method proposes. It is told
    all results as its own, gradients too if it uses them. A descent ends after some steps without a lower loss, or for
    a better trial elsewhere. Choices stay as they are in a descent, relaxed ones too.

    Every trial costs a gradient, those of the method too: so each can be where a descent begins.

    Args:
      method: a black-box method that does not end by itself, such as `hpo.genetic(space)`.
      optimizer: any optax optimizer that does not call the objective itself, as for `gradient`.
      every: asks between steps of the descents, at least 1, which is in each.
      leaders: descents side by side, from 1 to the batch of the method; half of it if not given.
      patience: steps without a lower loss after which a descent ends, at least 1.
      radius: distance in the unit cube, by the coordinate that differs most, in [0, 1], below which two trials count
        as one.

    Returns:
      A `Method` with the batch of `method`. Its settings are `{"method": method.settings, "polish": ...}`, the last
      two arguments.

    Raises:
      TypeError, ValueError: an argument is out of its range, or the method cannot be polished.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxhpo as hpo
      >>> def ripples(key, h):
      ...     return jnp.sum((h["x"] - 0.3) ** 2 + 0.1 * jnp.sin(20 * h["x"]) ** 2)
      >>> method = hpo.polish(hpo.genetic({"x": hpo.Array(2, -3.0, 3.0)}, batch=8), optax.adam(0.05), every=1)
      >>> result = hpo.minimize(ripples, method, key=jax.random.key(0), trials=800)
      >>> result.best_loss < 0.001
      True

    Reference:
      Moscato (1989), On evolution, search, optimization, genetic algorithms and martial arts: towards memetic
      algorithms.
    """
    endless(
        method,
        "hpo.genetic(space)",
        "along which no gradient is taken; give a black-box method, such as hpo.genetic(space), and train in its "
        "objective with hpo.unroll",
        "of its own; give one that goes on, such as hpo.genetic(space)",
    )
    every, batch = whole("every", every, 1), method.batch
    number = -(-batch // 2) if leaders is None else whole("leaders", leaders, 1, "half the batch is usual", batch)
    array = functools.partial(jnp.asarray, dtype=working_dtype())
    own = Settings(
        patience=array(real("patience", patience, 1, 1e6, "10 is usual")),
        radius=array(real("radius", radius, 0, 1, "0.02 is usual")),
    )
    settings = {"method": method.settings, "polish": own}
    parts = (bare(method.init), method.ask, method.tell, method.reserve)
    init, ask, tell, reserve = _functions(
        method.space, batch, every, number, parts_of(optimizer), method.uses_gradients, parts
    )
    return Method(
        "polish",
        method.space,
        settings,
        Initializer(init, settings),
        ask,
        tell,
        batch,
        uses_gradients=True,
        reserve=reserve,
    )
