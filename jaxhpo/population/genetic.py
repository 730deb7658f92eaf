"""A genetic algorithm: selected parents are crossed, and each child takes a member's place where it is no worse.

Simulated binary crossover: Deb and Agrawal (1995), Simulated binary crossover for continuous search space, equations 14
and 15. BLX-alpha: Eshelman and Schaffer (1993), Real-coded genetic algorithms and interval-schemata. Polynomial
mutation, in its form for bounded variables: Deb and Goyal (1996), A combined genetic adaptive search (GeneAS) for
engineering design. Tournaments: Goldberg and Deb (1991), A comparative analysis of selection schemes used in genetic
algorithms. Linear ranking: Baker (1985), Adaptive selection methods for genetic algorithms. Replacing within a place:
Mahfoud (1992), Crowding and preselection revisited. Restarts: Eshelman (1991), The CHC adaptive search algorithm.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.checks import one_of, real, whole
from jaxhpo.draws import two_uniforms
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count, ranked
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import (
    best_rows,
    collapsed,
    differs,
    latin_hypercube,
    mutate,
    one_dim,
    reflect,
    with_subtrees,
)

SELECTIONS = ("tournament", "rank")
CROSSOVERS = ("blend", "sbx")
CONTENDERS = 3
# Random numbers of 16 bits point at members and at dims.
MOST = 2**16


class Settings(NamedTuple):
    """Numeric settings of a genetic algorithm, float[] each."""

    crossover_rate: jax.Array
    """chance that a child has two parents"""
    mutation_rate: jax.Array
    """chance that a child of two parents is mutated in a dim; one that equals its parent always is"""
    alpha: jax.Array
    """how far beyond its parents a child of a blend may lie, as a share of their distance"""
    eta_c: jax.Array
    """distribution index of simulated binary crossover"""
    eta_m: jax.Array
    """distribution index of polynomial mutation"""
    pressure: jax.Array
    """chance that the best of three becomes a parent, or how much more than the mean the best by rank expects to"""
    tolerance: jax.Array
    """range of the population in every dim, as a share of the dim's, below which it has collapsed"""


class State(NamedTuple):
    """State of a genetic algorithm."""

    unit: jax.Array
    """float[population, dims]: the members"""
    loss: jax.Array
    """float[population]: theirs, +inf where none is known"""
    best: jax.Array
    """float[]: the lowest loss ever, +inf before there is one"""
    fresh: jax.Array
    """bool[population]: whose place a restart has freed, until a trial for it is told"""
    epoch: jax.Array
    """i32[], restarts so far"""
    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""
    told: Count
    """i32[]: rows told so far, padding included"""


class Row(NamedTuple):
    """What a row of an ask remembers."""

    member: jax.Array
    """i32[batch]: the member whose place it contends for"""
    epoch: jax.Array
    """i32[batch]: restarts before it was asked"""


def tournament(members: list[jax.Array], losses: list[jax.Array], coin: jax.Array, pressure: jax.Array) -> jax.Array:
    """The best of some contenders where the coin is below `pressure`, else the first of them: i32[n].

    Args:
      members: i32[n] each.
      losses: float[n] each, theirs.
      coin: float[n] in (0, 1).
      pressure: float[].
    """
    winner, least = members[0], losses[0]
    for member, loss in zip(members[1:], losses[1:], strict=True):
        wins = (loss < least) & (coin < pressure)
        winner, least = jnp.where(wins, member, winner), jnp.where(wins, loss, least)
    return winner


def linear_rank(uniform: jax.Array, population: int, pressure: jax.Array) -> jax.Array:
    """Ranks, 0 the best, whose chances fall linearly, from 1 + `pressure` times the mean to 1 - `pressure` times.

    The inverse of the distribution function, in a form that does not divide by 0 where all chances are equal.
    """
    most = 1 + pressure
    share = 2 * uniform / (most + jnp.sqrt(most * most - 4 * pressure * uniform))
    return jnp.minimum((share * population).astype(jnp.int32), population - 1)


def blend(a: jax.Array, b: jax.Array, uniform: jax.Array, alpha: jax.Array) -> jax.Array:
    """BLX-alpha: uniform over the interval of the parents, longer by `alpha` of it at either end."""
    return a + ((1 + 2 * alpha) * uniform - alpha) * (b - a)


def simulated_binary(a: jax.Array, b: jax.Array, uniform: jax.Array, eta: jax.Array) -> jax.Array:
    """Of the two children of simulated binary crossover the one at `a`, every gene crossed (equations 14 and 15)."""
    # One logarithm and one exponential a gene, which vectorise; a power does not.
    log = jnp.log(2 * jnp.minimum(uniform, 1 - uniform)) / (eta + 1)
    spread = jnp.exp(jnp.where(uniform <= 0.5, log, -log))
    return 0.5 * ((1 + spread) * a + (1 - spread) * b)


