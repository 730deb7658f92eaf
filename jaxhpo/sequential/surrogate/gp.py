"""Gaussian processes whose hyperparameters are an ensemble, and whose Cholesky factors grow row by row.

The scale of the Matérn part has an inverse-gamma prior and is integrated out, so that no optimiser has to find it. The
other hyperparameters have normal priors, in the logarithm, and are sampled. What is kept of a Gram matrix K = L L^T
is W = L^-1: the next row of W costs a product, and so does every prediction.

Reference: Rasmussen and Williams (2006), Gaussian processes for machine learning, chapters 2 and 5; section 5.4.1 has
the gradient of the marginal likelihood. Snoek, Larochelle and Adams (2012), Practical Bayesian optimization of machine
learning algorithms: an ensemble instead of a point estimate. Snoek et al. (2014), Input warping for Bayesian
optimization of non-stationary functions.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri
from jax.typing import ArrayLike

from jaxhpo.draws import bits, uniform
from jaxhpo.sequential.surrogate import slopes
from jaxhpo.sequential.surrogate.kernel import Covariance, Geometry, covariance, geometry, variance
from jaxhpo.sequential.surrogate.surrogate import Prediction
from jaxhpo.sequential.surrogate.targets import distances, transformed
from jaxhpo.space import Space, working_dtype

JITTER = {4: 3e-5, 8: 1e-10}
SHAPE, RATE = 1.0, 1.0
LEAST_VARIANCE = 1e-7
DRAW_JITTER = 1e-4


class Parameters(NamedTuple):
    """The hyperparameters of one model."""

    covariance: Covariance
    log_noise: jax.Array
    """float[]: variance of the noise, the Matérn part's being 1"""
    log_tail: jax.Array
    """float[]: how much the tail of the losses is drawn in, log a of `targets`"""
    log_bend: jax.Array
    """float[2, dims]: exponents of the Kumaraswamy distribution that bends the inputs; float[0, dims] if none do"""


class Prior(NamedTuple):
    """Of all hyperparameters, normal and independent."""

    mean: Parameters
    std: Parameters

    def at(self, white: Parameters) -> Parameters:
        """The hyperparameters at a point that has a standard normal prior."""
        return jax.tree.map(lambda mean, std, x: mean + std * x, self.mean, self.std, white)


