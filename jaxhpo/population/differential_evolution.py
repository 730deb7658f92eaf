"""Differential evolution: children from the differences between members of a population, each against its parent.

Storn and Price (1997), Differential evolution, a simple and efficient heuristic for global optimization over continuous
spaces: rand/1/bin and best/1/bin. Tanabe and Fukunaga (2013), Success-history based parameter adaptation for
differential evolution (SHADE), and (2014), Improving the search performance of SHADE using linear population size
reduction (L-SHADE): current-to-pbest/1 of Zhang and Sanderson (2009), JADE, with weights and rates drawn around those
that brought success. Equation numbers are those of the paper of 2014.

Three things differ. The archive holds the last parent that each member displaced, not a random choice of all that were.
Gains are weighed among the rows of one tell, so losses of any size do. The population shrinks with the square root of
the share of the budget that is spent, where eq. 10 is linear: it has lost half of its members after a quarter, which
finds better optima early and no worse ones late.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.checks import one_of, real, whole
from jaxhpo.draws import two_uniforms
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count, ranked
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import (
    another_level,
    best_rows,
    collapsed,
    differs,
    latin_hypercube,
    levels,
    one_dim,
    with_subtrees,
)

ADAPTIVE = "current-to-pbest/1"
STRATEGIES = (ADAPTIVE, "rand/1/bin", "best/1/bin")
MEMORY = 6
SPREAD = 0.1
SMALLEST = 4
SHRINKING = 0.5
MOST_GREEDY = 0.25
TINY = 1e-6


class Settings(NamedTuple):
    """Numeric settings of differential evolution."""

    weight: jax.Array
    """float[]: differential weight F; where weights adapt, the first of the memory"""
    crossover_rate: jax.Array
    """float[] in [0, 1]: share of coordinates from the mutant, CR; where rates adapt, the first of the memory"""
    greediness: jax.Array
    """float[] in (0, 0.25]: share p of the population that counts as its best; only of current-to-pbest/1"""
    tolerance: jax.Array
    """float[]: spread of the population in the unit cube at which a new one starts"""


class Memory(NamedTuple):
    """What brought success."""

    weight: jax.Array
    """float[6]: M_F"""
    rate: jax.Array
    """float[6]: M_CR"""
    place: jax.Array
    """i32[]: entry that is written next"""
    gains: jax.Array
    """float[4]: sums of the gain times F^2, F, CR^2, CR over this generation's successes"""
    told: jax.Array
    """i32[]: rows told in this generation"""


class State(NamedTuple):
    """State of differential evolution."""

    unit: jax.Array
    """float[population, dims]: the members"""
    loss: jax.Array
    """float[population]: theirs, +inf where none is known"""
    archive: jax.Array
    """float[population, dims]: the last parent that each member displaced, at first the member itself"""
    best: jax.Array
    """float[]: the lowest loss ever, +inf before there is one"""
    start: jax.Array
    """i32[]: trials asked for before this population began"""
    memory: Memory
    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""


class Row(NamedTuple):
    """What a row of an ask remembers."""

    member: jax.Array
    """i32[batch]: the parent it competes with"""
    start: jax.Array
    """i32[batch]: of its population, to tell it from later ones"""
    weight: jax.Array
    """float[batch]: F it was made with, 0 where it is of the first population"""
    rate: jax.Array
    """float[batch]: CR it was made with"""


def draw_weights(uniform: jax.Array, centre: jax.Array) -> jax.Array:
    """F from the Cauchy distribution around `centre` (eq. 6), given that it is positive, and cut at 1."""
    below = jnp.arctan(-centre / SPREAD) / np.pi + 0.5
    at = below + (1 - below) * uniform
    return jnp.clip(centre + SPREAD * jnp.tan(np.pi * (at - 0.5)), 1e-3, 1)


def draw_rates(normal: jax.Array, centre: jax.Array) -> jax.Array:
    """CR from the normal distribution around `centre` (eq. 5); 0 for good where the memory says so."""
    return jnp.where(centre < 0, 0, jnp.clip(centre + SPREAD * normal, 0, 1))


