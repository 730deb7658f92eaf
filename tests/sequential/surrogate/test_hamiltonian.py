"""Hamiltonian Monte Carlo against moments that are known."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.sequential.surrogate.hamiltonian import Chains, advance, start

STD = jnp.array([0.5, 1.0, 2.0])


def density(x):
    """Normal around 1 in `a`; a half-line in `b`, beyond which there is none."""
    outside = jnp.where(x["b"] > 0, -x["b"], -jnp.inf)
    return -(((x["a"] - 1) / STD) ** 2).sum() / 2 + outside


@jax.jit
def run(key):
    chains = start(key, {"a": jnp.zeros(3), "b": jnp.zeros(())}, 64)

    def step(chains, key):
        chains = advance(key, density, chains, 8)
        return chains, (chains.position, chains.log_step)

    return jax.lax.scan(step, chains, jax.random.split(key, 1500))[1]


def test_moments_of_a_normal_and_an_exponential():
    positions, log_step = run(jax.random.key(0))
    a, b = (np.asarray(positions[name])[500:].reshape(1000 * 64, -1) for name in ("a", "b"))
    np.testing.assert_allclose(a.mean(0), 1, atol=0.12)
    np.testing.assert_allclose(a.std(0), STD, rtol=0.06)
    assert b.min() > 0, "chains leave where there is no density, and never come back"
    np.testing.assert_allclose([b.mean(), b.std()], 1, rtol=0.1)
    assert 0.01 < float(jnp.exp(log_step[-1])) < 0.5


def test_a_chain_without_a_density_starts_again():
    chains = start(jax.random.key(0), jnp.zeros(2), 4)._replace(position=jnp.full((4, 2), 50.0))
    after = advance(jax.random.key(1), lambda x: jnp.where(x[0] > 9, jnp.nan, -(x**2).sum()), chains, 3)
    assert isinstance(after, Chains) and (jnp.abs(after.position) < 5).all()
    np.testing.assert_array_equal(after.log_step, chains.log_step)
