"""Networks whose width, depth, activation and dropout are traced values.

Hundreds of different networks then train as one `vmap`ped program. Every parameter array has the largest shape and
what lies outside the network in question is zero, gets no gradient and so stays zero: outputs, gradients, initial
statistics and norms of the parameters are those of the small network alone. The cost of a step is that of the largest
network, whatever the width.

Also what such networks are made of, for modules of your own: `activation`, `dropout`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from jaxhpo.draws import hashed_bits

PyTree = Any

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")


def activation(
    choice: str | ArrayLike, x: jax.Array, names: Sequence[str | Callable[[jax.Array], jax.Array]] = ACTIVATIONS
) -> jax.Array:
    """The chosen activation function of `x`.

    Every function is computed and one is selected, so keep `names` short.

    Args:
      choice: i32[] index into `names`, as a `Categorical(names)` decodes to under a trace, or the name itself.
      x: float[...].
      names: functions of `jax.nn` by name, or functions themselves.

    Returns:
      float[...], shaped like `x`.

    Raises:
      ValueError: a name is not in `names` or not in `jax.nn`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jax.vmap(activation, (0, None))(jnp.arange(2), -jnp.ones(1)).round(2).tolist()
      [[0.0], [-0.1599999964237213]]
    """
    if isinstance(choice, str):
        if choice not in names:
            raise ValueError(f"activation must be one of {tuple(names)}, got {choice!r}; add it to the names")
        return _function(choice)(x)
    index = jnp.clip(jnp.asarray(choice, jnp.int32), 0, len(names) - 1)
    return jax.lax.select_n(index, *(_function(name)(x).astype(x.dtype) for name in names))


def _function(name: str | Callable) -> Callable[[jax.Array], jax.Array]:
    if callable(name):
        return name
    function = getattr(jax.nn, name, None)
    if function is None:
        raise ValueError(f"activation {name!r} is not in jax.nn; pass the function itself")
    return function


def _never(rate: ArrayLike) -> bool:
    """Whether it is known, before the program runs, that nothing is dropped."""
    return isinstance(rate, int | float) and rate == 0


def dropout(key: jax.Array, x: jax.Array, rate: ArrayLike) -> jax.Array:
    """Sets entries of `x` to zero with probability `rate`, which may be traced, and scales the others by 1/(1 - rate).

    `flax.linen.Dropout` and `nnx.Dropout` refuse a traced rate. The mask costs a hash of a counter per entry instead
    of threefry, because under a trace it is paid for at rate 0 too.

    Args:
      key: PRNG key, a new one for every call.
      x: float[...].
      rate: float[] in [0, 1]; at 0 `x` is returned exactly.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> bool((dropout(jax.random.key(0), jnp.ones(1000), 0.25) == 0).mean().round(1) == 0.2)
      True
    """
    if _never(rate):
        return x
    bits = hashed_bits(jax.random.bits(key, (2,), jnp.uint32), x.size).reshape(x.shape)
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
    kept = x / jnp.maximum(1 - rate, 2.0**-24)
    return jnp.where(uniform >= rate, kept, 0).astype(x.dtype)


def _within(path: str, value: ArrayLike | None, limit: int, count: int | None = None) -> jax.Array:
    """`value`, by default its limit, as i32[] or i32[count], checked where it is not traced."""
    value = limit if value is None else value
    if not isinstance(value, jax.core.Tracer):
        given = np.asarray(value)
        if given.dtype.kind not in "iu" or (given < 1).any() or (given > limit).any():
            raise ValueError(f"{path} must be integers from 1 to max_{path}={limit}, got {value!r}")
    array = jnp.asarray(value, jnp.int32)
    if count is not None and array.ndim and array.shape != (count,):
        raise ValueError(f"{path} must be one integer or one for each of {count}, got shape {array.shape}")
    return array if count is None else jnp.broadcast_to(array, (count,))


def _or_failed(outputs: jax.Array, *sizes: tuple[ArrayLike | None, int]) -> jax.Array:
    """`outputs`, or NaN where a traced size is not in [1, limit]: the trial fails instead of being another network."""
    for value, limit in sizes:
        if isinstance(value, jax.core.Tracer):
            outputs = jnp.where(jnp.all((value >= 1) & (value <= limit)), outputs, jnp.nan)
    return outputs


class _Layer(nn.Module):
    """A dense layer, or with `taps` a convolution, of which the first `inputs` and `outputs` channels are in use."""

    features: int
    inputs: ArrayLike
    outputs: ArrayLike
    used: ArrayLike = True
    gain: ArrayLike = 1.0
    taps: int | None = None
    kernel: ArrayLike = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        taps = () if self.taps is None else (self.taps, self.taps)
        kernel = self.param("kernel", self._kernel, (*taps, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if self.taps is None:
            return x @ kernel + bias
        return _convolve(x, jnp.where(self._window(), kernel, 0)) + bias

    def _window(self) -> jax.Array:
        """bool[taps, taps, 1, 1]: the taps of a smaller kernel in the middle of the largest."""
        assert self.taps is not None
        near = jnp.abs(jnp.arange(self.taps) - self.taps // 2) <= jnp.asarray(self.kernel) // 2
        return (near[:, None] & near)[..., None, None]

    def _kernel(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """flax's `lecun_normal` times sqrt(gain), by the fan-in that is in use."""
        used = (jnp.arange(shape[-2]) < self.inputs)[:, None] & (jnp.arange(shape[-1]) < self.outputs) & self.used
        used, area = (used, 1) if self.taps is None else (used & self._window(), jnp.asarray(self.kernel) ** 2)
        # 0.8796: the standard deviation of a standard normal truncated at 2.
        scale = jnp.sqrt(self.gain / (area * jnp.asarray(self.inputs))) / 0.87962566103423978
        # Drawn flat: a vmapped draw of four axes takes twenty times as long to compile.
        values = jax.random.truncated_normal(key, -2, 2, (math.prod(shape),)).reshape(shape)
        return jnp.where(used, values * scale, 0)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution with stride 1 and zero padding, as one matrix product over the patches of the image.

    A `vmap`ped `conv_general_dilated` becomes a grouped one, whose gradient is 20 to 60 times slower on CPU.

    Args:
      x: float[batch, height, width, inputs].
      kernel: float[taps, taps, inputs, outputs], taps odd.
    """
    taps, (height, width) = kernel.shape[0], x.shape[1:3]
    edge = (taps // 2, taps // 2)
    # The barriers keep XLA from computing what comes before anew for every tap.
    padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), edge, edge, (0, 0))))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(taps) for j in range(taps)]
    patches = jax.lax.optimization_barrier(jnp.concatenate(shifted, axis=-1))
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def _halve(x: jax.Array) -> jax.Array:
    """Largest of each 2 x 2 window; its gradient is six times faster than that of `nn.max_pool` on CPU."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = jnp.maximum(x[:, 0:height:2], x[:, 1:height:2])
    return jnp.maximum(rows[:, :, 0:width:2], rows[:, :, 1:width:2])