def remember(memory: Memory, row: Row, gain: jax.Array, told: jax.Array, members: jax.Array) -> Memory:
    """The memory after some rows, and after each generation with a new entry: weighted Lehmer means (eqs. 7 to 9).

    Args:
      memory: before them.
      row: as they were made.
      gain: float[batch], how far below its parent's a child's loss is, 0 where it is not.
      told: i32[], how many rows are told.
      members: i32[], of the population.
    """
    share = gain / jnp.maximum(gain.max(), jnp.finfo(gain.dtype).tiny)
    powers = jnp.stack([row.weight**2, row.weight, row.rate**2, row.rate])
    gains, told = memory.gains + (powers * share).sum(1), memory.told + told
    complete, learned = told >= members, gains[1] > 0
    lehmer = lambda square, sum_: square / jnp.where(sum_ > 0, sum_, 1)  # noqa: E731
    rate = jnp.where((memory.rate[memory.place] < 0) | (gains[3] <= 0), -1, lehmer(gains[2], gains[3]))
    at = jnp.where(complete & learned, memory.place, MEMORY)
    return Memory(
        weight=memory.weight.at[at].set(lehmer(gains[0], gains[1]), mode="drop"),
        rate=memory.rate.at[at].set(rate, mode="drop"),
        place=jnp.where(complete & learned, (memory.place + 1) % MEMORY, memory.place),
        gains=jnp.where(complete, 0, gains),
        told=jnp.where(complete, 0, told),
    )


def others(uniform: jax.Array, number: jax.Array, *taken: jax.Array) -> jax.Array:
    """Indices below `number`, uniform over those not `taken` in their row, as long as there are any."""
    # A few exchanges of neighbours: a sort of XLA's would be most of the work of a small generation.
    ordered = list(taken)
    for end in range(len(taken) - 1, 0, -1):
        for i in range(end):
            low, high = ordered[i : i + 2]
            ordered[i : i + 2] = jnp.minimum(low, high), jnp.maximum(low, high)
    is_new = [jnp.ones(member.shape, bool) for member in ordered[:1]]
    is_new += [a != b for a, b in zip(ordered[1:], ordered, strict=False)]
    rest = jnp.maximum(number - sum(new.astype(jnp.int32) for new in is_new), 1)
    index = jnp.minimum((uniform * rest).astype(jnp.int32), rest - 1)
    for member, new in zip(ordered, is_new, strict=True):
        index += new & (index >= member)
    return index % number


def midway(mutant: jax.Array, parent: jax.Array) -> jax.Array:
    """A mutant, halfway between its parent and a bound that it has passed (Zhang and Sanderson 2009)."""
    return jnp.where(mutant < 0, parent / 2, jnp.where(mutant > 1, (1 + parent) / 2, mutant))