def recombine(space: Space, a: jax.Array, b: jax.Array, mixed: jax.Array, uniform: jax.Array) -> jax.Array:
    """Children that are `mixed` in the dims that have an order, and take each other one from either parent.

    What only one parent runs comes from where its `OneOf` came from.

    Args:
      space: whose dims they are.
      a: float[n, dims], the first parents.
      b: float[n, dims], the second parents.
      mixed: float[n, dims], the parents' crossover.
      uniform: float[n, dims] in (0, 1), which parent to take from.
    """
    if not space.categorical.any():
        return mixed
    take = with_subtrees(space, uniform > 0.5, a, b)
    chosen, whole_ = jnp.where(take, b, a), jnp.asarray(space.categorical)
    if space.nesting:
        whole_ = whole_ | ~(space.active(a) & space.active(b))
    return jnp.where(whole_, chosen, mixed)


def best_members(loss: jax.Array, number: int) -> jax.Array:
    """Which members are the best `number`: bool[population]."""
    best = jnp.argmin(loss)[None] if number == 1 else lax.top_k(-loss, number)[1]
    return jnp.zeros(loss.shape, bool).at[best].set(True)


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, selection: str, crossover: str, population: int, elite: int, batch: int
) -> tuple[Callable, Callable, Callable]:
    dims = space.dims
    all_levels, in_step = bool((space.levels > 0).all()), batch == population

    def init(key: jax.Array, settings: Settings) -> State:
        return State(
            unit=latin_hypercube(key, population, dims),
            loss=jnp.full(population, jnp.inf, working_dtype()),
            best=jnp.asarray(jnp.inf, working_dtype()),
            fresh=jnp.zeros(population, bool),
            epoch=jnp.int32(0),
            settings=settings,
            asked=count(),
            told=count(),
        )

    def parents(key: jax.Array, coins: list[jax.Array], state: State, member: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Two members for every child: i32[batch] each."""
        loss, pressure = state.loss, state.settings.pressure
        if selection == "rank":
            order = jnp.argsort(loss, stable=True)
            first, second = (order[linear_rank(coin, population, pressure)] for coin in coins)
        else:
            # All meet those at the same distances, which are drawn anew for every ask: so a member contends as often
            # as any other, and its losses are read in one piece.
            distance = jax.random.randint(key, (2 * CONTENDERS - 1,), 1, population)
            group = [member, *((member + d) % population for d in distance)]
            twice = jnp.concatenate([loss, loss])
            rolled = lambda d: lax.dynamic_slice_in_dim(twice, d, population)  # noqa: E731
            losses = [loss, *map(rolled, distance)] if in_step else [loss[i] for i in group]
            first, second = (
                tournament(group[k : k + CONTENDERS], losses[k : k + CONTENDERS], coin, pressure)
                for k, coin in zip((0, CONTENDERS), coins, strict=True)
            )
        return first, jnp.where(second == first, (second + 1) % population, second)

    def children(key: jax.Array, state: State, member: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Children for the places of `member`, and points that depend on nothing: float[batch, dims] each."""
        settings = state.settings
        key_rows, key_genes, key_parents = jax.random.split(key, 3)
        # Draws in one axis: they are several times faster than those with a short last one.
        half = (batch + 1) // 2
        genes = jnp.concatenate([u.reshape(half, dims) for u in two_uniforms(key_genes, (half * dims,))])[:batch]
        rows = [u for pair in two_uniforms(key_rows, (3 * batch,)) for u in pair.reshape(3, batch)]
        first, second = parents(key_parents, rows[4:], state, member)
        is_crossed, is_mutated = rows[0] < settings.crossover_rate, rows[1] < settings.mutation_rate
        # XLA would work these out again for every gene.
        first, second, is_crossed, is_mutated, where, how, genes = lax.optimization_barrier(
            (first, second, is_crossed, is_mutated, rows[2], rows[3], genes)
        )
        a, b = state.unit[first], state.unit[second]

        if crossover == "blend":
            mixed = blend(a, b, genes, settings.alpha)
        else:
            mixed = simulated_binary(a, b, genes, settings.eta_c)
        child = jnp.where(is_crossed[:, None], recombine(space, a, b, reflect(mixed), genes), a)
        live = space.active(child) if space.nesting else None
        is_new = differs(space, child, a, live)
        if all_levels:
            is_new &= differs(space, child, b, live)
        at = one_dim(space, live, where)
        return mutate(space, child, at & (is_mutated | ~is_new)[:, None], how, settings.eta_m), genes

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        asked, row = state.asked.value, jnp.arange(batch, dtype=jnp.int32)
        member = row if in_step else (asked + row) % population
        at = lambda x: x if in_step else x[member]  # noqa: E731
        child, anywhere = children(key, state, member)
        first_time = (asked + row < population) & jnp.isinf(at(state.loss))
        unit = jnp.where(at(state.fresh)[:, None], anywhere, child)
        unit = jnp.where(first_time[:, None], at(state.unit), unit)
        aux = Row(member, jnp.broadcast_to(state.epoch, (batch,)))
        return black_box(space, unit, asked, aux=aux), state._replace(asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        row: Row = trials.aux
        losses = ranked(losses.astype(state.loss.dtype))
        # A row from before a restart would bring back where the population had collapsed, unless it is the best yet.
        is_late = row.epoch != state.epoch
        active = trials.active & (~is_late | (losses < state.best))
        chosen, is_told = best_rows(jnp.where(is_late, jnp.argmin(state.loss), row.member), losses, active, population)
        wins = is_told & (losses[chosen] <= state.loss) & jnp.isfinite(losses[chosen])
        unit = jnp.where(wins[:, None], trials.unit[chosen], state.unit)
        loss = jnp.where(wins, losses[chosen], state.loss)

        def survivors() -> jax.Array:
            return ~collapsed(space, unit, loss, state.settings.tolerance) | best_members(loss, elite)

        told = state.told.value
        now = told + losses.shape[0]
        # Once a generation; the predicate is a count, so that it stays a branch under `vmap`.
        stays = lax.cond(now // population > told // population, survivors, lambda: jnp.ones(population, bool))
        return state._replace(
            unit=unit,
            loss=jnp.where(stays, loss, jnp.inf),
            best=jnp.minimum(state.best, loss.min()),
            fresh=(state.fresh & ~is_told) | ~stays,
            epoch=state.epoch + ~stays.all(),
            told=Count(now),
        )

    return init, ask, tell


def genetic(
    space: PyTree,
    *,
    population: int | None = None,
    selection: str = SELECTIONS[0],
    crossover: str = CROSSOVERS[0],
    elite: int = 1,
    crossover_rate: float = 0.9,
    mutation_rate: float = 0.1,
    alpha: float = 0.5,
    eta_c: float = 2.0,
    eta_m: float = 20.0,
    pressure: float = 1.0,
    tolerance: float = 1e-4,
    batch: int = 16,
) -> Method:
    """A genetic algorithm: children of selected parents, each of which takes a member's place where it is no worse.

    Reals and integers are crossed and mutated as numbers, integers by a level at least. Options are taken from either
    parent and mutate to another one, and the choice of a `OneOf` brings its branch along. No child decodes to the same
    as its parent. Where the population has collapsed, its best members stay and the others start afresh.

    Args:
      space: a pytree of parameters, or a `Space`.
      population: members, in [2, 65536]; `batch`, or 50 where that is less, if not given.
      selection: "tournament", where parents are the best of three; or "rank", where chances fall linearly with rank.
      crossover: "blend", uniform around both parents, or "sbx", near one of them.
      elite: members that survive a restart, less than `population`.
      crossover_rate: chance that a child has two parents, in [0, 1].
      mutation_rate: chance that a child of two parents is mutated in a dim, in [0, 1].
      alpha: how far beyond its parents a blended child may lie, as a share of their distance, in [0, 10].
      eta_c: distribution index of "sbx", in [0, 1000]: a high one keeps children near their parents.
      eta_m: distribution index of mutation, in [0, 1000]: a high one makes small steps.
      pressure: chance that the best of three becomes a parent, and not the first of them, in [0, 1]; with ranks the
        best member expects to be a parent 1 + `pressure` times as often as the mean.
      tolerance: range of the population in every dim, as a share of the dim's, below which it has collapsed, in [0, 1].
      batch: trials per ask.

    Returns:
      A `Method`. Its settings are the arguments from `crossover_rate` to `tolerance`.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.genetic({"x": hpo.Float(-1.0, 1.0)}, population=20, batch=20)
      >>> result = hpo.minimize(lambda key, h: (h["x"] - 0.5) ** 2, method, key=jax.random.key(0), trials=400)
      >>> round(result.best_hparams["x"], 2)
      0.5

    Reference:
      Deb and Agrawal (1995), Simulated binary crossover for continuous search space. Eshelman and Schaffer (1993),
      Real-coded genetic algorithms and interval-schemata. Deb and Goyal (1996), A combined genetic adaptive search
      (GeneAS) for engineering design.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    least = max(50, min(batch, MOST))
    population = least if population is None else whole("population", population, 2, "a child needs two parents", MOST)
    one_of("selection", selection, SELECTIONS)
    one_of("crossover", crossover, CROSSOVERS)
    elite = whole("elite", elite, 0, "the others start afresh", population - 1)
    ranges = {
        "crossover_rate": (crossover_rate, 0, 1, "it is a chance"),
        "mutation_rate": (mutation_rate, 0, 1, "it is a chance"),
        "alpha": (alpha, 0, 10, "0.5 is usual"),
        "eta_c": (eta_c, 0, 1000, "2 to 20 are usual"),
        "eta_m": (eta_m, 0, 1000, "20 is usual"),
        "pressure": (pressure, 0, 1, "with 0 all members have the same chance"),
        "tolerance": (tolerance, 0, 1, "0 never restarts a search among reals"),
    }
    settings = Settings(**{k: jnp.asarray(real(k, *given), working_dtype()) for k, given in ranges.items()})
    init, ask, tell = _functions(space, selection, crossover, population, elite, batch)
    return Method("genetic", space, settings, Initializer(init, settings), ask, tell, batch)
