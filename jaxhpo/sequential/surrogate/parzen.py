"""Parzen estimators over a search space: mixtures of product kernels around told points, and a uniform component.

Bergstra, Bardenet, Bengio and Kégl (2011), Algorithms for hyper-parameter optimization, section 4. Watanabe (2023),
Tree-structured Parzen estimator: understanding its algorithm components and their roles for better empirical
performance: the joint kernel over all dims (section 3.3) and the rules for bandwidths (section 3.4).

The kernel of an ordered dim is a Gaussian cut at the bounds, that of a dim with levels its mass in each level (of a dim
with more than 16 levels its density at the middle of a level); that of a dim without order is uniform with some chance
and the point's own option otherwise (Aitchison and Aitken, 1976). All densities are relative to the uniform
distribution on the space. A dim is live where the branches it depends on are chosen: a kernel says nothing about dims
that are not live at its own point, so there it is uniform, and nothing is asked of dims that are not live at the other.

The logarithms of all kernels at all points are two matrix products: of a quadratic in each coordinate with its
coefficients, and of the one-hot levels with the logarithms of the masses.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr, ndtri

from jaxhpo.space import Space
from jaxhpo.variation import snapped

FEW = 16
TINY = 1e-30
ROOT_2 = 2**0.5
LOG_ROOT = 0.5 * float(np.log(2 * np.pi))


class Mixture(NamedTuple):
    """Kernels around points, and a uniform component."""

    unit: jax.Array
    """float[n, dims]: the points, levels in their middles"""
    live: jax.Array
    """bool[n, dims]: what a point knows of"""
    bandwidth: jax.Array
    """float[n or 1, dims]: standard deviation of an ordered dim, chance of any option in one without order"""
    weight: jax.Array
    """float[n]: 0 is no kernel"""
    prior: jax.Array
    """float[]: weight of the uniform component"""


class Layout(NamedTuple):
    """Which dims have which kernel; NumPy arrays, an entry is a level of a dim that has a table."""

    smooth: np.ndarray  # i32[smooth dims]: the others
    dim: np.ndarray  # i32[entries]: whose level it is
    level: np.ndarray  # i32[entries]


@functools.lru_cache(maxsize=256)
def layout(space: Space) -> Layout:
    """The layout of a space."""
    has_table = (space.levels > 0) & (space.categorical | (space.levels <= FEW))
    dims = np.flatnonzero(has_table)
    level = np.concatenate([np.arange(space.levels[d], dtype=np.int32) for d in dims] or [np.zeros(0, np.int32)])
    as_index = functools.partial(np.asarray, dtype=np.int32)
    return Layout(as_index(np.flatnonzero(~has_table)), as_index(np.repeat(dims, space.levels[dims])), level)


def columns(x: jax.Array, index: np.ndarray) -> jax.Array:
    """x[:, index], as a slice where that does: XLA gathers one by one."""
    whole = index.size == x.shape[1] and np.array_equal(index, np.arange(x.shape[1]))
    return x if whole else x[:, index]


def cells(space: Space, unit: jax.Array) -> jax.Array:
    """Width of the level that a point is in, 0 in real dims: float[n, dims], or [1, dims] where all are real."""
    has_levels = np.flatnonzero(space.levels)
    if not has_levels.size:
        return jnp.zeros((1, space.dims), unit.dtype)
    level = space.level(unit)
    width = space.middle(level + 0.5) - space.middle(level - 0.5)
    return jnp.zeros_like(unit).at[..., has_levels].set(width)


def log_mass(low: jax.Array, high: jax.Array) -> jax.Array:
    """Logarithm of the mass of the standard normal distribution between two numbers, precise in both tails."""
    flip = low > 0
    below, above = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    return jnp.log(jnp.maximum(ndtr(above) - ndtr(below), TINY))


class Features(NamedTuple):
    """What the logarithm of a kernel is linear in, and its coefficients."""

    squares: jax.Array
    """float[points, smooth dims]: the coordinate's square where it is live, else 0"""
    values: jax.Array
    """float[points, smooth dims]: itself"""
    ones: jax.Array
    """float[points, smooth dims]: 1"""
    levels: jax.Array
    """float[points, entries]: 1 at the levels of a point where they are live"""


