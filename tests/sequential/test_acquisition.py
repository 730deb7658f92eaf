"""Acquisition functions against numerical integration, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import log_ndtr
from scipy.stats import norm

from jaxhpo.sequential.acquisition import ACQUISITIONS, ensemble, log_below, log_ei, log_h, pi, ucb

Z = np.array([10.0, 5.0, 2.0, 1.0, 0.3, 0.0, -0.5, -0.999, -1.0, -1.001, -1.7, -3.0, -5.5, -8.0, -13.0, -21.0, -30.0])
EDGES = np.array([-1e6, -1e4, -30.0, -1.0, 0.0, 10.0])


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


def log_of_integral(z, power):
    """log of the integral of t^power phi(t - z) over t > 0, its exponent kept out of the integral."""
    scale = max(z, 0.0) ** 2 / 2
    integral, _ = quad(lambda t: t**power * np.exp(-t * t / 2 + z * t - scale), 0, max(z, 0) + 40 / (1 + max(-z, 0)))
    return np.log(integral) + scale - z * z / 2 - np.log(2 * np.pi) / 2


@pytest.mark.parametrize("function, power", [(log_h, 1), (log_below, 0)])
def test_the_logarithms_are_those_of_numerical_integration(dtype, function, power):
    wanted = np.array([log_of_integral(z, power) for z in Z])
    found = np.asarray(jax.jit(function)(jnp.asarray(Z, dtype)))
    assert found.dtype == dtype
    if dtype == np.float64:
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    else:
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


def test_the_gradients_are_those_of_the_paper_however_far_the_point_is(dtype):
    z = jnp.asarray(EDGES, dtype)
    for function in (log_h, log_below):
        value, slope = jax.jit(jax.vmap(jax.value_and_grad(function)))(z)
        assert np.isfinite(value).all() and np.isfinite(slope).all() and (slope > 0).all()
        np.testing.assert_allclose(jax.jvp(function, (z,), (jnp.ones_like(z),))[1], slope, rtol=1e-6)
        # Asymptotic series of the Mills ratio, in its terms for a far tail: the slope is x + 2/x, or x + 1/x.
        extra = 2 if function is log_h else 1
        np.testing.assert_allclose(slope[:2], -EDGES[:2] - extra / EDGES[:2], rtol=1e-6)
    wanted = np.exp(log_ndtr(EDGES[2:]) - [log_of_integral(v, 1) for v in EDGES[2:]])
    np.testing.assert_allclose(jax.vmap(jax.grad(log_h))(z)[2:], wanted, rtol=1e-5 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("function", [log_ei, pi, ucb])
def test_the_gradients_agree_with_finite_differences(function):
    with jax.enable_x64(True):
        mean, std = (x.ravel() for x in jnp.meshgrid(jnp.linspace(-8.0, 40.0, 23), jnp.array([0.3, 1.0, 4.0])))
        exploration, step = jnp.full(mean.shape, 0.2), 1e-6
        arguments = (mean, std, jnp.full(mean.shape, 0.7), exploration)
        gradients = jax.jit(jax.vmap(jax.grad(function, argnums=(0, 1, 2, 3))))(*arguments)
        for i, found in enumerate(gradients):
            moved = [[x + side * step * (i == j) for j, x in enumerate(arguments)] for side in (1, -1)]
            difference = (function(*moved[0]) - function(*moved[1])) / (2 * step)
            np.testing.assert_allclose(found, difference, rtol=1e-6, atol=1e-7)
        second = jax.vmap(jax.hessian(function))(*arguments)
        assert np.isfinite(second).all()


def test_a_value_by_hand():
    mean, std, best, margin = 0.4, 0.5, 0.2, 0.1
    z = (best - margin - mean) / std
    expected = std * (norm.pdf(z) + z * norm.cdf(z))
    np.testing.assert_allclose(log_ei(mean, std, best, margin), np.log(expected), rtol=1e-6)
    np.testing.assert_allclose(pi(mean, std, best, margin), norm.logcdf(z), rtol=1e-6)
    np.testing.assert_allclose(ucb(mean, std, best, 3.0), 3 * 0.5 - 0.4, rtol=1e-6)


def test_points_are_told_apart_where_the_expected_improvement_underflows(dtype):
    mean = jnp.asarray([1e5, 1e3, 200.0, 150.0, 100.0, 60.0, 45.0], dtype)
    z = -np.asarray(mean, dtype)
    with np.errstate(divide="ignore"):
        plain = np.log((norm.pdf(z) + z * norm.cdf(z)).astype(dtype))
    assert not np.isfinite(plain[:5]).any()
    for function in (log_ei, pi):
        value = np.asarray(function(mean, 1.0, 0.0))
        assert np.isfinite(value).all() and (np.diff(value) > 0).all()
        assert (np.asarray(jax.vmap(jax.grad(function), (0, None, None))(mean, 1.0, 0.0)) < -40).all()


def test_of_two_points_with_one_mean_the_less_certain_is_better():
    std = jnp.array([0.1, 0.5, 2.0])
    for name, acquisition in ACQUISITIONS.items():
        value = np.asarray(acquisition.value(1.0, std, 0.0, acquisition.exploration))
        assert (np.diff(value) > 0).all(), name


def test_an_ensemble_has_the_mean_of_the_improvements_not_of_their_logarithms():
    mean, std = jnp.array([[0.0, 1.0, 20.0], [2.0, 1.5, 9.0]]), jnp.array([[1.0, 0.5, 1.0], [0.2, 3.0, 2.0]])
    for name, exact in (("log_ei", True), ("pi", True), ("ucb", False)):
        values = ACQUISITIONS[name].value(mean, std, 0.0, 1.0)
        wanted = np.log(np.exp(np.asarray(values, float)).mean(0)) if exact else np.asarray(values).mean(0)
        np.testing.assert_allclose(ensemble(name, values), wanted, rtol=1e-5)
        np.testing.assert_allclose(ensemble(name, values.T, axis=1), wanted, rtol=1e-5)
        np.testing.assert_allclose(ensemble(name, values[None], axis=(0, 1)), wanted, rtol=1e-5)
    alone = log_ei(jnp.array([[1e4], [1e5]]), 1.0, 0.0)
    np.testing.assert_allclose(ensemble("log_ei", alone), alone[0] - np.log(2), rtol=1e-6)
