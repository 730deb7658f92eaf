"""The agent of a controller: what it sees of a training run, the network that acts on it, and how that learns.

Schulman, Wolski, Dhariwal, Radford and Klimov (2017), Proximal policy optimization algorithms, equations 7 and 9.
Schulman, Moritz, Levine, Jordan and Abbeel (2016), High-dimensional continuous control using generalized advantage
estimation, equation 16.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from jaxhpo.automl.policies import Normal, draw, entropies, heads, log_probs, log_softmax, middles
from jaxhpo.automl.ppo import clipped_gain
from jaxhpo.method import PyTree
from jaxhpo.space import Space, working_dtype

LOWEST = 1e-12
CURVE = 5


class Curve(NamedTuple):
    """What has been seen of training runs, arrays [n]; losses are logarithms above a level, 0 before the first one."""

    last: jax.Array
    """the last loss"""
    fall: jax.Array
    """by how much it is below the one before"""
    best: jax.Array
    """the lowest loss"""
    interval: jax.Array
    """i32: stretches behind each"""
    unit: jax.Array
    """float[n, dims]: hyperparameters of the last stretch, 0.5 before the first one"""


class Network(nn.Module):
    """A policy and a value, each of two hidden layers: (features) -> (float[..., dims, width], float[...])."""

    dims: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = lambda size, **how: nn.Dense(size, param_dtype=working_dtype(), **how)  # noqa: E731
        acts = nn.tanh(layer(self.hidden)(nn.tanh(layer(self.hidden)(features))))
        # All actions are as good at first.
        outputs = layer(self.dims * self.width, kernel_init=nn.initializers.zeros)(acts)
        values = nn.tanh(layer(self.hidden)(nn.tanh(layer(self.hidden)(features))))
        value = layer(1, kernel_init=nn.initializers.zeros)(values)
        return outputs.reshape(*outputs.shape[:-1], self.dims, self.width), value[..., 0]


def network(space: Space, hidden: int) -> Network:
    """The network for a space."""
    return Network(space.dims, heads(space).width, hidden)


def outputs_and_value(net: Network, params: PyTree, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each dim is drawn from, float[..., dims, width], and the value, float[...]."""
    both: Any = net.apply(params, features)
    return both


def hidden_of(params: PyTree) -> int:
    """The size of the hidden layers of a network with these parameters.

    Raises:
      TypeError: they are not those of a network.
    """
    try:
        return params["params"]["Dense_0"]["kernel"].shape[-1]
    except (TypeError, KeyError, AttributeError, IndexError):
        what = type(params).__name__
        raise TypeError(f"params must be the policy of a controller's state, got a {what}; give state.policy") from None


def begun(space: Space, n: int) -> Curve:
    """Training runs before their first stretch."""
    zero = jnp.zeros(n, working_dtype())
    return Curve(zero, zero, zero, jnp.zeros(n, jnp.int32), jnp.full((n, space.dims), 0.5, zero.dtype))


def level_of(losses: jax.Array, on: jax.Array) -> jax.Array:
    """The logarithm of the median of losses, float[n], that are `on`: float[], NaN where none is."""
    return jnp.log(jnp.maximum(jnp.nanmedian(jnp.where(on, losses, jnp.nan)), LOWEST))


def seen(curve: Curve, loss: jax.Array, unit: jax.Array, level: jax.Array) -> Curve:
    """After a stretch: `loss`, float[n], which counts as unchanged where it is not finite.

    Its logarithm counts from `level`, float[], and is at least that of `LOWEST`.
    """
    above = jnp.log(jnp.maximum(loss, jnp.finfo(curve.last.dtype).tiny)) - level
    now = jnp.where(jnp.isfinite(loss), jnp.maximum(above, np.log(LOWEST)), curve.last).astype(curve.last.dtype)
    is_first = curve.interval == 0
    best = jnp.where(is_first, now, jnp.minimum(curve.best, now))
    return Curve(now, curve.last - now, best, curve.interval + 1, unit.astype(curve.unit.dtype))


def features(space: Space, curve: Curve, intervals: int) -> jax.Array:
    """What the network is told: float[n, CURVE + dims]."""
    share = curve.interval.astype(curve.last.dtype) / intervals
    columns = curve.last / 3, jnp.clip(curve.fall, -3, 3), curve.last - curve.best, 2 * share - 1, curve.interval == 0
    unit = jnp.where(space.active(curve.unit), curve.unit - 0.5, 0)
    return jnp.concatenate([jnp.stack(columns, -1).astype(unit.dtype), 2 * unit], axis=-1)