def differ(space: Space, weight: jax.Array, chance: jax.Array, base: jax.Array, pairs: list) -> jax.Array:
    """`base` plus `weight` times the difference of every pair: a mutant.

    Levels without order have no difference: where a pair does not share one, the first's is taken with the chance
    `weight`.

    Args:
      space: whose dims they are.
      weight: float[batch].
      chance: float[batch, dims], uniform in (0, 1).
      base: float[batch, dims].
      pairs: of float[batch, dims].
    """
    weight = weight[:, None]
    mutant = base + weight * sum(a - b for a, b in pairs)
    if not space.categorical.any():
        return mutant
    mutant = jnp.where(space.categorical, base, mutant)
    for a, b in pairs:
        chosen = jnp.asarray(space.categorical) & (levels(space, a) != levels(space, b)) & (chance < weight)
        mutant = jnp.where(with_subtrees(space, chosen, mutant, a), a, mutant)
        chance = chance * 256 % 1  # the lower half of its 16 bits
    return mutant


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, strategy: str, population: int, budget: int | None, batch: int
) -> tuple[Callable, Callable, Callable]:
    adapts, shrinks = strategy == ADAPTIVE, budget is not None
    elite = max(math.ceil(MOST_GREEDY * population), min(2, population))
    least, has_levels = min(SMALLEST, population), bool(space.levels.any())

    def size(asked: jax.Array, start: jax.Array) -> jax.Array:
        """Members after `asked` trials (eq. 10), all of them until each was tried."""
        if budget is None:
            return jnp.int32(population)
        begin = start + population
        left = 1 - jnp.clip((asked - begin) / jnp.maximum(budget - begin, 1), 0, 1) ** SHRINKING
        return jnp.round(least + (population - least) * left).astype(jnp.int32)

    def first_memory(settings: Settings) -> Memory:
        return Memory(
            weight=jnp.full(MEMORY, settings.weight),
            rate=jnp.full(MEMORY, settings.crossover_rate),
            place=jnp.int32(0),
            gains=jnp.zeros(4, settings.weight.dtype),
            told=jnp.int32(0),
        )

    def shrink(state: State) -> State:
        order = jnp.argsort(state.loss, stable=True)
        return state._replace(unit=state.unit[order], loss=state.loss[order], archive=state.archive[order])

    def init(key: jax.Array, settings: Settings) -> State:
        unit, dtype = latin_hypercube(key, population, space.dims), working_dtype()
        none = jnp.full(population, jnp.inf, dtype)
        return State(unit, none, unit, none[0], jnp.int32(0), first_memory(settings), settings, count())

    def restart(state: State, members: jax.Array) -> State:
        """A new population where the members have become one."""
        is_member = jnp.arange(population) < members if shrinks else None
        is_over = collapsed(space, state.unit, state.loss, state.settings.tolerance, is_member)
        fresh = lambda new, old: jax.tree.map(lambda n, o: jnp.where(is_over, n, o), new, old)  # noqa: E731
        return state._replace(
            loss=jnp.where(is_over, jnp.inf, state.loss),
            start=jnp.where(is_over, state.asked.value, state.start),
            memory=fresh(first_memory(state.settings), state.memory),
        )

    def adaptive(state: State, member: jax.Array, members: jax.Array, u: list[jax.Array]) -> tuple:
        """Weights, rates, and what they mix: current-to-pbest/1, the last of the four from population or archive."""
        which, for_weight, for_rate, for_leader, for_first, for_second = u
        entry = (which * MEMORY).astype(jnp.int32)
        weight = draw_weights(for_weight, state.memory.weight[entry])
        rate = draw_rates(jax.scipy.special.ndtri(for_rate), state.memory.rate[entry])
        best = lax.top_k(-state.loss, elite)[1]
        chosen = jnp.clip(jnp.round(members * state.settings.greediness), min(2, population), elite)
        leader = state.unit[best[jnp.minimum((for_leader * chosen).astype(jnp.int32), elite - 1)]]
        first = others(for_first, members, member)
        second = others(for_second, 2 * members, member, first)
        was_displaced = (second >= members)[:, None]
        second = jnp.where(second >= members, second - members, second)
        away = jnp.where(was_displaced, state.archive[second], state.unit[second])
        parent = state.unit[member]
        return weight, rate, parent, [(leader, parent), (state.unit[first], away)]

    def classic(state: State, member: jax.Array, members: jax.Array, u: list[jax.Array]) -> tuple:
        """The same of rand/1 and best/1, whose weight and rate are settings."""
        weight, rate = (jnp.full(batch, x) for x in (state.settings.weight, state.settings.crossover_rate))
        if strategy == "best/1/bin":
            base = jnp.full(batch, jnp.argmin(state.loss), jnp.int32)
        else:
            base = others(u[0], members, member)
        first = others(u[1], members, member, base)
        second = others(u[2], members, member, base, first)
        return weight, rate, state.unit[base], [(state.unit[first], state.unit[second])]

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        asked, row = state.asked.value, jnp.arange(batch, dtype=jnp.int32)
        state = restart(state, size(asked, state.start))
        members = size(asked, state.start)
        if shrinks:
            before = size(asked - batch, state.start)
            state = lax.cond(members < before, shrink, lambda s: s, state)
        turn = asked - state.start + row
        member = row if batch == population and not shrinks else turn % members
        parent = state.unit[member]
        key_rows, key_genes = jax.random.split(key)
        *u, anywhere = jax.random.uniform(key_rows, (7, batch), parent.dtype, minval=TINY, maxval=1 - TINY)
        cross, chance = two_uniforms(key_genes, parent.shape)

        weight, rate, base, pairs = (adaptive if adapts else classic)(state, member, members, u)
        mutant = midway(differ(space, weight, chance, base, pairs), parent)
        live = space.active(parent) if space.nesting else None
        always = one_dim(space, live, anywhere)
        take = with_subtrees(space, (cross < rate[:, None]) | always, parent, mutant)
        child = jnp.where(take, mutant, parent)
        repeats = ~differs(space, child, parent, live)[:, None]
        other = jnp.where(space.levels > 0, another_level(space, child, chance), chance) if has_levels else chance
        child = jnp.where(repeats & always, other, child)
        is_fresh = ((asked - state.start < population) | (state.start > 0)) & jnp.isinf(state.loss[member])
        unit = jnp.where(is_fresh[:, None], jnp.where((asked + row < population)[:, None], parent, chance), child)
        aux = Row(member, jnp.full(batch, state.start), jnp.where(is_fresh, 0, weight), rate)
        return black_box(space, unit, asked, aux=aux), state._replace(asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        row: Row = trials.aux
        losses = jnp.where(trials.active, ranked(losses.astype(state.loss.dtype)), jnp.inf)
        # A row of a population that is no more would bring back where it has ended, unless it is the best yet; one of
        # a member that has left meanwhile finds another place.
        is_late, members = row.start != state.start, size(state.asked.value, state.start)
        active = trials.active & (~is_late | (losses < state.best))
        row = row._replace(member=jnp.where(is_late, jnp.argmin(state.loss), row.member) % members)
        best, is_told = best_rows(row.member, losses, active, population)
        wins = is_told & (losses[best] <= state.loss)
        new = state._replace(
            unit=jnp.where(wins[:, None], trials.unit[best], state.unit),
            loss=jnp.where(wins, losses[best], state.loss),
            best=jnp.minimum(state.best, losses.min()),
        )
        if not adapts:
            return new
        known = jnp.isfinite(state.loss)
        displaced = jnp.where(known[:, None], state.unit, new.unit)
        before = state.loss[row.member]
        is_child = active & ~is_late & jnp.isfinite(before) & (row.weight > 0)
        gain = jnp.where(is_child, jnp.maximum(before - losses, 0), 0)
        return new._replace(
            archive=jnp.where(wins[:, None], displaced, state.archive),
            memory=remember(state.memory, row, gain, active.sum(dtype=jnp.int32), members),
        )

    return init, ask, tell


def differential_evolution(
    space: PyTree,
    *,
    strategy: str = ADAPTIVE,
    population: int | None = None,
    trials: int | None = None,
    weight: float = 0.5,
    crossover_rate: float = 0.9,
    greediness: float = 0.11,
    tolerance: float = 1e-5,
    batch: int = 16,
) -> Method:
    """Differential evolution: each member of a population against a child made of the differences of others.

    Where the members have become one, a new population starts.
    A batch smaller than the population learns more often; as in any asynchronous version, children are made of the
    members as they are then. The first `population` trials are a Latin hypercube.

    Args:
      space: a pytree of parameters, or a `Space`.
      strategy: "current-to-pbest/1", whose weights and rates adapt to what brought success (SHADE), "rand/1/bin", or
        "best/1/bin".
      population: members, at least 2; 4 a dim, but 20 to 100, and at least `batch`, if not given.
      trials: the number of trials that the study is to have, at least 1, where it is known: the population then shrinks
        to 4 on the way there (as in L-SHADE), which finds better optima. All strategies take it.
      weight: differential weight F in (0, 2]; where it adapts, where that begins.
      crossover_rate: share of the coordinates that come from the mutant, CR, in [0, 1]; where it adapts, where that
        begins.
      greediness: share of the population that counts as its best, p, in (0, 0.25]; only of current-to-pbest/1.
      tolerance: spread of the members, in the unit cube, below which a new population starts, in [0, 1].
      batch: trials per ask, of any size.

    Returns:
      A `Method` whose settings are weight, crossover_rate, greediness and tolerance.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.differential_evolution({"x": hpo.Array(5, -5.0, 5.0)}, trials=1000, batch=10)
      >>> objective = lambda key, hparams: (hparams["x"] ** 2).sum()
      >>> hpo.minimize(objective, method, key=jax.random.key(0), trials=1000, progress=False).best_loss < 1e-2
      True

    Reference:
      Storn and Price (1997), Differential evolution. Tanabe and Fukunaga (2014), Improving the search performance of
      SHADE using linear population size reduction.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    usual = max(batch, min(max(4 * space.dims, 20), 100))
    population = usual if population is None else whole("population", population, 2)
    trials = None if trials is None else whole("trials", trials, 1)
    one_of("strategy", strategy, STRATEGIES)
    values = (
        real("weight", weight, TINY, 2, "0.5 is usual"),
        real("crossover_rate", crossover_rate, 0, 1, "0.9 is usual"),
        real("greediness", greediness, TINY, MOST_GREEDY, "0.11 is usual"),
        real("tolerance", tolerance, 0, 1, "1e-5 is usual"),
    )
    settings = Settings(*(jnp.asarray(value, working_dtype()) for value in values))
    init, ask, tell = _functions(space, strategy, population, trials, batch)
    return Method("differential_evolution", space, settings, Initializer(init, settings), ask, tell, batch)
