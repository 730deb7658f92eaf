from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.bandit import rules
from jaxhpo.method import Method, Trials, black_box
from tests.contract import compiles

SPACE = hpo.Space({"floor": hpo.Float(0.0, 1.0), "rate": hpo.Float(0.02, 0.5, log=True)})
ROOM = 4096


class Log(NamedTuple):
    asked: jax.Array
    unit: jax.Array
    losses: jax.Array
    told: jax.Array


def spy(batch: int) -> Method:
    """Random search that writes down what it is told, in order."""

    def init(key, settings=None):
        return Log(jnp.int32(0), jnp.zeros((ROOM, 2)), jnp.zeros(ROOM), jnp.int32(0))

    def ask(key, state, pending=None):
        trials = black_box(SPACE, SPACE.sample(key, batch), state.asked)
        return trials, state._replace(asked=state.asked + batch)

    def tell(state, trials, losses, gradients=None):
        turn = jnp.cumsum(trials.active, dtype=jnp.int32) - 1
        at = jnp.where(trials.active, state.told + turn, ROOM)
        return state._replace(
            unit=state.unit.at[at].set(trials.unit, mode="drop"),
            losses=state.losses.at[at].set(losses, mode="drop"),
            told=state.told + trials.active.sum(dtype=jnp.int32),
        )

    return Method("spy", SPACE, (), init, ask, tell, batch)


def loss_after(t, floor, rate):
    """Curves that cross: slow ones may end low."""
    return (floor - 0.3) ** 2 + jnp.exp(-rate * t)


def trainable(noise=0.0, broken=lambda t, h: False):
    def evaluate(state, h):
        t, key = state
        loss = loss_after(t, h["floor"], h["rate"]) + noise * jax.random.normal(key)
        return jnp.where(broken(t, h), jnp.nan, loss)

    return hpo.Trainable(lambda key, h: (jnp.float32(0), key), lambda key, s, h: (s[0] + 1, key), evaluate)


def plain_median(curve, completed, warmup, least, every, quantile=0.5, averaged=True):
    """Golovin et al. (2017), section 3.2.2, on the curve of a trial so far."""
    n = len(curve)
    if len(completed) < least or n * every < warmup:
        return False
    others = np.array([np.mean(c[:n]) if averaged else c[n - 1] for c in completed], np.float32)
    return bool(min(curve) > np.quantile(others, quantile))


def record_of(curves):
    curves = jnp.asarray(curves, jnp.float32)
    return rules.complete(rules.no_record(curves.shape[1], curves.dtype), curves, jnp.ones(len(curves), bool))


def stops(rule, curves, reached, record):
    verdict = jax.jit(rule.judge)(rule.settings, jnp.asarray(curves, jnp.float32), jnp.asarray(reached), record)
    return np.asarray(verdict.stops), np.asarray(verdict.loss)


def some_curves(n, seed=0, stretches=8):
    rng = np.random.default_rng(seed)
    fall = rng.uniform(0.3, 1.5, (n, 1)) * np.exp(-rng.uniform(0.05, 0.6, (n, 1)) * np.arange(1, stretches + 1))
    return (rng.uniform(0, 1, (n, 1)) + fall + 0.05 * rng.standard_normal((n, stretches))).astype(np.float32)


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("quantile", [0.5, 0.3])
def test_median_decides_as_a_plain_one(averaged, quantile):
    done, mine = some_curves(10), some_curves(200, seed=1) + np.float32(0.3)
    reached = np.arange(200, dtype=np.int32) % 7 + 1
    rule = hpo.MedianRule(24, 3, warmup=7, least=10, quantile=quantile, averaged=averaged)
    found, told = stops(rule, mine, reached, record_of(done))
    expected = [plain_median(c[:n], done, 7, 10, 3, quantile, averaged) for c, n in zip(mine, reached, strict=True)]
    assert found.tolist() == expected and 25 < sum(expected) < 150
    assert told.tolist() == [c[n - 1] for c, n in zip(mine, reached, strict=True)]
    other = [plain_median(c[:n], done, 7, 10, 3, quantile, not averaged) for c, n in zip(mine, reached, strict=True)]
    assert other != expected, "the neighbour would decide otherwise"
    assert not stops(rule, mine, reached, record_of(done[:9]))[0].any(), "fewer than `least`"


