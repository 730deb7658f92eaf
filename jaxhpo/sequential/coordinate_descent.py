"""Coordinate descent: line searches along one coordinate after another, many points of a line at a time.

Wright (2015), Coordinate descent algorithms, for the frame. A line is first a grid over its whole length; what follows
is the golden section search of Kiefer (1953), Sequential minimax search for a maximum, for as many points as a round
has. After a cycle over the coordinates comes the pattern move of Hooke and Jeeves (1961), "Direct search" solution of
numerical and statistical problems: further along the way that the cycle went. Only comparisons of losses decide.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.checks import one_of, whole
from jaxhpo.draws import two_uniforms
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count, ranked
from jaxhpo.sequential.line import Bracket, Lines, Told, along, close, lines, points, reopen, unknown
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import best_rows, latin_hypercube, levels, reflect

GOLDEN = (5**0.5 - 1) / 2
ROWS_A_START = 4
STRIDES = np.array([1.0, 2.0, 4.0, 0.5])
POINT, PATTERN, START = -1, -2, -3
"""in the place of a row's coordinate: a point on no line, a pattern move, the first point of a start"""


class Settings(NamedTuple):
    """Numbers that steer the lines; float[] each."""

    span: jax.Array
    """share of a line that its first grid spans"""
    section: jax.Array
    """share of the longer side of a bracket at which a single point goes, from the incumbent on"""
    widen: jax.Array
    """how far a bracket reaches past the outermost point of a line that is its best, in gaps between points"""
    stride: jax.Array
    """of a pattern move, in moves of the last cycle; 0 is none"""
    resolution: jax.Array
    """a bracket is done when both of its sides are below it"""
    patience: jax.Array
    """in adaptive order: cycles after which a coordinate's turn comes whatever its line has shown"""


class Row(NamedTuple):
    """What a row of an ask remembers; i32[batch]."""

    start: jax.Array
    """whose it is"""
    coordinate: jax.Array
    """that it varies, or what else it is"""
    version: jax.Array
    """of the incumbent that it started from"""


class State(NamedTuple):
    """Where the starts are."""

    settings: Settings
    x: jax.Array
    """float[starts, dims]: the incumbents"""
    loss: jax.Array
    """float[starts]: theirs, +inf where the trial failed"""
    known: jax.Array
    """bool[starts]: whether it was told"""
    version: jax.Array
    """i32[starts]: changes of the incumbent"""
    bracket: Bracket
    stake: jax.Array
    """float[starts, dims]: the worse loss of a bracket's ends when its line was told last, -inf where it was flat"""
    visits: jax.Array
    """i32[starts, dims]: rows told on the line since the start began"""
    last: jax.Array
    """i32[starts, dims]: the clock when its line was told last"""
    told: jax.Array
    """i32[starts, dims]: levels of a categorical told since other coordinates have moved"""
    cursor: jax.Array
    """i32[starts, dims]: the level of a categorical that comes next"""
    clock: jax.Array
    """i32[starts]: lines told"""
    cycle: jax.Array
    """i32[starts]: lines told since the last pattern move"""
    base: jax.Array
    """float[starts, dims]: the incumbents then"""
    turn: jax.Array
    """float[starts, dims]: order of the first cycle, largest first"""
    asked: Count
    """i32[]: trials asked for"""


def snap(space: Space, unit: jax.Array) -> jax.Array:
    """Points moved to the middles of their levels, so that equal values have equal coordinates."""
    has_levels = np.flatnonzero(space.levels)
    return unit.at[..., has_levels].set(space.middle(space.level(unit))) if len(has_levels) else unit


def pattern(x: jax.Array, base: jax.Array, strides: jax.Array, categorical: np.ndarray) -> jax.Array:
    """Points further along from `base` through x, float[starts, dims], mirrored at the bounds: [starts, n, dims]."""
    step = jnp.where(categorical, 0, x - base)
    return reflect(x[:, None] + strides[:, None] * step[:, None])


