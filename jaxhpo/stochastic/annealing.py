"""Simulated annealing: chains that walk downhill and, while they are hot, uphill too.

Kirkpatrick, Gelatt and Vecchi (1983), Optimization by Simulated Annealing, Science 220: a chain moves to a point whose
loss is higher by D with probability exp(-D / T). Many chains stand on a ladder of temperatures and exchange their
places: Geyer (1991), Markov Chain Monte Carlo Maximum Likelihood; Earl and Deem (2005), Parallel tempering, eq. 5; odd
and even pairs take turns: Okabe et al. (2001), Replica-exchange Monte Carlo method for the isobaric-isothermal
ensemble. Chains go on from where a better one is: Aldous and Vazirani (1994), "Go with the winners" algorithms. Without
that they sample the Boltzmann distribution at a fixed temperature, but each has only its own share of the trials.

Steps grow and shrink towards a target rate of acceptance: Corana et al. (1987), Minimizing multimodal functions of
continuous variables with the simulated annealing algorithm. After a rejected step the opposite one is tried: Brockhoff
et al. (2010), Mirrored Sampling and Sequential Selection for Evolution Strategies.

Temperatures are in units of the spread: how much the losses of proposals differ from those of their chains, as a
geometric mean that forgets. So neither scale nor offset of the loss matter, and the spread follows a search that closes
in.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo.checks import one_of, whole
from jaxhpo.draws import halves, hashed_bits, uniform
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count, ranked
from jaxhpo.space import Space, working_dtype
from jaxhpo.stochastic.metropolis import Spread, accepts, exchanges, follows, spread_of
from jaxhpo.stochastic.walk import proposals, starts
from jaxhpo.variation import best_rows

SCHEDULES = ("ladder", "reheat")
SMALLEST_STEP = 1e-7
LONGEST_STEP = 1.0


class Settings(NamedTuple):
    """What `init` takes; float[] each."""

    temperature: jax.Array
    """of the hottest chain at the start, in units of the spread"""
    final: jax.Array
    """of the coldest chain, and the lowest of all"""
    cooling: jax.Array
    """the temperature falls as 1 / (1 + cooling * trials told of the chain)"""
    target: jax.Array
    """rate of acceptance, in [0, 1), at which a step keeps its length"""
    adaptation: jax.Array
    """growth of the logarithm of a step at an acceptance; 0 keeps its length"""
    step: jax.Array
    """longest step of a coordinate at the start, as a share of its range"""
    change: jax.Array
    """probability that a coordinate moves; at least one does"""
    switch: jax.Array
    """the same of a categorical, which takes another level"""
    mirror: jax.Array
    """probability that the opposite of a rejected step is tried next"""
    exchange: jax.Array
    """probability that neighbours on the ladder try to exchange their places in an ask"""
    follow: jax.Array
    """probability that a chain on the ladder tries to go on from where another one is; 0 keeps chains independent"""
    patience: jax.Array
    """trials told of a chain without a new lowest loss after which "reheat" heats it again"""
    memory: jax.Array
    """trials told of each chain over which the spread is a mean"""


class State(NamedTuple):
    """Where the chains are; leading axis = chains."""

    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""
    unit: jax.Array
    """float[chains, dims]: current points; of a chain without a finite loss, where it is to start"""
    loss: jax.Array
    """float[chains]: their losses, +inf where none was finite yet"""
    rung: jax.Array
    """i32[chains]: place on the ladder, 0 is the coldest"""
    step: jax.Array
    """float[chains]: longest step of a coordinate"""
    age: jax.Array
    """float[chains]: trials told since the chain was last heated"""
    record: jax.Array
    """float[chains]: lowest loss since then"""
    stale: jax.Array
    """float[chains]: trials told since the record"""
    turn: jax.Array
    """float[chains, dims]: the opposite of the step rejected last"""
    turns: jax.Array
    """bool[chains]: whether it is to be tried next"""
    spread: Spread


class Row(NamedTuple):
    """What a row of an ask remembers."""

    chain: jax.Array
    """i32[batch]"""
    uniform: jax.Array
    """float[batch] in (0, 1): it is accepted if this is below exp(-D / T)"""
    may_turn: jax.Array
    """bool[batch]: whether the opposite step is to be tried if it is rejected"""


def ladder(settings: Settings, rung: jax.Array, age: jax.Array, chains: int) -> jax.Array:
    """Temperatures in units of the spread, geometric from the coldest rung to the hottest one, cooled by `age`."""
    below = (chains - 1 - rung.astype(age.dtype)) / max(chains - 1, 1)
    start = settings.temperature * (settings.final / settings.temperature) ** below
    return jnp.maximum(start / (1 + settings.cooling * age), settings.final)


@functools.lru_cache(maxsize=256)
def _functions(space: Space, chains: int, schedule: str, batch: int) -> tuple[Callable, Callable, Callable]:
    dims = space.dims
    reheats, on_ladder = schedule == "reheat", schedule == "ladder" and chains > 1

    def of_rows(x: jax.Array, chain: jax.Array) -> jax.Array:
        # `asked` is a multiple of the chains then, so that a whole array does instead of a gather.
        if batch % chains == 0:
            return jnp.tile(x, (batch // chains,) + (1,) * (x.ndim - 1)) if batch > chains else x
        return x[chain]

    def of_chains(x: jax.Array, chain: jax.Array) -> jax.Array:
        return x.sum()[None] if chains == 1 else jnp.zeros(chains, x.dtype).at[chain].add(x)

    def rungs() -> jax.Array:
        return jnp.arange(chains, dtype=jnp.int32) if on_ladder else jnp.full(chains, chains - 1, jnp.int32)

    def init(key: jax.Array, settings: Settings) -> State:
        dtype = working_dtype()
        zeros, never = jnp.zeros(chains, dtype), jnp.full(chains, jnp.inf, dtype)
        return State(
            settings=settings,
            asked=count(),
            unit=starts(space, key, chains),
            loss=never,
            rung=rungs(),
            step=zeros + settings.step,
            age=zeros,
            record=never,
            stale=zeros,
            turn=jnp.zeros((chains, dims), dtype),
            turns=jnp.zeros(chains, bool),
            spread=Spread(jnp.zeros((), dtype), jnp.zeros((), dtype)),
        )

    def followed(seed: jax.Array, state: State) -> State:
        bits = hashed_bits(seed, chains + 1)
        decide, attempt = halves(bits[:chains])
        other = (jnp.arange(chains) + 1 + (uniform(bits[chains]) * (chains - 1)).astype(jnp.int32)) % chains
        temperature = ladder(state.settings, state.rung, state.age, chains)
        goes = follows(temperature, state.loss, state.loss[other], decide, state.spread)
        goes &= attempt < state.settings.follow
        return state._replace(
            unit=jnp.where(goes[:, None], state.unit[other], state.unit),
            loss=jnp.where(goes, state.loss[other], state.loss),
            step=jnp.where(goes, state.step[other], state.step),
            turns=state.turns & ~goes,
        )

    def exchanged(seed: jax.Array, state: State) -> State:
        decide, attempt = halves(hashed_bits(seed, chains))
        odd = (state.asked.value // batch) % 2
        temperature = ladder(state.settings, state.rung, state.age, chains)
        swaps, other = exchanges(temperature, state.loss, state.rung, decide, odd, state.spread)
        swaps &= attempt[jnp.minimum(state.rung, state.rung[other])] < state.settings.exchange
        swapped = lambda x: jnp.where(swaps, x[other], x)  # noqa: E731
        # A step suits a temperature, so it stays on its rung.
        return state._replace(rung=swapped(state.rung), step=swapped(state.step))

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        # Each of its rows seeds a hash of a counter: threefry would take longer than all the rest.
        seeds = jax.random.bits(key, (8,), jnp.uint32).reshape(4, 2)
        if on_ladder:
            state = exchanged(seeds[0], followed(seeds[1], state))
        asked, number = state.asked.value, jnp.arange(batch, dtype=jnp.int32)
        chain = (asked + number) % chains
        bits = hashed_bits(seeds[2], batch * dims).reshape(batch, dims)
        (decide, turning), (pick, _) = halves(hashed_bits(seeds[3], 2 * batch).reshape(2, batch))

        unit = of_rows(state.unit, chain)
        rate = jnp.where(space.categorical, state.settings.switch, state.settings.change)
        step, turn = of_rows(state.step, chain), of_rows(state.turn, chain)
        turned = of_rows(state.turns, chain) & (number < chains)
        moved = proposals(space, unit, step, turned, turn, bits, pick, rate)
        fresh = jnp.where((asked + number < chains)[:, None], unit, uniform(bits))
        moved = jnp.where(jnp.isfinite(of_rows(state.loss, chain))[:, None], moved, fresh)

        aux = Row(chain, decide, ~turned & (turning < state.settings.mirror))
        trials = black_box(space, moved, first=asked, aux=aux)
        idle = (jnp.arange(chains, dtype=jnp.int32) - asked) % chains >= batch
        return trials, state._replace(asked=Count(asked + batch), turns=state.turns & idle)

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        settings, row, dtype = state.settings, trials.aux, state.unit.dtype
        chain, losses = jnp.clip(row.chain, 0, chains - 1), ranked(losses.astype(dtype))
        losses = jnp.where(trials.active, losses, jnp.inf)
        temperature = ladder(settings, state.rung, state.age, chains)
        current = state.loss[chain]
        walks = trials.active & jnp.isfinite(current)
        difference = jnp.where(walks, losses - current, jnp.inf)
        spread = spread_of(state.spread, difference, walks, settings.memory * chains)
        would = walks & accepts(difference, row.uniform, temperature[chain], spread)
        told, steps, accepted = (of_chains(x.astype(dtype), chain) for x in (trials.active, walks, would))

        if chains == 1:
            # A row that failed is still a row, and padding is none.
            told_loss = jnp.minimum(losses, jnp.finfo(dtype).max)
            best = jnp.argmin(jnp.where(trials.active, told_loss, jnp.inf))[None]
            has_row = trials.active.any()[None]
        else:
            best, has_row = best_rows(chain, losses, trials.active, chains)
        unit, loss = trials.unit.astype(dtype)[best], losses[best]
        is_first = has_row & jnp.isinf(state.loss) & jnp.isfinite(loss)
        moves = is_first | (has_row & would[best])
        excess = (accepted / jnp.maximum(steps, 1) - settings.target) / (1 - settings.target)
        growth = jnp.where(steps > 0, settings.adaptation * excess, 0)
        turns = (steps == 1) & ~moves & row.may_turn[best]
        turn = jnp.where(turns[:, None] & ~space.categorical, state.unit - unit, 0)
        after = state._replace(
            unit=jnp.where(moves[:, None], unit, state.unit),
            loss=jnp.where(moves, loss, state.loss),
            step=jnp.clip(state.step * jnp.exp(growth), SMALLEST_STEP, LONGEST_STEP),
            age=state.age + told,
            turn=jnp.where(has_row[:, None], turn, state.turn),
            turns=jnp.where(has_row, turns, state.turns),
            spread=spread,
        )
        return reheated(after, told) if reheats else after

    def reheated(state: State, told: jax.Array) -> State:
        stale = jnp.where(state.loss < state.record, 0, state.stale + told)
        again = (stale > state.settings.patience) & jnp.isfinite(state.loss)
        return state._replace(
            age=jnp.where(again, 0, state.age),
            step=jnp.where(again, state.settings.step, state.step),
            record=jnp.where(again, state.loss, jnp.minimum(state.record, state.loss)),
            stale=jnp.where(again, 0, stale),
        )

    return init, ask, tell


def annealing(space: PyTree, *, chains: int | None = None, schedule: str = "ladder", batch: int = 16) -> Method:
    """Simulated annealing with many chains side by side.

    A trial is a step from the current point of a chain; the chains take turns. Where an ask has several trials for a
    chain, the best of them is what the chain may move to.

    Args:
      space: a pytree of parameters, or a `Space`.
      chains: how many, at least 1; `batch` if not given. One is best for up to some hundred trials.
      schedule: "ladder", temperatures from cold to hot between which chains exchange their places while all cool down,
        or "reheat", every chain cools down by itself and is heated again when it finds nothing better any more.
      batch: trials per ask, of any size.

    Returns:
      A `Method` with `Settings`: `init(key, method.settings._replace(...))` changes them.

    Raises:
      TypeError, ValueError: a number is not whole or too small, or the schedule is unknown.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.annealing({"x": hpo.Float(-1.0, 1.0)}, chains=1, batch=1)
      >>> result = hpo.minimize(lambda key, h: h["x"] ** 2, method, key=jax.random.key(0), trials=60, progress=False)
      >>> result.best_loss < 1e-3
      True

    Reference:
      Kirkpatrick, Gelatt and Vecchi (1983), Optimization by Simulated Annealing.
      Earl and Deem (2005), Parallel tempering: Theory, applications, and new perspectives.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    chains = batch if chains is None else whole("chains", chains, 1)
    one_of("schedule", schedule, SCHEDULES)
    values = dict(
        temperature=0.1,
        final=1e-3,
        cooling=1.0,
        target=0.3,
        adaptation=0.7,
        step=0.5,
        change=0.5,
        switch=0.15,
        mirror=1.0,
        exchange=1.0,
        follow=1.0,
        patience=20 + 5 * space.dims,
        memory=10.0,
    )
    settings = Settings(**{name: jnp.asarray(value, working_dtype()) for name, value in values.items()})
    init, ask, tell = _functions(space, chains, schedule, batch)
    return Method("annealing", space, settings, Initializer(init, settings), ask, tell, batch)
