"""Policies and the methods that learn them: exact gradients by enumeration, densities, late rows, bandits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxhpo as hpo
from jaxhpo.automl import ppo, reinforce
from jaxhpo.automl.policies import Normal, autoregressive, entropies, factorised, log_probs, uniform_log_prob
from jaxhpo.automl.policy_search import Baseline, Settings, advantages, objective
from jaxhpo.automl.ppo import clipped_gain
from jaxhpo.automl.reinforce import weighted_score
from jaxhpo.untried import everything, fingerprints

PLAIN = {"a": hpo.Categorical((0, 1)), "b": hpo.Ordinal((0, 1)), "c": hpo.Int(1, 4)}
CONDITIONAL = {
    "opt": hpo.OneOf(x={"p": hpo.Categorical((0, 1, 2, 3))}, y={"q": hpo.Int(1, 2), "r": hpo.Categorical((0, 1))}),
    "s": hpo.Categorical((0, 1)),
}
POLICIES = {"factorised": factorised, "autoregressive": lambda space: autoregressive(space, 5)}


@functools.cache
def jitted(function):
    return jax.jit(function)


def points(space):
    """One point for each thing that a space decodes to."""
    unit = everything(space, 64)
    return unit[np.unique(np.asarray(fingerprints(space, unit)), return_index=True)[1]]


def random_params(policy, seed=3):
    """Parameters of a policy that is far from uniform."""
    leaves, treedef = jax.tree.flatten(policy.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [x + jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noise)


# Gradients.


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("tree", [PLAIN, CONDITIONAL])
def test_policy_gradients_are_the_exact_ones_by_enumeration(kind, tree):
    with jax.enable_x64(True):
        space = hpo.Space(tree)
        policy, unit = POLICIES[kind](space), points(space)
        assert len(unit) == 16
        losses = jnp.asarray(np.random.default_rng(0).normal(size=16))
        log_prob = lambda p: log_probs(space, policy.outputs(p, unit), unit).sum(-1)  # noqa: E731
        settings = Settings(*map(jnp.float64, (0.1, 0.9, 0.0, 0.2)))

        def mean_gradient(gain, clip, params, behaviour):
            def of_row(x, behaviour, advantage):
                rows = x[None], behaviour[None], advantage[None], jnp.ones(1, bool)
                return jax.grad(lambda p: objective(space, policy, gain, p, *rows, settings._replace(clip=clip)))(
                    params
                )

            # A baseline does not matter on average.
            each = jax.vmap(of_row)(unit, behaviour, 0.7 - losses)
            return jax.tree.map(lambda g: jnp.tensordot(jnp.exp(behaviour), g, 1), each)

        @jax.jit
        def compare(params):
            exact = jax.grad(lambda p: -(jnp.exp(log_prob(p)) * losses).sum())(params)
            behaviour = log_prob(params)
            means = [mean_gradient(*how, params, behaviour) for how in ((weighted_score, 2.0), (clipped_gain, 0.2))]
            return exact, means, behaviour, entropies(space, policy.outputs(params, unit), unit).sum(-1)

        exact, means, log_chances, entropy = compare(random_params(policy))
        chances = np.exp(log_chances)
        np.testing.assert_allclose(chances.sum(), 1, rtol=1e-12)
        assert chances.max() > 2.5 / 16 and max(np.abs(x).max() for x in jax.tree.leaves(exact)) > 0.01
        for mean in means:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), mean, exact)
        np.testing.assert_allclose((chances * entropy).sum(), -(chances * log_chances).sum(), rtol=1e-10)


@pytest.mark.parametrize("kind", POLICIES)
def test_the_slope_of_entropy_is_that_of_the_whole_policy_by_enumeration(kind):
    with jax.enable_x64(True):
        space = hpo.Space(CONDITIONAL)
        policy, unit = POLICIES[kind](space), points(hpo.Space(CONDITIONAL))
        log_prob = lambda p: log_probs(space, policy.outputs(p, unit), unit).sum(-1)  # noqa: E731
        settings = Settings(*map(jnp.float64, (0.1, 0.9, 1.0, 2.0)))
        zero = jnp.zeros(2)

        @jax.jit
        def compare(params):
            exact = jax.grad(lambda p: -(jnp.exp(log_prob(p)) * log_prob(p)).sum())(params)
            chances = jnp.exp(log_prob(params))
            # Drawn by another policy, by which no point is half as probable.
            drawn = (chances + 1 / 16) / 2

            def of_pair(i, j):
                rows = unit[jnp.array([i, j])], jnp.log(drawn[jnp.array([i, j])]), zero, jnp.ones(2, bool)
                return jax.grad(lambda p: objective(space, policy, weighted_score, p, *rows, settings))(params)

            each = jax.vmap(jax.vmap(of_pair, (None, 0)), (0, None))(jnp.arange(16), jnp.arange(16))
            return exact, jax.tree.map(lambda g: jnp.einsum("i,j,ij...->...", drawn, drawn, g), each)

        exact, mean = compare(random_params(policy))
        assert max(np.abs(x).max() for x in jax.tree.leaves(exact)) > 0.05
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), mean, exact)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_builder_that_is_called_in_a_trace_can_be_called_outside(kind):
    space = {"traced": hpo.Float(0.0, 1.0), kind: hpo.Categorical((0, 1))}
    search = lambda key: hpo.study(lambda k, h: h["traced"], reinforce(space, policy=kind), rounds=2)(key)[1].losses  # noqa: E731
    inside = jax.jit(search)(jax.random.key(0))
    np.testing.assert_allclose(search(jax.random.key(0)), inside, rtol=1e-5)


@pytest.mark.parametrize("kind", POLICIES)
def test_points_are_drawn_as_often_as_they_are_probable(kind):
    space = hpo.Space(CONDITIONAL)
    policy, unit = POLICIES[kind](space), points(space)
    params = random_params(policy)
    drawn = jax.jit(policy.sample, static_argnums=2)(params, jax.random.key(1), 20_000)
    codes = np.asarray(fingerprints(space, unit))
    share = (np.asarray(fingerprints(space, drawn))[:, None] == codes).mean(0)
    np.testing.assert_allclose(share, jnp.exp(log_probs(space, policy.outputs(params, unit), unit).sum(-1)), atol=0.01)
    np.testing.assert_allclose(share.sum(), 1)


@pytest.mark.parametrize("kind", POLICIES)
def test_what_is_not_live_does_not_matter(kind):
    space = hpo.Space({**CONDITIONAL, "x": hpo.Float(0.0, 1.0)})
    policy = POLICIES[kind](space)
    params, unit = random_params(policy), space.sample(jax.random.key(0), 50)
    other = jnp.where(space.active(unit), unit, space.sample(jax.random.key(1), 50))
    assert (unit != other).any(1).all()
    found, again = (log_probs(space, policy.outputs(params, u), u) for u in (unit, other))
    np.testing.assert_array_equal(found, again)
    assert (np.asarray(found)[~np.asarray(space.active(unit))] == 0).all()
    moved = unit.at[:, 0].set(1 - unit[:, 0])
    follows = policy.outputs(params, moved)[:, -1] != policy.outputs(params, unit)[:, -1]
    assert follows.all() == (kind == "autoregressive")


def test_densities_of_reals():
    outputs = jnp.array([[0.0, 0.0], [2.5, 1.0], [-3.0, -4.0], [0.3, -9.0]])
    normal = Normal.of(outputs)
    low, high = normal.bounds
    for i in range(4):
        reference = stats.truncnorm(low[i], high[i], normal.mean[i], normal.deviation[i])
        at = reference.ppf(np.linspace(0.01, 0.99, 9))
        one = Normal(normal.mean[i], normal.deviation[i])
        np.testing.assert_allclose(one.log_density(at), reference.logpdf(at), rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(one.sample(np.linspace(0.01, 0.99, 9)), at, atol=2e-5)
        np.testing.assert_allclose(one.entropy(), reference.entropy(), atol=2e-4)
    np.testing.assert_allclose(normal.deviation[0], 0.5, rtol=1e-6)
    assert (normal.deviation > 0.005).all() and (normal.deviation < 1).all()


def test_few_levels_are_options_and_many_are_a_real():
    space = hpo.Space({"few": hpo.Int(1, 8, log=True), "many": hpo.Int(1, 1000), "c": hpo.Categorical(range(100))})
    policy = factorised(space)
    drawn = policy.sample(policy.init(jax.random.key(0)), jax.random.key(0), 8000)
    hparams = space.decode(drawn)
    np.testing.assert_allclose(np.bincount(hparams["few"])[1:] / 8000, np.full(8, 1 / 8), atol=0.02)
    assert len(np.unique(hparams["many"])) > 800 and len(np.unique(hparams["c"])) == 100
    np.testing.assert_allclose(uniform_log_prob(space, drawn), -np.log(800), rtol=1e-5)


# Learning.


def test_advantages_are_in_deviations_from_a_running_mean():
    baseline = Baseline(*map(jnp.float32, (5.0, 4.0, 1 - 0.5**3)))
    losses, on = jnp.array([1.0, np.nan, 7.0, 100.0]), jnp.array([True, True, True, False])
    found, after = advantages(baseline, losses, on, jnp.float32(0.5))
    weights = 0.5 ** np.arange(5)[::-1]
    share = weights[3:].sum() / weights.sum()
    mean, variance = 5 + share * (4 - 5), 4 + share * (10 - 4)
    np.testing.assert_allclose(after, (mean, variance, 1 - 0.5**5), rtol=1e-6)
    np.testing.assert_allclose(found[:3], [4 / np.sqrt(variance), -2, -2 / np.sqrt(variance)], rtol=1e-6)
    for infinite in (np.inf, -np.inf):
        same, moved = advantages(baseline, losses.at[1].set(infinite), on, jnp.float32(0.5))
        np.testing.assert_allclose([*same[:3], *moved], [*found[:3], *after], rtol=1e-6)
    zero = Baseline(*map(jnp.float32, (0.0, 0.0, 0.0)))
    found, after = advantages(zero, losses + 1e6, on, jnp.float32(0.5))
    np.testing.assert_allclose(found[:3], [1, -2, -1], rtol=1e-5)


def told_gradient(method, unit, losses, params=None, replaced=None):
    """What Adam was given by one `tell`, of a policy at `params` that drew `unit`."""
    state = method.init(jax.random.key(0))
    state = state._replace(params=state.params if params is None else params)
    trials, _ = jitted(method.ask)(jax.random.key(1), state)
    asked = trials._replace(aux=trials.aux._replace(unit=unit, log_prob=jnp.full(len(unit), -1.0)))
    asked = asked._replace(unit=unit if replaced is None else replaced)
    after = jitted(method.tell)(state, asked, losses)
    return np.asarray(after.optimizer.mu) / 0.1


def test_a_tell_takes_a_step_along_the_mean_of_weighted_scores():
    tree = {"c": hpo.Categorical((0, 1, 2))}
    method = reinforce(tree, batch=3, entropy=0.0, clip=1.5)
    params = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    level, losses = np.array([0, 1, 2]), jnp.array([1.0, 2.0, 6.0])
    unit = jnp.asarray((level[:, None] + 0.5) / 3, jnp.float32)
    advantage = (3 - losses) / np.sqrt(14 / 3)
    chances = np.array([0.5, 0.3, 0.2])
    score = np.eye(3)[level] - chances
    for replaced, behaviour in ((None, np.exp(-1)), (jnp.roll(unit, 1, 0), 1 / 3)):
        rows = level if replaced is None else np.roll(level, 1)
        weight = np.minimum(chances[rows] / behaviour, 1.5)
        expected = np.mean(weight[:, None] * np.asarray(advantage)[:, None] * score[rows], 0)
        np.testing.assert_allclose(told_gradient(method, unit, losses, params, replaced)[0], expected, atol=1e-6)


def test_ppo_gains_nothing_beyond_its_clip_and_takes_several_steps():
    slope = jax.vmap(jax.grad(clipped_gain), (0, None, 0, None))
    log_ratio = jnp.log(jnp.array([1.0, 1.3, 1.3, 0.7, 0.7, 3.1]))
    advantage = jnp.array([2.0, 2.0, -2.0, 2.0, -2.0, -2.0])
    np.testing.assert_allclose(slope(log_ratio, 0.0, advantage, 0.2), [2.0, 0, -2.6, 1.4, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(clipped_gain(log_ratio[-1:], 0.0, advantage[-1:], 0.2), -6.0, rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(weighted_score), (0, None, 0, None))(log_ratio, 0.0, advantage, 2.0),
        [2.0, 2.6, -2.6, 1.4, -1.4, -4.0],
        rtol=1e-5,
    )
    tree = {"c": hpo.Categorical((0, 1, 2))}
    moves = {}
    for epochs in (1, 4, 40):
        method = ppo(tree, batch=16, epochs=epochs, entropy=0.0, learning_rate=0.05)
        state = method.init(jax.random.key(0))
        trials, state = jitted(method.ask)(jax.random.key(1), state)
        after = jitted(method.tell)(state, trials, trials.hparams["c"].astype(float))
        chances = jax.nn.softmax(after.params[0])
        moves[epochs] = float(chances[0] * 3 - 1)
    assert moves[4] > 2.5 * moves[1] and 0.1 < moves[40] < 0.6


ARMS = np.random.default_rng(7).normal(size=(4, 4)).astype(np.float32)


def shares(method, rounds, seeds=100):
    """How often each of some studies of a noisy bandit draws the best arm in its last rounds."""

    def pull(key, h):
        return jnp.asarray(ARMS)[h["a"], h["b"]] + 0.3 * jax.random.normal(key)

    study = hpo.study(pull, method, rounds=rounds)

    def run(key):
        hparams = study(key)[1].trials.hparams
        return (hparams["a"] * 4 + hparams["b"] == ARMS.argmin())[-10:].mean()

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), seeds)))


@pytest.mark.parametrize("build", [reinforce, ppo])
@pytest.mark.parametrize("kind", POLICIES)
def test_bandits_converge_to_their_best_arm(build, kind):
    tree = {name: hpo.Categorical(tuple(range(4))) for name in "ab"}
    rounds = 300 if (build, kind) == (reinforce, "autoregressive") else 120
    assert np.median(shares(build(tree, policy=kind, hidden=16), rounds)) > 0.9
    if kind == "factorised":
        assert np.median(shares(build(tree, learning_rate=1e-6), 20)) < 0.2


def test_only_the_autoregressive_policy_keeps_what_belongs_together():
    tree = {name: hpo.Categorical((0, 1, 2)) for name in "ab"}
    found = {}
    for kind in POLICIES:
        method = reinforce(tree, policy=kind, hidden=8, entropy=0.5, learning_rate=0.03, batch=32)
        study = hpo.study(lambda key, h: (h["a"] != h["b"]).astype(float), method, rounds=100)
        h = jax.jit(study)(jax.random.key(0))[1].trials.hparams
        a, b = np.asarray(h["a"])[-20:].ravel(), np.asarray(h["b"])[-20:].ravel()
        found[kind] = (a == b).mean(), np.bincount(a, minlength=3).max() / a.size
    assert found["autoregressive"][0] > 0.8 and found["autoregressive"][1] < 0.6
    assert found["factorised"][0] < 0.8 or found["factorised"][1] > 0.6


@pytest.mark.parametrize("build", [reinforce, ppo])
def test_reals_are_found(build):
    tree = {"x": hpo.Float(1e-4, 1.0, log=True), "n": hpo.Int(1, 500), "y": hpo.Float(-1.0, 1.0)}
    loss = lambda key, h: (jnp.log10(h["x"]) + 2) ** 2 + ((h["n"] - 400) / 250) ** 2 + 2 * (1 - h["y"])  # noqa: E731
    _, trace = jax.jit(hpo.study(loss, build(tree), rounds=200))(jax.random.key(0))
    assert float(jnp.median(trace.losses[-5:])) < 0.15 and trace.trials.hparams["y"][-5:].min() > 0.8


@pytest.mark.parametrize("build", [reinforce, ppo])
def test_an_optimum_that_is_found_is_not_left_again(build):
    tree = {f"x{i}": hpo.Float(0.0, 1.0) for i in range(10)}
    study = hpo.study(lambda key, h: sum((x - 0.8) ** 2 for x in h.values()), build(tree), rounds=160)
    losses = jax.jit(jax.vmap(lambda key: study(key)[1].losses))(jax.random.split(jax.random.key(0), 12))
    assert np.mean(losses[:, -5:], axis=(1, 2)).max() < 0.02


@pytest.mark.parametrize(
    "build, arguments, message",
    [
        (reinforce, dict(policy="lstm"), "policy must be one of ['factorised', 'autoregressive'], got 'lstm'"),
        (reinforce, dict(learning_rate=0.0), "learning_rate must be in [1e-06, 10], got 0.0; 0.1, or 0.03"),
        (reinforce, dict(decay=1.0), "decay must be in [0, 0.9999], got 1.0; 0.9 is usual"),
        (reinforce, dict(clip=0.5), "clip must be in [1, 1e+06], got 0.5"),
        (reinforce, dict(hidden=0), "hidden must be at least 1, got 0"),
        (ppo, dict(epochs=0), "epochs must be at least 1, got 0"),
        (ppo, dict(clip=1.5), "clip must be in [0.001, 0.999], got 1.5; 0.2 is usual"),
        (ppo, dict(entropy=-1.0), "entropy must be in [0, 100], got -1.0"),
    ],
)
def test_bad_input_is_refused_with_its_name_value_and_remedy(build, arguments, message):
    with pytest.raises((ValueError, TypeError)) as error:
        build(PLAIN, **arguments)
    assert message in str(error.value)
