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
from jax import lax

from jaxhpo import history as records
from jaxhpo.checks import one_of, real, whole
from jaxhpo.draws import bits, uniform
from jaxhpo.history import History
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count
from jaxhpo.sequential.surrogate.parzen import (
    Mixture,
    Sums,
    both,
    features,
    joint_sums,
    log_densities,
    log_density,
    log_density_of,
    no_sums,
    sample,
    single_sums,
)
from jaxhpo.sequential.surrogate.split import (
    BANDWIDTHS,
    HALF_A_LEVEL,
    SPLITS,
    WEIGHTINGS,
    Bad,
    Rules,
    Settings,
    bad_mixture,
    bad_of,
    bad_spread,
    best_of,
    good_mixture,
)
from jaxhpo.space import Space, working_dtype
from jaxhpo.untried import among, everything, fingerprints
from jaxhpo.variation import another_level, latin_hypercube, one_dim, snapped

BLOCK = 256
ENUMERATED = 256
UNTRIED = 16
REPEATED = 1e6
FIRST = 1e3


class State(NamedTuple):
    """State of the tree-structured Parzen estimator."""

    history: History
    design: jax.Array
    """float[startup, dims]: the first trials, up to whole asks"""
    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""


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


def in_blocks(function: Callable, bad: Bad, rows: jax.Array, start: PyTree) -> PyTree:
    """`function(result, rows of a block) -> result` over all blocks that hold something, the first from `start`.

    So what an ask costs follows the number of trials, and what it takes to compile does not.
    """
    size = bad.mask.shape[0]
    block = min(size, BLOCK)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, -size % block), *((0, 0) for _ in x.shape[1:]))), bad)

    def one(i: jax.Array, result: PyTree) -> PyTree:
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * block, block), padded)
        return function(result, part)

    # The number of rows is a count: under `vmap` no lane waits for another.
    return lax.fori_loop(0, (rows + block - 1) // block, one, start)


def repeats(space: Space, unit: jax.Array, bad: Bad, rows: jax.Array) -> jax.Array:
    """Which of the points float[n, dims] were tried or are being tried: bool[n]."""
    if not space.levels.all():
        return jnp.zeros(unit.shape[0], bool)
    prints = fingerprints(space, unit)
    one = lambda found, part: found | among(prints, fingerprints(space, part.unit), part.mask)  # noqa: E731
    return in_blocks(one, bad, rows, jnp.zeros(unit.shape[0], bool))


def in_pool(
    space: Space, rules: Rules, settings: Settings, unit: jax.Array, good: Mixture, bad: Bad, rows: jax.Array
) -> tuple[Pool, jax.Array, jax.Array]:
    """Points with their densities, and the bandwidth and the sum of weights with which `choose` goes on.

    Args:
      space: whose points they are.
      rules: static.
      settings: traced.
      unit: float[points, dims], levels in their middles.
      good: estimator of good points.
      bad: all that was tried.
      rows: i32[], how many rows of it hold something.
    """
    sums_of = joint_sums if rules.multivariate else single_sums
    live = space.active(unit)
    point = features(space, unit, live if rules.multivariate else jnp.ones_like(live))
    spread = bad_spread(space, rules, bad)

    def add(carry: tuple[Sums, jax.Array], part: Bad) -> tuple[Sums, jax.Array]:
        mixture = bad_mixture(space, rules, settings, part, *spread)
        least = jnp.where(part.mask[:, None], mixture.bandwidth, 1).min(0, keepdims=True)
        return both(carry[0], sums_of(space, point, mixture)), jnp.minimum(carry[1], least)

    k = 1 if rules.multivariate else space.dims
    start = no_sums(unit.shape[0], k, unit.dtype), jnp.ones((1, space.dims), unit.dtype)
    sums, width = in_blocks(add, bad, rows, start)
    found = [log_density_of(sums_of(space, point, good), good.prior), log_density_of(sums, settings.prior_weight)]
    if not rules.multivariate:
        # Every dim chooses by itself: the best values of all dims are a point, the second best are one, ...
        order = jnp.argsort(found[1] - found[0], axis=0)
        best = [jnp.take_along_axis(x, order, 0) for x in (unit, *found)]
        # Where points can be repeated, those that were sampled stay too: the best values may all have been together.
        pairs = [jnp.concatenate(x) for x in zip(best, (unit, *found), strict=True)] if space.levels.all() else best
        unit, found = pairs[0], pairs[1:]
        live = space.active(unit)
    total = (sums.weight[0] if rules.multivariate else sums.weight) + settings.prior_weight
    counts = jnp.ones((1, 1), bool) if rules.multivariate else live
    return Pool(unit, found[0], found[1], counts, repeats(space, unit, bad, rows)), width, total


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
    prints = fingerprints(space, pool.unit) if space.levels.all() else None
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
    best = best_of(space, rules, settings, told)
    good, unit = good_mixture(space, rules, settings, best), everything(space, ENUMERATED)
    if unit is None:
        size = candidates * batch
        key_unit, key_which, key_move = jax.random.split(key, 3)
        which = uniform(bits(key_which, (size, 1 if rules.multivariate else space.dims)))
        unit = sample(space, good, uniform(bits(key_unit, (size, space.dims))), which)
        if space.levels.all():
            unit = jnp.concatenate([unit, *elsewhere(space, key_move, unit, UNTRIED + batch)])
    bad = bad_of(told, best, waiting, is_waiting, rules.weighting)
    pool, width, total = in_pool(space, rules, settings, unit, good, bad, waiting.shape[0] + records.held(told))
    return choose(space, rules, pool, width, total, batch)


def elsewhere(space: Space, key: jax.Array, unit: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Points one level away from each of some, and n uniform ones, where those themselves may all have been tried."""
    u = uniform(bits(key, (unit.shape[0] + n, space.dims + 1)))
    chance, anywhere = u[: unit.shape[0]], u[unit.shape[0] :, :-1]
    moves = one_dim(space, space.active(unit) if space.nesting else None, chance[:, -1])
    return jnp.where(moves, another_level(space, unit, chance[:, :-1]), unit), snapped(space, anywhere)


def begin(
    space: Space, told: History, waiting: jax.Array, is_waiting: jax.Array, key: jax.Array, design: jax.Array
) -> jax.Array:
    """The points of the design that are not tried yet, and others instead of those that are: float[batch, dims]."""
    batch, every = design.shape[0], everything(space, ENUMERATED)
    key_unit, key_order = jax.random.split(key)
    others = every if every is not None else space.sample(key_unit, UNTRIED + batch)
    unit = snapped(space, jnp.concatenate([design, others]))
    first = FIRST * jnp.concatenate([batch - jnp.arange(batch), uniform(bits(key_order, (others.shape[0],)))])
    tried = Bad(*(jnp.concatenate(x) for x in ((waiting, told.unit), (is_waiting, told.mask), (is_waiting, told.mask))))
    repeated = repeats(space, unit, tried, waiting.shape[0] + records.held(told))
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
            history=records.empty(space.dims),
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
            return begin(space, state.history, waiting, is_waiting, key, design)

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
    return state._replace(history=records.reserve(state.history, capacity))


def tpe(
    space: PyTree,
    *,
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
    batch: int = 1,
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
      batch: trials per ask, of any size. One learns the most from each trial, more fill a device.

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
