"""Random search: uniform, independent, without a memory."""

import jax
import numpy as np
import pytest
from scipy import stats

import jaxhpo as hpo
from jaxhpo.stochastic import random


def test_points_are_uniform_and_independent():
    method = random({"x": hpo.Array(4, 0.0, 1.0)}, batch=1000)
    ask, state = jax.jit(method.ask), method.init(jax.random.key(0))
    rows = []
    for key in jax.random.split(jax.random.key(1), 4):
        trials, state = ask(key, state)
        rows.append(np.asarray(trials.unit))
    unit = np.concatenate(rows)
    assert min(stats.kstest(column, "uniform").pvalue for column in unit.T) > 0.01
    correlation = np.corrcoef(np.concatenate([unit[:-1], unit[1:]], axis=1).T) - np.eye(8)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(unit))


def test_it_decodes_what_the_space_samples():
    space = hpo.Space({"lr": hpo.Float(1e-4, 1.0, log=True), "n": hpo.Int(1, 9)})
    method, key = random(space, batch=8), jax.random.key(3)
    trials, state = method.ask(key, method.init(jax.random.key(0)))
    np.testing.assert_array_equal(trials.unit, space.sample(key, 8))
    np.testing.assert_array_equal(trials.hparams["n"], space.decode(space.sample(key, 8))["n"])
    again, _ = method.ask(key, state)
    np.testing.assert_array_equal(again.id, np.arange(8, 16))


def test_a_batch_must_be_positive():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        random({"x": hpo.Float(0, 1)}, batch=0)
