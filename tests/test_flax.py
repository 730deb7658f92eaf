"""Training of flax modules: against a hand-written loop, and what dropout, batch statistics and data order do."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxhpo as hpo
from jaxhpo.flax import batch_indices, flax_trainable
from jaxhpo.modules import dropout
from jaxhpo.optimizers import select_optimizer

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(jax.random.key(1), (96, 5)))
Y = np.argmax(X[:, :3] + 0.1 * X[:, 2:], axis=1)
TRAIN, VALID = (X[:64], Y[:64]), (X[64:], Y[64:])
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels


class Linen(nn.Module):
    """A dense net whose activations are scaled by a hyperparameter."""

    scale: jax.Array | float = 1.0

    @nn.compact
    def __call__(self, x):
        x = self.scale * nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


class Nnx(nnx.Module):
    """The same in nnx."""

    def __init__(self, scale, rngs):
        self.hidden, self.out = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.scale = scale

    def __call__(self, x):
        return self.out(self.scale * nnx.relu(self.hidden(x)))


class LinenNoisy(nn.Module):
    """Dropout of a traced rate and batch norm."""

    rate: jax.Array | float

    @nn.compact
    def __call__(self, x, train, deterministic):
        assert train != deterministic
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(3)(dropout(self.make_rng("dropout"), x, self.rate) if train else x)


class NnxNoisy(nnx.Module):
    """Dropout and batch norm in nnx."""

    def __init__(self, hparams, rngs):
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(x)))


MODELS = {
    "linen": lambda hparams: Linen(hparams["scale"]),
    "nnx": lambda hparams, rngs: Nnx(hparams["scale"], rngs),
}
NOISY = {"linen": lambda hparams: LinenNoisy(hparams["rate"]), "nnx": NnxNoisy}
HPARAMS = {"lr": jnp.float32(0.02), "scale": jnp.float32(1.5), "rate": jnp.float32(0.5)}
adam = lambda hparams: optax.adam(hparams["lr"])  # noqa: E731


def build(model, **changes):
    arguments = {"optimizer": adam, "loss": CROSS_ENTROPY, "train": TRAIN, "valid": VALID, "batch_size": 16}
    return flax_trainable(model=model, **(arguments | changes))


def linear(**changes):
    return build(lambda hparams: nn.Dense(3), **changes)


def steps(trainable, state, hparams, count, first=1):
    return jax.lax.fori_loop(
        first, first + count, lambda i, s: trainable.step(jax.random.fold_in(KEY, i), s, hparams), state
    )


def forward(kind, params, x):
    """The same network written out."""
    first, second = ("Dense_0", "Dense_1") if kind == "linen" else ("hidden", "out")
    h = jax.nn.relu(x @ params[first]["kernel"] + params[first]["bias"])
    return HPARAMS["scale"] * h @ params[second]["kernel"] + params[second]["bias"]


@pytest.mark.parametrize("kind", MODELS)
def test_equals_a_hand_written_loop(kind):
    trainable = build(MODELS[kind])
    state = jax.jit(trainable.init)(KEY, HPARAMS)
    final = jax.jit(lambda s: steps(trainable, s, HPARAMS, 12))(state)

    optimizer, params = optax.adam(0.02), state.params
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, x, y):
        grads = jax.grad(lambda p: CROSS_ENTROPY(forward(kind, p, x), y).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(12):
        rows = np.asarray(batch_indices(state.order, jnp.int32(i), 64, 16))
        params, opt_state = update(params, opt_state, X[rows], Y[rows])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), final.params, params)
    assert int(final.step) == 12
    loss = CROSS_ENTROPY(forward(kind, params, X[64:]), Y[64:]).mean()
    np.testing.assert_allclose(trainable.evaluate(final, HPARAMS), loss, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_one_trace_for_all_hyperparameters_and_trials(kind):
    traces = collections.Counter()
    trainable = build(MODELS[kind])

    @jax.jit
    def run(key, hparams):
        traces[kind] += 1
        return trainable.evaluate(steps(trainable, trainable.init(key, hparams), hparams, 2), hparams)

    losses = [run(jax.random.key(i), HPARAMS | {"lr": jnp.float32(lr)}) for i, lr in enumerate((0.1, 0.2, 0.3))]
    assert traces[kind] == 1
    assert len(set(map(float, losses))) == 3


@pytest.mark.parametrize("kind", NOISY)
def test_dropout_changes_training_and_not_evaluation(kind):
    trainable = build(NOISY[kind])
    state = jax.jit(trainable.init)(KEY, HPARAMS)
    step = jax.jit(trainable.step)
    same, again, other = (
        step(jax.random.key(i), state, HPARAMS).params["out" if kind == "nnx" else "Dense_0"]["kernel"]
        for i in (1, 1, 2)
    )
    np.testing.assert_array_equal(same, again)
    assert float(jnp.abs(same - other).max()) > 1e-3
    # By hand: running statistics are still 0 and 1, and nothing is dropped.
    layer = state.params["out" if kind == "nnx" else "Dense_0"]
    outputs = X[64:] / np.sqrt(1 + 1e-5) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(trainable.evaluate(state, HPARAMS), CROSS_ENTROPY(outputs, Y[64:]).mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", NOISY)
def test_batch_statistics_move_in_training(kind):
    trainable = build(NOISY[kind])
    state = jax.jit(trainable.init)(KEY, HPARAMS)
    moved = jax.jit(trainable.step)(KEY, state, HPARAMS).collections
    statistics = moved["norm"] if kind == "nnx" else moved["batch_stats"]["BatchNorm_0"]
    batch = X[np.asarray(batch_indices(state.order, jnp.int32(0), 64, 16))]
    np.testing.assert_allclose(statistics["mean"], 0.1 * batch.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * batch.var(0), rtol=1e-5)
    assert jax.tree.structure(moved) == jax.tree.structure(state.collections)


@pytest.mark.parametrize("kind", MODELS)
def test_training_is_differentiable_both_ways(kind):
    trainable = build(MODELS[kind], optimizer=lambda hparams: optax.sgd(hparams["lr"], momentum=0.9))

    def final(lr):
        hparams = HPARAMS | {"lr": lr}
        state = jax.lax.scan(
            lambda state, i: (trainable.step(jax.random.fold_in(KEY, i), state, hparams), None),
            trainable.init(KEY, hparams),
            jnp.arange(1, 6),
        )[0]
        return trainable.evaluate(state, hparams)

    lr, width = jnp.float32(0.02), 1e-3
    backward, forward = jax.jit(jax.grad(final))(lr), jax.jit(jax.jacfwd(final))(lr)
    run = jax.jit(final)
    np.testing.assert_allclose(backward, forward, rtol=1e-4)
    np.testing.assert_allclose(backward, (run(lr + width) - run(lr - width)) / (2 * width), rtol=5e-3)


def test_nnx_hyperparameters_of_the_moment_are_used():
    trainable = build(MODELS["nnx"])
    state = trainable.init(KEY, HPARAMS)
    doubled = HPARAMS | {"scale": 2 * HPARAMS["scale"]}
    expected = CROSS_ENTROPY(2 * (forward("nnx", state.params, X[64:])), Y[64:]).mean()  # the biases are zero
    np.testing.assert_allclose(trainable.evaluate(state, doubled), expected, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def epochs(order, count, examples, batch_size):
    """i32[count, batches, batch_size]: the rows of whole epochs."""
    batches = examples // batch_size
    rows = jax.vmap(lambda step: batch_indices(order, step, examples, batch_size))(jnp.arange(count * batches))
    return rows.reshape(count, batches, batch_size)


@pytest.mark.parametrize("examples, batch_size", [(96, 32), (97, 97), (1000, 8), (1, 1), (2, 1)])
def test_every_epoch_visits_every_example_once(examples, batch_size):
    rows = np.asarray(epochs(jnp.array([3, 4], jnp.uint32), 5, examples, batch_size)).reshape(5, -1)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(examples), (5, 1)))
    if examples > 2:
        assert len(np.unique(rows, axis=0)) == 5


def test_the_rest_of_an_epoch_is_skipped_and_differs():
    rows = np.asarray(epochs(jnp.array([3, 4], jnp.uint32), 200, 100, 48)).reshape(200, -1)
    assert all(len(set(row)) == 96 for row in rows)
    skipped = 200 - np.bincount(rows.ravel(), minlength=100)
    assert skipped.mean() == 8
    assert skipped.max() < 24  # binomial(200, 0.04): 5.8 standard deviations


def test_all_orders_are_equally_likely():
    orders = jax.random.bits(KEY, (24_000, 2))
    rows = jax.jit(jax.vmap(lambda order: batch_indices(order, jnp.int32(0), 4, 4)))(orders)
    _, counts = np.unique(np.asarray(rows) @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7  # chi-squared, 23 degrees of freedom, 99.9 %


def test_a_full_batch_is_gradient_descent():
    trainable = linear(batch_size=64, optimizer=lambda hparams: optax.sgd(0.5))
    state = trainable.init(KEY, None)
    grads = jax.grad(lambda params: trainable.training_loss(params, None))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        trainable.step(KEY, state, None).params,
        expected,
    )


@pytest.mark.parametrize("chunk", [1, 5, 16, 32, 100])
def test_chunks_do_not_change_the_mean(chunk):
    whole = linear(metric=lambda outputs, targets: outputs.argmax(-1) != targets)
    parts = linear(metric=lambda outputs, targets: (outputs.argmax(-1) != targets).mean(), valid_batch_size=chunk)
    state = whole.init(KEY, HPARAMS)
    errors = np.argmax(X[64:] @ np.asarray(state.params["kernel"]), axis=1) != Y[64:]
    np.testing.assert_allclose(whole.evaluate(state, HPARAMS), errors.mean(), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(parts.evaluate)(state, HPARAMS), errors.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(parts.training_loss)(state.params, HPARAMS), whole.training_loss(state.params, HPARAMS), rtol=1e-6
    )


def test_penalty_and_a_loss_with_hyperparameters():
    def smoothed(outputs, targets, hparams):
        return optax.softmax_cross_entropy(outputs, optax.smooth_labels(jax.nn.one_hot(targets, 3), hparams["alpha"]))

    hparams = {"lr": jnp.float32(0.1), "alpha": jnp.float32(0.3), "decay": jnp.float32(0.7)}
    squares = lambda params: sum((x**2).sum() for x in jax.tree.leaves(params))  # noqa: E731
    trainable = linear(loss=smoothed, penalty=lambda params, hparams: hparams["decay"] * squares(params))
    params = trainable.params(trainable.init(KEY, hparams))
    outputs = X[:64] @ np.asarray(params["kernel"])
    expected = smoothed(outputs, Y[:64], hparams).mean() + 0.7 * squares(params)
    np.testing.assert_allclose(trainable.training_loss(params, hparams), expected, rtol=1e-5)
    slope = jax.grad(trainable.training_loss, argnums=1)(params, hparams)["decay"]
    np.testing.assert_allclose(slope, squares(params), rtol=1e-5)


def test_training_loss_refuses_batch_statistics():
    trainable = build(NOISY["linen"])
    with pytest.raises(ValueError, match="batch statistics"):
        trainable.training_loss(trainable.init(KEY, HPARAMS).params, HPARAMS)


def test_optimizers_that_need_the_value_or_search_lines():
    for optimizer in (optax.polyak_sgd(), optax.lbfgs()):
        trainable = linear(optimizer=lambda hparams, o=optimizer: o, batch_size=64)
        state = trainable.init(KEY, None)
        final = jax.jit(lambda s, t=trainable: steps(t, s, None, 15))(state)
        assert trainable.training_loss(final.params, None) < 0.5 * trainable.training_loss(state.params, None)


def test_the_state_keeps_its_dtypes():
    trainable = build(lambda hparams: nn.Dense(3, param_dtype=jnp.bfloat16))
    state = trainable.init(KEY, HPARAMS)
    moved = jax.eval_shape(trainable.step, KEY, state, HPARAMS)
    assert jax.tree.map(lambda x: x.dtype, moved) == jax.tree.map(lambda x: x.dtype, state)
    assert state.params["kernel"].dtype == jnp.bfloat16


def test_pytrees_as_data():
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return {"a": nn.Dense(1)(inputs["left"] + inputs["right"])[:, 0]}

    data = {"left": X, "right": 2 * X}, {"a": X[:, 0]}
    trainable = build(lambda hparams: Sum(), train=data, valid=data, loss=lambda o, t: (o["a"] - t["a"]) ** 2)
    state = jax.jit(lambda: steps(trainable, trainable.init(KEY, HPARAMS), {"lr": 0.05}, 200))()
    assert trainable.evaluate(state, HPARAMS) < 1e-3
    np.testing.assert_allclose(state.params["Dense_0"]["kernel"][:, 0], [1 / 3, 0, 0, 0, 0], atol=0.02)


def test_data_are_arrays_that_the_program_closes_over():
    trainable = linear()
    state = trainable.init(KEY, HPARAMS)
    constants = jax.make_jaxpr(trainable.step)(KEY, state, HPARAMS).consts
    assert any(getattr(c, "shape", None) == (64, 5) and isinstance(c, jax.Array) for c in constants)


BRANCHES = {
    "sgd": lambda hparams: optax.sgd(hparams["lr"], momentum=hparams["momentum"]),
    "adam": lambda hparams: optax.adam(hparams["lr"]),
}
NODE = {"sgd": {"lr": 0.1, "momentum": 0.9}, "adam": {"lr": 0.01}}


def test_a_selected_optimizer_equals_it_alone():
    selected = linear(optimizer=lambda choice: select_optimizer({"choice": choice, **NODE}, BRANCHES))
    run = jax.jit(jax.vmap(lambda c: steps(selected, selected.init(KEY, c), c, 9).params))
    side_by_side = run(jnp.array([1, 0, 1]))
    for row, plain in ((0, optax.adam(0.01)), (1, optax.sgd(0.1, momentum=0.9)), (2, optax.adam(0.01))):
        alone = linear(optimizer=lambda hparams, o=plain: o)
        params = jax.jit(lambda t=alone: steps(t, t.init(KEY, None), None, 9).params)()
        jax.tree.map(
            lambda a, b, i=row: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), side_by_side, params
        )


def test_an_unchosen_optimizer_does_not_spoil_the_hypergradient():
    def final(lr, choice):
        optimizers = {"sgd": optax.sgd(lr), "adam": optax.adam(lr)}
        optimizer = select_optimizer(choice, optimizers)
        params = jnp.array([1.0, 1.0])
        state = optimizer.init(params)
        for _ in range(2):  # the second parameter has no gradient
            updates, state = optimizer.update(jnp.array([2.0, 0.0]) * params, state, params)
            params = optax.apply_updates(params, updates)
        return params[0]

    np.testing.assert_allclose(jax.grad(final)(0.1, jnp.int32(0)), -4 * (1 - 0.2), rtol=1e-5)  # of (1 - 2 lr)^2


def test_native_choices_build_the_live_optimizer_only():
    native = select_optimizer({"choice": "adam", "adam": {"lr": 0.01}}, BRANCHES)
    params = jnp.ones(2)
    assert jax.tree.structure(native.init(params)) == jax.tree.structure(optax.adam(0.01).init(params))
    assert native.update(params, native.init(params))[0].tolist() == pytest.approx([-0.01, -0.01], rel=1e-4)


def test_select_optimizer_errors():
    with pytest.raises(ValueError, match=r"names of the OneOf: it has \['sgd', 'adam'\], got \['sgd'\]"):
        select_optimizer({"choice": jnp.int32(0), **NODE}, {"sgd": BRANCHES["sgd"]})
    with pytest.raises(ValueError, match=r"one of \['sgd'\], got 'lion'"):
        select_optimizer("lion", {"sgd": optax.sgd(0.1)})
    with pytest.raises(TypeError, match=r"optimizers\['sgd'\] must be an optax.GradientTransformation"):
        select_optimizer(0, {"sgd": 0.1})
    with pytest.raises(TypeError, match="optimizers must be a dict of optimizers by name, got list"):
        select_optimizer(0, [optax.sgd(0.1)])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"batch_size": 65}, ValueError, "batch_size=65 is larger than the 64 training examples; use at most 64"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
        ({"valid_batch_size": 2.5}, ValueError, "valid_batch_size must be a positive integer, got 2.5"),
        ({"train": (X, Y[:5])}, ValueError, r"arrays of train must have one leading axis.*\(96, 5\).*\(5,\)"),
        ({"valid": (X[:0], Y[:0])}, ValueError, "valid must have at least one example"),
        ({"valid": (X, 1.0)}, ValueError, "arrays of valid must have one leading axis"),
        ({"train": X}, TypeError, r"train must be a tuple \(inputs, targets\), got ndarray"),
        ({"train": ({"x": X}, Y)}, ValueError, "train and valid must have the same structure"),
        ({"optimizer": optax.adam(0.1)}, TypeError, r"optimizer must be a function of \(hparams\), got Gradient"),
        ({"model": nn.Dense(3)}, TypeError, r"model must be a function, got Dense; write `model=lambda hparams: Dense"),
        ({"model": lambda hparams, width: nn.Dense(width)}, TypeError, r"model must take \(hparams\), or for nnx"),
        ({"metric": 3}, TypeError, r"metric must be a function of \(outputs, targets\)"),
        ({"penalty": 3}, TypeError, r"penalty must be a function of \(params, hparams\)"),
    ],
)
def test_errors_when_built(changes, error, message):
    with pytest.raises(error, match=message):
        build(**({"model": MODELS["linen"]} | changes))


def test_errors_when_traced():
    with pytest.raises(TypeError, match=r"optimizer\(hparams\) must be an optax.GradientTransformation.*got 0.1"):
        linear(optimizer=lambda hparams: 0.1).init(KEY, HPARAMS)
    with pytest.raises(TypeError, match=r"return a flax.linen.Module, got Nnx; let it take \(hparams, rngs\)"):
        build(lambda hparams: Nnx(1.0, nnx.Rngs(0))).init(KEY, HPARAMS)
    with pytest.raises(TypeError, match="return a flax.nnx.Module, got Dense"):
        build(lambda hparams, rngs: nn.Dense(3)).init(KEY, HPARAMS)
    data = X, X[:, 0]
    trainable = build(lambda hparams: nn.Dense(1), loss=lambda o, t: (o - t) ** 2, train=data, valid=data)
    with pytest.raises(ValueError, match="loss must give at most one number per output.*reshape one of them"):
        trainable.evaluate(trainable.init(KEY, HPARAMS), HPARAMS)


def test_a_oneof_finds_its_optimizers_in_any_order():
    space = hpo.Space({"optimizer": hpo.OneOf(sgd={"lr": hpo.Float(0.4, 0.6)}, adam={"lr": hpo.Float(1e-9, 2e-9)})})
    made = {"adam": lambda b: optax.adam(b["lr"]), "sgd": lambda b: optax.sgd(b["lr"])}

    def moved(key, h):
        optimizer = select_optimizer(h["optimizer"], made)
        return optimizer.update(jnp.float32(1.0), optimizer.init(jnp.float32(0.0)))[0]

    method = hpo.random(space, batch=16)
    result = hpo.minimize(moved, method, key=jax.random.key(0), trials=16, repeats=2)
    is_sgd = result.trials.hparams["optimizer"]["choice"] == 0
    assert np.array_equal(is_sgd, result.trials.loss < -0.3) and 0 < is_sgd.sum() < 16
    h = space.fill(space.decode(jnp.full(3, 0.5)))
    assert list(h["optimizer"]) == ["choice", "sgd", "adam"]
    assert np.array_equal(space.encode(h), space.encode(space.decode(jnp.full(3, 0.5))))
