"""Derivatives of training runs: against closed forms, finite differences and each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_diabetes

import jaxhpo as hpo
from jaxhpo.engine.device import Plan, engine_of, lower
from jaxhpo.gradient.exact import root_segment

KEY = jax.random.key(0)
X, Y = load_diabetes(return_X_y=True)
X, Y = (X - X.mean(0)) / X.std(0), (Y - Y.mean()) / Y.std()
TRAIN, VALID = (X[:60], Y[:60]), (X[60:], Y[60:])
H = TRAIN[0].T @ TRAIN[0] / 60
C = TRAIN[0].T @ TRAIN[1] / 60


def ridge_loss(log_penalty):
    """The validation loss of the exact solution, and its slope in log lambda."""
    penalty = np.exp(log_penalty)
    w = np.linalg.solve(H + penalty * np.eye(10), C)
    rest = VALID[0] @ w - VALID[1]
    slope = -np.linalg.solve(H + penalty * np.eye(10), penalty * w)
    return (rest**2).mean(), 2 * (VALID[0].T @ rest / len(rest)) @ slope, w


GRID = np.linspace(np.log(1e-3), np.log(30), 300)
BEST = GRID[np.argmin([ridge_loss(x)[0] for x in GRID])]
LOG_PENALTY = BEST - np.log(10)
PRECONDITION = np.linalg.inv(H + 2 * np.exp(LOG_PENALTY) * np.eye(10))


def training_loss(w, h):
    return (w @ (H @ w) / 2 - C @ w) + jnp.exp(h["log_penalty"]) * (w @ w) / 2


RIDGE = hpo.Trainable(
    init=lambda key, h: jnp.zeros(10, h["log_penalty"].dtype),
    step=lambda key, w, h: w - jnp.asarray(PRECONDITION, w.dtype) @ jax.grad(training_loss)(w, h),
    evaluate=lambda w, h: ((jnp.asarray(VALID[0], w.dtype) @ w - jnp.asarray(VALID[1], w.dtype)) ** 2).mean(),
    params=lambda w: w,
    training_loss=training_loss,
)
EXACT = [hpo.Reverse(), hpo.Reverse("sqrt"), hpo.Reverse(7), hpo.Forward()]
IMPLICIT = [hpo.Implicit(), hpo.Implicit("normal_cg", steps=60), hpo.Implicit("neumann", steps=3000)]
FIXED = [hpo.Implicit("normal_cg", steps=60), hpo.Implicit("neumann", steps=60)]


@pytest.mark.parametrize("x64, tolerance", [(False, 1e-3), (True, 1e-6)])
def test_ridge_has_a_closed_form(x64, tolerance):
    loss, slope, w = ridge_loss(LOG_PENALTY)
    assert np.log(1e-3) < BEST < np.log(30) and slope < -1e-3
    with jax.enable_x64(x64):
        h = {"log_penalty": jnp.asarray(LOG_PENALTY, float)}
        state = jax.lax.fori_loop(0, 60, lambda _, w: RIDGE.step(KEY, w, h), RIDGE.init(KEY, h))
        assert np.linalg.norm(jax.grad(training_loss)(state, h)) < (1e-10 if x64 else 1e-5)
        bare = RIDGE._replace(params=None, training_loss=None)
        for trainable, adjoints in [(RIDGE, EXACT + IMPLICIT), (bare, FIXED)]:
            for adjoint in adjoints:
                objective = hpo.unroll(trainable, 60, adjoint)
                value, slopes = jax.jit(jax.value_and_grad(objective, 1))(KEY, h)
                assert value.dtype == (jnp.float64 if x64 else jnp.float32)
                np.testing.assert_allclose(value, loss, rtol=tolerance)
                np.testing.assert_allclose(slopes["log_penalty"], slope, rtol=tolerance, err_msg=str(adjoint))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 6, rngs=rngs, param_dtype=jnp.float64)
        self.b = nnx.Linear(6, 1, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


def linen_net(hparams):
    return nn.Sequential([nn.Dense(6, param_dtype=jnp.float64), nn.tanh, nn.Dense(1, param_dtype=jnp.float64)])


@pytest.mark.parametrize("model", [linen_net, lambda hparams, rngs: Net(rngs)], ids=["linen", "nnx"])
def test_a_network_trained_by_adam(model):
    with jax.enable_x64(True):
        x = jnp.sin(jnp.arange(160.0)).reshape(40, 4)
        data = x, jnp.sin(x[:, :1] * 2)
        trainable = hpo.flax_trainable(
            model=model,
            optimizer=lambda h: optax.adam(h["lr"], b1=h["b1"], eps_root=1e-8),
            loss=optax.squared_error,
            train=(data[0][:24], data[1][:24]),
            valid=(data[0][24:], data[1][24:]),
            batch_size=24,
            penalty=lambda params, h: jnp.exp(h["decay"]) * sum((p**2).sum() for p in jax.tree.leaves(params)),
        )
        at = jnp.array([0.02, 0.8, -5.0])
        named = lambda x: dict(zip(("lr", "b1", "decay"), x, strict=True))  # noqa: E731

        def slopes(adjoint):
            objective = hpo.unroll(trainable, 25, adjoint)
            return jax.jit(jax.grad(lambda x: objective(KEY, named(x))))(at)

        loss = jax.jit(jax.vmap(lambda x: hpo.unroll(trainable, 25)(KEY, named(x))))
        step = jnp.eye(3) * jnp.array([1e-6, 1e-5, 1e-5])
        differences = (loss(at + step) - loss(at - step)) / (2 * step.sum(1))
        reverse = slopes(hpo.Reverse("sqrt"))
        assert np.all(np.abs(reverse) > 1e-4)
        np.testing.assert_allclose(reverse, differences, rtol=1e-5)
        np.testing.assert_allclose(slopes(hpo.Forward()), reverse, rtol=1e-9)


def mixed(with_init=True):
    """Training whose hyperparameters are of all kinds: start, noise and loss depend on them too."""
    data = jnp.arange(12.0).reshape(4, 3) / 10

    def init(key, h):
        return {"w": jnp.ones(3) * (h["start"] if with_init else 1.0), "count": jnp.int32(0), "key": key}

    def step(key, state, h):
        noise = jax.random.uniform(key, (3,)) * h["noise"] * 0.01
        w = state["w"] - h["lr"] * (data.T @ (data @ state["w"] - 1)) + noise
        return {"w": jnp.where(h["on"], w, 0), "count": state["count"] + 1, "key": state["key"]}

    return hpo.Trainable(init, step, lambda s, h: ((data @ s["w"] - 0.5) ** 2).sum() + h["tail"] @ h["tail"])


OTHERS = {"noise": jnp.int32(2), "on": jnp.array(True), "none": None}
HPARAMS = {"start": jnp.float32(0.5), "lr": jnp.float32(0.1), "tail": jnp.array([1.0, 2.0]), **OTHERS}


def gradient(adjoint, steps=10, trainable=None):
    objective = hpo.unroll(trainable or mixed(), steps, adjoint)
    return lambda key, h: jax.grad(objective, 1, allow_int=True)(key, h)


@pytest.mark.parametrize("adjoint", [hpo.Reverse("sqrt"), hpo.Reverse(3), hpo.Reverse(99), hpo.Forward()], ids=str)
def test_hyperparameters_of_all_kinds(adjoint):
    exact, found = jax.jit(gradient(None))(KEY, HPARAMS), jax.jit(gradient(adjoint))(KEY, HPARAMS)
    assert abs(exact["lr"]) > 0.1 and abs(exact["start"]) > 0.01 and exact["tail"].tolist() == [2.0, 4.0]
    for name in ("start", "lr", "tail"):
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-5)
    assert found["noise"].dtype == found["on"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("adjoint", [hpo.Implicit("normal_cg"), hpo.Online(4), hpo.Truncated(3)], ids=str)
def test_others_take_all_kinds_too(adjoint):
    found = jax.jit(gradient(adjoint))(KEY, HPARAMS)
    assert found["noise"].dtype == found["on"].dtype == jax.dtypes.float0
    assert found["none"] is None and np.isfinite(found["lr"])
    if not isinstance(adjoint, hpo.Online):
        np.testing.assert_allclose(found["tail"], [2.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize("adjoint", [hpo.Forward(), hpo.Implicit("neumann"), hpo.Reverse(3), hpo.Truncated(4)], ids=str)
def test_batches_equal_single_trials(adjoint):
    keys, lrs = jax.random.split(KEY, 3), jnp.array([0.05, 0.1, 0.2])
    noise = jnp.array([1, 2, 3])
    one = lambda key, lr, n: gradient(adjoint)(key, HPARAMS | {"lr": lr, "noise": n})["lr"]  # noqa: E731
    batch = jax.jit(jax.vmap(one))(keys, lrs, noise)
    single = jax.jit(one)
    np.testing.assert_allclose(batch, [single(*x) for x in zip(keys, lrs, noise, strict=True)], rtol=1e-4)


def test_truncated_is_reverse_from_a_later_state():
    trainable, steps, k = mixed(), 10, 4
    exact = jax.jit(gradient(None))(KEY, HPARAMS)
    whole = jax.jit(gradient(hpo.Truncated(steps)))(KEY, HPARAMS)
    step = jax.jit(lambda s, state, h: trainable.step(jax.random.fold_in(KEY, s), state, h))
    state = trainable.init(jax.random.fold_in(KEY, 0), HPARAMS)
    for s in range(1, steps - k + 1):
        state = step(s, state, HPARAMS)

    def rest(lr):
        h, after = HPARAMS | {"lr": lr}, state
        for s in range(steps - k + 1, steps + 1):
            after = step(s, after, h)
        return trainable.evaluate(after, h)

    for checkpoint in ("none", "sqrt", 3):
        part = jax.jit(gradient(hpo.Truncated(k, checkpoint)))(KEY, HPARAMS)
        np.testing.assert_allclose(part["lr"], jax.grad(rest)(HPARAMS["lr"]), rtol=1e-5)
        assert part["start"] == 0
    for name in ("lr", "start"):
        np.testing.assert_allclose(whole[name], exact[name], rtol=1e-6)
    assert abs(part["lr"] - exact["lr"]) > 0.05


@pytest.mark.usefixtures("optimized")
def test_forward_has_derivatives_along_directions_and_none_in_evaluation():
    objective = hpo.unroll(mixed(), 10, hpo.Forward())
    of = lambda lr: objective(KEY, HPARAMS | {"lr": lr})  # noqa: E731
    exact = gradient(None)(KEY, HPARAMS)["lr"]
    np.testing.assert_allclose(jax.jvp(of, (HPARAMS["lr"],), (jnp.float32(3.0),))[1], 3 * exact, rtol=1e-5)
    plain = jax.jit(lambda lr: hpo.unroll(mixed(), 10)(KEY, HPARAMS | {"lr": lr})).lower(HPARAMS["lr"]).compile()
    lowered = jax.jit(of).lower(HPARAMS["lr"]).compile()
    assert lowered.cost_analysis()["flops"] <= plain.cost_analysis()["flops"]


@pytest.mark.parametrize("adjoint", [hpo.Forward(), hpo.Implicit("neumann")], ids=str)
def test_what_a_trainable_closes_over(adjoint):
    def fit(data, lr):
        trainable = hpo.Trainable(
            lambda k, h: jnp.ones(3), lambda k, w, h: w - h * (data * w - 1), lambda w, h: w.sum()
        )
        return hpo.unroll(trainable, 30, adjoint)(KEY, lr)

    data = jnp.array([[0.5, 0.7, 0.9], [1.5, 1.2, 1.1]])
    batch = jax.jit(jax.vmap(jax.grad(fit, 1), (0, None)))(data, jnp.float32(0.3))
    np.testing.assert_allclose(batch, [jax.grad(fit, 1)(d, jnp.float32(0.3)) for d in data], rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match="with respect to hparams only"):
        jax.grad(fit)(data[0], jnp.float32(0.3))


@pytest.mark.parametrize("adjoint", [hpo.Reverse("sqrt"), hpo.Forward(), hpo.Implicit(), hpo.Online(3)], ids=str)
def test_data_are_arguments_of_a_study(adjoint):
    data = jnp.ones((500, 4))
    loss = lambda w, h: ((data @ w - 1) ** 2).mean() + h["x"] * w @ w  # noqa: E731
    trainable = hpo.Trainable(
        lambda key, h: jnp.zeros(4),
        jax.jit(lambda key, w, h: w - 0.05 * jax.grad(loss)(w, h)),
        loss,
        params=lambda w: w,
        training_loss=jax.jit(loss),
    )
    method = hpo.random({"x": hpo.Float(0.1, 2.0), "y": 1.0}, batch=2)._replace(uses_gradients=True)
    plan = Plan(hpo.unroll(trainable, 7, adjoint), method, None, None, None)
    assert plan == Plan(hpo.unroll(trainable, 7, adjoint), method, None, None, None)
    carry = jax.eval_shape(lambda k: engine_of(plan).start(k, method.settings, 8), KEY)
    lowered, consts = lower(plan, 2, carry, KEY)
    assert (500, 4) in [x.shape for x in consts]
    assert len(lowered.as_text()) < 1_000_000


def network(steps, adjoint):
    """The temporary memory of a gradient of training a small network."""
    x = jnp.sin(jnp.arange(512.0)).reshape(32, 16)

    def loss(w, h):
        return ((jnp.tanh(x @ w["a"]) @ w["b"]) ** 2).mean() + h * (w["a"] ** 2).sum()

    trainable = hpo.Trainable(
        lambda key, h: {"a": jnp.cos(jnp.arange(1024.0)).reshape(16, 64), "b": jnp.ones((64, 1))},
        lambda key, w, h: jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(loss)(w, h)),
        lambda w, h: loss(w, 0.0),
        params=lambda w: w,
        training_loss=loss,
    )
    compiled = (
        jax.jit(jax.value_and_grad(hpo.unroll(trainable, steps, adjoint), 1)).lower(KEY, jnp.float32(0.1)).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimized")
def test_memory():
    none = network(1600, hpo.Reverse())
    few, many = network(400, hpo.Reverse("sqrt")), network(1600, hpo.Reverse("sqrt"))
    assert many <= 2.3 * few and many <= none / 8
    assert many < network(1600, hpo.Reverse(400)) < none / 2
    assert network(1600, hpo.Truncated(100)) < none / 8
    for adjoint in (hpo.Forward(), hpo.Implicit()):
        assert network(1600, adjoint) <= 1.1 * network(400, adjoint) < few / 4


def test_segments_near_the_root_leave_no_remainder():
    assert [root_segment(n) for n in (1, 2, 100, 400, 1000, 1600)] == [1, 2, 10, 20, 40, 40]
    assert root_segment(1009) == 32


QUADRATIC = hpo.Trainable(  # ends at x = 1 / (4 + h)
    init=lambda key, h: {"x": jnp.float32(0), "velocity": jnp.float32(0), "steps": jnp.int32(0)},
    step=lambda key, s, h: {
        "velocity": 0.5 * s["velocity"] - 0.1 * ((4 + h["h"]) * s["x"] - 1),
        "x": s["x"] + 0.5 * s["velocity"] - 0.1 * ((4 + h["h"]) * s["x"] - 1),
        "steps": s["steps"] + 1,
    },
    evaluate=lambda s, h: s["x"] + 3 * h["tail"],
    params=lambda s: s["x"],
    training_loss=lambda x, h: (4 + h["h"]) * x**2 / 2 - x,
)


def test_implicit_solvers_by_their_closed_forms():
    h = {"h": jnp.float32(1.0), "tail": jnp.float32(2.0)}
    series = lambda terms: 0.05 * sum((1 - 0.05 * 5) ** i for i in range(terms))  # noqa: E731
    cases = [
        (hpo.Implicit(), 1 / 5),
        (hpo.Implicit(damping=2.0), 1 / 7),
        (hpo.Implicit("normal_cg"), 1 / 5),
        (hpo.Implicit("normal_cg", damping=2.0), 1 / 7),
        (hpo.Implicit("neumann", steps=4, scale=0.05), series(4)),
        (hpo.Implicit("neumann", steps=1, scale=0.05), series(1)),
        (hpo.Implicit("neumann", steps=2), 1 / 5),
    ]
    for adjoint, inverse in cases:
        found = jax.grad(hpo.unroll(QUADRATIC, 100, adjoint), 1)(KEY, h)
        np.testing.assert_allclose(found["h"], -inverse / 5, rtol=1e-4, err_msg=str(adjoint))
        np.testing.assert_allclose(found["tail"], 3.0)
    bare = QUADRATIC._replace(training_loss=None)
    for adjoint in (hpo.Implicit("normal_cg", steps=10), hpo.Implicit("neumann", steps=60)):
        found = jax.grad(hpo.unroll(bare, 100, adjoint), 1)(KEY, h)
        np.testing.assert_allclose(found["h"], -1 / 25, rtol=1e-4)


def test_normal_cg_solves_what_cg_does_not():
    saddle = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    trainable = hpo.Trainable(
        lambda key, h: jnp.array([h["h"], 0.0]),  # stationary: saddle @ x = (0, h)
        lambda key, x, h: x,
        lambda x, h: 2 * x[0],
        params=lambda x: x,
        training_loss=lambda x, h: x @ saddle @ x / 2 - h["h"] * x[1],
    )
    h = {"h": jnp.float32(1.0)}
    found = {s: jax.grad(hpo.unroll(trainable, 1, hpo.Implicit(s)), 1)(KEY, h)["h"] for s in ("cg", "normal_cg")}
    assert found["normal_cg"] == 2.0 and not np.isclose(found["cg"], 2.0)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: hpo.Reverse("root"),
            ValueError,
            "checkpoint must be 'none', 'sqrt' or a length of segments, got 'root'",
        ),
        (lambda: hpo.Reverse(0), ValueError, "checkpoint must be at least 1, got 0"),
        (lambda: hpo.Reverse(2.0), TypeError, "checkpoint must be an integer"),
        (lambda: hpo.Truncated(0), ValueError, "k must be at least 1"),
        (
            lambda: hpo.unroll(QUADRATIC, 5, hpo.Truncated(6)),
            ValueError,
            "k must be at most 5, got 6; the run has no more",
        ),
        (lambda: hpo.Implicit("lu"), ValueError, "solver must be one of"),
        (lambda: hpo.Implicit(steps=0), ValueError, "steps must be at least 1"),
        (lambda: hpo.Implicit(damping=-1), ValueError, "damping must be in"),
        (lambda: hpo.Implicit(scale=0), ValueError, "scale must be in"),
        (
            lambda: hpo.unroll(QUADRATIC._replace(training_loss=None), 5, hpo.Implicit()),
            ValueError,
            "solver='cg' needs Trainable.training_loss.*'normal_cg' or 'neumann'",
        ),
        (lambda: hpo.unroll(QUADRATIC._replace(params=None), 5, hpo.Implicit()), ValueError, "but no params"),
        (lambda: hpo.unroll(QUADRATIC, 5, hpo.Reverse), TypeError, r"adjoint must be one such as hpo.Reverse\(\)"),
        (lambda: hpo.unroll(lambda k, h: 0.0, 5), TypeError, "trainable must be a Trainable"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_unrolled_training_is_a_value():
    a, b = (hpo.unroll(QUADRATIC, 5, hpo.Reverse("sqrt")) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != hpo.unroll(QUADRATIC, 5) and a != hpo.unroll(QUADRATIC, 6, a.adjoint)
    assert (a.steps, a.trainable, a.adjoint) == (5, QUADRATIC, hpo.Reverse("sqrt"))
