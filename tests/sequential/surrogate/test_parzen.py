"""Parzen estimators against SciPy's distributions, one point, kernel and dim at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm, truncnorm

import jaxhpo as hpo
from jaxhpo.draws import bits, uniform
from jaxhpo.sequential.surrogate.parzen import (
    Mixture,
    cells,
    features,
    layout,
    log_densities,
    log_density,
    neighbours,
    sample,
    spread,
)
from jaxhpo.variation import snapped

SPACES = {
    "mixed": {
        "x": hpo.Float(-1.0, 1.0),
        "n": hpo.Int(1, 300, log=True),
        "few": hpo.Int(1, 9, log=True),
        "kind": hpo.Categorical(("a", "b", "c")),
        "size": hpo.Ordinal((16, 64)),
    },
    "conditional": {
        "how": hpo.OneOf(
            one={"a": hpo.Float(0.0, 1.0), "deep": hpo.OneOf(no={}, yes={"b": hpo.Float(0.0, 1.0)})}, two={}
        ),
        "y": hpo.Float(0.0, 1.0),
    },
}


def mixture_of(space, n, seed=0):
    """Random kernels, one of them without a weight."""
    rng = np.random.default_rng(seed)
    unit = snapped(space, jnp.asarray(rng.uniform(size=(n, space.dims)), jnp.float32))
    weight = jnp.asarray(rng.uniform(0.2, 1.0, n), jnp.float32).at[1].set(0)
    width = jnp.asarray(rng.uniform(0.05, 0.5, (n, space.dims)), jnp.float32)
    return Mixture(unit, space.active(unit), width, weight, jnp.float32(0.7))


def kernel(space, d, x, mean, width):
    """The density of one kernel in one dim, relative to the uniform one."""
    levels = space.levels[d]
    if space.categorical[d]:
        return width + (1 - width) * levels * (int(x * levels) == int(mean * levels))
    cut = truncnorm(-mean / width, (1 - mean) / width, mean, width)
    if levels == 0 or levels > 16:
        return cut.pdf(x)
    low, high = EDGES[space.names[d]](levels, x)
    return (cut.cdf(high) - cut.cdf(low)) / (high - low)


def even(levels, x):
    k = int(x * levels)
    return k / levels, (k + 1) / levels


def log_even(levels, x):
    """Of the integers 1 to 9: each has the share of the reals that round to it, in the logarithm."""
    bounds = np.log(np.arange(0.5, levels + 1) / 0.5) / np.log((levels + 0.5) / 0.5)
    k = np.searchsorted(bounds, x) - 1
    return bounds[k], bounds[k + 1]


EDGES = {"few": log_even, "size": even}


def expected(space, points, mixture, joint):
    points, live = np.asarray(points, float), np.asarray(space.active(points))
    unit, known, width, weight = (np.asarray(x, float) for x in mixture[:4])
    prior, out = float(mixture.prior), np.zeros(points.shape)
    for c, x in enumerate(points):
        k = np.ones((len(unit), space.dims))
        for i in range(len(unit)):
            for d in range(space.dims):
                if known[i, d] and (live[c, d] or not joint):
                    k[i, d] = kernel(space, d, x[d], unit[i, d], width[i, d])
        share = weight[:, None] * (1 if joint else known)
        k = k.prod(1, keepdims=True) if joint else k
        out[c] = ((share * k).sum(0) + prior) / (share.sum(0) + prior)
    return np.log(out[:, :1] if joint else out)


@pytest.mark.parametrize("name", SPACES)
def test_densities_are_those_of_numpy(name):
    space = hpo.Space(SPACES[name])
    mixture = mixture_of(space, 6)
    points = snapped(space, jnp.asarray(np.random.default_rng(1).uniform(size=(12, space.dims)), jnp.float32))
    live = space.active(points)
    joint = jax.jit(lambda x: log_density(space, features(space, x, live), mixture))(points)
    np.testing.assert_allclose(joint, expected(space, points, mixture, True), atol=2e-5, rtol=2e-5)
    every = jnp.ones(points.shape, bool)
    single = jax.jit(lambda x: log_densities(space, features(space, x, every), mixture))(points)
    np.testing.assert_allclose(single, expected(space, points, mixture, False), atol=2e-5, rtol=2e-5)
    assert np.abs(np.asarray(joint)[:, 0] - np.asarray(single).sum(1)).max() > 0.1


def test_dims_of_few_levels_and_options_have_tables():
    space = hpo.Space(SPACES["mixed"])
    at = layout(space)
    names = np.array(space.names)
    assert set(names[at.smooth]) == {"x", "n"}
    assert {name: int((names[at.dim] == name).sum()) for name in names[np.unique(at.dim)]} == {
        "few": 9,
        "kind": 3,
        "size": 2,
    }


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("joint", [True, False])
def test_samples_follow_the_density(name, joint):
    space, n = hpo.Space(SPACES[name]), 40_000
    mixture = mixture_of(space, 4, seed=3)
    key_u, key_which = jax.random.split(jax.random.key(0))
    u, which = uniform(bits(key_u, (n, space.dims))), uniform(bits(key_which, (n, 1 if joint else space.dims)))
    drawn = sample(space, mixture, u, which)
    live = space.active(drawn)
    # The mean of 1 / density over samples is the share of the space in which the density is not 0, which is all of it.
    point = features(space, drawn, live if joint else jnp.ones_like(live))
    density = log_density(space, point, mixture) if joint else log_densities(space, point, mixture)
    inverse = np.exp(-np.asarray(density, float).sum(1)) if joint else np.exp(-np.asarray(density, float))
    error = inverse.std(0) / np.sqrt(n)
    # A dim of many levels has its density at the middle of a level.
    np.testing.assert_allclose(inverse.mean(0), 1, atol=float(np.max(5 * error)) + 2e-3)
    np.testing.assert_array_equal(drawn, snapped(space, drawn))


def test_cells_are_the_widths_of_levels():
    space = hpo.Space({"a": hpo.Float(0, 1), "k": hpo.Int(1, 4), "n": hpo.Int(1, 3, log=True)})
    width = cells(space, jnp.array([[0.3, 0.9, 0.1], [0.3, 0.1, 0.99]]))
    total = np.log(7)
    np.testing.assert_allclose(width, [[0, 0.25, np.log(3) / total], [0, 0.25, np.log(7 / 5) / total]], rtol=1e-5)


def test_neighbours_are_the_larger_distances():
    x = jnp.array([0.5, 0.1, 0.9, 0.2, 0.0])[:, None]
    counts = jnp.array([True, True, True, True, False])[:, None]
    np.testing.assert_allclose(neighbours(x, counts)[:4, 0], [0.4, 0.1, 0.4, 0.3], rtol=1e-6)
    np.testing.assert_allclose(neighbours(x[:1], counts[:1]), [[0.5]])
    np.testing.assert_allclose(neighbours(jnp.array([[0.3], [0.3]]), counts[:2]), [[0], [0]])


def test_spread_shrinks_with_the_number_of_points():
    x = jnp.array([[0.1, 0.2], [0.5, 0.9], [0.6, 0.4]])
    counts, weight = jnp.array([[True, True], [True, False], [True, True]]), jnp.array([1.0, 1.0, 2.0])
    mean = (0.1 + 0.5 + 1.2) / 4
    deviation = np.sqrt(((0.1 - mean) ** 2 + (0.5 - mean) ** 2 + 2 * (0.6 - mean) ** 2) / 4)
    np.testing.assert_allclose(spread("scott", x, counts, weight)[0, 0], 1.059 * deviation * 3 ** (-1 / 6), rtol=1e-5)
    np.testing.assert_allclose(
        spread("dimensions", x, counts, weight)[0], [0.2 * 3 ** (-1 / 6), 0.2 * 2 ** (-1 / 6)], rtol=1e-5
    )


def test_a_kernel_far_away_is_no_infinity():
    space = hpo.Space({"k": hpo.Int(0, 9), "x": hpo.Float(0, 1)})
    one = jnp.ones(1)
    mixture = Mixture(jnp.array([[0.05, 0.0]]), jnp.ones((1, 2), bool), jnp.full((1, 2), 0.01), one, jnp.float32(1e-3))
    point = features(space, jnp.array([[0.95, 1.0]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(log_density(space, point, mixture)[0, 0], np.log(1e-3 / 1.001), rtol=1e-5)
    assert norm.sf(90) == 0
