"""Spaces of architectures, and the network of one architecture."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxhpo.automl.nas.cells import EDGES, OPERATIONS
from jaxhpo.checks import whole
from jaxhpo.modules import CNN, MLP
from jaxhpo.parameters import Categorical, Int, Ordinal

PyTree = Any
Network = TypeVar("Network", bound=nn.Module)


def mlp_space(network: MLP, min_width: int = 4) -> dict[str, Any]:
    """The architectures of an MLP: its depth, and of each layer the width, the skip connection and the activation.

    An ordinary space: entries can be left out, or be replaced by other parameters or by constants. What it says of
    layers beyond the depth does not count.

    Args:
      network: the largest one.
      min_width: the smallest width, at least 1.

    Returns:
      `depth`, and for each layer `width`, `skip` and `activation`, in tuples.

    Example:
      >>> import jaxhpo as hpo
      >>> hpo.Space(mlp_space(hpo.MLP(10, max_width=64, max_depth=3))).dims
      9
    """
    widths = _sizes(whole("min_width", min_width, 1, most=network.max_width), network.max_width, log=True)
    return {
        "depth": _sizes(1, network.max_depth),
        "width": (widths,) * network.max_depth,
        "skip": _skips(network.max_depth),
        "activation": (Categorical(network.activations),) * network.max_depth,
    }


def cnn_space(network: CNN, min_channels: int = 2) -> dict[str, Any]:
    """The architectures of a CNN: activation; channels and depth of each stage; kernel and skip of each convolution.

    An ordinary space, as `mlp_space`.

    Args:
      network: the largest one.
      min_channels: the smallest number of channels, at least 1.

    Returns:
      `activation`, `channels` and `depth` in tuples, `kernel` and `skip` in tuples of tuples.

    Example:
      >>> import jaxhpo as hpo
      >>> space = hpo.Space(cnn_space(hpo.CNN(10, max_channels=16, max_depth=2, max_kernel=5)))
      >>> space.dims
      12
    """
    sizes = Ordinal(tuple(range(1, network.max_kernel + 1, 2)))
    low = whole("min_channels", min_channels, 1, most=network.max_channels)
    layers = network.max_depth
    return {
        "activation": Categorical(network.activations),
        "channels": (_sizes(low, network.max_channels, log=True),) * network.stages,
        "depth": (_sizes(1, layers),) * network.stages,
        "kernel": ((sizes,) * layers,) * network.stages,
        "skip": (_skips(layers), *((Categorical((False, True)),) * layers for _ in range(network.stages - 1))),
    }


def _sizes(low: int, high: int, log: bool = False) -> Int | int:
    return Int(low, high, log=log) if low < high else low


def _skips(layers: int) -> tuple:
    return (False, *(Categorical((False, True)) for _ in range(layers - 1)))


def cell_space(relaxed: bool = False) -> dict[str, Any]:
    """The 15,625 cells of NAS-Bench-201: one of `OPERATIONS` for each of `EDGES`.

    Args:
      relaxed: decode to weights of the operations, of which `gradient` and `darts` take the softmax.

    Returns:
      `edges`, a tuple of six.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = hpo.Space(cell_space())
      >>> space.native(space.decode(jax.numpy.full(6, 0.5)))["edges"][0]
      'nor_conv_1x1'
    """
    return {"edges": (Categorical(OPERATIONS, relaxed=relaxed),) * len(EDGES)}


def build(network: Network, architecture: dict[str, Any]) -> Network:
    """The network with an architecture.

    Args:
      network: `hpo.MLP`, `hpo.CNN` or `nas.CellNet`.
      architecture: a point of its space, as an objective gets it, where it may be traced, or native.

    Raises:
      TypeError: `network` is no module.
      ValueError: the architecture has what the network has not: a name, an operation or an activation.

    Example:
      >>> import jaxhpo as hpo
      >>> build(hpo.CNN(10, max_channels=8), {"channels": (4, 8), "activation": "gelu"}).activation
      array(1)
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a module such as hpo.MLP(10), got {network!r}; make one")
    known = [field.name for field in dataclasses.fields(network) if field.init and field.name not in ("parent", "name")]
    if unknown := sorted(set(architecture) - set(known)):
        raise ValueError(
            f"architecture has {unknown}, but {type(network).__name__} has {known}; give the point of its space alone, "
            'such as result.best_hparams["network"]'
        )
    names = {"activation": getattr(network, "activations", ()), "edges": OPERATIONS}
    return network.clone(**{name: _stacked(name, value, names.get(name)) for name, value in architecture.items()})


def _stacked(name: str, value: Any, options: tuple | None) -> Any:
    """Nested tuples as one array, options by their index."""

    def index(leaf: Any) -> Any:
        if not isinstance(leaf, str) and not callable(leaf):
            return leaf
        if options is None or leaf not in options:
            raise ValueError(f"{name} must be of {options}, got {leaf!r}")
        return options.index(leaf)

    def stack(node: Any) -> Any:
        if isinstance(node, tuple | list):
            rows = [stack(row) for row in node]
            traced = any(isinstance(row, jax.Array) for row in rows)
            return jnp.stack([jnp.asarray(row) for row in rows]) if traced else np.stack(rows)
        return node if isinstance(node, jax.Array) else np.asarray(index(node))

    return stack(value)
