"""What CMA-ES does where a coordinate has levels: a margin for integers, a distribution of its own for categoricals.

Integers: Hamano, Saito, Nomura and Shirakawa (2022), CMA-ES with Margin: Lower-Bounding Marginal Probability for
Mixed-Integer Black-Box Optimization. Categoricals: Hamano, Saito, Nomura, Uchida and Shirakawa (2024), CatCMA:
Stochastic Optimization for Mixed-Category Problems, with the step size of Akimoto, Shirakawa, Yoshinari, Uchida, Saito
and Nishida (2019), Adaptive Stochastic Natural Gradient Method for One-Shot Neural Architecture Search.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from jaxhpo.space import Space, working_dtype

MOST_LEVELS = 2**16


class Integers(NamedTuple):
    """Which of the dims that have an order are integers, and where their levels meet."""

    columns: np.ndarray
    """i32[integers], their places among the dims of the covariance"""
    among: np.ndarray
    """i32[integers], their places among all dims with levels"""
    top: np.ndarray
    """i32[integers], last level"""


def integers_of(space: Space) -> Integers:
    """The dims whose levels have an order; with more than 65,536 levels a dim is as good as real."""
    is_integer = ~space.categorical & (space.levels >= 2) & (space.levels <= MOST_LEVELS)
    ordered, levelled = np.flatnonzero(~space.categorical), np.flatnonzero(space.levels)
    dims = np.flatnonzero(is_integer)
    parts = np.searchsorted(ordered, dims), np.searchsorted(levelled, dims), space.levels[dims] - 1
    # Indices of 32 bits are the same with and without float64.
    return Integers(*(x.astype(np.int32) for x in parts))


def limits(space: Space, integers: Integers, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the level of each integer's mean ends; on the first and the last level both are its only inner end.

    Args:
      space: whose dims they are.
      integers: which of them.
      mean: float[integers] in [0, 1].

    Returns:
      Lower and upper limit, float[integers] each.
    """
    levelled = np.flatnonzero(space.levels).astype(np.int32)
    point = jnp.full(space.dims, 0.5, working_dtype()).at[levelled[integers.among]].set(mean)
    level = space.level(point)[integers.among]
    numbers = jnp.zeros(len(levelled), working_dtype())
    # Half a level below its middle a level begins.
    start = lambda at: space.middle(numbers.at[integers.among].set(at - 0.5))[integers.among]  # noqa: E731
    return start(jnp.maximum(level, 1)), start(jnp.minimum(level + 1, integers.top))


