"""CMA-ES: a normal distribution that learns from ranks where to search, how far, and along which directions.

Hansen (2016), The CMA Evolution Strategy: A Tutorial (arXiv:1604.00772), whose equation numbers are used below. The
update is in `cma_update`, dims with levels are in `cma_margin`, restarts in `restarts`.

A generation is all rows told since the last one, however many: none is discarded, and the weights are those of their
actual number. In a small population its best rows take part in the next one again, elites of a plus-selection: that
pays while trials are few, and leads to a worse valley where they are many.
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
from jaxhpo.population.cma_margin import (
    Categories,
    Integers,
    integers_of,
    learned_categories,
    limits,
    uniform_categories,
    with_margin,
)
from jaxhpo.population.cma_update import (
    Distribution,
    Rates,
    decomposed,
    learned,
    rates_of,
    standings,
    start,
    variances,
    weights_of,
)
from jaxhpo.population.restarts import Run, after_generation, first_run, largest, next_run
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import reflect

AGE = 0.3
OUTLYING = 6
TOLERANCE = 1e-5


class Settings(NamedTuple):
    """Numeric settings, float[] each."""

    sigma: jax.Array
    """first standard deviation of every coordinate, in the unit cube"""
    margin: jax.Array
    """how often in a generation the level of any of the integers changes, at least and on average"""
    tolerance: jax.Array
    """standard deviation, in the unit cube, below which a run is over"""


class Told(NamedTuple):
    """The rows of the running generation; those from `count` on hold nothing."""

    unit: jax.Array
    """float[capacity, dims]"""
    losses: jax.Array
    """float[capacity]"""
    count: jax.Array  # type: ignore[assignment]  # not the count of tuples
    """i32[]"""


class Elites(NamedTuple):
    """The best rows of the last generation."""

    unit: jax.Array
    """float[elites, dims]"""
    losses: jax.Array
    """float[elites], +inf where there is none"""


class Search(NamedTuple):
    """What a run has learned, all of which a restart begins anew."""

    distribution: Distribution
    categories: Categories
    elites: Elites
    run: Run


class State(NamedTuple):
    """State of a search by CMA-ES."""

    settings: Settings
    search: Search
    told: Told
    asked: Count
    """i32[]: trials asked for so far"""


class Generation(NamedTuple):
    """What a generation teaches."""

    rates: Rates
    step: jax.Array
    """float[n], sum of the rows' y by their positive weights"""
    rank_mu: jax.Array
    """of the shape of C, sum of y y' by all weights"""
    levels: jax.Array
    """float[categoricals, most levels], weight of the rows that have a level"""
    elites: Elites
    n: jax.Array
    """i32[], rows"""
    succeeded: jax.Array
    """i32[], rows that have not failed"""
    best: jax.Array
    """float[]"""
    median: jax.Array
    """float[]"""