def features(space: Space, unit: jax.Array, live: jax.Array) -> Features:
    """The features of points: of float[points, dims], live in bool[points, dims]."""
    at = layout(space)
    z, ones = columns(unit, at.smooth) - 0.5, columns(live, at.smooth).astype(unit.dtype)
    levels = jnp.zeros((unit.shape[0], 0), unit.dtype)
    if at.dim.size:
        levels = ((_entries(space, unit) == at.level) & columns(live, at.dim)).astype(unit.dtype)
    return Features(z * z * ones, z * ones, ones, levels)


def coefficients(space: Space, mixture: Mixture) -> Features:
    """The coefficients of the features for every kernel of a mixture; of levels: logarithms of relative masses.

    Where all kernels of a dim have the same ones, they may be given once: [1, ...].
    """
    at, dtype = layout(space), mixture.unit.dtype
    unit, live = mixture.unit, mixture.live
    mean, width = columns(unit, at.smooth), columns(mixture.bandwidth, at.smooth)
    inverse = 1 / width
    # With erf, several times cheaper than ndtr: the point is inside of the bounds, so there is no tail.
    share, z = inverse / ROOT_2, mean - 0.5
    total = 0.5 * (lax.erf((1 - mean) * share) + lax.erf(mean * share))
    squares, values = -0.5 * inverse**2, z * inverse**2
    ones = jnp.log(inverse) - LOG_ROOT - 0.5 * z * values - jnp.log(total)
    if space.nesting:
        squares, values, ones = (jnp.where(columns(live, at.smooth), x, 0) for x in (squares, values, ones))
    if not at.dim.size:
        return Features(squares, values, ones, jnp.zeros((unit.shape[0], 0), dtype))
    bandwidth = jnp.broadcast_to(mixture.bandwidth, unit.shape)
    number = jnp.asarray(space.levels[at.dim], dtype)
    mean, width = columns(unit, at.dim), columns(bandwidth, at.dim)
    own = _entries(space, unit) == at.level
    option = jnp.log(jnp.maximum(width + jnp.where(own, (1 - width) * number, 0), TINY))
    low, high = _edges(space)
    total = log_mass(-mean / width, (1 - mean) / width)
    ordered = log_mass((low - mean) / width, (high - mean) / width) - total - jnp.log(high - low)
    table = jnp.where(jnp.asarray(space.categorical[at.dim]), option, ordered)
    return Features(squares, values, ones, table * columns(live, at.dim))


def _entries(space: Space, unit: jax.Array) -> jax.Array:
    """The level of the dim of every entry of the table: i32[points, entries]."""
    at, has_levels = layout(space), np.flatnonzero(space.levels)
    return space.level(unit)[:, np.searchsorted(has_levels, at.dim)]


def _edges(space: Space) -> tuple[jax.Array, jax.Array]:
    """The bounds of the level of every entry in the unit cube: float[entries] each."""
    at, has_levels = layout(space), np.flatnonzero(space.levels)
    place = np.arange(at.level.max() + 2)[:, None] - np.full(has_levels.size, 0.5)
    bounds = space.middle(jnp.asarray(place, np.float32))
    column = np.searchsorted(has_levels, at.dim)
    return jnp.maximum(bounds[at.level, column], 0), jnp.minimum(bounds[at.level + 1, column], 1)


def log_kernels(space: Space, a: Features, b: Features) -> jax.Array:
    """The logarithm of every kernel at every point: float[points, kernels] of features and coefficients."""
    product = lambda x, y: jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)  # noqa: E731
    constant = product(a.ones, b.ones) if space.nesting else b.ones.sum(1)
    found = product(a.squares, b.squares) + product(a.values, b.values) + constant
    return found + product(a.levels, b.levels) if a.levels.shape[1] else found