def act(space: Space, outputs: jax.Array, drawn: jax.Array | None = None) -> jax.Array:
    """Points of the unit cube, float[n, dims]: by uniform numbers, or the most probable ones without them."""
    head = heads(space)
    if drawn is not None:
        return draw(outputs, drawn, head.discrete, head.options, middles(space))[0]
    level = log_softmax(outputs, head.options).argmax(-1)
    at_option = jnp.take_along_axis(jnp.broadcast_to(middles(space), outputs.shape), level[..., None], -1)[..., 0]
    return jnp.where(head.discrete, at_option, Normal.of(outputs).mean)


class Rollout(NamedTuple):
    """What came of some actions, arrays [horizon, n]; in any order, with gaps."""

    features: jax.Array
    """float[..., features]: what was seen before"""
    after: jax.Array
    """float[..., features]: what was seen after it"""
    unit: jax.Array
    """float[..., dims]: the action"""
    log_prob: jax.Array
    """when it was chosen"""
    reward: jax.Array
    ends: jax.Array
    """bool: whether the run ended with it"""
    trial: jax.Array
    """i32: the run"""
    round: jax.Array
    """i32: when, -1 where there is nothing"""


def in_order(rollout: Rollout) -> Rollout:
    """The same by round in every lane, what is empty first."""
    order = jnp.argsort(rollout.round, axis=0)
    at = lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=0)  # noqa: E731
    return jax.tree.map(at, rollout)


def generalized_advantages(
    rollout: Rollout, value: jax.Array, next_value: jax.Array, discount: jax.Array, trace: jax.Array
) -> jax.Array:
    """Sums of the errors of the value, discounted (equation 16), over what follows in the same run: [horizon, n].

    Args:
      rollout: in order.
      value: float[horizon, n], of what was seen before each action.
      next_value: float[horizon, n], of what was seen after it.
      discount: float[], of rewards.
      trace: float[], of errors.
    """
    error = rollout.reward + discount * jnp.where(rollout.ends, 0, next_value) - value
    follows = (rollout.trial[1:] == rollout.trial[:-1]) & (rollout.round[1:] == rollout.round[:-1] + 1)
    goes_on = jnp.pad(follows & ~rollout.ends[:-1], ((0, 1), (0, 0)))

    def back(later: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
        error, goes_on = at
        now = error + discount * trace * jnp.where(goes_on, later, 0)
        return now, now

    return lax.scan(back, jnp.zeros_like(error[0]), (error, goes_on), reverse=True)[1]


def agent_loss(
    space: Space,
    net: Network,
    params: PyTree,
    rollout: Rollout,
    advantage: jax.Array,
    target: jax.Array,
    clip: jax.Array,
    entropy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What the agent is to minimise (equation 9): less gain and entropy, and half the squared error of the value.

    Args:
      space: of the actions.
      net: the network.
      params: its parameters.
      rollout: what it learns from.
      advantage: float[horizon, n].
      target: float[horizon, n], for the value.
      clip: float[], of the ratio of probabilities.
      entropy: float[], its weight.

    Returns:
      That, float[], and log-probabilities of the actions, float[horizon, n].
    """
    on = rollout.round >= 0
    outputs, value = outputs_and_value(net, params, rollout.features)
    log_prob = log_probs(space, outputs, rollout.unit).sum(-1)
    gain = clipped_gain(log_prob, rollout.log_prob, advantage, clip)
    each = (value - target) ** 2 / 2 - gain - entropy * entropies(space, outputs, rollout.unit).sum(-1)
    return jnp.where(on, each, 0).sum() / jnp.maximum(on.sum(), 1), log_prob


def divergence(before: jax.Array, after: jax.Array, on: jax.Array) -> jax.Array:
    """An estimate of the Kullback-Leibler divergence of a policy from what it was, never negative: float[].

    Args:
      before: float[...], log-probabilities of actions that were drawn.
      after: float[...], those by the policy as it is.
      on: bool[...], the others are padding.
    """
    moved = jnp.where(on, after - before, 0)
    return (jnp.expm1(moved) - moved).sum() / jnp.maximum(on.sum(), 1)
