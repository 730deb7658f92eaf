"""The tree-structured Parzen estimator: its parts in numbers, and what it asks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo import history as records
from jaxhpo.sequential.surrogate.parzen import features, log_densities, log_density
from jaxhpo.sequential.surrogate.split import (
    MOST_GOOD,
    Rules,
    bad_mixture,
    bad_of,
    bad_spread,
    best_of,
    decay,
    good_mixture,
    good_weights,
    number_of_good,
)
from jaxhpo.sequential.tpe import ENUMERATED, in_pool, propose
from jaxhpo.untried import everything, fingerprints

REAL = hpo.Space({"x": hpo.Float(0.0, 1.0), "y": hpo.Float(0.0, 1.0)})
EIGHT = hpo.Space({"a": hpo.Categorical(("u", "v")), "b": hpo.Ordinal((1, 2)), "c": hpo.Categorical((False, True))})
NOTHING = jnp.zeros((0, 2)), jnp.zeros(0, bool)
DEFAULT = {"split": "linear", "weighting": "rank", "bandwidth": "neighbour", "multivariate": True, "magic_clip": True}


def record(unit, losses):
    unit = jnp.asarray(unit, jnp.float32)
    n = unit.shape[0]
    return records.append(records.empty(unit.shape[1], n), unit, jnp.asarray(losses, jnp.float32), jnp.ones(n, bool))


def settings(**changes):
    return hpo.tpe(REAL, **changes).settings


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(space, rules, numbers, told, waiting):
    best = best_of(space, rules, numbers, told)
    bad = bad_of(told, best, *waiting, rules.weighting)
    return good_mixture(space, rules, numbers, best), bad_mixture(
        space, rules, numbers, bad, *bad_spread(space, rules, bad)
    )


def estimators(told, waiting=NOTHING, space=REAL, **rules):
    numbers = {k: rules.pop(k) for k in list(rules) if k not in DEFAULT}
    return both(space, Rules(**{**DEFAULT, **rules}), settings(**numbers), told, waiting)


def play(method, rounds, loss, seed=0):
    """The units that were asked and the state at the end."""
    init, ask, tell = jax.jit(method.init), jax.jit(method.ask), jax.jit(method.tell)
    state, asked = method.reserve(init(jax.random.key(seed)), rounds * method.batch), []
    for i in range(rounds):
        trials, state = ask(jax.random.fold_in(jax.random.key(seed), i), state)
        state = tell(state, trials, jnp.asarray(loss(np.asarray(trials.unit)), jnp.float32))
        asked.append(np.asarray(trials.unit))
    return np.concatenate(asked), state


def test_how_many_are_good():
    n = jnp.array([1, 10, 11, 100, 1000])
    np.testing.assert_array_equal(number_of_good("linear", jnp.float32(0.1), n), [1, 1, 2, 10, MOST_GOOD])
    np.testing.assert_array_equal(number_of_good("sqrt", jnp.float32(0.75), n), [1, 3, 3, 8, 24])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", [1, 1, 1]),
        ("decay", [1, 1, 1]),
        ("rank", [1.5, 1, 0.5]),
        ("improvement", [21 / 13, 12 / 13, 6 / 13]),
    ],
)
def test_weights_of_good_points(weighting, expected):
    losses = jnp.array([1.0, 4.0, 6.0, 8.0, 20.0])
    np.testing.assert_allclose(good_weights(weighting, losses, jnp.float32(3))[:3], expected, rtol=1e-6)
    np.testing.assert_array_equal(good_weights(weighting, losses, jnp.float32(3))[3:], 0)
    # Losses of any size, equal ones, and none.
    for scale in (1e-30, 1e30):
        found = good_weights(weighting, (losses - 8) * scale, jnp.float32(3))
        np.testing.assert_allclose(found[:3], expected, rtol=1e-5)
    np.testing.assert_allclose(good_weights(weighting, jnp.full(5, 3e38), jnp.float32(2)).sum(), 2, rtol=1e-6)
    np.testing.assert_array_equal(good_weights(weighting, jnp.full(5, jnp.inf), jnp.float32(2)), np.zeros(4))


def test_old_bad_points_weigh_less():
    is_bad = jnp.arange(41) != 3
    n = 40
    expected = np.r_[np.linspace(1 / n, 1, n - 25), np.ones(25)]
    np.testing.assert_allclose(np.asarray(decay(is_bad))[np.asarray(is_bad)], expected, rtol=1e-6)
    assert decay(is_bad)[3] == 0
    np.testing.assert_array_equal(decay(jnp.arange(20) < 12), [1] * 12 + [0] * 8)


def test_failed_and_pending_trials_are_bad():
    told = record(np.linspace(0.1, 0.9, 20).repeat(2).reshape(20, 2), [np.nan, -np.inf, np.inf, *np.arange(17.0)])
    waiting = jnp.array([[0.2, 0.3], [0.5, 0.5]]), jnp.array([True, False])
    good, bad = estimators(told, waiting)
    np.testing.assert_array_equal(good.weight[:3] > 0, [True, True, False])
    np.testing.assert_allclose(good.unit[:2], told.unit[3:5])
    expected = np.r_[[1, 0], [1, 1, 1, 0, 0], np.ones(15), np.zeros(told.mask.size - 20)]
    np.testing.assert_array_equal(bad.weight, expected)
    np.testing.assert_allclose(bad.unit[0], [0.2, 0.3])
    only_failed = estimators(record(np.full((3, 2), 0.5), [np.nan] * 3))
    assert only_failed[0].weight.sum() == 0 and only_failed[1].weight.sum() == 3


def test_bandwidths_of_every_rule():
    x = np.array([0.2, 0.3, 0.6, *np.linspace(0.05, 0.95, 27)])
    told = record(np.stack([x, x], 1), np.arange(30.0))
    least = lambda n, exponent: (n + 2.0) ** -exponent  # noqa: E731
    widths = {
        rule: estimators(told, bandwidth=rule, scale=1.0, exponent=2.0) for rule in ("neighbour", "scott", "dimensions")
    }
    np.testing.assert_allclose(widths["neighbour"][0].bandwidth[:3, 0], [0.1, 0.3, 0.3], rtol=1e-5)
    np.testing.assert_allclose(widths["neighbour"][1].bandwidth[0], least(27, 0.9), rtol=1e-5)
    np.testing.assert_allclose(widths["dimensions"][0].bandwidth[0, 0], 0.2 * 3 ** (-1 / 6), rtol=1e-5)
    np.testing.assert_allclose(widths["dimensions"][1].bandwidth[0, 0], 0.2 * 27 ** (-1 / 6), rtol=1e-5)
    scott = 1.059 * np.sqrt(np.average((x[:3] - np.average(x[:3], weights=[3, 2, 1])) ** 2, weights=[3, 2, 1]))
    np.testing.assert_allclose(widths["scott"][0].bandwidth[0, 0], scott * 3 ** (-1 / 6), rtol=1e-4)
    # The factor, the magic clip and the least bandwidth.
    assert np.isclose(estimators(told, scale=0.5, exponent=2.0)[0].bandwidth[0, 0], 0.05)
    assert np.isclose(estimators(told, exponent=0.5)[0].bandwidth[0, 0], least(3, 0.5))
    assert np.isclose(estimators(told, exponent=0.5, magic_clip=False)[0].bandwidth[0, 0], 0.08)
    assert np.isclose(estimators(told, min_bandwidth=0.4)[0].bandwidth[0, 0], 0.4)
    assert np.isclose(estimators(told, magic_clip=False)[1].bandwidth[0, 0], 0.01)
    decayed = estimators(told, weighting="decay")[1].weight
    assert np.isclose(decayed[3], 1 / 27) and np.isclose(decayed[29], 1)


def test_a_kernel_is_no_narrower_than_half_a_level_and_options_share_the_smoothing():
    space = hpo.Space({"k": hpo.Int(1, 4), "kind": hpo.Categorical(("a", "b", "c"))})
    told = record(np.full((20, 2), 0.1), np.arange(20.0))
    good, bad = estimators(told, space=space, exponent=9.0)
    weight = 3 * 0.5 / 3
    np.testing.assert_allclose(good.bandwidth[0], [0.125, weight / (1 + weight)], rtol=1e-5)
    weight = 3 * 0.5 / 19
    np.testing.assert_allclose(bad.bandwidth[0], [0.125, weight / (1 + weight)], rtol=1e-5)


def proposals(told, n=40, batch=1, waiting=NOTHING, **rules):
    rules = Rules(**{**DEFAULT, **rules})
    one = lambda key: propose(  # noqa: E731
        told, *waiting, key, settings(), space=REAL, rules=rules, candidates=64, batch=batch
    )
    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), n)))


def two_valleys(n=40):
    """Good points along the diagonal only."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(n, 2))
    x[:2], x[2:4] = [0.2, 0.2] + 0.02 * x[:2], [0.8, 0.8] - 0.02 * x[2:4]
    return record(x, [0.0, 0.1, 0.0, 0.1, *np.arange(n - 4)])


