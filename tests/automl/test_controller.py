"""The controller: advantages and the loss of its agent against NumPy, lanes and runs, what it learns, and its use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import jaxhpo as hpo
from jaxhpo.automl import controlled, controller
from jaxhpo.automl.agent import (
    ADAM,
    POLICY_LAYERS,
    Learner,
    Rollout,
    Settings,
    agent_loss,
    begun,
    divergence,
    features,
    generalized_advantages,
    in_order,
    learn,
    network,
    seen,
)

SPACE = {"lr": hpo.Float(0.01, 10.0, log=True)}
CURVATURE = jnp.array([1.0, 0.05])


def step(key, x, h):
    """Noisy descent in a valley: high rates are needed first, low ones at the end, and the highest diverge."""
    return x - h["lr"] * (CURVATURE * x + 0.05 * jax.random.normal(key, (2,)))


VALLEY = hpo.Trainable(
    init=lambda key, h: jnp.array([3.0, 20.0]) * (1 + 0.1 * jax.random.normal(key, (2,))),
    step=step,
    evaluate=lambda x, h: jnp.where((CURVATURE * x**2).sum() < 1e3, (CURVATURE * x**2).sum(), jnp.nan),
)


@functools.cache
def jitted(function):
    return jax.jit(function)


def rollout_of(space, rounds, trial, reward, ends, seed=0):
    rng = np.random.default_rng(seed)
    shape = np.shape(rounds)
    some = lambda *more: jnp.asarray(rng.random((*shape, *more)), jnp.float32)  # noqa: E731
    dims = space.dims
    return Rollout(
        some(5 + dims), some(5 + dims), some(dims), some() - 1, *map(jnp.asarray, (reward, ends, trial, rounds))
    )


# The agent.


def test_advantages_are_discounted_sums_of_errors_within_a_run():
    space = hpo.Space(SPACE)
    rounds = np.array([[3, 4], [4, 6], [5, 7], [6, 8]])
    trial = np.array([[0, 1], [0, 1], [2, 1], [2, 1]])
    ends = np.array([[0, 0], [1, 0], [0, 0], [0, 1]], bool)
    reward = np.arange(8.0).reshape(4, 2).astype(np.float32) ** 1.5
    rng = np.random.default_rng(1)
    value, after = rng.normal(size=(2, 4, 2)).astype(np.float32)
    g, lam = 0.9, 0.7
    error = reward + g * np.where(ends, 0, after) - value
    expected = error.copy()
    expected[0, 0] += g * lam * error[1, 0]
    expected[2, 0] += g * lam * error[3, 0]
    # The second lane has a gap after its first round.
    expected[2, 1] += g * lam * error[3, 1]
    expected[1, 1] += g * lam * expected[2, 1]
    rollout = rollout_of(space, rounds, trial, reward, ends)
    found = generalized_advantages(rollout, jnp.asarray(value), jnp.asarray(after), g, lam)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    turned = jax.tree.map(lambda x: jnp.roll(x, 2, axis=0), rollout)
    jax.tree.map(np.testing.assert_array_equal, in_order(turned), rollout)


def test_the_agent_minimises_the_clipped_loss_of_what_there_is():
    space = hpo.Space({"a": hpo.Categorical((0, 1, 2)), "b": hpo.Ordinal((1, 2))})
    net = network(space, 4)
    rollout = rollout_of(space, np.array([[0, 1, -1]]), np.zeros((1, 3), int), np.zeros((1, 3)), np.zeros((1, 3), bool))
    params = net.init(jax.random.key(0), rollout.features)
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    advantage, target = np.array([[1.5, -2.0, np.nan]], np.float32), np.array([[0.3, -0.1, np.nan]], np.float32)
    outputs, value = map(np.asarray, net.apply(params, rollout.features))
    expected = []
    for i in range(2):
        a, b = np.asarray(space.level(rollout.unit))[0, i]
        log_p = [jax.nn.log_softmax(outputs[0, i, 0]), jax.nn.log_softmax(outputs[0, i, 1, :2])]
        ratio = np.exp(log_p[0][a] + log_p[1][b] - rollout.log_prob[0, i])
        gain = min(ratio * advantage[0, i], np.clip(ratio, 0.8, 1.2) * advantage[0, i])
        entropy = sum(-(np.exp(p) * p).sum() for p in log_p)
        expected.append((value[0, i] - target[0, i]) ** 2 / 2 - gain - 0.1 * entropy)
    found, log_prob = agent_loss(space, net, params, rollout, jnp.asarray(advantage), jnp.asarray(target), 0.2, 0.1)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)
    ratio = np.exp(log_prob - rollout.log_prob)[0, :2]
    on = rollout.round >= 0
    found = divergence(rollout.log_prob, log_prob.at[0, 2].set(jnp.nan), on)
    np.testing.assert_allclose(found, np.mean(ratio - 1 - np.log(ratio)), rtol=1e-5)


def test_a_policy_takes_the_step_back_that_went_too_far_and_slows_down():
    space = hpo.Space(SPACE)
    net = network(space, 4)
    rounds = np.arange(12).reshape(4, 3)
    rollout = rollout_of(space, rounds, np.zeros((4, 3), int), np.random.default_rng(0).random((4, 3)), rounds > 8)
    params = net.init(jax.random.key(0), rollout.features)
    outputs, _ = net.apply(params, rollout.features)
    log_prob_of = lambda p: agent_loss(space, net, p, rollout, rounds, rounds, 0.2, 0.1)[1]  # noqa: E731
    before = log_prob_of(params)
    rollout = rollout._replace(log_prob=before)
    settings = Settings(*map(jnp.float32, (0.05, 1.0, 1.0, 0.2, 0.0, 5.0, 20.0, 1e6)))
    run = jax.jit(
        lambda learner, most, wanted: learn(
            space, net, learner, rollout, wanted, settings._replace(divergence=most), 10
        )
    )
    first = Learner(params, ADAM.init(params), jnp.float32(0.5))
    free, bound, still = run(first, 1e6, True), run(first, 1e-3, True), run(first, 0.0, True)
    far = lambda learner: float(divergence(before, log_prob_of(learner.params), rounds >= 0))  # noqa: E731
    assert far(free) > 1e-2 and 0 < far(bound) <= 1e-3 and far(still) == 0
    np.testing.assert_allclose([x.rate for x in (free, bound, still)], [0.75, 0.5 / 1.5, 0.5 / 1.5], rtol=1e-6)
    for name, layer in params["params"].items():
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), layer, still.params["params"][name])
        assert all(jax.tree.leaves(same)) == (name in POLICY_LAYERS)
    jax.tree.map(np.testing.assert_array_equal, run(first, 1e6, False).params, params)


def test_what_is_seen_of_a_curve():
    space = hpo.Space(SPACE)
    curve = begun(space, 2)
    np.testing.assert_allclose(features(space, curve, 4), [[0, 0, 0, -1, 1, 0]] * 2)
    for loss in ([np.e**3, 0.5], [np.e, np.nan], [np.e**2, 0.25]):
        curve = seen(curve, jnp.array(loss), jnp.array([[0.75], [0.5]]), 1.0)
    np.testing.assert_allclose(features(space, curve, 4)[0], [1 / 3, -1.0, 1.0, 0.5, 0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(curve.fall[1], np.log(2), rtol=1e-6)


# The method.


def test_lanes_go_on_until_their_run_ends_or_fails():
    method = controller(SPACE, every=5, max_steps=15, batch=3)
    state, asked = method.init(jax.random.key(0)), []
    losses = [[1.0, 2.0, 3.0], [0.5, np.nan, 2.0], [0.4, 1.0, np.inf], [0.3, 0.9, 0.1], [0.2, 0.8, 0.1]]
    for now, told in enumerate(losses):
        trials, state = jitted(method.ask)(jax.random.key(now), state)
        asked.append(trials)
        state = jitted(method.tell)(state, trials, jnp.array(told))
    ids = np.array([t.id for t in asked])
    np.testing.assert_array_equal(ids, [[0, 1, 2], [0, 1, 2], [0, 3, 2], [4, 3, 5], [4, 3, 5]])
    source = np.array([t.source for t in asked])
    np.testing.assert_array_equal(source, [[-1] * 3, [0, 1, 2], [0, -1, 2], [-1, 1, -1], [0, 1, 2]])
    assert all((t.steps == 5).all() for t in asked)


def test_rewards_are_falls_of_the_logarithm_and_a_penalty_for_failure():
    method = controller(SPACE, every=5, max_steps=15, horizon=4, batch=2, penalty=4.0)
    state = method.init(jax.random.key(0))
    for now, told in enumerate([[np.e**3, 1 / np.e], [np.e**2, np.nan], [np.e**10, 0.5]]):
        trials, state = jitted(method.ask)(jax.random.key(now), state)
        turned = jax.tree.map(lambda x: x[::-1], trials)
        state = jitted(method.tell)(state, turned, jnp.array(told)[::-1])
    # What comes first counts from the median of what was told first.
    level = np.log((np.e**3 + 1 / np.e) / 2)
    expected = [[level - 3, level + 1], [1, -4], [-4, level + np.log(2)]]
    np.testing.assert_allclose(state.rollout.reward[:3], expected, atol=1e-5)
    np.testing.assert_array_equal(state.rollout.ends[:3], [[0, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(state.rollout.round, [[0, 0], [1, 1], [2, 2], [-1, -1]])
    before = state.params
    trials, state = jitted(method.ask)(jax.random.key(9), state)
    after = jitted(method.tell)(state, trials, jnp.array([1.0, 1.0]))
    assert (np.asarray(after.rollout.round) == -1).all()
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, after.params)), strict=True)]
    assert max(moved) > 1e-3
    known = trials._replace(steps=jnp.zeros_like(trials.steps))
    same = jitted(method.tell)(state, known, jnp.array([1.0, 1.0]))
    jax.tree.map(np.testing.assert_array_equal, same.lanes, state.lanes)


def test_the_policy_is_the_mean_of_the_last_horizons():
    method = controller(SPACE, every=5, max_steps=10, batch=2, average=2)
    state, acted = method.init(jax.random.key(0)), []
    for now in range(6):
        trials, state = jitted(method.ask)(jax.random.key(now), state)
        state = jitted(method.tell)(state, trials, jnp.array([1.0, 2.0]) / (1 + now))
        acted.append(state.params)
    first, second, third = acted[1::2]
    expected = jax.tree.map(lambda a, b, c: ((a + b) / 2 + c) / 2, first, second, third)
    expected["level"] = np.log(1.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.policy, expected)
    jax.tree.map(np.testing.assert_array_equal, acted[0], method.init(jax.random.key(0)).params)


def played(method, rounds, tell):
    """The state after some rounds, each told by `tell(state, trials, losses)`, and the parameters after every one."""
    state, params = method.init(jax.random.key(0)), []
    for now in range(rounds):
        trials, state = jitted(method.ask)(jax.random.key(now), state)
        losses = (1 + trials.unit[:, 0] + trials.id % 3) / (1 + now)
        state = tell(state, trials, losses)
        params.append(state.params)
    return state, params


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.allclose(x, y, atol=1e-4), a, b)))


def test_the_unit_of_losses_does_not_matter():
    method = controller(SPACE, every=5, max_steps=10, batch=4)
    told = [played(method, 4, lambda s, t, x: jitted(method.tell)(s, t, c * x))[0] for c in (1.0, 1e8, 1e-6)]  # noqa: B023
    assert not same(told[0].params, method.init(jax.random.key(0)).params)
    for other in told[1:]:
        assert same(other.params, told[0].params)
        np.testing.assert_allclose(
            other.policy["level"] - told[0].policy["level"], np.log(1e8 if other is told[1] else 1e-6), rtol=1e-4
        )


def test_it_learns_from_whole_horizons_however_they_are_told():
    method = controller(SPACE, every=5, max_steps=10, batch=4)
    tell = jitted(method.tell)

    def halves(state, trials, losses):
        for on in (np.arange(4) < 2, np.arange(4) >= 2):
            state = tell(state, trials._replace(active=jnp.asarray(on)), losses)
        return state

    def known_first(state, trials, losses):
        if state.round.value == 1:
            state = tell(state, trials._replace(steps=jnp.zeros_like(trials.steps)), losses)
        return tell(state, trials, losses)

    first = method.init(jax.random.key(0)).params
    for how, learns in ((tell, [1, 3]), (halves, [1, 3]), (known_first, [2])):
        _, params = played(method, 4, how)
        before = [first, *params[:-1]]
        assert [i for i in range(4) if not same(before[i], params[i])] == learns


def test_of_rows_with_one_place_the_last_one_stays():
    method = controller(SPACE, every=5, max_steps=20, horizon=2, batch=2)
    state, asked = method.init(jax.random.key(0)), []
    for now in range(3):
        trials, state = jitted(method.ask)(jax.random.key(now), state)
        asked.append(trials)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), asked[0], asked[2])
    both = both._replace(active=jnp.array([True, True, True, False]))
    for order in (np.arange(4), np.arange(4)[::-1]):
        turned = jax.tree.map(lambda x: x[order], both)  # noqa: B023
        state_ = jitted(method.tell)(state, turned, jnp.ones(4))
        np.testing.assert_array_equal(state_.rollout.round, [[2, 0], [-1, -1]])
        np.testing.assert_allclose(state_.rollout.unit[0, :, 0], [asked[2].unit[0, 0], asked[0].unit[1, 0]])


def test_policies_that_are_learned_beat_every_constant_on_keys_that_are_new_and_can_be_saved():
    method = controller(SPACE, every=3, max_steps=30, batch=64)
    study = hpo.study(VALLEY, method, rounds=800)

    def learned(key):
        state, trace = study(key)
        return state.policy, trace.losses

    policies, told = jax.jit(jax.vmap(learned))(jax.random.split(jax.random.key(0), 6))
    failures = ~np.isfinite(told)
    assert failures[:, :50].mean() > 0.01 and failures[:, -50:].mean() < failures[:, :50].mean() / 2

    saved = serialization.msgpack_serialize(serialization.to_state_dict(policies))
    restored = serialization.msgpack_restore(saved)
    train = lambda params, key: controlled(VALLEY, SPACE, params, every=3, max_steps=30)(key)  # noqa: E731
    keys = jax.random.split(jax.random.key(1), 64)
    losses, schedules = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))(restored, keys)
    rates = jnp.geomspace(0.01, 10, 60)
    constant = jax.jit(jax.vmap(jax.vmap(hpo.unroll(VALLEY, 30), (0, None)), (None, 0)))(keys, {"lr": rates})
    best = np.nanmin(np.where(np.isnan(constant), np.inf, constant).mean(1))
    # The worst of these is 0.56 of it, the median 0.43.
    assert np.isfinite(losses).all() and np.median(np.mean(losses, 1)) < 0.85 * best
    typical = np.median(schedules["lr"], 1)
    assert typical.shape == (6, 10) and np.median(typical.max(1) / typical.min(1)) > 1.5


def test_what_a_policy_does_is_what_training_by_its_schedule_does():
    space = {"lr": hpo.Float(0.01, 1.0, log=True), "kind": hpo.Categorical(("plain", "half"))}
    walk = VALLEY._replace(
        step=lambda key, x, h: step(key, x, {"lr": h["lr"] * jnp.where(h["kind"] == 0, 1.0, 0.5)}),
    )
    method = controller(space, every=4, max_steps=12, batch=2)
    params = method.init(jax.random.key(0)).policy
    params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), params)
    loss, schedule = controlled(walk, space, params, every=4, max_steps=12)(jax.random.key(5))
    x = walk.init(jax.random.fold_in(jax.random.key(5), 0), None)
    for i in range(12):
        h = jax.tree.map(lambda s: s[i // 4], schedule)  # noqa: B023
        x = walk.step(jax.random.fold_in(jax.random.key(5), i + 1), x, h)
    np.testing.assert_allclose(loss, walk.evaluate(x, None), rtol=1e-5)
    assert len(np.unique(schedule["lr"])) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(every=0, max_steps=4), "every must be at least 1, got 0"),
        (dict(every=4, max_steps=10), "max_steps must be a multiple of every=4, got 10; say 12"),
        (dict(every=2, max_steps=4, horizon=0), "horizon must be at least 1, got 0"),
        (dict(every=2, max_steps=4, learning_rate=0.0), "learning_rate must be in [1e-07, 1], got 0.0; 0.003 is usual"),
        (dict(every=2, max_steps=4, penalty=-1.0), "penalty must be in [0, 1e+06], got -1.0; 5 is usual"),
        (dict(every=2, max_steps=4, trace=2.0), "trace must be in [0, 1], got 2.0"),
    ],
)
def test_bad_input_is_refused_with_its_name_value_and_remedy(arguments, message):
    with pytest.raises((ValueError, TypeError)) as error:
        controller(SPACE, **arguments)
    assert message in str(error.value)


def test_a_policy_of_another_space_is_refused():
    params = controller(SPACE, every=2, max_steps=4).init(jax.random.key(0)).policy
    with pytest.raises(ValueError, match="params are not of a controller over"):
        controlled(VALLEY, {**SPACE, "b": hpo.Float(0.0, 1.0)}, params, every=2, max_steps=4)
    state = controller(SPACE, every=2, max_steps=4).init(jax.random.key(0))
    for wrong in (state, None, {}):
        with pytest.raises(TypeError, match="params must be the policy of a controller's state, .* give state.policy"):
            controlled(VALLEY, SPACE, wrong, every=2, max_steps=4)
    with pytest.raises(TypeError, match="trainable must be a Trainable"):
        controlled(lambda key, h: 0.0, SPACE, params, every=2, max_steps=4)
