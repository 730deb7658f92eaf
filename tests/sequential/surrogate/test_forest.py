"""The forest against scikit-learn's, against its own trees walked in NumPy, and where it knows nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor

import jaxhpo as hpo
from jaxhpo.sequential.surrogate.forest import Forest, coordinates, fit, predict, sample_tree

KEY = jax.random.key(0)
MIXED = hpo.Space({"x": hpo.Array(3, 0.0, 1.0), "n": hpo.Int(1, 9), "kind": hpo.Categorical(tuple("abcdef"))})
NESTED = hpo.Space(
    {"which": hpo.OneOf(a={"u": hpo.Float(0.0, 1.0)}, b={"v": hpo.Float(0.0, 1.0)}), "x": hpo.Float(0.0, 1.0)}
)
LINE = hpo.Space({"x": hpo.Float(0.0, 1.0)})

grow = jax.jit(fit, static_argnames=("space", "trees", "depth", "rows", "splits", "leaf"))
ask = jax.jit(predict, static_argnames="space")


def standard(values):
    return (values - values.mean()) / values.std()


def mixed_data(n, seed):
    """Points, a target in which every dim matters, and columns for a forest that has no categoricals."""
    unit = MIXED.sample(jax.random.key(seed), n)
    h = jax.tree.map(np.asarray, MIXED.decode(unit))
    kind = np.asarray(MIXED.level(unit))[:, list(np.flatnonzero(MIXED.levels)).index(int(MIXED.categorical.argmax()))]
    x = h["x"]
    target = np.sin(5 * x[:, 0]) + x[:, 1] * x[:, 2] + h["n"] / 9 + np.isin(kind, [0, 3, 4]) * (0.5 + x[:, 1])
    return unit, target, np.c_[x, h["n"], np.eye(6)[kind]]


def order_of(levels, seed):
    """The random order of levels, once more."""
    x = (levels.astype(np.int64).astype(np.uint32) * np.uint32(0x9E3779B9) + seed).astype(np.uint32)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return ((x >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def walk(forest, space, unit):
    """The leaf of every point in every tree, by plain NumPy: i64[trees, n]."""
    values, forest = np.asarray(coordinates(space, unit)), Forest(*map(np.asarray, forest))
    depth, trees, _ = forest.split.shape
    at = np.zeros((trees, len(values)), int)
    for t in range(trees):
        for d in range(depth):
            attempt, dim = np.divmod(forest.split[d, t, at[t]], values.shape[1])
            value = values[np.arange(len(values)), dim]
            value = np.where(value >= 2, order_of(value, forest.order[d, t] + attempt.astype(np.uint32)), value)
            at[t] = np.where(value <= forest.threshold[d, t, at[t]], at[t], forest.right[d, t, at[t]])
    return at


def test_errs_no_more_than_scikit_learns_extremely_randomised_trees():
    (unit, target, columns), (new_unit, new_target, new_columns) = mixed_data(400, 1), mixed_data(1000, 2)
    mean, std = target.mean(), target.std()
    found = grow(KEY, MIXED, unit, jnp.asarray((target - mean) / std), jnp.ones(400, bool), leaf=2)
    ours = np.mean((np.asarray(ask(found, MIXED, new_unit)[0]) * std + mean - new_target) ** 2)
    peer = ExtraTreesRegressor(64, min_samples_leaf=2, random_state=0).fit(columns, target)
    theirs = np.mean((peer.predict(new_columns) - new_target) ** 2)
    assert ours < theirs
    unscored = grow(KEY, MIXED, unit, jnp.asarray((target - mean) / std), jnp.ones(400, bool), leaf=2, splits=1)
    assert np.mean((np.asarray(ask(unscored, MIXED, new_unit)[0]) * std + mean - new_target) ** 2) > 1.5 * theirs


@pytest.mark.parametrize("rows, splits", [(128, 10), (128, 3), (48, 10)])
def test_a_leaf_has_the_mean_of_the_rows_that_reach_it(rows, splits):
    unit, target, _ = mixed_data(128, 3)
    target, mask = standard(target).astype(np.float32), np.arange(128) % 8 != 0
    found = grow(KEY, MIXED, unit, jnp.asarray(target), jnp.asarray(mask), trees=6, rows=rows, splits=splits)
    leaves = walk(found, MIXED, unit)
    for t in range(6):
        owned = np.unique(leaves[t, mask])
        assert np.asarray(found.size)[t, owned].sum() == min(rows, mask.sum())
        assert len(owned) > 8 and np.asarray(found.size)[t, owned].min() == 2
        if rows < mask.sum():
            continue
        for leaf in owned:
            inside = target[mask & (leaves[t] == leaf)]
            assert len(inside) == found.size[t, leaf]
            np.testing.assert_allclose(found.mean[t, leaf], inside.mean(), atol=1e-5)
    new = MIXED.sample(jax.random.key(9), 200)
    at = walk(found, MIXED, new)
    means = np.take_along_axis(np.asarray(found.mean), at, 1)
    mean, std = ask(found, MIXED, new)
    np.testing.assert_allclose(mean, means.mean(0), atol=1e-5)
    variance = means.var(0) + np.take_along_axis(np.asarray(found.variance), at, 1).mean(0)
    np.testing.assert_allclose(std, np.sqrt(variance), rtol=1e-4)
    sampled = np.asarray(jax.vmap(sample_tree, (0, None, None, None))(jax.random.split(KEY, 64), found, MIXED, new))
    nearest = np.abs(sampled[:, None] - means).max(-1)
    assert nearest.min(1).max() == 0 and len(set(nearest.argmin(1))) == 6


def test_a_leafs_variance_is_its_own_and_the_priors_from_above():
    # One split at most, so that the root is above both leaves: (squares + prior) / (rows + 1), and the root's prior 1.
    unit = jnp.array([[0.1], [0.2], [0.8], [0.9]])
    target = jnp.array([-1.1, -0.9, 0.8, 1.2])
    found = grow(KEY, LINE, unit, target, jnp.ones(4, bool), trees=32, depth=1, rows=4)
    leaf = np.asarray(walk(found, LINE, unit))
    split = leaf[:, 0] != leaf[:, 2]
    assert split.any() and (leaf[:, 0] == leaf[:, 1]).all()
    root = (np.sum(np.square(target)) + 1) / 5
    for t in np.flatnonzero(split):
        np.testing.assert_allclose(found.variance[t, leaf[t, 0]], (0.02 + root) / 3, rtol=1e-5)
        np.testing.assert_allclose(found.variance[t, leaf[t, 2]], (0.08 + root) / 3, rtol=1e-5)


def test_is_unsure_in_gaps_and_thresholds_lie_anywhere_in_them():
    x = np.r_[np.linspace(0, 0.3, 24), np.linspace(0.7, 1, 24)].astype(np.float32)
    target = standard(np.sin(3 * x) + 2 * x)
    found = grow(KEY, LINE, jnp.asarray(x[:, None]), jnp.asarray(target), jnp.ones(48, bool), rows=48)
    mean, std = ask(found, LINE, jnp.array([[0.15], [0.5], [0.85]]))
    assert std[1] > 2 * max(std[0], std[2])
    assert mean[0] < mean[1] < mean[2]
    roots = np.asarray(found.threshold)[:, :, 0][np.asarray(found.right)[:, :, 0] > 0]
    inside = roots[(roots > 0.3) & (roots < 0.7)]
    assert len(inside) > 20 and inside.std() > 0.05


def test_rows_that_are_not_marked_change_nothing():
    unit, target, _ = mixed_data(128, 5)
    mask, target = jnp.arange(128) < 90, jnp.asarray(standard(target), jnp.float32)
    forget = lambda value: jnp.where(mask, target, value)  # noqa: E731
    a = grow(KEY, MIXED, unit, forget(jnp.nan), mask, trees=6, rows=128, splits=10)
    b = grow(KEY, MIXED, jnp.where(mask[:, None], unit, 0.0), forget(1e9), mask, trees=6, rows=128, splits=10)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_dims_that_are_not_live_are_all_alike():
    unit = np.array(NESTED.sample(jax.random.key(4), 128))
    live = np.asarray(NESTED.active(unit))
    target = jnp.asarray(standard(np.where(live[:, 1], unit[:, 1], 2 - unit[:, 2]) + 0.3 * unit[:, 3]))
    ones = jnp.ones(128, bool)
    found = grow(KEY, NESTED, jnp.asarray(unit), target, ones, trees=16, rows=128)
    other = np.where(live, unit, np.asarray(NESTED.sample(jax.random.key(6), 128)))
    assert not np.array_equal(unit, other)
    again = grow(KEY, NESTED, jnp.asarray(other), target, ones, trees=16, rows=128)
    assert all(np.array_equal(x, y) for x, y in zip(found, again, strict=True))
    np.testing.assert_array_equal(ask(found, NESTED, jnp.asarray(unit)), ask(found, NESTED, jnp.asarray(other)))
    assert np.corrcoef(ask(found, NESTED, jnp.asarray(unit))[0], target)[0, 1] > 0.95


def test_one_split_groups_levels_that_are_no_neighbours():
    space = hpo.Space({"kind": hpo.Categorical(tuple("abcdef"))})
    level = jnp.arange(6).repeat(8)
    unit = (level[:, None] + 0.5) / 6
    target = jnp.where(jnp.isin(level, jnp.array([0, 3, 4])), 1.0, -1.0)
    found = grow(KEY, space, unit, target, jnp.ones(48, bool), trees=128, depth=1, rows=48)
    side = walk(found, space, unit[::8]) > 0
    exact = (side == side[:, :1]) == np.isin(np.arange(6), [0, 3, 4])
    # Of the 20 ways to choose the first three of an order two are right, if the threshold is behind them; 20 tries.
    assert 0.1 < exact.all(1).mean() < 0.9
    assert len({tuple(s ^ s[0]) for s in side}) > 5


def test_points_that_decode_alike_are_told_alike():
    unit, target, _ = mixed_data(128, 7)
    target, mask = jnp.asarray(standard(target), jnp.float32), jnp.ones(128, bool)
    found = grow(KEY, MIXED, unit, target, mask, trees=6, rows=128, splits=10)
    has_levels = np.flatnonzero(MIXED.levels)
    moved = unit.at[:, has_levels].set(MIXED.middle(MIXED.level(unit)))
    assert not np.array_equal(unit, moved)
    np.testing.assert_array_equal(ask(found, MIXED, unit), ask(found, MIXED, moved))


def test_nothing_to_learn_from():
    unit, n = LINE.sample(KEY, 48), 48
    few = functools.partial(grow, KEY, LINE, rows=n)
    mean, std = ask(few(unit * jnp.nan, jnp.full(n, jnp.nan), jnp.zeros(n, bool)), LINE, unit)
    assert (mean == 0).all() and (std == 1).all()
    mean, std = ask(few(unit, jnp.full(n, 0.75), jnp.arange(n) == 5), LINE, unit)
    np.testing.assert_allclose(mean, 0.75, rtol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(1 / 2), rtol=1e-6)
    mean, std = ask(few(unit, jnp.zeros(n), jnp.ones(n, bool)), LINE, unit)
    assert (mean == 0).all()
    np.testing.assert_allclose(std, np.sqrt(1 / 49), rtol=1e-5)
    same = ask(few(jnp.full((n, 1), 0.3), standard(jnp.arange(48.0)), jnp.ones(n, bool)), LINE, unit)
    np.testing.assert_allclose(same[0], 0, atol=1e-6)
    np.testing.assert_allclose(same[1], 1, rtol=1e-5)


def test_many_forests_at_once_are_those_one_by_one_and_one_trace():
    unit, target, _ = mixed_data(64, 8)
    keys, target = jax.random.split(KEY, 3), jnp.asarray(standard(target), jnp.float32)
    scales, mask = jnp.array([1.0, -1.0, 0.5]), jnp.arange(64) < 50

    def study(key, scale):
        found = fit(key, MIXED, unit, scale * target, mask, trees=8, rows=64)
        return *found, *predict(found, MIXED, unit)

    together = jax.jit(jax.vmap(study))(keys, scales)
    alone = jax.jit(study)
    for i in range(3):
        for a, b in zip(together, alone(keys[i], scales[i]), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)
    assert alone._cache_size() == 1


def test_float64_where_it_is_on_and_indices_of_32_bits():
    with jax.enable_x64(True):
        unit, target, _ = mixed_data(64, 8)
        found = grow(KEY, MIXED, unit, jnp.asarray(standard(target)), jnp.ones(64, bool), trees=4, rows=64)
        assert [x.dtype for x in found] == [np.dtype(d) for d in ("i4", "f8", "i4", "u4", "f8", "f8", "i4")]
        mean, std = predict(found, MIXED, unit)
        assert mean.dtype == std.dtype == np.float64
        leaves = walk(found, MIXED, unit)
        means = np.stack([[standard(target)[row == leaf].mean() for leaf in row] for row in leaves])
        np.testing.assert_allclose(mean, means.mean(0), rtol=1e-9, atol=1e-12)
