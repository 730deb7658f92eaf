"""Policies over a search space: distributions of points whose log-probabilities have slopes.

Options and few levels are drawn from a softmax, reals and many levels from a normal distribution cut off at the bounds
of the unit cube. What is not live contributes nothing. Zoph and Le (2017), Neural architecture search with
reinforcement learning: a recurrent network whose every output is fed back in. The cell is that of Cho, van
Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk and Bengio (2014), Learning phrase representations using RNN
encoder-decoder.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr, ndtri

from jaxhpo.draws import bits, uniform
from jaxhpo.method import PyTree
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import levels

MOST_LEVELS = 64
NARROWEST, WIDEST, FIRST_WIDTH = 0.005, 1.0, 0.5


class Heads(NamedTuple):
    """What each dim is drawn from, arrays [dims]; a row of outputs has `width` numbers."""

    discrete: np.ndarray
    """bool: whether from a softmax"""
    options: np.ndarray
    """i32: how many options that has, `width` where it is none"""
    width: int


class Policy(NamedTuple):
    """A distribution of points."""

    init: Callable
    """(key) -> params"""
    sample: Callable
    """(params, key, n) -> float[n, dims] in [0, 1]"""
    outputs: Callable
    """(params, unit) -> float[n, dims, width]: what each dim is drawn from, given those before it"""
    depends: bool
    """whether it depends on those before it"""


def heads(space: Space) -> Heads:
    """What the dims of a space are drawn from."""
    discrete = space.categorical | ((space.levels > 0) & (space.levels <= MOST_LEVELS))
    width = max(2, int(space.levels[discrete].max(initial=2)))
    options = np.where(discrete, space.levels, width)
    return Heads(discrete, options.astype(np.int32), width)


def log_softmax(outputs: jax.Array, options: jax.typing.ArrayLike) -> jax.Array:
    """Log-probabilities of the options, -inf beyond them: float[..., width] for i32[...] options."""
    is_option = jnp.arange(outputs.shape[-1]) < jnp.asarray(options)[..., None]
    return jax.nn.log_softmax(jnp.where(is_option, outputs, -jnp.inf))


class Normal(NamedTuple):
    """A normal distribution cut off at 0 and 1, whose mean before that is between them; arrays [...]."""

    mean: jax.Array
    deviation: jax.Array

    @classmethod
    def of(cls, outputs: jax.Array) -> "Normal":
        """From float[..., width]; zeros are a wide one in the middle."""
        span = np.log(WIDEST / NARROWEST)
        share = np.log(FIRST_WIDTH / NARROWEST) / span
        width = jax.nn.sigmoid(outputs[..., 1] + np.log(share / (1 - share)))
        return cls(jax.nn.sigmoid(outputs[..., 0]), NARROWEST * jnp.exp(span * width))

    @property
    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """0 and 1, as deviations from the mean."""
        return -self.mean / self.deviation, (1 - self.mean) / self.deviation

    def sample(self, drawn: jax.Array) -> jax.Array:
        """By uniform numbers."""
        low, high = map(ndtr, self.bounds)
        return jnp.clip(self.mean + self.deviation * ndtri(low + drawn * (high - low)), 0, 1)

    def log_density(self, unit: jax.Array) -> jax.Array:
        low, high = self.bounds
        z = (unit - self.mean) / self.deviation
        return -(z**2 + np.log(2 * np.pi)) / 2 - jnp.log(self.deviation) - jnp.log(ndtr(high) - ndtr(low))

    def entropy(self) -> jax.Array:
        low, high = self.bounds
        inside = ndtr(high) - ndtr(low)
        density = lambda z: jnp.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)  # noqa: E731
        cut = (low * density(low) - high * density(high)) / (2 * inside)
        return (np.log(2 * np.pi) + 1) / 2 + jnp.log(self.deviation * inside) + cut


def log_probs(space: Space, outputs: jax.Array, unit: jax.Array) -> jax.Array:
    """The log-probability of every coordinate, 0 where it is not live.

    Args:
      space: whose dims they are.
      outputs: float[..., dims, width].
      unit: float[..., dims] in [0, 1].

    Returns:
      float[..., dims]; of reals, and of integers with many levels, the logarithm of a density.
    """
    head = heads(space)
    level = jnp.minimum(levels(space, unit), head.options - 1)
    chosen = jnp.take_along_axis(log_softmax(outputs, head.options), level[..., None], axis=-1)[..., 0]
    each = jnp.where(head.discrete, chosen, Normal.of(outputs).log_density(unit))
    return jnp.where(space.active(unit), each, 0)


def entropies(space: Space, outputs: jax.Array, unit: jax.Array) -> jax.Array:
    """The entropy of what every live coordinate was drawn from: float[..., dims]; arguments as of `log_probs`."""
    head = heads(space)
    log_p = log_softmax(outputs, head.options)
    surprise = jnp.where(jnp.isfinite(log_p), log_p, 0)
    each = jnp.where(head.discrete, -(jnp.exp(log_p) * surprise).sum(-1), Normal.of(outputs).entropy())
    return jnp.where(space.active(unit), each, 0)


def uniform_log_prob(space: Space, unit: jax.Array) -> jax.Array:
    """Log-probability of points where all are drawn uniformly: float[...] for float[..., dims]."""
    head = heads(space)
    each = jnp.where(head.discrete, -jnp.log(head.options.astype(working_dtype())), 0)
    return jnp.where(space.active(unit), each, 0).sum(-1)


def middles(space: Space) -> jax.Array:
    """The coordinate of every option, 0.5 in other dims: float[dims, width]."""
    head = heads(space)
    has_levels = np.flatnonzero(space.levels)
    level = jnp.minimum(jnp.arange(head.width, dtype=jnp.int32)[:, None], head.options[has_levels] - 1)
    table = jnp.full((space.dims, head.width), 0.5, working_dtype())
    return table.at[has_levels].set(space.middle(level).T)


def draw(
    outputs: jax.Array,
    drawn: jax.Array,
    discrete: jax.typing.ArrayLike,
    options: jax.typing.ArrayLike,
    middle: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Coordinates, float[...], and their options, i32[...], by uniform numbers.

    Args:
      outputs: float[..., width].
      drawn: float[...] in (0, 1).
      discrete: bool, broadcast to [...].
      options: i32, broadcast to [...].
      middle: float[..., width], the coordinate of every option.
    """
    below = jnp.cumsum(jnp.exp(log_softmax(outputs, options)), axis=-1) < drawn[..., None]
    level = jnp.minimum(below.sum(-1, dtype=jnp.int32), jnp.asarray(options) - 1)
    at_option = jnp.take_along_axis(jnp.broadcast_to(middle, outputs.shape), level[..., None], axis=-1)[..., 0]
    return jnp.where(discrete, at_option, Normal.of(outputs).sample(drawn)), level


