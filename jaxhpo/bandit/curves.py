"""Learning curves beyond their end: what the loss after the last stretch will be, judged from the first ones.

A curve is `a + b * shape(stretch)` and normal noise, where the shapes fall to 0: powers, stretched exponentials and
Hill curves at a grid of rates. For each shape, `a`, `b` and the noise have a closed form, least squares, and what is
predicted is a t distribution; the shapes are weighted by how likely the curve is under each. The families are those of
Domhan et al.; the grid takes the place of their Markov chain, so that the work is the same for every curve.

References: Domhan, Springenberg and Hutter (2015), Speeding up automatic hyperparameter optimization of deep neural
networks by extrapolation of learning curves, IJCAI, Table 1 (pow3, pow4, ilog2, Hill3, Janoschek, Weibull). Gelman et
al. (2013), Bayesian Data Analysis, section 14.2 (regression with the standard noninformative prior). Wallace (1959),
Bounds on normal approximations to Student's and the chi-square distributions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr

EXPONENTS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
STRETCHINGS = (0.5, 1.0, 2.0)
HILLS = (1.5, 2.0)
RATES = 16
FEWEST = 4
NOISE = 0.03
WORTH = 12
LEVEL = 1e-4
LEAST = -1e9


class Forecast(NamedTuple):
    """The last loss of every curve: a mixture over the shapes, of t distributions."""

    weight: jax.Array
    """float[rows, shapes], which sums to 1"""
    center: jax.Array
    """float[rows, shapes]"""
    scale: jax.Array
    """float[rows, shapes], above 0"""
    freedom: jax.Array
    """float[rows]: degrees of freedom"""


class Fits(NamedTuple):
    """What least squares needs of the shapes once the number of points is known; leading axis = points, less one."""

    shapes: np.ndarray
    """float[shapes, stretches]"""
    middle: np.ndarray
    """float[stretches, shapes]: mean of the shape over the points"""
    norm: np.ndarray
    """float[stretches, shapes]: of the shape less its mean"""


def shapes(stretches: int) -> np.ndarray:
    """Curves that fall from 1 to 0, at stretches 1, 2, ...: f64[shapes, stretches].

    Powers `(1 + t / d) ** -c`, the inverse logarithm, exponentials `exp(-(t / d) ** s)` and Hill curves
    `1 / (1 + (t / d) ** s)`.
    """
    t = np.arange(1, stretches + 1, dtype=float)
    distances = np.geomspace(0.5, max(2.0 * stretches, 1.0), RATES)
    powers = [(1 + t / d) ** -c for c in EXPONENTS for d in (1e-3, *distances[::2])]
    exponentials = [np.exp(-((t / d) ** s)) for s in STRETCHINGS for d in distances]
    hills = [1 / (1 + (t / d) ** s) for s in HILLS for d in distances]
    falling = np.stack([*powers, 1 / np.log(1 + t), *exponentials, *hills])
    return falling / falling[:, :1]


@functools.lru_cache(maxsize=32)
def _fits(stretches: int) -> Fits:
    shape = shapes(stretches)
    points = np.arange(1, stretches + 1)[:, None]
    middle = np.cumsum(shape.T, axis=0) / points
    squares = np.array([((shape[:, :n] - middle[n - 1][:, None]) ** 2).sum(1) for n in range(1, stretches + 1)])
    return Fits(shape, middle, np.sqrt(squares))


def forecast(curves: jax.Array, reached: jax.Array) -> Forecast:
    """The last loss of curves of which only the first points are known.

    Args:
      curves: float[rows, stretches], finite.
      reached: i32[rows]: how many points of each are known; what comes after them is not read.
    """
    stretches, dtype = curves.shape[1], curves.dtype
    fits = jax.tree.map(lambda x: jnp.asarray(x, dtype), _fits(stretches))
    known = jnp.arange(stretches, dtype=jnp.int32) < reached[:, None]
    n = jnp.maximum(reached, 1).astype(dtype)
    losses = jnp.where(known, curves, 0)
    middle = (losses / n[:, None]).sum(1)
    away = jnp.where(known, losses - middle[:, None], 0)
    size = jnp.abs(away).max(1)
    off = away / jnp.where(size > 0, size, 1)[:, None]
    at = jnp.maximum(reached, 1) - 1
    base, norm = fits.middle[at], jnp.maximum(fits.norm[at], LEVEL)
    unit = jnp.where(known[:, None], (fits.shapes - base[..., None]) / norm[..., None], 0)
    slope = (unit * off[:, None]).sum(-1)
    rest = ((off[:, None] - slope[..., None] * unit) ** 2).sum(-1)
    # No grid has the very shape of a curve: without some noise a smooth curve would make one shape certain.
    rest = jnp.maximum(rest + NOISE**2 * (off**2).sum(1)[:, None], jnp.finfo(dtype).tiny)
    # Neighbouring losses miss a shape alike, so that many of them are worth no more than a few.
    worth = jnp.minimum(n, WORTH)
    freedom = jnp.maximum(worth - 2, 1)
    # The flat prior is on the slope in units of the norm, so that no shape has a larger prior than another. A shape
    # that is level over the points, as far as single precision tells, explains none of them.
    likelihood = jnp.where(norm > LEVEL, -freedom[:, None] / 2 * jnp.log(rest), LEAST)
    reach = (fits.shapes[:, -1] - base) / norm
    variance = rest / jnp.maximum(n - 2, 1)[:, None]
    deviation = jnp.sqrt(variance * (1 + (1 + n[:, None] * reach**2) / worth[:, None]))
    center = middle[:, None] + size[:, None] * slope * reach
    scale = jnp.maximum(size[:, None] * deviation, jnp.finfo(dtype).tiny)
    return Forecast(jax.nn.softmax(likelihood, axis=1), center, scale, freedom)


def student(t: jax.Array, freedom: jax.Array) -> jax.Array:
    """The distribution function of Student's t by Wallace's approximation, to about 0.01."""
    scaled = jnp.sqrt(freedom * jnp.log1p(t**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return ndtr(jnp.sign(t) * scaled)


def chance_below(forecast: Forecast, loss: jax.Array) -> jax.Array:
    """The probability that the last loss is below `loss`, float[]: float[rows]."""
    t = (loss - forecast.center) / forecast.scale
    return (forecast.weight * student(t, forecast.freedom[:, None])).sum(1)


def expected(forecast: Forecast) -> jax.Array:
    """The last loss that is expected, the weighted median of what the shapes predict: float[rows].

    The mean would follow the few shapes that lead far away.
    """
    center, weight = lax.sort((forecast.center, forecast.weight), num_keys=1)
    at = (jnp.cumsum(weight, axis=1) < 0.5).sum(1, dtype=jnp.int32)
    return jnp.take_along_axis(center, jnp.minimum(at, center.shape[1] - 1)[:, None], axis=1)[:, 0]
