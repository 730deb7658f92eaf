"""Random numbers that cost little."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.draws import bits, two_uniforms, uniform


def test_two_uniforms_are_uniform_and_independent():
    u, v = two_uniforms(jax.random.key(0), (200, 500))
    for x in (u, v):
        counts = np.histogram(x, 10, (0, 1))[0]
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
        assert x.min() > 0 and x.max() < 1
    assert abs(np.corrcoef(u.ravel(), v.ravel())[0, 1]) < 0.011


def test_draws_of_any_shape_are_those_of_one_row():
    key = jax.random.key(3)
    np.testing.assert_array_equal(bits(key, (7, 3)), jax.random.bits(key, (7, 3)))


def test_uniform_numbers_stay_inside():
    ends = uniform(jnp.array([0, 2**32 - 1], jnp.uint32))
    assert 0 < ends[0] < 1e-6 and 1 - 1e-6 < ends[1] < 1
