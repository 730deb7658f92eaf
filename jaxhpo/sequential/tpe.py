"""The tree-structured Parzen estimator: trials where good points are dense and bad ones are not.

Bergstra, Bardenet, Bengio and Kégl (2011), Algorithms for hyper-parameter optimization: the estimator, and the ratio of
the densities of good and bad points as acquisition. Watanabe (2023), Tree-structured Parzen estimator: understanding
its algorithm components and their roles for better empirical performance: the variants below. Falkner, Klein and Hutter
(2018), BOHB: one kernel over all dims. Pending points are told as bad ones: the constant liar of Ginsbourger, Le Riche
and Carraro (2010), Kriging is well-suited to parallelize optimization.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo import history as records
from jaxhpo.checks import one_of, real, whole
from jaxhpo.draws import bits, scramble, uniform
from jaxhpo.history import History
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count
from jaxhpo.sequential.surrogate.parzen import (
    Mixture,
    cells,
    features,
    log_densities,
    log_density,
    neighbours,
    sample,
    snapped,
    spread,
)
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import another_level, latin_hypercube, one_dim

SPLITS = ("linear", "sqrt")
WEIGHTINGS = ("rank", "improvement", "uniform", "decay")
BANDWIDTHS = ("neighbour", "scott", "dimensions")
MOST_GOOD = 25
RECENT = 25
GROWTH = 2
ENUMERATED = 256
UNTRIED = 16
REPEATED = 1e6
FIRST = 1e3
HALF_A_LEVEL = 0.5


class Settings(NamedTuple):
    """Numeric settings of the Parzen estimators; float[] each."""

    gamma: jax.Array
    """share of the trials that is good, or with split "sqrt" the factor of the root of their number"""
    scale: jax.Array
    """factor of the bandwidths of good points"""
    exponent: jax.Array
    """magic clipping: the bandwidth of good points is at least n^-exponent"""
    bad_exponent: jax.Array
    """the same of bad ones"""
    min_bandwidth: jax.Array
    """least bandwidth, as a share of the range"""
    prior_weight: jax.Array
    """weight of the uniform component, in points"""
    smoothing: jax.Array
    """weight of every option of a categorical in a kernel, in points"""


class State(NamedTuple):
    """State of the tree-structured Parzen estimator."""

    history: History
    design: jax.Array
    """float[startup, dims]: the first trials, up to whole asks"""
    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""


class Rules(NamedTuple):
    """What chooses code."""

    split: str
    weighting: str
    bandwidth: str
    multivariate: bool
    magic_clip: bool


class Pool(NamedTuple):
    """Points to choose from."""

    unit: jax.Array
    """float[points, dims]"""
    good: jax.Array
    """float[points, 1 or dims]: logarithm of the good density, of all dims at once or of each"""
    bad: jax.Array
    """float[points, 1 or dims]: the same of the bad one"""
    live: jax.Array
    """bool[points, 1 or dims]: which of them count"""
    repeated: jax.Array
    """bool[points]: whether it was tried or is being tried"""


def number_of_good(split: str, gamma: jax.Array, n: jax.Array) -> jax.Array:
    """How many of n trials are good, from 1 to 25: float[]."""
    return jnp.clip(jnp.ceil(gamma * (n if split == "linear" else jnp.sqrt(n))), 1, MOST_GOOD)


def good_weights(weighting: str, losses: jax.Array, number: jax.Array) -> jax.Array:
    """Weights of the best trials, in their order, with a sum of their number.

    Args:
      weighting: "rank" falls linearly with the rank, "improvement" is by how far a loss is below that of the best bad
        trial (the expected improvement of Song, Yu, Neiswanger and Ermon, 2022); the others are uniform.
      losses: float[good + 1], the lowest losses, +inf where there are no more.
      number: float[], how many are good.
    """
    rank = jnp.arange(losses.shape[0] - 1)
    is_good = (rank < number) & jnp.isfinite(losses[:-1])
    weight = is_good.astype(losses.dtype)
    if weighting == "rank":
        weight = jnp.where(is_good, 1 - rank / number, 0)
    elif weighting == "improvement":
        # Scaled first: the difference of two losses may be no number of the dtype.
        finite = jnp.where(jnp.isfinite(losses), losses, losses[0])
        scaled = finite / jnp.maximum(jnp.abs(finite).max(), jnp.finfo(losses.dtype).tiny)
        known = jnp.isfinite(losses) & (jnp.arange(losses.shape[0]) <= number)
        threshold = jnp.where(known, scaled, -jnp.inf).max()
        gain = jnp.where(is_good, threshold - scaled[:-1], 0)
        weight = jnp.where(gain.max() > 0, gain / jnp.where(gain.max() > 0, gain.max(), 1), weight)
    total = weight.sum()
    return weight * is_good.sum() / jnp.where(total > 0, total, 1)


def decay(is_bad: jax.Array) -> jax.Array:
    """Weights that fall linearly with age, to 1/n for the oldest of n, but not of the 25 most recent: float[n]."""
    age = jnp.cumsum(is_bad[::-1])[::-1] - 1
    n = is_bad.sum()
    ramp = 1 / jnp.maximum(n, 1) + (1 - 1 / jnp.maximum(n, 1)) * (n - 1 - age) / jnp.maximum(n - RECENT - 1, 1)
    return jnp.where(is_bad, jnp.where(age < RECENT, 1, ramp), 0.0)


def options_share(space: Space, smoothing: jax.Array, n: jax.Array) -> jax.Array:
    """The chance with which a kernel of a categorical is uniform, where all n kernels share the smoothing: [dims]."""
    weight = jnp.maximum(jnp.asarray(space.levels, working_dtype()), 1) * smoothing / (n + 1)
    return weight / (1 + weight)


def fingerprints(space: Space, unit: jax.Array, live: jax.Array) -> jax.Array:
    """Hashes of the levels of live dims: u32[points], equal for points that decode to the same."""
    has_levels = np.flatnonzero(space.levels)
    level = jnp.where(live[:, has_levels], space.level(unit) + 1, 0).astype(jnp.uint32)
    place = scramble(jnp.arange(1, has_levels.size + 1, dtype=jnp.uint32))
    return scramble(level + place).sum(1, dtype=jnp.uint32)


def all_points(space: Space) -> jax.Array | None:
    """Every point of a space of at most 256, float[points, dims]; None where there are more."""
    if not space.levels.all() or np.prod(space.levels, dtype=float) > ENUMERATED:
        return None
    grid = np.stack(np.meshgrid(*map(np.arange, space.levels), indexing="ij"), -1).reshape(-1, space.dims)
    return space.middle(jnp.asarray(grid, jnp.int32))


class Best(NamedTuple):
    """The best trials, the best one first: at most 25."""

    unit: jax.Array
    """float[25, dims], levels in their middles"""
    row: jax.Array
    """i32[25]: of the record"""
    is_good: jax.Array
    """bool[25]: whether it counts as good"""
    weight: jax.Array
    """float[25]: 0 where it does not"""


def best_of(told: History, settings: Settings, *, space: Space, rules: Rules) -> Best:
    """The best trials of a record."""
    number = number_of_good(rules.split, settings.gamma, told.succeeded.sum())
    best, row = lax.top_k(-told.losses, MOST_GOOD + 1)
    is_good = (jnp.arange(MOST_GOOD) < number) & jnp.isfinite(best[:-1])
    row = row[:-1]
    return Best(snapped(space, told.unit[row]), row, is_good, good_weights(rules.weighting, -best, number))


def widths(
    space: Space,
    rules: Rules,
    settings: Settings,
    unit: jax.Array,
    wished: jax.Array,
    n: jax.Array,
    exponent: jax.Array,
) -> jax.Array:
    """Bandwidths within their bounds, those of categoricals by the number of points n: float[n or 1, dims]."""
    least = settings.min_bandwidth
    if rules.magic_clip:
        least = jnp.maximum(least, (n + 2.0) ** -exponent)
    least = jnp.maximum(least, HALF_A_LEVEL * cells(space, unit))
    return jnp.where(space.categorical, options_share(space, settings.smoothing, n), jnp.clip(wished, least, 1))


def good_mixture(space: Space, rules: Rules, settings: Settings, best: Best) -> Mixture:
    """The estimator of good points."""
    live = space.active(best.unit)
    known = live & best.is_good[:, None]
    if rules.bandwidth == "neighbour":
        wished = neighbours(best.unit, known)
    else:
        wished = spread(rules.bandwidth, best.unit, known, best.weight)
    n = best.is_good.sum()
    width = widths(space, rules, settings, best.unit, settings.scale * wished, n, settings.exponent)
    return Mixture(best.unit, live, width, best.weight, settings.prior_weight)


def bad_mixture(
    space: Space,
    rules: Rules,
    settings: Settings,
    told: History,
    best: Best,
    waiting: jax.Array,
    is_waiting: jax.Array,
) -> Mixture:
    """The estimator of bad points: of all that were tried, where those that are good have weight 0.

    Args:
      space: whose points they are.
      rules: static.
      settings: traced.
      told: the record; failed trials are bad.
      best: its best trials.
      waiting: float[m, dims], points that are asked for and not told.
      is_waiting: bool[m], which rows of it there are.
    """
    unit = snapped(space, jnp.concatenate([told.unit, waiting]))
    live = space.active(unit)
    is_bad = jnp.concatenate([told.mask.at[best.row].set(told.mask[best.row] & ~best.is_good), is_waiting])
    weight = decay(is_bad) if rules.weighting == "decay" else is_bad.astype(unit.dtype)
    if rules.bandwidth == "neighbour":
        wished = jnp.zeros((1, space.dims), unit.dtype)
    else:
        wished = spread(rules.bandwidth, unit, live & is_bad[:, None], weight)
    width = widths(space, rules, settings, unit, wished, is_bad.sum(), settings.bad_exponent)
    return Mixture(unit, live, width, weight, settings.prior_weight)


def in_pool(space: Space, rules: Rules, unit: jax.Array, good: Mixture, bad: Mixture, told: jax.Array) -> Pool:
    """Points with their densities.

    Args:
      space: whose points they are.
      rules: static.
      unit: float[points, dims], levels in their middles.
      good: estimator of good points.
      bad: and of bad ones; its points are all that were tried.
      told: bool[n], which of those there are.
    """
    live = space.active(unit)
    if rules.multivariate:
        point = features(space, unit, live)
        found = [log_density(space, point, mixture) for mixture in (good, bad)]
    else:
        point = features(space, unit, jnp.ones_like(live))
        found = [log_densities(space, point, mixture) for mixture in (good, bad)]
        # Every dim chooses by itself: the best values of all dims are a point, the second best are one, ...
        order = jnp.argsort(found[1] - found[0], axis=0)
        best = [jnp.take_along_axis(x, order, 0) for x in (unit, *found)]
        # Where points can be repeated, those that were sampled stay too: the best values may all have been together.
        both = [jnp.concatenate(x) for x in zip(best, (unit, *found), strict=True)] if space.levels.all() else best
        unit, found = both[0], both[1:]
        live = space.active(unit)
    repeated = jnp.zeros(unit.shape[0], bool)
    if space.levels.all():
        same = fingerprints(space, unit, live)[:, None] == fingerprints(space, bad.unit, bad.live)
        repeated = (same & told).any(1)
    counts = jnp.ones((1, 1), bool) if rules.multivariate else live
    return Pool(unit, found[0], found[1], counts, repeated)


def choose(space: Space, rules: Rules, pool: Pool, width: jax.Array, total: jax.Array, batch: int) -> jax.Array:
    """Points of the pool, each where the ratio of the densities is largest once those before it count as bad.

    Args:
      space: whose points they are.
      rules: static.
      pool: to choose from.
      width: float[1, dims], the bandwidth of what was chosen.
      total: float[] or float[dims], the sum of the weights of the bad density.
      batch: how many.

    Returns:
      float[batch, dims].
    """
    live = space.active(pool.unit)
    point = features(space, pool.unit, live if rules.multivariate else jnp.ones_like(live))
    prints = fingerprints(space, pool.unit, live) if space.levels.all() else None
    row = jnp.arange(pool.repeated.size)

    def score(bad: jax.Array, repeated: jax.Array) -> jax.Array:
        return jnp.where(pool.live, pool.good - bad, 0).sum(1) - REPEATED * repeated

    if batch == 1:
        return pool.unit[lax.argmax(score(pool.bad, pool.repeated), 0, jnp.int32)][None]

    def pick(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        bad, repeated = carry
        best = lax.argmax(score(bad, repeated), 0, jnp.int32)
        again = (row == best) if prints is None else (prints == prints[best])
        chosen = Mixture(
            pool.unit[best][None], live[best][None], width, jnp.ones(1, bad.dtype), jnp.zeros((), bad.dtype)
        )
        if rules.multivariate:
            kernel = log_density(space, point, chosen)
        else:
            kernel = jnp.where(live[best], log_densities(space, point, chosen), -jnp.inf)
        return (jnp.logaddexp(bad, kernel - jnp.log(total)), repeated | again), pool.unit[best]

    return lax.scan(pick, (pool.bad, pool.repeated), length=batch)[1]


def judge(
    told: History,
    waiting: jax.Array,
    is_waiting: jax.Array,
    settings: Settings,
    best: Best,
    good: Mixture,
    unit: jax.Array,
    *,
    space: Space,
    rules: Rules,
) -> tuple[Pool, jax.Array, jax.Array]:
    """Points with their densities, and the bandwidth and the sum of weights with which `choose` goes on."""
    bad = bad_mixture(space, rules, settings, told, best, waiting, is_waiting)
    is_told = jnp.concatenate([told.mask, is_waiting])
    width = jnp.min(jnp.where(is_told[:, None], bad.bandwidth, 1), axis=0, keepdims=True)
    total = bad.weight.sum() if rules.multivariate else bad.weight @ bad.live
    return in_pool(space, rules, unit, good, bad, is_told), width, total + bad.prior


def propose(
    told: History,
    waiting: jax.Array,
    is_waiting: jax.Array,
    key: jax.Array,
    settings: Settings,
    *,
    space: Space,
    rules: Rules,
    candidates: int,
    batch: int,
) -> jax.Array:
    """The points that are asked next: float[batch, dims]."""
    # What depends on the size of the record is all that is compiled for each size.
    on_bucket = functools.partial(records.on_bucket, growth=GROWTH)
    best = on_bucket(functools.partial(best_of, space=space, rules=rules), told, settings)
    good, unit = good_mixture(space, rules, settings, best), all_points(space)
    if unit is None:
        size = candidates * batch
        key_unit, key_which, key_move = jax.random.split(key, 3)
        which = uniform(bits(key_which, (size, 1 if rules.multivariate else space.dims)))
        unit = sample(space, good, uniform(bits(key_unit, (size, space.dims))), which)
        if space.levels.all():
            unit = jnp.concatenate([unit, *elsewhere(space, key_move, unit, UNTRIED + batch)])
    judged = functools.partial(judge, space=space, rules=rules)
    pool, width, total = on_bucket(judged, told, waiting, is_waiting, settings, best, good, unit)
    return choose(space, rules, pool, width, total, batch)


def elsewhere(space: Space, key: jax.Array, unit: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Points one level away from each of some, and n uniform ones, where those themselves may all have been tried."""
    u = uniform(bits(key, (unit.shape[0] + n, space.dims + 1)))
    chance, anywhere = u[: unit.shape[0]], u[unit.shape[0] :, :-1]
    moves = one_dim(space, space.active(unit) if space.nesting else None, chance[:, -1])
    return jnp.where(moves, another_level(space, unit, chance[:, :-1]), unit), snapped(space, anywhere)


