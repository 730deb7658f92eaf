"""Hyperparameters that learn while training goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as hpo

KEY = jax.random.key(0)
SLIDE = hpo.Trainable(lambda key, h: jnp.ones(()), lambda key, x, h: x - h["lr"] * x, lambda x, h: x**2 / 2)


def by_hand(steps, window, memory, lr=0.1, rate=0.01):
    """The same in NumPy: x, and its derivative in lr."""
    x, slope, schedule = 1.0, 0.0, []
    for s in range(1, steps + 1):
        if (s - 1) % window == 0:
            schedule.append(lr)
            slope = slope if memory else 0.0
        x, slope = x - lr * x, (1 - lr) * slope - x
        if s % window == 0:
            lr -= rate * x * slope
    return x**2 / 2, schedule


@pytest.mark.parametrize("window, memory", [(1, False), (1, True), (3, False), (3, True)])
def test_moves_are_those_of_the_recursion(window, memory):
    online = hpo.Online(window, optax.sgd(0.01), memory=memory)
    loss, schedule = jax.jit(online.run(SLIDE, 11))(KEY, {"lr": jnp.float32(0.1)})
    expected, lrs = by_hand(11, window, memory)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(schedule["lr"], lrs, rtol=1e-5)
    assert len(lrs) == -(-11 // window)
    others = np.array(by_hand(11, window, not memory)[1])
    assert np.max(np.abs(others - lrs)) > 1e-3
    np.testing.assert_allclose(hpo.unroll(SLIDE, 11, online)(KEY, {"lr": jnp.float32(0.1)}), expected, rtol=1e-5)


# Follows a target that moves: how far off it is after a step. A rate of 1/4 is Newton's step, and is never off.
TRACKING = hpo.Trainable(
    lambda key, h: {"off": jnp.ones(()), "steps": jnp.int32(0)},
    lambda key, s, h: {
        "off": (1 - 4 * h["lr"]) * (s["off"] - jnp.sin(1.0 * s["steps"])),
        "steps": s["steps"] + 1,
    },
    lambda s, h: s["off"] ** 2,
)
SPACE = {"lr": hpo.Float(1e-3, 1.0, log=True), "levels": hpo.Int(1, 8), "constant": 2.0}


@pytest.mark.parametrize("memory", [True, False])
def test_the_step_size_becomes_the_best(memory):
    online = hpo.Online(2, optax.adam(0.1), SPACE, memory)
    others = {"levels": jnp.int32(3), "constant": 2.0}
    run = jax.jit(jax.vmap(lambda lr: online.run(TRACKING, 400)(KEY, {"lr": lr} | others)))
    starts = jnp.array([0.02, 0.4])
    loss, schedule = run(starts)
    np.testing.assert_allclose(schedule["lr"][:, 0], starts, rtol=1e-5)
    np.testing.assert_allclose(schedule["lr"][:, -1], 0.25, rtol=0.02)
    assert schedule["levels"].tolist() == [3, 3] and np.all(loss < 1e-3)


def test_values_stay_within_their_bounds():
    online = hpo.Online(1, optax.sgd(100.0), {"lr": hpo.Float(0.01, 0.5)})
    _, schedule = jax.jit(online.run(SLIDE, 20))(KEY, {"lr": jnp.float32(0.1)})
    assert np.all((schedule["lr"] >= 0.01) & (schedule["lr"] <= 0.5)) and schedule["lr"].max() > 0.4


@pytest.mark.parametrize("memory, space", [(True, None), (False, {"lr": hpo.Float(0.01, 1.0, log=True)})])
def test_the_derivative_holds_the_moves(memory, space):
    with jax.enable_x64(True):
        online = hpo.Online(3, optax.sgd(0.05), space, memory)
        objective = hpo.unroll(SLIDE, 10, online)
        lr = jnp.asarray(0.1)
        slope = jax.jit(jax.grad(lambda lr: objective(KEY, {"lr": lr})))(lr)
        _, moves = online._learn(SLIDE, 10, KEY, {"lr": lr})
        assert float(jnp.abs(moves).max()) > 1e-3
        follow = jax.jit(lambda lr: online._follow(SLIDE, 10, KEY, {"lr": lr}, moves))
        np.testing.assert_allclose(slope, (follow(lr + 1e-6) - follow(lr - 1e-6)) / 2e-6, rtol=1e-6)
        free = jax.jit(lambda lr: objective(KEY, {"lr": lr}))
        assert abs(slope - (free(lr + 1e-6) - free(lr - 1e-6)) / 2e-6) > 1e-4


def test_a_move_that_is_not_finite_is_not_made():
    bad = SLIDE._replace(evaluate=lambda x, h: jnp.where(x < 0.75, jnp.nan, x**2 / 2))
    _, schedule = jax.jit(hpo.Online(1, optax.sgd(0.01)).run(bad, 8))(KEY, {"lr": jnp.float32(0.1)})
    lrs = np.array(schedule["lr"])
    assert np.all(np.isfinite(lrs)) and np.all(np.diff(lrs)[:2] > 0) and np.all(np.diff(lrs)[3:] == 0)


def test_errors():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        hpo.Online(0)
    with pytest.raises(TypeError, match="optimizer must be an optax.GradientTransformation"):
        hpo.Online(1, "adam")
    with pytest.raises(TypeError, match="memory must be True or False"):
        hpo.Online(1, memory=1)
    with pytest.raises(TypeError, match=r"hparams has none.*jnp\.float32"):
        hpo.unroll(SLIDE, 4, hpo.Online(1))(KEY, {"lr": 0.1})
