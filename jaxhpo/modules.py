"""Networks whose widths, depths, kernels, skip connections, activation and dropout are traced values.

Hundreds of different networks then train as one `vmap`ped program. Every parameter array has the largest shape and
what lies outside the network in question is zero, gets no gradient and so stays zero: outputs, gradients, initial
statistics and norms of the parameters are those of the small network alone. The cost of a step is that of the largest
network, whatever the width.

Also what such networks are made of, for modules of your own: `activation`, `dropout`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from jaxhpo.layers import ACTIVATIONS, Layer, activation, cut, dropout, each, halve, middle, never, or_failed, within

PyTree = Any


class MLP(nn.Module):
    """Dense layers: `depth` hidden ones of `width` units, then the outputs.

    Attributes:
      features: number of outputs.
      max_width: largest width, which every hidden layer is padded to; inputs and outputs are not padded.
      max_depth: largest number of hidden layers.
      width: units of the hidden layers in [1, max_width]; i32[], or i32[max_depth] for one per layer. Default the
        largest.
      depth: i32[], number of hidden layers in [1, max_depth]; the others pass their input on. Default the largest.
      activation: a name, or an index into `activations`; i32[], or i32[max_depth] for one per layer.
      activations: what can be chosen, see `jaxhpo.modules.activation`.
      skip: whether the input of a hidden layer is added to its output, cut or filled up with zeros to its width;
        bool[], or bool[max_depth] for one per layer. The first one, whose input is the network's, has none.
      norm: bool[], whether each example is standardised over the units of a layer before the bias; with a width of 1
        nothing would be left.
      dropout: float[], rate of dropout after each hidden layer; costs nothing where it is the number 0.
      gain: float[], variance of a kernel times its fan-in: 1 is LeCun's initialisation (flax's default), 2 is He's.

    A size out of its range is an error, or where it is traced, NaN outputs.

    `__call__(x, train=False)`: x is float[batch, ...] and is flattened; returns float[batch, features]; dropout needs
    the stream "dropout". Optimizers that average over an array of parameters (Adafactor) see the zeros outside, and
    units that a method adds in the middle of training (PBT, on the width) stay zero: search widths with fresh trials.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def outputs(width, depth, x):
      ...     module = MLP(features=3, max_width=64, max_depth=4, width=width, depth=depth)
      ...     return module.apply(module.init(jax.random.key(0), x), x)
      >>> jax.jit(jax.vmap(outputs, (0, 0, None)))(jnp.array([8, 64]), jnp.array([4, 2]), jnp.ones((5, 7))).shape
      (2, 5, 3)
    """

    features: int
    max_width: int
    max_depth: int = 1
    width: ArrayLike | None = None
    depth: ArrayLike | None = None
    activation: str | ArrayLike = "relu"
    activations: tuple[str | Callable, ...] = ACTIVATIONS
    skip: ArrayLike = False
    norm: ArrayLike = False
    dropout: ArrayLike = 0.0
    gain: ArrayLike = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layers = (self.max_depth,)
        widths = within("width", self.width, self.max_width, layers)
        depth = within("depth", self.depth, self.max_depth)
        skip = each("skip", self.skip, layers)
        x = x.reshape(x.shape[0], -1)
        inputs: ArrayLike = x.shape[-1]
        for i in range(self.max_depth):
            sizes = (self.max_width, inputs, widths[i], i < depth, self.gain)
            y = Layer(*sizes, norm=self.norm, name=f"hidden_{i}")(x)
            y = activation(_of_layer(self.activation, layers, i), y, self.activations)
            if i and not never(self.skip):
                y += jnp.where(skip[i], x, 0)
            y = jnp.where(jnp.arange(self.max_width) < widths[i], y, 0)
            if train and not never(self.dropout):
                y = dropout(self.make_rng("dropout"), y, self.dropout)
            x = y if i == 0 else jnp.where(i < depth, y, x)
            inputs = widths[i]
        last = widths[jnp.clip(depth, 1, self.max_depth) - 1]
        outputs = Layer(self.features, last, self.features, True, self.gain, name="out")(x)
        return or_failed(outputs, (self.width, self.max_width), (self.depth, self.max_depth))

    @nn.nowrap
    def shrink(self, params: PyTree) -> tuple["MLP", PyTree]:
        """The small network itself.

        Args:
          params: parameters of this module, for one trial; `width` and `depth` are numbers.

        Returns:
          An `MLP` as large as its widest layer, with the same outputs, and its parameters.
        """
        depth = int(within("depth", self.depth, self.max_depth))
        widths = np.asarray(within("width", self.width, self.max_width, (self.max_depth,)))[:depth]
        most = int(widths.max())
        small = {"out": cut(params["out"], most, self.features)}
        for i in range(depth):
            small[f"hidden_{i}"] = cut(params[f"hidden_{i}"], None if i == 0 else most, most)
        width = None if (widths == most).all() else tuple(widths.tolist())
        chosen = {"skip": _first(self.skip, (depth,)), "activation": _first(self.activation, (depth,))}
        return self.clone(max_width=most, max_depth=depth, width=width, depth=None, **chosen), small


class CNN(nn.Module):
    """Convolutions for small images: `stages` times `depth` convolutions and a 2 x 2 max-pooling, mean, outputs.

    Attributes:
      features: number of outputs.
      max_channels: largest number of channels, which every convolution is padded to.
      max_depth: largest number of convolutions in a stage.
      max_kernel: largest kernel size, odd.
      stages: number of stages; each halves the image.
      channels: channels in [1, max_channels]; i32[], or i32[stages] for one per stage. Default the largest.
      depth: convolutions of a stage in [1, max_depth]; i32[] or i32[stages]; the others pass their input on.
      kernel: kernel size, odd, in [1, max_kernel]; i32[], i32[stages] or i32[stages, max_depth]. An even one counts as
        the next odd one. A smaller kernel is the middle of the largest, and costs as much.
      activation: a name, or an index into `activations`; i32[], i32[stages] or i32[stages, max_depth].
      skip: whether the input of a convolution is added to its output, cut or filled up with zeros to its channels;
        bool[], bool[stages] or bool[stages, max_depth]. The first convolution of all has none.
      norm: bool[], whether each example is standardised over the pixels and channels of a layer before the bias.
      activations, gain: as in `MLP`.
      dropout: float[], rate of dropout before the outputs.

    A size out of its range is an error, or where it is traced, NaN outputs.

    `__call__(x, train=False)`: x is float[batch, height, width] or float[batch, height, width, inputs].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def outputs(channels, x):
      ...     module = CNN(features=10, max_channels=16, channels=channels)
      ...     return module.apply(module.init(jax.random.key(0), x), x)
      >>> jax.jit(jax.vmap(outputs, (0, None)))(jnp.array([4, 16]), jnp.ones((5, 8, 8))).shape
      (2, 5, 10)
    """

    features: int
    max_channels: int
    max_depth: int = 1
    max_kernel: int = 3
    stages: int = 2
    channels: ArrayLike | None = None
    depth: ArrayLike | None = None
    kernel: ArrayLike | None = None
    activation: str | ArrayLike = "relu"
    activations: tuple[str | Callable, ...] = ACTIVATIONS
    skip: ArrayLike = False
    norm: ArrayLike = False
    dropout: ArrayLike = 0.0
    gain: ArrayLike = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layers = (self.stages, self.max_depth)
        channels = within("channels", self.channels, self.max_channels, layers[:1])
        depth = within("depth", self.depth, self.max_depth, layers[:1])
        kernel = within("kernel", self.kernel, self.max_kernel, layers) | 1
        skip = each("skip", self.skip, layers)
        if self.max_kernel % 2 == 0:
            raise ValueError(f"max_kernel must be odd, got {self.max_kernel}; use {self.max_kernel + 1}")
        x = x[..., None] if x.ndim == 3 else x
        if min(x.shape[1:3]) < 2**self.stages:
            raise ValueError(f"stages must fit the image, got stages={self.stages} for {x.shape[1:3]}; lower stages")
        inputs: ArrayLike = x.shape[-1]
        for stage in range(self.stages):
            mask = jnp.arange(self.max_channels) < channels[stage]
            for i in range(self.max_depth):
                used = i < depth[stage]
                sizes = (self.max_channels, inputs, channels[stage], used, self.gain, self.max_kernel, kernel[stage, i])
                y = Layer(*sizes, norm=self.norm, name=f"conv_{stage}_{i}")(x)
                y = activation(_of_layer(self.activation, layers, (stage, i)), y, self.activations)
                if (stage or i) and not never(self.skip):
                    y += jnp.where(skip[stage, i], x, 0)
                y = jnp.where(mask, y, 0)
                x = y if i == 0 else jnp.where(used, y, x)
                inputs = channels[stage]
            x = halve(x)
        x = x.mean((1, 2))
        if train and not never(self.dropout):
            x = dropout(self.make_rng("dropout"), x, self.dropout)
        outputs = Layer(self.features, inputs, self.features, True, self.gain, name="out")(x)
        limits = (self.channels, self.max_channels), (self.depth, self.max_depth), (self.kernel, self.max_kernel)
        return or_failed(outputs, *limits)

    @nn.nowrap
    def shrink(self, params: PyTree) -> tuple["CNN", PyTree]:
        """The small network itself, as `MLP.shrink`."""
        layers = (self.stages, self.max_depth)
        channels = np.asarray(within("channels", self.channels, self.max_channels, layers[:1]))
        depths = np.asarray(within("depth", self.depth, self.max_depth, layers[:1]))
        most, depth = int(channels.max()), int(depths.max())
        kernels = np.asarray(within("kernel", self.kernel, self.max_kernel, layers) | 1)[:, :depth]
        size = int(kernels.max())
        small = {"out": cut(params["out"], most, self.features)}
        for stage in range(self.stages):
            for i in range(depth):
                name = f"conv_{stage}_{i}"
                small[name] = cut(params[name], None if stage == i == 0 else most, most)
                small[name]["kernel"] = middle(small[name]["kernel"], size)
        sizes: dict[str, Any] = {
            "channels": None if (channels == most).all() else tuple(channels.tolist()),
            "depth": None if (depths == depth).all() else tuple(depths.tolist()),
            "kernel": None if (kernels == size).all() else kernels,
            "skip": _first(self.skip, (self.stages, depth)),
            "activation": _first(self.activation, (self.stages, depth)),
        }
        return self.clone(max_channels=most, max_depth=depth, max_kernel=size, **sizes), small


def _of_layer(choice: str | ArrayLike, layers: tuple[int, ...], layer: int | tuple[int, int]) -> str | ArrayLike:
    """The activation of one layer."""
    return choice if isinstance(choice, str) else each("activation", choice, layers)[layer]


def _first(choice: Any, layers: tuple[int, ...]) -> Any:
    """What is chosen for the first layers, where it is chosen for each."""
    if np.ndim(choice) < len(layers):
        return choice
    return np.asarray(choice)[tuple(slice(n) for n in layers)]
