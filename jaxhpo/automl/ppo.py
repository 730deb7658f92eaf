"""Proximal policy optimization: several steps for what is told, for as long as the policy stays near.

Schulman, Wolski, Dhariwal, Radford and Klimov (2017), Proximal policy optimization algorithms, equation 7. Ye, Liu,
Sun, Shi, Zhao, Wu, Yu, Yang, Wu, Guo, Chen, Yin, Zhang, Shi, Wang, Fu, Yang and Huang (2020), Mastering complex control
in MOBA games with deep reinforcement learning, equation 4: the bound of losses.
"""

import jax
import jax.numpy as jnp

from jaxhpo.automl.policy_search import POLICIES, Settings, functions, ratio
from jaxhpo.checks import one_of, real, whole
from jaxhpo.method import Initializer, Method, PyTree
from jaxhpo.space import Space, working_dtype

LEARNING_RATE = 0.03
MOST_LOST = 3.0


def clipped_gain(log_prob: jax.Array, behaviour: jax.Array, advantage: jax.Array, clip: jax.Array) -> jax.Array:
    """Advantages by the ratio of probabilities, which gains nothing beyond 1 - `clip` and 1 + `clip` (equation 7).

    What is lost by a row is no more than `MOST_LOST` times its advantage (Ye et al., equation 4).

    Args:
      log_prob: float[rows], by the policy as it is.
      behaviour: float[rows], by the policy that drew them.
      advantage: float[rows].
      clip: float[].
    """
    r = ratio(log_prob, behaviour)
    gain = jnp.minimum(r * advantage, jnp.clip(r, 1 - clip, 1 + clip) * advantage)
    return jnp.where(advantage < 0, jnp.maximum(gain, MOST_LOST * advantage), gain)


def ppo(
    space: PyTree,
    *,
    policy: str = POLICIES[0],
    hidden: int = 32,
    epochs: int = 4,
    learning_rate: float = LEARNING_RATE,
    decay: float = 0.9,
    entropy: float = 0.01,
    clip: float = 0.2,
    batch: int = 16,
) -> Method:
    """Proximal policy optimization: `reinforce` that takes several steps for what is told, none of them too far.

    A good row no longer moves the policy where its probability has grown by the share `clip` since it was drawn, a bad
    one where it has shrunk by that, or is more than three times as high. Policies, advantages and what becomes of late
    rows and of the user's points are those of `reinforce`.

    Args:
      space: a pytree of parameters, or a `Space`.
      policy: "factorised", every parameter by itself; or "autoregressive", a recurrent network that draws each given
        those before it.
      hidden: size of that network, at least 1.
      epochs: steps for what is told at once, at least 1.
      learning_rate: of Adam, in (0, 10].
      decay: of the running mean and deviation of losses, for every trial, in [0, 1).
      entropy: weight of the policy's entropy beside advantages, whose deviation is 1, at least 0: a high one explores.
      clip: in (0, 1).
      batch: trials per ask, at least 1.

    Returns:
      A `Method` whose settings are learning_rate, decay, entropy and clip.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.ppo({"x": hpo.Float(-1.0, 1.0), "c": hpo.Categorical(("a", "b"))})
      >>> objective = lambda key, h: (h["x"] - 0.5) ** 2 + h["c"]
      >>> result = hpo.minimize(objective, method, key=jax.random.key(0), trials=1600)
      >>> result.best_hparams["c"], round(result.best_hparams["x"], 1)
      ('a', 0.5)

    Reference:
      Schulman et al. (2017), Proximal policy optimization algorithms. Ye et al. (2020), Mastering complex control in
      MOBA games with deep reinforcement learning.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    one_of("policy", policy, POLICIES)
    hidden, epochs = whole("hidden", hidden, 1), whole("epochs", epochs, 1, "1 is without clipping")
    values = (
        real("learning_rate", learning_rate, 1e-6, 10, "0.03 is usual"),
        real("decay", decay, 0, 0.9999, "0.9 is usual"),
        real("entropy", entropy, 0, 100, "0.01 is usual"),
        real("clip", clip, 1e-3, 0.999, "0.2 is usual"),
    )
    settings = Settings(*(jnp.asarray(value, working_dtype()) for value in values))
    init, ask, tell = functions(space, policy, hidden, clipped_gain, epochs, batch)
    return Method("ppo", space, settings, Initializer(init, settings), ask, tell, batch)