class Data(NamedTuple):
    """What a model is fitted to."""

    x: jax.Array
    """float[n, dims], `features`; with derivatives, float[n + slopes, dims + 1], observations of `slopes`"""
    between: Geometry | None
    """of `x` with itself; `None` where each model bends its inputs"""
    distance: jax.Array
    """float[n], of the losses"""
    finite: jax.Array
    """bool[n]: rows with a finite loss"""
    mask: jax.Array
    """bool[n]: rows that hold a trial"""
    slopes: "Slopes | None" = None
    """derivatives that were observed"""

    @property
    def observed(self) -> jax.Array:
        """bool[n + slopes]: observations that there are, values first."""
        return self.mask if self.slopes is None else jnp.concatenate([self.mask, self.slopes.mask])

    def targets(self, log_tail: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float[n + slopes], and the logarithm of the Jacobian of what was observed, float[]."""
        targets, log_slope = transformed(self.distance, self.finite, self.mask, log_tail)
        if self.slopes is None:
            return targets, log_slope.sum()
        own = log_slope[self.slopes.row]
        slopes = jnp.where(self.slopes.mask, jnp.exp(own) * self.slopes.value, 0)
        return jnp.concatenate([targets, slopes]), log_slope.sum() + jnp.where(self.slopes.mask, own, 0).sum()


class Slopes(NamedTuple):
    """Derivatives of `Data.distance` by the unit cube; their points are behind those of the values in `Data.x`."""

    row: jax.Array
    """i32[slopes]: of the values, whose derivative it is"""
    value: jax.Array
    """float[slopes]"""
    mask: jax.Array
    """bool[slopes]: those that there are"""


class Posterior(NamedTuple):
    """An ensemble of models, conditioned on data."""

    parameters: Parameters
    """arrays [members, ...]"""
    x: jax.Array
    """float[n, dims], `Data.x`"""
    mask: jax.Array
    """bool[n]: rows that count; the others have the rows of an identity in `w`"""
    w: jax.Array
    """float[members, n, n], lower triangular: inverse of the Cholesky factor of the Gram matrix"""
    whitened: jax.Array
    """float[members, n]: `w` times the targets"""
    weights: jax.Array
    """float[members, n]: inverse Gram matrix times the targets"""
    scale: jax.Array
    """float[members]: variance of the Matérn part"""
    best: jax.Array
    """float[members]: the lowest target, without noise"""


def data_of(x: jax.Array, losses: jax.Array, mask: jax.Array, between: Geometry | None) -> Data:
    """`Data` of the told losses float[n], with NaN or an infinity where a trial failed."""
    return Data(x, between, distances(losses, mask)[0], mask & jnp.isfinite(losses), mask)


def bent(parameters: Parameters, x: jax.Array, space: Space) -> jax.Array:
    """Inputs through the Kumaraswamy distribution function, dims without order as they are: float[n, dims]."""
    if not parameters.log_bend.shape[-2]:
        return x
    first, second = jnp.exp(parameters.log_bend)
    inside = jnp.clip(x, 1e-6, 1 - 1e-6)
    through = -jnp.expm1(second * jnp.log1p(-jnp.exp(first * jnp.log(inside))))
    return jnp.where(jnp.asarray(space.categorical), x, through)


def cross(space: Space, parameters: Parameters, a: jax.Array, b: jax.Array, between: Geometry | None) -> jax.Array:
    """Covariances of two sets of observations, through `between` where it is known: float[n, m]."""
    if a.shape[-1] > space.dims:
        return slopes.covariance(space, parameters.covariance, a, b)
    known = geometry(space, bent(parameters, a, space), bent(parameters, b, space)) if between is None else between
    return covariance(parameters.covariance, known)


def shared(space: Space, parameters: Parameters, a: jax.Array, b: jax.Array) -> Geometry | None:
    """The geometry that all models have in common, `None` where each has its own."""
    has_own = parameters.log_bend.shape[-2] or a.shape[-1] > space.dims
    return None if has_own else geometry(space, a, b)


def nugget(parameters: Parameters) -> jax.Array:
    """What is added to the variance of a value: the noise, and what the working dtype needs."""
    jitter = JITTER[parameters.log_noise.dtype.itemsize]
    return jnp.exp(parameters.log_noise) + jitter * (1 + jnp.exp(parameters.covariance.log_trend))


def nuggets(space: Space, parameters: Parameters, x: jax.Array) -> jax.Array:
    """What is added to the diagonal: float[n]."""
    if x.shape[-1] == space.dims:
        return jnp.full(x.shape[0], nugget(parameters))
    return nugget(parameters) * slopes.size(parameters.covariance, x)


def own_variance(space: Space, parameters: Parameters, x: jax.Array) -> jax.Array:
    """Variances of the values at points, without noise: float[n]."""
    return variance(space, parameters.covariance, bent(parameters, x[:, : space.dims], space))


def gram(space: Space, parameters: Parameters, data: Data) -> jax.Array:
    """The covariance of the observations, an identity in rows that hold none: float[n, n]."""
    known = cross(space, parameters, data.x, data.x, data.between)
    both = data.observed[:, None] & data.observed
    return jnp.where(both, known, 0) + jnp.diag(jnp.where(data.observed, nuggets(space, parameters, data.x), 1))


def inverse_factor(matrix: jax.Array) -> jax.Array:
    """Inverse of the Cholesky factor: float[n, n], lower triangular."""
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return lax.linalg.triangular_solve(jnp.linalg.cholesky(matrix), identity, left_side=True, lower=True)


def scale_of(whitened: jax.Array, number: jax.Array) -> jax.Array:
    """The variance of the Matérn part, in the mean of its posterior: float[]."""
    return (RATE + (whitened**2).sum() / 2) / (SHAPE + number / 2)


def _likelihood(matrix: jax.Array, targets: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    w = inverse_factor(matrix)
    whitened = w @ targets
    evidence = jnp.log(jnp.diagonal(w)).sum() - (SHAPE + number / 2) * jnp.log(RATE + (whitened**2).sum() / 2)
    return evidence, w, whitened


@jax.custom_vjp
def log_marginal_likelihood(matrix: jax.Array, targets: jax.Array, number: jax.Array) -> jax.Array:
    """Of `number` targets, the scale integrated out, up to a constant: a Student t density.

    Args:
      matrix: float[n, n], the Gram matrix, the scale being 1.
      targets: float[n], 0 in rows that hold none.
      number: float[], of the rows that hold one.
    """
    return _likelihood(matrix, targets, number)[0]


def _likelihood_forward(matrix: jax.Array, targets: jax.Array, number: jax.Array) -> tuple:
    evidence, w, whitened = _likelihood(matrix, targets, number)
    weights = w.T @ whitened
    inverse = jnp.matmul(w.T, w, precision="highest")
    scale = scale_of(whitened, number)
    return evidence, ((weights[:, None] * (weights / scale) - inverse) / 2, -weights / scale)


def _likelihood_backward(residuals: tuple, tangent: jax.Array) -> tuple:
    by_matrix, by_targets = residuals
    return tangent * by_matrix, tangent * by_targets, None


log_marginal_likelihood.defvjp(_likelihood_forward, _likelihood_backward)


def log_posterior(space: Space, prior: Prior, data: Data, white: Parameters) -> jax.Array:
    """Log density of hyperparameters given the losses, at the point `white` that has a standard normal prior."""
    parameters = prior.at(white)
    targets, log_slope = data.targets(parameters.log_tail)
    matrix = gram(space, parameters, data)
    evidence = log_marginal_likelihood(matrix, targets, data.observed.sum().astype(targets.dtype))
    return evidence + log_slope - sum((x**2).sum() for x in jax.tree.leaves(white)) / 2


def factors(space: Space, parameters: Parameters, data: Data) -> jax.Array:
    """`Posterior.w` of data: float[members, n, n]."""
    return jax.vmap(lambda p: inverse_factor(gram(space, p, data)))(parameters)


def condition(parameters: Parameters, w: jax.Array, data: Data) -> Posterior:
    """The posterior, given its factors."""
    return conditioned(parameters, w, data, jax.vmap(lambda p: data.targets(p.log_tail)[0])(parameters))


def conditioned(parameters: Parameters, w: jax.Array, data: Data, targets: jax.Array) -> Posterior:
    """The posterior, given its factors and its targets, float[members, n], which are 0 in rows that hold none."""

    def one(parameters: Parameters, w: jax.Array, targets: jax.Array) -> tuple:
        whitened = w @ targets
        weights = w.T @ whitened
        fitted = (targets - jnp.exp(parameters.log_noise) * weights)[: data.finite.shape[0]]
        best = jnp.min(jnp.where(data.finite, fitted, jnp.inf))
        scale = scale_of(whitened, data.observed.sum().astype(w.dtype))
        return whitened, weights, scale, jnp.where(data.finite.any(), best, 0)

    return Posterior(parameters, data.x, data.observed, w, *jax.vmap(one)(parameters, w, targets))


class Row(NamedTuple):
    """How a point follows from the rows before it."""

    covariance: jax.Array
    """float[members, n]: with them, 0 where they do not count"""
    factor: jax.Array
    """float[members, n]: the row of the Cholesky factor"""
    inverse_std: jax.Array
    """float[members]: 1 / the last entry of the row"""


def extended(
    space: Space, parameters: Parameters, x: jax.Array, mask: jax.Array, w: jax.Array, at: jax.Array, point: jax.Array
) -> tuple[jax.Array, Row]:
    """The row `at`, i32[], of `w` after an observation at `point`, float[dims]: float[members, n].

    It did not count so far, and all rows that count must be before it.
    """
    between = shared(space, parameters, point[None], x)

    def one(parameters: Parameters, w: jax.Array) -> tuple[jax.Array, Row]:
        along = jnp.where(mask, cross(space, parameters, point[None], x, between)[0], 0)
        factor, own = w @ along, own_variance(space, parameters, point[None])[0]
        # Near other points rounding can make the projection longer than what it projects, and rows grow without end.
        factor = factor * lax.rsqrt(jnp.maximum((factor**2).sum() / own, 1))
        left = own + nugget(parameters) - (factor**2).sum()
        inverse_std = lax.rsqrt(jnp.maximum(left, nugget(parameters)))
        row = (-inverse_std * (factor @ w)).at[at].set(inverse_std)
        return row, Row(along, factor, inverse_std)

    return jax.vmap(one)(parameters, w)


def widened(posterior: Posterior, more: int) -> Posterior:
    """`posterior` with `more` rows that do not count yet."""
    if not more:
        return posterior
    rows = posterior.mask.shape[0]
    w = jnp.pad(posterior.w, ((0, 0), (0, more), (0, more)))
    new = jnp.arange(rows, rows + more)
    return posterior._replace(
        x=jnp.pad(posterior.x, ((0, more), (0, 0)), constant_values=0.5),
        mask=jnp.pad(posterior.mask, (0, more)),
        w=w.at[:, new, new].set(1),
        whitened=jnp.pad(posterior.whitened, ((0, 0), (0, more))),
        weights=jnp.pad(posterior.weights, ((0, 0), (0, more))),
    )


def fantasized(
    space: Space, posterior: Posterior, at: jax.Array, point: jax.Array, normal: jax.Array, counts: jax.Array
) -> tuple[Posterior, Row]:
    """The posterior after observations at `point` that each member draws from what it expects there.

    Args:
      space: whose points they are.
      posterior: with a row `at` that does not count yet, the first of those.
      at: i32[].
      point: float[dims], `features`.
      normal: float[members], standard normal: the draws.
      counts: bool[], False leaves the posterior as it is.
    """
    new, row = extended(space, posterior.parameters, posterior.x, posterior.mask, posterior.w, at, point)
    drawn = normal * jnp.sqrt(posterior.scale)
    mean = (row.covariance * posterior.weights).sum(1)
    keep = lambda new, old: jnp.where(counts, new, old)  # noqa: E731
    after = posterior._replace(
        x=posterior.x.at[at].set(keep(point, posterior.x[at])),
        mask=posterior.mask.at[at].set(counts),
        w=posterior.w.at[:, at].set(keep(new, posterior.w[:, at])),
        whitened=posterior.whitened.at[:, at].set(keep(drawn, 0)),
        weights=posterior.weights + keep(new * drawn[:, None], 0),
        best=keep(jnp.minimum(posterior.best, mean + drawn / row.inverse_std), posterior.best),
    )
    return after, row


def predict(space: Space, posterior: Posterior, candidates: jax.Array) -> Prediction:
    """Of the values, without noise, at the points float[candidates, dims], which are `features`.

    The variances are those of a Matérn part whose variance is 1, the link is the points' rows of the Cholesky factor,
    float[members, candidates, n].
    """
    between = shared(space, posterior.parameters, candidates, posterior.x)

    def one(parameters: Parameters, w: jax.Array, weights: jax.Array) -> Prediction:
        along = jnp.where(posterior.mask, cross(space, parameters, candidates, posterior.x, between), 0)
        projected = jnp.matmul(along, w.T, precision="highest")
        own = own_variance(space, parameters, candidates)
        return Prediction(along @ weights, own - (projected**2).sum(1), projected)

    return jax.vmap(one)(posterior.parameters, posterior.w, posterior.weights)


def deviation(posterior: Posterior, variances: jax.Array) -> jax.Array:
    """Standard deviations of targets, float[members, candidates], for the variances in a `Prediction`."""
    return jnp.sqrt(jnp.maximum(variances, LEAST_VARIANCE) * posterior.scale[:, None])


def prior_of(
    space: Space, lengthscale: jax.Array, noise: jax.Array, trend: jax.Array, tail: jax.Array, bends: bool
) -> Prior:
    """The prior whose medians are given.

    Args:
      space: of the inputs.
      lengthscale: float[], times the square root of the number of dims, as points are that far apart in many of them
        (Hvarfner, Hellsten and Nardi 2024, Vanilla Bayesian optimization performs great in high dimensions).
      noise: float[], variance.
      trend: float[], variance.
      tail: float[], a of `targets`.
      bends: whether inputs are bent.
    """
    dims, dtype = space.dims, working_dtype()

    def tree(lengthscale: ArrayLike, trend: ArrayLike, noise: ArrayLike, tail: ArrayLike, bend: float) -> Parameters:
        covariance = Covariance(jnp.full(dims, lengthscale, dtype), jnp.asarray(trend, dtype))
        rest = jnp.asarray(noise, dtype), jnp.asarray(tail, dtype), jnp.full((2 * bends, dims), bend, dtype)
        return Parameters(covariance, *rest)

    median = jnp.log(lengthscale) + math.log(dims) / 2
    mean = tree(median, jnp.log(trend), jnp.log(noise), jnp.log(tail), 0)
    return Prior(mean, tree(1, 2, 2, 2, 0.5))


def updated(
    space: Space, posterior: Posterior, before: Prediction, candidates: jax.Array, row: Row, at: jax.Array
) -> Prediction:
    """The prediction after `fantasized` has put a point into row `at` of the posterior: i32[], float[m, dims]."""
    point = posterior.x[at][None]
    between = shared(space, posterior.parameters, candidates, point)

    def one(parameters: Parameters, drawn: jax.Array, before: Prediction, row: Row) -> Prediction:
        along = cross(space, parameters, candidates, point, between)[:, 0]
        new = (along - before.link @ row.factor) * row.inverse_std
        return Prediction(before.mean + new * drawn, before.variance - new**2, before.link.at[:, at].set(new))

    return jax.vmap(one)(posterior.parameters, posterior.whitened[:, at], before, row)


def draw(key: jax.Array, space: Space, posterior: Posterior, before: Prediction, candidates: jax.Array) -> jax.Array:
    """The values of one function of the posterior of a member at random: float[m], targets, for float[m, dims]."""
    members, number = before.mean.shape
    drawn = uniform(bits(key, (number + 1,)))
    member = jnp.minimum((drawn[0] * members).astype(jnp.int32), members - 1)
    parameters = jax.tree.map(lambda leaf: leaf[member], posterior.parameters)
    link = before.link[member]
    together = cross(space, parameters, candidates, candidates, None)
    left = together - jnp.matmul(link, link.T, precision="highest")
    # Candidates crowd together: more than the nugget keeps this factor real.
    factor = jnp.linalg.cholesky(left + DRAW_JITTER * jnp.diag(own_variance(space, parameters, candidates)))
    return before.mean[member] + jnp.sqrt(posterior.scale[member]) * (factor @ ndtri(drawn[1:]))
