"""Networks of searched architectures: equal to the plain ones they are exported to, alone and in lanes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import jaxhpo as hpo
from jaxhpo.automl import nas

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 8, 8, 2))
LANES = 3
MLP = nas.MLP(3, max_width=9, max_depth=3, activations=("relu", "tanh"), norm=True)
CNN = nas.CNN(3, max_channels=6, max_depth=2, max_kernel=5, activations=("relu", "gelu"), norm=True)
CELL = nas.CellNet(3, channels=4, cells=1, stages=2)
ONE_CELL = CELL.clone(stages=1)
SPACES = {MLP: nas.mlp_space(MLP), CNN: nas.cnn_space(CNN), CELL: nas.cell_space()}
NETWORKS = pytest.mark.parametrize("network", SPACES, ids=lambda network: type(network).__name__)


def moved(params):
    """Other values for what is not zero, biases included: as after some training."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        treedef, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def gradients(module, params):
    """Of a loss by the parameters, and the outputs."""

    def loss(params):
        outputs = module.apply({"params": params}, X)
        return (outputs**2 * jnp.arange(1, 4)).sum(), outputs

    return jax.grad(loss, has_aux=True)(params)


@functools.cache
def lanes(network):
    """Random architectures of a network in one program: the space, hparams, params, gradients and outputs."""
    space = hpo.Space(SPACES[network])

    @jax.jit
    @jax.vmap
    def run(unit):
        hparams = space.decode(unit)
        module = nas.build(network, space.fill(hparams))
        params = moved(module.init(KEY, X)["params"])
        return hparams, params, *gradients(module, params)

    return space, *run(space.sample(jax.random.key(4), LANES))


def squares(tree):
    return sum(float((x**2).sum()) for x in jax.tree.leaves(tree))


