"""Gradient descent: its steps against the chain rule by hand, its starts, and what it reaches."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as hpo

ADAM = optax.adam(0.1)
SGD = optax.sgd(0.5)
KEY = jax.random.key(0)


def jitted(method):
    return jax.jit(method.init), jax.jit(method.ask), jax.jit(method.tell)


def minimize(objective, method, trials=400, **kwargs):
    return hpo.minimize(objective, method, key=KEY, trials=trials, progress=False, **kwargs)


def gradients_of(objective, trials, space):
    from jaxhpo.engine.lanes import value_and_gradient

    return jax.jit(jax.vmap(lambda h: value_and_gradient(space, objective, KEY, h)))(trials.hparams)


STEPPED = hpo.Space(
    {
        "lr": hpo.Float(1e-4, 1.0, log=True),
        "x": hpo.Float(-2.0, 6.0),
        "width": hpo.Int(1, 40, step=3),
        "depth": hpo.Int(1, 64, log=True),
        "kind": hpo.Categorical((0.5, 1.5)),
        "w": hpo.Array((2, 2), 0.0, 4.0),
    }
)


def test_a_step_of_sgd_is_the_chain_rule_by_hand():
    method = hpo.gradient(STEPPED, SGD, starts=4)
    init, ask, tell = jitted(method)
    trials, state = ask(KEY, init(KEY))
    slope = {"lr": 0.3, "x": -0.2, "width": 0.01, "depth": -0.02, "w": np.array([[0.1, 0.2], [-0.3, 0.4]])}
    grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trials.hparams)
    grads = grads | {k: jnp.broadcast_to(jnp.float32(v), grads[k].shape) for k, v in slope.items()}
    grads["kind"] = grads["kind"] + 7.0
    after = tell(state, trials, jnp.ones(4), grads)
    moved = np.asarray(ask(KEY, after)[0].unit, float)
    u = np.asarray(trials.unit, float)
    names = STEPPED.names
    by_unit = np.zeros_like(u)
    by_unit[:, names.index("lr")] = 0.3 * 1e-4 * np.exp(np.log(1e4) * u[:, names.index("lr")]) * np.log(1e4)
    by_unit[:, names.index("x")] = -0.2 * 8
    by_unit[:, names.index("width")] = 0.01 * 14 * 3
    width = np.log(64.5 / 0.5)
    by_unit[:, names.index("depth")] = -0.02 * 0.5 * width * np.exp(width * u[:, names.index("depth")])
    for i, s in enumerate((0.1, 0.2, -0.3, 0.4)):
        by_unit[:, names.index(f"w[{i}]")] = 4 * s
    v = np.log(u / (1 - u)) - 0.5 * by_unit * u * (1 - u)
    np.testing.assert_allclose(moved, 1 / (1 + np.exp(-v)), rtol=2e-5)
    assert (moved != u).sum() == u.size - len(u), "a choice stays, everything else moves"
    with jax.enable_x64(False):
        norm = np.sqrt((by_unit**2).sum(1))
        from jaxhpo.chain import norms

        np.testing.assert_allclose(norms(STEPPED, trials.unit, grads), norm, rtol=1e-5)


def test_descends_in_log_space_and_to_whole_numbers():
    """Integers are whole floats under the trace, so that they have slopes, and ints outside."""
    seen = {}

    def objective(key, h):
        seen.update({k: v.dtype for k, v in h.items()})
        real = jnp.log(h["lr"] / 3e-4) ** 2 + jnp.log(h["wd"] / 2e-3) ** 2
        return real + (h["n"] - 11.3) ** 2 + 4 * (jnp.log(h["m"]) - np.log(37)) ** 2

    space = {
        "lr": hpo.Float(1e-6, 1.0, log=True),
        "wd": hpo.Float(1e-8, 1e-1, log=True),
        "n": hpo.Int(0, 100),
        "m": hpo.Int(1, 1000, log=True),
    }
    result = minimize(objective, hpo.gradient(space, ADAM), trials=800)
    assert seen["n"] == seen["m"] == jnp.float32
    assert (result.trials.hparams["n"] % 1 == 0).all()
    best = result.best_hparams
    assert best["n"] == 11 and type(best["n"]) is type(best["m"]) is int and abs(best["m"] - 37) <= 1
    assert result.best_loss < 0.09 + 5e-3
    np.testing.assert_allclose([best["lr"], best["wd"]], [3e-4, 2e-3], rtol=0.07)
    assert result.to_dataframe()["n"].dtype == np.int64 and "11" in str(result.table(1))


def test_the_best_at_a_bound_is_reached_and_left_again():
    space = {"x": hpo.Float(0.0, 1.0), "y": hpo.Float(0.0, 1.0)}
    objective = lambda key, h: 1 - h["x"] + (h["y"] - 0.6) ** 2  # noqa: E731
    result = minimize(objective, hpo.gradient(space, ADAM, starts=2), initial=[{"x": 0.0, "y": 1.0}])
    assert result.trials.hparams["x"][0] == 0.0 and result.trials.hparams["y"][0] == 1.0
    assert result.best_loss < 3e-3


def test_known_results_are_where_starts_begin():
    space = {"x": hpo.Float(0.0, 1.0)}
    known = [({"x": 0.9}, 0.3), ({"x": 0.25}, 0.1), ({"x": 0.1}, 0.2)]
    method = hpo.gradient(space, SGD, starts=1)
    result = minimize(lambda key, h: (h["x"] - 0.2) ** 2, method, trials=1, initial=known)
    np.testing.assert_allclose(result.trials.hparams["x"], [0.9, 0.25, 0.1, 0.25], rtol=1e-6)
    assert np.isnan(result.gradient_norms[:3]).all() and abs(result.gradient_norms[3] - 0.1) < 1e-6


RELAXED = {"op": hpo.Categorical(("a", "b", "c"), relaxed=True), "x": hpo.Float(-1.0, 1.0)}


def test_relaxed_choices_are_soft_then_one_option_and_only_that_can_be_best():
    cost = jnp.array([0.5, 0.2, 0.9])

    def objective(key, h):
        # Half and half would be better than any option, but nobody could build it.
        entropy = -jnp.sum(h["op"] * jnp.log(h["op"] + 1e-6))
        return h["op"] @ cost + (h["x"] - 0.3) ** 2 - entropy

    method = hpo.gradient(RELAXED, ADAM, starts=4, anneal=20, temperature=2.0, final_temperature=0.2, patience=50)
    result = minimize(objective, method, trials=4 * 50)
    weights = result.trials.hparams["op"].reshape(50, 4, 3)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[:20].max(-1) < 0.999).all() and set(np.unique(weights[20:])) == {0.0, 1.0}
    assert result.best_hparams["op"] == "b" and abs(result.best_loss - 0.2) < 2e-3
    losses = result.trials.loss.reshape(50, 4)
    assert losses[:20].min() < 0.0, "soft weights are recorded with lower losses"
    assert np.isinf(result.best_so_far()[1][: 4 * 20]).all()
    with pytest.raises(hpo.AllTrialsFailed, match="soft weights, which are no choice: run until they are one option"):
        minimize(objective, method, trials=4 * 50, callbacks=lambda report: True)


def test_the_slope_of_a_logit_is_that_of_the_softmax():
    from jaxhpo import coordinates as at

    space = hpo.Space(
        {
            "a": hpo.Categorical((1, 2, 3), relaxed=True),
            "b": hpo.Categorical(("p", "q"), relaxed=True),
            "x": hpo.Float(0.0, 1.0),
        }
    )
    c = at.coordinates(space)
    point = jnp.array([[0.1, 0.2, 0.3, 0.5, -0.4, 1.2, 0.3, -0.2]])
    heat = jnp.array([0.7])
    by_weight = {"a": jnp.array([[1.0, -2.0, 0.5]]), "b": jnp.array([[0.3, 0.9]]), "x": jnp.array([0.0])}

    def linear(logits):
        a, b = jax.nn.softmax(logits[:3] / 0.7), jax.nn.softmax(logits[3:] / 0.7)
        return a @ by_weight["a"][0] + b @ by_weight["b"][0]

    found = at.slopes(c, point, at.unit_of(c, point), heat, by_weight)
    np.testing.assert_allclose(found[0, 3:], jax.grad(linear)(point[0, 3:]), rtol=1e-5)
    weights = np.concatenate([jax.nn.softmax(point[0, 3:6] / 0.7), jax.nn.softmax(point[0, 6:] / 0.7)])
    np.testing.assert_allclose(at.weights(c, point, heat)[0], weights, rtol=1e-6)


def test_choices_are_spread_over_the_starts_and_stay():
    space = hpo.Space(
        {
            "c": hpo.Categorical(("a", "b", "c", "d", "e", "f", "g")),
            "o": hpo.Ordinal((1, 2, 3, 4)),
            "opt": hpo.OneOf(sgd={"m": hpo.Float(0.0, 1.0)}, adam={}),
            "x": hpo.Float(0.0, 1.0),
        }
    )
    method = hpo.gradient(space, ADAM, starts=8)
    init, ask, tell = jitted(method)
    for seed in range(5):
        trials, state = ask(KEY, init(jax.random.key(seed)))
        level = np.asarray(space.level(trials.unit))
        assert [len(set(column)) for column in level.T] == [7, 4, 2]
    slopes = jax.tree.map(lambda x: jnp.ones(x.shape), trials.hparams)
    for _ in range(5):
        before, state = trials, tell(state, trials, jnp.ones(8), slopes)
        trials, state = ask(KEY, state)
    np.testing.assert_array_equal(space.level(trials.unit), level)
    dead = np.asarray(level[:, 2] == 1)
    np.testing.assert_array_equal((trials.unit != before.unit)[:, space.names.index("opt.sgd.m")], ~dead)


LINE = hpo.Space({"x": hpo.Float(0.0, 1.0), "y": hpo.Float(0.0, 1.0)})


@pytest.fixture(scope="module")
def line():
    return jitted(hpo.gradient(LINE, ADAM, starts=8, patience=3, replaced=0.25))


def slopes(trials, x=1.0):
    return jax.tree.map(lambda h: jnp.full(h.shape, x), trials.hparams)


def test_the_worst_starts_begin_anew_after_their_chance_and_the_best_never(line):
    init, ask, tell = line
    losses = jnp.array([3.0, 1.0, 7.0, 4.0, 0.5, 6.0, 2.0, 5.0])
    trials, state = ask(KEY, init(KEY))
    lives = []
    for now in range(6):
        state = tell(state, trials, losses, slopes(trials))
        trials, state = ask(jax.random.key(now), state)
        lives.append(np.asarray(trials.aux.life).tolist())
    assert lives[1] == [0] * 8
    assert lives[2] == lives[3] == lives[4] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert lives[5] == [0, 0, 2, 0, 0, 2, 0, 0], "with losses as bad as before they go again"
    assert np.asarray(trials.aux.age).tolist() == [6, 6, 0, 6, 6, 0, 6, 6]
    # A new start has an optimizer as new: the first step of Adam is its learning rate.
    state = tell(state, trials, losses, slopes(trials, 100.0))
    after, _ = ask(KEY, state)
    logit = lambda u: np.log(u / (1 - u))  # noqa: E731
    step = logit(np.asarray(after.unit, float)) - logit(np.asarray(trials.unit, float))
    np.testing.assert_allclose(step[[2, 5]], -0.1, rtol=1e-3)
    assert (np.abs(step[[0, 1, 3, 4, 6, 7]] + 0.1) > 0.01).all()


def test_without_restarts_a_bad_start_stays_bad():
    """One basin of two has the optimum; starts that are replaced find it, others do not."""
    space = {"x": hpo.Float(0.0, 1.0)}

    def two_wells(key, h):
        return jnp.where(h["x"] < 0.85, (h["x"] - 0.4) ** 2 + 0.1, 50 * (h["x"] - 0.92) ** 2)

    best = {}
    for replaced in (0.0, 0.5):
        method = hpo.gradient(space, ADAM, starts=3, patience=10, replaced=replaced)
        run = jax.jit(jax.vmap(lambda key: hpo.study(two_wells, method, rounds=100)(key)[1].losses.min()))  # noqa: B023
        best[replaced] = np.asarray(run(jax.random.split(KEY, 20)))
    assert (best[0.0] > 0.05).mean() > 0.3 and (best[0.5] < 0.05).mean() > 0.8


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_failure_costs_its_own_start_only(line, what):
    init, ask, tell = line
    trials, state = ask(KEY, init(KEY))
    losses, good = jnp.arange(8.0), slopes(trials)
    bad_loss = losses.at[2].set(jnp.nan) if what == "loss" else losses
    bad = jax.tree.map(lambda g: g.at[2].set(jnp.inf if what == "gradient" else jnp.nan), good)
    fine, _ = ask(jax.random.key(1), tell(state, trials, losses, good))
    hurt, after = ask(jax.random.key(1), tell(state, trials, bad_loss, bad))
    others = np.arange(8) != 2
    np.testing.assert_array_equal(fine.unit[others], hurt.unit[others])
    assert np.asarray(hurt.aux.life).tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert np.abs(hurt.unit[2] - trials.unit[2]).max() > 0.05
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after) if x.dtype == jnp.float32 and x is not after.best)


def test_rows_told_twice_late_or_never_move_nothing_twice(line):
    init, ask, tell = line
    first, state = ask(KEY, init(KEY))
    again, state = ask(jax.random.key(5), state)
    np.testing.assert_array_equal(first.unit, again.unit)
    losses = jnp.arange(8.0)
    once = tell(state, first, losses, slopes(first))
    twice = tell(once, again, losses, slopes(again))
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_a_better_result_from_elsewhere_is_where_a_start_goes_on_whenever_it_comes(line):
    init, ask, tell = line
    first, state = ask(KEY, init(KEY))
    once = tell(state, first, jnp.full(8, 5.0), slopes(first))
    elsewhere = first._replace(unit=first.unit.at[0].set(0.9), active=jnp.arange(8) == 0)
    state = tell(once, elsewhere, jnp.full(8, -100.0), slopes(first))
    assert state.best[0] == -100 and (state.best[1:] == 5).all()
    np.testing.assert_array_equal(state.point[1:], once.point[1:])
    pending, _ = ask(jax.random.key(1), once)
    after = tell(state, pending, jnp.full(8, 4.0), slopes(pending))
    np.testing.assert_array_equal(after.point[0], state.point[0], "what it had asked before is not its step any more")


def test_islands_that_descend_move_integers_and_choices():
    space = {"n": hpo.Int(0, 100), "op": hpo.Categorical(("a", "b", "c"), relaxed=True)}
    method = hpo.islands(hpo.gradient(space, ADAM, starts=2, anneal=10), 2, every=3)

    def objective(key, h):
        return ((h["n"] - 40) / 50) ** 2 + h["op"] @ jnp.array([0.5, 0.2, 0.9])

    result = minimize(objective, method, trials=4 * 40)
    weights = result.trials.hparams["op"].reshape(40, 4, 3)
    assert (weights[:3].max(-1) < 0.9).all(), "soft weights reach the objective"
    assert result.best_hparams["op"] == "b" and abs(result.best_hparams["n"] - 40) < 5


def test_patience_does_not_count_soft_weights():
    method = hpo.gradient(RELAXED, ADAM, starts=2, anneal=20)
    result = minimize(lambda key, h: h["op"] @ jnp.arange(3.0) + h["x"] ** 2, method, trials=100, patience=10)
    assert np.isfinite(result.best_loss) and len(result.trials.id) > 40


def test_a_branch_that_is_not_chosen_breaks_no_gradient():
    space = {"o": hpo.OneOf(p={"m": hpo.Float(0.0, 1.0)}, q={"z": hpo.Float(0.0, 1.0)})}

    def objective(key, h):
        z = h["o"]["q"]["z"]
        return jnp.where(h["o"]["choice"] == 0, (h["o"]["p"]["m"] - 0.5) ** 2, 1 + jnp.sqrt(z - z))

    method = hpo.gradient(space, ADAM, starts=2, patience=50)
    with pytest.warns(UserWarning, match="had a finite loss but a gradient that is NaN"):
        result = minimize(objective, method, trials=20)
    choice = result.trials.hparams["o"]["choice"]
    assert np.isfinite(result.gradient_norms[choice == 0]).all() and np.isinf(result.gradient_norms[choice == 1]).all()


def test_ten_thousand_dims():
    n = 10_000
    target = np.linspace(0.1, 0.9, n, dtype=np.float32)
    space = hpo.Space({"w": hpo.Array(n, 0.0, 1.0), "lr": hpo.Float(1e-3, 1.0, log=True)})
    method = hpo.gradient(space, ADAM, starts=4)

    def objective(key, h):
        return jnp.mean((h["w"] - target) ** 2) + jnp.log(h["lr"] / 0.1) ** 2

    begun = time.perf_counter()
    result = minimize(objective, method, trials=400)
    seconds = time.perf_counter() - begun
    first = result.trials.hparams["w"][:4]
    assert (np.ptp(first, axis=1) < 1e-6).all() and np.ptp(first[:, 0]) > 0.5
    assert result.best_loss < 1e-3, "the best constant array has 0.053"
    np.testing.assert_allclose(result.best_hparams["w"], target, atol=0.1)
    assert result.compile_seconds < 10 and seconds < 40
    assert result.trials.unit.shape == (400, n + 1)


def test_only_gradient_and_few_others_take_huge_spaces():
    space = {"small": hpo.Float(0.0, 1.0), "w": hpo.Array(3000, 0.0, 1.0)}
    message = "space has 3001 dims, of which 'w' takes 3000, but this method searches at most 2048; use hpo.gradient"
    for build in (hpo.grid, hpo.annealing, hpo.coordinate_descent, hpo.bayesian, hpo.gp_ei, hpo.tpe, hpo.genetic):
        with pytest.raises(ValueError, match=message):
            build(space)
    for build in (hpo.differential_evolution, hpo.particle_swarm, hpo.cma_es):
        with pytest.raises(ValueError, match=message):
            build(space)
    for build in (hpo.successive_halving, hpo.hyperband, hpo.asha, hpo.bohb, hpo.dehb):
        with pytest.raises(ValueError, match=message):
            build(space, max_steps=9, **({"trials": 9} if build is hpo.successive_halving else {}))
    for method in (hpo.gradient(space, ADAM), hpo.random(space), hpo.quasirandom(space), hpo.pbt(space, every=1)):
        assert method.space.dims == 3001


def test_exploding_and_broken_gradients_are_named():
    space = {"x": hpo.Float(0.0, 1.0)}
    method = hpo.gradient(space, ADAM, starts=4)
    with pytest.warns(UserWarning, match="gradients explode.*Truncated"):
        result = minimize(lambda key, h: jnp.sin(1e6 * h["x"]), method, trials=8)
    expected = np.abs(1e6 * np.cos(1e6 * result.trials.hparams["x"].astype(np.float32)))
    assert np.median(result.gradient_norms / expected) == pytest.approx(1, rel=0.2)
    with pytest.warns(UserWarning, match="8 of 8 trials had a finite loss but a gradient that is NaN.*eps_root"):
        result = minimize(lambda key, h: h["x"] + jnp.sqrt(0 * h["x"]), method, trials=8)
    assert np.isinf(result.gradient_norms).all()


def test_the_step_of_a_number_that_is_not_finite_is_named():
    # Of 1, 1 + x, 1 + 2x, ... the first below 0 has no root.
    roots = hpo.Trainable(
        lambda key, h: {"x": jnp.ones(())},
        lambda key, s, h: {"x": s["x"] + h["x"] + 0 * jnp.sqrt(s["x"] + h["x"])},
        lambda s, h: s["x"] ** 2,
    )
    method = hpo.gradient({"x": hpo.Float(-0.2, 0.1)}, ADAM, starts=8)
    with pytest.warns(UserWarning, match="trials had no finite loss; in trial") as seen:
        result = minimize(hpo.unroll(roots, 9), method, trials=8)
    failed = np.flatnonzero(np.isnan(result.trials.loss))
    step = int(np.ceil(1 / -result.trials.hparams["x"][failed[0]]))
    assert 0 < len(failed) < 8 and f"{len(failed)} of 8 trials" in str(seen[0].message)
    assert f"in trial {failed[0]}, the value of train_state['x'] is the first that is not finite, in step {step};" in (
        str(seen[0].message)
    )
    method = hpo.gradient({"x": hpo.Float(-0.5, -0.4)}, ADAM, starts=2)
    with pytest.raises(hpo.AllTrialsFailed, match="in trial 0, the value of train_state.*finite, in step 3"):
        minimize(hpo.unroll(roots, 9), method, trials=2)


def test_a_resumed_study_is_the_same_and_another_optimizer_another_study(tmp_path):
    space = {"x": hpo.Float(0.0, 1.0), "n": hpo.Int(0, 9), "op": hpo.Categorical(("a", "b"), relaxed=True)}
    objective = lambda key, h: (h["x"] - 0.3) ** 2 + (h["n"] - 4) ** 2 + h["op"][0]  # noqa: E731
    method = hpo.gradient(space, ADAM, starts=2, anneal=3)
    straight = minimize(objective, method, trials=24)
    minimize(objective, method, trials=24, directory=tmp_path, callbacks=lambda report: report.rounds >= 5)
    resumed = minimize(objective, method, trials=24, directory=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, straight.trials, resumed.trials)
    with pytest.raises(ValueError, match="differs in method"):
        minimize(objective, hpo.gradient(space, optax.adam(0.2), starts=2, anneal=3), trials=24, directory=tmp_path)


def test_an_optimizer_that_looks_at_the_loss():
    """Polyak's step along a slope of 2 is (loss - 0) / 2^2 * 2, in the coordinates of the descent."""
    method = hpo.gradient({"x": hpo.Float(0.0, 1.0)}, optax.polyak_sgd(max_learning_rate=1e6), starts=1)
    init, ask, tell = jitted(method)
    trials, state = ask(KEY, init(KEY))
    after, _ = ask(KEY, tell(state, trials, jnp.array([1e-3]), {"x": jnp.array([2.0])}))
    u, v = np.asarray(trials.unit, float), np.asarray(after.unit, float)
    slope = 2 * u * (1 - u)
    np.testing.assert_allclose(np.log(v / (1 - v)), np.log(u / (1 - u)) - 1e-3 / slope, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"optimizer": optax.lbfgs()}, TypeError, r"optimizer calls the objective itself.*hpo\.trust_region\(\)"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be an optax optimizer, got 0.1; say optax.adam"),
        ({"starts": 0}, ValueError, "starts must be at least 1"),
        ({"patience": 0}, ValueError, "patience must be in"),
        ({"replaced": 1.5}, ValueError, "replaced must be in"),
        ({"temperature": 0.0}, ValueError, "temperature must be in"),
        ({"final_temperature": math.nan}, ValueError, "final_temperature must be in"),
        ({"anneal": -1}, ValueError, "anneal must be in"),
        ({"space": {"n": hpo.Int(0, 2**25)}}, ValueError, "'n': descent moves integers as float32"),
    ],
)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        hpo.gradient(**({"space": LINE, "optimizer": ADAM} | wrong))
