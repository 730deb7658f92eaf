"""What methods share that learn a policy over a space from the losses of what it draws.

A loss counts by how much it is below a running mean, in units of a running deviation: the advantage. Every row is
weighed by how probable it is under the policy of the moment and was when it was drawn, so rows may come late; a point
that was put in the place of a drawn one counts as a uniform draw.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxhpo.automl.policies import (
    Policy,
    autoregressive,
    entropies,
    factorised,
    log_probs,
    uniform_log_prob,
)
from jaxhpo.method import Count, PyTree, Trials, black_box, count, failed
from jaxhpo.space import Space, working_dtype

POLICIES = ("factorised", "autoregressive")
LEARNING_RATES = {"factorised": 0.1, "autoregressive": 0.03}
FAILURE = -2.0
LARGEST = 1e18
HEAVIEST = 2.0
SAME = 1e-6


class Settings(NamedTuple):
    """Numeric settings of a search by a policy, float[] each."""

    learning_rate: jax.Array
    """of Adam"""
    decay: jax.Array
    """in [0, 1): what is left of the running mean and deviation of losses after a row"""
    entropy: jax.Array
    """weight of the policy's entropy beside the advantages"""
    clip: jax.Array
    """as the method says"""


class Baseline(NamedTuple):
    """Running mean and deviation of losses, float[] each."""

    mean: jax.Array
    variance: jax.Array
    """of losses around what the mean was before them"""
    weight: jax.Array
    """0 before the first loss, near 1 after many"""


class State(NamedTuple):
    """State of a search by a policy."""

    params: PyTree
    """of the policy"""
    optimizer: optax.OptState
    baseline: Baseline
    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""


class Row(NamedTuple):
    """What a row of an ask remembers."""

    unit: jax.Array
    """float[batch, dims]: as it was drawn"""
    log_prob: jax.Array
    """float[batch]: by the policy that drew it"""


def moved(baseline: Baseline, losses: jax.Array, on: jax.Array, decay: jax.Array) -> Baseline:
    """The running mean and deviation after some losses, float[rows], those that are `on`."""
    n = on.sum().astype(losses.dtype)
    mean_of = lambda x: jnp.where(on, x, 0).sum() / jnp.maximum(n, 1)  # noqa: E731
    left = decay**n
    before = jnp.where(baseline.weight > 0, baseline.mean, mean_of(losses))
    # Both are means over what was seen, with weights that fall towards the past.
    weight = 1 - left * (1 - baseline.weight)
    share = jnp.where(weight > 0, (1 - left) / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny), 0)
    variance = mean_of((losses - before) ** 2)
    return Baseline(
        before + share * (mean_of(losses) - before),
        baseline.variance + share * (variance - baseline.variance),
        weight,
    )


def advantages(baseline: Baseline, losses: jax.Array, on: jax.Array, decay: jax.Array) -> tuple[jax.Array, Baseline]:
    """How much lower losses are than the mean before them, in deviations, and the baseline after them.

    Args:
      baseline: before these losses.
      losses: float[rows]; a failed trial has an advantage of `FAILURE`.
      on: bool[rows], the others are padding.
      decay: float[].
    """
    counts = on & ~failed(losses)
    losses = jnp.clip(losses.astype(baseline.mean.dtype), -LARGEST, LARGEST)
    after = moved(baseline, losses, counts, decay)
    centre = jnp.where(baseline.weight > 0, baseline.mean, after.mean)
    scale = jnp.where(after.variance > 0, jnp.sqrt(after.variance), 1)
    return jnp.where(counts, (centre - losses) / scale, FAILURE), after