@pytest.mark.parametrize("quantile", [0.5, 0.25])
def test_without_averages_it_decides_as_optuna(quantile):
    done, mine = some_curves(9, stretches=6), some_curves(25, seed=2, stretches=6)
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.PercentilePruner(100 * quantile, n_startup_trials=4, n_warmup_steps=2)
    study = optuna.create_study(pruner=pruner)
    for curve in done:
        values = {i + 1: float(x) for i, x in enumerate(curve)}
        study.add_trial(optuna.trial.create_trial(value=values[6], intermediate_values=values))
    reached, expected = np.arange(25, dtype=np.int32) % 5 + 1, []
    for curve, n in zip(mine, reached, strict=True):
        trial = study.ask()
        for i in range(n):
            trial.report(float(curve[i]), i + 1)
        expected.append(trial.should_prune())
    rule = hpo.MedianRule(6, 1, warmup=2, least=4, quantile=quantile, averaged=False)
    assert stops(rule, mine, reached, record_of(done))[0].tolist() == expected and 3 < sum(expected) < 22


def test_the_record_keeps_the_newest_and_the_best_of_all():
    curves = np.stack([np.arange(600.0), 1000 - np.arange(600.0)], 1)
    curves[3, 1] = -5.0
    record = record_of(curves[:10])
    for part in (curves[10:100], curves[100:500], curves[500:]):
        record = rules.complete(record, jnp.asarray(part, jnp.float32), jnp.ones(len(part), bool))
    assert sorted(np.asarray(record.curves[:, 0]).tolist()) == list(range(344, 600))
    assert int(record.completed) == 600 and float(record.best) == -5


def test_extrapolation_does_not_compare_last_values():
    t = np.arange(1, 21)
    level = 0.35 + 0.3 * np.exp(-t)
    slow = 0.05 + 1.2 * np.exp(-t / 8)
    rule = hpo.ExtrapolationRule(20, 1)
    record = record_of([np.full(20, 0.3)])
    found, told = stops(rule, [level, slow], np.int32([10, 10]), record)
    assert slow[9] > level[9] > 0.3, "both are worse than the best now, the hopeful one more so"
    assert found.tolist() == [True, False]
    assert told[0] == pytest.approx(0.35, abs=0.01)
    assert not stops(hpo.ExtrapolationRule(20, 1, probability=0), [level], np.int32([10]), record)[0][0]
    assert not stops(rule, [level], np.int32([10]), rules.no_record(20, jnp.float32))[0][0], "nothing to beat"
    assert not stops(rule, [level], np.int32([3]), record)[0][0], "too few points"
    assert not stops(hpo.ExtrapolationRule(20, 1, warmup=11), [level], np.int32([10]), record)[0][0]


def test_a_prediction_is_never_told_as_better_than_what_was_measured():
    t = np.arange(1, 21)
    falls = 2.0 + np.exp(-t / 15)
    found, told = stops(hpo.ExtrapolationRule(20, 1), [falls], np.int32([8]), record_of([np.zeros(20)]))
    assert found[0] and told[0] == np.float32(falls[7])
    rises = 2.0 - np.exp(-t / 4)
    found, told = stops(hpo.ExtrapolationRule(20, 1), [rises], np.int32([8]), record_of([np.zeros(20)]))
    assert found[0] and told[0] == pytest.approx(rises[-1], abs=0.15) and told[0] > rises[7]


def curves_of(trace, every):
    """The losses of every trial, in order, and its unit."""
    curves, unit = {}, {}
    for r in range(trace.losses.shape[0]):
        for i, x, loss in zip(trace.trials.id[r], trace.trials.unit[r], trace.losses[r], strict=True):
            curves.setdefault(int(i), []).append(float(loss))
            unit[int(i)] = x
    assert (np.asarray(trace.trials.steps) == every).all()
    return curves, unit