def begin(
    told: History, waiting: jax.Array, is_waiting: jax.Array, key: jax.Array, design: jax.Array, *, space: Space
) -> jax.Array:
    """The points of the design that are not tried yet, and others instead of those that are: float[batch, dims]."""
    batch, every = design.shape[0], all_points(space)
    others = every if every is not None else space.sample(key, UNTRIED + batch)
    unit = snapped(space, jnp.concatenate([design, others]))
    first = FIRST * jnp.concatenate([batch - jnp.arange(batch), uniform(bits(key, (others.shape[0],)))])
    tried = snapped(space, jnp.concatenate([told.unit, waiting]))
    live, known = space.active(unit), space.active(tried)
    same = fingerprints(space, unit, live)[:, None] == fingerprints(space, tried, known)
    repeated = (same & jnp.concatenate([told.mask, is_waiting])).any(1)
    pool = Pool(unit, first[:, None], jnp.zeros((unit.shape[0], 1), unit.dtype), jnp.ones((1, 1), bool), repeated)
    joint = Rules(*SPLITS[:1], *WEIGHTINGS[:1], *BANDWIDTHS[:1], multivariate=True, magic_clip=True)
    one = jnp.ones((), unit.dtype)
    return choose(space, joint, pool, jnp.full((1, space.dims), HALF_A_LEVEL, unit.dtype), one, batch)


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, rules: Rules, startup: int, candidates: int, batch: int
) -> tuple[Callable, Callable, Callable]:
    rounds = -(-startup // batch)
    finite = bool(space.levels.all())
    model = functools.partial(propose, space=space, rules=rules, candidates=candidates, batch=batch)

    def init(key: jax.Array, settings: Settings) -> State:
        return State(
            history=records.empty(space.dims, growth=GROWTH),
            design=latin_hypercube(key, rounds * batch, space.dims).astype(working_dtype()),
            settings=settings,
            asked=count(),
        )

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        asked, dtype = state.asked.value, state.design.dtype
        waiting, is_waiting = jnp.zeros((0, space.dims), dtype), jnp.zeros(0, bool)
        if pending is not None:
            waiting, is_waiting = pending.unit.astype(dtype), pending.active
            waiting = jnp.where(is_waiting[:, None], waiting, 0.5)

        def start(key: jax.Array) -> jax.Array:
            design = lax.dynamic_slice_in_dim(state.design, jnp.minimum(asked, (rounds - 1) * batch), batch)
            if not finite:
                return design
            return records.on_bucket(
                functools.partial(begin, space=space), state.history, waiting, is_waiting, key, design, growth=GROWTH
            )

        def learn(key: jax.Array) -> jax.Array:
            return model(state.history, waiting, is_waiting, key, state.settings)

        # Both are counts: under `vmap` the predicate is not batched, and this stays a branch.
        begins = jnp.maximum(asked, state.history.count.value) < startup
        unit = lax.cond(begins, start, learn, key) if startup else learn(key)
        return black_box(space, unit, asked), state._replace(asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        return state._replace(history=records.append(state.history, trials.unit, losses, trials.active))

    return init, ask, tell


def reserve(state: State, capacity: int) -> State:
    """`state` with room for that many told trials."""
    return state._replace(history=records.reserve(state.history, capacity, GROWTH))


def tpe(
    space: PyTree,
    *,
    batch: int = 1,
    startup: int = 8,
    candidates: int = 64,
    split: str = "linear",
    gamma: float = 0.1,
    weighting: str = "rank",
    bandwidth: str = "neighbour",
    scale: float = 0.8,
    magic_clip: bool = True,
    exponent: float = 1.25,
    bad_exponent: float = 0.9,
    min_bandwidth: float = 0.01,
    prior_weight: float = 1.0,
    smoothing: float = 0.5,
    multivariate: bool = True,
) -> Method:
    """The tree-structured Parzen estimator: the next trial is where good points are dense and bad ones are not.

    The best trials, at most 25, are good and all others bad, also those that failed and those that are pending. Each
    set is a mixture of kernels over all dims around its points, with a uniform component. Candidates are drawn from the
    good one, and the one with the largest ratio of the densities is asked; it counts as bad when the next row of the
    ask is chosen. A kernel knows only the branches that its trial ran, and is uniform in the others.

    By default, the weight of a good point falls with its rank, and its bandwidth in a dim is 0.8 of the larger distance
    to its neighbours among the good ones, but at least (n + 2)^-1.25 of the range for n good points. Bad points have
    the bandwidth (n + 2)^-0.9, so they keep trials apart and push them only gently. The first trials are a Latin
    hypercube. Where all dims have levels, no point is asked twice while the pool holds another: all points where there
    are at most 256, else the candidates, their neighbours and uniform points.

    Args:
      space: a pytree of parameters, or a `Space`.
      batch: trials per ask.
      startup: trials before the model is used, rounded up to whole asks; results that are told before count.
      candidates: points drawn for each row of an ask, at least 1.
      split: how many of n trials are good: "linear" gamma * n, "sqrt" gamma * sqrt(n), rounded up.
      gamma: as `split` says, in [0.001, 10]; 0.1 is usual for "linear", 0.75 for "sqrt".
      weighting: "rank" falls linearly with the rank of a good point, "improvement" is by how far its loss is below that
        of the best bad one, "uniform" is the same for all, "decay" is that too, but bad points that are older than the
        last 25 weigh less.
      bandwidth: "neighbour" by the distances between good points, with the least bandwidth for bad ones; "scott" by the
        standard deviation of the set, "dimensions" a fifth of the range, both times n^(-1 / (dims + 4)).
      scale: factor of the bandwidths of good points, in [0.001, 10].
      magic_clip: whether a bandwidth is at least (n + 2)^-exponent for the n points of its set.
      exponent: that of good points, in [0, 10].
      bad_exponent: that of bad points, in [0, 10].
      min_bandwidth: least bandwidth, as a share of the range, in [0.0001, 1].
      prior_weight: weight of the uniform component, in points, positive.
      smoothing: weight of each option of a categorical, in points, shared by all kernels of a set, positive.
      multivariate: whether kernels are over all dims; if not, every dim is modelled and chosen by itself.

    Returns:
      A `Method` whose settings are gamma, scale, exponent, bad_exponent, min_bandwidth, prior_weight and smoothing.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = {"lr": hpo.Float(1e-5, 1.0, log=True), "act": hpo.Categorical(("relu", "gelu"))}
      >>> objective = lambda key, h: (jax.numpy.log10(h["lr"]) + 3) ** 2 + (h["act"] == 0)
      >>> result = hpo.minimize(objective, hpo.tpe(space), key=jax.random.key(0), trials=60, progress=False)
      >>> result.best_loss < 0.01, result.best_hparams["act"]
      (True, 'gelu')

    Reference:
      Bergstra, Bardenet, Bengio and Kégl (2011), Algorithms for hyper-parameter optimization. Watanabe (2023),
      Tree-structured Parzen estimator: understanding its algorithm components and their roles for better empirical
      performance.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    startup, candidates = whole("startup", startup, 0), whole("candidates", candidates, 1)
    one_of("split", split, SPLITS)
    one_of("weighting", weighting, WEIGHTINGS)
    one_of("bandwidth", bandwidth, BANDWIDTHS)
    values = (
        real("gamma", gamma, 1e-3, 10, "0.1 is usual"),
        real("scale", scale, 1e-3, 10, "0.8 is usual"),
        real("exponent", exponent, 0, 10, "1.25 is usual"),
        real("bad_exponent", bad_exponent, 0, 10, "0.9 is usual"),
        real("min_bandwidth", min_bandwidth, 1e-4, 1, "0.01 is usual"),
        real("prior_weight", prior_weight, 1e-6, 1e6, "1 is usual"),
        real("smoothing", smoothing, 1e-6, 1e6, "0.5 is usual"),
    )
    settings = Settings(*(jnp.asarray(value, working_dtype()) for value in values))
    rules = Rules(split, weighting, bandwidth, bool(multivariate), bool(magic_clip))
    init, ask, tell = _functions(space, rules, startup, candidates, batch)
    return Method("tpe", space, settings, Initializer(init, settings), ask, tell, batch, reserve=reserve)
