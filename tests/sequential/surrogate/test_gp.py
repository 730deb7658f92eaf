"""Gaussian processes: against scikit-learn's, closed forms and finite differences."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

import jaxhpo as hpo
from jaxhpo.sequential.surrogate import ensemble, gp
from jaxhpo.sequential.surrogate.kernel import Covariance, covariance, features, geometry, matern, matern_slope
from jaxhpo.sequential.surrogate.targets import distances, transformed

REAL = hpo.Space({"x": hpo.Array(3, 0.0, 1.0)})
MIXED = hpo.Space(
    {
        "lr": hpo.Float(1e-4, 1.0, log=True),
        "width": hpo.Int(1, 4),
        "act": hpo.Categorical(("relu", "gelu", "silu")),
        "opt": hpo.OneOf(sgd={"momentum": hpo.Float(0.0, 1.0)}, adam={}),
    }
)
LENGTHSCALES, NOISE = np.array([0.3, 0.8, 1.7]), 1e-3


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """The working dtype, and how close numbers must be."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def parameters(space=REAL, lengthscales=LENGTHSCALES, noise=NOISE, trend=1e-30, tail=1e-4, bends=0):
    """Hyperparameters of one model."""
    like = functools.partial(jnp.asarray, dtype=jnp.result_type(float))
    cov = Covariance(like(np.log(lengthscales)), like(math.log(trend)))
    return gp.Parameters(cov, like(math.log(noise)), like(math.log(tail)), like(np.zeros((bends, space.dims))))


def one(tree):
    """An ensemble of one."""
    return jax.tree.map(lambda x: x[None], tree)


def problem(n=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, 3))
    return x, np.sin(5 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.05 * rng.standard_normal(n), rng.random((7, 3))


def posterior_of(x, targets, mask=None, **kwargs):
    """The posterior after observations, their targets given."""
    mask = jnp.ones(len(x), bool) if mask is None else mask
    x = jnp.asarray(x, jnp.result_type(float))
    return conditioned(one(parameters(**kwargs)), x, jnp.asarray(targets, x.dtype)[None], mask)


@jax.jit
def conditioned(p, x, targets, mask):
    data = gp.data_of(x, jnp.zeros(len(x), x.dtype), mask, geometry(REAL, x, x))
    return gp.conditioned(p, gp.factors(REAL, p, data), data, targets)


predict = jax.jit(functools.partial(gp.predict, REAL))
fantasized = jax.jit(functools.partial(gp.fantasized, REAL))
updated = jax.jit(functools.partial(gp.updated, REAL))
extended = jax.jit(functools.partial(gp.extended, REAL))


def test_posterior_is_that_of_scikit_learn(dtype):
    x, y, candidates = problem()
    kernel = Matern(length_scale=LENGTHSCALES, nu=2.5) + WhiteKernel(NOISE + gp.JITTER[np.dtype(dtype).itemsize])
    peer = GaussianProcessRegressor(kernel, optimizer=None, alpha=0.0).fit(x, y)
    mean, std = peer.predict(candidates, return_std=True)
    noise = NOISE + gp.JITTER[np.dtype(dtype).itemsize]
    posterior = posterior_of(x, y)
    prediction = predict(posterior, jnp.asarray(candidates, jnp.result_type(float)))
    rtol = 1e-4 if dtype == "float32" else 1e-8
    np.testing.assert_allclose(prediction.mean[0], mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(prediction.variance[0], std**2 - noise, rtol=rtol, atol=rtol)
    scale = (1 + y @ peer.alpha_ / 2) / (1 + len(y) / 2)
    np.testing.assert_allclose(posterior.scale[0], scale, rtol=10 * rtol)


def test_evidence_is_the_integral_of_that_of_scikit_learn_over_the_scale(dtype):
    x, y, _ = problem(20)
    noise = NOISE + gp.JITTER[np.dtype(dtype).itemsize]
    kernel = ConstantKernel(1.0) * Matern(length_scale=LENGTHSCALES, nu=2.5) + WhiteKernel(noise)
    peer = GaussianProcessRegressor(kernel, optimizer=None, alpha=0.0).fit(x, y)

    def joint(log_scale):
        theta = peer.kernel_.theta.copy()
        theta[0], theta[-1] = log_scale, math.log(noise) + log_scale
        prior = stats.invgamma(gp.SHAPE, scale=gp.RATE).logpdf(math.exp(log_scale))
        return peer.log_marginal_likelihood(theta, clone_kernel=True) + prior + log_scale

    top = max(joint(v) for v in np.linspace(-4, 4, 81))
    expected = top + math.log(integrate.quad(lambda v: math.exp(joint(v) - top), -6, 6, epsabs=0, epsrel=1e-10)[0])
    data = gp.data_of(jnp.asarray(x, jnp.result_type(float)), jnp.zeros(20), jnp.ones(20, bool), None)
    matrix = gp.gram(REAL, parameters(), data)
    got = gp.log_marginal_likelihood(matrix, jnp.asarray(y, matrix.dtype), jnp.asarray(20.0, matrix.dtype))
    constant = special.gammaln(gp.SHAPE + 10) - special.gammaln(gp.SHAPE) - 10 * math.log(2 * math.pi)
    constant += gp.SHAPE * math.log(gp.RATE)
    np.testing.assert_allclose(got + constant, expected, rtol=1e-4 if dtype == "float32" else 1e-8)


def test_gradient_of_the_log_posterior_is_that_of_finite_differences():
    with jax.enable_x64(True):
        x, y, _ = problem(12)
        losses = jnp.asarray(y).at[3].set(jnp.nan)
        mask = jnp.arange(12) < 10
        for bends in (False, True):
            prior = gp.prior_of(REAL, 0.5, 1e-4, 1.0, 1.0, bends)
            white = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.3), prior.mean)
            between = None if bends else geometry(REAL, jnp.asarray(x), jnp.asarray(x))
            data = gp.data_of(jnp.asarray(x), losses, mask, between)
            flat, back = jax.flatten_util.ravel_pytree(white)
            density = jax.jit(lambda v, back=back, prior=prior, data=data: gp.log_posterior(REAL, prior, data, back(v)))
            slope = jax.grad(density)(flat)
            step = 1e-5 * np.eye(flat.size)
            finite = [(density(flat + h) - density(flat - h)) / 2e-5 for h in step]
            assert flat.size == 6 + 6 * bends
            np.testing.assert_allclose(slope, finite, rtol=1e-5, atol=1e-6)


