"""Who chooses the configurations of new trials in a race: one method, or one for every level of training.

A level is a number of training steps at which trials are compared; the lowest is 0. Where every level has a method of
its own, their states are stacked, and each is told the trials that have reached its level, when they have reached it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.method import Method, PyTree, Trials, bare, failed, keep
from jaxhpo.space import Space

WIDTH = 4
ROWS = 1024


class Training(NamedTuple):
    """The trials that are on their way to a level."""

    unit: jax.Array
    """float[n, dims]"""
    level: jax.Array
    """i32[n]: which they reach next"""
    aux: PyTree
    """what the method remembers of each"""
    active: jax.Array
    """bool[n]: False where there is no trial"""


class Sampling(NamedTuple):
    """How configurations are chosen."""

    init: Callable
    """(key, settings) -> state"""
    ask: Callable
    """(key, state, fresh, level, training) -> (unit, aux, state): for every row that is `fresh`, bool[batch], and whose
    first level is `level`, i32[batch], a configuration and what the method remembers of it"""
    tell: Callable
    """(state, trials, losses, level, first) -> state: the active rows have reached `level`, i32[rows], which is the
    `first` level of the trial, bool[rows], or not"""
    reserve: Callable
    """(state, capacity) -> state with room for that many told trials"""
    blank: Callable
    """(state, rows) -> (unit, aux): zeros in the shape of that many configurations and of what is remembered of them"""
    ranks: bool = False
    """whether it wants to be told of a trial that is given up: as one that fails on the way to the level above"""


class Waiting(NamedTuple):
    """The trials whose loss a method does not know yet."""

    unit: jax.Array
    """float[n, dims]"""
    active: jax.Array
    """bool[n]: False where there is no trial"""
    aux: PyTree
    """what the method remembers of each"""


class Inner(NamedTuple):
    """The method that chooses, which is asked and told a few rows at a time, and the structure of its state."""

    space: Space
    init: Callable
    ask: Callable
    tell: Callable
    reserve: Callable
    batch: int
    structure: Any

    def hidden(self, state: PyTree) -> tuple[jax.Array, ...]:
        """The leaves of a state: where who is asked depends on the data, what it counts is no `Count`."""
        return tuple(jax.tree.leaves(state))

    def shown(self, leaves: tuple[jax.Array, ...]) -> PyTree:
        """The inverse of `hidden`."""
        return jax.tree.unflatten(self.structure, leaves)

    def drawn(
        self,
        key: jax.Array,
        leaves: tuple[jax.Array, ...],
        number: jax.Array,
        rows: int,
        pending: "Waiting | None" = None,
    ) -> tuple[jax.Array, PyTree, tuple[jax.Array, ...]]:
        """The first points that the method asks for, of which at least `number` are drawn: an ask costs by its rows.

        Args:
          key: of the ask.
          leaves: of the state, as `hidden` gives them.
          number: i32[], how many are needed.
          rows: how many there may be.
          pending: those that still train, if the method is to know.

        Returns:
          The points float[rows or more, dims], what the method remembers of them, and the leaves after it.
        """
        parts = -(-rows // self.batch)
        unit, aux = self.blank(self.shown(leaves), parts * self.batch)

        def some(carry: tuple) -> tuple:
            i, unit, aux, leaves = carry
            waits = []
            if pending is not None:
                more = Waiting(unit, jnp.arange(unit.shape[0]) < i * self.batch, aux)
                both = jax.tree.map(lambda *x: jnp.concatenate(x), pending, more)
                waits = [as_trials(self.space, *both)]
            trials, state = self.ask(jax.random.fold_in(key, i), self.shown(leaves), *waits)
            put = lambda old, new: lax.dynamic_update_slice_in_dim(old, new, i * self.batch, 0)  # noqa: E731
            unit, aux = jax.tree.map(put, (unit, aux), (trials.unit, trials.aux))
            return i + 1, unit, aux, self.hidden(state)

        start = jnp.int32(0), unit, aux, leaves
        return lax.while_loop(lambda carry: carry[0] * self.batch < number, some, start)[1:]

    def told(
        self, leaves: tuple[jax.Array, ...], trials: Trials, losses: jax.Array, change: Callable | None = None
    ) -> tuple[jax.Array, ...]:
        """The leaves after the active rows were told a few at a time: in a race most rows of a tell are none of them.

        Args:
          leaves: of the state, as `hidden` gives them.
          trials: arrays [rows, ...].
          losses: float[rows].
          change: (state, part, rows of the part) -> part, before it is told.
        """
        rows = losses.shape[0]
        width = min(WIDTH, rows)
        order = jnp.pad(jnp.argsort(~trials.active, stable=True), (0, -rows % width))
        number = trials.active.sum(dtype=jnp.int32)

        def some(i: jax.Array, leaves: tuple) -> tuple:
            at = lax.dynamic_slice_in_dim(order, i * width, width)
            part = jax.tree.map(lambda x: x[at], trials)
            part = part._replace(active=i * width + jnp.arange(width) < number)
            state = self.shown(leaves)
            if change is not None:
                part = change(state, part, at)
            return self.hidden(self.tell(state, part, losses[at]))

        return lax.fori_loop(0, (number + width - 1) // width, some, leaves)

    def blank(self, state: PyTree, rows: int) -> tuple[jax.Array, PyTree]:
        """Zeros in the shape of `rows` points and of what the method remembers of them."""
        shapes = jax.eval_shape(lambda s: self.ask(jax.random.key(0), s)[0], state)
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), (shapes.unit, shapes.aux))


def functions_of(method: Method) -> Inner:
    """The functions of a black-box method that goes on."""
    shape = jax.eval_shape(lambda: bare(method.init)(jax.random.key(0), method.settings))
    structure = jax.tree.structure(shape)
    functions = bare(method.init), method.ask, method.tell, method.reserve
    return Inner(method.space, *functions, method.batch, structure)


def inner_of(sampler: Callable, space: Space, batch: int) -> tuple[Inner, PyTree]:
    """What `sampler(space, batch=batch)` builds, and its settings.

    Raises:
      ValueError: it is no method that can choose configurations.
    """
    method: Method = sampler(space, batch=batch)
    if method.slots or method.rounds is not None or method.batch != batch:
        raise ValueError(
            f"sampler gave the method '{method.name}', which ends by itself, trains by itself or has another batch "
            f"than {batch}; give the builder of a black-box method, such as hpo.random"
        )
    return functions_of(method), method.settings


@functools.lru_cache(maxsize=256)
def one(inner: Inner, planned: bool) -> Sampling:
    """One method for all levels, told every trial once: when it has reached its first.

    Args:
      inner: the method.
      planned: whether it is known beforehand which rounds have fresh rows, so that what the method counts does not
        depend on the data.
    """
    hidden, shown = ((lambda x: x), (lambda x: x)) if planned else (inner.hidden, inner.shown)

    def init(key: jax.Array, settings: PyTree) -> PyTree:
        return hidden(inner.init(key, settings["sampler"]))

    def ask(
        key: jax.Array, state: PyTree, fresh: jax.Array, level: jax.Array, training: Training
    ) -> tuple[jax.Array, PyTree, PyTree]:
        del level

        def draw(state: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
            trials, after = inner.ask(key, state)
            return trials.unit, trials.aux, after

        def rest(state: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
            return *blank(state, fresh.shape[0]), state

        if planned:
            unit, aux, state = lax.cond(fresh.any(), draw, rest, state)
        else:
            pending = Waiting(training.unit, training.active, training.aux)
            unit, aux, state = inner.drawn(key, state, fresh.sum(dtype=jnp.int32), fresh.shape[0], pending)
        turn = jnp.cumsum(fresh) - 1
        return *jax.tree.map(lambda x: x[turn], (unit, aux)), state

    def tell(state: PyTree, trials: Trials, losses: jax.Array, level: jax.Array, first: jax.Array) -> PyTree:
        del level
        trials = trials._replace(active=trials.active & first)
        return inner.tell(state, trials, losses) if planned else inner.told(state, trials, losses)

    def reserve(state: PyTree, capacity: int) -> PyTree:
        return hidden(inner.reserve(shown(state), capacity))

    def blank(state: PyTree, rows: int) -> tuple[jax.Array, PyTree]:
        return inner.blank(shown(state), rows)

    return Sampling(init, ask, tell, keep if inner.reserve is keep else reserve, blank)


class Stack(NamedTuple):
    """The methods of all levels."""

    states: tuple[jax.Array, ...]
    """leaves of their states, leading axis = levels"""
    told: jax.Array
    """i32[levels]: how many trials with a finite loss each was told"""
    chance: jax.Array
    """float[]: of a configuration that no method chooses"""


def _start(inner: Inner, levels: int, key: jax.Array, settings: PyTree) -> Stack:
    states = jax.vmap(lambda k: inner.hidden(inner.init(k, settings["sampler"])))(jax.random.split(key, levels))
    return Stack(states, jnp.zeros(levels, jnp.int32), settings["random_fraction"])


class Made(NamedTuple):
    """What a row remembers of how it was chosen."""

    level: jax.Array
    """i32[rows]: whose method has chosen it, -1 is chance"""
    aux: PyTree
    """what that method remembers"""


def _told(
    inner: Inner, stack: Stack, trials: Trials, losses: jax.Array, level: jax.Array, adopt: Callable | None
) -> Stack:
    """The stack after every method was told the rows of its level, and those that failed below, in small parts."""
    levels = stack.told.shape[0]
    made: Made = trials.aux
    trials = trials._replace(aux=made.aux)

    def tell(_: None, one: tuple) -> tuple[None, tuple]:
        leaves, here = one
        mine = level == here
        if adopt is None:
            mine |= failed(losses) & (level < here)

        def adopted(state: PyTree, part: Trials, at: jax.Array) -> Trials:
            if adopt is None:
                return part
            by_chance, elsewhere = made.level[at] < 0, made.level[at] != here
            return part._replace(aux=adopt(state, part.aux, part.active & elsewhere, by_chance))

        return None, inner.told(leaves, trials._replace(active=trials.active & mine), losses, adopted)

    _, states = lax.scan(tell, None, (stack.states, jnp.arange(levels, dtype=jnp.int32)))
    counts = trials.active & ~failed(losses) & (level == jnp.arange(levels)[:, None])
    return stack._replace(states=states, told=stack.told + counts.sum(1, dtype=jnp.int32))


def _room(inner: Inner, stack: Stack, capacity: int) -> Stack:
    room = lambda leaves: inner.hidden(inner.reserve(inner.shown(leaves), min(capacity, ROWS)))  # noqa: E731
    return stack._replace(states=jax.vmap(room)(stack.states))


@functools.lru_cache(maxsize=256)
def largest(
    inner: Inner,
    space: Space,
    levels: int,
    batch: int,
    enough: int,
    adopt: Callable | None = None,
    ready: Callable | None = None,
) -> Sampling:
    """The method of the highest level that was told enough trials chooses; before there is one, chance does.

    Args:
      inner: the method that every level has.
      space: what is searched.
      levels: how many.
      batch: rows of an ask.
      enough: trials with a finite loss, at least 1.
      adopt: (state, aux, elsewhere, by_chance) -> aux: what the method of a level is to remember of the rows that it
        has not chosen itself, bool[rows], and of these, those that chance has. With it, the rows of an ask are taken
        from any one on, since those of a population are for its members in turn. Without, they are taken from the
        first on, since that is usually the best, and a trial that is given up counts as failed on all levels above.
      ready: (state) -> bool[]: what must hold of a state besides.
    """

    def init(key: jax.Array, settings: PyTree) -> Stack:
        return _start(inner, levels, key, settings)

    def ask(
        key: jax.Array, stack: Stack, fresh: jax.Array, level: jax.Array, training: Training
    ) -> tuple[jax.Array, PyTree, Stack]:
        del level
        key_unit, key_chance, key_ask, key_row = jax.random.split(key, 4)
        able = stack.told >= enough
        if ready is not None:
            able &= jax.vmap(lambda leaves: ready(inner.shown(leaves)))(stack.states)
        best = jnp.max(jnp.where(able, jnp.arange(levels, dtype=jnp.int32), 0))
        by_chance = (jax.random.uniform(key_chance, (batch,)) < stack.chance) | ~able.any()
        leaves = tuple(x[best] for x in stack.states)
        pending = Waiting(training.unit, training.active & (training.level <= best), training.aux.aux)

        chosen = fresh & ~by_chance
        number = chosen.sum(dtype=jnp.int32)
        unit, aux, leaves = inner.drawn(key_ask, leaves, number, batch, pending)
        states = tuple(x.at[best].set(new) for x, new in zip(stack.states, leaves, strict=True))
        turn = jnp.cumsum(chosen) - 1
        if adopt is not None:
            drawn = jnp.maximum(-(-number // inner.batch) * inner.batch, 1)
            turn = (turn + jax.random.randint(key_row, (), 0, drawn)) % drawn
        unit, aux = jax.tree.map(lambda x: x[turn], (unit, aux))
        unit = jnp.where(by_chance[:, None], space.sample(key_unit, batch).astype(unit.dtype), unit)
        return unit, Made(jnp.where(by_chance, -1, best), aux), stack._replace(states=states)

    def tell(stack: Stack, trials: Trials, losses: jax.Array, level: jax.Array, first: jax.Array) -> Stack:
        del first
        return _told(inner, stack, trials, losses, level, adopt)

    def blank(stack: Stack, rows: int) -> tuple[jax.Array, Made]:
        unit, aux = inner.blank(inner.shown(tuple(x[0] for x in stack.states)), rows)
        return unit, Made(jnp.zeros(rows, jnp.int32), aux)

    return Sampling(init, ask, tell, functools.partial(_room, inner), blank, ranks=adopt is None)


def as_trials(space: Space, unit: jax.Array, active: jax.Array, aux: PyTree) -> Trials:
    """Trials of which nothing is known but these."""
    none = jnp.full(active.shape[0], -1, jnp.int32)
    return Trials(space.decode(unit), unit, none, none * 0, none, none * 0, active, aux)


def given_up(
    space: Space, sampling: Sampling, state: PyTree, unit: jax.Array, aux: PyTree, level: jax.Array, active: jax.Array
) -> PyTree:
    """The state of a sampling after it was told of trials, arrays [rows, ...], that get no further than `level`."""
    if not sampling.ranks:
        return state
    losses = jnp.full(unit.shape[0], jnp.inf, unit.dtype)
    return sampling.tell(state, as_trials(space, unit, active, aux), losses, level + 1, jnp.zeros_like(active))


@functools.lru_cache(maxsize=256)
def pooled(inner: Inner, space: Space, levels: int, batch: int, enough: int) -> Sampling:
    """One method is told what came of a trial at every level: a loss at a higher level is lower than any at a lower.

    Arguments as in `largest`. The method is to look at the order of the losses only, as `tpe` does.
    """
    base = largest(inner, space, 1, batch, enough)

    def ask(
        key: jax.Array, stack: Stack, fresh: jax.Array, level: jax.Array, training: Training
    ) -> tuple[jax.Array, PyTree, Stack]:
        return base.ask(key, stack, fresh, level, training._replace(level=jnp.zeros_like(training.level)))

    def tell(stack: Stack, trials: Trials, losses: jax.Array, level: jax.Array, first: jax.Array) -> Stack:
        ordered = jnp.where(failed(losses), losses, by_level(losses, level, levels))
        return base.tell(stack, trials, ordered, jnp.zeros_like(level), first)

    return Sampling(base.init, ask, tell, base.reserve, base.blank)


def by_level(losses: jax.Array, level: jax.Array, levels: int) -> jax.Array:
    """Numbers in the order of the levels, the highest first, and in a level in that of the losses: float[n].

    All but the last few bits of a loss are kept: floats of one sign are ordered as the integers with the same bits.
    """
    bits = jnp.finfo(losses.dtype).bits
    integer = jnp.dtype(f"int{bits}")
    flip = lambda x: x ^ ((x >> (bits - 1)) & jnp.iinfo(integer).max)  # noqa: E731
    # One bit more, so that no exponent is that of infinity.
    spared = (levels - 1).bit_length() + 1
    order = flip(lax.bitcast_convert_type(losses, integer)) >> spared
    middle = (levels - 1) // 2
    order += (middle - level).astype(integer) << (bits - spared)
    return lax.bitcast_convert_type(flip(order), losses.dtype)
