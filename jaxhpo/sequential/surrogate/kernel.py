"""Covariances of functions of a search space: Matérn 5/2 with a lengthscale for each dim, and a quadratic trend.

Categorical dims count by whether they differ (a Hamming distance inside the Matérn), dims that are not live have one
place of their own, and integers are where their level is.

Reference: Rasmussen and Williams (2006), Gaussian processes for machine learning, eq. 4.17 and section 4.2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo.space import Space
from jaxhpo.untried import canonical

NOT_LIVE = 0.5


class Covariance(NamedTuple):
    """What a covariance depends on; the variance of the Matérn part is 1."""

    log_lengthscale: jax.Array
    """float[dims], of the unit cube; of a categorical dim, of 1 where two points differ"""
    log_trend: jax.Array
    """float[]: variance of the quadratic trend at the corners of the unit cube"""


def features(space: Space, unit: jax.Array) -> jax.Array:
    """Where a model sees points: levels in their middle, dims that are not live all in one place.

    Args:
      space: whose points they are.
      unit: float[..., dims] in [0, 1].

    Returns:
      float[..., dims]; derivatives pass as if nothing had been moved.
    """
    seen = canonical(space, unit, NOT_LIVE)
    return unit + jax.lax.stop_gradient(seen - unit)


@jax.custom_jvp
def matern(q: jax.Array) -> jax.Array:
    """Matérn 5/2 of a squared distance, with derivatives at 0."""
    u = jnp.sqrt(5 * q)
    return (1 + u + u * u / 3) * jnp.exp(-u)


@jax.custom_jvp
def matern_slope(q: jax.Array) -> jax.Array:
    """Derivative of `matern`."""
    u = jnp.sqrt(5 * q)
    return -5 / 6 * (1 + u) * jnp.exp(-u)


def matern_curvature(q: jax.Array) -> jax.Array:
    """Second derivative of `matern`."""
    return 25 / 12 * jnp.exp(-jnp.sqrt(5 * jnp.maximum(q, 1e-12)))


matern.defjvps(lambda tangent, out, q: tangent * matern_slope(q))
matern_slope.defjvps(lambda tangent, out, q: tangent * matern_curvature(q))


class Geometry(NamedTuple):
    """All that a covariance needs to know of two sets of points."""

    squares: jax.Array
    """float[dims, n, m]: squared distances dim by dim, 0 or 1 in categorical ones"""
    trend: jax.Array
    """float[n, m]: the square of an inner product, whose functions are all quadratic ones; 1 at a corner with itself"""


def around(space: Space, a: jax.Array) -> jax.Array:
    """Coordinates from -1 to 1, 0 in categorical dims."""
    return (2 * a - 1) * jnp.asarray(~space.categorical, a.dtype)


def corner(space: Space) -> int:
    """The square of the inner product of a corner with itself, by which the trend is scaled."""
    return (1 + int((~space.categorical).sum())) ** 2


def apart(space: Space, a: jax.Array, b: jax.Array) -> jax.Array:
    """Differences dim by dim, 0 or 1 in categorical ones: float[dims, n, m] for float[n, dims] and float[m, dims]."""
    difference = a.T[:, :, None] - b.T[:, None, :]
    if not space.categorical.any():
        return difference
    return jnp.where(jnp.asarray(space.categorical)[:, None, None], (difference != 0).astype(a.dtype), difference)


def geometry(space: Space, a: jax.Array, b: jax.Array) -> Geometry:
    """Of the points float[n, dims] and float[m, dims], which are `features`."""
    inner = jnp.matmul(around(space, a), around(space, b).T, precision="highest")
    return Geometry(apart(space, a, b) ** 2, (1 + inner) ** 2 / corner(space))


def covariance(parameters: Covariance, between: Geometry) -> jax.Array:
    """Covariances of the values at two sets of points: float[n, m]."""
    weight = jnp.exp(-2 * parameters.log_lengthscale)
    q = jnp.einsum("d,dnm->nm", weight, between.squares, precision="highest")
    return matern(q) + jnp.exp(parameters.log_trend) * between.trend


def variance(space: Space, parameters: Covariance, a: jax.Array) -> jax.Array:
    """Variances of the values at the points float[n, dims]: float[n]."""
    square = (around(space, a) ** 2).sum(-1)
    return 1 + jnp.exp(parameters.log_trend) * (1 + square) ** 2 / corner(space)
