"""What networks with traced sizes are made of: layers of which a part is in use, activation, dropout, normalisation.

What lies outside the part that is in use is zero where a network is born, and counts nowhere.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from jaxhpo.draws import hashed_bits

EPSILON = 1e-5
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
        return function_of(choice)(x)
    index = jnp.clip(jnp.asarray(choice, jnp.int32), 0, len(names) - 1)
    return jax.lax.select_n(index, *(function_of(name)(x).astype(x.dtype) for name in names))


def function_of(name: str | Callable) -> Callable[[jax.Array], jax.Array]:
    """An activation by its name in `jax.nn`, or itself."""
    if callable(name):
        return name
    function = getattr(jax.nn, name, None)
    if function is None:
        raise ValueError(f"activation {name!r} is not in jax.nn; pass the function itself")
    return function


def never(rate: ArrayLike) -> bool:
    """Whether it is known, before the program runs, that a rate or a flag is zero."""
    return isinstance(rate, int | float | np.generic | np.ndarray) and not np.any(rate)


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
    if never(rate):
        return x
    bits = hashed_bits(jax.random.bits(key, (2,), jnp.uint32), x.size).reshape(x.shape)
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
    kept = x / jnp.maximum(1 - rate, 2.0**-24)
    return jnp.where(uniform >= rate, kept, 0).astype(x.dtype)


def each(path: str, value: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """`value`, which may be one for all or have the first axes of `shape`, as an array of that shape."""
    array = jnp.asarray(value)
    if array.shape != shape[: array.ndim]:
        counts = " or ".join(str(shape[: i + 1]) for i in range(len(shape)))
        raise ValueError(f"{path} must be one value or have shape {counts}, one for each layer, got {array.shape}")
    return jnp.broadcast_to(array.reshape(array.shape + (1,) * (len(shape) - array.ndim)), shape)


def within(path: str, value: ArrayLike | None, limit: int, shape: tuple[int, ...] = ()) -> jax.Array:
    """`value`, by default its limit, as i32[*shape], checked where it is not traced."""
    value = limit if value is None else value
    if not isinstance(value, jax.core.Tracer):
        given = np.asarray(value)
        # Where a method wants slopes, integers arrive as floats.
        if given.dtype.kind not in "iuf" or (given % 1 != 0).any() or (given < 1).any() or (given > limit).any():
            raise ValueError(f"{path} must be integers from 1 to max_{path}={limit}, got {value!r}")
    return each(path, jnp.asarray(value, jnp.int32), shape)


def or_failed(outputs: jax.Array, *sizes: tuple[ArrayLike | None, int]) -> jax.Array:
    """`outputs`, or NaN where a traced size is not in [1, limit]: the trial fails instead of being another network."""
    for value, limit in sizes:
        if isinstance(value, jax.core.Tracer):
            outputs = jnp.where(jnp.all((value >= 1) & (value <= limit)), outputs, jnp.nan)
    return outputs


def drawn(key: jax.Array, shape: tuple[int, ...], variance: ArrayLike) -> jax.Array:
    """Normal values truncated at 2 standard deviations, as flax's `lecun_normal` has them: float[*shape]."""
    # Flat: a vmapped draw of four axes takes twenty times as long to compile.
    values = jax.random.truncated_normal(key, -2, 2, (math.prod(shape),)).reshape(shape)
    # 0.8796: the standard deviation of a standard normal truncated at 2.
    return values * (jnp.sqrt(variance) / 0.87962566103423978)


def standardise(x: jax.Array, channels: ArrayLike | None = None) -> jax.Array:
    """Each example with mean 0 and variance 1 over its pixels and the first `channels`; the other channels are zero.

    Flax's `GroupNorm` with one group of the channels in use. Examples do not mix, so a network needs no statistics
    beside its parameters, and it is the same in training and after it.

    Args:
      x: float[batch, ..., features].
      channels: i32[], default all of them.
    """
    axes = tuple(range(1, x.ndim))
    used = jnp.arange(x.shape[-1]) < (x.shape[-1] if channels is None else channels)
    count = math.prod(x.shape[1:-1]) * (x.shape[-1] if channels is None else jnp.asarray(channels, x.dtype))
    mean = jnp.where(used, x, 0).sum(axes, keepdims=True) / count
    centred = jnp.where(used, x - mean, 0)
    centred = jax.lax.optimization_barrier(centred)
    return centred * jax.lax.rsqrt((centred**2).sum(axes, keepdims=True) / count + EPSILON)


