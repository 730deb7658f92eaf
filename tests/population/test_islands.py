"""Islands: each is a run of the method by itself, its rows find it again, and its best reaches its neighbour."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.method import axes, black_box
from jaxhpo.population import genetic, islands

SPACE = hpo.Space({"x": hpo.Array(2, -5.0, 5.0), "c": hpo.Categorical(("a", "b", "c"))})
INNER = genetic(SPACE, population=6, batch=4)
NEVER = 10**6


@functools.cache
def jitted(function):
    return jax.jit(function)


def bowl(unit):
    return jnp.asarray(((np.asarray(unit, float) - 0.3) ** 2 * np.arange(1, unit.shape[-1] + 1)).sum(-1), jnp.float32)


def play(method, state, keys, losses=bowl):
    asked = []
    for key in keys:
        trials, state = jitted(method.ask)(key, state)
        asked.append(trials)
        state = jitted(method.tell)(state, trials, losses(trials.unit))
    return asked, state


def rows(trials, index):
    return jax.tree.map(lambda x: x[index], trials)


def island_of(state, i):
    return jax.tree.map(
        lambda x: x if isinstance(x, hpo.Count) else x[i], state.states, is_leaf=lambda x: isinstance(x, hpo.Count)
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("n", [1, 3])
def test_without_migration_the_islands_are_runs_by_themselves(n):
    method = islands(INNER, n, every=NEVER if n > 1 else 1)
    keys = jax.random.split(jax.random.key(0), 7)
    asked, state = play(method, method.init(jax.random.key(9)), keys[1:])
    starts = jax.random.split(jax.random.key(9), n)
    for i in range(n):
        own = [jax.random.split(key, n)[i] for key in keys[1:]]
        alone, last = play(INNER, INNER.init(starts[i]), own)
        for mine, its in zip(alone, asked, strict=True):
            part = rows(its, slice(4 * i, 4 * i + 4))
            np.testing.assert_array_equal(part.unit, mine.unit)
            assert_same(part.aux.aux, mine.aux)
            np.testing.assert_array_equal(part.aux.island, i)
        assert_same(island_of(state, i), last)
    np.testing.assert_array_equal(np.concatenate([t.id for t in asked]), np.arange(6 * n * 4))


def test_every_island_is_told_the_best_of_the_one_before_it():
    method = islands(INNER, 3, every=2)
    keys = jax.random.split(jax.random.key(0), 5)
    (first, second), before = play(method, method.init(jax.random.key(9)), keys[:2])
    _, after = jitted(method.ask)(keys[2], before)
    units = np.concatenate([first.unit, second.unit])
    owner, losses = np.tile(np.repeat(np.arange(3), 4), 2), np.asarray(bowl(units))
    best = np.array([np.flatnonzero(owner == i)[losses[owner == i].argmin()] for i in range(3)])
    np.testing.assert_array_equal(before.best.loss, losses[best])
    for i in range(3):
        source = best[(i - 1) % 3]
        members, then = np.asarray(after.states.unit[i]), np.asarray(before.states.unit[i])
        member = int(first.aux.aux.member[source] if source < 12 else second.aux.aux.member[source - 12])
        # It contends for the place that it had, like any trial of the island's own.
        expected = then.copy()
        if losses[source] <= before.states.loss[i][member]:
            expected[member] = units[source]
        np.testing.assert_array_equal(members, expected)
    best_of_all = int(losses[best].argmin())
    assert float(after.states.loss[(best_of_all + 1) % 3].min()) == losses[best].min()

    # It is sent once: nothing is told at the next migration unless something better was found.
    _, later = play(method, after, keys[3:4], losses=lambda unit: bowl(unit) + 10)
    _, end = jitted(method.ask)(keys[4], later._replace(asks=hpo.Count(jnp.int32(4))))
    np.testing.assert_array_equal(end.states.unit, later.states.unit)
    np.testing.assert_array_equal(end.states.loss, later.states.loss)


def test_rows_find_their_island_permuted_in_parts_late_and_mixed():
    method = islands(INNER, 3, every=NEVER)
    tell = jitted(method.tell)
    first, state = jitted(method.ask)(jax.random.key(1), method.init(jax.random.key(0)))
    second, state = jitted(method.ask)(jax.random.key(2), state)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), first, second)
    losses = bowl(both.unit)
    one = lambda index: (rows(both, index), losses[index])  # noqa: E731
    order = np.random.default_rng(0).permutation(24)
    by_island = np.argsort(np.asarray(both.aux.island), kind="stable")
    sequences = {
        "in order": [np.arange(12), np.arange(12, 24)],
        "permuted": [order[:12], order[12:]],
        "one island after the other": [by_island[:12], by_island[12:]],
        "all at once": [order],
        "one by one": [order[[i]] for i in range(24)],
    }
    ends = {}
    for how, parts in sequences.items():
        told = state
        for part in parts:
            told = tell(told, *one(part))
        ends[how] = told
    expected = ends.pop("in order")
    assert np.isfinite(np.asarray(expected.states.loss)).all()
    for how, found in ends.items():
        np.testing.assert_array_equal(found.states.unit, expected.states.unit, err_msg=how)
        np.testing.assert_array_equal(found.states.loss, expected.states.loss, err_msg=how)
        assert_same(found.best.loss, expected.best.loss)
    late = [np.arange(12), np.arange(12, 24)]
    part = tell(tell(state, *one(late[1])), rows(both, late[0])._replace(active=jnp.arange(12) < 4), losses[:12])
    np.testing.assert_array_equal(part.states.loss[0], expected.states.loss[0])
    assert np.isinf(np.asarray(part.states.loss[1])).any()


def test_counts_do_not_depend_on_who_is_told_how_much():
    method = islands(INNER, 3, every=NEVER)
    trials, state = jitted(method.ask)(jax.random.key(1), method.init(jax.random.key(0)))
    crowded = trials._replace(aux=trials.aux._replace(island=jnp.zeros(12, jnp.int32)))
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    along = axes(state)
    states = jax.vmap(lambda s: s, (0,), 0)(states)
    states = jax.tree.map(
        lambda x, s: s if isinstance(s, hpo.Count) else x,
        states,
        state,
        is_leaf=lambda x: isinstance(x, hpo.Count),
    )
    both = jax.tree.map(lambda *x: jnp.stack(x), trials, crowded)
    losses = jnp.stack([bowl(trials.unit)] * 2)
    told = jax.jit(jax.vmap(method.tell, (along, 0, 0), along))(states, both, losses)
    for i, one in enumerate((trials, crowded)):
        alone = jitted(method.tell)(state, one, losses[i])
        np.testing.assert_array_equal(told.states.loss[i], alone.states.loss)
        assert_same(told.states.told, alone.states.told)
    worst_place = np.full(6, np.inf)
    for member, loss in zip(np.asarray(trials.aux.aux.member), np.asarray(losses[0]), strict=True):
        worst_place[member] = min(worst_place[member], loss)
    np.testing.assert_array_equal(told.states.loss[1][0], worst_place.astype(np.float32))
    assert np.isinf(np.asarray(told.states.loss[1][1:])).all()


def test_failed_trials_do_not_migrate():
    method = islands(INNER, 3, every=2)
    keys = jax.random.split(jax.random.key(0), 4)

    def losses(unit):
        return jnp.where(jnp.arange(12) < 4, jnp.array([jnp.nan, jnp.inf, -jnp.inf] * 4), bowl(unit))

    asked, state = play(method, method.init(jax.random.key(1)), keys, losses)
    assert np.isinf(state.best.loss[0]) and np.isfinite(state.best.loss[1:]).all()
    assert not any(np.isnan(np.asarray(x)).any() for x in jax.tree.leaves(state))
    # All that the first island knows is the one trial that came to it from the last.
    of_last = np.concatenate([t.unit[8:] for t in asked[:2]])
    known = np.isfinite(np.asarray(state.states.loss[0]))
    np.testing.assert_array_equal(state.states.unit[0][known], of_last[[int(np.argmin(bowl(of_last)))]])


def test_islands_stay_apart_longer_than_one_population():
    space = hpo.Space({"x": hpo.Array(4, 0.0, 1.0)})

    def rastrigin(key, h):
        x = 10 * (h["x"] - 0.4)
        return (x * x - 10 * jnp.cos(2 * jnp.pi * x)).sum()

    def spread(method):
        study = jax.jit(hpo.study(rastrigin, method, 60))
        states = [study(jax.random.key(seed))[0] for seed in range(5)]
        units = [np.asarray(getattr(state, "states", state).unit).reshape(48, 4) for state in states]
        return np.median([unit.std(0).mean() for unit in units])

    inner = genetic(space, population=12, batch=12, tolerance=0.0)
    one = spread(genetic(space, population=48, batch=48, tolerance=0.0))
    assert spread(islands(inner, 4, every=5)) > 20 * one
    assert one < 1e-3


def descent(space, batch):
    """A method that steps down the gradients it was told, from points that it was told."""

    def init(key, settings=None):
        return {"unit": jax.random.uniform(key, (batch, space.dims)), "asked": hpo.Count(jnp.int32(0))}

    def ask(key, state, pending=None):
        trials = black_box(space, state["unit"], state["asked"].value, aux=jnp.arange(batch))
        return trials, {**state, "asked": hpo.Count(state["asked"].value + batch)}

    def tell(state, trials, losses, gradients=None):
        moved = jnp.clip(trials.unit - 0.1 * gradients["x"], 0, 1)
        at = jnp.where(trials.active, trials.aux, batch)
        return {**state, "unit": state["unit"].at[at].set(moved, mode="drop")}

    return hpo.Method("descent", space, (), init, ask, tell, batch, uses_gradients=True)


def test_gradients_are_passed_on_and_migrate():
    space = hpo.Space({"x": hpo.Array(2, 0.0, 1.0)})
    method = islands(descent(space, 2), 2, every=1)
    assert method.uses_gradients
    trials, state = method.ask(jax.random.key(0), method.init(jax.random.key(1)))
    slopes = {"x": jnp.arange(8.0).reshape(4, 2) / 10}
    losses = jnp.array([3.0, 1.0, 4.0, 2.0])
    told = method.tell(state, trials, losses, slopes)
    moved = np.clip(np.asarray(trials.unit) - 0.1 * np.asarray(slopes["x"]), 0, 1)
    np.testing.assert_allclose(told.states["unit"].reshape(4, 2), moved, rtol=1e-6)
    again, _ = method.ask(jax.random.key(2), told)
    # Rows 1 and 3 are the best of their islands, and second there; they come to the second place of the other one.
    np.testing.assert_allclose(again.unit, moved[[0, 3, 2, 1]], rtol=1e-6)


def test_room_is_shared_among_the_islands():
    reserved = []
    method = INNER._replace(reserve=lambda state, capacity: (reserved.append(capacity), state)[1])
    whole = islands(method, 3, every=2)
    state = whole.init(jax.random.key(0))
    assert_same(whole.reserve(state, 100), state)
    assert reserved == [9 * 4 + 4]


def test_islands_of_islands():
    method = islands(islands(hpo.random(SPACE, batch=4), 2, every=1), 2, every=2)
    assert method.batch == 16 and method.name == "islands"
    asked, state = play(method, method.init(jax.random.key(0)), jax.random.split(jax.random.key(1), 4))
    assert len({tuple(row) for row in np.asarray(asked[0].unit)}) == 16
    assert float(state.best.loss.min()) == min(float(bowl(t.unit).min()) for t in asked)


def test_differential_evolution_on_islands():
    method = islands(hpo.differential_evolution(SPACE, population=5, batch=4), 2, every=2)
    asked, state = play(method, method.init(jax.random.key(0)), jax.random.split(jax.random.key(1), 6))
    losses = np.concatenate([bowl(t.unit) for t in asked])
    assert float(state.best.loss.min()) == losses.min() == np.asarray(state.states.loss).min()
    assert not any(np.isnan(np.asarray(x)).any() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((INNER, 0, 1), "n must be at least 1, got 0"),
        ((INNER, 2, 0), "every must be at least 1, got 0; a large number is never to migrate"),
        ((hpo.hyperband(SPACE, max_steps=9), 2, 1), "method 'hyperband' keeps slots="),
        ((hpo.grid(SPACE, points=2), 2, 1), "method 'grid' ends by itself, after rounds="),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        islands(*arguments)
    assert message in str(error.value)
    with pytest.raises(TypeError, match="method must be a Method, got .*; give what a builder returns, such as hpo"):
        islands({"x": hpo.Float(0, 1)}, 2, 1)


def test_pending_trials_are_passed_on_to_their_islands():
    space = hpo.Space({"a": hpo.Categorical(tuple("abcdefgh")), "x": hpo.Float(0, 1)})
    method = hpo.islands(hpo.coordinate_descent(space, starts=1, batch=4), 2, every=9)
    state = method.init(jax.random.key(0))
    first, state = method.ask(jax.random.key(1), state)
    again, _ = method.ask(jax.random.key(2), state)
    other, _ = method.ask(jax.random.key(2), state, first)
    repeated = lambda rows: int((np.asarray(rows.unit)[:, None] == np.asarray(first.unit)).all(-1).any(1).sum())  # noqa: E731
    assert repeated(other) <= 1 < repeated(again)
