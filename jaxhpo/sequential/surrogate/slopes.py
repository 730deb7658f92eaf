"""Gaussian processes that observe derivatives: covariances of values and slopes, and what of a history has slopes.

The derivative of a Gaussian process is one too, whose covariances are derivatives of the covariance. An observation is
a point and the dim along which the derivative is taken, in one more column of `features`; -1 there is a value.

Reference: Rasmussen and Williams (2006), Gaussian processes for machine learning, section 9.4. Wu, Poloczek, Wilson and
Frazier (2017), Bayesian optimization with gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo import chain
from jaxhpo.sequential.surrogate.kernel import (
    Covariance,
    apart,
    around,
    corner,
    matern,
    matern_curvature,
    matern_slope,
)
from jaxhpo.space import PyTree, Space

VALUE = -1.0


def valued(x: jax.Array) -> jax.Array:
    """The column that says that these are values: float[n, dims + 1] for float[n, dims]."""
    return jnp.pad(x, ((0, 0), (0, 1)), constant_values=VALUE)


def along(x: jax.Array, dims: np.ndarray) -> jax.Array:
    """All slopes along some dims, point by point: float[n * k, dims + 1] for float[n, dims] and i64[k]."""
    column = jnp.tile(jnp.asarray(dims, x.dtype), x.shape[0])
    return jnp.concatenate([jnp.repeat(x, len(dims), axis=0), column[:, None]], axis=1)


def by_unit(space: Space, unit: jax.Array, gradients: PyTree) -> jax.Array:
    """Gradients by hyperparameters as gradients by the unit cube: float[batch, dims], 0 where a dim has levels.

    Args:
      space: whose points they are.
      unit: float[batch, dims] in [0, 1].
      gradients: shaped like the hyperparameters.
    """
    return jnp.where(jnp.asarray(space.levels == 0), chain.by_unit(space, unit, gradients), 0)


def covariance(space: Space, parameters: Covariance, a: jax.Array, b: jax.Array) -> jax.Array:
    """Covariances of two sets of observations: float[n, m] for float[n, dims + 1] and float[m, dims + 1]."""
    weight = jnp.exp(-2 * parameters.log_lengthscale)
    dims = jnp.arange(space.dims)
    one, other = ((x[:, -1:] == dims).astype(a.dtype) for x in (a, b))
    is_slope, is_other = (a[:, -1:] >= 0), (b[:, -1:] >= 0).T
    a, b = a[:, :-1], b[:, :-1]
    difference = apart(space, a, b)
    q = jnp.einsum("d,dnm->nm", weight, difference**2, precision="highest")
    # Derivatives of q by the coordinate that is observed at either side, and by both.
    left = 2 * jnp.einsum("nd,d,dnm->nm", one, weight, difference, precision="highest")
    right = -2 * jnp.einsum("md,d,dnm->nm", other, weight, difference, precision="highest")
    both = -2 * jnp.matmul(one * weight, other.T, precision="highest")
    slope = matern_slope(q)
    smooth = _chosen(
        is_slope, is_other, matern(q), slope * left, slope * right, matern_curvature(q) * left * right + slope * both
    )
    here, there = around(space, a), around(space, b)
    inner = 1 + jnp.matmul(here, there.T, precision="highest")
    left = 2 * jnp.matmul(one, there.T, precision="highest")
    right = 2 * jnp.matmul(here, other.T, precision="highest")
    both = 4 * jnp.matmul(one, other.T, precision="highest")
    trend = _chosen(
        is_slope, is_other, inner**2, 2 * inner * left, 2 * inner * right, 2 * (left * right + inner * both)
    )
    return smooth + jnp.exp(parameters.log_trend) * trend / corner(space)


def _chosen(
    a: jax.Array, b: jax.Array, value: jax.Array, left: jax.Array, right: jax.Array, both: jax.Array
) -> jax.Array:
    """The derivative that each pair of observations has; `a` and `b` say which sides are slopes."""
    return jnp.where(a & b, both, jnp.where(a, left, jnp.where(b, right, value)))


def size(parameters: Covariance, x: jax.Array) -> jax.Array:
    """What the noise of an observation is in proportion to, 1 for values: float[n] for float[n, dims + 1]."""
    dim = jnp.maximum(x[:, -1].astype(jnp.int32), 0)
    return jnp.where(x[:, -1] >= 0, 5 / 3 * jnp.exp(-2 * parameters.log_lengthscale)[dim], 1)
