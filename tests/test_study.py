import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.method import Method
from tests.problems import MIXED, Counter, assert_same, exact

KEY = jax.random.key(7)


def test_equals_the_loop_by_hand():
    space = hpo.Space(MIXED)
    method = hpo.random(space, batch=8)
    ask, tell = jax.jit(method.ask), jax.jit(method.tell)
    state = method.init(hpo.ask_key(KEY))
    noisy = lambda key, h: exact(key, h) + jnp.round(jax.random.uniform(key) * 8)  # noqa: E731
    losses = []
    for round in range(5):
        trials, state = ask(hpo.ask_key(KEY, round), state)
        loss = jax.vmap(lambda k, h: noisy(k, space.fill(h)))(hpo.trial_keys(KEY, trials), trials.hparams)
        state = tell(state, trials, loss)
        losses.append(np.asarray(loss))
    last, trace = jax.jit(hpo.study(noisy, method, rounds=5))(KEY)
    assert np.array_equal(trace.losses, np.stack(losses))
    assert_same(last, state)
    result = hpo.minimize(noisy, method, key=KEY, trials=40)
    assert np.array_equal(result.trials.loss, np.concatenate(losses))


def test_trials_train_with_the_documented_keys():
    counter = Counter()
    method = hpo.successive_halving(MIXED, trials=9, max_steps=9, batch=4)
    _, trace = jax.jit(hpo.study(counter.trainable, method))(KEY)
    active, ids = np.asarray(trace.trials.active), np.asarray(trace.trials.id)
    row = np.argwhere(active & (np.asarray(trace.reached) == 9))[0]
    trial_key = jax.random.fold_in(jax.random.split(KEY)[1], ids[tuple(row)])
    seen = np.uint32(jax.random.key_data(jax.random.fold_in(trial_key, 0))[-1])
    for s in range(1, 10):
        seen = np.uint32((int(seen) * 31 + int(jax.random.key_data(jax.random.fold_in(trial_key, s))[-1])) % 2**32)
    x = abs(float(trace.trials.hparams["x"][tuple(row)]))
    expected = np.float32(x) - np.float32(9 * 0.0078125) + np.float32(seen % 7)
    assert float(trace.losses[tuple(row)]) == expected


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_lanes_do_not_change_a_bit(lanes):
    counter = Counter()
    method = hpo.hyperband(MIXED, max_steps=27, batch=64)
    whole = jax.jit(hpo.study(counter.trainable, method))(KEY)
    assert_same(jax.jit(hpo.study(counter.trainable, method, lanes=lanes))(KEY), whole)
    box = hpo.random(MIXED, batch=64)
    assert_same(jax.jit(hpo.study(exact, box, 3, lanes=lanes))(KEY), jax.jit(hpo.study(exact, box, 3))(KEY))


def test_vmap_over_64_keys_equals_64_runs():
    counter = Counter()
    keys = jax.random.split(KEY, 64)
    for problem, method in (
        (counter.trainable, hpo.hyperband(MIXED, max_steps=9, batch=5)),
        (exact, hpo.quasirandom(MIXED, batch=5)),
        (exact, hpo.grid(MIXED, points=2, batch=25)),
    ):
        run = hpo.study(problem, method, method.rounds or 3)
        single = jax.jit(run)
        runs = [jax.device_get(single(k)) for k in keys]
        assert_same(jax.device_get(jax.jit(jax.vmap(run))(keys)), jax.tree.map(lambda *x: np.stack(x), *runs))


def test_hyperband_compiles_the_training_program_once():
    counter = Counter()
    method = hpo.hyperband(MIXED, max_steps=81, batch=16)
    hpo.study(counter.trainable, method)
    checked = counter.traces
    result = hpo.minimize(counter.trainable, method, key=KEY, lanes=8)
    assert counter.traces - checked == checked + 1
    assert set(result.trials.steps.tolist()) >= {1, 3, 9, 27, 81}
    before = counter.traces
    hpo.minimize(counter.trainable, hpo.hyperband(dict(MIXED), max_steps=81, batch=16), key=jax.random.key(1), lanes=8)
    assert counter.traces - before == checked


def test_a_bank_takes_key_arrays_and_best_state_is_the_winner():
    trainable = hpo.Trainable(
        init=lambda key, h: (key, h["x"] + 0.0),
        step=lambda key, state, h: (key, state[1]),
        evaluate=lambda state, h: jnp.abs(state[1]),
    )
    _, trace = jax.jit(hpo.study(trainable, hpo.hyperband(MIXED, max_steps=9, batch=6)))(KEY)
    losses = np.where(trace.trials.active, trace.losses, np.inf)
    r, i = np.unravel_index(np.argmin(losses), losses.shape)
    key, x = trace.best_state
    assert abs(float(x)) == losses.min()
    trial_key = jax.random.fold_in(jax.random.split(KEY)[1], trace.trials.id[r, i])
    assert jnp.array_equal(
        jax.random.key_data(key), jax.random.key_data(jax.random.fold_in(trial_key, trace.reached[r, i]))
    )