def with_margin(
    mean: jax.Array, deviation: jax.Array, scale: jax.Array, low: jax.Array, high: jax.Array, alpha: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The mean and the scale of integers after the margin correction, Section 4 of Hamano et al. (2022).

    Args:
      mean: float[integers].
      deviation: float[integers], standard deviation without `scale`: sigma times the root of the diagonal of C.
      scale: float[integers], the diagonal of A.
      low: float[integers], lower limit of the mean's level.
      high: float[integers], upper limit; equal to `low` on the first and the last level.
      alpha: float[], least probability of another level.

    Returns:
      Mean and scale, float[integers] each.
    """
    spread = deviation * scale
    below, above = ndtr((low - mean) / spread), ndtr((mean - high) / spread)
    # Equations 9 and 10: on an outer level, the mean moves towards its only limit.
    far = jnp.minimum(below, above) < alpha
    outer = jnp.where(far, high + jnp.sign(mean - high) * spread * -ndtri(alpha), mean)
    # Equations 11 to 19: elsewhere both sides get half of alpha, taken from all that is above that.
    within = 1 - below - above
    more_below, more_above = jnp.maximum(below, alpha / 2), jnp.maximum(above, alpha / 2)
    surplus = 1 - more_below - more_above - within
    share = surplus / (more_below + within + more_above - 1.5 * alpha)
    quantile = lambda p: -ndtri(jnp.clip(p, 1e-10, 0.5 - 1e-7))  # noqa: E731
    to_low = quantile(more_below + share * (more_below - alpha / 2))
    to_high = quantile(more_above + share * (more_above - alpha / 2))
    is_outer = low == high
    # Where no side lacks anything the correction is the identity, up to rounding.
    lacking = ~is_outer & (jnp.minimum(below, above) < alpha / 2)
    inner_mean = (low * to_high + high * to_low) / (to_low + to_high)
    inner_scale = (high - low) / ((to_low + to_high) * deviation)
    return jnp.where(is_outer, outer, jnp.where(lacking, inner_mean, mean)), jnp.where(lacking, inner_scale, scale)


class Categories(NamedTuple):
    """Independent categorical distributions, and how fast they learn."""

    q: jax.Array
    """float[categoricals, most levels], probabilities, 0 beyond a dim's own levels"""
    path: jax.Array
    """float[categoricals, most levels], accumulated natural gradient"""
    norm: jax.Array
    """float[], expected squared length of `path` where the gradient is noise"""
    slowness: jax.Array
    """float[], inverse of the trust region's radius"""


def uniform_categories(number: np.ndarray) -> Categories:
    """Equal shares of `number` levels, i64[categoricals]."""
    dtype = working_dtype()
    is_level = np.arange(max(number, default=1)) < number[:, None]
    q = jnp.asarray(is_level / number[:, None], dtype)
    return Categories(q, jnp.zeros_like(q), jnp.zeros((), dtype), jnp.ones((), dtype))


def least_probability(number: np.ndarray) -> np.ndarray:
    """The margin of every categorical, Section 4.3 of Hamano et al. (2024): float[categoricals, 1]."""
    return ((1 - 0.73 ** (1 / max(len(number), 1))) / np.maximum(number - 1, 1))[:, None]


def learned_categories(categories: Categories, gradient: jax.Array, number: np.ndarray) -> Categories:
    """A step of the natural gradient in a trust region, then the margin: Algorithm 1 of Hamano et al. (2024).

    Args:
      categories: the distributions.
      gradient: float[categoricals, most levels], the weighted mean of the one-hot levels less `q`.
      number: i64[categoricals], how many levels.
    """
    q, path, norm, slowness = categories
    column = np.arange(q.shape[1])
    is_level, is_last = column < number[:, None], column == number[:, None] - 1
    free = is_level & ~is_last
    # The root of the Fisher matrix, whose coordinates are all levels but the last: Akimoto et al. (2019), Appendix B.
    root = jnp.sqrt(jnp.where(is_level, q, 1))
    last = (q * is_last).sum(1, keepdims=True)
    rest = (gradient * free).sum(1, keepdims=True)
    whitened = jnp.where(free, gradient / root + root * rest / (last + jnp.sqrt(last)), 0)
    length = jnp.sqrt((whitened**2).sum()) + 1e-30
    radius = 1 / slowness
    # A step of 1 is the distribution of the weighted rows themselves; a longer one would extrapolate.
    q = q + jnp.minimum(radius / length, 1) * gradient
    freedom = np.sqrt(max((number - 1).sum(), 1))
    beta = radius / freedom
    path = (1 - beta) * path + jnp.sqrt(beta * (2 - beta)) * whitened / length
    norm = (1 - beta) ** 2 * norm + beta * (2 - beta)
    slowness = jnp.maximum(slowness * jnp.exp(beta * (norm - (path**2).sum() / 1.5)), 1 / freedom)
    least = jnp.asarray(least_probability(number), q.dtype)
    q = jnp.where(is_level, jnp.maximum(q, least), 0)
    total = q.sum(1, keepdims=True)
    spare = jnp.where(is_level, q - least, 0)
    q = q - (total - 1) * spare / jnp.maximum(spare.sum(1, keepdims=True), 1e-12)
    q = jnp.where(is_level, q, 0)
    return Categories(q / q.sum(1, keepdims=True), path, norm, slowness)