class Sums(NamedTuple):
    """Weighted sums of kernels at points; k is 1 for kernels over all dims, else dims, each by itself."""

    top: jax.Array
    """float[points, k]: logarithm of the largest summand"""
    total: jax.Array
    """float[points, k]: the sum, divided by that"""
    weight: jax.Array
    """float[k]: of all kernels"""


def _summed(kernels: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest summand and the sum over the kernels, given by their logarithms, float[points, n]."""
    least = jnp.log(jnp.asarray(TINY, kernels.dtype))
    # A weight is added to its logarithm, and the sum is a product, because that is what XLA vectorises.
    weighted = kernels + jnp.where(weight > 0, jnp.log(jnp.maximum(weight, TINY)), -jnp.inf)
    top = jnp.maximum(weighted.max(1), least)
    return top, jnp.exp(weighted - top[:, None]) @ jnp.ones(weight.shape, kernels.dtype)


def no_sums(points: int, k: int, dtype: jnp.dtype) -> Sums:
    """Those over no kernels."""
    least = jnp.log(jnp.asarray(TINY, dtype))
    return Sums(jnp.full((points, k), least), jnp.zeros((points, k), dtype), jnp.zeros(k, dtype))


def both(a: Sums, b: Sums) -> Sums:
    """The sums over the kernels of both."""
    top = jnp.maximum(a.top, b.top)
    return Sums(top, a.total * jnp.exp(a.top - top) + b.total * jnp.exp(b.top - top), a.weight + b.weight)


def log_density_of(sums: Sums, prior: jax.Array) -> jax.Array:
    """The logarithm of the mixture that has these sums and a uniform component of weight `prior`: float[points, k]."""
    top = jnp.maximum(sums.top, jnp.log(prior))
    return top + jnp.log(sums.total * jnp.exp(sums.top - top) + prior * jnp.exp(-top)) - jnp.log(sums.weight + prior)


def joint_sums(space: Space, points: Features, mixture: Mixture) -> Sums:
    """Those of kernels over all dims."""
    top, total = _summed(log_kernels(space, points, coefficients(space, mixture)), mixture.weight)
    return Sums(top[:, None], total[:, None], mixture.weight.sum()[None])


def single_sums(space: Space, points: Features, mixture: Mixture) -> Sums:
    """Those of every dim by itself, over the kernels that know of it."""
    at, by_kernel = layout(space), coefficients(space, mixture)
    weight = (mixture.weight[:, None] * mixture.live).T

    def one(arguments: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        point, kernel, weight = arguments
        return _summed(jnp.matmul(point, kernel.T, precision=lax.Precision.HIGHEST), weight)

    has_table = np.unique(at.dim)
    # One dim after the other: all at once would be as much memory as dims times points times kernels.
    first = lambda x: jnp.moveaxis(x, 1, 0)  # noqa: E731

    def quadratic(x: Features) -> jax.Array:
        return first(jnp.stack(jnp.broadcast_arrays(x.squares, x.values, x.ones), -1))

    found = [lax.map(one, (quadratic(points), quadratic(by_kernel), weight[at.smooth]))]
    if has_table.size:
        entry = [np.flatnonzero(at.dim == d) for d in has_table]
        column = np.full((has_table.size, max(map(len, entry))), at.dim.size)
        for row, entries in zip(column, entry, strict=True):
            row[: entries.size] = entries
        padded = lambda x: first(jnp.pad(x, ((0, 0), (0, 1)))[:, column])  # noqa: E731
        found.append(lax.map(one, (padded(points.levels), padded(by_kernel.levels), weight[has_table])))
    order = np.argsort(np.concatenate([at.smooth, has_table]))
    top, total = (jnp.concatenate(parts)[order].T for parts in zip(*found, strict=True))
    return Sums(top, total, weight.sum(1))


def log_density(space: Space, points: Features, mixture: Mixture) -> jax.Array:
    """The logarithm of a mixture of kernels over all dims: float[points, 1]."""
    return log_density_of(joint_sums(space, points, mixture), mixture.prior)


def log_densities(space: Space, points: Features, mixture: Mixture) -> jax.Array:
    """The logarithms of the mixtures of every dim by itself, of the kernels that know of it: float[points, dims]."""
    return log_density_of(single_sums(space, points, mixture), mixture.prior)


def sample(space: Space, mixture: Mixture, u: jax.Array, which: jax.Array) -> jax.Array:
    """Points of a mixture from uniform numbers.

    Args:
      space: whose points they are.
      mixture: what to draw from.
      u: float[points, dims] in (0, 1).
      which: float[points, 1] in (0, 1), for the kernel of all dims; or [points, dims], where every dim has its own, of
        those that know of it.

    Returns:
      float[points, dims], levels in their middles; anything in dims that are not live.
    """
    weight = mixture.weight[:, None]
    reach = jnp.cumsum(weight if which.shape[1] == 1 else weight * mixture.live, axis=0)
    # A kernel of weight 0 is never reached, and beyond the last one is the uniform component.
    index = (reach <= (which * (reach[-1] + mixture.prior))[:, None]).sum(1, dtype=jnp.int32)
    is_prior, index = index >= reach.shape[0], jnp.minimum(index, reach.shape[0] - 1)
    index = jnp.broadcast_to(index, u.shape)
    own = functools.partial(jnp.take_along_axis, indices=index, axis=0)
    bandwidth = own(jnp.broadcast_to(mixture.bandwidth, mixture.unit.shape))
    mean, known = own(mixture.unit), own(mixture.live) & ~is_prior
    low, high = ndtr(-mean / bandwidth), ndtr((1 - mean) / bandwidth)
    inside = jnp.clip(low + u * (high - low), TINY, 1 - jnp.finfo(u.dtype).epsneg)
    cut = jnp.clip(mean + bandwidth * ndtri(inside), 0, 1)
    option = jnp.where(u < bandwidth, u / bandwidth, mean)
    return snapped(space, jnp.where(known, jnp.where(space.categorical, option, cut), u))


def neighbours(unit: jax.Array, counts: jax.Array) -> jax.Array:
    """The larger of a point's distances to its neighbours in every dim, the inner one at the ends.

    As in hyperopt and optuna: of a single point to the bounds. All pairs, so for few points.

    Args:
      unit: float[n, dims].
      counts: bool[n, dims], which coordinates there are.

    Returns:
      float[n, dims], anything where there is no coordinate.
    """
    row = jnp.arange(unit.shape[0])
    difference = unit[None] - unit[:, None]
    both = counts[None] & counts[:, None] & (row[None, :] != row[:, None])[..., None]
    after = (difference > 0) | ((difference == 0) & (row[None, :] > row[:, None])[..., None])
    above = jnp.where(both & after, difference, jnp.inf).min(1)
    below = jnp.where(both & ~after, -difference, jnp.inf).min(1)
    larger = jnp.maximum(jnp.where(jnp.isinf(above), below, above), jnp.where(jnp.isinf(below), above, below))
    return jnp.where(jnp.isinf(larger), jnp.maximum(unit, 1 - unit), larger)


def spread(rule: str, unit: jax.Array, counts: jax.Array, weight: jax.Array) -> jax.Array:
    """A bandwidth for each dim from how many points there are: float[1, dims].

    Args:
      rule: "scott", by their standard deviation (Scott, 1992), or "dimensions", a fifth of the range, both times
        n^(-1 / (dims + 4)).
      unit: float[n, dims].
      counts: bool[n, dims], which coordinates there are.
      weight: float[n].
    """
    share = counts * weight[:, None]
    n = jnp.maximum(counts.sum(0), 1).astype(unit.dtype)
    total = jnp.maximum(share.sum(0), TINY)
    mean = (share * unit).sum(0) / total
    deviation = jnp.sqrt((share * (unit - mean) ** 2).sum(0) / total)
    return ((1.059 * deviation if rule == "scott" else 0.2) * n ** (-1 / (unit.shape[1] + 4)))[None]