def test_a_study_is_that_of_a_plain_loop():
    problem = trainable(broken=lambda t, h: (h["rate"] > 0.3) & (t >= 4))
    method = hpo.early_stopping(spy(6), hpo.MedianRule(20, 2, warmup=4, least=3))
    state, trace = jax.jit(hpo.study(problem, method, rounds=60))(jax.random.key(0))
    trace, log = jax.device_get(trace), jax.device_get(state.method)
    log = Log(*log)
    curve, completed, told = {}, [], []
    lanes = list(range(6))
    started = 6
    kinds = {"stopped": 0, "failed": 0, "completed": 0}
    for r in range(60):
        assert trace.trials.id[r].tolist() == lanes
        assert (trace.trials.source[r] < 0).tolist() == [i not in curve for i in lanes]
        for i, loss in zip(lanes, trace.losses[r], strict=True):
            curve.setdefault(i, []).append(loss)
        completed += [curve[i] for i in lanes if len(curve[i]) == 10 and np.isfinite(curve[i]).all()]
        for lane, i in enumerate(list(lanes)):
            if np.isnan(curve[i][-1]):
                kind = "failed"
            elif len(curve[i]) == 10:
                kind = "completed"
            elif plain_median(curve[i], completed, 4, 3, 2):
                kind = "stopped"
            else:
                continue
            kinds[kind] += 1
            told.append((trace.trials.unit[r, lane], curve[i][-1]))
            lanes[lane] = -1
        for lane in range(6):
            if lanes[lane] < 0:
                lanes[lane], started = started, started + 1
    assert min(kinds.values()) >= 5 and int(log.told) == len(told)
    np.testing.assert_array_equal(log.unit[: len(told)], [u for u, _ in told])
    np.testing.assert_array_equal(log.losses[: len(told)], np.array([x for _, x in told], np.float32))


@pytest.mark.parametrize("rule, least", [(hpo.MedianRule(100, 5), 4.0), (hpo.ExtrapolationRule(100, 5), 1.6)])
def test_saves_steps_at_the_same_best(rule, least):
    rounds, batch = 200, 8
    method = hpo.early_stopping(hpo.random(SPACE, batch=batch), rule)
    study = jax.jit(jax.vmap(hpo.study(trainable(noise=0.01), method, rounds=rounds)))
    state, trace = study(jax.random.split(jax.random.key(0), 8))
    trials = np.asarray(trace.trials.id).max((1, 2)) + 1
    floor, rate = (np.asarray(x) for x in (trace.trials.hparams["floor"], trace.trials.hparams["rate"]))
    true = np.asarray(loss_after(100.0, floor, rate))
    best = true.min((1, 2))
    reached = np.where(np.asarray(trace.reached) == 100, true, np.inf).min((1, 2))
    assert trials.mean() / (rounds * batch / 20) > least, "trials for the steps of one that are never stopped"
    # What it has kept to the end is as good as what it has tried, to the noise.
    assert np.median(reached - best) < 0.01


def test_failed_trials_cost_no_further_steps():
    problem = trainable(broken=lambda t, h: h["floor"] > 0.5)
    method = hpo.early_stopping(hpo.random(SPACE, batch=8), hpo.ExtrapolationRule(20, 2))
    _, trace = jax.jit(hpo.study(problem, method, rounds=30))(jax.random.key(1))
    bad = np.asarray(trace.trials.hparams["floor"]) > 0.5
    assert bad.sum() > 30 and (np.asarray(trace.reached)[bad] == 2).all()
    assert len(set(np.asarray(trace.trials.id)[bad].tolist())) == bad.sum()


def test_known_results_go_to_the_method_and_are_to_be_beaten():
    point = {"floor": 0.3, "rate": 0.5}
    rule = hpo.ExtrapolationRule(20, 1)
    runs = []
    for initial in (None, [(point, -1.0), (point, float("nan"))]):
        method = hpo.early_stopping(spy(4), rule)
        state, trace = jax.jit(hpo.study(trainable(), method, rounds=20, initial=initial))(jax.random.key(0))
        runs.append((Log(*state.method), np.asarray(trace.trials.id), state.record))
    (_, alone, _), (log, beaten, record) = runs
    np.testing.assert_allclose(log.unit[0], SPACE.encode(SPACE.read(point)), atol=1e-6)
    assert float(log.losses[0]) == -1 and np.isnan(log.losses[1]) and float(record.best) == -1
    assert alone.max() == 3, "no trial has come to its end that could be better"
    assert beaten.max() > 8, "none has a chance"