def test_only_the_joint_kernel_knows_which_values_belong_together():
    on_diagonal = lambda x: (np.abs(x[:, 0, 0] - x[:, 0, 1]) < 0.3).mean()  # noqa: E731
    assert on_diagonal(proposals(two_valleys())) > 0.9
    assert on_diagonal(proposals(two_valleys(), multivariate=False)) < 0.8


def test_the_best_candidate_has_the_largest_ratio():
    told = two_valleys()
    good, bad = estimators(told)
    chosen, every = proposals(told)[:, 0], jnp.ones((40, 2), bool)
    ratio = lambda x: np.asarray(  # noqa: E731
        log_density(REAL, features(REAL, x, every), good) - log_density(REAL, features(REAL, x, every), bad)
    )
    anywhere = jnp.asarray(np.random.default_rng(1).uniform(size=(40, 2)), jnp.float32)
    near = jnp.clip(good.unit[jnp.zeros(40, int)] + 0.3 * (anywhere - 0.5), 0, 1)
    assert np.median(ratio(chosen)) > max(np.quantile(ratio(anywhere), 0.95), np.quantile(ratio(near), 0.9))


def test_rows_of_an_ask_and_pending_ones_keep_their_distance():
    told = two_valleys()
    rows = proposals(told, n=10, batch=6)
    distance = np.linalg.norm(rows[:, :, None] - rows[:, None], axis=-1) + np.eye(6)
    assert distance.min() > 0.01
    alone = proposals(told, n=100)[:, 0]
    centre = np.median(alone[alone[:, 0] < 0.5], axis=0)
    close = lambda x: (np.linalg.norm(x - centre, axis=1) < 0.03).mean()  # noqa: E731
    offsets = np.stack(np.meshgrid([-0.02, 0, 0.02], [-0.02, 0, 0.02]), -1).reshape(9, 2)
    waiting = jnp.asarray(centre + offsets, jnp.float32), jnp.ones(9, bool)
    assert close(alone) > 2 * close(proposals(told, n=100, waiting=waiting)[:, 0]) + 0.05


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("multivariate", [True, False])
def test_every_point_of_a_small_space_is_tried_once_before_any_twice(batch, multivariate):
    method = hpo.tpe(EIGHT, batch=batch, startup=3, candidates=4, multivariate=multivariate)
    for seed in range(2):
        asked, _ = play(method, -(-8 // batch), lambda unit: unit.sum(1), seed)
        assert len({tuple(row) for row in asked[:8].tolist()}) == 8


def test_points_that_are_pending_are_not_asked_again():
    method = hpo.tpe(EIGHT, batch=4, startup=0)
    ask, state = jax.jit(method.ask), method.init(jax.random.key(0))
    first, state = ask(jax.random.key(1), state)
    second, state = ask(jax.random.key(2), state, first)
    assert len({tuple(row) for row in np.concatenate([first.unit, second.unit]).tolist()}) == 8


def test_a_finite_space_that_is_too_large_to_enumerate_has_no_repeats_either():
    space = hpo.Space({f"k{i}": hpo.Int(1, 4) for i in range(5)})
    assert everything(space, ENUMERATED) is None
    # The best point is a corner that soon has nothing new around it among what is sampled.
    asked, _ = play(hpo.tpe(space, batch=3, candidates=8), 30, lambda unit: unit.sum(1))
    assert len({tuple(row) for row in asked.tolist()}) == 90


def test_fingerprints_tell_points_apart_by_what_is_live():
    tree = {"how": hpo.OneOf(one={"k": hpo.Int(1, 3)}, two={"m": hpo.Int(1, 3)}), "z": hpo.Int(1, 4)}
    space = hpo.Space(tree)
    points = everything(space, ENUMERATED)
    assert points.shape == (2 * 3 * 3 * 4, space.dims)
    hashes = np.asarray(fingerprints(space, points))
    assert len(set(hashes.tolist())) == 2 * 3 * 4


@pytest.mark.parametrize("kind", ["1e30", "1e-30", "constant", "some NaN", "all NaN"])
def test_extremes_leave_finite_points(kind):
    method, rng = (
        hpo.tpe(hpo.Space({"x": hpo.Array(100, 0.0, 1.0)}), batch=5, startup=5, candidates=8),
        np.random.default_rng(0),
    )
    losses = {
        "1e30": lambda unit: unit[:, 0] * 1e30,
        "1e-30": lambda unit: unit[:, 0] * 1e-30,
        "constant": lambda unit: np.ones(len(unit)),
        "some NaN": lambda unit: np.where(rng.uniform(size=len(unit)) < 0.3, np.nan, unit[:, 0]),
        "all NaN": lambda unit: np.full(len(unit), np.nan),
    }
    asked, state = play(method, 6, losses[kind])
    assert np.isfinite(asked).all() and len({tuple(row) for row in asked.tolist()}) == 30
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(state))


def test_the_first_trials_are_a_latin_hypercube_unless_results_are_known():
    method = hpo.tpe(REAL, startup=8)
    asked, _ = play(method, 8, lambda unit: unit.sum(1))
    np.testing.assert_array_equal(np.sort((asked * 8).astype(int), axis=0), np.arange(8)[:, None].repeat(2, 1))
    other, _ = play(method, 8, lambda unit: unit.sum(1), seed=1)
    assert np.abs(asked - other).max() > 0.01
    told = two_valleys()
    state = method.init(jax.random.key(0))._replace(history=told)
    trials = [jax.jit(method.ask)(jax.random.key(i), state)[0].unit[0] for i in range(5)]
    assert np.mean([min(np.abs(x - 0.2).max(), np.abs(x - 0.8).max()) < 0.15 for x in trials]) > 0.7


def test_a_study_is_one_program_and_equals_the_loop_by_hand():
    method = hpo.tpe(REAL, candidates=8, startup=4)
    objective = lambda key, h: jnp.abs(h["x"] - 0.25) + jnp.abs(h["y"] - 0.5)  # noqa: E731
    key, traced = jax.random.key(3), []

    def counted(key, state):
        traced.append(None)
        return method.ask(key, state)

    _, trace = jax.jit(hpo.study(objective, method, rounds=80))(key)
    ask, tell = jax.jit(counted), jax.jit(method.tell)
    state = method.reserve(jax.jit(method.init)(hpo.ask_key(key)), 80)
    units = []
    for i in range(80):
        trials, state = ask(hpo.ask_key(key, i), state)
        state = tell(state, trials, jax.vmap(objective)(hpo.trial_keys(key, trials), trials.hparams))
        units.append(np.asarray(trials.unit))
    np.testing.assert_allclose(np.asarray(trace.trials.unit)[:10], units[:10], atol=1e-5)
    assert len(traced) == 1
    assert np.isclose(np.asarray(trace.losses).min(), 0, atol=0.05)


def test_beats_random_search():
    tree = {"x": hpo.Array(3, 0.0, 1.0), "kind": hpo.Categorical(("a", "b", "c", "d")), "n": hpo.Int(1, 64, log=True)}
    space = hpo.Space(tree)

    def objective(key, h):
        return ((h["x"] - 0.3) ** 2).sum() + 0.3 * (h["kind"] != 2) + 0.1 * jnp.abs(jnp.log2(h["n"]) - 3)

    def best(method):
        run = jax.jit(jax.vmap(lambda key: hpo.study(objective, method, rounds=60)(key)[1].losses.min()))
        return np.asarray(run(jax.random.split(jax.random.key(0), 8)))

    assert np.median(best(hpo.tpe(space))) < 0.4 * np.median(best(hpo.random(space, batch=1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"weighting": "ei"}, "weighting must be one of"),
        ({"bandwidth": "none"}, "bandwidth must be one of"),
        ({"split": "cube"}, "split must be one of"),
        ({"gamma": 0.0}, "gamma must be in"),
        ({"prior_weight": 0.0}, "prior_weight must be in"),
    ],
)
def test_arguments_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        hpo.tpe(REAL, **changes)