def test_kernel_is_that_of_numpy_on_mixed_and_conditional_points():
    unit = np.random.default_rng(1).random((9, MIXED.dims)).astype(np.float32)
    names = [MIXED.names.index(n) for n in ("lr", "width", "act", "opt", "opt.sgd.momentum")]
    lengthscales = np.array([0.3, 0.5, 0.9, 1.3, 0.4])
    seen = features(MIXED, jnp.asarray(unit))
    got = covariance(Covariance(jnp.log(lengthscales[np.argsort(names)]), jnp.log(0.7)), geometry(MIXED, seen, seen))
    lr, width, act, opt, momentum = (unit[:, i].astype(float) for i in names)
    width, act, opt = np.floor(width * 4), np.floor(act * 3), np.floor(opt * 2)
    width, momentum = (width + 0.5) / 4, np.where(opt == 0, momentum, 0.5)
    apart = lambda v: v[:, None] - v[None, :]  # noqa: E731
    parts = apart(lr), apart(width), apart(act) != 0, apart(opt) != 0, apart(momentum)
    q = sum((d / scale) ** 2 for d, scale in zip(parts, lengthscales, strict=True))
    u = np.sqrt(5 * q)
    z = 2 * np.stack([lr, width, momentum], 1) - 1
    expected = (1 + u + u**2 / 3) * np.exp(-u) + 0.7 * ((1 + z @ z.T) / 4) ** 2
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_matern_has_its_derivatives_also_at_zero():
    q = jnp.array([0.0, 1e-6, 0.1, 1.0, 9.0])
    np.testing.assert_allclose(jax.vmap(jax.grad(matern))(q), matern_slope(q), rtol=1e-6)
    assert float(jax.grad(matern)(0.0)) == pytest.approx(-5 / 6)
    assert float(jax.grad(jax.grad(matern))(0.0)) == pytest.approx(25 / 12, rel=1e-4)
    step = 1e-2
    second = (matern_slope(q[2:] + step) - matern_slope(q[2:] - step)) / (2 * step)
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(matern)))(q[2:]), second, rtol=5e-3)


def test_a_factor_that_grows_is_the_whole_one(dtype):
    x, y, candidates = problem(12)
    x, y = (jnp.asarray(v, jnp.result_type(float)) for v in (x, y))
    whole = posterior_of(x, y, trend=0.5)
    mask = jnp.arange(12) < 9
    part = posterior_of(x, jnp.where(mask, y, 0), mask, trend=0.5)
    w = part.w
    for i in (9, 10, 11):
        row, _ = extended(part.parameters, x, jnp.arange(12) < i, w, jnp.int32(i), x[i])
        w = w.at[:, i].set(row)
    np.testing.assert_allclose(w, whole.w, rtol=1e-3 if dtype == "float32" else 1e-9, atol=1e-3)
    del candidates