@functools.lru_cache(maxsize=256)
def _functions(space: Space, starts: int, order: str, batch: int) -> tuple[Callable, Callable, Callable]:
    dims, categorical = space.dims, space.categorical
    number = np.maximum(space.levels, 1).astype(np.int32)
    present = min(starts, batch)
    most = -(-batch // present)
    # Rows go round the starts; the first ones have one row more where the batch does not divide.
    rows_of = np.array([len(range(i, batch, present)) for i in range(present)], np.int32)
    moves = min(len(STRIDES), max(most // 2, 1))
    # A real coordinate takes all the rows that are left, so only levels can make an ask speak of several.
    slots = min(most, dims) if space.levels.any() else 1

    def init(key: jax.Array, settings: Settings) -> State:
        key_x, key_turn = jax.random.split(key)
        dtype = working_dtype()
        x = latin_hypercube(key_x, starts, dims)
        # The middle of the box is the best guess there is, but options have no middle.
        x = snap(space, x.at[0].set(jnp.where(jnp.asarray(categorical), x[0], 0.5)))
        turn, cursor = two_uniforms(key_turn, (starts, dims))
        zeros = jnp.zeros((starts, dims), jnp.int32)
        none = jnp.zeros(starts, jnp.int32)
        return State(
            settings=settings,
            x=x,
            loss=jnp.full(starts, jnp.inf, dtype),
            known=jnp.zeros(starts, bool),
            version=none,
            bracket=unknown(x, settings.span),
            stake=jnp.full(x.shape, -jnp.inf, x.dtype),
            visits=zeros,
            last=zeros,
            told=zeros,
            cursor=(cursor * number).astype(jnp.int32),
            clock=none,
            cycle=none,
            base=x,
            turn=turn,
            asked=count(),
        )

    def turns(state: State, left: Lines, eligible: jax.Array) -> jax.Array:
        """The coordinates whose turn it is, first one first: i32[starts, slots]."""
        age = state.clock[:, None] - state.last
        is_due = age > state.settings.patience * (left.room > 0).sum(1, keepdims=True)
        is_new = state.visits == 0
        rank = jnp.where(is_new, 0, jnp.where(is_due | (order == "cyclic"), 1, 2))
        rank = jnp.where(eligible, rank, 3)
        value = jnp.where(is_new, state.turn, jnp.where(rank == 1, age.astype(state.stake.dtype), state.stake))
        if slots == 1:  # a sort of 1,000 dims would take ten times as long as all the rest
            first = jnp.ones(rank.shape, bool)
            for key in (rank, -value, -age):
                first &= key == jnp.where(first, key, jnp.asarray(jnp.inf, value.dtype)).min(1, keepdims=True)
            return jnp.argmax(first, axis=1, keepdims=True).astype(jnp.int32)
        index = jnp.broadcast_to(jnp.arange(dims, dtype=jnp.int32), rank.shape)
        return lax.sort((rank, -value, -age, index), dimension=1, num_keys=3)[3][:, :slots]

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        settings, asked = state.settings, state.asked.value
        which = jnp.arange(present, dtype=jnp.int32)
        if starts > batch:
            which = (asked + which) % starts
            now = jax.tree.map(lambda z: z[which] if z.ndim else z, state)
        else:
            now = state
        free, mask = two_uniforms(key, (present, dims))
        busy, waiting = jnp.zeros((present, dims), bool), jnp.zeros((2, present), bool)
        if pending is not None:
            row: Row = pending.aux
            mine = (row.start == which[:, None]) & pending.active
            at = jnp.where(mine & (row.coordinate >= 0), row.coordinate, dims)
            busy = busy.at[jnp.arange(present)[:, None], at].set(True, mode="drop")
            same = mine & (row.version == now.version[:, None])
            waiting = jnp.stack([(same & (row.coordinate == kind)).any(1) for kind in (START, PATTERN)])

        # Points of no line, each with numbers of its own out of one draw: the first is where a start may begin anew.
        shift = GOLDEN * jnp.arange(most, dtype=free.dtype)[:, None]
        strides = settings.stride * jnp.asarray(STRIDES[:moves], free.dtype)
        steps = (now.x != now.base) & ~categorical
        further = pattern(now.x, now.base, strides, categorical)
        far = snap(space, jnp.concatenate([(free[:, None] + shift) % 1, further], axis=1))
        further = jnp.where(steps[:, None], far[:, most:], now.x[:, None])

        room_on = lambda z: lines(space, z.x, z.bracket, z.told, settings.section, settings.resolution, batch)  # noqa: E731
        is_over = ~(room_on(now).room > 0).any(1) | (now.known & jnp.isinf(now.loss))
        begins = (~now.known | is_over) & ~waiting[0]
        anew = (begins & now.known)[:, None]
        x = jnp.where(anew, far[:, 0], now.x)
        bracket = jax.tree.map(lambda new, old: jnp.where(anew, new, old), unknown(x, settings.span), now.bracket)
        visits, told = (jnp.where(anew, 0, z) for z in (now.visits, now.told))
        now = now._replace(x=x, bracket=bracket, visits=visits, told=told)
        left = room_on(now)
        room = jnp.where(busy & ~anew, 0, left.room)
        is_cycle = now.cycle >= (left.room > 0).sum(1)
        jumps = is_cycle & ((steps & (left.room > 0)).sum(1) > 1) & ~begins & ~waiting[1] & (strides[0] > 0)

        special = jnp.minimum(jnp.where(begins, 1, jnp.where(jumps, moves, 0)), rows_of)[:, None]
        chosen = turns(now, left, room > 0)
        chosen_room = along(room, chosen)
        upto = jnp.cumsum(chosen_room, axis=1)
        t = jnp.arange(most, dtype=jnp.int32) - special
        slot = (t[:, :, None] >= upto[:, None, :]).sum(-1)
        is_line = (t >= 0) & (slot < slots)
        slot = jnp.minimum(slot, slots - 1)
        begin, d = along(upto - chosen_room, slot), along(chosen, slot)
        n = jnp.maximum(jnp.minimum(along(upto, slot), rows_of[:, None] - special) - begin, 1)
        unit = points(space, x, left, visits == 0, now.cursor, settings.section, d, t - begin, n)

        mixed = jnp.where((mask[:, None] + shift) % 1 < 0.5, far[:, :most], x[:, None])
        jump = jnp.where(begins[:, None, None], x[:, None], further[:, np.minimum(np.arange(most), moves - 1)])
        is_special = (t < 0)[..., None]
        unit = jnp.where(is_special, jump, jnp.where(is_line[..., None], unit, mixed))
        kind = jnp.where(begins, START, PATTERN)[:, None]
        coordinate = jnp.where(t < 0, kind, jnp.where(is_line, d, POINT))
        rows = Row(*(jnp.broadcast_to(z, coordinate.shape) for z in (which[:, None], coordinate, now.version[:, None])))
        by_row = lambda z: jnp.swapaxes(z, 0, 1).reshape(most * present, *z.shape[2:])[:batch]  # noqa: E731
        trials = black_box(space, by_row(unit), first=asked, aux=jax.tree.map(by_row, rows))
        return trials, state._replace(asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        row: Row = trials.aux
        settings, start, active, unit = state.settings, row.start, trials.active, trials.unit
        loss = jnp.where(active, ranked(losses), jnp.inf).astype(unit.dtype)
        stale = row.version != state.version[start]
        first, begun = best_rows(start, loss, active & (row.coordinate == START) & ~stale, starts)
        anew = begun[:, None]
        x = jnp.where(anew, unit[first], state.x)
        old_loss = jnp.where(begun, loss[first], state.loss)
        bracket = jax.tree.map(lambda new, old: jnp.where(anew, new, old), unknown(x, settings.span), state.bracket)

        # Equal in all other live coordinates: what a row was asked for does not count, only where it is.
        differs = (unit != x[start]) & space.active(x)[start]
        on = active & (differs.sum(1) == 1)
        d = jnp.where(on, jnp.argmax(differs, axis=1), 0).astype(jnp.int32)
        told = Told(on, start, d, jnp.where(on, along(unit, d[:, None])[:, 0], 0), loss)
        best, heard = best_rows(start, loss, active, starts)
        improved = heard & (loss[best] < old_loss)
        new_x = jnp.where(improved[:, None], unit[best], x)
        straight = improved & on[best]
        moved = straight[:, None] & (jnp.arange(dims) == d[best][:, None])
        bracket = close(bracket, x, old_loss, jnp.where(moved, new_x, x), told, settings.widen)
        # After a jump the brackets travel along, but for ends at which nothing was told.
        jumped = jnp.where((improved & ~straight)[:, None], new_x - x, 0)
        travel = lambda at, value, bound: jnp.where(jnp.isneginf(value) & bound(at), at, at + jumped)  # noqa: E731
        bracket = bracket._replace(
            low=travel(bracket.low, bracket.low_loss, lambda at: at <= 0),
            high=travel(bracket.high, bracket.high_loss, lambda at: at >= 1),
        )
        bracket = reopen(space, bracket, new_x, improved[:, None] & ~moved)

        is_told = on | (active & stale & (row.coordinate >= 0))
        where = jnp.where(is_told, start, starts), jnp.where(on, d, jnp.maximum(row.coordinate, 0))
        rows = jnp.zeros((starts, dims), jnp.int32).at[where].add(1, mode="drop")
        lines_told = (rows > 0).sum(1, dtype=jnp.int32)
        clock = state.clock + lines_told
        # The worse the ends are, the more there may be to gain between them; a failed trial says nothing of that.
        ends = (jnp.where(jnp.isfinite(z), z, -jnp.inf) for z in (bracket.low_loss, bracket.high_loss))
        worse, new_loss = jnp.maximum(*ends), jnp.where(improved, loss[best], old_loss)
        stake = jnp.where(worse > new_loss[:, None], worse, -jnp.inf)
        is_pattern = active & (row.coordinate == PATTERN) & ~stale
        cycled = begun | jnp.zeros(starts, bool).at[jnp.where(is_pattern, start, starts)].set(True, mode="drop")
        keeps = ~anew & (~improved[:, None] | moved)
        passed = rows + (rows > (levels(space, x) - state.cursor) % number)
        return state._replace(
            x=new_x,
            loss=new_loss,
            known=state.known | begun | improved,
            version=state.version + (improved | begun),
            bracket=bracket,
            stake=jnp.where(rows > 0, stake, state.stake),
            visits=jnp.where(anew, 0, state.visits) + rows,
            last=jnp.where(rows > 0, clock[:, None], state.last),
            told=jnp.where(keeps, state.told, 0) + jnp.where(improved[:, None] & ~moved, 0, rows),
            cursor=(state.cursor + passed) % number,
            clock=clock,
            cycle=jnp.where(cycled, 0, state.cycle + lines_told),
            base=jnp.where(cycled[:, None], x, state.base),
        )

    return init, ask, tell


def coordinate_descent(space: PyTree, *, starts: int | None = None, order: str = "adaptive", batch: int = 16) -> Method:
    """Coordinate descent: line searches along one coordinate after another, from several starts at once.

    Good where parameters act much on their own, and strong with few trials. Every start holds its best point and, for
    every coordinate, a bracket around it. A round asks a batch of points on the line of one coordinate, and of more of
    them where a line has fewer levels than the round has points; with every round on a line its bracket shrinks. A
    cycle over the coordinates is followed by a pattern move along the way that it went. Where all brackets are down to
    the resolution, the start begins anew at a random point.

    Args:
      space: a pytree of parameters, or a `Space`.
      starts: points that are improved side by side, at least 1, `batch / 4` if not given; the first one begins in the
        middle of the box. They share the batch; with more starts than rows they take turns.
      order: "adaptive", where the coordinate comes next whose bracket has the worst ends, as there is most to gain,
        and none waits for long, or "cyclic", one after the other.
      batch: trials per ask.

    Returns:
      A `Method` with the settings `Settings`.

    Raises:
      ValueError, TypeError: `starts`, `order` or `batch` is not as above.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.coordinate_descent({"x": hpo.Float(0.0, 10.0), "y": hpo.Float(0.0, 1.0)}, batch=4)
      >>> trials, _ = method.ask(jax.random.key(1), method.init(jax.random.key(0)))
      >>> (trials.unit != trials.unit[0]).any(axis=0).sum().tolist()  # the first point, and a line through it
      1

    Reference:
      Wright (2015), Coordinate descent algorithms. Kiefer (1953), Sequential minimax search for a maximum. Hooke and
      Jeeves (1961), "Direct search" solution of numerical and statistical problems.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    starts = max(batch // ROWS_A_START, 1) if starts is None else whole("starts", starts, 1)
    one_of("order", order, ("adaptive", "cyclic"))
    init, ask, tell = _functions(space, starts, order, batch)
    as_float = functools.partial(jnp.asarray, dtype=working_dtype())
    settings = Settings(*map(as_float, (1.0, 1 - GOLDEN, 1 / GOLDEN, 1.0, 1e-4, 2.0)))
    return Method("coordinate_descent", space, settings, Initializer(init, settings), ask, tell, batch)