def test_pending_trials_are_shown_to_the_method():
    seen = []

    def ask(key, state, pending=None):
        seen.append(pending)
        return base.ask(key, state)

    base = spy(3)
    method = hpo.early_stopping(base._replace(ask=ask), hpo.MedianRule(4, 2))
    trials, state = method.ask(jax.random.key(0), method.init(jax.random.key(1)))
    losses = jnp.array([jnp.nan, 1.0, 2.0])
    seen.clear()
    with jax.disable_jit():
        method.ask(jax.random.key(2), method.tell(state, trials, losses))
    pending: Trials = seen[-1]
    assert pending.active.tolist() == [False, True, True, False, False, False]
    np.testing.assert_array_equal(pending.unit[1:3], trials.unit[1:])


def test_a_threshold_compiles_nothing():
    first, second = (
        hpo.early_stopping(hpo.random(SPACE, batch=4), hpo.MedianRule(8, 2, warmup=w, least=n, quantile=q))
        for w, n, q in ((0, 3, 0.5), (4, 1, 0.25))
    )
    run = jax.jit(hpo.study(trainable(), first, rounds=12))
    key = jax.random.key(0)
    a = run(key, first.settings)[1].trials.id
    before = compiles.count
    b = run(key, second.settings)[1].trials.id
    assert compiles.count == before and first.ask is second.ask
    assert a.tolist() != b.tolist()


def test_learns_from_what_it_stops():
    method = hpo.early_stopping(hpo.genetic(SPACE, population=8, batch=8), hpo.MedianRule(100, 10))
    result = hpo.minimize(trainable(), method, key=jax.random.key(0), steps=4000, progress=False)
    assert result.best_loss < 3e-3 and abs(result.best_hparams["floor"] - 0.3) < 0.05


@pytest.mark.parametrize(
    "build, error, words",
    [
        (lambda: hpo.MedianRule(10, 11), ValueError, "every must be at most 10, got 11"),
        (lambda: hpo.MedianRule(10, 0), ValueError, "every must be at least 1"),
        (lambda: hpo.MedianRule(10, 4), ValueError, "multiple of every=4, got 10; say max_steps=8 or 12"),
        (lambda: hpo.MedianRule(10, 1, quantile=50), ValueError, "quantile must be in"),
        (lambda: hpo.MedianRule(10, 1, least=257), ValueError, "least must be in"),
        (lambda: hpo.MedianRule(10, 1, warmup=-1), ValueError, "warmup must be in"),
        (lambda: hpo.MedianRule(10.0, 1), TypeError, "max_steps must be an integer"),
        (lambda: hpo.ExtrapolationRule(8, 2), ValueError, "every must be less than max_steps / 4, got every=2"),
        (lambda: hpo.ExtrapolationRule(10, 1, probability=5), ValueError, "probability must be in"),
        (lambda: hpo.early_stopping(SPACE, hpo.MedianRule(4, 2)), TypeError, "method must be a Method"),
        (lambda: hpo.early_stopping(hpo.random(SPACE), "median"), TypeError, "rule must be a MedianRule"),
        (
            lambda: hpo.early_stopping(hpo.asha(SPACE, max_steps=9), hpo.MedianRule(4, 2)),
            ValueError,
            "'asha' keeps slots=128",
        ),
        (
            lambda: hpo.early_stopping(hpo.grid(SPACE, points=2), hpo.MedianRule(4, 2)),
            ValueError,
            "'grid' ends by itself",
        ),
        (
            lambda: hpo.early_stopping(hpo.gp_ei(SPACE, gradients=True), hpo.MedianRule(4, 2)),
            ValueError,
            "'gp_ei' learns from gradients",
        ),
    ],
)
def test_errors_name_the_parameter_the_value_and_the_remedy(build, error, words):
    with pytest.raises(error, match=words):
        build()
