"""Low-discrepancy sequences: SciPy's points where nothing is scrambled, and what scrambling must keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import qmc

import jaxhpo as hpo
from jaxhpo.stochastic import quasirandom, random
from jaxhpo.stochastic.quasirandom import (
    Sobol,
    bases,
    directions,
    halton,
    middles,
    scramble_halton,
    scramble_sobol,
    sobol,
    unscrambled_halton,
)

pytestmark = pytest.mark.filterwarnings("ignore:The balance properties of Sobol:UserWarning")


def plain_sobol(dims):
    return Sobol(jnp.asarray(directions(dims)), jnp.zeros(dims, jnp.uint32))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def replicates(sequence, keys, n, dims):
    """The first `n` points for every key."""

    def points(key):
        index = jnp.arange(n)
        if sequence == "sobol":
            return middles(sobol(scramble_sobol(key, jnp.asarray(directions(dims))), index), np.dtype("float32"))
        if sequence == "halton":
            return halton(scramble_halton(key, dims), index, dims)
        return jax.random.uniform(key, (n, dims))

    return jax.vmap(points)(keys)


def drawn(sequence, n, dims, keys):
    """As float64, so that the test's own arithmetic is exact."""
    return np.asarray(replicates(sequence, jax.random.split(jax.random.key(0), keys), n, dims), np.float64)


@pytest.mark.parametrize("dims, n", [(1, 300), (13, 1000), (2000, 64)])
def test_unscrambled_sobol_is_scipys_bit_for_bit(dims, n):
    expected = qmc.Sobol(dims, scramble=False).random(n)
    found = np.asarray(sobol(plain_sobol(dims), jnp.arange(n)), np.float64) / 2**32
    np.testing.assert_array_equal(found, expected)


def test_late_points_of_sobol_are_scipys_too():
    skip = 2**24 - 3
    expected = qmc.Sobol(3, scramble=False, bits=32).fast_forward(skip).random(6)
    found = np.asarray(sobol(plain_sobol(3), skip + jnp.arange(6)), np.float64) / 2**32
    np.testing.assert_array_equal(found, expected)


def test_direction_numbers_generate_every_bit():
    numbers = directions(21201)
    assert numbers.shape == (21201, 32) and numbers.dtype == np.uint32
    # The k-th one has its lowest set bit at the k-th place, so each dim alone is a (0, 1)-sequence.
    lowest = numbers & -numbers.astype(np.int64)
    np.testing.assert_array_equal(lowest, np.broadcast_to(2 ** np.arange(31, -1, -1, dtype=np.int64), lowest.shape))


@pytest.mark.parametrize("dims, n", [(1, 300), (10, 5000), (100, 1000)])
def test_unscrambled_halton_is_scipys(dims, n):
    expected = qmc.Halton(dims, scramble=False).random(n)
    found = halton(unscrambled_halton(dims), jnp.arange(n), dims)
    np.testing.assert_allclose(found, expected, atol=2e-7)
    with jax.enable_x64(True):
        np.testing.assert_allclose(halton(unscrambled_halton(dims), jnp.arange(n), dims), expected, atol=1e-9)


