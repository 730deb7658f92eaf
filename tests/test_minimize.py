import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.engine import device
from jaxhpo.engine.progress import Bar, duration, share
from tests.problems import MIXED, Counter, assert_same, exact

KEY = jax.random.key(5)
X = {"x": hpo.Float(-1.0, 1.0)}
METHOD = hpo.random(X, batch=4)


def square(key, h):
    return h["x"] ** 2


def test_budgets_end_the_study_after_the_round_that_reaches_them():
    ended = lambda method=METHOD, problem=square, **budget: (  # noqa: E731
        lambda r: (r.stopped, int(r.trials.round.max()) + 1, len(r.trials.id))
    )(hpo.minimize(problem, method, key=KEY, **budget))
    assert ended(trials=10) == ("trials", 3, 12)
    assert ended(rounds=2, trials=100) == ("rounds", 2, 8)
    losses = hpo.minimize(square, METHOD, key=KEY, trials=400).trials.loss
    target = float(np.sort(losses)[3])
    assert ended(trials=400, target=target) == (
        "target",
        *(lambda r: (r, 4 * r))(int(np.argmax(losses <= target)) // 4 + 1),
    )
    running = np.minimum.accumulate(losses.reshape(-1, 4).min(1))
    stale = [4 * (r + 1) - 4 * (np.flatnonzero(running == running[r])[0] + 1) for r in range(len(running))]
    rounds = int(np.argmax(np.array(stale) >= 40)) + 1
    assert ended(trials=400, patience=40) == ("patience", rounds, 4 * rounds)
    counter = Counter()
    race = hpo.hyperband(X, max_steps=9, batch=5)
    whole = hpo.minimize(counter.trainable, race, key=KEY)
    assert whole.stopped == "method" and len(set(whole.trials.id.tolist())) == 9 + 3 + 3
    some = hpo.minimize(counter.trainable, race, key=KEY, steps=20)
    assert some.stopped == "steps"
    assert_same(some.trials, jax.tree.map(lambda x: x[: len(some.trials.id)], whole.trials))
    assert 20 <= sum(_run(some)) < 20 + 5 * 9


def test_the_methods_last_state_comes_with_the_result():
    method = hpo.genetic(X, population=6, batch=4)
    state, _ = jax.jit(hpo.study(square, method, rounds=3))(KEY)
    assert_same(hpo.minimize(square, method, key=KEY, rounds=3).method_state, state)
    outside = hpo.minimize(hpo.external(lambda h: h["x"] ** 2, pool="thread"), method, key=KEY, trials=12)
    assert jax.tree.structure(outside.method_state) == jax.tree.structure(state)


def _run(result):
    """Training steps of each row."""
    seen = {}
    for id, steps in zip(result.trials.id.tolist(), result.trials.steps.tolist(), strict=True):
        yield steps - seen.get(id, 0)
        seen[id] = steps


def test_time_limit_and_callbacks():
    result = hpo.minimize(square, METHOD, key=KEY, time_limit=0.3)
    assert result.stopped == "time_limit" and 0.3 <= result.seconds < 30 and len(result.trials.id) >= 4
    reports = []
    stop = lambda report: reports.append(report) or report.trials >= 8  # noqa: E731
    result = hpo.minimize(square, METHOD, key=KEY, trials=400, callbacks=[stop])
    assert result.stopped == "callback" and reports[-1].trials == len(result.trials.id) < 400
    assert reports[-1].best_loss == result.best_loss
    assert reports[-1].best_hparams == result.best_hparams


def test_open_ended_studies_make_room_as_they_go(monkeypatch):
    seen = []
    monkeypatch.setattr(device, "OPEN_ROWS", 256)

    def reserve(state, capacity):
        seen.append(capacity)
        return state

    method = METHOD._replace(reserve=reserve, batch=4)
    result = hpo.minimize(square, method, key=KEY, target=-1.0, patience=2500)
    assert result.stopped == "patience" and seen == [256, 2048, 16384]
    assert len(result.trials.id) >= 2500


def test_results_are_native_and_reproducible():
    method = hpo.random(MIXED, batch=16)
    a, b = (hpo.minimize(exact, method, key=KEY, trials=64) for _ in range(2))
    assert_same(a.trials, b.trials)
    assert a.best_hparams == b.best_hparams and a.best_loss == a.trials.loss.min()
    assert a.best_hparams["act"] in ("relu", "gelu", "silu") and a.best_hparams["clip"] == 1.0
    assert type(a.best_hparams["n"]) is int and type(a.best_loss) is float
    assert set(a.best_hparams["opt"]) in ({"choice", "sgd"}, {"choice", "adam"})
    assert a.best_state is None
    other = hpo.minimize(exact, method, key=jax.random.key(6), trials=64)
    assert not np.array_equal(a.trials.unit, other.trials.unit)


def test_best_state_is_the_one_with_the_lowest_loss():
    counter = Counter()
    result = hpo.minimize(counter.trainable, hpo.hyperband(MIXED, max_steps=27, batch=8), key=KEY)
    assert float(counter.evaluate(result.best_state, None)) == result.best_loss == result.trials.loss.min()


def test_of_equal_losses_state_and_hparams_are_of_the_first_told():
    counter = Counter()
    for seed in range(4):
        ties = counter.trainable._replace(evaluate=lambda state, h: jnp.where(state["value"] > 0.5, 0.0, 1.0))
        result = hpo.minimize(ties, hpo.hyperband(X, max_steps=9, batch=5), key=jax.random.key(seed))
        assert float(result.best_state["value"]) == abs(np.float32(result.best_hparams["x"]))


def test_double_precision():
    with jax.enable_x64(True):
        for method in (METHOD, hpo.quasirandom(X, batch=4), hpo.grid(X, points=6, batch=4)):
            result = hpo.minimize(lambda key, h: (h["x"] - 0.1) ** 2, method, key=jax.random.key(5), trials=12)
            assert result.trials.loss.dtype == np.float64 == result.trials.unit.dtype
            assert np.allclose(result.trials.loss, (result.trials.hparams["x"] - 0.1) ** 2, rtol=1e-14)
        trained = hpo.minimize(
            Counter().trainable, hpo.hyperband(X, max_steps=9, batch=5), key=jax.random.key(5), steps=40
        )
        assert trained.trials.loss.dtype == np.float64


def test_constants_are_not_mixed_up():
    def scaled(h):
        return h["f"](h["x"]) * h["c"].sum()

    def run(f, c):
        space = {"x": hpo.Float(0.0, 1.0), "f": f, "c": c}
        return hpo.minimize(objective, hpo.random(space, batch=4), key=KEY, trials=4).trials

    objective = lambda key, h: scaled(h)  # noqa: E731
    one = run(jnp.sin, np.ones(1000))
    other = run(jnp.sin, np.where(np.arange(1000) == 500, 2.0, 1.0))
    assert np.allclose(other.loss / one.loss, 1.001) and np.allclose(
        run(jnp.cos, np.ones(1000)).loss ** 2 + one.loss**2, 1e6
    )
    twins = [run(eval("lambda x: x + " + n), np.ones(1)) for n in "12"]
    assert np.allclose(twins[1].loss - twins[0].loss, 1.0)


def test_initial_points_come_first_and_known_results_count():
    points = [{"x": 0.25}, {"x": -0.5}]
    result = hpo.minimize(square, METHOD, key=KEY, trials=8, initial=[*points, ({"x": 0.125}, 0.015625)])
    assert result.trials.id.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 7]
    assert result.trials.hparams["x"][:3].tolist() == [0.125, 0.25, -0.5]
    assert result.trials.loss[:3].tolist() == [0.015625, 0.0625, 0.25]
    plain = hpo.minimize(square, METHOD, key=KEY, trials=8)
    assert result.trials.loss[3:].tolist() == plain.trials.loss[2:].tolist()
    assert hpo.minimize(square, METHOD, key=KEY, trials=8, initial=[({"x": 0.0}, -1.0)]).best_loss == -1.0
    with pytest.raises(ValueError, match=r"point has 'x': 3"):
        hpo.minimize(square, METHOD, key=KEY, trials=8, initial=[{"x": 3}])
    counter = Counter()
    race = hpo.hyperband({"x": hpo.Float(0.0, 1.0)}, max_steps=9, batch=3)
    with_known = hpo.minimize(counter.trainable, race, key=KEY, initial=[({"x": 0.5}, -9.0)] * 4)
    without = hpo.minimize(counter.trainable, race, key=KEY)
    assert with_known.trials.loss[4:].tolist() == without.trials.loss.tolist()
    assert with_known.best_state is None and without.best_state is not None
    pair = (hpo.Float(0.0, 1.0), hpo.Float(0.0, 1.0))
    tried = hpo.minimize(
        lambda k, h: h[0] + h[1], hpo.random(pair), key=KEY, trials=2, initial=[(0.5, 0.25), ((0.5, 0.5), 1)]
    )
    assert tried.trials.id[:2].tolist() == [-1, 0] and tried.trials.loss[:2].tolist() == [1.0, 0.75]
    with pytest.raises(ValueError, match="initial has the loss -inf at"):
        hpo.minimize(square, METHOD, key=KEY, trials=8, initial=[({"x": 0.0}, -math.inf)])
    with pytest.raises(TypeError, match="initial must be a list of points"):
        hpo.minimize(square, METHOD, key=KEY, trials=8, initial={"x": 0.0})
    with pytest.raises(ValueError, match="initial has 1 points to try first, but 'grid' visits each of its own once"):
        hpo.minimize(square, hpo.grid(X), key=KEY, initial=[{"x": 0.0}])


