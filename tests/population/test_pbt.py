"""Population-based training: exploit and explore against NumPy, what a population does, and schedules that replay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import jaxhpo as hpo
from jaxhpo.population import time_varying
from jaxhpo.population.exploit import Standing, tournament, truncation
from jaxhpo.population.explore import Draws, add, multiplied, perturb, resample
from tests.problems import MIXED, Counter, assert_same

KEY = jax.random.key(5)
SPACE = hpo.Space(
    {
        "linear": hpo.Float(1.0, 5.0),
        "log": hpo.Float(1e-4, 1.0, log=True),
        "around_zero": hpo.Float(-1.0, 1.0),
        "few": hpo.Int(1, 8),
        "many": hpo.Int(16, 1024, log=True),
        "ordinal": hpo.Ordinal((16, 64, 256)),
        "option": hpo.Categorical(("a", "b", "c")),
    }
)
CONDITIONAL = hpo.Space(
    {"opt": hpo.OneOf(sgd={"momentum": hpo.Float(0.0, 0.99)}, adam={"b1": hpo.Float(0.8, 0.99)}), "x": hpo.Float(0, 1)}
)


def standing(losses, unknown=()):
    losses = np.array(losses, np.float32)
    failed = ~np.isfinite(losses)
    failed[list(unknown)] = False
    return Standing(jnp.asarray(np.where(np.isfinite(losses), losses, np.inf)), jnp.asarray(failed))


# Exploit.


def numpy_truncation(losses, unknown, uniform, quantile):
    """Member by member: (source, copies)."""
    known = [i for i in range(len(losses)) if i not in unknown]
    ranking = sorted(known, key=lambda i: (not np.isfinite(losses[i]), losses[i] if np.isfinite(losses[i]) else 0, i))
    share = min(int(np.ceil(round(quantile * len(known), 6))), len(known) // 2)
    best = [i for i in ranking[: max(share, 1)] if np.isfinite(losses[i])]
    source = np.arange(len(losses))
    for i in known:
        if best and (i in ranking[len(known) - share :] or not np.isfinite(losses[i])):
            source[i] = best[int(uniform[i] * len(best))]
    return source


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.25, 0.5])
def test_truncation_equals_a_ranking_by_hand(quantile):
    random, run = np.random.default_rng(0), jax.jit(truncation)
    for trial in range(20):
        losses, unknown = random.normal(size=10), random.choice(10, trial % 3, replace=False)
        losses[random.choice(10, trial % 4, replace=False)] = np.nan
        losses[unknown] = np.inf
        uniform = random.random(10).astype(np.float32)
        move = run(standing(losses, unknown), uniform, quantile)
        source = numpy_truncation(losses, unknown, uniform, quantile)
        np.testing.assert_array_equal(move.source, source)
        np.testing.assert_array_equal(move.copies, source != np.arange(10))
        assert not move.afresh.any()


def test_truncation_moves_a_fifth_and_copies_only_the_best_fifth():
    losses = np.random.default_rng(1).permutation(10)
    sources = [truncation(standing(losses), jax.random.uniform(k, (10,)), 0.2) for k in jax.random.split(KEY, 20)]
    assert {tuple(losses[np.asarray(move.copies)]) for move in sources} == {tuple(x for x in losses if x >= 8)}
    assert {int(losses[i]) for move in sources for i in move.source[move.copies]} == {0, 1}


def test_tournament_equals_duels_by_hand():
    random, run = np.random.default_rng(2), jax.jit(tournament)
    for trial in range(20):
        losses = random.normal(size=8)
        losses[random.choice(8, trial % 5, replace=False)] = np.nan
        uniform, choice = random.random((2, 8)).astype(np.float32)
        healthy = [i for i in range(8) if np.isfinite(losses[i])]
        opponent = [(i + 1 + int(uniform[i] * 7)) % 8 for i in range(8)]
        beaten_by = {}
        for i in range(8):
            if i not in healthy:
                beaten_by[i] = healthy[int(choice[i] * len(healthy))]
            elif opponent[i] in healthy and losses[opponent[i]] < losses[i]:
                beaten_by[i] = opponent[i]
        source = np.arange(8)
        for i in range(8):
            while source[i] in beaten_by:
                source[i] = beaten_by[source[i]]
        move = run(standing(losses), uniform, choice)
        np.testing.assert_array_equal(move.source, source)
        np.testing.assert_array_equal(move.copies, [i in beaten_by for i in range(8)])


def test_a_tournament_moves_half_of_the_population_where_truncation_moves_a_fifth():
    losses = standing(np.arange(20))
    draws = jax.random.uniform(KEY, (200, 2, 20))
    moved = jax.vmap(lambda u: tournament(losses, *u).copies.mean())(draws).mean()
    # The i-th best of n loses to i of the n - 1 others: half of the duels.
    assert abs(moved - 0.5) < 0.02
    assert truncation(losses, draws[0, 0], 0.2).copies.mean() == 0.2


@pytest.mark.parametrize("exploit", [lambda s, u: truncation(s, u, 0.2), lambda s, u: tournament(s, u, u)])
def test_failed_members_copy_a_healthy_one_or_start_afresh(exploit):
    uniform = jnp.linspace(0, 0.99, 5)
    move = exploit(standing([np.nan, np.inf, 3.0, -np.inf, np.nan]), uniform)
    assert move.source.tolist() == [2, 2, 2, 2, 2] and move.copies.tolist() == [True, True, False, True, True]
    move = exploit(standing([np.nan] * 4 + [np.inf], unknown=[4]), uniform)
    assert move.afresh.tolist() == [True] * 4 + [False] and not move.copies.any()


# Explore.


def draws(n, dims, seed=0):
    u = np.random.default_rng(seed).random((3, n, dims)).astype(np.float32)
    return Draws(*map(jnp.asarray, u), jnp.asarray(u[0, :, 0]))


def natives(space, unit):
    hparams = jax.device_get(space.decode(unit))
    return [space.native(hparams, i) for i in range(len(unit))]


def test_factors_multiply_the_values_themselves():
    unit = SPACE.sample(KEY, 200)
    for factor in (0.8, 1.2):
        after = natives(SPACE, multiplied(SPACE, unit, jnp.full(unit.shape, factor)))
        for old, new in zip(natives(SPACE, unit), after, strict=True):
            for name, low, high in (("linear", 1, 5), ("log", 1e-4, 1), ("around_zero", -1, 1)):
                assert np.isclose(new[name], np.clip(old[name] * factor, low, high), rtol=1e-4, atol=1e-6)
            for name, low, high in (("few", 1, 8), ("many", 16, 1024)):
                sign = 1 if factor > 1 else -1
                by = max(1, round(old[name] * 0.2 + 1e-4 * (factor < 1)))
                assert abs(new[name] - np.clip(old[name] + sign * by, low, high)) <= (old[name] * 0.2 % 1 == 0.5)
            levels = (16, 64, 256)
            at = np.clip(levels.index(old["ordinal"]) + (1 if factor > 1 else -1), 0, 2)
            assert new["ordinal"] == levels[at] and new["option"] == old["option"]


def test_perturb_chooses_between_the_factors_and_resamples_a_quarter():
    unit = jnp.full((4000, SPACE.dims), 0.5)
    moved = perturb(SPACE, unit, draws(4000, SPACE.dims), jnp.array([0.8, 1.2]), jnp.float32(0.25))
    values = np.asarray(SPACE.decode(moved)["linear"])
    down, up = np.isclose(values, 2.4), np.isclose(values, 3.6)
    np.testing.assert_allclose([down.mean(), up.mean()], 0.375, atol=0.03)
    assert np.unique(values[~down & ~up]).size > 900
    options = np.asarray(SPACE.decode(moved)["option"])
    np.testing.assert_allclose(np.mean(options != 1), 0.25 * 2 / 3, atol=0.03)
    never = perturb(SPACE, unit, draws(4000, SPACE.dims), jnp.array([1.2]), jnp.float32(0))
    assert np.allclose(SPACE.decode(never)["log"], 1e-2 * 1.2, rtol=1e-4)


def test_resample_draws_at_least_one_value_anew_and_leaves_the_others():
    unit = SPACE.sample(KEY, 4000)
    moved = resample(SPACE, unit, draws(4000, SPACE.dims), jnp.float32(0.25))
    changed = np.asarray(moved != unit)
    assert changed.any(1).all()
    np.testing.assert_allclose(changed.mean(), 0.25 + 0.75 / SPACE.dims, atol=0.02)
    np.testing.assert_array_equal(moved[changed], draws(4000, SPACE.dims).unit[changed])


def test_additive_noise_is_normal_and_reflected():
    u, tree = draws(1000, 2), hpo.Space({"x": hpo.Float(0, 1), "c": hpo.Categorical((1, 2))})
    unit = jnp.tile(jnp.array([0.2, 0.1]), (1000, 1))
    moved = add(tree, unit, u, jnp.float32(0.2), jnp.float32(0))
    np.testing.assert_allclose(moved[:, 1], np.abs(0.1 + 0.2 * norm.ppf(u.which[:, 1])), atol=1e-5)
    assert (moved[:, 0] == np.float32(0.2)).all()


def test_another_branch_brings_hyperparameters_of_its_own():
    unit = jnp.tile(jnp.array([0.25, 0.5, 0.5, 0.5]), (2000, 1))[:, : CONDITIONAL.dims]
    u = draws(2000, CONDITIONAL.dims)
    moved = perturb(CONDITIONAL, unit, u, jnp.array([1.0]), jnp.float32(0.25))
    switch = int(np.flatnonzero(CONDITIONAL.categorical)[0])
    below = np.flatnonzero(CONDITIONAL.parent == switch)
    switched = np.asarray(CONDITIONAL.level(moved)[:, 0] != CONDITIONAL.level(unit)[:, 0])
    np.testing.assert_allclose(switched.mean(), 0.125, atol=0.03)
    np.testing.assert_array_equal(moved[switched][:, below], u.unit[switched][:, below])
    same = np.isclose(moved[~switched][:, below], 0.5)
    np.testing.assert_allclose(same.mean(), 0.75, atol=0.03)


# The population.

TOY = hpo.Trainable(
    init=lambda key, h: jnp.array([0.9, 0.9]),
    step=lambda key, theta, h: theta - 0.01 * 2 * h["h"] * theta,
    evaluate=lambda theta, h: (theta**2).sum() - 1.2,
)
TOY_SPACE = {"h": hpo.Array(2, 0.0, 1.0)}
TOY_START = [{"h": [1.0, 0.0]}, {"h": [0.0, 1.0]}]


def test_the_toy_of_the_paper():
    """Jaderberg et al., Figure 2: members that train alone stay at 0.39 of 1.2."""
    method = hpo.pbt(TOY_SPACE, every=4, population=2, max_steps=200, explore="additive")
    study = jax.jit(jax.vmap(hpo.study(TOY, method, initial=TOY_START), (0, None)))
    keys, settings = jax.random.split(jax.random.key(0), 20), method.settings
    reached = lambda s: -np.asarray(study(keys, s)[1].losses)[:, -1].min(-1)  # noqa: E731
    assert np.median(reached(settings)) > 1.18
    alone = reached(settings._replace(quantile=jnp.float32(0)))
    np.testing.assert_allclose(alone, 1.2 - 0.81 - 0.81 * 0.98**400, atol=1e-4)
    late = reached(settings._replace(burn_in=jnp.float32(200)))
    np.testing.assert_array_equal(alone, late)


@pytest.fixture(scope="module")
def toy_rows():
    method = hpo.pbt(TOY_SPACE, every=3, population=5, max_steps=20)
    return hpo.minimize(TOY, method, key=KEY)


def test_a_member_that_goes_on_keeps_its_id_and_its_hyperparameters(toy_rows):
    t = toy_rows.trials
    assert toy_rows.stopped == "method" and t.steps.reshape(-1, 5)[:, 0].tolist() == [3, 6, 9, 12, 15, 18, 20]
    seen = {}
    for id, parent, unit in zip(t.id.tolist(), t.parent.tolist(), t.unit, strict=True):
        if parent == id:
            np.testing.assert_array_equal(unit, seen[id])
        else:
            assert id not in seen and (parent in seen or parent == -1)
        seen[id] = unit
    fresh = t.id[t.parent != t.id]
    assert fresh.tolist() == list(range(len(fresh))) and len(fresh) == 5 + 6
    assert (t.parent[5:] >= 0).all()


class Fragile(Counter):
    """Fails wherever `n` is at least 4, or everywhere; a failed state stays so."""

    def __init__(self, limit=4):
        super().__init__()
        self.limit = limit

    def step(self, key, state, h):
        after = super().step(key, state, h)
        return {**after, "value": jnp.where(h["n"] >= self.limit, jnp.nan, after["value"])}


@pytest.mark.parametrize("exploit", ["truncation", "tournament"])
def test_nan_never_spreads(exploit):
    method = hpo.pbt(MIXED, every=2, population=8, exploit=exploit)
    result = hpo.minimize(Fragile().trainable, method, key=KEY, rounds=12)
    t, failed = result.trials, result.trials.failed
    assert failed[:8].any() and not failed[:8].all()
    last_loss = {}
    for id, parent, loss in zip(t.id.tolist(), t.parent.tolist(), t.loss.tolist(), strict=True):
        assert parent == -1 or np.isfinite(last_loss[parent]), "nobody goes on from a state that failed"
        last_loss[id] = loss
    np.testing.assert_array_equal(failed, t.hparams["n"] >= 4)
    assert (t.parent[8:] >= 0).all()


def test_where_nobody_is_healthy_all_start_afresh():
    method = hpo.pbt(MIXED, every=2, population=4)
    with pytest.raises(hpo.AllTrialsFailed) as error:
        hpo.minimize(Fragile(limit=0).trainable, method, key=KEY, rounds=3)
    t = error.value.result.trials
    assert t.id.tolist() == list(range(12)) and (t.parent == -1).all() and (t.steps == 2).all()
    assert len(np.unique(t.unit[:, 0])) == 12


@pytest.mark.parametrize("exploit, lanes", [("truncation", (2, 4)), ("tournament", (3,))])
def test_fewer_lanes_give_the_same(exploit, lanes):
    method = hpo.pbt({"x": hpo.Float(-5.0, 5.0)}, every=3, population=6, exploit=exploit, quantile=0.5)
    wide, *narrow = (
        jax.device_get(jax.jit(hpo.study(Counter().trainable, method, 6, lanes=n))(KEY)) for n in (6, *lanes)
    )
    assert (wide[1].parent[1:] != wide[1].trials.id[1:]).sum() >= 10
    for other in narrow:
        assert_same(wide, other)


def test_rows_that_are_late_or_unknown_do_no_harm():
    method = hpo.pbt(TOY_SPACE, every=3, population=4)
    ask, tell = jax.jit(method.ask), jax.jit(method.tell)
    first, state = ask(jax.random.key(0), method.init(KEY))
    second, ahead = ask(jax.random.key(1), state)
    assert second.id.tolist() == first.id.tolist(), "who has not been heard of goes on"
    told = tell(ahead, second, jnp.arange(4.0))
    assert_same(tell(told, first, 9 - jnp.arange(4.0)), told)
    in_order = tell(tell(ahead, first, 9 - jnp.arange(4.0)), second, jnp.arange(4.0))
    assert_same(in_order.members, told.members)
    third, _ = ask(jax.random.key(2), told)
    assert third.id.tolist() == [0, 1, 2, 4] and third.source.tolist() == [0, 1, 2, 0]
    stranger = first._replace(aux=first.aux._replace(trial=first.aux.trial + 50))
    assert_same(tell(told, stranger, -jnp.arange(4.0)), told)


def test_known_results_and_initial_points():
    known = [({"h": [0.5, 0.5]}, -9.0), ({"h": [0.1, 0.5]}, float("nan"))]
    method = hpo.pbt(TOY_SPACE, every=3, population=4)
    result = hpo.minimize(TOY, method, key=KEY, rounds=4, initial=[*TOY_START, *known])
    t = result.trials
    assert t.id[:2].tolist() == [-1, -2] and t.parent[:2].tolist() == [-1, -1]
    np.testing.assert_allclose(t.hparams["h"][2:4], [[1, 0], [0, 1]], atol=1e-6)
    plain = hpo.minimize(TOY, method, key=KEY, rounds=4, initial=TOY_START)
    np.testing.assert_array_equal(plain.trials.loss, t.loss[2:])
    with pytest.raises(ValueError, match="was not trained in the study"):
        result.best_schedule()


# PB2.


def reference_posterior(x, time, y, at, now, kernel):
    """Mean and standard deviation by the textbook."""
    length, epsilon, noise = kernel

    def k(a, s, b, t):
        u = np.sqrt(5 * ((a[:, None] - b) ** 2).sum(-1)) / length
        return (1 + u + u * u / 3) * np.exp(-u) * (1 - epsilon) ** (np.abs(s[:, None] - t) / 2)

    gram, cross = k(x, time, x, time) + noise * np.eye(len(x)), k(at, np.full(len(at), now), x, time)
    scale = (y @ np.linalg.solve(gram, y) + 1) / (len(y) + 1)
    left = 1 - np.einsum("ij,ji->i", cross, np.linalg.solve(gram, cross.T))
    evidence = -np.linalg.slogdet(gram)[1] / 2 - (len(y) + 1) / 2 * np.log(scale)
    return cross @ np.linalg.solve(gram, y), np.sqrt(scale * left), evidence


def seen_of(space, unit, round, change, population=4):
    empty = time_varying.empty(space, population)
    return time_varying.saw(
        empty, jnp.asarray(unit), jnp.asarray(round), jnp.asarray(change), jnp.ones(len(unit), bool)
    )


@functools.cache
def bandit_data():
    random = np.random.default_rng(3)
    unit, round = random.random((40, 2)).astype(np.float32), np.repeat(np.arange(10, dtype=np.int32), 4)
    return unit, round, ((unit[:, 0] - 0.7) ** 2 - 0.1 * round * unit[:, 1]).astype(np.float32)


def test_the_process_equals_the_textbook():
    space = hpo.Space({"x": hpo.Array(2, 0.0, 1.0)})
    unit, round, change = bandit_data()
    seen = seen_of(space, unit, round, change)
    model = jax.jit(lambda s: time_varying.fit(space, s))(seen)
    y = (change - change.mean()) / change.std()
    evidences = {}
    for length in time_varying.LENGTHSCALES:
        for epsilon in time_varying.EPSILONS:
            for noise in time_varying.NOISES:
                kernel = length * np.sqrt(2), epsilon, noise
                evidences[kernel] = reference_posterior(unit, round, y, unit[:3], 10, kernel)[2]
    best = max(evidences, key=evidences.get)
    np.testing.assert_allclose([float(x) for x in model.kernel], best, rtol=1e-5)
    np.testing.assert_allclose(model.evidence, evidences[best], rtol=1e-3)


def test_copies_go_where_the_bound_is_lowest_and_keep_out_of_each_others_way():
    space = hpo.Space({"x": hpo.Array(2, 0.0, 1.0)})
    unit, round, change = bandit_data()
    seen, members = seen_of(space, unit, round, change), jnp.asarray(unit[-4:])
    copies = jnp.array([True, True, False, False])
    propose = jax.jit(
        lambda members, stays: time_varying.propose(KEY, space, seen, jnp.int32(10), members, copies, stays)
    )
    chosen = np.asarray(propose(members, jnp.zeros(4, bool)))
    options = np.asarray(time_varying.candidates(KEY, space, members, copies))
    kernel = [float(x) for x in jax.jit(lambda s: time_varying.fit(space, s).kernel)(seen)]
    y = (change - change.mean()) / change.std()
    mean, deviation, _ = reference_posterior(unit, round, y, options, 10, kernel)
    beta = 0.2 + np.log(0.4 * 40)
    best = options[np.argmin(mean - np.sqrt(beta) * deviation)]
    np.testing.assert_array_equal(chosen[0], best)
    np.testing.assert_array_equal(chosen[2:], members[2:])
    assert np.abs(chosen[1] - chosen[0]).max() > 0
    moved = propose(members.at[2].set(best), jnp.array([False, False, True, False]))
    assert np.abs(np.asarray(moved)[0] - best).max() > 0, "a point that is being tried is not tried again"


def test_the_ring_keeps_the_last_stretches():
    space = hpo.Space({"x": hpo.Float(0.0, 1.0)})
    seen, rows = time_varying.empty(space, 2), len(time_varying.empty(space, 2).mask)
    assert rows == 32
    for i in range(0, 50, 5):
        values = jnp.arange(i, i + 5.0)
        active = values % 7 != 3
        seen = time_varying.saw(seen, values[:, None] / 50, values.astype(jnp.int32), values, active)
    kept = [i for i in range(50) if i % 7 != 3][-32:]
    assert sorted(seen.change.tolist()) == kept and sorted(seen.round.tolist()) == kept


def test_the_bandit_finds_what_moves_with_time():
    """The best point moves as training goes on; the others do not learn where it is."""
    drift = hpo.Trainable(
        init=lambda key, h: {"loss": jnp.float32(0), "time": jnp.float32(0)},
        step=lambda key, s, h: {
            "loss": s["loss"] + ((h["x"] - 0.2 - 0.01 * s["time"]) ** 2).mean(),
            "time": s["time"] + 1,
        },
        evaluate=lambda s, h: s["loss"],
    )

    def final(explore):
        method = hpo.pbt({"x": hpo.Array(2, 0.0, 1.0)}, every=2, population=6, max_steps=60, explore=explore)
        _, trace = jax.jit(jax.vmap(hpo.study(drift, method)))(jax.random.split(KEY, 7))
        return float(np.median(np.asarray(trace.losses)[:, -1].min(-1)))

    assert final("gp") < 0.7 * min(final("resample"), final("perturb"))


# Schedules.


@pytest.fixture(scope="module")
def walk():
    """A walk with noise of its own at every step, so only the same keys give the same walk."""
    trainable = hpo.Trainable(
        init=lambda key, h: {"at": jax.random.normal(key, (2,)) + h["clip"], "key": key},
        step=lambda key, s, h: {"at": s["at"] * (1 - 0.2 * h["lr"]) + 0.01 * jax.random.normal(key, (2,)), "key": key},
        evaluate=lambda s, h: (s["at"] ** 2).sum(),
    )
    method = hpo.pbt(MIXED, every=4, population=6, quantile=0.4)
    return trainable, hpo.minimize(trainable, method, key=KEY, rounds=12)


def test_every_survivors_schedule_replays_to_what_it_was(walk):
    trainable, result = walk
    schedules = result.schedule()
    assert len(schedules) == 6
    finals = [s.loss[-1] for s in schedules]
    np.testing.assert_array_equal(finals, np.sort(result.trials.loss[-6:]))
    assert max(len(s) for s in schedules) >= 3
    for schedule in schedules:
        assert schedule.stop[-1] == 48 and (np.diff(schedule.stop) > 0).all() and (schedule.stop % 4 == 0).all()
        np.testing.assert_allclose(hpo.replay(trainable, schedule, KEY).loss, schedule.loss[-1], rtol=1e-5)
    best = result.best_schedule()
    again = hpo.replay(trainable, best, KEY)
    np.testing.assert_allclose(again.loss, result.best_loss, rtol=1e-5)
    np.testing.assert_allclose(again.state["at"], result.best_state["at"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(
        jax.random.key_data(again.state["key"]), jax.random.key_data(result.best_state["key"])
    )


def test_segments_are_native_and_join(walk):
    schedule = max(walk[1].schedule(), key=len)
    segments = schedule.segments
    assert segments[0].start == 0
    assert all(a.stop == b.start and a.id < b.id for a, b in zip(segments, segments[1:], strict=False))
    records = walk[1].trials
    for segment in segments:
        row = np.flatnonzero(records.id == segment.id)[0]
        assert segment.hparams == walk[1].space.native(records.hparams, row)
    lines = str(schedule.table()).splitlines()
    assert len(lines) == 2 + len(segments) and str(segments[-1].stop) in lines[-1]
    assert repr(schedule).startswith(f"Schedule(segments={len(schedule)}, steps=48, loss=")


def test_other_keys_give_other_networks_in_one_program(walk):
    trainable, result = walk
    schedule = result.schedule()[0]
    keys = jnp.stack([KEY, *jax.random.split(jax.random.key(1), 7)])
    losses = jax.vmap(lambda k: hpo.replay(trainable, schedule, k).loss)(keys)
    np.testing.assert_allclose(losses[0], schedule.loss[-1], rtol=1e-5)
    assert len(np.unique(losses)) == 8
    counter, schedules = Counter(), result.schedule()
    assert len({len(s) for s in schedules}) >= 2
    hpo.replay(counter.trainable, schedules[0], KEY)
    traces = counter.traces
    for schedule in schedules[1:]:
        hpo.replay(counter.trainable, schedule, KEY)
    assert counter.traces == traces


def test_a_constant_of_another_space_is_not_mistaken(walk):
    trainable, _ = walk
    for clip in (1.0, 7.0):
        method = hpo.pbt({"lr": MIXED["lr"], "clip": clip}, every=4, population=4)
        result = hpo.minimize(trainable, method, key=KEY, rounds=2)
        schedule = result.schedule()[0]
        np.testing.assert_allclose(hpo.replay(trainable, schedule, KEY).loss, schedule.loss[-1], rtol=1e-5)


def test_hyperband_has_schedules_of_one_segment():
    method = hpo.hyperband(MIXED, max_steps=9, batch=6)
    result = hpo.minimize(Counter().trainable, method, key=KEY)
    schedules = result.schedule()
    assert [(len(s), s.stop[-1]) for s in schedules] == [(1, 9)] * 5
    assert hpo.replay(Counter().trainable, schedules[0], KEY).loss == schedules[0].loss[-1]
    best = result.best_schedule()
    assert best.loss[-1] == result.best_loss == hpo.replay(Counter().trainable, best, KEY).loss


def test_black_boxes_have_no_schedule():
    result = hpo.minimize(lambda key, h: h["x"], hpo.random({"x": hpo.Float(0, 1)}), key=KEY, trials=4)
    with pytest.raises(ValueError, match="carry no training steps"):
        result.schedule()


def test_resumed_studies_have_the_same_schedules(tmp_path):
    method = hpo.pbt({"x": hpo.Float(-5.0, 5.0)}, every=2, population=5)
    study = functools.partial(hpo.minimize, Counter().trainable, method, key=KEY)
    straight = study(rounds=8)
    study(rounds=3, directory=tmp_path)
    resumed = study(rounds=8, directory=tmp_path)
    assert_same(straight.trials, resumed.trials)
    for a, b in zip(straight.schedule(), resumed.schedule(), strict=True):
        assert_same(list(a.segments), list(b.segments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"every": 0}, "every must be at least 1"),
        ({"every": 1, "population": 1}, "population must be at least 2"),
        ({"every": 1, "max_steps": 0}, "max_steps must be at least 1"),
        ({"every": 1, "exploit": "best"}, "exploit must be one of"),
        ({"every": 1, "explore": "pb2"}, "explore must be one of"),
        ({"every": 1, "quantile": 0.6}, r"quantile must be in \[0, 0.5\]"),
        ({"every": 1, "factors": 1.2}, "factors must be a tuple"),
        ({"every": 1, "factors": (0.0, 1.0)}, "factors must be in"),
        ({"every": 1, "resample_probability": 2}, "resample_probability must be in"),
        ({"every": 1, "noise": -1}, "noise must be in"),
        ({"every": 1, "burn_in": -1}, "burn_in must be at least 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        hpo.pbt(TOY_SPACE, **arguments)