def test_settings_are_an_argument_of_a_study():
    def shifted(space):
        inner = hpo.random(space, batch=2)

        def init(key, settings=None):
            return inner.init(key), (jnp.float32(0.25) if settings is None else settings)

        def ask(key, state, pending=None):
            trials, rest = inner.ask(key, state[0])
            unit = jnp.full_like(trials.unit, state[1])
            return trials._replace(unit=unit, hparams=inner.space.decode(unit)), (rest, state[1])

        return inner._replace(
            settings=jnp.float32(0.25), init=init, ask=ask, tell=lambda s, t, losses, gradients=None: s
        )

    run = hpo.study(lambda key, h: h["x"], shifted({"x": hpo.Float(0.0, 1.0)}), 1)
    _, traces = jax.jit(jax.vmap(run, (None, 0)))(KEY, jnp.array([0.0, 0.5, 1.0]))
    assert traces.losses[:, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert float(jax.grad(lambda s: run(KEY, s)[1].losses.sum())(jnp.float32(0.3))) == 2.0


def test_gradients_reach_a_method_that_wants_them():
    space = hpo.Space({"x": hpo.Float(-5.0, 5.0), "n": hpo.Int(1, 3), "c": 2.0})
    inner = hpo.random(space, batch=4)
    zero = {"c": None, "n": jnp.zeros(4, jnp.int32), "x": jnp.zeros(4)}
    method: Method = inner._replace(
        init=lambda key, settings=None: (inner.init(key), zero),
        ask=lambda key, state, pending=None: (lambda t, s: (t, (s, state[1])))(*inner.ask(key, state[0])),
        tell=lambda state, trials, losses, gradients=None: (state[0], gradients),
        uses_gradients=True,
    )
    (_, gradients), trace = jax.jit(hpo.study(lambda key, h: h["c"] * h["x"] ** 2 + h["n"], method, 1))(KEY)
    assert np.allclose(gradients["x"], 4 * trace.trials.hparams["x"][0], rtol=1e-6)
    assert gradients["n"].tolist() == [0, 0, 0, 0] and gradients["c"] is None


def test_repeats_average_over_keys():
    noisy = lambda key, h: jax.random.uniform(key)  # noqa: E731
    method = hpo.random({"x": hpo.Float(0.0, 1.0)}, batch=4)
    result = hpo.minimize(noisy, method, key=KEY, trials=4, repeats=8)
    trial_keys = [jax.random.fold_in(jax.random.split(KEY)[1], i) for i in range(4)]
    expected = [float(jnp.mean(jax.vmap(jax.random.uniform)(jax.random.split(k, 8)))) for k in trial_keys]
    assert np.allclose(result.trials.loss, expected, rtol=1e-6)

    drawn = hpo.Trainable(
        init=lambda key, h: jax.random.uniform(key),
        step=lambda key, state, h: state + 1,
        evaluate=lambda state, h: state,
    )
    race = hpo.successive_halving({"x": hpo.Float(0.0, 1.0)}, trials=4, max_steps=1, batch=4)
    trained = hpo.minimize(drawn, race, key=KEY, repeats=8)
    starts = [jax.vmap(jax.random.uniform)(jax.random.split(jax.random.fold_in(k, 0), 8)) for k in trial_keys]
    assert np.allclose(trained.trials.loss, 1 + np.mean(starts, axis=1), rtol=1e-6)
    assert np.allclose(trained.best_state, 1 + starts[int(np.argmin(trained.trials.loss))], rtol=1e-6)


@pytest.mark.parametrize("name", ["random", "quasirandom", "grid", "hyperband", "successive_halving"])
def test_whole_studies_lower_for_tpu(name):
    build = {
        "grid": lambda: hpo.grid(MIXED, points=2, batch=16),
        "hyperband": lambda: hpo.hyperband(MIXED, max_steps=9, batch=4),
        "successive_halving": lambda: hpo.successive_halving(MIXED, trials=9, max_steps=9, batch=4),
    }.get(name, lambda: getattr(hpo, name)(MIXED, batch=4))
    method = build()
    problem = Counter().trainable if method.slots else exact
    traced = jax.jit(hpo.study(problem, method, method.rounds or 2)).trace(KEY)
    assert "stablehlo.while" in traced.lower(lowering_platforms=("tpu",)).as_text()
