"""Learning curves beyond their end: what the loss after the last stretch will be, judged from the first ones.

A curve is `a + b * shape(stretch)` and normal noise, where the shapes fall to 0: powers, stretched exponentials and
Hill curves at a grid of rates. For each shape, `a`, `b` and the noise have a closed form, least squares, and the prediction
is a t distribution; the shapes are weighted by how likely the curve is under each. The families are those of Domhan et
al.; the grid takes the place of their Markov chain, so that the work is the same for every curve.

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
from jax.scipy.special import ndtr

EXPONENTS = (0.25, 0.5, 1.0, 2.0)
STRETCHINGS = (0.5, 1.0, 2.0)
HILLS = (1.5, 2.0)
RATES = 8
FEWEST = 4
NOISE = 0.03


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
    """Curves that fall to 0, at stretches 1, 2, ...: f64[shapes, stretches].

    Powers `(1 + t / d) ** -c`, the inverse logarithm, exponentials `exp(-(t / d) ** s)` and Hill curves
    `1 / (1 + (t / d) ** s)`.
    """
    t = np.arange(1, stretches + 1, dtype=float)
    distances = np.geomspace(0.5, max(2.0 * stretches, 1.0), RATES)
    powers = [(1 + t / d) ** -c for c in EXPONENTS for d in (1e-3, *distances[::2])]
    exponentials = [np.exp(-((t / d) ** s)) for s in STRETCHINGS for d in distances]
    hills = [1 / (1 + (t / d) ** s) for s in HILLS for d in distances]
    return np.stack([*powers, 1 / np.log(1 + t), *exponentials, *hills])


@functools.lru_cache(maxsize=32)
def _fits(stretches: int) -> Fits:
    shape = shapes(stretches)
    points = np.arange(1, stretches + 1)[:, None]
    middle = np.cumsum(shape.T, axis=0) / points
    squares = np.array([((shape[:, :n] - middle[n - 1][:, None]) ** 2).sum(1) for n in range(1, stretches + 1)])
    # A shape that is level over the points says nothing about them; the noise below keeps it from the others' weight.
    return Fits(shape, middle, np.sqrt(np.maximum(squares, 1e-12)))


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
    middle = losses.sum(1) / n
    off = jnp.where(known, losses - middle[:, None], 0)
    at = jnp.maximum(reached, 1) - 1
    base, norm = fits.middle[at], fits.norm[at]
    unit = jnp.where(known[:, None], (fits.shapes - base[..., None]) / norm[..., None], 0)
    slope = (unit * off[:, None]).sum(-1)
    rest = ((off[:, None] - slope[..., None] * unit) ** 2).sum(-1)
    total = (off**2).sum(1)
    # No grid has the very shape of a curve: without some noise a smooth curve would make one shape certain.
    rest = jnp.maximum(rest + NOISE**2 * total[:, None], jnp.finfo(dtype).tiny)
    freedom = jnp.maximum(n - 2, 1)
    # The flat prior is on the slope in units of the norm, so that no shape has a larger prior than another.
    weight = jax.nn.softmax(-freedom[:, None] / 2 * jnp.log(rest), axis=1)
    reach = (fits.shapes[:, -1] - base) / norm
    scale = jnp.sqrt(rest / freedom[:, None] * (1 + 1 / n[:, None] + reach**2))
    return Forecast(weight, middle[:, None] + slope * reach, scale, freedom)


def student(t: jax.Array, freedom: jax.Array) -> jax.Array:
    """The distribution function of Student's t by Wallace's approximation, to about 0.01."""
    scaled = jnp.sqrt(freedom * jnp.log1p(t**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return ndtr(jnp.sign(t) * scaled)


def chance_below(forecast: Forecast, loss: jax.Array) -> jax.Array:
    """The probability that the last loss is below `loss`, float[]: float[rows]."""
    t = (loss - forecast.center) / forecast.scale
    return (forecast.weight * student(t, forecast.freedom[:, None])).sum(1)


def expected(forecast: Forecast) -> jax.Array:
    """The last loss that is expected: float[rows]."""
    return (forecast.weight * forecast.center).sum(1)
