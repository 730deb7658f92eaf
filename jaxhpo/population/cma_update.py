"""The distribution of CMA-ES, and how the ranks of a generation move it: pure functions of arrays.

Hansen (2016), The CMA Evolution Strategy: A Tutorial (arXiv:1604.00772), whose equation numbers are used below.
Separable: Ros and Hansen (2008), A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.space import working_dtype

ALL_PAIRS = 64


class Distribution(NamedTuple):
    """N(mean, sigma^2 A C A) over the n dims that have an order."""

    mean: jax.Array
    """float[n]"""
    sigma: jax.Array
    """float[], step size"""
    covariance: jax.Array
    """float[n, n], or float[n] where it is separable: C"""
    basis: jax.Array
    """float[n, n]: B, eigenvectors of an earlier C; float[0] where it is separable"""
    roots: jax.Array
    """float[n]: D, roots of its eigenvalues"""
    path_sigma: jax.Array
    """float[n], evolution path of the step size"""
    path_c: jax.Array
    """float[n], evolution path of C"""
    scale: jax.Array
    """float[integers], diagonal of A, which is 1 in the other dims"""
    generation: jax.Array
    """i32[], generations since the start of the run"""


class Weights(NamedTuple):
    """Recombination weights of the rows of a generation, equation 53."""

    positive: jax.Array
    """float[rows], they sum to 1"""
    negative: jax.Array
    """float[rows], they sum to -1"""


class Rates(NamedTuple):
    """Learning rates, equations 50 to 58."""

    mu_eff: jax.Array
    c_sigma: jax.Array
    d_sigma: jax.Array
    c_c: jax.Array
    c_1: jax.Array
    c_mu: jax.Array
    negative: jax.Array
    """sum of the negative weights' sizes"""


