"""Acquisition functions of a Gaussian posterior, in closed form: how much a point is worth a trial, higher is better.

Losses are minimised. All are elementwise, and those that can be tiny are in log space, where neither they nor their
gradients vanish however hopeless a point is. Write phi and Phi for the density and the distribution function of the
standard normal, z = (best - mean) / std, and h(z) = phi(z) + z Phi(z), so that the expected improvement is std h(z).
Below z = -1, with x = -z, both of its terms and those of its derivatives cancel; the continued fraction of the
repeated integrals of the normal tail,

  D(x) = Phi(-x) / h(-x) = x + 2/(x + 3/(x + 4/(x + ...))),

has only positive terms, and gives all that is wanted: h(-x) = phi(x) / (1 + x D), Phi(-x) = D h(-x),
(log h)'(-x) = D, (log Phi)'(-x) = x + 1/D. It is read from a polynomial. This stands where Ament et al. have erfcx with
log1mexp, whose digits cancel as x grows, and an asymptotic series behind it.

References: Ament, Daulton, Eriksson, Balandat and Bakshy (2023), Unexpected improvements to expected improvement for
Bayesian optimization, section 4.1. NIST Digital Library of Mathematical Functions, 7.18(v), for the fraction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc, logsumexp

Numbers = jax.Array | float

LOG_ROOT_2_PI = 0.5 * np.log(2 * np.pi)
FAR = -1.0
SHIFT = 3.0
TERMS = {np.dtype("float32"): 11, np.dtype("float64"): 22}


def _tail_polynomial(terms: int) -> np.ndarray:
    """Coefficients of D(x) - x, highest power first, in y = 2 (1 + SHIFT) / (x + SHIFT) - 1, for x >= 1."""

    def remainder(y: Any) -> Any:
        x = 2 * (1 + SHIFT) / (1 + y) - SHIFT
        value = x
        for k in range(600, 1, -1):
            value = x + k / value
        return value - x

    chebyshev = np.polynomial.chebyshev
    return chebyshev.cheb2poly(chebyshev.chebinterpolate(remainder, 63)[:terms])[::-1]


POLYNOMIALS = {dtype: _tail_polynomial(terms) for dtype, terms in TERMS.items()}


def _tail_slope(x: jax.Array) -> jax.Array:
    """D(x) of the module's docstring, for x >= 1."""
    y = 2 * (1 + SHIFT) / (x + SHIFT) - 1
    return x + jnp.polyval(jnp.asarray(POLYNOMIALS[np.dtype(x.dtype)], x.dtype), y, unroll=32)


