"""The verdicts of `check_gradient`, and where a training run stops being finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as hpo

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "objective, verdict, advice",
    [
        (lambda key, h: jnp.sin(5 * h["x"]) * h["y"][0] + h["y"].sum(), "agrees", ""),
        (lambda key, h: h["x"] ** 2 + 2 * jax.lax.stop_gradient(h["x"]) + h["y"].sum(), "disagrees", ""),
        (lambda key, h: 1e5 + 1e-4 * h["x"], "too noisy", "float64"),
        (lambda key, h: jnp.abs(h["x"] - 1) * 2 + h["y"][1], "not smooth", ""),
        (lambda key, h: jnp.floor(40 * h["x"]) / 40, "too noisy", "evaluate a smooth loss"),
        (lambda key, h: 3.0, "flat", "evaluate a smooth loss"),
        (lambda key, h: jnp.sqrt(h["x"] - 1) * h["y"][0], "not finite", ""),
    ],
)
def test_verdicts(objective, verdict, advice):
    check = hpo.check_gradient(objective, {"x": 1.0, "y": np.array([0.5, 2.0]), "n": 3, "name": "a"}, key=KEY)
    assert (check.verdict, check.ok) == (verdict, verdict == "agrees")
    assert str(check).startswith(verdict + ": ") and advice in str(check)
    assert check.path is None and check.culprit is None and check.gradient["n"] is None


def test_slopes_are_derivatives_along_directions():
    with jax.enable_x64(True):
        objective = lambda key, h: jnp.exp(h["x"]) * jnp.cos(3 * h["y"])  # noqa: E731
        check = hpo.check_gradient(objective, {"x": 1.2, "y": 0.3}, directions=5)
        assert check.ok and check.slopes.shape == (5,) and np.all(check.errors < 1e-8)
        np.testing.assert_allclose(check.differences, check.slopes, rtol=1e-8, atol=1e-8)
        expected = np.exp(1.2) * np.array([np.cos(0.9), -3 * np.sin(0.9)])
        np.testing.assert_allclose([check.gradient["x"], check.gradient["y"]], expected, rtol=1e-12)
        np.testing.assert_allclose(check.norm, np.linalg.norm(expected), rtol=1e-12)
        wrong = lambda key, h: objective(key, h) + 1e-4 * (h["x"] - jax.lax.stop_gradient(h["x"]))  # noqa: E731
        assert hpo.check_gradient(wrong, {"x": 1.2, "y": 0.3}).verdict == "disagrees"


def adam(eps_root):
    """Adam on three parameters, of which the last one never gets a gradient."""

    def step(key, state, h):
        grads = h["scale"] * jnp.array([1.0, 1.0, 0.0]) * state["p"]
        updates, moments = optax.adam(h["lr"], eps_root=eps_root).update(grads, state["adam"])
        return {"p": state["p"] + updates, "adam": moments}

    def init(key, h):
        return {"p": jnp.ones(3), "adam": optax.adam(0.1).init(jnp.ones(3))}

    return hpo.Trainable(init, step, lambda s, h: (s["p"] ** 2).sum())


def test_the_root_of_zero_in_adam_is_named():
    at = {"lr": 0.05, "scale": 1.3}
    fine = hpo.check_gradient(hpo.unroll(adam(1e-8), 20), at)
    assert fine.ok and fine.culprit is None and fine.path.norms.shape == (21,) and not fine.advice
    bad = hpo.check_gradient(hpo.unroll(adam(0.0), 20, hpo.Forward()), at)
    assert bad.verdict == "not finite" and np.isfinite(bad.loss) and not np.isfinite(bad.norm)
    assert bad.culprit == (1, "train_state['p']", "tangent") and "eps_root" in str(bad)
    assert hpo.find_nonfinite(hpo.unroll(adam(0.0), 20), at) == bad.culprit
    assert hpo.find_nonfinite(hpo.unroll(adam(1e-8), 20), at) is None


def test_biased_adjoints_are_explained():
    at = {"lr": 0.05, "scale": 1.3}
    check = hpo.check_gradient(hpo.unroll(adam(1e-8), 20, hpo.Truncated(3)), at, directions=1)
    assert check.verdict == "disagrees" and "Truncated(3) leaves out the first steps" in str(check)


def descent(step):
    return hpo.Trainable(
        lambda key, h: {"x": jnp.ones(())}, lambda key, s, h: {"x": step(s["x"], h)}, lambda s, h: s["x"]
    )


def test_a_value_that_is_not_finite_is_named_by_its_step():
    # 2 -> 4 -> 16 -> ..., 2^(2^7) is beyond float32.
    doubling = descent(lambda x, h: jnp.square(jnp.maximum(x, h["x"])))
    check = hpo.check_gradient(hpo.unroll(doubling, 12), {"x": 2.0})
    assert check.verdict == "not finite" and check.culprit == (7, "train_state['x']", "value")
    assert "step 7" in str(check) and "lower the learning rate" in str(check)
    end = hpo.Trainable(lambda key, h: h["x"], lambda key, x, h: x - 1, lambda x, h: jnp.log(x))
    assert hpo.find_nonfinite(hpo.unroll(end, 4), {"x": 4.0}) == (5, "loss", "value")
    start = hpo.Trainable(lambda key, h: 1 / h["x"], lambda key, x, h: x, lambda x, h: x)
    assert hpo.find_nonfinite(hpo.unroll(start, 4), {"x": 0.0}) == (0, "train_state", "value")


def test_a_slope_of_a_hyperparameter_that_is_not_finite_is_named_by_its_step():
    root = lambda a: jnp.where(a < 1, a, jnp.sqrt(a - 1))  # noqa: E731
    at = {"a": 0.5}
    step = hpo.Trainable(lambda key, h: jnp.ones(()), lambda key, x, h: x * 0.9 + root(h["a"]), lambda x, h: x)
    assert hpo.find_nonfinite(hpo.unroll(step, 3), at) == (3, "hparams['a']", "cotangent")
    first = hpo.Trainable(lambda key, h: root(h["a"]), lambda key, x, h: x, lambda x, h: x)
    assert hpo.find_nonfinite(hpo.unroll(first, 3), at) == (0, "hparams['a']", "cotangent")
    last = hpo.Trainable(lambda key, h: jnp.ones(()), lambda key, x, h: x, lambda x, h: x + root(h["a"]))
    assert hpo.find_nonfinite(hpo.unroll(last, 3), at) == (4, "hparams['a']", "cotangent")


def test_a_cotangent_that_is_not_finite_is_named_by_its_step():
    # x = 0, 1, 2, ...: from 6 on, the branch that is not taken has the derivative of a root of a negative number.
    hidden = descent(lambda x, h: jnp.where(x < 6.5, x + h["lr"], x + jnp.where(x > 90, jnp.sqrt(x - 90), h["lr"])))
    check = hpo.check_gradient(hpo.unroll(hidden, 10), {"lr": 1.0}, directions=1)
    assert check.verdict == "not finite" and check.path.tangent is None
    assert check.culprit == (10, "train_state['x']", "cotangent") and "Forward()" in str(check)
    assert hpo.check_gradient(hpo.unroll(hidden, 10, hpo.Forward()), {"lr": 1.0}, directions=1).ok


def test_an_exploding_hypergradient_is_found():
    chaos = descent(lambda x, h: h["r"] * (0.3 * x) * (1 - 0.3 * x) / 0.3)
    check = hpo.check_gradient(hpo.unroll(chaos, 60), {"r": 3.9})
    assert check.verdict == "explodes" and check.path.growth > 1e4 and "Truncated(k)" in str(check)
    calm = hpo.check_gradient(hpo.unroll(chaos, 60), {"r": 2.5})
    assert calm.ok and calm.path.growth < 2
    # Its fixed point is 1 - 1 / r.
    np.testing.assert_allclose(calm.gradient["r"], 1 / 2.5**2 / 0.3, rtol=1e-3)


def test_errors():
    with pytest.raises(TypeError, match="hparams must have a float"):
        hpo.check_gradient(lambda key, h: 0.0, {"n": 3})
    with pytest.raises(ValueError, match="directions must be at least 1"):
        hpo.check_gradient(lambda key, h: h["x"], {"x": 1.0}, directions=0)
    with pytest.raises(ValueError, match="eps must be in"):
        hpo.check_gradient(lambda key, h: h["x"], {"x": 1.0}, eps=0.0)
    with pytest.raises(TypeError, match=r"objective must be a function.*got Trainable; of training, say hpo\.unroll"):
        hpo.check_gradient(adam(0.0), {"lr": 1.0})
    with pytest.raises(TypeError, match="hparams must have a float"):
        hpo.find_nonfinite(hpo.unroll(adam(0.0), 2), {"lr": 1})
    with pytest.raises(TypeError, match=r"unrolled training.*hpo\.unroll"):
        hpo.find_nonfinite(lambda key, h: h["x"], {"x": 1.0})
