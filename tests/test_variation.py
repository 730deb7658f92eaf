"""Moves in the unit cube."""

import jax.numpy as jnp
import numpy as np

import jaxhpo as hpo
from jaxhpo.variation import levels, reflect, with_subtrees

NESTED = hpo.Space(
    {
        "lr": hpo.Float(0.0, 1.0),
        "net": hpo.OneOf(
            cnn={"k": hpo.Int(1, 3), "pool": hpo.OneOf(no={}, yes={"w": hpo.Float(0.0, 1.0)})},
            mlp={"h": hpo.Float(0.0, 1.0)},
        ),
    }
)


def test_reflection_is_a_triangular_wave():
    x = np.random.default_rng(0).uniform(-7, 7, (1000, 3)).astype(np.float32)
    wave = np.abs((x + 1) % 2 - 1)
    np.testing.assert_allclose(reflect(jnp.asarray(x)), wave, atol=2e-6)
    extreme = np.asarray(reflect(jnp.array([0.0, 1.0, 2.0, -1.0, 1e9, -3e38, 1 + 1e-7])))
    assert ((extreme >= 0) & (extreme <= 1)).all() and extreme[:4].tolist() == [0, 1, 0, 1]


def test_a_switch_carries_its_subtree_along():
    at = {name: i for i, name in enumerate(NESTED.names)}
    mine, yours = jnp.full((2, NESTED.dims), 0.2), jnp.full((2, NESTED.dims), 0.4)
    yours = yours.at[1, at["net"]].set(0.9)  # the second pair has chosen different networks
    assert levels(NESTED, yours)[:, at["net"]].tolist() == [0, 1]
    wished = jnp.zeros((2, NESTED.dims), bool).at[:, at["net"]].set(True)
    taken = np.asarray(with_subtrees(NESTED, wished, mine, yours))
    below = [at[name] for name in ("net.cnn.k", "net.cnn.pool", "net.cnn.pool.yes.w", "net.mlp.h")]
    assert not taken[0, below].any() and taken[1, below].all()
    assert taken[:, at["net"]].all() and not taken[:, at["lr"]].any()
    only_below = jnp.ones((2, NESTED.dims), bool).at[:, at["net"]].set(False)
    kept = np.asarray(with_subtrees(NESTED, only_below, mine, yours))
    assert kept[0, below].all() and not kept[1, below].any()
