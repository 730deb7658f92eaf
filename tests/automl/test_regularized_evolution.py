"""Regularised evolution: who is a member, who becomes a parent, what a child differs in, and how good it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.automl import regularized_evolution
from jaxhpo.automl.regularized_evolution import was_told
from jaxhpo.method import count
from jaxhpo.variation import differs

CELL = {f"edge{i}": hpo.Categorical(("a", "b", "c", "d", "e")) for i in range(6)}
SMALL = {name: hpo.Categorical((0, 1, 2)) for name in "abc"}
CONDITIONAL = {
    "opt": hpo.OneOf(sgd={"m": hpo.Float(0.0, 1.0)}, adam={"b": hpo.Int(1, 9), "c": hpo.Float(0.0, 1.0)}),
    "lr": hpo.Float(0.0, 1.0),
}


@functools.cache
def jitted(function):
    return jax.jit(function)


def tell(method, state, unit, losses, active=None):
    trials, _ = jitted(method.ask)(jax.random.key(0), state)
    trials = jax.tree.map(lambda x: jnp.resize(x, (len(unit), *x.shape[1:])), trials)
    active = np.ones(len(unit), bool) if active is None else active
    told = trials._replace(unit=jnp.asarray(unit, jnp.float32), active=jnp.asarray(active))
    return jitted(method.tell)(state, told, jnp.asarray(losses, jnp.float32))


def test_the_oldest_die_however_good_they_are():
    method = regularized_evolution(CELL, population=4)
    unit = np.random.default_rng(0).random((11, 6)).astype(np.float32)
    losses = np.r_[-9.0, np.arange(10)]
    state = method.init(jax.random.key(0))
    active = np.array([1, 1, 0, 1], bool)
    state = tell(method, state, unit[:4], losses[:4], active)
    np.testing.assert_array_equal(state.unit[:3], unit[:4][active])
    state = tell(method, state, unit[4:6], losses[4:6])
    np.testing.assert_array_equal(np.sort(state.loss), [0, 2, 3, 4])
    state = tell(method, state, unit[6:], losses[6:])
    by_loss = np.argsort(state.loss)
    np.testing.assert_array_equal(state.loss[by_loss], [6, 7, 8, 9])
    np.testing.assert_array_equal(state.unit[by_loss], unit[7:])
    assert int(state.born) == 10


@pytest.mark.parametrize("space", [CELL, CONDITIONAL])
def test_children_differ_from_a_member_in_one_live_dim(space):
    method = regularized_evolution(space, population=16, sample=3, batch=64, distinct=False)
    space = method.space
    unit = space.sample(jax.random.key(1), 16)
    state = tell(method, method.init(jax.random.key(0)), unit, np.arange(16.0))
    trials, _ = jitted(method.ask)(jax.random.key(2), state._replace(asked=state.asked._replace(value=16)))
    changed = np.array(trials.unit)[:, None] != np.asarray(unit)
    parent = changed.sum(-1).argmin(1)
    assert (changed[np.arange(64), parent].sum(-1) == 1).all()
    dim = changed[np.arange(64), parent].argmax(-1)
    assert np.asarray(space.active(unit))[parent, dim].all() and len(set(dim)) == space.dims
    assert differs(space, trials.unit, unit[parent], space.active(unit)[parent]).all()


def test_the_best_of_a_sample_becomes_a_parent():
    population, sample, batch = 8, 3, 4096
    method = regularized_evolution(CELL, population=population, sample=sample, batch=batch, distinct=False)
    unit = (np.arange(8)[:, None] % 5 + 0.5 + np.zeros(6)) / 5
    unit[5:, :3] = 0.5
    losses = np.array([3, 1, np.nan, 0, 2, 5, 4, 6.0])
    state = tell(method, method.init(jax.random.key(0)), unit, losses)
    trials, _ = jitted(method.ask)(jax.random.key(2), state._replace(asked=state.asked._replace(value=8)))
    space = method.space
    apart = (np.asarray(space.level(trials.unit))[:, None] != np.asarray(space.level(unit))).sum(-1)
    share = np.bincount(apart.argmin(1), minlength=8) / batch
    rank = np.argsort(np.argsort(np.where(np.isnan(losses), np.inf, losses)))
    expected = ((population - rank) ** sample - (population - rank - 1) ** sample) / population**sample
    np.testing.assert_allclose(share, expected, atol=0.02)


def run(method, rounds, loss, seed=0):
    state, seen = method.init(jax.random.key(seed)), []
    for now in range(rounds):
        trials, state = jitted(method.ask)(jax.random.fold_in(jax.random.key(seed), now), state)
        level = np.asarray(method.space.level(trials.unit))
        seen.append(level)
        state = jitted(method.tell)(state, trials, jnp.asarray(loss(level), jnp.float32))
    return np.concatenate(seen)


@pytest.mark.parametrize("batch", [1, 3])
def test_no_point_twice_unless_it_is_wished_for(batch):
    loss = lambda level: (level != 1).sum(-1)  # noqa: E731
    points = {
        distinct: len(
            np.unique(
                run(
                    regularized_evolution(SMALL, population=5, sample=2, distinct=distinct, batch=batch),
                    24 // batch,
                    loss,
                ),
                axis=0,
            )
        )
        for distinct in (True, False)
    }
    assert points[True] >= 23 and points[False] <= 18


def test_the_cost_of_what_is_known_follows_what_was_told():
    known = jnp.arange(1, 2001, dtype=jnp.uint32)
    seen = jnp.zeros(5000, jnp.uint32).at[:2000].set(known)
    code = jnp.array([1, 60, 1000, 2000, 2001], jnp.uint32)
    for told in (0, 63, 64, 1000, 2000, 9000):
        rows = jnp.where(jnp.arange(5000) < told, seen, 0)
        np.testing.assert_array_equal(was_told(code, rows, count(told)), np.isin(code, np.asarray(rows)))
    method = regularized_evolution(SMALL, batch=2)
    state = jax.tree.map(lambda x: x, method.reserve(method.init(jax.random.key(0)), 5000))
    lowered = jax.jit(jax.vmap(method.ask, (0, None))).lower(jax.random.split(jax.random.key(0), 3), state)
    assert "stablehlo.case" in lowered.as_text()


def test_points_that_are_pending_are_not_asked_for_again():
    method = regularized_evolution(SMALL, population=1, sample=1, batch=26)
    state = tell(method, method.init(jax.random.key(0)), [[0.5, 0.5, 0.5]], [0.0])
    all_but_two = np.stack(np.meshgrid(*[[1 / 6, 0.5, 5 / 6]] * 3), -1).reshape(-1, 3)[:26]
    first, state = jitted(method.ask)(jax.random.key(0), state)
    pending = first._replace(unit=jnp.asarray(all_but_two, jnp.float32))
    asked, _ = jitted(method.ask)(jax.random.key(1), state, pending)
    is_last = (np.asarray(method.space.level(asked.unit)) == 2).all(-1)
    assert is_last.sum() >= 1 and (np.asarray(method.space.level(first.unit)) == 2).all(-1).sum() <= 1


def test_evolution_finds_what_random_search_does_not():
    loss = lambda level: (level != [0, 4, 2, 1, 3, 0]).sum(-1)  # noqa: E731
    best = {
        sample: np.mean(
            [loss(run(regularized_evolution(CELL, population=20, sample=sample), 150, loss, s)).min() for s in range(5)]
        )
        for sample in (1, 5)
    }
    assert best[5] < 0.5 and best[1] > 0.9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(population=0), "population must be at least 1, got 0"),
        (dict(sample=0), "sample must be at least 1, got 0; 10 of 50 is usual"),
        (dict(distinct="yes"), "distinct must be True or False, got 'yes'"),
        (dict(eta=-1.0), "eta must be in [0, 1000], got -1.0; 5 to 20 are usual"),
        (dict(batch=0), "batch must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_with_its_name_value_and_remedy(arguments, message):
    with pytest.raises((ValueError, TypeError)) as error:
        regularized_evolution(CELL, **arguments)
    assert message in str(error.value)
