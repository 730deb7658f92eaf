"""Which trials are good, and the Parzen estimators of the good and of the bad ones.

Watanabe (2023), Tree-structured Parzen estimator: understanding its algorithm components and their roles for better
empirical performance: how trials are split (section 3.1), weighted (3.2), and how wide their kernels are (3.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.history import History, on_bucket
from jaxhpo.sequential.surrogate.parzen import Mixture, cells, neighbours, spread
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import snapped

SPLITS = ("linear", "sqrt")
WEIGHTINGS = ("rank", "improvement", "uniform", "decay")
BANDWIDTHS = ("neighbour", "scott", "dimensions")
MOST_GOOD = 25
RECENT = 25
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


class Rules(NamedTuple):
    """What chooses code."""

    split: str
    weighting: str
    bandwidth: str
    multivariate: bool
    magic_clip: bool


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


def best_of(space: Space, rules: Rules, settings: Settings, told: History) -> Best:
    """The best trials of a record."""
    number = number_of_good(rules.split, settings.gamma, told.succeeded.sum())
    best, row = on_bucket(lambda h: lax.top_k(-h.losses, MOST_GOOD + 1), told)
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


class Bad(NamedTuple):
    """All that was tried, what is pending first; rows of it, or more."""

    unit: jax.Array
    """float[n, dims]"""
    mask: jax.Array
    """bool[n]: which rows there are"""
    weight: jax.Array
    """float[n]: 0 where a trial is good"""


def bad_of(told: History, best: Best, waiting: jax.Array, is_waiting: jax.Array, weighting: str) -> Bad:
    """What was tried, and how bad it is.

    Args:
      told: the record; failed trials are bad.
      best: its best trials.
      waiting: float[m, dims], points that are asked for and not told.
      is_waiting: bool[m], which rows of it there are.
      weighting: as in `Rules`.
    """
    is_bad = told.mask.at[best.row].set(told.mask[best.row] & ~best.is_good)
    by_age = jnp.concatenate([is_bad, is_waiting])
    weight = decay(by_age) if weighting == "decay" else by_age.astype(told.unit.dtype)
    mask = jnp.concatenate([is_waiting, told.mask])
    return Bad(jnp.concatenate([waiting, told.unit]), mask, jnp.roll(weight, is_waiting.shape[0]))


def bad_spread(space: Space, rules: Rules, bad: Bad) -> tuple[jax.Array, jax.Array]:
    """What the bandwidths depend on besides a point itself: float[1, dims], as wished, and the number of bad points."""
    is_bad = bad.weight > 0
    if rules.bandwidth == "neighbour":
        return jnp.zeros((1, space.dims), bad.unit.dtype), is_bad.sum()
    unit = snapped(space, bad.unit)
    return spread(rules.bandwidth, unit, space.active(unit) & is_bad[:, None], bad.weight), is_bad.sum()


def bad_mixture(
    space: Space, rules: Rules, settings: Settings, bad: Bad, wished: jax.Array, number: jax.Array
) -> Mixture:
    """The estimator of bad points, or those kernels of it that some rows have; the others as in `bad_spread`."""
    unit = snapped(space, bad.unit)
    width = widths(space, rules, settings, unit, wished, number, settings.bad_exponent)
    return Mixture(unit, space.active(unit), width, bad.weight, settings.prior_weight)
