"""A study as a pure function of a PRNG key."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhpo.chain import norms
from jaxhpo.engine.lanes import Bank, Incumbent, Lanes, Told, make_lanes
from jaxhpo.engine.problem import check
from jaxhpo.method import Method, Trials, ask_key, bare, trial_keys, where_rows
from jaxhpo.space import Space
from jaxhpo.trainable import Trainable, unjitted

PyTree = Any
KNOWN_ROUND = 2**31 - 2


class Trace(NamedTuple):
    """What a study has seen; every array has the leading axes [rounds, batch]."""

    trials: Trials
    """without `aux`"""
    reached: Any
    """i32[rounds, batch]: training steps behind each trial"""
    losses: Any
    """float[rounds, batch]: of the active rows"""
    parent: Any
    """i32[rounds, batch]: id of the trial whose training state each has continued, its own where it went on, -1 where
    it started afresh"""
    best_state: PyTree = None
    """the training state that had the lowest finite loss; `None` for an objective"""
    gradient_norms: Any = None
    """float[rounds, batch]: lengths of the gradients by the unit cube and by the weights of relaxed choices; `None`
    where the method uses none"""
    soft: Any = None
    """bool[rounds, batch]: losses at soft weights of a relaxed choice, which are those of no choice and never the
    best; `None` where there are none"""


class Carry(NamedTuple):
    """A study between two rounds."""

    state: PyTree
    """of the method"""
    bank: Bank
    incumbent: Incumbent


class Initial(NamedTuple):
    """Points to start from: what the user knows already, and what is to be tried first."""

    unit: np.ndarray
    """float[n, dims]: points to be tried"""
    hparams: PyTree
    """shaped like the space, arrays [n, ...]"""
    known_unit: np.ndarray
    """float[m, dims]: points whose losses are known"""
    known_hparams: PyTree
    known_losses: np.ndarray
    """float[m]"""

    def known_rows(self, batch: int) -> int:
        """Rows that are told of them: whole batches."""
        return math.ceil(len(self.known_losses) / batch) * batch


class Engine(NamedTuple):
    """A problem and a method, put together."""

    start: Callable
    """(key, settings, capacity) -> carry"""
    round: Callable
    """(key, round, carry) -> (carry, trace of the round)"""
    restore: Callable
    """(state) -> the training state as the user's functions know it"""


def read_initial(method: Method, initial: Sequence | None) -> Initial | None:
    """`initial` as arrays.

    Args:
      method: whose space the points are from.
      initial: points of native Python values, or `(point, loss)` pairs where the loss is known.

    Raises:
      ValueError: a point is not in the space, or would take the place of one that the method must not miss.
    """
    if not initial:
        return None
    space = method.space
    if not isinstance(initial, list | tuple):
        raise TypeError(
            f"initial must be a list of points or of (point, loss) pairs, got {initial!r}; put it in a list"
        )
    untried, known, losses = [], [], []
    for item in initial:
        loss = _known_loss(space, item)
        if loss is None:
            untried.append(space.read(item))
        elif loss == -math.inf:
            raise ValueError(
                f"initial has the loss -inf at {item[0]!r}; a loss must be finite, or NaN for a failed trial"
            )
        else:
            known.append(space.read(item[0]))
            losses.append(loss)

    if untried and method.rounds is not None and not method.slots:
        raise ValueError(
            f"initial has {len(untried)} points to try first, but '{method.name}' visits each of its own once; run "
            "them apart, or choose another method"
        )

    def stacked(points: list) -> tuple[np.ndarray, PyTree]:
        if not points:
            template = space.decode(np.zeros((0, space.dims)))
            return np.zeros((0, space.dims)), template
        hparams = jax.tree.map(lambda *leaves: np.stack(leaves), *points)
        return np.asarray(space.encode(hparams)), hparams

    return Initial(*stacked(untried), *stacked(known), np.array(losses))


def _known_loss(space: Space, item: Any) -> float | None:
    """The loss of a `(point, loss)` pair, `None` for a point: in a space that is a pair, a point comes first."""
    if not (isinstance(item, tuple) and len(item) == 2 and np.ndim(item[1]) == 0):
        return None
    try:
        space.read(item)
        return None
    except ValueError:
        pass
    try:
        return float(item[1])
    except (TypeError, ValueError):
        return None


def begin_with(initial: Initial, trials: Trials) -> Trials:
    """The first fresh trials of a study, replaced by the user's points."""
    n = len(initial.unit)
    mine = trials.active & (trials.source < 0) & (trials.id < n)
    at = jnp.clip(trials.id, 0, n - 1)
    points = initial.unit, initial.hparams
    asked = trials.unit, trials.hparams
    unit, hparams = where_rows(
        mine, jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype)[at], points, asked), asked
    )
    return trials._replace(unit=unit, hparams=hparams)


