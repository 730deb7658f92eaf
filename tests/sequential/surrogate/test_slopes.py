"""Derivatives in Gaussian processes: against automatic differentiation and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxhpo as hpo
from jaxhpo.sequential.surrogate import slopes
from jaxhpo.sequential.surrogate.kernel import Covariance, covariance, geometry

SPACE = hpo.Space({"x": hpo.Array(3, 0.0, 1.0), "kind": hpo.Categorical(("a", "b"))})
REALS = np.flatnonzero(SPACE.levels == 0)
CAT = int(np.flatnonzero(SPACE.levels)[0])


def test_covariances_are_the_derivatives_of_the_covariance():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        p = Covariance(jnp.asarray(rng.normal(size=4) * 0.3), jnp.asarray(0.2))
        a, b = (jnp.asarray(rng.random((n, 4))).at[:, CAT].set(rng.integers(0, 2, n) / 2 + 0.25) for n in (4, 3))

        def value(x, y):
            return covariance(p, geometry(SPACE, x[None], y[None]))[0, 0]

        pairs = lambda f: jax.jit(jax.vmap(lambda x: jax.vmap(lambda y: f(x, y))(b)))(a)  # noqa: E731
        whole = jax.jit(functools.partial(slopes.covariance, SPACE))(
            p,
            jnp.concatenate([slopes.valued(a), slopes.along(a, REALS)]),
            jnp.concatenate([slopes.valued(b), slopes.along(b, REALS)]),
        )
        n, m, k = 4, 3, len(REALS)
        np.testing.assert_allclose(whole[:n, :m], pairs(value), rtol=1e-12)
        left = pairs(jax.grad(value))[..., REALS]
        np.testing.assert_allclose(whole[n:, :m].reshape(n, k, m), left.transpose(0, 2, 1), rtol=1e-9, atol=1e-12)
        right = pairs(jax.grad(value, argnums=1))[..., REALS]
        np.testing.assert_allclose(whole[:n, m:].reshape(n, m, k), right, rtol=1e-9, atol=1e-12)
        both = pairs(jax.jacfwd(jax.grad(value), argnums=1))[:, :, REALS][..., REALS]
        expected = both.transpose(0, 2, 1, 3)
        np.testing.assert_allclose(whole[n:, m:].reshape(n, k, m, k), expected, rtol=1e-6, atol=1e-9)


def test_a_gram_matrix_of_values_and_slopes_is_positive_definite():
    unit = SPACE.sample(jax.random.key(0), 6).at[:, CAT].set(0.25)
    p = Covariance(jnp.log(jnp.full(4, 0.6)), jnp.log(0.5))
    x = jnp.concatenate([slopes.valued(unit), slopes.along(unit, REALS)])
    matrix = slopes.covariance(SPACE, p, x, x)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-4, atol=1e-5)
    assert np.linalg.eigvalsh(np.asarray(matrix, float)).min() > 0
    own = jnp.diagonal(matrix)[6:] - slopes.covariance(SPACE, p._replace(log_trend=-80.0), x, x).diagonal()[6:]
    size = slopes.size(p, x)
    np.testing.assert_allclose(jnp.diagonal(matrix)[6:] - own, size[6:], rtol=1e-4)


def test_gradients_by_the_unit_cube():
    space = hpo.Space(
        {
            "lr": hpo.Float(1e-4, 1.0, log=True),
            "n": hpo.Int(1, 8),
            "x": hpo.Array(2, -5.0, 5.0),
            "opt": hpo.OneOf(sgd={"momentum": hpo.Float(0.0, 0.9)}, adam={}),
        }
    )
    unit = space.sample(jax.random.key(1), 5) * 0.9 + 0.05

    def loss(h):
        return jnp.log(h["lr"]) ** 2 + (h["x"] ** 2).sum(-1) + 3 * h["opt"]["sgd"]["momentum"] + h["n"]

    h = space.decode(unit)
    gradients = jax.tree.map(jnp.zeros_like, h)
    gradients = {**gradients, "lr": 2 * jnp.log(h["lr"]) / h["lr"], "x": 2 * h["x"]}
    gradients["opt"] = {**gradients["opt"], "sgd": {"momentum": jnp.full(5, 3.0)}}
    got = slopes.by_unit(space, unit, gradients)
    step = 1e-3 * np.eye(space.dims, dtype=np.float32)
    for d, name in enumerate(space.names):
        finite = (loss(space.decode(unit + step[d])) - loss(space.decode(unit - step[d]))) / 2e-3
        expected = np.zeros(5) if space.levels[d] else finite
        np.testing.assert_allclose(got[:, d], expected, rtol=2e-2, atol=2e-2, err_msg=name)
