"""What a surrogate is fitted to: losses with a tail of any weight, brought to mean 0 and standard deviation 1.

The transformation is h(t) = log(1 + a t) / log(1 + a) of t, the distance from the best loss in units of the median's:
nearly linear for small a, a logarithm that looks at the best ones closely for large a. Its Jacobian goes into the
likelihood, so that a is learned with the other hyperparameters.

Reference: Snelson, Rasmussen and Ghahramani (2003), Warped Gaussian processes.
"""

import jax
import jax.numpy as jnp

MOST = 1e12
MOST_TAIL = 10.0
SMALLEST = 2e-6


def distances(losses: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far losses are from the best one, the median being at 1.

    Args:
      losses: float[n].
      mask: bool[n], rows that hold a trial.

    Returns:
      float[n] in [0, 1e12], 0 where there is no finite loss; float[], its derivative by the loss.
    """
    finite = mask & jnp.isfinite(losses)
    number = finite.sum(dtype=jnp.int32)
    lowest = jnp.min(losses, where=finite, initial=jnp.inf)
    gap = jnp.where(finite, losses - jnp.where(number > 0, lowest, 0), 0)
    gap = jnp.minimum(gap, jnp.finfo(losses.dtype).max)
    median = jnp.sort(jnp.where(finite, gap, jnp.inf))[jnp.maximum(number - 1, 0) // 2]
    largest = gap.max()
    scale = jnp.where((median > 0) & (number > 0), median, jnp.where(largest > 0, largest, 1))
    # A quotient may be computed as a product with the inverse, which must be a normal number of the dtype.
    unit = jnp.where(scale > 1, 2.0**-60, 2.0**60).astype(losses.dtype)
    return jnp.minimum(gap * unit / (scale * unit), MOST), unit / (scale * unit)


def transformed(distance: jax.Array, finite: jax.Array, mask: jax.Array, log_tail: jax.Array) -> tuple:
    """Targets and the logarithm of the Jacobian.

    Args:
      distance: float[n], from `distances`.
      finite: bool[n], rows with a finite loss; the others that hold a trial count as the worst of these.
      mask: bool[n], rows that hold a trial.
      log_tail: float[], log a.

    Returns:
      float[n], 0 where there is no trial; float[n], log of the derivative by `distance`, 0 where the loss is not
      finite or ties with the best one.
    """
    a = jnp.exp(jnp.clip(log_tail, -MOST_TAIL, MOST_TAIL))
    whole = jnp.log1p(a)
    value = jnp.log1p(a * distance) / whole
    value = jnp.where(finite, value, jnp.where(finite, value, 0).max())
    number = jnp.maximum(mask.sum(), 1)
    value = jnp.where(mask, value - jnp.where(mask, value, 0).sum() / number, 0)
    spread = jnp.sqrt(jnp.maximum((value**2).sum() / number, SMALLEST**2))
    spread = jnp.where(spread > SMALLEST, spread, 1)
    log_slope = jnp.log(a / whole) - jnp.log1p(a * distance) - jnp.log(spread)
    # Many that tie with the best one would prefer a without a bound: they count once.
    best = jnp.arange(distance.shape[0]) == jnp.argmin(jnp.where(finite, distance, jnp.inf))
    return value / spread, jnp.where(finite & ((distance > 0) | best), log_slope, 0)