def tell_known(method: Method, initial: Initial, key: jax.Array, state: PyTree) -> PyTree:
    """Tells a fresh method the results that are known: as rows of its own asks, which ran no steps."""
    n, batch = len(initial.known_losses), method.batch
    chunks = -(-n // batch)

    def whole(rows: np.ndarray) -> jax.Array:
        """In whole batches: [chunks, batch, ...]."""
        filled = np.pad(np.asarray(rows), ((0, chunks * batch - n), *((0, 0),) * (np.ndim(rows) - 1)))
        return jnp.asarray(filled).reshape(chunks, batch, *filled.shape[1:])

    def tell(state: PyTree, chunk: tuple) -> tuple[PyTree, None]:
        start, unit, hparams, losses, active = chunk
        asked, _ = method.ask(jax.random.fold_in(ask_key(key, KNOWN_ROUND), start), state)
        put = lambda new, old: where_rows(active, new.astype(old.dtype), old)  # noqa: E731
        idle = jnp.zeros(batch, jnp.int32)
        trials = asked._replace(
            unit=put(unit, asked.unit),
            hparams=jax.tree.map(put, hparams, asked.hparams),
            steps=idle,
            source=idle - 1,
            slot=idle + method.slots,
            active=active,
        )
        # Their gradients are not known.
        return method.tell(state, trials, jnp.where(active, losses, jnp.nan).astype(asked.unit.dtype)), None

    rows = initial.known_unit, initial.known_hparams, initial.known_losses, np.ones(n, bool)
    starts = jnp.arange(0, chunks * batch, batch)
    return jax.lax.scan(tell, state, (starts, *jax.tree.map(whole, rows)))[0]


def first_state(method: Method, key: jax.Array, settings: PyTree, capacity: int, initial: Initial | None) -> PyTree:
    """The method's state before its first ask, with room for `capacity` rows and told what is known."""
    state = method.reserve(bare(method.init)(ask_key(key), settings), capacity)
    if initial is not None and len(initial.known_losses):
        state = tell_known(method, initial, key, state)
    return state


def trace_of(method: Method, trials: Trials, told: Told) -> Trace:
    """What a round has seen, arrays [batch, ...]."""
    trace = Trace(trials._replace(aux=()), told.reached, told.losses, told.parent)
    if not method.uses_gradients:
        return trace
    lengths = norms(method.space, trials.unit, told.gradients)
    return trace._replace(gradient_norms=lengths, soft=method.space.soft(trials.hparams))


def make_engine(
    problem: Callable | Trainable,
    method: Method,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    initial: Initial | None = None,
) -> Engine:
    """The two functions of which every driver is made. Arguments as in `study`, checked already."""
    runner: Lanes = make_lanes(unjitted(problem), method, lanes, mesh)

    def start(key: jax.Array, settings: PyTree, capacity: int) -> Carry:
        return Carry(first_state(method, key, settings, capacity, initial), *runner.init())

    def round_(key: jax.Array, round: jax.Array, carry: Carry) -> tuple[Carry, Trace]:
        trials, state = method.ask(ask_key(key, round), carry.state)
        if initial is not None and len(initial.unit):
            trials = begin_with(initial, trials)
        told: Told
        bank, incumbent, told = runner.run(carry.bank, carry.incumbent, trial_keys(key, trials), trials)
        state = method.tell(state, trials, told.losses, told.gradients)
        return Carry(state, bank, incumbent), trace_of(method, trials, told)

    return Engine(start, round_, runner.restore)


def study(
    problem: Callable | Trainable,
    method: Method,
    rounds: int | None = None,
    *,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    initial: Sequence | None = None,
) -> Callable:
    """A whole study as a pure function, which `jit`, `vmap` and `grad` take like any other.

    Args:
      problem: an objective `(key, hparams) -> loss`, or a `Trainable` where the method's trials carry steps.
      method: how to search.
      rounds: asks, at least 1; what the method needs to end by itself if not given.
      lanes: how many trials run side by side, at least 1; the method's batch if not given.
      mesh: devices over which the lanes are spread.
      initial: points of native Python values to be tried first, or `(point, loss)` pairs to be told first.

    Returns:
      `(key, settings=None) -> (state, Trace)`: the method's last state, and all that was seen. `settings` has the
      shape of `method.settings`.

    Raises:
      ValueError, TypeError: the problem does not suit the method, or a number is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.random({"x": hpo.Float(-1, 1)}, batch=4)
      >>> run = hpo.study(lambda key, hparams: hparams["x"] ** 2, method, rounds=8)
      >>> state, traces = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 16))
      >>> traces.losses.shape
      (16, 8, 4)
    """
    rounds = check(problem, method, lanes=lanes, mesh=mesh, rounds=rounds)
    if rounds is None:
        raise ValueError(f"rounds must be given, since '{method.name}' does not end by itself; say rounds=64")
    given = read_initial(method, initial)
    engine = make_engine(problem, method, lanes, mesh, given)
    room = rounds * method.batch + (given.known_rows(method.batch) if given else 0)

    def run(key: jax.Array, settings: PyTree = None) -> tuple[PyTree, Trace]:
        settings = method.settings if settings is None else settings
        carry = engine.start(key, settings, room)
        carry, trace = jax.lax.scan(lambda c, r: engine.round(key, r, c), carry, jnp.arange(rounds))
        return carry.state, trace._replace(best_state=engine.restore(carry.incumbent.state))

    return run