def normals(key: jax.Array, rows: int, dims: int) -> jax.Array:
    """Normal numbers float[rows, dims], two from each draw of 32 bits: Box and Muller (1958)."""
    total = rows * dims
    u, v = two_uniforms(key, ((total + 1) // 2,))
    radius, angle = jnp.sqrt(-2 * jnp.log(u)), 2 * np.pi * v
    both = jnp.concatenate([radius * jnp.cos(angle), radius * jnp.sin(angle)])
    return both[:total].reshape(rows, dims)


class Layout(NamedTuple):
    """What the functions of a search are built for; static."""

    population: int
    elites: int
    batch: int
    separable: bool
    active: bool
    margin: bool
    restarts: str | None

    @property
    def news(self) -> int:
        """Told rows that end a generation of the first run."""
        return self.population - self.elites


def asks_per_decomposition(layout: Layout, dims: int) -> int:
    """How many asks a decomposition serves: until C has forgotten three tenths of what was decomposed."""
    with jax.ensure_compile_time_eval():
        n = jnp.int32(layout.population)
        ranks = jnp.arange(layout.population, dtype=jnp.int32)
        rates = rates_of(weights_of(ranks, jnp.ones_like(ranks), n, n, False), dims, False, layout.active)
        forgets = float(rates.c_1 + rates.c_mu)
    return max(1, int(AGE / forgets)) * -(-layout.news // layout.batch)


@functools.lru_cache(maxsize=256)
def _functions(space: Space, layout: Layout) -> tuple[Callable, Callable, Callable]:
    _, elites, batch, separable, active, margin, restarts = layout
    news = layout.news
    # Indices of 32 bits, which are the same with and without float64.
    ordered, unordered = (np.flatnonzero(x).astype(np.int32) for x in (~space.categorical, space.categorical))
    n, number = len(ordered), space.levels[unordered]
    has_levels = space.levels[ordered] > 0
    integers = integers_of(space)
    if not margin:
        integers = Integers(*(x[:0] for x in integers))
    place = np.argsort(np.concatenate([ordered, unordered])).astype(np.int32)
    unordered_among = np.searchsorted(np.flatnonzero(space.levels), unordered).astype(np.int32)
    capacity = largest(news, restarts) + batch - 1
    sizes = sorted({min(news * 8**i + batch - 1, capacity) for i in range(6)} | {capacity})
    period = asks_per_decomposition(layout, max(n, 1))

    def begun(mean: jax.Array, sigma: jax.Array, run: Run) -> Search:
        nobody = jnp.full((elites, space.dims), 0.5, mean.dtype), jnp.full(elites, jnp.inf, mean.dtype)
        distribution = start(mean, sigma, len(integers.top), separable)
        return Search(distribution, uniform_categories(number), Elites(*nobody), run)

    def init(key: jax.Array, settings: Settings) -> State:
        del key
        dtype = working_dtype()
        told = Told(jnp.zeros((capacity, space.dims), dtype), jnp.zeros(capacity, dtype), jnp.zeros((), jnp.int32))
        return State(settings, begun(jnp.full(n, 0.5, dtype), settings.sigma, first_run(news)), told, count())

    def restarted(key: jax.Array, search: Search, sigma: jax.Array) -> Search:
        uniform = jax.random.uniform(key, (n + 2,), sigma.dtype)
        run, factor = next_run(search.run, uniform[n:], news, str(restarts))
        return begun(uniform[:n], sigma * factor, run)

    def scales(d: Distribution) -> jax.Array:
        """The diagonal of A: float[n], or float[] where it is 1."""
        one = jnp.ones((), d.mean.dtype)
        return jnp.ones_like(d.mean).at[integers.columns].set(d.scale) if len(integers.top) else one

    def points(key: jax.Array, d: Distribution) -> jax.Array:
        z = normals(key, batch, n) * d.roots
        x = d.mean + d.sigma * scales(d) * (z if separable else z @ d.basis.T)  # Eq. 38 to 40
        # Beyond the last level is the last level; a reflection would make it another one.
        return jnp.where(has_levels, jnp.clip(x, 0, 1), reflect(x)) if has_levels.any() else reflect(x)

    def options(key: jax.Array, q: jax.Array) -> jax.Array:
        uniform = jax.random.uniform(key, (batch, len(number)), q.dtype)
        level = (jnp.cumsum(q, 1) <= uniform[..., None]).sum(-1)
        return (jnp.minimum(level, number - 1) + 0.5).astype(q.dtype) / jnp.asarray(number, q.dtype)

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        key_points, key_options, key_start = jax.random.split(key, 3)
        search, asked = state.search, state.asked.value
        if restarts:
            keep = lambda _, search, __: search  # noqa: E731
            search = lax.cond(search.run.is_over, restarted, keep, key_start, search, state.settings.sigma)
        d = search.distribution
        if n and not separable:
            # Gated by a count, so that it stays a branch where studies are batched.
            due = asked // batch % period == 0
            renew, keep = (lambda c, *_: decomposed(c)), (lambda _, *old: old)
            basis, roots = lax.cond(due, renew, keep, d.covariance, d.basis, d.roots)
            d = d._replace(basis=basis, roots=roots)
        parts = [points(key_points, d)] if n else []
        parts += [options(key_options, search.categories.q)] if len(number) else []
        unit = jnp.concatenate(parts, 1)[:, place] if len(parts) == 2 else parts[0]
        state = state._replace(search=search._replace(distribution=d), asked=Count(asked + batch))
        return black_box(space, unit, asked), state

    def taught(search: Search, unit: jax.Array, losses: jax.Array, mask: jax.Array) -> Generation:
        if elites:
            unit = jnp.concatenate([search.elites.unit, unit])
            losses = jnp.concatenate([search.elites.losses, losses])
            mask = jnp.concatenate([jnp.isfinite(search.elites.losses), mask])
        losses = jnp.where(mask, ranked(losses), jnp.inf)
        less, equal = standings(losses, mask)
        rows, succeeded = mask.sum(dtype=jnp.int32), jnp.isfinite(losses).sum(dtype=jnp.int32)
        w = weights_of(less, equal, rows, succeeded, separable)
        r = rates_of(w, max(n, 1), separable, active)
        step, rank_mu = (jnp.zeros_like(x) for x in (search.distribution.mean, search.distribution.covariance))
        if n:
            d = search.distribution
            x = unit[:, ordered] if len(number) else unit
            y = jnp.where(mask[:, None], (x - d.mean) / (d.sigma * scales(d)), 0)
            squares = (((y if separable else y @ d.basis) / d.roots) ** 2).sum(1)
            # None of the distribution's own rows is so far away; an elite, a late one or a user's point may be.
            near = jnp.minimum(1, (n**0.5 + OUTLYING) / jnp.sqrt(squares + 1e-30))
            y, squares = y * near[:, None], squares * near**2
            step = w.positive @ y  # Eq. 41
            by_row = w.positive + r.negative * w.negative * n / (squares + 1e-8) if active else w.positive  # Eq. 46
            rank_mu = by_row @ y**2 if separable else (y * by_row[:, None]).T @ y
        levels = jnp.zeros_like(search.categories.q)
        if len(number):
            safe = jnp.where(mask[:, None], unit, 0.5)
            level = space.level(safe)[:, unordered_among]
            # A dim that was not live in a trial has no part in its loss.
            weight = w.positive[:, None] * space.active(safe)[:, unordered]
            levels = (weight[..., None] * (level[..., None] == np.arange(levels.shape[1]))).sum(0)
        kept = search.elites
        if elites:
            best = lax.top_k(-losses, elites)[1]
            kept = Elites(jnp.where(jnp.isfinite(losses[best])[:, None], unit[best], 0.5), losses[best])
        median = jnp.where(mask & (less <= (rows - 1) // 2), losses, -jnp.inf).max()
        return Generation(r, step, rank_mu, levels, kept, rows, succeeded, losses.min(), median)

    def corrected(d: Distribution, alpha: jax.Array) -> Distribution:
        at = integers.columns
        deviation = d.sigma * jnp.sqrt(variances(d.covariance)[at])
        mean, scale = with_margin(d.mean[at], deviation, d.scale, *limits(space, integers, d.mean[at]), alpha)
        return d._replace(mean=d.mean.at[at].set(jnp.clip(mean, 0, 1)), scale=scale)

    def is_exhausted(d: Distribution, tolerance: jax.Array) -> jax.Array:
        if not n:
            return jnp.asarray(False)
        steps = d.sigma * jnp.sqrt(variances(d.covariance))
        is_narrow = (steps < tolerance)[~has_levels].all() & ~has_levels.all()
        # Beyond this condition number of C rounding has a say in its smallest eigenvalues.
        return is_narrow | (d.roots.min() < 1.5 * jnp.sqrt(jnp.finfo(d.roots.dtype).eps) * d.roots.max())

    def updated(search: Search, g: Generation, settings: Settings) -> Search:
        d, categories, _, run = search
        failed_all = g.succeeded == 0
        choose = lambda a, b: jax.tree.map(lambda x, y: jnp.where(failed_all, x, y), a, b)  # noqa: E731
        if n:
            new = learned(d, g.rates, g.step, g.rank_mu)
            if len(integers.top):
                new = corrected(new, jnp.minimum(settings.margin / (g.n * n), 0.4))
            # What has failed as a whole says nothing but that the optimum is elsewhere.
            wider = d._replace(sigma=jnp.minimum(1.5 * d.sigma, jnp.maximum(settings.sigma, d.sigma)))
            d = choose(wider, new)
        if len(number):
            gradient = g.levels - g.levels.sum(1, keepdims=True) * categories.q
            categories = choose(categories, learned_categories(categories, gradient, number))
        if restarts:
            run = after_generation(run, g.n, g.best, g.median, is_exhausted(d, settings.tolerance), max(n, 1))
        return Search(d, categories, g.elites, run)

    def put(told: Told, unit: jax.Array, losses: jax.Array, mask: jax.Array) -> Told:
        at = jnp.where(mask, told.count + jnp.cumsum(mask) - 1, capacity)
        return Told(
            told.unit.at[at].set(unit, mode="drop"),
            told.losses.at[at].set(losses, mode="drop"),
            told.count + mask.sum(dtype=jnp.int32),
        )

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        settings, search, told, asked = state
        rows = trials.unit, losses.astype(trials.unit.dtype), trials.active
        is_complete = told.count + trials.active.sum(dtype=jnp.int32) >= search.run.population
        # What comes at once is learned from without being stored; too small a tell never does.
        may_come_at_once = trials.active.shape[0] >= news
        at_once = is_complete & (told.count == 0) if may_come_at_once else jnp.asarray(False)
        told = lax.cond(at_once, lambda told, *_: told, put, told, *rows)

        def stored(size: int) -> Callable:
            def branch(search: Search, told: Told, *_: jax.Array) -> Generation:
                return taught(search, told.unit[:size], told.losses[:size], jnp.arange(size) < told.count)

            return branch

        branches = [stored(size) for size in sizes]
        nothing = jax.eval_shape(branches[0], search, told)
        branches.append(lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing))
        if may_come_at_once:
            branches.append(lambda search, _, *rows: taught(search, *rows))
        bucket = sum((told.count > size).astype(jnp.int32) for size in sizes[:-1])
        which = jnp.where(at_once, len(sizes) + 1, jnp.where(is_complete, bucket, len(sizes)))
        generation = lax.switch(which, branches, search, told, *rows)
        search = lax.cond(is_complete, updated, lambda search, *_: search, search, generation, settings)
        return State(settings, search, told._replace(count=jnp.where(is_complete, 0, told.count)), asked)

    return init, ask, tell


def cma_es(
    space: PyTree,
    *,
    population: int | None = None,
    elites: int | None = None,
    covariance: str = "full",
    active: bool = True,
    margin: bool = True,
    restarts: str | None = "bipop",
    sigma: float = 0.2,
    batch: int = 16,
) -> Method:
    """CMA-ES: learns the scales of the coordinates and their correlations, from the ranks of losses alone.

    For continuous and integer spaces that are hard: ill-conditioned, not separable or, with restarts, of many valleys.
    Integers keep a margin of probability for their neighbours; categoricals and the choices of a `OneOf` have a
    distribution of their own. A coordinate beyond a bound is mirrored there, that of an integer put on it.

    A generation ends with the tell that brings enough rows; then all of them are used. So `population` need not be a
    multiple of `batch`, and trials may come late and in parts.

    Args:
      space: a pytree of parameters, or a `Space`.
      population: trials ranked against one another, elites included; at least 2. If not given 4 + 3 log(dims), or the
        batch where that is more. Restarts raise it to at most 32 times as much; room for those rows is kept.
      elites: how many of them are the best of the generation before, from 0 to `population - 1`. 0 is the textbook,
        and for noisy losses. If not given 3, where the population is smaller than 16.
      covariance: "full", or "separable": the scales of coordinates only, for hundreds of dims and more.
      active: whether bad trials also teach, where not to search.
      margin: whether integers keep a margin. Without it they stay where they are once the search has narrowed.
      restarts: what follows when a run has nothing left to find. "ipop": a random start with twice the population;
        "bipop": now and then also small populations and first steps; `None`: it goes on for ever. Where studies are
        batched by `vmap`, every tell costs as much as one of the largest population: `None` is the fast one there.
      sigma: first standard deviation of a coordinate in the unit cube, in [1e-6, 1].
      batch: trials per ask.

    Returns:
      A `Method` with the settings `sigma`; `margin`, 1: how often in a generation the level of any integer changes, at
      least and on average; and `tolerance`, 1e-5: the standard deviation in the unit cube at which a run ends.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> rosenbrock = lambda key, h: (1 - h["x"]) ** 2 + 100 * (h["y"] - h["x"] ** 2) ** 2
      >>> method = hpo.cma_es({"x": hpo.Float(-2.0, 2.0), "y": hpo.Float(-1.0, 3.0)}, batch=8)
      >>> result = hpo.minimize(rosenbrock, method, key=jax.random.key(0), trials=800)
      >>> result.best_loss < 1e-6
      True

    Reference:
      Hansen (2016), The CMA Evolution Strategy: A Tutorial. Ros and Hansen (2008), A Simple Modification in CMA-ES
      Achieving Linear Time and Space Complexity. Hamano et al. (2022), CMA-ES with Margin. Hamano et al. (2024),
      CatCMA. Auger and Hansen (2005), A Restart CMA Evolution Strategy with Increasing Population Size. Hansen (2009),
      Benchmarking a BI-Population CMA-ES on the BBOB-2009 Function Testbed.
    """
    space = Space.of(space)
    batch = whole("batch", batch, 1)
    if population is None:
        population = max(4 + int(3 * math.log(space.dims)), batch)
    population = whole("population", population, 2)
    if elites is None:
        elites = min(3, population // 2) if population < 16 else 0
    elites = whole("elites", elites, 0, most=population - 1)
    one_of("covariance", covariance, ("full", "separable"))
    one_of("restarts", restarts, ("bipop", "ipop", None))
    for name, flag in {"active": active, "margin": margin}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    sigma = real("sigma", sigma, 1e-6, 1, "it is a standard deviation in the unit cube, such as 0.2")
    layout = Layout(population, elites, batch, covariance == "separable", active, margin, restarts)
    init, ask, tell = _functions(space, layout)
    settings = Settings(*(jnp.asarray(x, working_dtype()) for x in (sigma, 1, TOLERANCE)))
    return Method("cma_es", space, settings, Initializer(init, settings), ask, tell, batch)