def test_known_results_are_told_to_the_method():
    def tell(state, trials, losses, gradients=None):
        return state[0], state[1] + jnp.where(trials.active, losses, 0).sum()

    method = METHOD._replace(
        init=lambda key, settings=None: (METHOD.init(key), jnp.float32(0)),
        ask=lambda key, state, pending=None: (lambda t, s: (t, (s, state[1])))(*METHOD.ask(key, state[0])),
        tell=tell,
    )
    run = hpo.study(lambda key, h: 0.0, method, 2, initial=[({"x": 0.1}, float(2**i)) for i in range(6)])
    assert float(run(KEY)[0][1]) == 63.0


@pytest.mark.parametrize("share_", [0.1, 0.5])
def test_failed_trials_do_no_harm(share_):
    failing = lambda key, h: jnp.where(jax.random.uniform(key) < share_, jnp.nan, jnp.abs(h["x"]))  # noqa: E731
    result = hpo.minimize(failing, METHOD, key=KEY, trials=400)
    assert abs(np.isnan(result.trials.loss).mean() - share_) < 0.1
    assert result.best_loss == np.nanmin(result.trials.loss) == abs(np.float32(result.best_hparams["x"]))


def test_all_failed_says_so_and_keeps_the_trials():
    with pytest.raises(hpo.AllTrialsFailed, match="all 8 trials of 'random' failed") as caught:
        hpo.minimize(lambda key, h: jnp.nan * h["x"], METHOD, key=KEY, trials=8)
    assert len(caught.value.result.trials.id) == 8
    counter = Counter()
    failing = counter.trainable._replace(evaluate=lambda state, h: jnp.inf)
    with pytest.raises(hpo.AllTrialsFailed, match="all 15 trials of 'hyperband' failed") as caught:
        hpo.minimize(failing, hpo.hyperband(X, max_steps=9, batch=5), key=KEY)
    assert caught.value.result.trials.steps.max() == 3