def objective(
    space: Space,
    policy: Policy,
    gain: Callable,
    params: PyTree,
    unit: jax.Array,
    behaviour: jax.Array,
    advantage: jax.Array,
    on: jax.Array,
    settings: Settings,
) -> jax.Array:
    """What the policy is moved to raise: the mean gain of rows, and its entropy.

    The slope of the latter is, on average, that of the entropy of the policy as a whole: how probable a row is decides
    what is live, and what is drawn from, after its first choices. Rows are weighed by importance, at most `HEAVIEST`.

    Args:
      space: whose points they are.
      policy: over it.
      gain: (log_prob, behaviour, advantage, clip) -> float[rows].
      params: of the policy.
      unit: float[rows, dims].
      behaviour: float[rows], log-probability when they were drawn.
      advantage: float[rows].
      on: bool[rows], the others are padding.
      settings: of which entropy and clip are read.
    """
    outputs = policy.outputs(params, unit)
    log_prob = log_probs(space, outputs, unit).sum(-1)
    each = gain(log_prob, behaviour, advantage, settings.clip)
    entropy = entropies(space, outputs, unit).sum(-1)
    surplus = jnp.zeros_like(entropy)
    if policy.depends or space.nesting:
        # The mean of the others does not depend on what a row drew, and makes its score less noisy.
        others = (jnp.where(on, entropy, 0).sum() - entropy) / jnp.maximum(on.sum() - 1, 1)
        surplus = lax.stop_gradient(entropy - jnp.where(on.sum() > 1, others, 0))
    weight = lax.stop_gradient(jnp.minimum(ratio(log_prob, behaviour), HEAVIEST))
    each += settings.entropy * weight * (entropy + surplus * log_prob)
    return jnp.where(on, each, 0).sum() / jnp.maximum(on.sum(), 1)


def ratio(log_prob: jax.Array, behaviour: jax.Array) -> jax.Array:
    """How much more probable rows are than when they were drawn, float[rows]; bounded, so that it stays finite."""
    return jnp.exp(jnp.clip(log_prob - behaviour, -30, 30))


def policy_of(space: Space, policy: str, hidden: int) -> Policy:
    """The policy of that name."""
    return factorised(space) if policy == "factorised" else autoregressive(space, hidden)


@functools.lru_cache(maxsize=256)
def functions(
    space: Space, policy_name: str, hidden: int, gain: Callable, epochs: int, batch: int
) -> tuple[Callable, Callable, Callable]:
    """`init`, `ask` and `tell` of a search by a policy.

    Args:
      space: what is searched.
      policy_name: one of `POLICIES`.
      hidden: numbers in the state of an autoregressive policy.
      gain: as of `objective`.
      epochs: steps of Adam for what is told at once.
      batch: trials per ask.
    """
    policy, adam = policy_of(space, policy_name, hidden), optax.scale_by_adam()

    def init(key: jax.Array, settings: Settings) -> State:
        params = policy.init(key)
        zero = jnp.zeros((), working_dtype())
        return State(params, adam.init(params), Baseline(zero, zero, zero), settings, count())

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        unit = policy.sample(state.params, key, batch)
        log_prob = log_probs(space, policy.outputs(state.params, unit), unit).sum(-1)
        asked = state.asked.value
        trials = black_box(space, unit, asked, aux=Row(unit, log_prob))
        return trials, state._replace(asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        on, settings, row = trials.active, state.settings, trials.aux
        unit = jnp.where(on[:, None], trials.unit, 0.5)
        advantage, baseline = advantages(state.baseline, losses, on, settings.decay)
        is_drawn = (jnp.abs(row.unit - unit) <= SAME).all(-1)
        behaviour = jnp.where(is_drawn, row.log_prob, uniform_log_prob(space, unit))

        def improve(carry: tuple, _: None) -> tuple[tuple, None]:
            params, optimizer = carry
            slope = jax.grad(lambda p: objective(space, policy, gain, p, unit, behaviour, advantage, on, settings))(
                params
            )
            finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(slope)]).all()
            step, then = adam.update(slope, optimizer)
            new = jax.tree.map(lambda p, s: p + settings.learning_rate * s, params, step)
            keep = lambda a, b: jnp.where(finite & on.any(), a, b)  # noqa: E731
            return jax.tree.map(keep, (new, then), carry), None

        (params, optimizer), _ = lax.scan(improve, (state.params, state.optimizer), length=epochs)
        return state._replace(params=params, optimizer=optimizer, baseline=baseline)

    return init, ask, tell
