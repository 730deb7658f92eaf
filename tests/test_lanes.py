"""What lanes may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as hpo
from tests.problems import MIXED, exact

SPACE = {
    "width": hpo.Int(4, 16, log=True),
    "activation": hpo.Categorical(("relu", "tanh")),
    "dropout": hpo.Float(0.0, 0.3),
    "optimizer": hpo.OneOf(sgd={"lr": hpo.Float(1e-3, 0.1, log=True)}, adam={"lr": hpo.Float(1e-3, 1e-2, log=True)}),
}


def flax_problem():
    x = jax.random.normal(jax.random.key(0), (256, 6))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32) + (x[:, 2] > 1)
    return hpo.flax_trainable(
        model=lambda h: hpo.MLP(
            3, 16, 2, width=h["width"], activation=h["activation"], activations=("relu", "tanh"), dropout=h["dropout"]
        ),
        optimizer=lambda h: hpo.select_optimizer(
            h["optimizer"], {"sgd": lambda b: optax.sgd(b["lr"], 0.9), "adam": lambda b: optax.adam(b["lr"])}
        ),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=(x[:192], y[:192]),
        valid=(x[192:], y[192:]),
        batch_size=32,
    )


def test_fixed_flax_trials_agree_after_50_steps():
    objective = hpo.unroll(flax_problem(), steps=50)
    method = hpo.random(SPACE, batch=64)
    wide, narrow = (hpo.minimize(objective, method, key=jax.random.key(1), rounds=1, lanes=n) for n in (64, 8))
    assert np.array_equal(wide.trials.unit, narrow.trials.unit)
    assert np.allclose(wide.trials.loss, narrow.trials.loss, rtol=1e-3, atol=0)
    again = hpo.minimize(objective, method, key=jax.random.key(1), rounds=1, lanes=64)
    assert np.array_equal(again.trials.loss, wide.trials.loss)
    assert wide.trials.loss.min() < 0.7 < np.ptp(wide.trials.loss) + wide.trials.loss.min()


@pytest.mark.parametrize("lanes", [0, -1, 1.5])
def test_lanes_are_checked(lanes):
    with pytest.raises((ValueError, TypeError), match=f"lanes must be .*{lanes}"):
        hpo.study(exact, hpo.random(MIXED), 1, lanes=lanes)