def test_halton_at_the_last_index_of_31_bits():
    index = 2**31 - 1
    expected = [sum(index // int(b) ** k % int(b) / float(b) ** (k + 1) for k in range(31)) for b in bases(5).base]
    assert bases(5).base.tolist() == [2, 3, 5, 7, 11]
    np.testing.assert_allclose(halton(unscrambled_halton(5), jnp.array([index]), 5)[0], expected, atol=2e-7)


def test_scrambled_sobol_fills_every_elementary_interval():
    for points in drawn("sobol", 256, 40, keys=3):
        cells = np.sort((points * 256).astype(int), axis=0)
        np.testing.assert_array_equal(cells, np.broadcast_to(np.arange(256)[:, None], cells.shape))
        for a in range(9):  # the first two dims are a (0, 8, 2)-net
            cell = (points[:, 0] * 2**a).astype(int) * 2 ** (8 - a) + (points[:, 1] * 2 ** (8 - a)).astype(int)
            np.testing.assert_array_equal(np.bincount(cell, minlength=256), 1)


def test_scrambled_halton_fills_every_elementary_interval():
    for points in drawn("halton", 243, 2, keys=3):
        for a, b in ((1, 4), (3, 3), (4, 2), (7, 0), (0, 5)):  # 2^a 3^b points, each in a box of its own
            n = 2**a * 3**b
            cell = (points[:n, 0] * 2**a).astype(int) * 3**b + (points[:n, 1] * 3**b).astype(int)
            np.testing.assert_array_equal(np.bincount(cell, minlength=n), 1)


@pytest.mark.parametrize("sequence", ["sobol", "halton"])
def test_every_point_is_uniform_over_keys(sequence):
    points = drawn(sequence, 7, 3, keys=2000)
    assert points.min() > 0 and points.max() < 1
    np.testing.assert_allclose(points.mean(0), 0.5, atol=4 / np.sqrt(12 * 2000))
    np.testing.assert_allclose(points.var(0), 1 / 12, rtol=0.1)
    counts = np.stack([np.histogram(points[:, i, j], 16, (0, 1))[0] for i in range(7) for j in range(3)])
    np.testing.assert_allclose(counts, 125, atol=4.5 * np.sqrt(125))


def test_middles_are_exact_in_float32():
    bits = jnp.array([0, 2**32 - 1, 2**31], jnp.uint32)
    found = np.asarray(middles(bits, np.dtype("float32")), np.float64)
    np.testing.assert_array_equal(found, [2.0**-24, 1 - 2.0**-24, 0.5 + 2.0**-24])
    with jax.enable_x64(True):
        found = np.asarray(middles(bits, np.dtype("float64")))
    np.testing.assert_array_equal(found, [2.0**-33, 1 - 2.0**-33, 0.5 + 2.0**-33])


@pytest.mark.parametrize(
    "sequence, dims, ratio", [("sobol", 2, 0.05), ("sobol", 6, 0.15), ("halton", 2, 0.05), ("halton", 6, 0.15)]
)
def test_discrepancy_is_far_below_that_of_random_points(sequence, dims, ratio):
    ours, others = (np.mean([qmc.discrepancy(p) for p in drawn(s, 256, dims, keys=16)]) for s in (sequence, "random"))
    scipys = {"sobol": qmc.Sobol, "halton": qmc.Halton}[sequence]
    theirs = np.mean([qmc.discrepancy(scipys(dims, rng=i).random(256)) for i in range(16)])
    assert ours < ratio * others
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("sequence, n, ratio", [("sobol", 256, 0.1), ("sobol", 200, 0.2), ("halton", 200, 0.2)])
def test_integration_error_is_far_below_that_of_random_points(sequence, n, ratio):
    def errors(points):
        return np.prod(points + 0.5, axis=-1).mean(axis=1) - 1  # the integral is 1

    ours, others = (errors(drawn(s, n, 5, keys=64)) for s in (sequence, "random"))
    assert np.sqrt((ours**2).mean()) < ratio * np.sqrt((others**2).mean())
    assert abs(ours.mean()) < 4 * ours.std() / 8


@pytest.mark.parametrize("sequence", ["sobol", "halton"])
def test_asks_walk_the_sequence_whatever_the_batch(sequence):
    space = {"x": hpo.Array(3, 0.0, 1.0)}
    methods = [quasirandom(space, sequence=sequence, batch=batch) for batch in (7, 5)]
    walks = []
    for method in methods:
        ask, state, rows = jax.jit(method.ask), method.init(jax.random.key(4)), []
        for i in range(35 // method.batch):
            trials, state = ask(jax.random.key(i), state)
            rows.append(np.asarray(trials.unit))
        walks.append(np.concatenate(rows))
    np.testing.assert_array_equal(*walks)
    np.testing.assert_allclose(walks[0], replicates(sequence, jax.random.key(4)[None], 35, 3)[0], atol=1e-7)


def test_best_of_a_batch_beats_random_search():
    def mean_best(build):
        method = build({"x": hpo.Array(2, 0.0, 1.0)}, batch=64)

        def study(key):
            target = jax.random.uniform(jax.random.fold_in(key, 2), (2,))
            trials, _ = method.ask(jax.random.fold_in(key, 1), method.init(jax.random.fold_in(key, 0)))
            return jnp.abs(trials.unit - target).max(axis=1).min()

        return float(jax.jit(jax.vmap(study))(jax.random.split(jax.random.key(0), 2000)).mean())

    assert mean_best(quasirandom) < 0.9 * mean_best(random)


def test_thousands_of_dims():
    method = quasirandom({"x": hpo.Array(4000, 0.0, 1.0)}, batch=128)
    trials, _ = jax.jit(method.ask)(jax.random.key(0), jax.jit(method.init)(jax.random.key(0)))
    cells = np.sort((np.asarray(trials.unit) * 128).astype(int), axis=0)
    np.testing.assert_array_equal(cells, np.broadcast_to(np.arange(128)[:, None], cells.shape))


@pytest.mark.parametrize(
    "dims, sequence, message",
    [
        (1, "niederreiter", r"sequence must be one of \['sobol', 'halton'\], got 'niederreiter'"),
        (1001, "halton", r"sequence='halton' has 1000 dims, the space has 1001; use sequence='sobol'"),
        (21202, "sobol", r"sequence='sobol' has 21201 dims, the space has 21202; use random"),
    ],
)
def test_errors_name_the_remedy(dims, sequence, message):
    with pytest.raises(ValueError, match=message):
        quasirandom({"x": hpo.Array(dims, 0.0, 1.0)}, sequence=sequence)