def factorised(space: Space) -> Policy:
    """Every dim has a distribution of its own, uniform at first but for reals, which begin near the middle."""
    head = heads(space)

    def init(key: jax.Array) -> PyTree:
        del key
        return jnp.zeros((space.dims, head.width), working_dtype())

    def outputs(params: PyTree, unit: jax.Array) -> jax.Array:
        return jnp.broadcast_to(params, (*unit.shape, head.width))

    def sample(params: PyTree, key: jax.Array, n: int) -> jax.Array:
        drawn = uniform(bits(key, (n, space.dims)))
        given = jnp.broadcast_to(params, (*drawn.shape, head.width))
        return draw(given, drawn, head.discrete, head.options, middles(space))[0]

    return Policy(init, sample, outputs, depends=False)


def autoregressive(space: Space, hidden: int) -> Policy:
    """A recurrent network draws dim after dim, each given the live ones before it.

    Args:
      space: whose points they are.
      hidden: numbers in the state of the network.
    """
    head, dims = heads(space), space.dims

    def init(key: jax.Array) -> PyTree:
        key_inputs, key_cell = jax.random.split(key)
        dtype, spread = working_dtype(), 1 / np.sqrt(hidden)
        return {
            "inputs": jax.random.normal(key_inputs, (dims, head.width, hidden), dtype),
            "cell": jax.random.uniform(key_cell, (2 * hidden, 3 * hidden), dtype, -spread, spread),
            "offset": jnp.zeros(3 * hidden, dtype),
            "heads": jnp.zeros((dims, hidden, head.width), dtype),
            "bias": jnp.zeros((dims, head.width), dtype),
        }

    def remember(params: PyTree, state: jax.Array, given: jax.Array) -> jax.Array:
        """The state, float[n, hidden], after an input of the same shape."""
        of_given, of_state = params["cell"][:hidden], params["cell"][hidden:]
        a = jnp.split(given @ of_given + params["offset"], 3, axis=-1)
        b = jnp.split(state @ of_state, 3, axis=-1)
        keep, reset = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
        return keep * state + (1 - keep) * jnp.tanh(a[2] + reset * b[2])

    def read(discrete: jax.Array, inputs: jax.Array, unit: jax.Array, level: jax.Array, live: jax.Array) -> jax.Array:
        """What the network is told of a coordinate: float[n, hidden]; nothing where it is not live."""
        real = jnp.zeros((*unit.shape, head.width), unit.dtype).at[..., 0].set(unit).at[..., 1].set(1 - unit)
        code = jnp.where(discrete, jax.nn.one_hot(level, head.width, dtype=unit.dtype), real)
        return jnp.where(live[:, None], code @ inputs, 0)

    def outputs(params: PyTree, unit: jax.Array) -> jax.Array:
        flat = unit.reshape(-1, dims)
        level = jnp.minimum(levels(space, flat), head.options - 1)

        def step(state: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
            weights, bias, discrete, inputs, *values = at
            return remember(params, state, read(discrete, inputs, *values)), state @ weights + bias

        first = jnp.zeros((flat.shape[0], hidden), flat.dtype)
        constants = params["heads"], params["bias"], head.discrete, params["inputs"]
        _, rows = lax.scan(step, first, (*constants, flat.T, level.T, space.active(flat).T))
        return jnp.moveaxis(rows, 0, 1).reshape(*unit.shape, head.width)

    def sample(params: PyTree, key: jax.Array, n: int) -> jax.Array:
        drawn = uniform(bits(key, (dims, n)))

        def step(carry: tuple, at: tuple) -> tuple[tuple, None]:
            state, unit = carry
            i, weights, bias, discrete, options, middle, inputs, drawn = at
            x, level = draw(state @ weights + bias, drawn, discrete, options, middle)
            unit = unit.at[:, i].set(x)
            # Who decides whether a dim is live comes before it.
            live = space.active(unit)[:, i]
            return (remember(params, state, read(discrete, inputs, x, level, live)), unit), None

        dtype = working_dtype()
        first = jnp.zeros((n, hidden), dtype), jnp.full((n, dims), 0.5, dtype)
        at = (
            jnp.arange(dims),
            params["heads"],
            params["bias"],
            head.discrete,
            head.options,
            middles(space),
            params["inputs"],
            drawn,
        )
        (_, unit), _ = lax.scan(step, first, at)
        return unit

    return Policy(init, sample, outputs, depends=True)
