"""What lanes may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as hpo
from jaxhpo.engine.lanes import make_lanes
from tests.problems import MIXED, exact

KEY = jax.random.key(0)
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


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6])
def test_states_move_before_any_of_them_is_trained(lanes):
    """Two rows read a slot that a third one trains in place, and one of them is not kept."""
    method = hpo.random({"x": hpo.Float(0.0, 8.0)}, batch=6)._replace(slots=7)
    doubling = hpo.Trainable(lambda key, h: h["x"], lambda key, x, h: 2 * x + h["x"], lambda x, h: x)
    runner = make_lanes(doubling, method, lanes)
    first, _ = method.ask(jax.random.key(0), method.init(jax.random.key(1)))
    value = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    def rows(id, source, slot, steps):
        i32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
        return first._replace(
            hparams={"x": value}, id=i32(id), source=i32(source), slot=i32(slot), steps=i32([steps] * 6)
        )

    run = jax.jit(lambda bank, incumbent, trials: runner.run(bank, incumbent, jax.random.split(KEY, 6), trials))
    begun = run(*runner.init(), rows(range(6), [-1] * 6, range(6), 1))
    np.testing.assert_array_equal(begun[2].losses, 3 * value)
    assert begun[2].parent.tolist() == [-1] * 6 and begun[0].trial.tolist() == [0, 1, 2, 3, 4, 5, -1]
    source, slot = [0, 0, 1, 2, 1, 2], [0, 3, 1, 2, 6, 7]
    bank, incumbent, told = run(*begun[:2], rows([0, 6, 1, 2, 7, 8], source, slot, 2))
    expected = 4 * 3 * value[jnp.array(source)] + 3 * value
    np.testing.assert_array_equal(told.losses, expected)
    assert told.parent.tolist() == source and told.reached.tolist() == [3] * 6
    assert bank.trial.tolist() == [0, 1, 2, 6, 4, 5, 7]
    np.testing.assert_array_equal(bank.states[np.array(slot[:5])], expected[:5])
    assert incumbent.loss == 3


@pytest.mark.parametrize("lanes", [0, -1, 1.5])
def test_lanes_are_checked(lanes):
    with pytest.raises((ValueError, TypeError), match=f"lanes must be .*{lanes}"):
        hpo.study(exact, hpo.random(MIXED), 1, lanes=lanes)
