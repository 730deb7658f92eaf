"""Methods side by side: each repeat is the study that `minimize` runs, at a cost that is the same for all."""

import functools
import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as hpo
from jaxhpo.__main__ import main
from jaxhpo.comparison import quantiles, ranks
from jaxhpo.engine.repeats import Price, _Runner
from tests.one_plus_one import one_plus_one
from tests.problems import MIXED, Counter

KEY = jax.random.key(5)
STEPS, BUDGET, REPEATS = 9, 90, 3
METHODS = {
    "random": hpo.random(MIXED, batch=4),
    "tpe": hpo.tpe(MIXED, startup=4, candidates=8, batch=2),
    "asha": hpo.asha(MIXED, max_steps=STEPS, batch=4),
    "hyperband": hpo.hyperband(MIXED, max_steps=STEPS, batch=4),
    "pbt": hpo.pbt(MIXED, population=5, every=3),
    "gradient": hpo.gradient(MIXED, optax.adam(0.1), starts=2),
}
TRAINABLE = Counter().trainable


def noisy_failures(key, state, h):
    """Trials of some keys fail, so that studies of different keys take different turns."""
    after = TRAINABLE.step(key, state, h)
    fails = (jax.random.uniform(key) < 0.1) & (after["steps"] > 2)
    return after | {"value": jnp.where(fails, jnp.nan, after["value"])}


PROBLEM = hpo.unroll(TRAINABLE._replace(step=noisy_failures), steps=STEPS)
SPHERE = {"x": hpo.Float(-5.0, 5.0), "y": hpo.Float(-5.0, 5.0)}


def sphere(key, h):
    del key
    return h["x"] ** 2 + h["y"] ** 2


@functools.cache
def trained():
    return hpo.compare(PROBLEM, METHODS, key=KEY, steps=BUDGET, repeats=REPEATS)


@functools.cache
def spheres():
    methods = {"random": hpo.random(SPHERE, batch=5), "coordinate_descent": hpo.coordinate_descent(SPHERE, batch=5)}
    problems = {"sphere": sphere, "shifted": lambda key, h: sphere(key, {"x": h["x"] - 4, "y": h["y"]})}
    return hpo.compare(problems, methods, key=KEY, trials=60, repeats=4)


