"""REINFORCE: a policy over the space is moved along its gradient, so that it draws what had low losses more often.

Williams (1992), Simple statistical gradient-following algorithms for connectionist reinforcement learning, equation 5.
Zoph and Le (2017), Neural architecture search with reinforcement learning: the recurrent policy, and the running mean
of rewards as a baseline.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.automl.policy_search import LEARNING_RATES, POLICIES, Settings, functions, ratio
from jaxhpo.checks import one_of, real, whole
from jaxhpo.method import Initializer, Method, PyTree
from jaxhpo.space import Space, working_dtype


def weighted_score(log_prob: jax.Array, behaviour: jax.Array, advantage: jax.Array, clip: jax.Array) -> jax.Array:
    """Whose slope is the policy gradient: advantages times log-probabilities, weighed by clipped ratios.

    Args:
      log_prob: float[rows], by the policy as it is.
      behaviour: float[rows], by the policy that drew them.
      advantage: float[rows].
      clip: float[], the largest ratio of both probabilities.
    """
    weight = lax.stop_gradient(jnp.minimum(ratio(log_prob, behaviour), clip))
    return weight * advantage * log_prob


def reinforce(
    space: PyTree,
    *,
    policy: str = POLICIES[0],
    hidden: int = 32,
    learning_rate: float | None = None,
    decay: float = 0.9,
    entropy: float = 0.01,
    clip: float = 2.0,
    batch: int = 16,
) -> Method:
    """REINFORCE: a policy over the space is moved along its gradient, so that it draws what had low losses more often.

    Options, ordinals and integers of up to 64 values are drawn from a softmax, reals and other integers from a normal
    distribution that is cut off at their bounds. What a conditional does not use takes no part. Rows that come late,
    and points that the user gave instead of drawn ones (as if drawn uniformly), are weighed by importance.

    Args:
      space: a pytree of parameters, or a `Space`.
      policy: "factorised", every parameter by itself; or "autoregressive", a recurrent network that draws each given
        those before it.
      hidden: size of that network, at least 1.
      learning_rate: of Adam, in (0, 10]; 0.1, or 0.03 of the network, if not given.
      decay: of the running mean and deviation of losses, for every trial, in [0, 1).
      entropy: weight of the policy's entropy beside advantages, whose deviation is 1, at least 0: a high one explores.
      clip: the largest importance of a row, at least 1.
      batch: trials per ask, at least 1.

    Returns:
      A `Method` whose settings are learning_rate, decay, entropy and clip.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.reinforce({"x": hpo.Float(-1.0, 1.0), "c": hpo.Categorical(("a", "b"))})
      >>> objective = lambda key, h: (h["x"] - 0.5) ** 2 + h["c"]
      >>> result = hpo.minimize(objective, method, key=jax.random.key(0), trials=1600)
      >>> result.best_hparams["c"], round(result.best_hparams["x"], 1)
      ('a', 0.5)

    Reference:
      Williams (1992), Simple statistical gradient-following algorithms. Zoph and Le (2017), Neural architecture search
      with reinforcement learning.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    one_of("policy", policy, POLICIES)
    hidden = whole("hidden", hidden, 1)
    rate = LEARNING_RATES[policy] if learning_rate is None else learning_rate
    values = (
        real("learning_rate", rate, 1e-6, 10, "0.1, or 0.03 of an autoregressive policy, is usual"),
        real("decay", decay, 0, 0.9999, "0.9 is usual"),
        real("entropy", entropy, 0, 100, "0.01 is usual"),
        real("clip", clip, 1, 1e6, "1 never lets a row count more than those that were just drawn"),
    )
    settings = Settings(*(jnp.asarray(value, working_dtype()) for value in values))
    init, ask, tell = functions(space, policy, hidden, weighted_score, 1, batch)
    return Method("reinforce", space, settings, Initializer(init, settings), ask, tell, batch)
