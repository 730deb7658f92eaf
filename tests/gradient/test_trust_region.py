"""The trust region: its step against the conditions that it must meet, its curvature, and what it reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as hpo
from jaxhpo.gradient.trust_region import step_within

TRUST = hpo.trust_region()
KEY = jax.random.key(0)


def descend(function, start, steps, optimizer=TRUST):
    """float[steps] values, and the state at the end."""

    def step(carry, _):
        x, state = carry
        value, slope = jax.value_and_grad(function)(x)
        updates, state = optimizer.update(slope, state, x, value=value)
        return (x + updates, state), (x, value)

    start = jnp.asarray(start)
    (_, state), (points, values) = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return np.asarray(points), np.asarray(values), state


@pytest.mark.parametrize("radius", [0.05, 0.6, 30.0])
def test_a_step_meets_the_conditions_of_the_least_within_the_radius(radius):
    """(H + shift) p = -g, H + shift not negative, shift (|p| - radius) = 0: theorem 4.1."""
    rng = np.random.default_rng(0)
    for least in (-3.0, 0.4):
        axes = np.linalg.qr(rng.normal(size=(5, 5)))[0]
        hessian = axes @ np.diag([least, 0.7, 1.0, 4.0, 9.0]) @ axes.T
        slope = rng.normal(size=5)
        with jax.enable_x64(True):
            step = np.asarray(jax.jit(step_within)(jnp.asarray(hessian), jnp.asarray(slope), jnp.asarray(radius)))
        shift = -(step @ (hessian @ step + slope)) / (step @ step)
        np.testing.assert_allclose(hessian @ step + shift * step, -slope, rtol=1e-6, atol=1e-8)
        assert shift >= max(0, -least) - 1e-8
        length = np.linalg.norm(step)
        assert length == pytest.approx(radius) if shift > 1e-6 else length <= radius
        assert (shift > 1e-6) == (least < 0 or radius < 2), "both cases are met"


def test_it_knows_the_curvature_of_a_quadratic_after_as_many_steps_as_dims():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(4, 4))
    hessian = a @ a.T - 0.5 * np.eye(4)
    with jax.enable_x64(True):
        state = descend(lambda x: x @ hessian @ x / 2 + x.sum(), rng.normal(size=4), 7)[2]
    np.testing.assert_allclose(state.hessian, hessian, rtol=1e-6, atol=1e-6)


def test_it_follows_a_curved_valley_where_first_order_steps_do_not():
    valley = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2  # noqa: E731
    start = np.array([-1.2, 1.0])
    with jax.enable_x64(True):
        _, ours, _ = descend(valley, start, 50)
        adam = optax.with_extra_args_support(optax.adam(0.1))
        _, theirs, _ = descend(valley, start, 50, adam)
    assert ours.min() < 1e-8 and theirs.min() > 1e-2


def test_a_step_to_a_higher_value_is_taken_back_and_shortened():
    points, values, _ = descend(lambda x: jnp.sum(x**2), jnp.full(2, 0.1), 3, hpo.trust_region(10.0))
    assert values[1] > values[0] > values[2]
    assert np.linalg.norm(points[1] - points[0]) == pytest.approx(10, rel=1e-4)
    # One gradient has shown the curvature: the next step ends at the least.
    np.testing.assert_allclose(points[2], 0, atol=1e-4)


def test_the_worse_half_of_the_starts_stops_and_the_best_goes_on():
    space = {"x": hpo.Float(0.0, 1.0), "y": hpo.Float(0.0, 1.0)}
    method = hpo.gradient(space, TRUST, starts=8, halving=2)
    init, ask, tell = jax.jit(method.init), jax.jit(method.ask), jax.jit(method.tell)
    state, losses = init(KEY), jnp.array([3.0, 1.0, 7.0, 4.0, 0.5, 6.0, 2.0, 5.0])
    runs, ids = [], []
    for now in range(8):
        trials, state = ask(jax.random.key(now), state)
        runs.append(np.asarray(trials.aux.start)[np.asarray(trials.active)].tolist())
        ids += np.asarray(trials.id)[np.asarray(trials.active)].tolist()
        # Rows come permuted; what is not there is told nothing of.
        order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
        mine = jax.tree.map(lambda x: x[order], trials)  # noqa: B023
        slopes = jax.tree.map(jnp.ones_like, mine.hparams)
        state = tell(state, mine, losses[mine.aux.start] + 0.01 * now, slopes)
    best = [4, 1, 6, 0, 3, 7, 5, 2]
    assert sorted(runs[0]) == list(range(8)) and runs[1] == best
    assert runs[2] == runs[3] == best[:4] and runs[4] == runs[5] == best[:2] and runs[6] == runs[7] == best[:1]
    assert ids == list(range(2 * (8 + 4 + 2 + 1)))


def test_stopping_the_worse_starts_reaches_more_for_as_many_trials():
    """A curved valley from random starts, 40 gradients each: fewer starts go further along it."""
    space = {"x": hpo.Float(-2.0, 2.0), "y": hpo.Float(-1.0, 3.0)}

    def valley(key, h):
        return jnp.log1p((1 - h["x"]) ** 2 + 30 * (h["y"] - h["x"] ** 2) ** 2)

    def lowest(method, rounds):
        run = jax.jit(jax.vmap(lambda key: hpo.study(valley, method, rounds=rounds)(key)[1]))
        trace = run(jax.random.split(KEY, 20))
        assert int(np.asarray(trace.trials.active).sum()) == 40 * 20
        return np.where(trace.trials.active, trace.losses, np.inf).min((1, 2))

    halved = np.mean(lowest(hpo.gradient(space, TRUST, 8, halving=1, patience=100), 29))
    all_on = np.mean(lowest(hpo.gradient(space, TRUST, 8, patience=100), 5))
    assert halved < 0.5 * all_on


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: hpo.trust_region(0), ValueError, "radius must be in .*1 is usual"),
        (lambda: hpo.trust_region().init(jnp.zeros(600)), ValueError, "at most 512, got 600; use optax.adam"),
        (lambda: hpo.gradient({"x": hpo.Float(0, 1)}, TRUST, halving=-1), ValueError, "halving must be at least 0"),
        (lambda: hpo.gradient({"x": hpo.Float(0, 1)}, TRUST, halving=1.5), TypeError, "halving must be an integer"),
    ],
)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
