"""The agent of a controller: what it sees of a training run, the network that acts on it, and how that learns.

Schulman, Wolski, Dhariwal, Radford and Klimov (2017), Proximal policy optimization algorithms, equations 7 and 9.
Schulman, Moritz, Levine, Jordan and Abbeel (2016), High-dimensional continuous control using generalized advantage
estimation, equation 16.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from jaxhpo.automl.policies import Normal, draw, entropies, heads, log_probs, log_softmax, middles
from jaxhpo.automl.ppo import clipped_gain
from jaxhpo.method import PyTree
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import best_rows

LOWEST = 1e-12
CURVE = 5
POLICY_LAYERS = ("Dense_0", "Dense_1", "Dense_2")
SLOWER, SLOWEST = 1.5, 1e-3
ADAM = optax.scale_by_adam()


class Settings(NamedTuple):
    """Numeric settings of a controller, float[] each."""

    learning_rate: jax.Array
    """of Adam"""
    discount: jax.Array
    """of rewards, for every stretch"""
    trace: jax.Array
    """lambda: of errors of the value, for every stretch"""
    clip: jax.Array
    """of the ratio of probabilities"""
    entropy: jax.Array
    """weight of the policy's entropy"""
    penalty: jax.Array
    """for a failure; no reward is below its negative"""
    average: jax.Array
    """horizons over which the policy is averaged"""
    divergence: jax.Array
    """of the policy from what it was before a horizon, beyond which no step is taken"""


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


def newest(place: jax.Array, rounds: jax.Array, on: jax.Array, places: int) -> tuple[jax.Array, jax.Array]:
    """The last of the rows that are `on` for every place, i32[places], and whether there is one, bool[places]."""
    return best_rows(place, -rounds.astype(jnp.float32), on, places)


def replaced(old: PyTree, rows: PyTree, row: jax.Array, on: jax.Array) -> PyTree:
    """Arrays [..., *shape] with those of some `row`, i32[...], of arrays [rows, *shape] where it is `on`, bool[...]."""
    on_of = lambda a: on.reshape(on.shape + (1,) * (a.ndim - on.ndim))  # noqa: E731
    return jax.tree.map(lambda a, b: jnp.where(on_of(a), b[row].astype(a.dtype), a), old, rows)


class Learner(NamedTuple):
    """What learns."""

    params: PyTree
    optimizer: optax.OptState
    rate: jax.Array
    """float[] in (0, 1]: share of the learning rate at which the policy learns"""


def learn(
    space: Space,
    net: Network,
    learner: Learner,
    rollout: Rollout,
    is_wanted: jax.Array,
    settings: Settings,
    epochs: int,
) -> Learner:
    """After some epochs on a rollout; the policy takes its last step back where that went too far, and slows down.

    Args:
      space: of the actions.
      net: the network.
      learner: before them.
      rollout: what it learns from, in any order.
      is_wanted: bool[], whether it is to learn at all.
      settings: of the controller.
      epochs: steps of Adam.
    """
    rollout = in_order(rollout)
    on = rollout.round >= 0
    outputs, value = outputs_and_value(net, learner.params, rollout.features)
    next_value = outputs_and_value(net, learner.params, rollout.after)[1]
    log_prob = log_probs(space, outputs, rollout.unit).sum(-1)
    advantage = generalized_advantages(rollout, value, next_value, settings.discount, settings.trace)
    target, rows = value + advantage, jnp.maximum(on.sum(), 1)
    mean = jnp.where(on, advantage, 0).sum() / rows
    deviation = jnp.sqrt(jnp.where(on, (advantage - mean) ** 2, 0).sum() / rows)
    advantage = (advantage - mean) / (deviation + 1e-6)
    loss = lambda p: agent_loss(space, net, p, rollout, advantage, target, settings.clip, settings.entropy)  # noqa: E731

    def improve(carry: tuple, epoch: jax.Array) -> tuple[tuple, jax.Array]:
        params, last, optimizer, is_near = carry
        slope, now = jax.grad(loss, has_aux=True)(params)
        far = divergence(log_prob, now, on)
        is_near &= far <= settings.divergence
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(slope)]).all()
        goes_on = is_wanted & finite & (epoch < epochs)
        step, then = ADAM.update(slope, optimizer)

        def move(path: tuple, p: jax.Array, s: jax.Array, last: jax.Array) -> jax.Array:
            is_policy = path[1].key in POLICY_LAYERS
            rate = settings.learning_rate * (learner.rate if is_policy else 1)
            moved = jnp.where(goes_on, p - rate * s, p)
            return jnp.where(is_near, moved, last) if is_policy else moved

        moved = jax.tree_util.tree_map_with_path(move, params, step, last)
        last = jax.tree.map(lambda a, b: jnp.where(is_near, a, b), params, last)
        optimizer = jax.tree.map(lambda a, b: jnp.where(goes_on, a, b), then, optimizer)
        return (moved, last, optimizer, is_near), far

    first = learner.params, learner.params, learner.optimizer, jnp.bool_(True)
    # The last round only looks whether the last step went too far.
    (params, _, optimizer, is_near), far = lax.scan(improve, first, jnp.arange(epochs + 1))
    change = jnp.where(is_near, jnp.where(far[-1] < settings.divergence / 4, SLOWER, 1), 1 / SLOWER)
    return Learner(params, optimizer, jnp.clip(learner.rate * change, SLOWEST, 1))
