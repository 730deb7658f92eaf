"""Population-based training: networks in training, of which the worst copy the best and vary what they copy.

Jaderberg, Dalibard, Osindero, Czarnecki, Donahue, Razavi, Vinyals, Green, Dunning, Simonyan, Fernando and Kavukcuoglu
(2017), Population based training of neural networks, Algorithm 1. Parker-Holder, Nguyen and Roberts (2020), Provably
efficient online hyperparameter optimization with population-based bandits (PB2): explore="gp".

A member is a slot of the bank. Where it copies, its slot takes over the other's training state and a new trial begins
there, so hyperparameters and ids change together.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo.checks import one_of, real, whole
from jaxhpo.draws import bits, uniform
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, count, failed, ranked
from jaxhpo.population import time_varying
from jaxhpo.population.exploit import Move, Standing, tournament, truncation
from jaxhpo.population.explore import Draws, add, perturb, resample
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import latin_hypercube

EXPLOITS = ("truncation", "tournament")
EXPLORES = ("perturb", "resample", "additive", "gp")
MOST_STEPS = 2**31 - 1


class Settings(NamedTuple):
    """Numeric settings of population-based training."""

    quantile: jax.Array
    """float[] in [0, 0.5]: share of the population that copies, and that is copied; only of truncation"""
    factors: jax.Array
    """float[k], positive: what values are multiplied by; only of perturb"""
    resample_probability: jax.Array
    """float[] in [0, 1]: of a value of a copy to be drawn anew; only options without order where noise is added"""
    noise: jax.Array
    """float[]: standard deviation in the unit cube; only of additive"""
    burn_in: jax.Array
    """float[]: training steps before the first member copies another"""


class Members(NamedTuple):
    """The population, arrays [population]."""

    unit: jax.Array
    """float[population, dims]"""
    standing: Standing
    trial: jax.Array
    """i32: number in the order of all starts, -1 before the first"""
    told: jax.Array
    """i32: round of the last loss told, -1 where the trial has none yet"""


class State(NamedTuple):
    """State of population-based training."""

    round: Count
    members: Members
    started: jax.Array
    """i32[]: trials started so far"""
    seen: PyTree
    """`time_varying.Seen` where a Gaussian process explores, else ()"""
    settings: Settings


class Row(NamedTuple):
    """What a row of an ask remembers, arrays [batch]."""

    member: jax.Array
    """i32: whose slot it trains in"""
    trial: jax.Array
    """i32: number in the order of all starts"""
    round: jax.Array
    """i32: the ask"""
    before: jax.Array
    """float: the last loss of the training state that it goes on from, +inf where there is none"""


def finished(before: State, trials: Trials, after: State, every: int, max_steps: int) -> tuple[Trials, State]:
    """An ask and the state after it, where the last stretch may be shorter and nothing follows it."""
    rounds, n = rounds_of(every, max_steps), trials.unit.shape[0]
    now = before.round.value
    left = max_steps - jnp.minimum(now, rounds - 1) * every
    is_over, nobody = now >= rounds, jnp.full(n, -1, jnp.int32)
    either = lambda over, on: jnp.where(is_over, over, on)  # noqa: E731
    trials = trials._replace(
        id=either(nobody, trials.id),
        steps=either(0, jnp.full(n, jnp.minimum(left, every), jnp.int32)),
        source=either(nobody, trials.source),
        slot=either(n, trials.slot),
        active=either(False, trials.active),
    )
    members = jax.tree.map(either, before.members, after.members)
    return trials, after._replace(members=members, started=either(before.started, after.started))


def rounds_of(every: int, max_steps: int) -> int:
    """Asks of a member that trains `max_steps`, `every` steps at a time."""
    return -(-max_steps // every)


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, population: int, every: int, max_steps: int | None, exploit: str, explore: str
) -> tuple[Callable, Callable, Callable]:
    n = population

    def init(key: jax.Array, settings: Settings) -> State:
        nobody, dtype = jnp.full(n, -1, jnp.int32), working_dtype()
        standing = Standing(jnp.full(n, jnp.inf, dtype), jnp.zeros(n, bool))
        members = Members(latin_hypercube(key, n, space.dims), standing, nobody, nobody)
        seen = time_varying.empty(space, n) if explore == "gp" else ()
        return State(count(), members, jnp.int32(0), seen, settings)

    def exploited(state: State, drawn: jax.Array) -> Move:
        standing, settings = state.members.standing, state.settings
        if exploit == "truncation":
            move = truncation(standing, drawn[0], settings.quantile)
        else:
            move = tournament(standing, drawn[0], drawn[1])
        # Before the burn-in is over, members train alone, but none that failed goes on.
        ready = (state.round.value.astype(settings.burn_in.dtype) * every >= settings.burn_in) | standing.failed
        copies = move.copies & ready
        return move._replace(source=jnp.where(copies, move.source, jnp.arange(n, dtype=jnp.int32)), copies=copies)

    def explored(key: jax.Array, state: State, move: Move, draws: Draws) -> jax.Array:
        settings, unit = state.settings, state.members.unit[move.source]
        if explore == "perturb":
            return perturb(space, unit, draws, settings.factors, settings.resample_probability)
        if explore == "resample":
            return resample(space, unit, draws, settings.resample_probability)
        if explore == "additive":
            return add(space, unit, draws, settings.noise, settings.resample_probability)
        return time_varying.propose(
            key, space, state.seen, state.round.value, unit, move.copies, ~(move.copies | move.afresh)
        )

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        key_rows, key_dims, key_points = jax.random.split(key, 3)
        rows = uniform(bits(key_rows, (3, n)))
        anywhere, anew, which = uniform(bits(key_dims, (3, n, space.dims)))
        draws = Draws(anywhere, anew, which, dim=rows[2])
        members, now = state.members, state.round.value
        move = exploited(state, rows)
        first = members.trial < 0
        fresh = first | move.afresh
        new = fresh | move.copies
        unit = jnp.where(move.copies[:, None], explored(key_points, state, move, draws), members.unit)
        unit = jnp.where(move.afresh[:, None], draws.unit, unit)
        trial = jnp.where(new, state.started + jnp.cumsum(new, dtype=jnp.int32) - 1, members.trial)
        before = jnp.where(fresh, jnp.inf, members.standing.loss[move.source])
        standing = Standing(
            jnp.where(new, jnp.inf, members.standing.loss), jnp.where(new, False, members.standing.failed)
        )
        asked = Members(unit, standing, trial, jnp.where(new, -1, members.told))
        slot = jnp.arange(n, dtype=jnp.int32)
        trials = Trials(
            hparams=space.decode(unit),
            unit=unit,
            id=trial,
            steps=jnp.full(n, every, jnp.int32),
            source=jnp.where(fresh, -1, move.source),
            slot=slot,
            active=jnp.ones(n, bool),
            aux=Row(slot, trial, jnp.full(n, now), before),
        )
        after = State(Count(now + 1), asked, state.started + new.sum(dtype=jnp.int32), state.seen, state.settings)
        return (trials, after) if max_steps is None else finished(state, trials, after, every, max_steps)

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        row, members = trials.aux, state.members
        # A row without steps is a result that was known beforehand: there is no training state to it.
        trained = trials.active & (trials.steps > 0)
        owner = members.trial[row.member]
        mine = trained & ((owner == row.trial) | (owner < 0)) & (row.round >= members.told[row.member])
        told = members.told.at[jnp.where(mine, row.member, n)].max(row.round, mode="drop")
        at = jnp.where(mine & (row.round == told[row.member]), row.member, n)
        put = lambda old, new: old.at[at].set(new.astype(old.dtype), mode="drop")  # noqa: E731
        standing = Standing(put(members.standing.loss, ranked(losses)), put(members.standing.failed, failed(losses)))
        record = Members(put(members.unit, trials.unit), standing, put(members.trial, row.trial), told)
        started = jnp.maximum(state.started, jnp.max(jnp.where(mine, row.trial, -1)) + 1)
        seen = state.seen
        if explore == "gp":
            seen = time_varying.saw(
                seen, trials.unit, row.round, losses - row.before, trained & jnp.isfinite(row.before)
            )
        return state._replace(members=record, started=started, seen=seen)

    return init, ask, tell


def pbt(
    space: PyTree,
    *,
    every: int,
    population: int = 16,
    max_steps: int | None = None,
    exploit: str = "truncation",
    explore: str = "perturb",
    quantile: float = 0.2,
    factors: tuple[float, ...] = (0.8, 1.2),
    resample_probability: float = 0.25,
    noise: float = 0.1,
    burn_in: int = 0,
) -> Method:
    """Population-based training: hyperparameters change while training goes on, and the worst networks copy the best.

    All members train side by side, `every` steps at a time. Then some of them give up their training state for a copy
    of a better one, and vary the hyperparameters that came with it; the others go on as they are. What is found is a
    schedule: `Result.schedule()` has it for every member that is alive at the end, and `replay` trains by it. Only
    what `Trainable.step` reads of the hyperparameters at every step can take part in one.

    A copy is a new trial with an id of its own. A member whose loss is not finite is never copied, and it does not go
    on: it copies a healthy member, or starts afresh if there is none. Points given as `initial` take the place of the
    first members; known results, which come without a training state, tell it nothing. Its budgets are rounds and
    steps: a budget of trials counts the copies.

    Args:
      space: a pytree of parameters, or a `Space`.
      every: training steps between two exploits, at least 1.
      population: members, at least 2; also the batch, and the training states that are kept.
      max_steps: training steps of a member, after which the method ends; the budget decides if not given.
      exploit: "truncation": the worst `quantile` of the population copies members of the best, at random.
        "tournament": every member meets another one at random, and copies it if that is better.
      explore: what becomes of the hyperparameters of a copy. "perturb": each is multiplied by one of `factors`.
        That is a factor of the value itself, whether the parameter is logarithmic or not, and the product is clipped
        to the bounds; a value of 0 stays. Integers move at least one level, ordinals to a neighbour. "resample":
        each is drawn anew with `resample_probability`, and at least one of them. "additive": normal noise of
        standard deviation `noise` in the unit cube, reflected at the bounds. "gp": PB2, the point where a
        Gaussian process of hyperparameters and time expects, optimistically, that the loss falls most.
      quantile: share that copies and share that is copied, in [0, 0.5], rounded up to whole members; 0 trains them all
        independently, but for those that fail. Only of truncation.
      factors: positive numbers, at least one, one of which is chosen at random for every value. Only of perturb.
      resample_probability: in [0, 1], of a value to be drawn anew; with "additive", of options without order alone,
        as with "perturb" they do not change otherwise.
      noise: in [0, 1]. Only of additive.
      burn_in: training steps before which nobody copies who has not failed, at least 0.

    Returns:
      A `Method` whose settings are quantile, factors, resample_probability, noise and burn_in.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> trainable = hpo.Trainable(
      ...     init=lambda key, h: jax.numpy.ones(2),
      ...     step=lambda key, x, h: x - 0.01 * h["weight"] * x,
      ...     evaluate=lambda x, h: (x**2).sum(),
      ... )
      >>> method = hpo.pbt({"weight": hpo.Array(2, 0.0, 1.0)}, every=4, population=4, explore="additive")
      >>> result = hpo.minimize(trainable, method, key=jax.random.key(0), rounds=50, progress=False)
      >>> schedule = result.schedule()[0]
      >>> schedule.segments[-1].stop
      200

    Reference:
      Jaderberg et al. (2017), Population based training of neural networks. Parker-Holder, Nguyen and Roberts (2020),
      Provably efficient online hyperparameter optimization with population-based bandits.
    """
    space, every = Space.of(space, most=None), whole("every", every, 1, most=MOST_STEPS)
    population = whole("population", population, 2)
    max_steps = None if max_steps is None else whole("max_steps", max_steps, 1, most=MOST_STEPS)
    one_of("exploit", exploit, EXPLOITS)
    one_of("explore", explore, EXPLORES)
    if not isinstance(factors, tuple | list) or not factors:
        raise TypeError(f"factors must be a tuple of positive numbers, got {factors!r}; (0.8, 1.2) is usual")
    values = (
        real("quantile", quantile, 0, 0.5, "0.2 is usual"),
        [real("factors", factor, 1e-6, 1e6, "(0.8, 1.2) are usual") for factor in factors],
        real("resample_probability", resample_probability, 0, 1, "0.25 is usual"),
        real("noise", noise, 0, 1, "0.1 is usual"),
        whole("burn_in", burn_in, 0),
    )
    settings = Settings(*(jnp.asarray(value, working_dtype()) for value in values))
    init, ask, tell = _functions(space, population, every, max_steps, exploit, explore)
    return Method(
        name="pbt",
        space=space,
        settings=settings,
        init=Initializer(init, settings),
        ask=ask,
        tell=tell,
        batch=population,
        slots=population,
        rounds=None if max_steps is None else rounds_of(every, max_steps),
    )
