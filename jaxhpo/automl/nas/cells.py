"""Networks of cells: the architecture is one of five operations for each edge between the four nodes of a cell.

Reference:
  X. Dong, Y. Yang, "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search", ICLR 2020.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from jaxhpo.layers import Layer, drawn, halve, patches, standardise

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""What an edge can be, in the order of NAS-Bench-201. A convolution is that of the positive part, standardised."""

EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""From which node to which, in the order of NAS-Bench-201: node 0 is the input of a cell, node 3 its output."""


class CellNet(nn.Module):
    """A convolution, `stages` times `cells` cells with a reduction in between, mean, outputs.

    All cells have the same architecture and weights of their own. A reduction is the mean of each 2 x 2 window and a
    convolution of size 1 to twice the channels. Where NAS-Bench-201 has batch normalisation with a scale, each example
    is standardised over all of a layer, so nothing but parameters is trained, and no operation can outgrow the others.

    Attributes:
      features: number of outputs.
      channels: channels of the first stage.
      cells: cells in a stage.
      stages: number of stages.
      edges: the operation of each of `EDGES`, i32[6] indices into `OPERATIONS`; or float[6, 5] weights, by which the
        outputs of all operations are summed (DARTS). A cell computes every operation, whatever the weights; what has
        weight 0 adds nothing and gets no gradient.

    `__call__(x)`: x is float[batch, height, width] or float[batch, height, width, inputs].

    Raises:
      ValueError: `edges` has another shape, or an operation that there is not; where it is traced, that is "none".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def outputs(edges, x):
      ...     module = CellNet(features=10, channels=4, stages=2, edges=edges)
      ...     return module.apply(module.init(jax.random.key(0), x), x)
      >>> jax.jit(jax.vmap(outputs, (0, None)))(jnp.eye(6, dtype=int) + 2, jnp.ones((5, 8, 8))).shape
      (6, 5, 10)
    """

    features: int
    channels: int = 16
    cells: int = 1
    stages: int = 3
    edges: ArrayLike = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weights = self._weights()
        x = x[..., None] if x.ndim == 3 else x
        if min(x.shape[1:3]) < 2 ** (self.stages - 1):
            raise ValueError(f"stages must fit the image, got stages={self.stages} for {x.shape[1:3]}; lower stages")
        weights = weights.astype(x.dtype)
        x = standardise(Layer(self.channels, x.shape[-1], self.channels, taps=3, kernel=3, name="stem")(x))
        for stage in range(self.stages):
            if stage:
                channels = self.channels * 2**stage
                x = halve(jax.nn.relu(x), lambda a, b: (a + b) / 2)
                x = standardise(Layer(channels, x.shape[-1], channels, name=f"reduce_{stage}")(x))
            for cell in range(self.cells):
                x = _Cell(name=f"cell_{stage}_{cell}")(x, weights)
        x = jax.nn.relu(standardise(x)).mean((1, 2))
        return Layer(self.features, x.shape[-1], self.features, name="out")(x)

    def _weights(self) -> jax.Array:
        """float[6, 5], one-hot where an edge is one operation."""
        edges, count = jnp.asarray(self.edges), len(OPERATIONS)
        if jnp.issubdtype(edges.dtype, jnp.integer):
            if not isinstance(self.edges, jax.core.Tracer):
                given = np.asarray(self.edges)
                if (given < 0).any() or (given >= count).any():
                    raise ValueError(f"edges must be indices of {OPERATIONS}, got {given}")
            edges = jax.nn.one_hot(jnp.broadcast_to(edges, len(EDGES)) if edges.ndim == 0 else edges, count)
        if edges.shape != (len(EDGES), count):
            raise ValueError(f"edges must be i32[6], or weights float[6, 5], got shape {np.shape(self.edges)}")
        return edges


class _Cell(nn.Module):
    """Every operation on every edge. What leaves the same node shares its patches, and is one matrix product."""

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernels = {
            taps: self.param(f"conv_{taps}x{taps}", _kernels, (len(EDGES), taps, taps, channels, channels))
            for taps in (1, 3)
        }
        nodes: list = [x, 0.0, 0.0, 0.0]
        for node in range(3):
            x = nodes[node]
            out = [i for i, (source, _) in enumerate(EDGES) if source == node]
            convolved = {}
            for taps, kernel in kernels.items():
                # [taps * taps * inputs, edges, outputs]
                joined = jnp.moveaxis(kernel[np.array(out)].reshape(len(out), -1, channels), 0, 1)
                convolved[taps] = patches(jax.nn.relu(x), taps) @ joined.reshape(joined.shape[0], -1)
            pooled = average(x)
            for k, i in enumerate(out):
                one, three = (standardise(convolved[taps][..., k * channels : (k + 1) * channels]) for taps in (1, 3))
                _, skip, *others = weights[i]
                total = skip * x
                for weight, value in zip(others, (one, three, pooled), strict=True):
                    total += weight * value
                nodes[EDGES[i][1]] += total
        return nodes[3]


def _kernels(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return drawn(key, shape, 1 / math.prod(shape[1:-1]))


def average(x: jax.Array) -> jax.Array:
    """Mean of the 3 x 3 pixels around each that are in the image."""

    def around(x: jax.Array, axis: int) -> jax.Array:
        pad = [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)]
        padded, size = jnp.pad(x, pad), x.shape[axis]
        before, at, after = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))
        return before + at + after

    counts = around(around(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 1), 2)
    return around(around(x, 1), 2) / counts
