"""Networks of one architecture, in flax's own layers: what `export` returns."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxhpo.automl.nas.cells import EDGES
from jaxhpo.layers import EPSILON, function_of


class Block(NamedTuple):
    """One layer."""

    width: int
    """units or channels"""
    activation: str | Callable
    """a function of `jax.nn` by name, or a function"""
    skip: bool = False
    """whether its input is added to its output"""
    kernel: int | None = None
    """size of a convolution"""


def _fitted(x: jax.Array, width: int) -> jax.Array:
    """`x`, its channels cut or filled up with zeros."""
    missing = max(0, width - x.shape[-1])
    return jnp.pad(x[..., :width], ((0, 0),) * (x.ndim - 1) + ((0, missing),))


def _norm(name: str | None = None, use_bias: bool = False) -> nn.GroupNorm:
    return nn.GroupNorm(1, epsilon=EPSILON, use_scale=False, use_bias=use_bias, use_fast_variance=False, name=name)


def _block(block: Block, x: jax.Array, norm: bool, name: str) -> jax.Array:
    if block.kernel is None:
        y = nn.Dense(block.width, use_bias=not norm, name=name)(x)
    else:
        y = nn.Conv(block.width, (block.kernel, block.kernel), use_bias=not norm, name=name)(x)
    y = function_of(block.activation)(_norm(f"{name}_norm", use_bias=True)(y) if norm else y)
    return y + _fitted(x, block.width) if block.skip else y


class PlainMLP(nn.Module):
    """An MLP of any widths.

    Attributes:
      features: number of outputs.
      blocks: the hidden layers.
      norm: whether each example is standardised over the units of a layer.
      dropout: rate after each hidden layer.
    """

    features: int
    blocks: tuple[Block, ...]
    norm: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for i, block in enumerate(self.blocks):
            x = _block(block, x, self.norm, f"hidden_{i}")
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.features, name="out")(x)


class PlainCNN(nn.Module):
    """A CNN of any channels and kernels, with a 2 x 2 max-pooling after each stage.

    Attributes:
      features: number of outputs.
      stages: the convolutions of each stage.
      norm: whether each example is standardised over the pixels and channels of a layer.
      dropout: rate before the outputs.
    """

    features: int
    stages: tuple[tuple[Block, ...], ...]
    norm: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x[..., None] if x.ndim == 3 else x
        for stage, blocks in enumerate(self.stages):
            for i, block in enumerate(blocks):
                x = _block(block, x, self.norm, f"conv_{stage}_{i}")
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.features, name="out")(x)


class PlainCell(nn.Module):
    """A network of cells, see `CellNet`.

    Attributes:
      features: number of outputs.
      operations: that of each of `EDGES`; "none" where an edge leads nowhere or comes from nowhere.
      channels: channels of the first stage.
      cells: cells in a stage.
      stages: number of stages.
    """

    features: int
    operations: tuple[str, ...]
    channels: int = 16
    cells: int = 1
    stages: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[..., None] if x.ndim == 3 else x
        x = _norm()(nn.Conv(self.channels, (3, 3), name="stem")(x))
        for stage in range(self.stages):
            if stage:
                x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
                x = _norm()(nn.Conv(self.channels * 2**stage, (1, 1), name=f"reduce_{stage}")(x))
            for cell in range(self.cells):
                nodes = [x, *(jnp.zeros_like(x) for _ in range(3))]
                for i, (operation, (source, target)) in enumerate(zip(self.operations, EDGES, strict=True)):
                    name = f"cell_{stage}_{cell}_edge_{i}"
                    nodes[target] += _operation(operation, nodes[source], name)
                x = nodes[3]
        x = nn.relu(_norm()(x)).mean((1, 2))
        return nn.Dense(self.features, name="out")(x)


def _operation(operation: str, x: jax.Array, name: str) -> jax.Array:
    if operation == "none":
        return jnp.zeros_like(x)
    if operation == "skip_connect":
        return x
    if operation == "avg_pool_3x3":
        return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
    size = int(operation[-1])
    return _norm()(nn.Conv(x.shape[-1], (size, size), use_bias=False, name=name)(nn.relu(x)))
