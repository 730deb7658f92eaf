"""DARTS: architectures as softmax weights, which descend while the network that has them all trains.

Liu, Simonyan and Yang (2019), DARTS: differentiable architecture search. Two guards against cells of nothing but skip
connections: Liang et al. (2019), DARTS+: improved differentiable architecture search with early stopping; Chen, Xie, Wu
and Tian (2019), Progressive differentiable architecture search, which drops the operation now and then.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhpo import coordinates as at
from jaxhpo.checks import one_of, real, whole
from jaxhpo.draws import bits, uniform
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, count, failed, ranked, where_rows
from jaxhpo.space import Space, working_dtype
from jaxhpo.steppers import Parts, parts_of, stepper
from jaxhpo.variation import best_rows, latin_hypercube


class Settings(NamedTuple):
    """Numeric settings of DARTS."""

    temperature: jax.Array
    """float[]: of the softmax"""
    warm_up: jax.Array
    """float[] in [0, 1]: share of a search in which the choices stand still"""
    most: jax.Array
    """float[]: choices that may favour the option that is guarded against"""
    dropout: jax.Array
    """float[] in [0, 1): probability that it is left out of a choice in a window, at first"""


class State(NamedTuple):
    """State of DARTS; leading axis searches."""

    round: Count
    point: jax.Array
    """float[searches, size]: where each is, in unconstrained coordinates"""
    optimizer: PyTree
    """what the optimizer keeps"""
    age: jax.Array
    """i32[searches]: steps since each began"""
    life: jax.Array
    """i32[searches]: how often each has begun anew"""
    trial: jax.Array
    """i32[searches]: the trial in which each trains, -1 before the first"""
    lost: jax.Array
    """bool[searches]: those that begin anew at the next ask"""
    stopped: jax.Array
    """bool[searches]: those whose choices stand still from here on"""
    started: jax.Array
    """i32[]: trials started so far"""
    settings: Settings


class Row(NamedTuple):
    """What a row of an ask remembers, arrays [batch]."""

    search: jax.Array
    """i32"""
    life: jax.Array
    """i32: of the search when it was asked for"""
    age: jax.Array
    """i32: of the search when it was asked for, -1 once it is over"""
    moves: jax.Array
    """bool: whether choices move by it"""
    dropped: jax.Array
    """bool[batch, options]: options that were left out"""


NOISE = 1e-3
SOFTEST = 1 - 1e-6
OUT = 1e3
GUARDS = ("early_stopping", "dropout")


def places(space: Space, option: object) -> tuple[bool, ...]:
    """Which of the options of all relaxed choices are `option`."""
    options = [o for leaf in space.leaves if leaf.kind == "relaxed" for o in leaf.parameter.options]
    return tuple(type(o) is type(option) and o == option for o in options)


def start(c: at.Coordinates, uniform: jax.Array, skip: np.ndarray) -> jax.Array:
    """Where searches begin, all options with nearly equal weights, none with the guarded one first: float[n, size].

    Args:
      c: the coordinates.
      uniform: float[n, leaves + options] in [0, 1].
      skip: bool[options], those that are guarded against.
    """
    leaves = len(c.space.leaves)
    point = at.begin(c, at.spread(c, uniform[:, :leaves]))
    return point.at[:, c.space.dims :].set(NOISE * (uniform[:, leaves:] - 2 * jnp.asarray(skip)))


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space,
    searches: int,
    every: int,
    windows: int,
    retrain: int,
    guard: str | None,
    skip: tuple[bool, ...],
    zero: tuple[bool, ...],
    parts: Parts,
) -> tuple[Callable, Callable, Callable]:
    c, n = at.coordinates(space), searches
    draws = len(space.leaves) + len(c.owner)
    begin, step = stepper(parts)
    is_skip, is_zero, guards = np.array(skip, bool), np.array(zero, bool), any(skip)
    is_logit = jnp.asarray(np.arange(c.size) >= space.dims)

    def seen(point: jax.Array, dropped: jax.Array, settings: Settings) -> jax.Array:
        """Points with what is left out far below the others."""
        return point.at[:, space.dims :].add(jnp.where(dropped, -OUT * settings.temperature, 0))

    def ended(point: jax.Array) -> jax.Array:
        """Points with what no search ends with far below the others."""
        return point.at[:, space.dims :].add(jnp.where(is_zero, -OUT, 0))

    def skips(point: jax.Array) -> jax.Array:
        """How many choices would end with what is guarded against: i32[n]."""
        return jnp.sum((at.favourite(c, ended(point))[:, c.owner] == c.place) & is_skip, axis=1)

    def init(key: jax.Array, settings: Settings) -> State:
        point = start(c, latin_hypercube(key, n, draws), is_skip)
        none = jnp.zeros(n, jnp.int32)
        return State(
            round=count(),
            point=point,
            optimizer=begin(point),
            age=none,
            life=none,
            trial=none - 1,
            lost=none > 0,
            stopped=none > 0,
            started=jnp.int32(0),
            settings=settings,
        )

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        now, (key_start, key_drop), settings = state.round.value, jax.random.split(key), state.settings
        searching, is_over = now < windows, now > windows
        anew = state.lost & searching
        point = where_rows(anew, start(c, uniform(bits(key_start, (n, draws))), is_skip), state.point)
        fresh = ~is_over & (anew | (state.trial < 0) | (now == windows))
        trial = jnp.where(fresh, state.started + jnp.cumsum(fresh, dtype=jnp.int32) - 1, state.trial)
        age, life = jnp.where(anew, 0, state.age), state.life + anew
        there, search = jnp.where(searching, point, ended(point)), jnp.arange(n, dtype=jnp.int32)
        unit = at.unit_of(c, there)
        heat = jnp.where(searching, jnp.broadcast_to(settings.temperature, (n,)), 0)
        gone = jnp.minimum(now, windows).astype(point.dtype) / windows
        dropped = jnp.zeros((n, len(c.owner)), bool)
        if guards and guard == "dropout":
            chance = uniform(bits(key_drop, (n, len(c.owner))))
            dropped = jnp.asarray(is_skip) & (chance < settings.dropout * (1 - gone))
        soft = at.weights(c, seen(there, dropped, settings), heat) if len(c.owner) else None
        # The network of a search has all options, also where one of them has all of the weight.
        soft = None if soft is None else jnp.minimum(soft, jnp.where(searching, SOFTEST, 1))
        trials = Trials(
            hparams=at.differentiable(c, space.decode(unit), soft),
            unit=unit,
            id=jnp.where(is_over, -1, trial),
            steps=jnp.full(n, jnp.where(is_over, 0, jnp.where(searching, every, retrain)), jnp.int32),
            source=jnp.where(fresh | is_over, -1, search),
            slot=jnp.where(searching, search, n),
            active=jnp.broadcast_to(~is_over, (n,)),
            aux=Row(
                search,
                life,
                jnp.where(searching, age, -1),
                jnp.broadcast_to(gone >= settings.warm_up, (n,)),
                dropped,
            ),
        )
        after = state._replace(
            round=Count(now + 1),
            point=point,
            optimizer=where_rows(anew, begin(point), state.optimizer),
            age=age,
            life=life,
            trial=trial,
            lost=state.lost & ~anew,
            stopped=state.stopped & ~anew,
            started=state.started + fresh.sum(dtype=jnp.int32),
        )
        return trials, after

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        row: Row = trials.aux
        losses = losses.astype(state.point.dtype)
        mine = jnp.clip(row.search, 0, n - 1)
        # A row without steps is a result that was known beforehand: there is no training state to it.
        is_now = trials.active & (trials.steps > 0) & (row.life == state.life[mine]) & (row.age == state.age[mine])
        which, told = best_rows(mine, ranked(losses), is_now, n)
        unit, loss = trials.unit[which], losses[which]
        # A search that had to begin somewhere else goes on from there.
        elsewhere = told & ~at.is_at(c, state.point, unit)
        point = where_rows(elsewhere, at.vector(c, jnp.where(told[:, None], unit, 0.5)), state.point)
        if gradients is None:
            return state._replace(point=point, age=state.age + told, lost=state.lost | (told & failed(loss)))
        heat, dropped = jnp.broadcast_to(state.settings.temperature, (n,)), row.dropped[which]
        slope = jax.tree.map(lambda x: x[which], gradients)
        slope = at.slopes(c, seen(point, dropped, state.settings), at.unit_of(c, point), heat, slope)
        is_fine = told & ~failed(loss) & jnp.isfinite(slope).all(axis=1)
        chooses = row.moves[which] & ~state.stopped
        slope = jnp.where(is_fine[:, None] & (chooses[:, None] | ~is_logit), slope, 0)
        move, optimizer = step(point, state.optimizer, slope, jnp.where(is_fine, loss, 0))
        is_fine &= jnp.isfinite(move).all(axis=1)
        moves, move = is_fine & ~elsewhere, jnp.where(is_fine[:, None], move, 0)
        stopped = state.stopped
        if guards and guard == "early_stopping":
            before, after = skips(point), skips(at.moved(c, point, move, chooses))
            stopped |= moves & chooses & (after > jnp.maximum(state.settings.most, before))
        there = at.moved(c, point, move, chooses & ~stopped)
        return state._replace(
            point=where_rows(moves, there, point),
            optimizer=where_rows(moves, optimizer, state.optimizer),
            age=state.age + told,
            lost=state.lost | (told & ~is_fine),
            stopped=stopped,
        )

    return init, ask, tell


@functools.cache
def usual() -> Parts:
    """The optimizer where none is given, the same each time, so that what is compiled is shared."""
    return parts_of(optax.adam(0.05))


def darts(
    space: PyTree,
    optimizer: optax.GradientTransformation | None = None,
    *,
    max_steps: int,
    every: int = 1,
    order: int = 2,
    searches: int = 4,
    retrain: int | None = None,
    guard: str | None = "early_stopping",
    skip: object = "skip_connect",
    zero: object = "none",
    warm_up: float = 0.25,
    most: float = 2,
    dropout: float = 0.5,
    temperature: float = 1.0,
) -> Method:
    """Differentiable architecture search: one network of all choices trains, and the choices descend as it does.

    A `Categorical(relaxed=True)` is softmax weights in `hparams` while a search lasts. After every window of training
    steps they move along the gradient of `Trainable.evaluate`, the loss on validation data, and the training goes on
    with the new ones. In the end each choice is the option with the largest weight, that of no operation aside, and the
    network of these alone trains from the beginning: its loss is the one that counts. Floats and integers move too, as
    in `gradient`, in so far as the order of the gradient lets them; other choices are spread over the searches.

    A search whose loss or gradient is not finite begins anew elsewhere. Points given as `initial` are where the first
    searches begin; known results, which come without a training state, tell it nothing.

    Args:
      space: a pytree of parameters, or a `Space`, of any number of dims.
      optimizer: any optax optimizer that does not call the objective itself; `optax.adam(0.05)` if not given.
      max_steps: training steps of a search, at least 1, rounded up to whole windows.
      every: training steps in a window, at least 1.
      order: 1 is the gradient of the loss where the parameters are, as if they did not depend on the choices. With 2 it
        reaches back through the last training step, exactly, and so on: through `order - 1` of them, at most `every`.
      searches: how many run side by side; also the batch, and the training states that are kept.
      retrain: training steps of what was found, at least 1; `max_steps` if not given.
      guard: what is done against searches that end in skip connections, which train fastest. "early_stopping": the
        first step that leads more than `most` choices to favour them is not made, and the choices stand still from
        there on. "dropout": each choice does without them in a window with a probability that falls from `dropout` to
        0, so that the other operations learn. `None` is no guard.
      skip: the option that is guarded against, of one relaxed choice at least if there are any.
      zero: the option of no operation, with which no choice ends: what it has of the weight takes from all others
        alike, so it says nothing of which of them is best.
      warm_up: share of a search, in [0, 1], in which the network trains and the choices stand still.
      most: choices that may favour the guarded option, at least 0. Only of early stopping.
      dropout: in [0, 1). Only of dropout.
      temperature: of the softmax, above 0.

    Returns:
      A `Method` that ends by itself, whose settings are temperature, warm_up, most and dropout.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> space = {"edge": hpo.Categorical(("none", "skip", "double"), relaxed=True)}
      >>> def mixed(w, x, edge):
      ...     return edge @ jnp.stack([0 * x, x, 2 * w * x])
      >>> x = jnp.linspace(-1, 1, 8)
      >>> trainable = hpo.Trainable(
      ...     init=lambda key, h: jnp.float32(0.1),
      ...     step=lambda key, w, h: w - 0.1 * jax.grad(lambda w: ((mixed(w, x, h["edge"]) - 3 * x) ** 2).mean())(w),
      ...     evaluate=lambda w, h: ((mixed(w, x, h["edge"]) - 3 * x) ** 2).mean(),
      ... )
      >>> result = hpo.minimize(trainable, hpo.darts(space, max_steps=200, skip="skip"), key=jax.random.key(0))
      >>> result.best_hparams["edge"], result.best_loss < 1e-3
      ('double', True)

    Reference:
      Liu, Simonyan and Yang (2019), DARTS: differentiable architecture search. Liang et al. (2019), DARTS+.
      Chen, Xie, Wu and Tian (2019), Progressive differentiable architecture search.
    """
    space = Space.of(space, most=None)
    parts = usual() if optimizer is None else parts_of(optimizer)
    every, order = whole("every", every, 1), whole("order", order, 1)
    windows = -(-whole("max_steps", max_steps, 1) // every)
    retrain = max_steps if retrain is None else whole("retrain", retrain, 1)
    if order - 1 > min(every, retrain):
        raise ValueError(
            f"order={order} reaches back through {order - 1} training steps, but every={every} and retrain={retrain}; "
            "let every be larger, or take order=2"
        )
    searches = whole("searches", searches, 1)
    if guard is not None:
        one_of("guard", guard, GUARDS)
    array = functools.partial(jnp.asarray, dtype=working_dtype())
    settings = Settings(
        temperature=array(real("temperature", temperature, 1e-6, 1e6, "1 is usual")),
        warm_up=array(real("warm_up", warm_up, 0, 1, "0.25 is usual")),
        most=array(real("most", most, 0, 1e6, "2 is usual")),
        dropout=array(real("dropout", dropout, 0, 0.999, "0.5 is usual")),
    )
    named = places(space, skip), places(space, zero)
    if guard is not None and named[0] and not any(named[0]):
        options = sorted({repr(o) for leaf in space.leaves if leaf.kind == "relaxed" for o in leaf.parameter.options})
        raise ValueError(
            f"skip={skip!r} is an option of no relaxed choice, so nothing is guarded against; they have "
            f"{', '.join(options)}: name one, or say guard=None"
        )
    init, ask, tell = _functions(space, searches, every, windows, retrain, guard, *named, parts)
    return Method(
        "darts",
        space,
        settings,
        Initializer(init, settings),
        ask,
        tell,
        batch=searches,
        slots=searches,
        rounds=windows + 1,
        uses_gradients=True,
        lookback=order - 1,
    )
