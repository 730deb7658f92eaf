"""What every search method promises, checked on each of them: one test, all methods of the registry."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhpo.method import axes, bare
from tests.contract import NAMES, SPACES, assert_same, build, check_asks, compiles, floats, loss_of, play, rig, start

ROUNDS = range(4)
every_method = pytest.mark.parametrize("name", NAMES)


def rename_constant(tree, value):
    return {**tree, "clip": value}


@pytest.mark.smoke
@every_method
def test_arguments_have_the_names_of_the_contract(name):
    method = rig(name).method
    expected = {
        "init": [("key", inspect.Parameter.empty), ("settings", None)],
        "ask": [("key", inspect.Parameter.empty), ("state", inspect.Parameter.empty), ("pending", None)],
        "tell": [(n, inspect.Parameter.empty) for n in ("state", "trials", "losses")] + [("gradients", None)],
        "reserve": [("state", inspect.Parameter.empty), ("capacity", inspect.Parameter.empty)],
    }
    for function, arguments in expected.items():
        found = inspect.signature(getattr(method, function)).parameters.values()
        assert [(p.name, p.default) for p in found] == arguments, function
    assert method.name == name.split("-")[0]
    assert method.batch >= 1 and method.slots >= 0 and (method.rounds is None or method.rounds >= 1)


# A variant shares its spaces with the method itself.
IN_SPACES = [
    pytest.param(name, space, marks=pytest.mark.smoke if space == "mixed" else ())
    for name in NAMES
    for space in (("mixed", "conditional") if "-" in name else SPACES)
]


@pytest.mark.parametrize("name, space", IN_SPACES)
def test_asks_keep_the_contract_in_every_space(name, space):
    r = rig(name, space)
    rounds = range(6 if r.method.rounds is None else r.method.rounds + 2)
    asked, _ = play(r, start(r), rounds)
    check_asks(r.method, asked)
    active = [int(trials.active.sum()) for trials in asked]
    if name == "gradient-halving":
        assert active == [5, 5, 5, 2, 2, 2]
    elif r.method.rounds is None:
        assert active == [r.method.batch] * len(asked)
    else:
        assert min(active[: r.method.rounds]) >= 1 and active[r.method.rounds :] == [0, 0]
    for i in range(min(active[0], 2)):
        # `read` refuses what is outside the space, so this is the user's view of the bounds.
        point = r.method.space.native(asked[0].hparams, i)
        np.testing.assert_equal(r.method.space.native(r.method.space.read(point)), point)


@every_method
def test_compiles_once_for_all_rounds(name):
    r = rig(name)
    _, state = play(r, start(r), range(1))
    assert r.traced["ask"] == 1 and r.traced["tell"] == 1
    _, state = play(r, state, range(1, 5))
    assert r.traced["ask"] == 1 and r.traced["tell"] == 1


@every_method
def test_a_second_builder_call_compiles_nothing(name):
    first, second = (build(name, rename_constant(SPACES["mixed"], value)) for value in (1.0, 2.0))
    assert bare(first.init) is bare(second.init)
    assert first.ask is second.ask and first.tell is second.tell
    assert (first.space.tree["clip"], second.space.tree["clip"]) == (1.0, 2.0)
    key = jax.random.key(0)
    state = rig(name).init(key)
    before, (trials, _) = compiles.count, jax.jit(first.ask)(key, state)
    between, (same, _) = compiles.count, jax.jit(second.ask)(key, state)
    assert between > before and compiles.count == between
    assert_same(trials.unit, same.unit)


@every_method
def test_batched_studies_equal_single_ones(name):
    r, keys = rig(name), jax.random.split(jax.random.key(7), 3)
    along = axes(start(r))
    init = jax.jit(jax.vmap(r.method.init, out_axes=along))
    ask = jax.jit(jax.vmap(r.method.ask, in_axes=(0, along), out_axes=(0, along)))
    tell = jax.jit(jax.vmap(r.method.tell, in_axes=(along, 0, 0), out_axes=along))
    states, singles = init(keys), [r.init(key) for key in keys]
    for _ in ROUNDS:
        trials, states = ask(keys, states)
        losses = jnp.stack([loss_of(jax.tree.map(lambda x: x[i], trials)) for i in range(3)])  # noqa: B023
        states = tell(states, trials, losses)
        for i, key in enumerate(keys):
            single, state = r.ask(key, singles[i])
            singles[i] = r.tell(state, single, losses[i])
            if r.case.chaotic:
                assert np.median(np.abs(trials.unit[i] - single.unit)) < 1e-3
            else:
                np.testing.assert_allclose(trials.unit[i], single.unit, rtol=1e-5, atol=1e-5)
            for field in ("id", "steps", "source", "slot", "active"):
                np.testing.assert_array_equal(getattr(trials, field)[i], getattr(single, field))


@every_method
def test_the_same_key_gives_the_same_study_and_another_one_another(name):
    r = rig(name)
    (first, a), (second, b), (other, _) = (play(r, start(r, s), ROUNDS, seed=s) for s in (0, 0, 1))
    assert_same((first, a), (second, b))
    distance = np.mean([np.abs(x.unit - y.unit)[x.active].mean() for x, y in zip(first, other, strict=True)])
    assert (distance > 0.01) == r.case.keyed


@every_method
def test_works_in_float32_and_in_float64_where_it_is_on(name):
    assert {x.dtype for x in floats((rig(name).method.settings, start(rig(name))))} <= {np.dtype("float32")}
    with jax.enable_x64(True):
        method = build(name, SPACES["mixed"])
        assert {x.dtype for x in floats(method.settings)} <= {np.dtype("float64")}
        state = jax.jit(method.init)(jax.random.key(0))
        begun = jax.tree.map(lambda x: x.dtype, state)
        trials, state = jax.jit(method.ask)(jax.random.key(1), state)
        state = jax.jit(method.tell)(state, trials, loss_of(trials))
        assert {x.dtype for x in floats((trials, state))} == {np.dtype("float64")}
        assert jax.tree.map(lambda x: x.dtype, state) == begun
        assert not {np.dtype("int64"), np.dtype("uint64")} & {x.dtype for x in jax.tree.leaves(state)}
        again, _ = jax.jit(method.ask)(jax.random.key(2), state)
        assert ((again.unit >= 0) & (again.unit <= 1)).all()
        assert {trials.id.dtype, trials.steps.dtype, trials.source.dtype, trials.slot.dtype} == {np.dtype("int32")}
        assert ((trials.unit >= 0) & (trials.unit <= 1)).all()
    assert {x.dtype for x in floats(build(name, SPACES["mixed"]).settings)} <= {np.dtype("float32")}


FAILURES = {
    "all NaN": lambda losses: losses * jnp.nan,
    "all inf": lambda losses: losses * 0 + jnp.inf,
    "all -inf": lambda losses: losses * 0 - jnp.inf,
    "every other": lambda losses: jnp.where(jnp.arange(losses.shape[0]) % 2 == 0, jnp.nan, losses),
}


@every_method
@pytest.mark.parametrize("kind", FAILURES)
def test_failed_trials_leave_no_trace_in_state_or_asks(name, kind):
    r = rig(name)
    state, asked = start(r), []
    for now in ROUNDS:
        more, state = play(r, state, range(now, now + 1), lambda trials: FAILURES[kind](loss_of(trials)))
        asked += more
        assert not any(np.isnan(x).any() for x in floats(state))
    check_asks(r.method, asked)
    assert all(np.isfinite(x).all() for x in floats([trials.hparams for trials in asked]))


@every_method
def test_tell_reads_only_active_rows(name):
    r = rig(name)
    trials, state = r.ask(jax.random.key(1), start(r))
    on = trials.active & (jnp.arange(r.method.batch) % 2 == 1)
    losses = loss_of(trials)
    junk = trials._replace(
        hparams=jax.tree.map(lambda x: jnp.where(on.reshape(-1, *[1] * (x.ndim - 1)), x, 0), trials.hparams),
        unit=jnp.where(on[:, None], trials.unit, jnp.nan),
        id=jnp.where(on, trials.id, -7),
        steps=jnp.where(on, trials.steps, 12345),
        active=on,
    )
    told = r.tell(state, trials._replace(active=on), losses)
    assert_same(told, r.tell(state, junk, jnp.where(on, losses, jnp.nan)))
    assert not any(np.isnan(x).any() for x in floats(told))


@every_method
def test_rows_may_come_in_parts_permuted_and_renumbered(name):
    r = rig(name)
    first, state = r.ask(jax.random.key(1), start(r))
    losses, order = loss_of(first), jnp.arange(r.method.batch)[::-1]
    whole = r.tell(state, first, losses)
    told = {
        "renumbered": r.tell(state, first._replace(id=jnp.where(first.active, 1000 - first.id, -1)), losses),
        "permuted": r.tell(state, jax.tree.map(lambda x: x[order], first), losses[order]),
    }
    part = jax.tree.map(lambda x: x[:2], first)
    rest = jax.tree.map(lambda x: x[2:], first)
    tell = jax.jit(r.method.tell)
    told["in parts"] = tell(tell(state, part, losses[:2]), rest, losses[2:])
    told["a part"] = tell(state, part, losses[:2])
    expected, _ = r.ask(jax.random.key(2), whole)
    for how, state in told.items():
        assert not any(np.isnan(x).any() for x in floats(state)), how
        trials, _ = r.ask(jax.random.key(2), state)
        check_asks(r.method, jax.device_get([first, trials]))
        if how == "renumbered":
            assert_same(trials, expected)


@every_method
def test_asks_that_are_never_told(name):
    r = rig(name)
    asked, state = play(r, start(r), ROUNDS, losses=None)
    check_asks(r.method, asked)
    assert asked[0].active.any() and not any(np.isnan(x).any() for x in floats(state))


@every_method
def test_pending_trials_are_accepted(name):
    r = rig(name)
    first, state = r.ask(jax.random.key(1), start(r))
    trials, state = jax.jit(r.method.ask)(jax.random.key(2), state, first)
    check_asks(r.method, jax.device_get([first, trials]))
    assert not any(np.isnan(x).any() for x in floats(state))


@every_method
def test_a_resumed_study_equals_an_unbroken_one(name):
    r = rig(name)
    straight, end = play(r, start(r), range(5))
    before, state = play(r, start(r), range(2))
    stored = jax.tree.map(np.asarray, state)
    after, resumed = play(r, jax.tree.map(jnp.asarray, stored), range(2, 5))
    assert_same(straight, before + after)
    assert_same(end, resumed)


@every_method
def test_reserve_makes_room_and_changes_nothing_else(name):
    r = rig(name)
    rounds = range(-(-80 // r.method.batch) if r.method.rounds is None else r.method.rounds)
    state = start(r)
    asked, full = play(r, state, rounds)
    roomy, end = play(r, r.method.reserve(state, 100), rounds)
    assert_same(asked[:5], roomy[:5])
    for found in (asked, roomy):
        check_asks(r.method, found)
    assert not any(np.isnan(x).any() for x in floats((full, end)))


@every_method
def test_settings_are_traced(name):
    r, key = rig(name), jax.random.key(0)
    settings = r.method.settings
    assert all(x.dtype == np.float32 for x in map(jnp.asarray, jax.tree.leaves(settings)))
    given = r.init(key, settings)
    assert_same(r.init(key), given)
    if not jax.tree.leaves(settings):
        return
    traced = r.traced["init"]
    scaled = jax.tree.map(lambda x: jnp.asarray(x) * 0.9, settings)
    r.init(key, scaled)
    assert r.traced["init"] == traced
    keys, both = jnp.stack([key, key]), jax.tree.map(lambda *x: jnp.stack(x), settings, scaled)
    along = axes(given)
    states = jax.jit(jax.vmap(r.method.init, out_axes=along))(keys, both)
    states = jax.vmap(lambda state, _: state, in_axes=(along, 0))(states, keys)
    for i, single in enumerate((given, r.init(key, scaled))):
        one = jax.tree.map(lambda x: x[i], states)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, single)


@every_method
def test_lowers_for_tpu(name):
    r = rig(name)
    state = start(r)
    trials, _ = r.ask(jax.random.key(0), state)
    for function, *arguments in (
        (r.method.ask, jax.random.key(0), state),
        (r.method.tell, state, trials, trials.unit[:, 0]),
    ):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
        assert lowered.as_text().count("func.func public @main") == 1