@NETWORKS
def test_an_export_has_the_outputs_of_its_lane_and_the_gradients(network):
    space, hparams, params, grads, outputs = lanes(network)
    for i in range(LANES if network is not CELL else 2):
        found = space.native(hparams, i)
        module, small = nas.export(network, found, row(params, i))
        expected, plain = jax.jit(functools.partial(gradients, module))(small)
        np.testing.assert_allclose(outputs[i], plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
        # Flax finds no parameter missing, and there is none that it does not know.
        born = jax.eval_shape(module.init, KEY, X)["params"]
        assert jax.tree.map(jnp.shape, small) == jax.tree.map(lambda x: x.shape, born)
        # What the architecture has not has no gradient: those of the export are all there are.
        _, used = nas.export(network, found, row(grads, i))
        for a, b in zip(jax.tree.leaves(used), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.sqrt(squares(expected)))
        np.testing.assert_allclose(squares(row(grads, i)), squares(used), rtol=1e-6)


@NETWORKS
def test_a_native_architecture_builds_the_network_of_its_lane(network):
    space, hparams, params, _, outputs = lanes(network)
    module = nas.build(network, space.native(hparams, 0))
    alone = jax.jit(module.apply)({"params": row(params, 0)}, X)
    np.testing.assert_allclose(outputs[0], alone, rtol=1e-5, atol=1e-6)


def test_the_lanes_differ_in_everything_that_is_searched():
    space, hparams, *_ = lanes(CNN)
    native = [space.native(hparams, i) for i in range(LANES)]
    for name in ("activation", "channels", "depth", "kernel", "skip"):
        assert len({str(found[name]) for found in native}) > 1, name
    assert native[0]["skip"][0][0] is False


def test_what_a_skip_connection_and_a_normalisation_are():
    block = functools.partial(nas.Block, activation="tanh")
    x, width = X.reshape(5, -1), (9, 5, 7)
    module = nas.build(MLP, {"width": width, "skip": (False, True, True), "activation": ("tanh",) * 3})
    params = moved(module.init(KEY, x)["params"])
    plain, _ = nas.export(module, {}, params)
    assert plain.blocks == (block(9), block(5, skip=True), block(7, skip=True)) and plain.norm
    hidden = x
    for i, n in enumerate(width):
        layer = params[f"hidden_{i}"]
        y = hidden @ layer["kernel"][: hidden.shape[1], :n]
        y = (y - y.mean(1, keepdims=True)) / jnp.sqrt(y.var(1, keepdims=True) + 1e-5)
        y = jnp.tanh(y + layer["bias"][:n])
        hidden = y if i == 0 else y + jnp.pad(hidden, ((0, 0), (0, 9)))[:, :n]
    expected = hidden @ params["out"]["kernel"][:7] + params["out"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


def test_cells_are_those_of_nas_bench_201():
    space = hpo.Space(nas.cell_space())
    assert space.dims == 6 and np.prod(space.levels) == 15625
    assert nas.EDGES == ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    with pytest.raises(ValueError, match="edges must be of .* got 'conv'"):
        nas.build(CELL, {"edges": ("conv",) * 6})
    with pytest.raises(ValueError, match="edges must be indices"):
        nas.build(CELL, {"edges": (5,) * 6}).init(KEY, X)
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        nas.build(CELL, {"edges": (1, 1, 1)}).init(KEY, X)


def test_an_edge_on_no_path_is_not_exported():
    one = "nor_conv_1x1"
    module = nas.build(ONE_CELL, {"edges": ("none", one, one, one, one, "none")})
    params = moved(jax.jit(module.init)(KEY, X)["params"])
    plain, small = nas.export(module, {}, params)
    assert plain.operations == ("none", "none", "none", one, "none", "none")
    assert {name for name in small if "edge" in name} == {"cell_0_0_edge_3"}
    outputs, expected = jax.jit(lambda p, q: (plain.apply({"params": p}, X), module.apply({"params": q}, X)))(
        small, params
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_relaxed_edges_are_sums_of_the_operations():
    space = hpo.Space(nas.cell_space(relaxed=True))
    hparams = space.fill(space.read({"edges": nas.OPERATIONS[1:] + nas.OPERATIONS[:2]}))
    relaxed, discrete = nas.build(ONE_CELL, hparams), nas.build(ONE_CELL, {"edges": (1, 2, 3, 4, 0, 1)})
    assert relaxed.edges.shape == (6, 5)
    params = jax.jit(discrete.init)(KEY, X)["params"]
    apply = jax.jit(lambda edges: nas.build(ONE_CELL, {"edges": edges}).apply({"params": params}, X))
    np.testing.assert_allclose(apply(relaxed.edges), apply(discrete.edges), rtol=1e-5, atol=1e-6)
    # Of the last edges of the last cell the sum is linear, before the normalisation.
    cell = nas.cells._Cell()
    x, kernels = X[..., [0, 1, 0, 1]], params["cell_0_0"]
    of = jax.jit(lambda weights: cell.apply({"params": kernels}, x, weights))
    mix = jnp.zeros((6, 5)).at[3].set(jnp.array([0.1, 0.2, 0.3, 0.25, 0.15]))
    each = [of(jnp.zeros((6, 5)).at[3, k].set(1.0)) for k in range(5)]
    np.testing.assert_allclose(of(mix), jnp.tensordot(mix[3], jnp.stack(each), 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(each[0], 0)
    np.testing.assert_allclose(each[1], x)


def test_the_loss_of_relaxed_edges_has_the_slopes_of_finite_differences():
    with jax.enable_x64(True):
        weights = jax.nn.softmax(jax.random.normal(KEY, (6, 5), jnp.float64))
        x = jnp.asarray(X, jnp.float64)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), jax.jit(ONE_CELL.init)(KEY, x)["params"])

        def loss(weights):
            return (nas.build(ONE_CELL, {"edges": weights}).apply({"params": params}, x) ** 2).mean()

        slopes = jax.jit(jax.grad(loss))(weights)
        steps = 1e-6 * jnp.eye(30).reshape(30, 6, 5)
        around = jnp.stack([weights + steps, weights - steps]).reshape(60, 6, 5)
        above, below = jax.jit(functools.partial(jax.lax.map, loss))(around).reshape(2, 30)
        np.testing.assert_allclose(slopes, ((above - below) / 2e-6).reshape(6, 5), rtol=1e-5, atol=1e-7)
        assert (np.abs(slopes[:, 1:]) > 1e-8).all() and not slopes[:, 0].any()


def test_architectures_train_side_by_side_as_each_does_alone():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    network = nas.CNN(10, max_channels=6, max_depth=2, max_kernel=3, norm=True)
    space = hpo.Space(nas.cnn_space(network))
    training = functools.partial(
        hpo.flax_trainable,
        optimizer=lambda h: optax.adam(0.01),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=(images[:1000], labels[:1000]),
        valid=(images[1000:1200], labels[1000:1200]),
        batch_size=16,
    )
    together = training(model=lambda h: nas.build(network, h))
    step = lambda trainable, key, h: lambda i, s: trainable.step(jax.random.fold_in(key, i), s, h)  # noqa: E731

    @jax.jit
    @jax.vmap
    def train(unit, key):
        h = space.fill(space.decode(unit))
        begun = together.init(jax.random.fold_in(key, 0), h)
        trained = jax.lax.fori_loop(1, 31, step(together, key, h), begun)
        return begun, together.evaluate(begun, h), together.evaluate(trained, h)

    units, keys = space.sample(KEY, 8), jax.random.split(KEY, 8)
    begun, before, losses = train(units, keys)
    assert (losses < before).all()
    for i in (0, 7):
        module, small = nas.export(network, space.native(space.decode(units), i), row(begun.params, i))
        plain = training(model=lambda h: module)  # noqa: B023

        def alone(small, order, key):
            begun = plain.init(KEY, None)._replace(params=small, order=order)  # noqa: B023
            return plain.evaluate(jax.lax.fori_loop(1, 31, step(plain, key, None), begun), None)  # noqa: B023

        np.testing.assert_allclose(losses[i], jax.jit(alone)(small, begun.order[i], keys[i]), rtol=1e-3)


def test_shared_weights_of_sampled_paths_rank_architectures():
    x = jax.random.normal(KEY, (256, 4))
    y = jnp.tanh(x @ jax.random.normal(jax.random.key(5), (4, 8))) @ jnp.ones((8, 1))
    network = nas.MLP(1, max_width=16, max_depth=2, activations=("relu", "tanh"))
    space = nas.mlp_space(network, min_width=1)
    trainable = hpo.flax_trainable(
        model=lambda h: nas.build(network, h),
        optimizer=lambda h: optax.sgd(0.03),
        loss=optax.squared_error,
        train=(x, y),
        valid=(x, y),
        batch_size=64,
    )
    state = nas.train_supernet(trainable, space, 1500, key=KEY)
    again = nas.train_supernet(trainable, space, 1500, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert int(state.step) == 1500
    # Every part of the largest network has been drawn and trained.
    born = trainable.init(KEY, hpo.Space(space).fill(hpo.Space(space).decode(jnp.ones(hpo.Space(space).dims))))
    assert all((a != b).all() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(born.params), strict=True))
    objective = nas.shared_weights(trainable, state)
    result = hpo.minimize(objective, hpo.genetic(space, population=16), key=KEY, trials=160)
    losses = result.trials.loss
    # One unit is worse than many, by the same weights.
    one = result.trials.hparams["width"][0] <= 2
    assert result.best_loss < 0.2 * float(y.var()) and losses[one].mean() > 2 * np.median(losses[~one])
    assert result.best_hparams["width"][0] > 2


def test_pictures(tmp_path):
    space, hparams, params, *_ = lanes(CNN)
    found = [nas.export(CNN, space.native(hparams, i), row(params, i))[0] for i in range(3)]  # noqa: B023
    for module in found:
        text = nas.describe(module).splitlines()
        blocks = [block for blocks in module.stages for block in blocks]
        assert len(text) == len(blocks) + 4 and text[-1] == "dense 3"
        assert text[0] == f"conv {blocks[0].kernel}x{blocks[0].kernel}, {blocks[0].width}, {blocks[0].activation}"
        assert sum("plus its input" in line for line in text) == sum(block.skip for block in blocks)
        axis = nas.draw(module).axes[0]
        labels = [label.get_text() for label in axis.texts]
        assert labels[-1] == "dense 3" and labels.count("max-pool 2x2") == 2
    cell = nas.PlainCell(3, ("nor_conv_3x3", "none", "skip_connect", "avg_pool_3x3", "none", "nor_conv_1x1"))
    assert nas.describe(cell).startswith(
        "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|"
    )
    figure = nas.draw(cell)
    assert {text.get_text() for text in figure.axes[0].texts} >= {
        "conv 3x3",
        "skip connect",
        "avg pool 3x3",
        "conv 1x1",
    }
    figure.savefig(tmp_path / "cell.svg")
    assert (tmp_path / "cell.svg").stat().st_size > 2000
    with pytest.raises(TypeError, match="as export returns it, got CNN"):
        nas.draw(CNN)
    with pytest.raises(TypeError, match="must be an MLP, a CNN or a CellNet, got PlainCell"):
        nas.export(cell, {}, {})


def test_what_is_never_true_costs_nothing_as_a_number_of_a_native_architecture_too():
    never = {"dropout": 0.0, "norm": False, "skip": (False, False, False)}
    module, x = nas.build(MLP.clone(norm=True), never), X.reshape(5, -1)
    params = module.init(KEY, x)["params"]

    def costs(module, train):
        text = str(jax.make_jaxpr(lambda p: module.apply({"params": p}, x, train=train))(params))
        return [text.count(f" {name} ") for name in ("add", "rsqrt", "shift_right_logical")]

    plain = costs(MLP.clone(norm=False), False)
    assert costs(module, True) == plain
    for other in (module.clone(norm=True), module.clone(skip=True)):
        assert costs(other, False) > plain


def test_errors_name_what_was_given_and_the_remedy():
    params = MLP.init(KEY, X)["params"]
    remedy = "give those of one trial, without the collection 'params'"
    with pytest.raises(ValueError, match=f"params must have the layers .*'hidden_0'.* got \\['params'\\]; {remedy}"):
        nas.export(MLP, {}, {"params": params})
    with pytest.raises(ValueError, match=f"params must have the layers .* got list; {remedy}"):
        nas.export(MLP, {}, [params])
    with pytest.raises(ValueError, match=rf"params must be of a network of 3 features, got biases \(2, 3\); {remedy}"):
        nas.export(MLP, {}, jax.tree.map(lambda p: jnp.stack([p, p]), params))
    mean = hpo.Trainable(lambda key, h: 0.0, lambda key, s, h: s, lambda s, h: s)
    with pytest.raises(ValueError, match=r"architecture has \['lr'\], but MLP has \['features', .*best_hparams"):
        nas.build(MLP, {"depth": 1, "lr": 0.1})
    with pytest.raises(TypeError, match="network must be a module such as .* got <class .*MLP'>; make one"):
        nas.build(hpo.MLP, {"depth": 1})
    with pytest.raises(TypeError, match="trainable must be a Trainable, got <function"):
        nas.train_supernet(lambda key, h: 0.0, {"x": hpo.Float(0, 1)}, 3, key=KEY)
    with pytest.raises(TypeError, match="trainable must be a Trainable, got 3; make one"):
        nas.shared_weights(3, {})
    with pytest.raises(TypeError, match=r"key must be one PRNG key, got 0; say jax.random.key\(0\)"):
        nas.train_supernet(mean, {"x": hpo.Float(0, 1)}, 3, key=0)
