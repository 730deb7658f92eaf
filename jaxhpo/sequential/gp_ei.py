"""Gaussian processes and the expected improvement: Bayesian optimization as it is most often meant.

Jones, Schonlau and Welch (1998), Efficient global optimization of expensive black-box functions.
"""

from jaxhpo.method import Method, PyTree
from jaxhpo.sequential.bayesian import bayesian


def gp_ei(
    space: PyTree,
    *,
    startup: int | None = None,
    lengthscale: float = 0.3,
    noise: float = 1e-4,
    trend: float = 1.0,
    tail: float = 1.0,
    input_warping: bool = False,
    gradients: bool = False,
    batch: int = 1,
) -> Method:
    """Bayesian optimization with an ensemble of Gaussian processes and the logarithm of the expected improvement.

    The method of choice for up to a few hundred trials that cost more than the ask, about 10 ms. All arguments and all
    that stands behind them are those of `bayesian`.

    Args:
      space: a pytree of parameters, or a `Space`.
      startup: trials of the random design that comes first, at least 1.
      lengthscale: median of the prior of lengthscales over the square root of the number of dims, above 0.
      noise: median of the prior of the variance of the noise, above 0.
      trend: median of the prior of the variance of the quadratic trend, above 0.
      tail: median of the prior of how much the tail of the losses is drawn in, above 0.
      input_warping: whether the models learn to bend the unit interval of each dim.
      gradients: whether the objective is differentiable, and the models observe its slopes.
      batch: trials per ask, of any size.

    Returns:
      A `Method` whose settings are those of `bayesian`.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = {"x": hpo.Array(3, -5.0, 5.0)}
      >>> objective = lambda key, hparams: ((hparams["x"] - 1) ** 2).sum()
      >>> hpo.minimize(objective, hpo.gp_ei(space, batch=2), key=jax.random.key(0), trials=40).best_loss < 1e-2
      True

    Reference:
      Jones, Schonlau and Welch (1998), Efficient global optimization of expensive black-box functions. Ament et al.
      (2023), Unexpected improvements to expected improvement for Bayesian optimization.
    """
    method = bayesian(
        space,
        startup=startup,
        lengthscale=lengthscale,
        noise=noise,
        trend=trend,
        tail=tail,
        input_warping=input_warping,
        gradients=gradients,
        batch=batch,
    )
    return method._replace(name="gp_ei")
