"""A trained network with traced sizes as the network of its architecture alone."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxhpo.automl.nas.cells import EDGES, OPERATIONS, CellNet
from jaxhpo.automl.nas.plain import Block, PlainCell, PlainCNN, PlainMLP
from jaxhpo.automl.nas.spaces import build
from jaxhpo.layers import cut, each, middle, within
from jaxhpo.modules import CNN, MLP

PyTree = Any


def export(network: nn.Module, architecture: dict[str, Any], params: PyTree) -> tuple[nn.Module, PyTree]:
    """The found architecture as a plain flax module, without masks and choices, and its parameters.

    Args:
      network: `hpo.MLP`, `hpo.CNN` or `nas.CellNet`, as it was built and trained.
      architecture: a native point of its space, such as `result.best_hparams["network"]`; `{}` if `network` has it.
      params: the parameters of one trial, such as `result.best_state.params`.

    Returns:
      A `PlainMLP`, `PlainCNN` or `PlainCell`, whose outputs are those of the network, and its parameters. Of relaxed
      edges each becomes the operation with the largest weight, so there outputs are equal only for weights of 0 and 1.
      Dropout becomes flax's own, and no gain of an initialisation is kept.

    Raises:
      TypeError: `network` is another module.
      ValueError: `params` are not those of the network.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> network, x = hpo.MLP(3, max_width=64, max_depth=4), jnp.ones((5, 7))
      >>> architecture = {"depth": 2, "width": (9, 5, 8, 8)}
      >>> params = build(network, architecture).init(jax.random.key(0), x)["params"]
      >>> module, params = export(network, architecture, params)
      >>> [block.width for block in module.blocks], params["hidden_1"]["kernel"].shape
      ([9, 5], (9, 5))
    """
    for kind, exported in _KINDS.items():
        if isinstance(network, kind):
            _check(network, params)
            return exported(build(network, architecture), params)
    raise TypeError(f"network must be an MLP, a CNN or a CellNet, got {type(network).__name__}")


def _check(network: Any, params: PyTree) -> None:
    given = set(params) if isinstance(params, Mapping) else type(params).__name__
    remedy = "; give those of one trial, without the collection 'params'"
    if given != (layers := _layers(network)):
        found = sorted(given) if isinstance(given, set) else given
        raise ValueError(f"params must have the layers {sorted(layers)} of network, got {found}{remedy}")
    if (shape := np.shape(params["out"]["bias"])) != (network.features,):
        raise ValueError(f"params must be of a network of {network.features} features, got biases {shape}{remedy}")


def _layers(network: MLP | CNN | CellNet) -> set[str]:
    if isinstance(network, MLP):
        return {"out", *(f"hidden_{i}" for i in range(network.max_depth))}
    stages = range(network.stages)
    if isinstance(network, CNN):
        return {"out", *(f"conv_{stage}_{i}" for stage in stages for i in range(network.max_depth))}
    cells = {f"cell_{stage}_{i}" for stage in stages for i in range(network.cells)}
    return {"stem", "out", *cells, *(f"reduce_{stage}" for stage in stages[1:])}


def _mlp(network: MLP, params: PyTree) -> tuple[PlainMLP, PyTree]:
    layers, depth = (network.max_depth,), int(within("depth", network.depth, network.max_depth))
    widths = within("width", network.width, network.max_width, layers).tolist()
    skips = each("skip", network.skip, layers).tolist()
    norm = bool(network.norm)
    blocks: list[Block] = []
    small: dict[str, Any] = {}
    inputs = None
    for i in range(depth):
        blocks.append(Block(widths[i], _activation(network, layers, i), i > 0 and skips[i]))
        small |= _named(f"hidden_{i}", cut(params[f"hidden_{i}"], inputs, widths[i]), norm)
        inputs = widths[i]
    small["out"] = cut(params["out"], inputs, network.features)
    return PlainMLP(network.features, tuple(blocks), norm, float(np.asarray(network.dropout))), small


def _cnn(network: CNN, params: PyTree) -> tuple[PlainCNN, PyTree]:
    layers = (network.stages, network.max_depth)
    channels = within("channels", network.channels, network.max_channels, layers[:1]).tolist()
    depths = within("depth", network.depth, network.max_depth, layers[:1]).tolist()
    kernels = (within("kernel", network.kernel, network.max_kernel, layers) | 1).tolist()
    skips = each("skip", network.skip, layers).tolist()
    norm = bool(network.norm)
    stages: list[tuple[Block, ...]] = []
    small: dict[str, Any] = {}
    inputs = None
    for stage in range(network.stages):
        blocks = []
        for i in range(depths[stage]):
            is_first, kernel = stage == i == 0, kernels[stage][i]
            activation = _activation(network, layers, (stage, i))
            blocks.append(Block(channels[stage], activation, not is_first and skips[stage][i], kernel))
            name = f"conv_{stage}_{i}"
            layer = cut(params[name], inputs, channels[stage])
            small |= _named(name, layer | {"kernel": middle(layer["kernel"], kernel)}, norm)
            inputs = channels[stage]
        stages.append(tuple(blocks))
    small["out"] = cut(params["out"], inputs, network.features)
    return PlainCNN(network.features, tuple(stages), norm, float(np.asarray(network.dropout))), small


def _cell(network: CellNet, params: PyTree) -> tuple[PlainCell, PyTree]:
    edges = np.asarray(network.edges)
    indices = edges.argmax(-1) if edges.ndim == 2 else np.broadcast_to(edges, len(EDGES))
    operations = _reached(tuple(OPERATIONS[i] for i in indices.tolist()))
    small = {}
    for name, layer in params.items():
        if not name.startswith("cell"):
            is_convolution = name.startswith("reduce")
            small[name] = layer | {"kernel": layer["kernel"][None, None]} if is_convolution else layer
            continue
        for i, operation in enumerate(operations):
            if operation.startswith("nor_conv"):
                small[f"{name}_edge_{i}"] = {"kernel": layer[operation.removeprefix("nor_")][i]}
    return PlainCell(network.features, operations, network.channels, network.cells, network.stages), small


def _reached(operations: tuple[str, ...]) -> tuple[str, ...]:
    """The operations, "none" where what an edge has is zero or goes nowhere: it lies on no path through the cell."""
    edges = [edge for edge, operation in zip(EDGES, operations, strict=True) if operation != "none"]
    fed, used = {0}, {3}
    for source, target in sorted(edges):
        fed |= {target} if source in fed else set()
    for source, target in sorted(edges, reverse=True):
        used |= {source} if target in used else set()
    on_path = [source in fed and target in used for source, target in EDGES]
    return tuple(o if kept else "none" for o, kept in zip(operations, on_path, strict=True))


def _activation(network: MLP | CNN, layers: tuple[int, ...], layer: int | tuple[int, int]) -> Any:
    if isinstance(network.activation, str):
        return network.activation
    return network.activations[int(each("activation", network.activation, layers)[layer])]


def _named(name: str, layer: dict[str, jax.Array], norm: bool) -> dict[str, Any]:
    """A layer's parameters as flax names them: with normalisation, its bias comes after that."""
    if not norm:
        return {name: layer}
    return {name: {"kernel": layer["kernel"]}, f"{name}_norm": {"bias": layer["bias"]}}


_KINDS: dict[type, Any] = {MLP: _mlp, CNN: _cnn, CellNet: _cell}