class MLP(nn.Module):
    """Dense layers: `depth` hidden ones of `width` units, then the outputs.

    Attributes:
      features: number of outputs.
      max_width: largest width, which every hidden layer is padded to; inputs and outputs are not padded.
      max_depth: largest number of hidden layers.
      width: units of the hidden layers in [1, max_width]; i32[], or i32[max_depth] for one per layer. Default the
        largest.
      depth: i32[], number of hidden layers in [1, max_depth]; the others pass their input on. Default the largest.
      activation: i32[] index into `activations`, or a name.
      activations: what can be chosen, see `jaxhpo.modules.activation`.
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
    dropout: ArrayLike = 0.0
    gain: ArrayLike = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        widths = _within("width", self.width, self.max_width, self.max_depth)
        depth = _within("depth", self.depth, self.max_depth)
        x = x.reshape(x.shape[0], -1)
        inputs: ArrayLike = x.shape[-1]
        for i in range(self.max_depth):
            layer = _Layer(self.max_width, inputs, widths[i], i < depth, self.gain, name=f"hidden_{i}")
            y = activation(self.activation, layer(x), self.activations)
            y = jnp.where(jnp.arange(self.max_width) < widths[i], y, 0)
            if train and not _never(self.dropout):
                y = dropout(self.make_rng("dropout"), y, self.dropout)
            x = y if i == 0 else jnp.where(i < depth, y, x)
            inputs = widths[i]
        last = widths[jnp.clip(depth, 1, self.max_depth) - 1]
        outputs = _Layer(self.features, last, self.features, True, self.gain, name="out")(x)
        return _or_failed(outputs, (self.width, self.max_width), (self.depth, self.max_depth))

    @nn.nowrap
    def shrink(self, params: PyTree) -> tuple["MLP", PyTree]:
        """The small network itself.

        Args:
          params: parameters of this module, for one trial; `width` and `depth` are numbers.

        Returns:
          An `MLP` as large as its widest layer, with the same outputs, and its parameters.
        """
        depth = int(_within("depth", self.depth, self.max_depth))
        widths = np.asarray(_within("width", self.width, self.max_width, self.max_depth))[:depth]
        most = int(widths.max())
        small = {"out": _cut(params["out"], most, self.features)}
        for i in range(depth):
            small[f"hidden_{i}"] = _cut(params[f"hidden_{i}"], None if i == 0 else most, most)
        width = None if (widths == most).all() else tuple(widths.tolist())
        return self.clone(max_width=most, max_depth=depth, width=width, depth=None), small


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
      kernel: i32[], kernel size, odd, in [1, max_kernel]; an even one counts as the next odd one. All sizes cost what
        the largest does.
      activation, activations, gain: as in `MLP`.
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
    dropout: ArrayLike = 0.0
    gain: ArrayLike = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        channels = _within("channels", self.channels, self.max_channels, self.stages)
        depth = _within("depth", self.depth, self.max_depth, self.stages)
        kernel = _within("kernel", self.kernel, self.max_kernel) // 2 * 2 + 1
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
                sizes = (self.max_channels, inputs, channels[stage], used, self.gain, self.max_kernel, kernel)
                y = activation(self.activation, _Layer(*sizes, name=f"conv_{stage}_{i}")(x), self.activations)
                y = jnp.where(mask, y, 0)
                x = y if i == 0 else jnp.where(used, y, x)
                inputs = channels[stage]
            x = _halve(x)
        x = x.mean((1, 2))
        if train and not _never(self.dropout):
            x = dropout(self.make_rng("dropout"), x, self.dropout)
        outputs = _Layer(self.features, inputs, self.features, True, self.gain, name="out")(x)
        limits = (self.channels, self.max_channels), (self.depth, self.max_depth), (self.kernel, self.max_kernel)
        return _or_failed(outputs, *limits)

    @nn.nowrap
    def shrink(self, params: PyTree) -> tuple["CNN", PyTree]:
        """The small network itself, as `MLP.shrink`."""
        channels = np.asarray(_within("channels", self.channels, self.max_channels, self.stages))
        depths = np.asarray(_within("depth", self.depth, self.max_depth, self.stages))
        kernel = int(_within("kernel", self.kernel, self.max_kernel)) // 2 * 2 + 1
        most, depth = int(channels.max()), int(depths.max())
        edge = (self.max_kernel - kernel) // 2
        small = {"out": _cut(params["out"], most, self.features)}
        for stage in range(self.stages):
            for i in range(depth):
                name = f"conv_{stage}_{i}"
                small[name] = _cut(params[name], None if stage == i == 0 else most, most)
                small[name]["kernel"] = small[name]["kernel"][edge : edge + kernel, edge : edge + kernel]
        sizes: dict[str, Any] = {
            "channels": None if (channels == most).all() else tuple(channels.tolist()),
            "depth": None if (depths == depth).all() else tuple(depths.tolist()),
        }
        return self.clone(max_channels=most, max_depth=depth, max_kernel=kernel, kernel=None, **sizes), small


def _cut(layer: dict[str, jax.Array], inputs: int | None, outputs: int) -> dict[str, jax.Array]:
    return {"kernel": layer["kernel"][..., :inputs, :outputs], "bias": layer["bias"][:outputs]}
