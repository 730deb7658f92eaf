"""Masked networks: equal to the small flax network in outputs, gradients and initial statistics."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from jaxhpo.flax import flax_trainable
from jaxhpo.modules import ACTIVATIONS, CNN, MLP, activation, dropout
from jaxhpo.optimizers import select_optimizer

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 4, 2))
IMAGES = jax.random.normal(jax.random.key(2), (4, 8, 9, 2))


class PlainMLP(nn.Module):
    """What `MLP` is for the widths given, in flax's own layers."""

    widths: tuple
    act: object

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            x = self.act(nn.Dense(width, name=f"hidden_{i}")(x))
        return nn.Dense(3, name="out")(x)


class PlainCNN(nn.Module):
    """What `CNN` is for the channels and depths given, in flax's own layers."""

    channels: tuple
    depths: tuple
    kernel: int
    act: object

    @nn.compact
    def __call__(self, x):
        for stage, (channels, depth) in enumerate(zip(self.channels, self.depths, strict=True)):
            for i in range(depth):
                x = self.act(nn.Conv(channels, (self.kernel, self.kernel), name=f"conv_{stage}_{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(3, name="out")(x.mean((1, 2)))


def loss(module, params, x):
    return (module.apply({"params": params}, x) ** 2 * jnp.arange(1, 4)).sum()


def randomly(key, params):
    """Other values for what is not zero, so that biases count too: as after some training."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, noise)


def padded(small, large):
    """Parameters of the small network within zeros of the large one: channels first, taps in the middle."""

    def pad(part, shapes):
        taps = [((n - m) // 2,) * 2 for m, n in zip(part["kernel"].shape[:-2], shapes["kernel"].shape, strict=False)]
        channels = [(0, n - m) for m, n in zip(part["kernel"].shape[-2:], shapes["kernel"].shape[-2:], strict=True)]
        return {"kernel": jnp.pad(part["kernel"], taps + channels), "bias": jnp.pad(part["bias"], channels[-1])}

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), large)
    return zeros | {name: pad(part, large[name]) for name, part in small.items()}


def assert_equal(masked, plain, x):
    """The outputs and gradients of a masked network are those of the plain one, gradients outside are zero."""
    small = randomly(KEY, jax.eval_shape(plain.init, KEY, x)["params"])
    large = jax.eval_shape(masked.init, KEY, x)["params"]
    value, grads = jax.jit(jax.value_and_grad(functools.partial(loss, masked)))(padded(small, large), x)
    expected, small_grads = jax.jit(jax.value_and_grad(functools.partial(loss, plain)))(small, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max())),
        grads,
        padded(small_grads, large),
    )
    ones = padded(jax.tree.map(jnp.ones_like, small), large)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[b == 0], 0), grads, ones)


@pytest.mark.parametrize("act", ["tanh", "sigmoid"])
@pytest.mark.parametrize("widths", [(5,), (7, 7), (3, 3, 3), (2, 6, 4)])
def test_mlp_equals_the_plain_one(widths, act):
    width = jnp.array((*widths, 1, 1)[:3]) if len(set(widths)) > 1 else jnp.int32(widths[0])
    masked = MLP(3, 7, 3, width, jnp.int32(len(widths)), jnp.int32(1), activations=("gelu", act))
    assert_equal(masked, PlainMLP(widths, getattr(jax.nn, act)), X)


@pytest.mark.parametrize(
    "channels, depths, kernel, act",
    [
        ((4, 4), (1, 1), 3, "gelu"),
        ((2, 5), (2, 1), 5, "sigmoid"),
        ((5, 3), (1, 2), 1, "relu"),
    ],
)
def test_cnn_equals_the_plain_one(channels, depths, kernel, act):
    masked = CNN(
        3,
        5,
        2,
        5,
        channels=jnp.array(channels),
        depth=jnp.array(depths),
        kernel=jnp.int32(kernel),
        activation=act,
        activations=(act,),
    )
    assert_equal(masked, PlainCNN(channels, depths, kernel, getattr(jax.nn, act)), IMAGES)


def test_networks_side_by_side_equal_each_alone():
    def outputs(width, depth, act):
        module = MLP(3, 8, 3, width, depth, act)
        return module.apply(module.init(KEY, X), X)

    settings = jnp.array([[1, 1, 0], [3, 2, 1], [8, 3, 2], [5, 3, 3]])
    together = jax.jit(jax.vmap(outputs))(*settings.T)
    for row, (width, depth, act) in zip(together, settings.tolist(), strict=True):
        module = MLP(3, 8, 3, width, depth, ACTIVATIONS[act])
        small, params = module.shrink(jax.jit(module.init)(KEY, X)["params"])
        assert (small.max_width, small.max_depth) == (width, depth)
        assert params["out"]["kernel"].shape == (width, 3)
        np.testing.assert_allclose(row, jax.jit(small.apply)({"params": params}, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sizes", [{"channels": 3, "depth": 1, "kernel": 3}, {"channels": (2, 4), "depth": (1, 2), "kernel": 5}, {}]
)
def test_cnn_shrinks(sizes):
    module = CNN(3, 6, 2, 5, **sizes)
    params = jax.jit(module.init)(KEY, IMAGES)["params"]
    small, small_params = module.shrink(params)
    assert jax.tree.map(jnp.shape, small_params) == jax.tree.map(
        lambda x: x.shape, jax.eval_shape(small.init, KEY, IMAGES)["params"]
    )
    assert small.max_kernel == sizes.get("kernel", 5)
    outputs = jax.jit(module.apply)({"params": params}, IMAGES)
    np.testing.assert_allclose(jax.jit(small.apply)({"params": small_params}, IMAGES), outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "module, x",
    [
        (MLP(3, 8, 3, (4, 6, 8), 2, np.array([1, 0, 0]), skip=np.array([False, True, False]), norm=True), X),
        (
            CNN(
                3,
                6,
                3,
                5,
                channels=(2, 4),
                depth=(1, 2),
                kernel=np.array([[3, 5, 5], [1, 3, 5]]),
                activation=np.array([[0, 1, 1], [1, 0, 1]]),
                skip=np.array([[False, True, True], [True, False, True]]),
                norm=True,
            ),
            IMAGES,
        ),
    ],
)
def test_choices_for_each_layer_shrink_with_it(module, x):
    params = jax.tree.map(lambda p: jnp.where(p == 0, p, p + 0.1), jax.jit(module.init)(KEY, x)["params"])
    small, small_params = module.shrink(params)
    assert small.max_depth == 2 and getattr(small, "max_kernel", 5) == 5
    outputs = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(jax.jit(small.apply)({"params": small_params}, x), outputs, rtol=1e-5, atol=1e-6)
    for changed in ({"skip": False}, {"norm": False}, {"activation": "relu"}):
        other = jax.jit(module.clone(**changed).apply)({"params": params}, x)
        assert float(jnp.abs(other - outputs).max()) > 1e-3, changed


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_initial_statistics_are_those_of_the_small_network(gain):
    x = jnp.ones((1, 200))
    module = MLP(300, 400, 3, jnp.array([150, 250, 400]), jnp.int32(2), gain=jnp.float32(gain))
    params = jax.jit(module.init)(KEY, x)["params"]
    for name, inputs, outputs in (("hidden_0", 200, 150), ("hidden_1", 150, 250), ("out", 250, 300)):
        kernel = np.asarray(params[name]["kernel"])
        used = kernel[:inputs, :outputs]
        assert kernel.astype(bool).sum() == inputs * outputs
        plain = np.asarray(nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal")(KEY, used.shape))
        np.testing.assert_allclose(used.std(), np.sqrt(gain / inputs), rtol=0.02)
        # Quantiles, the ends of the truncated normal among them.
        levels = [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]
        np.testing.assert_allclose(np.quantile(used, levels), np.quantile(plain, levels), atol=0.04 * plain.std())
    assert not np.asarray(params["hidden_2"]["kernel"]).any()


def test_initial_statistics_of_convolutions():
    module = CNN(3, 64, 2, 5, channels=jnp.int32(40), kernel=jnp.int32(3))
    params = jax.jit(module.init)(KEY, IMAGES)["params"]
    for name, inputs in (("conv_0_0", 2), ("conv_0_1", 40), ("conv_1_0", 40)):
        used = np.asarray(params[name]["kernel"])[1:4, 1:4, :inputs, :40]
        np.testing.assert_allclose(used.std(), np.sqrt(1 / (9 * inputs)), rtol=0.05)
        assert np.count_nonzero(params[name]["kernel"]) == used.size


def test_what_lies_outside_stays_zero_under_adam_and_weight_decay():
    module = MLP(3, 8, 3, jnp.int32(5), jnp.int32(2))
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    params = module.init(KEY, X)["params"]

    @jax.jit
    def train(params):
        def step(_, carry):
            updates, state = optimizer.update(jax.grad(lambda p: loss(module, p, X))(carry[0]), carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        return jax.lax.fori_loop(0, 5, step, (params, optimizer.init(params)))[0]

    trained = train(params)
    for name, inputs, outputs in (("hidden_0", 8, 5), ("hidden_1", 5, 5), ("hidden_2", 0, 0), ("out", 5, 3)):
        kernel, bias = np.array(trained[name]["kernel"]), np.array(trained[name]["bias"])
        assert kernel[:inputs, :outputs].all() and bias[outputs:].any() == 0
        kernel[:inputs, :outputs] = 0
        assert not kernel.any()


def test_cnn_has_second_derivatives():
    module = CNN(3, 2, channels=jnp.int32(1), activation="tanh")
    params = jax.jit(module.init)(KEY, IMAGES)["params"]
    flat, unflatten = ravel_pytree(params)
    gradient = jax.grad(lambda flat: loss(module, unflatten(flat), IMAGES))
    product = jax.jit(lambda v: jax.jvp(gradient, (flat,), (v,))[1])(flat)
    step = 1e-3
    differences = (jax.jit(gradient)(flat * (1 + step)) - jax.jit(gradient)(flat * (1 - step))) / (2 * step)
    np.testing.assert_allclose(product, differences, rtol=1e-2, atol=1e-2)


def test_activation_by_index_and_name():
    x = jnp.linspace(-3, 3, 7)
    chosen = jax.vmap(activation, (0, None))(jnp.arange(4), x)
    for row, name in zip(chosen, ACTIVATIONS, strict=True):
        np.testing.assert_allclose(row, getattr(jax.nn, name)(x), rtol=1e-6)
        np.testing.assert_allclose(activation(name, x), row, rtol=1e-6)
    np.testing.assert_allclose(activation(1, x, (jnp.sin, jnp.cos)), jnp.cos(x))
    slopes = jax.vmap(jax.grad(lambda i, x: activation(i, x), argnums=1), (0, None))(jnp.arange(4), 1.5)
    np.testing.assert_allclose(slopes, [jax.grad(getattr(jax.nn, name))(1.5) for name in ACTIVATIONS], rtol=1e-6)
    with pytest.raises(ValueError, match="must be one of .* got 'elu'"):
        activation("elu", x)
    with pytest.raises(ValueError, match="'nothing' is not in jax.nn"):
        activation(0, x, ("nothing",))


def test_dropout_rates_and_independence():
    x = jnp.full((64, 256), 2.0)
    rates = jnp.array([0.0, 0.1, 0.5, 0.9, 1.0])
    out = np.asarray(jax.jit(jax.vmap(dropout, (None, None, 0)))(KEY, x, rates))
    np.testing.assert_array_equal(out[0], x)
    np.testing.assert_array_equal(out[4], 0)
    for row, rate in zip(out[1:4], (0.1, 0.5, 0.9), strict=True):
        np.testing.assert_allclose((row == 0).mean(), rate, atol=4 * np.sqrt(rate * (1 - rate) / x.size))
        np.testing.assert_allclose(row[row != 0], 2 / (1 - rate), rtol=1e-6)
    half = out[2].astype(bool) - 0.5
    others = np.asarray(jax.vmap(lambda key: dropout(key, x, 0.5))(jax.random.split(KEY, 8))).astype(bool) - 0.5
    shifted = [np.roll(half, s, axis) for s, axis in ((1, 0), (2, 0), (1, 1), (2, 1), (16, 1), (128, 1))]
    for other in [*shifted, *others]:
        assert abs((half * other).mean() * 4) < 5 / np.sqrt(x.size)
    assert np.isfinite(jax.grad(lambda rate: dropout(KEY, x, rate).sum())(1.0))


def test_dropout_only_in_training():
    module = MLP(3, 8, 2, dropout=jnp.float32(0.5))
    variables = module.init(KEY, X)
    a, b = (module.apply(variables, X, train=True, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    assert float(jnp.abs(a - b).max()) > 0.01
    np.testing.assert_allclose(module.apply(variables, X), MLP(3, 8, 2).apply(variables, X, train=True))


@pytest.mark.parametrize(
    "module, x, message",
    [
        (MLP(3, 8, 2, width=9), X, "width must be integers from 1 to max_width=8, got 9"),
        (MLP(3, 8, 2, depth=0), X, "depth must be integers from 1 to max_depth=2, got 0"),
        (MLP(3, 8, 2, width=jnp.array([1, 2, 3])), X, r"width must be one value or have shape \(2,\)"),
        (CNN(3, 8, max_kernel=4), IMAGES, "max_kernel must be odd, got 4; use 5"),
        (CNN(3, 8, stages=4), IMAGES, r"stages must fit the image, got stages=4 for \(8, 9\)"),
        (CNN(3, 8, channels=2.5), IMAGES, "channels must be integers"),
    ],
)
def test_errors(module, x, message):
    with pytest.raises(ValueError, match=message):
        module.init(KEY, x)


def test_eight_networks_learn_the_digits_in_one_program():
    images, labels = load_digits(return_X_y=True)
    images, held_out = images.astype(np.float32) / 16, np.arange(len(images)) % 5 == 0
    trainable = flax_trainable(
        model=lambda h: MLP(10, 64, 3, h["width"], h["depth"], h["activation"], dropout=h["dropout"], gain=2.0),
        optimizer=lambda h: select_optimizer(h["optimizer"], {"adam": optax.adam(3e-3), "sgd": optax.sgd(0.1, 0.9)}),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        metric=lambda outputs, targets: outputs.argmax(-1) != targets,
        train=(images[~held_out], labels[~held_out]),
        valid=(images[held_out], labels[held_out]),
    )
    hparams = {
        "width": jnp.array([4, 16, 32, 64] * 2),
        "depth": jnp.array([1, 2, 3, 1, 3, 1, 2, 3]),
        "activation": jnp.arange(8) % 4,
        "dropout": jnp.array([0, 0.1, 0.1, 0.2, 0, 0, 0.2, 0.3], jnp.float32),
        "optimizer": jnp.arange(8) // 4,
    }

    @jax.jit
    @jax.vmap
    def errors(key, hparams):
        step = lambda i, state: trainable.step(jax.random.fold_in(key, i), state, hparams)  # noqa: E731
        state = jax.lax.fori_loop(1, 201, step, trainable.init(jax.random.fold_in(key, 0), hparams))
        return trainable.evaluate(state, hparams)

    found = np.asarray(errors(jax.random.split(KEY, 8), hparams))
    assert (found[hparams["width"] >= 16] < 0.11).all(), found
    assert (found < 0.7).all(), found