def test_minus_infinity_is_refused():
    with pytest.raises(ValueError, match=r"the loss of trial 0 is -inf, at \{'x': .*log\(0\)"):
        hpo.minimize(lambda key, h: jnp.log(0 * h["x"]), METHOD, key=KEY, trials=8)


@pytest.mark.parametrize(
    "problem, method, arguments, kind, words",
    [
        (square, METHOD, {}, ValueError, "'random' does not end by itself; give a budget"),
        (square, METHOD, {"trials": 0}, ValueError, "trials must be at least 1, got 0"),
        (square, METHOD, {"trials": 1.5}, TypeError, "trials must be an integer, got 1.5"),
        (square, METHOD, {"trials": 8, "lanes": 0}, ValueError, "lanes must be at least 1, got 0"),
        (square, METHOD, {"steps": 8}, ValueError, "steps=8 was given, but the trials of 'random' carry no steps"),
        (square, METHOD, {"trials": 8, "repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        (square, METHOD, {"trials": 8, "target": math.nan}, TypeError, "target must be a number, got nan"),
        (square, METHOD, {"time_limit": -1}, ValueError, "time_limit must be above 0 seconds, got -1"),
        (
            square,
            METHOD,
            {"trials": 8, "key": 3},
            TypeError,
            r"key must be one PRNG key, got 3; say jax.random.key\(0\)",
        ),
        (square, X, {"trials": 8}, TypeError, "method must be a jaxhpo Method"),
        (3, METHOD, {"trials": 8}, TypeError, "problem must be an objective"),
        (lambda key, h: (h["x"], {}), METHOD, {"trials": 8}, TypeError, "must return a scalar loss, got PyTreeDef"),
        (lambda key, h: h["x"] * 1j, METHOD, {"trials": 8}, TypeError, r"scalar loss, got complex64\[\]"),
        (square, METHOD, {"trials": 8, "mesh": 8}, TypeError, "mesh must be a jax.sharding.Mesh, got 8"),
        (hpo.external(time.sleep), METHOD, {"trials": 8, "lanes": 0}, ValueError, "lanes must be at least 1, got 0"),
        (lambda key, h: jnp.stack([h["x"]] * 2), METHOD, {"trials": 8}, TypeError, r"scalar loss, got float32\[2\]"),
        (lambda key, h: math.sin(h["x"]), METHOD, {"trials": 8}, TypeError, r"cannot be traced.*hpo\.external\(fn\)"),
        (lambda key, h: 1.0 if h["x"] > 0 else 0.0, METHOD, {"trials": 8}, TypeError, r"hpo\.external\(fn\)"),
        (Counter().trainable, METHOD, {"trials": 8}, TypeError, r"bare Trainable.*hpo\.unroll\(trainable, steps"),
        (square, hpo.hyperband(X, max_steps=9), {}, TypeError, "give a Trainable"),
        (
            Counter().trainable._replace(step=lambda k, s, h: {**s, "value": s["value"][None]}),
            hpo.hyperband(X, max_steps=9),
            {},
            TypeError,
            r"Trainable.step changed train_state\['value'\] from float32\[\] to float32\[1\]",
        ),
        (
            Counter().trainable._replace(evaluate=lambda s, h: (s["value"], s["value"])),
            hpo.hyperband(X, max_steps=9),
            {},
            TypeError,
            "Trainable.evaluate must return a scalar loss",
        ),
        (
            Counter().trainable._replace(step=0.1),
            hpo.hyperband(X, max_steps=9),
            {},
            TypeError,
            "Trainable.step must be a function, got 0.1",
        ),
        (
            hpo.external(time.sleep),
            hpo.hyperband(X, max_steps=9),
            {},
            TypeError,
            "problem is external, but 'hyperband'",
        ),
    ],
)
def test_bad_input_is_named_before_anything_is_compiled(problem, method, arguments, kind, words, monkeypatch):
    def compiled(*args):
        raise AssertionError("compiled")

    monkeypatch.setattr("jaxhpo.engine.device._program", compiled)
    with pytest.raises(kind, match=words):
        hpo.minimize(problem, method, **{"key": KEY, **arguments})


@pytest.mark.parametrize(
    "make", [hpo.random, hpo.quasirandom, hpo.grid, lambda s, batch: hpo.hyperband(s, max_steps=9, batch=batch)]
)
def test_a_batch_below_1_is_refused(make):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        make(X, batch=0)


def test_progress_is_silent_without_a_terminal(capsys):
    hpo.minimize(square, METHOD, key=KEY, trials=8)
    assert capsys.readouterr() == ("", "")
    hpo.minimize(square, METHOD, key=KEY, trials=8, progress=True)
    shown = capsys.readouterr().err
    assert "random" in shown and "8 trials" in shown and "trials/s" in shown and "left" in shown
    hpo.minimize(square, METHOD, key=KEY, trials=8, progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_figures():
    assert [duration(x) for x in (4.4, 75, 3700, math.inf)] == ["0:04", "1:15", "1:01:40", "?"]
    from jaxhpo.engine.budget import Budget, Tally

    assert share(Budget(trials=100, steps=1000), Tally(trials=25, steps=500), 1.0) == 0.5
    assert share(Budget(time_limit=4.0), Tally(), 1.0) == 0.25
    with Bar("x", False) as bar:
        assert bar.bar is None