def standings(losses: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many rows are better than each, and how many are as good, itself included: i32[rows] each.

    Only rows in `mask` count. Failed rows are as good as one another.
    """
    m = losses.shape[0]
    integer = np.dtype(f"i{losses.dtype.itemsize}")
    # Sorting integers takes a fifth of the time that sorting floats does.
    bits = lax.bitcast_convert_type(losses, integer)
    key = jnp.where(bits < 0, bits ^ np.iinfo(integer).max, bits)
    key = jnp.where(key == -1, 0, key)  # -0 is as good as 0
    key = jnp.where(mask, key, np.iinfo(integer).max)
    if m <= ALL_PAIRS:
        less = (key[None, :] < key[:, None]).sum(1, dtype=jnp.int32)
        equal = ((key[None, :] == key[:, None]) & mask[None, :]).sum(1, dtype=jnp.int32)
        return less, equal
    ordered = lax.sort(key)
    less = jnp.searchsorted(ordered, key, side="left").astype(jnp.int32)
    through = jnp.searchsorted(ordered, key, side="right").astype(jnp.int32)
    return less, jnp.where(mask, through - less, 0)


def weights_of(less: jax.Array, equal: jax.Array, n: jax.Array, succeeded: jax.Array, separable: bool) -> Weights:
    """Weights by rank; rows that are as good share the weights of their ranks, failed rows have none that is positive.

    Args:
      less: i32[rows], how many rows are better.
      equal: i32[rows], how many are as good, 0 in rows that do not count.
      n: i32[], rows that count.
      succeeded: i32[], rows that have not failed.
      separable: whether the weights are those of Ros and Hansen (2008).
    """
    m, dtype = less.shape[0], working_dtype()
    n = jnp.maximum(n, 2)  # a row by itself has the weight 1
    mu = n // 2
    top = jnp.log((mu + 1 if separable else (n + 1) / 2).astype(dtype))
    logs = np.log(np.arange(1, m + 1))
    sums = jnp.asarray(np.concatenate([[0], np.cumsum(logs)]), dtype)
    alone = top - jnp.log((less + 1).astype(dtype))

    def shared(begin: jax.Array, end: jax.Array) -> jax.Array:
        ranks = jnp.maximum(end - begin, 0)
        total = jnp.where(equal == 1, alone, ranks * top - (sums[end] - sums[begin]))
        return jnp.where(ranks > 0, total / jnp.maximum(equal, 1), 0)

    last = jnp.minimum(mu, succeeded)
    positive = shared(jnp.minimum(less, last), jnp.minimum(less + equal, last))
    negative = jnp.minimum(shared(jnp.maximum(less, mu), jnp.maximum(less + equal, mu)), 0)
    tiny = jnp.finfo(dtype).tiny
    return Weights(positive / jnp.maximum(positive.sum(), tiny), negative / jnp.maximum(-negative.sum(), tiny))


def rates_of(weights: Weights, dims: int, separable: bool, active: bool) -> Rates:
    """Learning rates for a distribution over `dims` dims."""
    tiny = jnp.finfo(weights.positive.dtype).tiny
    mu_eff = 1 / jnp.maximum((weights.positive**2).sum(), tiny)
    mu_eff_negative = 1 / jnp.maximum((weights.negative**2).sum(), tiny)
    c_1 = 2 / ((dims + 1.3) ** 2 + mu_eff)  # Eq. 57
    if separable:
        c_mu = 2 / mu_eff / (dims + 2**0.5) ** 2
        c_mu += (1 - 1 / mu_eff) * jnp.minimum(1, (2 * mu_eff - 1) / ((dims + 2) ** 2 + mu_eff))
        c_mu = jnp.minimum((dims + 2) / 3 * c_mu, 1 - c_1)
        c_sigma = (mu_eff + 2) / (dims + mu_eff + 3)
        c_c = jnp.full_like(mu_eff, 4 / (dims + 4))
    else:
        c_mu = 2 * jnp.maximum(mu_eff - 2 + 1 / mu_eff, 0) / ((dims + 2) ** 2 + mu_eff)
        c_mu = jnp.minimum(c_mu, 1 - c_1)  # Eq. 58
        c_sigma = (mu_eff + 2) / (dims + mu_eff + 5)  # Eq. 55
        c_c = (4 + mu_eff / dims) / (dims + 4 + 2 * mu_eff / dims)  # Eq. 56
    d_sigma = 1 + 2 * jnp.maximum(0, jnp.sqrt(jnp.maximum(mu_eff - 1, 0) / (dims + 1)) - 1) + c_sigma
    safe = jnp.maximum(c_mu, 1e-12)
    negative = jnp.minimum(1 + c_1 / safe, 1 + 2 * mu_eff_negative / (mu_eff + 2))  # Eq. 50, 51
    negative = jnp.minimum(negative, (1 - c_1 - c_mu) / (dims * safe))  # Eq. 52
    return Rates(mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu, negative * active)


def start(mean: jax.Array, sigma: jax.Array, integers: int, separable: bool) -> Distribution:
    """A run's first distribution."""
    n, dtype = mean.shape[0], mean.dtype
    return Distribution(
        mean=mean,
        sigma=sigma.astype(dtype),
        covariance=jnp.ones(n, dtype) if separable else jnp.eye(n, dtype=dtype),
        basis=jnp.zeros(0, dtype) if separable else jnp.eye(n, dtype=dtype),
        roots=jnp.ones(n, dtype),
        path_sigma=jnp.zeros(n, dtype),
        path_c=jnp.zeros(n, dtype),
        scale=jnp.ones(integers, dtype),
        generation=jnp.zeros((), jnp.int32),
    )


def variances(covariance: jax.Array) -> jax.Array:
    """The diagonal of C."""
    return jnp.diagonal(covariance) if covariance.ndim == 2 else covariance


def decomposed(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """B and D of C; an eigenvalue that the dtype cannot tell from 0 is raised to what it can."""
    squares, basis = jnp.linalg.eigh(covariance, symmetrize_input=True)
    floor = jnp.finfo(squares.dtype).eps * squares[-1]
    return basis, jnp.sqrt(jnp.maximum(squares, floor))


def learned(d: Distribution, r: Rates, step: jax.Array, rank_mu: jax.Array) -> Distribution:
    """The distribution after a generation, without the margin.

    Args:
      d: the distribution before it.
      r: learning rates.
      step: float[n], mean of the rows' y by their positive weights; y is what multiplies sigma.
      rank_mu: of the shape of C, the sum of y y' by all weights.
    """
    n, separable = d.mean.shape[0], d.covariance.ndim == 1
    expected = n**0.5 * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    white = step / d.roots if separable else d.basis @ ((d.basis.T @ step) / d.roots)
    path_sigma = (1 - r.c_sigma) * d.path_sigma + jnp.sqrt(r.c_sigma * (2 - r.c_sigma) * r.mu_eff) * white  # Eq. 43
    length = jnp.sqrt((path_sigma**2).sum())
    sigma = d.sigma * jnp.exp(r.c_sigma / r.d_sigma * (length / expected - 1))  # Eq. 44
    generation = d.generation + 1
    settled = jnp.sqrt(1 - (1 - r.c_sigma) ** (2 * (generation + 1)))
    grows = (length / settled < (1.4 + 2 / (n + 1)) * expected).astype(sigma.dtype)
    path_c = (1 - r.c_c) * d.path_c + grows * jnp.sqrt(r.c_c * (2 - r.c_c) * r.mu_eff) * step  # Eq. 45
    stall = (1 - grows) * r.c_c * (2 - r.c_c)
    rank_one = path_c**2 if separable else jnp.outer(path_c, path_c)
    kept = 1 + r.c_1 * stall - r.c_1 - r.c_mu * (1 - r.negative)
    covariance = kept * d.covariance + r.c_1 * rank_one + r.c_mu * rank_mu  # Eq. 47
    # Sigma and C may share a factor in any way: it goes to sigma before the dtype runs out of exponents.
    size = variances(covariance).mean()
    size = jnp.where((size > 1e-4) & (size < 1e4), 1, size)
    root = jnp.sqrt(size)
    covariance = covariance / size
    widest = variances(covariance).max()
    # No step is wider than twice the cube, whatever happens on a plateau, nor one that rounding swallows.
    sigma = jnp.clip(sigma * root, jnp.finfo(sigma.dtype).eps / jnp.sqrt(widest), 2 / jnp.sqrt(widest))
    if separable:
        covariance = jnp.maximum(covariance, jnp.finfo(covariance.dtype).eps * widest)
    return d._replace(
        mean=jnp.clip(d.mean + d.sigma * step, 0, 1),  # Eq. 42
        sigma=sigma,
        covariance=covariance,
        roots=jnp.sqrt(covariance) if separable else d.roots / root,
        path_sigma=path_sigma,
        path_c=path_c / root,
        generation=generation,
    )