@pytest.mark.parametrize("name", METHODS)
def test_each_repeat_is_the_study_of_minimize(name):
    method, runs = METHODS[name], trained().runs["problem"][name]
    whole = 4 * STEPS if method.uses_gradients else STEPS
    budget = {"steps": BUDGET} if method.slots else {"trials": -(-BUDGET // whole)}
    cost, best = trained().best_so_far(name)
    assert cost[-1] == BUDGET and best.shape == (REPEATS, 100)
    for r in range(2):
        key = jax.random.fold_in(KEY, r)
        alone = hpo.minimize(PROBLEM.trainable if method.slots else PROBLEM, method, key=key, **budget)
        np.testing.assert_array_equal(runs.trials[r].id, alone.trials.id)
        np.testing.assert_array_equal(runs.trials[r].steps, alone.trials.steps)
        np.testing.assert_allclose(runs.trials[r].unit, alone.trials.unit, atol=1e-6)
        np.testing.assert_allclose(runs.trials[r].loss, alone.trials.loss, rtol=1e-6)
        within = runs.cost[r] <= BUDGET
        assert best[r, -1] == pytest.approx(alone.best_so_far()[1][within][-1], rel=1e-6)
        at = np.searchsorted(runs.cost[r], cost, side="right")
        np.testing.assert_allclose(best[r], np.append(np.inf, alone.best_so_far()[1])[at], rtol=1e-6)


def test_repeats_differ_and_some_of_their_trials_fail():
    for runs in trained().runs["problem"].values():
        losses = [records.loss for records in runs.trials]
        assert len({tuple(x.tolist()) for x in losses}) == REPEATS
    assert any(np.isnan(x.loss).any() for runs in trained().runs["problem"].values() for x in runs.trials)


def test_costs_are_training_steps_and_gradients_cost_more():
    runs = trained().runs["problem"]
    for name, method in METHODS.items():
        for records, cost in zip(runs[name].trials, runs[name].cost, strict=True):
            assert len(cost) == len(records.loss) and (np.diff(cost) > 0).all()
            # A Hyperband is done when its brackets are.
            assert (BUDGET if method.rounds is None else 0) <= cost[-1] < BUDGET + 4 * STEPS * method.batch
    assert runs["gradient"].cost[0].tolist() == [36, 72, 108, 144]
    assert runs["random"].cost[0][:3].tolist() == [9, 18, 27]
    asha = runs["asha"].trials[0]
    before = [0 if parent < 0 else asha.steps[:i][asha.id[:i] == parent][-1] for i, parent in enumerate(asha.parent)]
    np.testing.assert_array_equal(runs["asha"].cost[0], np.cumsum(asha.steps - before))


def test_a_descent_in_training_pays_for_the_steps_it_looks_back():
    method = hpo.darts({"x": hpo.Float(0, 1)}, max_steps=6, every=3, searches=2)
    trials, _ = method.ask(jax.random.key(0), method.init(jax.random.key(0)))
    price = Price(whole=6, gradient=4.0)
    for lookback, cost in ((0, 3), (1, 6), (3, 12), (9, 12)):
        assert price.of(method._replace(lookback=lookback), trials).tolist() == [cost, cost]
    assert price.trials(hpo.random(SPHERE), 13) == 3 and price.trials(hpo.gradient(SPHERE, optax.adam(0.1)), 48) == 2


def test_the_same_key_gives_the_same_table_and_another_one_another():
    methods = [METHODS["random"], METHODS["asha"]]
    tables = [
        str(hpo.compare(PROBLEM, methods, key=k, trials=10, repeats=3).table()) for k in (KEY, KEY, jax.random.key(1))
    ]
    assert tables[0] == tables[1] != tables[2]
    assert "up to 90 training steps for each of 3 repeats" in tables[0]


def test_asks_that_are_not_full_do_not_end_a_study_early():
    method = hpo.gradient(SPHERE, optax.adam(0.1), starts=6, halving=1)
    comparison = hpo.compare(sphere, [method], key=KEY, trials=96, repeats=2)
    alone = hpo.minimize(sphere, method, key=jax.random.fold_in(KEY, 1), trials=24)
    records = comparison.runs["problem"]["gradient"].trials[1]
    assert len(records.loss) == len(alone.trials.loss) and comparison.spent("gradient") == 1
    np.testing.assert_allclose(records.loss, alone.trials.loss, rtol=1e-5, atol=1e-6)


def test_rooms_grow_with_an_open_ended_study(monkeypatch):
    monkeypatch.setattr("jaxhpo.engine.repeats.OPEN_ROWS", 8)
    method = hpo.bohb(MIXED, max_steps=STEPS, enough=3, batch=4)
    comparison = hpo.compare(PROBLEM, [method], key=KEY, steps=400, repeats=2)
    alone = hpo.minimize(PROBLEM.trainable, method, key=jax.random.fold_in(KEY, 1), steps=400)
    records = comparison.runs["problem"]["bohb"].trials[1]
    assert len(records.loss) > 64
    np.testing.assert_array_equal(records.id, alone.trials.id)
    np.testing.assert_allclose(records.unit, alone.trials.unit, atol=1e-6)


def test_studies_whose_asks_differ_in_length_train_side_by_side():
    """Steps are equal within an ask of one study, not over studies."""
    plain = hpo.pbt(MIXED, population=5, every=3)

    def ask(key, state, pending=None):
        trials, state = plain.ask(key, state)
        return trials._replace(steps=jnp.where(trials.unit.mean() > 0.5, 4, 1) + 0 * trials.steps), state

    method = plain._replace(ask=ask)
    comparison = hpo.compare(PROBLEM, [method], key=KEY, steps=BUDGET, repeats=3)
    runs = comparison.runs["problem"]["pbt"]
    assert len({tuple(x.steps[:20].tolist()) for x in runs.trials}) > 1
    for r, records in enumerate(runs.trials):
        alone = hpo.minimize(PROBLEM.trainable, method, key=jax.random.fold_in(KEY, r), steps=BUDGET)
        np.testing.assert_array_equal(records.steps, alone.trials.steps)
        np.testing.assert_allclose(records.loss, alone.trials.loss, rtol=1e-6)


def test_losses_at_soft_weights_are_never_the_best():
    space = {"act": hpo.Categorical(("a", "b", "c"), relaxed=True), "x": hpo.Float(0.0, 1.0)}
    objective = lambda key, h: h["x"] ** 2 - jnp.sum(h["act"] * jnp.log(h["act"] + 1e-3))  # noqa: E731
    method = hpo.darts(space, max_steps=6, every=2, searches=2, guard=None)
    training = hpo.Trainable(lambda key, h: h["x"], lambda key, s, h: s, lambda s, h: -objective(None, h))
    comparison = hpo.compare(training, [method], key=KEY, steps=24, repeats=2, gradient_cost=1)
    alone = hpo.minimize(training, method, key=jax.random.fold_in(KEY, 0), steps=24)
    records = comparison.runs["problem"]["darts"].trials[0]
    assert records.soft.any() and not records.soft.all()
    assert records.loss[records.soft].min() < alone.best_loss
    assert comparison.best_so_far("darts")[1][0, -1] == pytest.approx(alone.best_loss, rel=1e-5)


def test_what_is_beyond_the_budget_does_not_count():
    methods = {"wide": hpo.random(SPHERE, batch=64), "grid": hpo.grid(SPHERE, points=2, batch=4)}
    comparison = hpo.compare(sphere, methods, key=KEY, trials=8, repeats=3)
    assert all(len(x.loss) == 64 for x in comparison.runs["problem"]["wide"].trials)
    curves = [comparison.best_so_far(name)[1] for name in methods]
    assert comparison.best()[2] == pytest.approx(min(curve.min() for curve in curves))
    assert min(x.loss.min() for x in comparison.runs["problem"]["wide"].trials) < curves[0].min()
    assert (comparison.spent("wide"), comparison.spent("grid")) == (1, 0.5)
    assert {row[0]: row[-2] for row in comparison.rows()[1]} == {"wide": "100%", "grid": "50%"}
    # The first stretch of training is longer than the budget.
    none = hpo.compare(TRAINABLE, [hpo.pbt(MIXED, population=5, every=5)], key=KEY, steps=2, repeats=2)
    assert none.rows()[1][0][3] == "none"
    with pytest.raises(ValueError, match="no trial of any method on 'problem' had a finite loss within the budget"):
        none.best()


def test_times_are_those_of_the_clock():
    begun = time.perf_counter()
    method = hpo.coordinate_descent(SPHERE, batch=7)
    runs = hpo.compare(sphere, [method], key=KEY, trials=70, repeats=3).runs["problem"]["coordinate_descent"]
    passed = time.perf_counter() - begun
    assert runs.seconds + 30 * runs.ask_seconds > 0 and runs.seconds + runs.compile_seconds <= passed
    assert runs.trial_seconds == pytest.approx(runs.seconds / 210) and runs.compile_seconds > runs.seconds > 0
    assert 30 * runs.ask_seconds < passed


def test_fewer_lanes_give_the_same_result():
    few = hpo.compare(
        PROBLEM, {"asha": METHODS["asha"], "random": METHODS["random"]}, key=KEY, steps=BUDGET, repeats=3, lanes=3
    )
    for name, runs in few.runs["problem"].items():
        for mine, other in zip(runs.trials, trained().runs["problem"][name].trials, strict=True):
            np.testing.assert_array_equal(mine.loss, other.loss)
        # Two chunks of three lanes for four trials.
        assert runs.lanes_used == pytest.approx(4 / 6) and trained().runs["problem"][name].lanes_used == 1.0
    more = hpo.compare(sphere, [hpo.random(SPHERE, batch=4)], key=KEY, trials=8, repeats=2, lanes=100)
    assert more.runs["problem"]["random"].lanes_used == 1.0


def test_what_was_recorded_can_be_told_without_a_trial():
    """The asks that are timed apart are those of the study."""
    keys = jax.random.split(KEY, REPEATS)
    args = PROBLEM.trainable, METHODS["asha"], keys, BUDGET, Price(STEPS, 4.0)
    study, rehearsal = _Runner(*args), _Runner(*args)
    seen = study.advance(6)
    told = rehearsal.advance(6, seen.losses)
    np.testing.assert_array_equal(seen.trials.unit, told.trials.unit)
    np.testing.assert_array_equal(seen.trials.steps, told.trials.steps)
    assert not told.reached.any() and seen.reached.any(), "nothing trained"
    assert not np.array_equal(seen.trials.unit, _Runner(*args).advance(6, 0 * seen.losses).trials.unit)


def test_ranks_are_those_of_all_pairs_of_repeats():
    best = np.random.default_rng(0).integers(0, 4, (2, 3, 4)).astype(float)
    best[0, 1, 2] = np.inf
    expected = np.zeros(3)
    for problem, drawn in itertools.product(best, itertools.product(range(4), repeat=3)):
        values = np.array([problem[m, r] for m, r in enumerate(drawn)])
        for m in range(3):
            others = np.delete(values, m)
            expected[m] += 1 + (others < values[m]).sum() + 0.5 * (others == values[m]).sum()
    found = ranks(best)
    np.testing.assert_allclose(found.mean, expected / (2 * 4**3))
    assert found.mean.sum() == pytest.approx(6) and found.first.sum() == pytest.approx(1)
    assert ((found.low <= found.mean) & (found.mean <= found.high)).all() and (found.low < found.high).all()


def test_an_interval_has_the_mean_rank_in_it_nine_times_of_ten():
    rng, hits = np.random.default_rng(1), 0
    truth = 1 + np.mean(rng.normal(0.5, 1, 200_000) > rng.normal(0, 1, 200_000))
    for _ in range(100):
        found = ranks(np.stack([rng.normal(0.5, 1, 20), rng.normal(0, 1, 20)])[None])
        hits += found.low[0] <= truth <= found.high[0]
    assert 80 <= hits <= 97


def test_curves_ranks_and_the_best_trial_are_those_of_the_records():
    comparison = spheres()
    assert comparison.problems == ("sphere", "shifted") and comparison.methods == ("random", "coordinate_descent")
    runs = comparison.runs["shifted"]
    low = {name: min(x.loss.min() for x in runs[name].trials) for name in runs}
    name, hparams, loss = comparison.best("shifted")
    assert loss == min(low.values()) == low[name]
    assert (hparams["x"] - 4) ** 2 + hparams["y"] ** 2 == pytest.approx(loss, rel=1e-4, abs=1e-6)
    _, best = comparison.best_so_far("random", "sphere")
    np.testing.assert_allclose(best[:, 49], [x.loss[:30].min() for x in comparison.runs["sphere"]["random"].trials])
    assert comparison.ranks().mean[1] < 1.2 and comparison.order() == ["coordinate_descent", "random"]
    of = [comparison.ranks(problem=problem).mean for problem in comparison.problems]
    np.testing.assert_allclose(comparison.ranks().mean, np.mean(of, axis=0))
    half = np.stack([comparison.best_so_far(m, "sphere")[1][:, 49] for m in comparison.methods])
    np.testing.assert_allclose(comparison.ranks(0.5, "sphere").mean, ranks(half[None]).mean)


def test_a_frame_has_every_curve():
    frame = spheres().to_dataframe()
    assert list(frame.columns) == ["problem", "method", "repeat", "cost", "best"] and len(frame) == 2 * 2 * 4 * 100
    some = frame[(frame.problem == "shifted") & (frame.method == "coordinate_descent") & (frame.repeat == 2)]
    cost, best = spheres().best_so_far("coordinate_descent", "shifted")
    np.testing.assert_allclose(some.cost, cost)
    np.testing.assert_array_equal(some.best, best[2])


def test_tables_say_what_was_measured():
    header, body = spheres().rows()
    assert header[:3] == ["method", "mean rank", "90% interval"] and body[0][0] == "coordinate_descent"
    assert float(body[0][1]) == pytest.approx(spheres().ranks().mean[1], abs=5e-3)
    last = np.sort(spheres().best_so_far("coordinate_descent", "sphere")[1][:, -1])
    low, high = last[0] + 0.75 * (last[1] - last[0]), last[2] + 0.25 * (last[3] - last[2])
    assert body[0][3] == f"{(last[1] + last[2]) / 2:.3g}" and body[0][4] == f"{low:.3g}–{high:.3g}"
    _, times = spheres().time_rows()
    assert [row[0] for row in times] == ["coordinate_descent", "random"]
    assert all(float(ask) > 0 and float(trial) > 0 for _, ask, trial, *_ in times)


def test_quantiles_of_failures_are_failures():
    losses = np.array([1.0, 3.0, np.inf, 2.0, np.inf])
    # Of five the middle one is a number, and what lies between that and infinity is not.
    assert quantiles(losses, (0.0, 0.25, 0.5, 0.6, 0.75)).tolist() == [1.0, 2.0, 3.0, np.inf, np.inf]
    assert quantiles(np.array([1.0, 2.0]), (0.5,)).tolist() == [1.5]


def test_comparisons_join():
    methods = [hpo.random(SPHERE, batch=5), hpo.coordinate_descent(SPHERE, batch=5)]
    other = hpo.compare({"third": lambda key, h: h["x"] ** 4}, methods, key=KEY, trials=60, repeats=4)
    both = spheres() | other
    assert both.problems == ("sphere", "shifted", "third")
    of = [both.ranks(problem=problem).mean for problem in both.problems]
    np.testing.assert_allclose(both.ranks().mean, np.mean(of, axis=0))
    with pytest.raises(ValueError, match="problem 'third'"):
        both | other
    with pytest.raises(ValueError, match="same methods and repeats"):
        both | trained()


def test_a_method_of_ones_own_is_compared_like_any_other():
    methods = [hpo.random(SPHERE, batch=4), one_plus_one(SPHERE)]
    comparison = hpo.compare(sphere, methods, key=KEY, trials=80, repeats=4)
    assert [row[0] for row in comparison.rows()[1]] == ["one_plus_one", "random"]
    assert comparison.ranks().high[1] < comparison.ranks().low[0]
    alone = hpo.minimize(sphere, methods[1], key=jax.random.fold_in(KEY, 2), trials=80)
    assert comparison.best_so_far("one_plus_one")[1][2, -1] == pytest.approx(alone.best_loss, rel=1e-5)


def far(h):
    if h["x"] > 4:
        raise ValueError("too far")
    return h["x"] ** 2 + h["y"] ** 2


def test_external_problems_run_in_their_pool():
    external = hpo.external(far, workers=2, pool="thread")
    methods = {"random": hpo.random(SPHERE, batch=4), "grid": hpo.grid(SPHERE, points=4, batch=4)}
    comparison = hpo.compare(external, methods, key=KEY, trials=24, repeats=2)
    for r, records in enumerate(comparison.runs["problem"]["random"].trials):
        alone = hpo.minimize(external, methods["random"], key=jax.random.fold_in(KEY, r), trials=24)
        np.testing.assert_array_equal(records.loss, alone.trials.loss)
    runs = comparison.runs["problem"]
    assert len(runs["grid"].trials[0].loss) == 16 and np.isnan(runs["grid"].trials[0].loss).sum() == 4
    assert [set(errors.values()) for errors in runs["grid"].errors] == [{"ValueError: too far"}] * 2
    assert sum(len(errors) for errors in runs["grid"].errors) == 8
    assert runs["random"].lanes_used == 1.0 and runs["random"].ask_seconds > 0
    with pytest.raises(TypeError, match="external, but 'gradient'"):
        hpo.compare(external, [hpo.gradient(SPHERE, optax.adam(0.1))], key=KEY, trials=8)
    with pytest.raises(ValueError, match="lanes=2 is for JAX problems"):
        hpo.compare(external, methods, key=KEY, trials=8, lanes=2)


def test_a_method_whose_trials_all_fail_is_last_and_said_to_have_failed(tmp_path):
    methods = {
        "fails": hpo.random(SPHERE, batch=4),
        "grid": hpo.grid({"x": 1.0, "y": hpo.Float(0.0, 1.0)}, points=4, batch=4),
    }
    comparison = hpo.compare(
        lambda key, h: jnp.where(h["x"] == 1, h["y"], jnp.nan), methods, key=KEY, trials=8, repeats=2
    )
    assert comparison.order() == ["grid", "fails"] and comparison.rows()[1][1][3:5] == ["failed", "failed–failed"]
    assert comparison.best()[0] == "grid" and len(comparison.plot("best_so_far").axes[0].lines) == 2
    never = {"never": lambda key, h: h["x"] * jnp.nan}
    both = comparison | hpo.compare(never, methods, key=KEY, trials=8, repeats=2)
    page = both.report(tmp_path / "page.html")
    # There is nothing to draw of the second problem.
    assert page.read_text().count("<svg") == 3 and page.read_text().count("failed–failed") == 3


BAD = {
    "repeats must be at least 1, got 0": {"repeats": 0},
    "gradient_cost must be in [1, 100], got 0.5": {"gradient_cost": 0.5},
    "give one of trials and steps, got trials=None and steps=None": {"trials": None},
    "give one of trials and steps, got trials=8 and steps=8": {"steps": 8},
    "trials must be at least 1, got 0": {"trials": 0},
    "steps=8 was given, but problem=": {"trials": None, "steps": 8},
    "methods must be a list or a dict of methods": {"methods": hpo.random(SPHERE)},
    "methods must have at least one": {"methods": []},
    "methods has two called 'random'; give a dict": {"methods": [hpo.random(SPHERE), hpo.random(SPHERE, batch=2)]},
    "method must be a jaxhpo Method, got 'random'": {"methods": ["random"]},
    "problem must have at least one": {"problem": {}},
    "problem must be an objective": {"problem": {"one": sphere, "two": 3.0}},
    "trials of a Trainable may differ in length": {"problem": TRAINABLE},
    "hpo.unroll": {"problem": TRAINABLE, "trials": None, "steps": 8},
    "lanes must be at least 1": {"lanes": 0},
    "key must be": {"key": 0},
    "got 'random'": {"methods": "random"},
    "names in methods must be strings, got 1": {"methods": {1: hpo.random(SPHERE)}},
    "names in problem must be strings, got 2": {"problem": {2: sphere}},
    "got the method 'random'; put it in a list": {"methods": hpo.random(SPHERE, batch=2)},
    "gradient_cost must be in [1, 100], got inf": {"gradient_cost": np.inf},
    "the budget of 3 trials is below what one trial of 'slope' costs, 4": {
        "methods": {"slope": hpo.gradient(SPHERE, optax.adam(0.1))},
        "trials": 3,
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_said_before_anything_runs(message):
    given = {"problem": sphere, "methods": [hpo.random(SPHERE)], "key": KEY, "trials": 8} | BAD[message]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        hpo.compare(given.pop("problem"), given.pop("methods"), **given)


def test_minus_infinity_is_refused():
    with pytest.raises(ValueError, match="the loss of trial 0 is -inf") as error:
        hpo.compare(lambda key, h: h["x"] * 0 - jnp.inf, {"mine": hpo.random(SPHERE)}, key=KEY, trials=4, repeats=2)
    assert error.value.__notes__ == ["This came up in 'mine' on 'problem'."]


def test_a_call_under_jit_is_refused_and_spoils_nothing():
    methods = [hpo.random(SPHERE, batch=3)]
    with pytest.raises(TypeError, match="compare runs on the host"):
        jax.jit(lambda key: hpo.compare(sphere, methods, key=key, trials=3).best()[2])(KEY)
    assert hpo.compare(sphere, methods, key=KEY, trials=3, repeats=1).rows()[1][0][2] == "–"
    other = hpo.compare(sphere, methods, key=jax.random.key(0, impl="rbg"), trials=3, repeats=2)
    assert np.isfinite(other.best()[2])


def test_an_objective_without_a_derivative_is_found_before_anything_runs():
    def halved(key, h):
        return jax.lax.while_loop(lambda x: x > 1, lambda x: x / 2, h["x"] ** 2 + h["y"] ** 2)

    def runs(*args):
        raise AssertionError("ran")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="Reverse-mode differentiation"):
        patch.setitem(hpo.compare.__globals__, "_device", runs)
        methods = [hpo.random(SPHERE), hpo.gradient(SPHERE, optax.adam(0.1), starts=2)]
        hpo.compare({"a": sphere, "b": halved}, methods, key=KEY, trials=16)


def test_the_command_compares_methods_of_the_field(tmp_path, capsys):
    path = tmp_path / "comparison.html"
    main(["compare", "--methods", "random,hyperband", "--trials", "4", "--repeats", "2", "--report", str(path)])
    shown = capsys.readouterr().out
    assert "324 training steps for each of 2 repeats" in shown and "ms per ask" in shown
    page = path.read_text()
    assert page.count("<svg") == 3 and "http://" not in page and "https://" not in page and "<script" not in page
    rows = re.findall(r"^ (random|hyperband) +([\d.]+) +[\d.]+–[\d.]+ +([\d.]+)", shown, re.M)
    assert {row[0] for row in rows} == {"random", "hyperband"}
    for name, rank, median in rows:
        assert f"<td>{name}</td><td" in page and f">{rank}<" in page and f">{median}<" in page
        assert 0 < float(median) < 2.3, "better than a guess"
    with pytest.raises(ValueError, match="methods must be one of"):
        main(["compare", "--methods", "simplex", "--report", str(path)])