def test_a_fantasy_is_an_observation_of_what_was_drawn(dtype):
    x, y, candidates = problem(12)
    x, y, c = (jnp.asarray(v, jnp.result_type(float)) for v in (x, y, candidates))
    tight = 2e-3 if dtype == "float32" else 1e-8
    before = gp.widened(posterior_of(x, y), 2)
    guess = predict(before, c)
    after, row = fantasized(before, jnp.int32(12), c[0], jnp.array([0.7], c.dtype), jnp.array(True))
    noisy = guess.variance[0, 0] + gp.nugget(parameters())
    drawn = guess.mean[0, 0] + 0.7 * jnp.sqrt(before.scale[0] * noisy)
    expected = posterior_of(jnp.concatenate([x, c[:1]]), jnp.append(y, drawn))
    a, b = predict(after, c), predict(expected, c)
    quick = updated(after, guess, c, row, jnp.int32(12))
    for got in (a, quick):
        np.testing.assert_allclose(got.mean, b.mean, rtol=tight, atol=tight)
        np.testing.assert_allclose(got.variance, b.variance, rtol=tight, atol=tight)
    assert float(after.best[0]) == pytest.approx(min(float(before.best[0]), float(drawn)), rel=1e-4)
    same, _ = fantasized(before, jnp.int32(12), c[0], jnp.array([0.7], c.dtype), jnp.array(False))
    for u, v in zip(jax.tree.leaves(same), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(u, v)


def test_rows_without_a_trial_count_for_nothing():
    x, y, candidates = problem(12)
    few = posterior_of(x[:8], y[:8])
    junk = np.concatenate([x[:8], x[:4]])
    many = posterior_of(junk, np.concatenate([y[:8], np.zeros(4)]), jnp.arange(12) < 8)
    a, b = (predict(p, jnp.asarray(candidates, jnp.float32)) for p in (few, many))
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a.variance, b.variance, rtol=1e-4, atol=1e-5)


def test_targets_and_their_jacobian():
    with jax.enable_x64(True):
        losses = jnp.array([3.0, 1.0, 1.5, jnp.nan, 2.0, 9.0, 1e6])
        mask = jnp.array([True] * 6 + [False])
        far, by_loss = distances(losses, mask)
        np.testing.assert_allclose(far, [2, 0, 0.5, 0, 1, 8, 0])
        assert float(by_loss) == 1
        finite = mask & jnp.isfinite(losses)
        targets, log_slope = transformed(far, finite, mask, jnp.log(4.0))
        value = np.log1p(4 * np.array([2, 0, 0.5, 8, 1, 8])) / np.log(5)
        np.testing.assert_allclose(targets[:6], (value - value.mean()) / value.std(), rtol=1e-12)
        assert targets[6] == 0 and (log_slope[jnp.array([3, 6])] == 0).all()
        slope = 4 / (1 + 4 * np.array([2, 0, 0.5, 1, 8])) / np.log(5) / value.std()
        np.testing.assert_allclose(log_slope[jnp.array([0, 1, 2, 4, 5])], np.log(slope), rtol=1e-12)
        tied = transformed(far.at[4].set(0), finite, mask, jnp.log(4.0))[1]
        assert tied[1] != 0 == tied[4], "what ties with the best one counts once"


@pytest.mark.parametrize(
    "losses", [[2.0] * 4, [1e30, -1e30, 0.0, 5.0], [1e-30, 2e-30, 0.0, 3e-30], [math.nan] * 4, [3e38, -3e38, 0.0, 1.0]]
)
def test_targets_of_any_losses_are_finite(losses):
    losses = jnp.array(losses)
    mask = jnp.ones(4, bool)
    far, _ = distances(losses, mask)
    targets, log_slope = transformed(far, jnp.isfinite(losses), mask, jnp.log(1.0))
    assert jnp.isfinite(targets).all() and jnp.isfinite(log_slope).all()
    assert (jnp.argsort(targets, stable=True) == jnp.argsort(losses, stable=True)).all() or not jnp.isfinite(
        losses
    ).all()
    if len(set(np.nan_to_num(losses).tolist())) > 1:
        assert float(jnp.std(targets)) == pytest.approx(1, rel=1e-4)


def test_representatives_are_the_best_half_and_all_ranks():
    losses = jnp.asarray(np.random.default_rng(0).permutation(100), jnp.float32).at[7].set(jnp.inf)
    mask = jnp.arange(100) != 11
    rows = ensemble.representatives(losses, mask, 20)
    chosen = np.sort(np.asarray(jnp.where(mask, losses, jnp.inf)))
    got = np.sort(np.asarray(losses[rows]))
    assert len(set(rows.tolist())) == 20 and 11 not in rows.tolist()
    np.testing.assert_array_equal(got[:10], chosen[:10])
    assert np.diff(np.searchsorted(chosen, got[10:])).max() <= 9 and got[-1] >= 90


def test_bent_inputs_are_the_distribution_function_of_kumaraswamy():
    p = parameters(bends=2)._replace(log_bend=jnp.log(jnp.array([[2.0, 1.0, 0.5], [3.0, 1.0, 1.5]])))
    x = np.array([[0.2, 0.4, 0.9], [0.0, 0.5, 1.0]])
    expected = 1 - (1 - x ** np.array([2.0, 1.0, 0.5])) ** np.array([3.0, 1.0, 1.5])
    np.testing.assert_allclose(gp.bent(p, jnp.asarray(x, jnp.float32), REAL), expected, atol=2e-5)