def test_what_stands_in_for_the_design_is_uniform():
    method = hpo.tpe({"a": hpo.Int(0, 999)}, startup=8, batch=4)
    init, ask = jax.jit(method.init), jax.jit(method.ask)

    def stand_ins(key):
        first, _ = ask(key, init(key))
        return ask(key, init(key), first)[0].unit

    unit = np.concatenate([stand_ins(jax.random.key(i)) for i in range(30)])
    assert abs(unit.mean() - 0.5) < 4 * 0.29 / np.sqrt(unit.size)


@pytest.mark.parametrize("multivariate", [True, False])
def test_blocks_add_up_to_the_whole(multivariate, monkeypatch):
    space, rng = hpo.Space({"x": hpo.Float(0.0, 1.0), "k": hpo.Int(0, 3)}), np.random.default_rng(0)
    unit = rng.random((200, 2)).astype(np.float32)
    told = records.append(
        records.empty(2, 256), jnp.asarray(unit), jnp.asarray(unit.sum(1)), jnp.asarray(rng.random(200) < 0.8)
    )
    rules, numbers = Rules(**{**DEFAULT, "multivariate": multivariate}), hpo.tpe(space).settings
    waiting = jnp.asarray(rng.random((3, 2)), jnp.float32), jnp.array([True, False, True])
    best = best_of(space, rules, numbers, told)
    bad, good = bad_of(told, best, *waiting, rules.weighting), good_mixture(space, rules, numbers, best)
    point = jnp.asarray(rng.random((5, 2)), jnp.float32)
    live = jnp.ones((5, 2), bool)
    mixture = bad_mixture(space, rules, numbers, bad, *bad_spread(space, rules, bad))
    density = log_density if multivariate else log_densities
    expected = density(space, features(space, point, live), mixture)
    for block in (32, 256):
        monkeypatch.setitem(in_pool.__globals__, "BLOCK", block)
        pool, width, total = in_pool(space, rules, numbers, point, good, bad, 3 + records.held(told))
        found = pool.bad if multivariate else jnp.sort(pool.bad, 0)
        np.testing.assert_allclose(found, expected if multivariate else jnp.sort(expected, 0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(width, mixture.bandwidth[np.asarray(bad.mask)].min(0, keepdims=True), rtol=1e-6)
        np.testing.assert_allclose(total, bad.weight.sum() + 1, rtol=1e-6)
