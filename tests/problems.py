"""Problems and spaces that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxhpo as hpo

MIXED = {
    "x": hpo.Float(-5.0, 5.0),
    "lr": hpo.Float(1e-4, 1.0, log=True),
    "n": hpo.Int(1, 8),
    "act": hpo.Categorical(("relu", "gelu", "silu")),
    "opt": hpo.OneOf(sgd={"momentum": hpo.Float(0.0, 0.99)}, adam={"b1": hpo.Float(0.8, 0.99)}),
    "clip": 1.0,
}


def exact(key, h):
    """A loss of which every operation is exact elementwise: the same in any batch."""
    return jnp.abs(h["x"]) * h["clip"] + h["n"] * 0.5 + h["act"]


class Counter:
    """A `Trainable` that counts its own steps, exactly, and how often its step is traced."""

    def __init__(self):
        self.traces = 0
        self.trainable = hpo.Trainable(self.init, self.step, self.evaluate)

    def init(self, key, h):
        return {"value": jnp.abs(h["x"]) + 0.0, "steps": jnp.int32(0), "seen": jax.random.key_data(key)[-1]}

    def step(self, key, state, h):
        self.traces += 1
        seen = state["seen"] * jnp.uint32(31) + jax.random.key_data(key)[-1]
        return {"value": state["value"], "steps": state["steps"] + 1, "seen": seen}

    def evaluate(self, state, h):
        return state["value"] - state["steps"] * 0.0078125 + (state["seen"] % 7).astype(jnp.float32)


def assert_same(a, b):
    """Two pytrees are equal bit for bit, NaN included."""
    paths = jax.tree_util.tree_flatten_with_path(a)[0]
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f"), path