def _sides(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where z is near, and z for either side's formula, moved to where that formula is finite on the other one."""
    near = z > FAR
    return near, jnp.where(near, z, 0), jnp.where(near, -FAR, -z)


def _density(z: jax.Array) -> jax.Array:
    return jnp.exp(-0.5 * z * z - LOG_ROOT_2_PI)


def _below(z: jax.Array) -> jax.Array:
    """Phi(z)."""
    return 0.5 * erfc(-z * np.sqrt(0.5))


def _log_tail_h(x: jax.Array) -> jax.Array:
    return -0.5 * x * x - LOG_ROOT_2_PI - jnp.log1p(x * _tail_slope(x))


@jax.custom_jvp
def log_h(z: jax.Array) -> jax.Array:
    """log(phi(z) + z Phi(z)), float[...] for any finite z whose square is finite."""
    near, centre, x = _sides(z)
    return jnp.where(near, jnp.log(_density(centre) + centre * _below(centre)), _log_tail_h(x))


@log_h.defjvp
def _log_h_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (z,), (dz,) = primals, tangents
    near, centre, x = _sides(z)
    below = _below(centre)
    return log_h(z), dz * jnp.where(near, below / (_density(centre) + centre * below), _tail_slope(x))


@jax.custom_jvp
def log_below(z: jax.Array) -> jax.Array:
    """log Phi(z), float[...] for any finite z whose square is finite."""
    near, centre, x = _sides(z)
    return jnp.where(near, jnp.log1p(-_below(-centre)), _log_tail_h(x) + jnp.log(_tail_slope(x)))


@log_below.defjvp
def _log_below_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (z,), (dz,) = primals, tangents
    near, centre, x = _sides(z)
    return log_below(z), dz * jnp.where(near, _density(centre) / _below(centre), x + 1 / _tail_slope(x))


def _standardised(mean: Numbers, std: Numbers, best: Numbers) -> jax.Array:
    return jnp.asarray((best - mean) / std)


def log_ei(mean: Numbers, std: Numbers, best: Numbers, margin: Numbers = 0.0) -> jax.Array:
    """Logarithm of the expected improvement, log E[max(best - margin - f, 0)], of Ament et al. (2023).

    Args:
      mean: float[...], of the posterior of the loss f.
      std: float[...], its standard deviation, above 0.
      best: float[...], loss to improve on.
      margin: float[...], by how much at least; the units of the loss.

    Returns:
      float[...], the arguments' shapes broadcast.

    Example:
      >>> from jaxhpo.sequential.acquisition import log_ei
      >>> [round(float(log_ei(mean, 1.0, 0.0)), 1) for mean in (0.0, 100.0)]
      [-0.9, -5010.1]
    """
    return log_h(_standardised(mean, std, best - margin)) + jnp.log(std)


def pi(mean: Numbers, std: Numbers, best: Numbers, margin: Numbers = 0.0) -> jax.Array:
    """Logarithm of the probability of an improvement, log P[f < best - margin], of Kushner (1964).

    Without a margin it prefers a sure small gain to any large one. Arguments and result are those of `log_ei`.

    Example:
      >>> from jaxhpo.sequential.acquisition import pi
      >>> [round(float(pi(mean, 1.0, 0.0)), 1) for mean in (0.0, 100.0)]
      [-0.7, -5005.5]
    """
    return log_below(_standardised(mean, std, best - margin))


def ucb(mean: Numbers, std: Numbers, best: Numbers, beta: Numbers = 2.0) -> jax.Array:
    """The lower confidence bound, its sign changed: beta std - mean, of Srinivas et al. (2010), whose beta is squared.

    Args:
      mean: float[...], of the posterior of the loss f.
      std: float[...], its standard deviation.
      best: not used, here so that all acquisitions are called alike.
      beta: float[...], how many standard deviations below the mean.

    Returns:
      float[...], the arguments' shapes broadcast.

    Example:
      >>> from jaxhpo.sequential.acquisition import ucb
      >>> float(ucb(1.0, 0.5, 0.0, beta=3.0))
      0.5
    """
    del best
    return jnp.asarray(beta * std - mean)


def log_mean_exp(values: jax.Array, axis: int | tuple[int, ...] = 0) -> jax.Array:
    """The mean of numbers that are given and wanted as logarithms."""
    return logsumexp(values, axis, b=1 / np.prod(np.take(values.shape, axis)))


class Acquisition(NamedTuple):
    """An acquisition function, and how to average it."""

    value: Callable
    """(mean, std, best, exploration) -> float[...], elementwise"""
    ensemble: Callable
    """(values, axis) -> its mean over the members of an ensemble of posteriors, which `axis` counts"""
    exploration: float
    """default of the fourth argument: the margin, or beta"""


ACQUISITIONS = {
    "log_ei": Acquisition(log_ei, log_mean_exp, 0.0),
    "pi": Acquisition(pi, log_mean_exp, 0.0),
    "ucb": Acquisition(ucb, jnp.mean, 2.0),
}


def ensemble(name: str, values: jax.Array, axis: int | tuple[int, ...] = 0) -> jax.Array:
    """The acquisition `name` averaged over the members of an ensemble of posteriors, such as of hyperparameters.

    What is in log space is averaged outside of it: the expected improvement under the mixture of the members.

    Args:
      name: one of `ACQUISITIONS`.
      values: float[..., members, ...].
      axis: that of the members.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxhpo.sequential.acquisition import ensemble
      >>> values = jnp.log(jnp.array([1.0, 3.0]))
      >>> round(float(jnp.exp(ensemble("log_ei", values))), 4), round(float(ensemble("ucb", jnp.exp(values))), 4)
      (2.0, 2.0)
    """
    return ACQUISITIONS[name].ensemble(values, axis)