class Layer(nn.Module):
    """A dense layer, or with `taps` a convolution, of which the first `inputs` and `outputs` channels are in use."""

    features: int
    inputs: ArrayLike
    outputs: ArrayLike
    used: ArrayLike = True
    gain: ArrayLike = 1.0
    taps: int | None = None
    kernel: ArrayLike = 1
    norm: ArrayLike = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        taps = () if self.taps is None else (self.taps, self.taps)
        kernel = self.param("kernel", self._kernel, (*taps, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x = x @ kernel if self.taps is None else convolve(x, jnp.where(self._window(), kernel, 0))
        if not never(self.norm):
            x = jnp.where(self.norm, standardise(x, self.outputs), x)
        return x + bias

    def _window(self) -> jax.Array:
        """bool[taps, taps, 1, 1]: the taps of a smaller kernel in the middle of the largest."""
        assert self.taps is not None
        near = jnp.abs(jnp.arange(self.taps) - self.taps // 2) <= jnp.asarray(self.kernel) >> 1
        return (near[:, None] & near)[..., None, None]

    def _kernel(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """flax's `lecun_normal` times sqrt(gain), by the fan-in that is in use."""
        used = (jnp.arange(shape[-2]) < self.inputs)[:, None] & (jnp.arange(shape[-1]) < self.outputs) & self.used
        used, area = (used, 1) if self.taps is None else (used & self._window(), jnp.asarray(self.kernel) ** 2)
        return jnp.where(used, drawn(key, shape, self.gain / (area * jnp.asarray(self.inputs))), 0)


def patches(x: jax.Array, taps: int) -> jax.Array:
    """The pixels around each pixel, zeros beyond the edge: float[batch, height, width, taps * taps * inputs].

    A convolution is their matrix product with a kernel. A `vmap`ped `conv_general_dilated` becomes a grouped one, whose
    gradient is 20 to 60 times slower on CPU.

    Args:
      x: float[batch, height, width, inputs].
      taps: odd.
    """
    if taps == 1:
        return x
    (height, width), edge = x.shape[1:3], (taps // 2, taps // 2)
    # The barriers keep XLA from computing what comes before anew for every tap.
    padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), edge, edge, (0, 0))))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(taps) for j in range(taps)]
    return jax.lax.optimization_barrier(jnp.concatenate(shifted, axis=-1))


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution with stride 1 and zero padding, by a kernel float[taps, taps, inputs, outputs], taps odd."""
    return patches(x, kernel.shape[0]) @ kernel.reshape(-1, kernel.shape[-1])


def halve(x: jax.Array, combine: Callable = jnp.maximum) -> jax.Array:
    """Largest of each 2 x 2 window; its gradient is six times faster than that of `nn.max_pool` on CPU."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    # The gradient compares the same values again: without a barrier XLA computes them anew for every window.
    x = jax.lax.optimization_barrier(x)
    rows = combine(x[:, 0:height:2], x[:, 1:height:2])
    return combine(rows[:, :, 0:width:2], rows[:, :, 1:width:2])


def cut(layer: dict[str, jax.Array], inputs: int | None, outputs: int) -> dict[str, jax.Array]:
    """The parameters of a layer with the first channels alone; `inputs` is None where all are in use."""
    return {"kernel": layer["kernel"][..., :inputs, :outputs], "bias": layer["bias"][:outputs]}


def middle(kernel: jax.Array, size: int) -> jax.Array:
    """The taps of a smaller kernel of odd `size`."""
    edge = (kernel.shape[0] - size) // 2
    return kernel[edge : edge + size, edge : edge + size]
