"""Trials whose losses are exact in float32, with many ties, and whose order changes with the steps."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxhpo as hpo

SPACE = hpo.Space({"x": hpo.Float(0.0, 1.0)})


def trial_loss(x: float, steps: int) -> float:
    """The loss of the trial at `x` after some steps."""
    return float(np.float32(int(x * 4096) * (1 + steps) % 13))


RACE = hpo.Trainable(
    init=lambda key, h: (h["x"], jnp.int32(0)),
    step=lambda key, state, h: (state[0], state[1] + 1),
    evaluate=lambda state, h: jnp.asarray((state[0] * 4096).astype(jnp.int32) * (1 + state[1]) % 13, jnp.float32),
)


def run(method, rounds=None, problem=RACE, seed=0):
    """The last state and the trace of a study, as arrays of NumPy."""
    return jax.device_get(jax.jit(hpo.study(problem, method, rounds))(jax.random.key(seed)))
