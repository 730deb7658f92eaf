"""Annealing: its rules in NumPy, the distribution that it samples, invariances, and what it must survive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.draws import halves, uniform
from jaxhpo.method import black_box
from jaxhpo.stochastic.annealing import Row, Settings, annealing, ladder
from jaxhpo.stochastic.metropolis import Spread, accepts, exchanges, follows
from jaxhpo.stochastic.walk import proposals, repaired, starts, triangular

REALS = hpo.Space({"x": hpo.Array(3, -1.0, 1.0)})
MIXED = hpo.Space(
    {
        "x": hpo.Float(0.0, 1.0),
        "n": hpo.Int(1, 4),
        "log": hpo.Int(1, 100, log=True),
        "kind": hpo.Categorical(("a", "b", "c")),
        "only": hpo.Categorical(("one",)),
        "branch": hpo.OneOf(left={"y": hpo.Float(0.0, 1.0), "z": hpo.Int(0, 5)}, right={"w": hpo.Float(0.0, 1.0)}),
    }
)


@functools.cache
def jitted(method_part):
    return jax.jit(method_part)


def settings_of(method, **changes):
    return method.settings._replace(**{name: jnp.float32(value) for name, value in changes.items()})


def bits(seed, *shape):
    return jax.random.bits(jax.random.key(seed), shape, jnp.uint32)


class Reference:
    """Chains in plain NumPy that are told one row each, in double precision."""

    def __init__(self, state, reheats):
        s = jax.tree.map(np.asarray, state)
        self.settings, self.reheats = Settings(*(float(x) for x in s.settings)), reheats
        self.unit, self.loss, self.step = s.unit.copy(), s.loss.astype(float), s.step.astype(float)
        self.rung, n = s.rung.copy(), len(s.loss)
        self.age, self.stale, self.record = np.zeros(n), np.zeros(n), np.full(n, np.inf)
        self.log, self.weight, self.turn = 0.0, 0.0, {}

    def temperature(self, i):
        s, n = self.settings, len(self.loss)
        top = s.temperature * (s.final / s.temperature) ** ((n - 1 - self.rung[i]) / max(n - 1, 1))
        return max(top / (1 + s.cooling * self.age[i]), s.final)

    def tell(self, chain, units, losses, uniforms, may_turn):
        s, losses = self.settings, np.where(np.isfinite(losses), losses, np.inf)
        both = np.isfinite(losses) & np.isfinite(self.loss[chain])
        known = [np.log(abs(d)) for d in losses[both] - self.loss[chain][both] if d != 0]
        self.weight = max(min(self.weight + len(known), s.memory * len(self.loss)), len(known))
        self.log += sum(x - self.log for x in known) / max(self.weight, 1)
        heat = [self.temperature(i) * np.exp(self.log) for i in range(len(self.loss))]
        for i, unit, loss, u, turns in zip(chain, units, losses, uniforms, may_turn, strict=True):
            self.turn.pop(i, None)
            self.age[i] += 1
            walks = np.isfinite(self.loss[i])
            moves = loss <= self.loss[i] or u < np.exp(-(loss - self.loss[i]) / heat[i]) if walks else np.isfinite(loss)
            if walks:
                self.step[i] *= np.exp(s.adaptation * ((1 if moves else 0) - s.target) / (1 - s.target))
                self.step[i] = np.clip(self.step[i], 1e-7, 1)
            if moves:
                self.unit[i], self.loss[i] = unit, loss
            elif walks and turns:
                self.turn[i] = self.unit[i] - unit
            if not self.reheats:
                continue
            better = self.loss[i] < self.record[i]
            self.record[i] = min(self.record[i], self.loss[i])
            self.stale[i] = 0 if better else self.stale[i] + 1
            if self.stale[i] > s.patience and np.isfinite(self.loss[i]):
                self.age[i], self.stale[i], self.step[i], self.record[i] = 0, 0, s.step, self.loss[i]


@pytest.mark.parametrize("schedule", ["ladder", "reheat"])
def test_chains_move_as_in_numpy(schedule):
    method = annealing(REALS, chains=4, schedule=schedule, batch=4)
    changes = {"follow": 0, "exchange": 0, "patience": 4, "mirror": 0.5, "temperature": 2.0, "memory": 3}
    state = method.init(jax.random.key(3), settings_of(method, **changes))
    reference, rng, reheated = Reference(state, schedule == "reheat"), np.random.default_rng(0), 0
    for now in range(40):
        trials, state = jitted(method.ask)(jax.random.key(now), state)
        for i, turn in reference.turn.items():
            mirrored = np.asarray(reference.unit[i] + turn, np.float64)
            mirrored = np.minimum(np.abs(mirrored - 2 * np.round(mirrored / 2)), 1)
            np.testing.assert_allclose(trials.unit[i], mirrored, atol=1e-5)
        assert not (np.asarray(trials.aux.may_turn) & [i in reference.turn for i in range(4)]).any()
        losses = np.round(((np.asarray(trials.unit) - 0.3) ** 2).sum(1) * 64) / 64
        losses[rng.random(4) < 0.1] = np.nan
        order, told = rng.permutation(4), int(rng.integers(1, 5))
        rows = jax.tree.map(lambda x: x[order], trials)  # noqa: B023
        rows = rows._replace(active=jnp.arange(4) < told)
        state = jitted(method.tell)(state, rows, jnp.asarray(losses[order], jnp.float32))
        part = lambda x: np.asarray(x)[order][:told]  # noqa: B023, E731
        aged = reference.age.copy()
        reference.tell(*map(part, (trials.aux.chain, trials.unit, losses, trials.aux.uniform, trials.aux.may_turn)))
        reheated += (reference.age < aged).sum()
        for name in ("unit", "loss", "step", "age", "stale", "record"):
            np.testing.assert_allclose(getattr(state, name), getattr(reference, name), rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(state.spread.log, reference.log, rtol=1e-3, atol=1e-4)
        expected = [ladder(state.settings, state.rung, state.age, 4)[i] for i in range(4)]
        np.testing.assert_allclose(expected, [reference.temperature(i) for i in range(4)], rtol=1e-4)
        # Turns of rows that were not told were used up by the ask.
        reference.turn = {i: turn for i, turn in reference.turn.items() if i in part(trials.aux.chain)}
    assert (reheated > 0) == (schedule == "reheat")


def test_ladder_is_geometric_and_cools_to_its_end():
    settings = settings_of(annealing(REALS), temperature=1.0, final=0.01, cooling=1.0)
    np.testing.assert_allclose(ladder(settings, jnp.arange(3), jnp.zeros(3), 3), [0.01, 0.1, 1.0], rtol=1e-5)
    np.testing.assert_allclose(ladder(settings, jnp.arange(3), jnp.full(3, 4.0), 3), [0.01, 0.02, 0.2], rtol=1e-5)
    np.testing.assert_allclose(ladder(settings, jnp.zeros(1, jnp.int32), jnp.ones(1), 1), [0.5], rtol=1e-5)


@pytest.mark.parametrize("odd", [0, 1])
def test_exchanges_are_metropolis_on_pairs_of_neighbours(odd):
    rng, n = np.random.default_rng(odd), 7
    temperature, loss, u = np.sort(rng.random(n)), rng.normal(size=n), rng.random(n)
    loss[2] = np.inf
    rung, scale = rng.permutation(n), 3.0
    heat = temperature[rung]
    expected, holder = np.zeros(n, bool), np.argsort(rung)
    for low in range(odd, n - 1, 2):
        i, j = holder[low], holder[low + 1]
        drive = (1 / heat[i] - 1 / heat[j]) * (loss[i] - loss[j]) / scale
        expected[[i, j]] = np.isfinite(drive) and u[low] < np.exp(min(drive, 0))
    spread = Spread(jnp.log(scale), jnp.float32(1))
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    swaps, other = exchanges(f32(heat), f32(loss), jnp.asarray(rung, jnp.int32), f32(u), jnp.int32(odd), spread)
    np.testing.assert_array_equal(swaps, expected)
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(np.abs(rung[np.asarray(other)] - rung)[expected], 1)


def test_metropolis_rule():
    spread = Spread(jnp.log(2.0), jnp.float32(5))
    difference, u = jnp.array([-1.0, 0.0, 1.0, 1.0, jnp.inf]), jnp.array([0.99, 0.99, 0.36, 0.37, 1e-6])
    assert accepts(difference, u, jnp.float32(0.5), spread).tolist() == [True, True, True, False, False]
    none = Spread(jnp.float32(0), jnp.float32(0))
    assert accepts(difference, u, jnp.float32(0.5), none).tolist() == [True, True, False, False, False]
    loss, other = jnp.array([1.0, 1.0, jnp.inf, 1.0]), jnp.array([0.0, 2.0, 0.0, jnp.inf])
    assert follows(jnp.float32(0.5), loss, other, jnp.full(4, 0.37), spread).tolist() == [True, False, False, False]


def run(method, settings, losses, rounds, key=0):
    """The states after asks, and those after tells."""
    state, asked, told = method.init(jax.random.key(key), settings), [], []
    for now in range(rounds):
        trials, state = jitted(method.ask)(jax.random.key(1000 * key + now), state)
        asked.append((trials, state))
        state = jitted(method.tell)(state, trials, losses(trials))
        told.append(state)
    return asked, told


def bowl(trials):
    return ((trials.unit - 0.3) ** 2).sum(1)


def test_exchange_and_follow_are_switched_by_their_settings():
    method = annealing(REALS, chains=6, batch=6)
    for exchange, follow in ((0, 0), (1, 0), (0, 1)):
        asked, told = run(method, settings_of(method, exchange=exchange, follow=follow, temperature=5.0), bowl, 12)
        moved = [np.asarray(a.rung != b.rung).sum() for (_, b), a in zip(asked[1:], told, strict=False)]
        copied = [np.asarray(a.loss != b.loss).sum() for (_, b), a in zip(asked[1:], told, strict=False)]
        assert (sum(moved) > 5) == bool(exchange) and all(m % 2 == 0 for m in moved)
        assert (sum(copied) > 5) == bool(follow)
        for (_, b), a in zip(asked[1:], told, strict=False):
            assert sorted(b.rung.tolist()) == list(range(6))
            rows = {(*u, x) for u, x in zip(a.unit.tolist(), a.loss.tolist(), strict=True)}
            assert {(*u, x) for u, x in zip(b.unit.tolist(), b.loss.tolist(), strict=True)} <= rows
            np.testing.assert_allclose(np.sort(b.step), np.sort(a.step)) if not follow else None
    reheat = annealing(REALS, chains=6, schedule="reheat", batch=6)
    asked, told = run(reheat, reheat.settings, bowl, 5)
    assert all((np.asarray(a.loss) == np.asarray(b.loss)).all() for (_, b), a in zip(asked[1:], told, strict=False))


ENERGY = jnp.array([0.0, 1.0, 0.5, 2.0, 1.5])


@functools.cache
def visits(schedule, exchange, chains):
    """Levels and rungs float[studies, rounds, chains] at fixed temperatures, and the temperatures of the rungs."""
    method = annealing({"k": hpo.Categorical(tuple("abcde"))}, chains=chains, schedule=schedule, batch=chains)
    fixed = {"cooling": 0, "mirror": 0, "follow": 0, "patience": 1e9, "memory": 1e9, "temperature": 2.0, "final": 0.5}
    settings = settings_of(method, exchange=exchange, **fixed)

    def study(key):
        def step(state, now):
            trials, state = method.ask(jax.random.fold_in(key, now), state)
            state = method.tell(state, trials, ENERGY[trials.hparams["k"]])
            return state, (method.space.level(state.unit)[:, 0], state.rung)

        state, (level, rung) = jax.lax.scan(step, method.init(key, settings), jnp.arange(400))
        rungs = jnp.arange(chains)
        heat = ladder(settings, rungs, jnp.zeros(chains), chains) * jnp.exp(state.spread.log)
        return level[100:], rung[100:], heat

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(study))(jax.random.split(jax.random.key(0), 400)))


@pytest.mark.parametrize("schedule, exchange", [("reheat", 0), ("ladder", 0), ("ladder", 1)])
def test_at_fixed_temperatures_levels_are_visited_as_boltzmann_says(schedule, exchange):
    level, rung, heat = visits(schedule, exchange, 3)
    for place in range(3) if schedule == "ladder" else [2]:
        found = np.bincount(level[rung == place], minlength=5) / (rung == place).sum()
        weight = np.exp(-np.asarray(ENERGY) / heat[:, place : place + 1])
        expected = (weight / weight.sum(axis=1, keepdims=True)).mean(axis=0)
        assert np.abs(found - expected).max() < 0.01, (place, found, expected)
        assert np.abs(found - 0.2).max() > 0.1


def test_random_numbers_have_their_distributions():
    drawn = bits(0, 100_000)
    step, u, (a, b) = np.asarray(triangular(drawn)), np.asarray(uniform(drawn)), halves(drawn)
    assert step.min() > -1 and step.max() < 1
    np.testing.assert_allclose([step.mean(), step.var(), np.abs(step).mean()], [0, 1 / 6, 1 / 3], atol=0.005)
    for x in (u, np.asarray(a), np.asarray(b)):
        assert x.min() > 0 and x.max() < 1
        np.testing.assert_allclose(np.quantile(x, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert triangular(jnp.array([0xFFFFFFFF, 0], jnp.uint32)).tolist() == [4095 / 4096, -4095 / 4096]


def test_real_proposals_as_in_numpy():
    rng, n = np.random.default_rng(0), 200
    unit, step, turn = (rng.random(s).astype(np.float32) for s in ((n, 3), n, (n, 3)))
    turns, pick, drawn = rng.random(n) < 0.2, rng.random(n).astype(np.float32), np.asarray(bits(1, n, 3))
    rate = np.array([0.1, 0.5, 0.0], np.float32)
    expected = unit.astype(float)
    for i in range(n):
        chosen = (drawn[i] % 256 + 0.5) / 256 < rate
        if not chosen.any():
            chosen[int(pick[i] * 3)] = True
        move = step[i] * ((drawn[i] >> 20).astype(int) + (drawn[i] // 256 % 4096).astype(int) - 4095) / 4096
        expected[i] += turn[i] if turns[i] else np.where(chosen, move, 0)
    expected = np.abs(expected - 2 * np.round(expected / 2))
    found = proposals(REALS, *map(jnp.asarray, (unit, step, turns, turn, drawn, pick, rate)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("turns", [False, True])
def test_mixed_proposals_always_decode_to_another_point(turns):
    n = 3000
    unit = MIXED.sample(jax.random.key(0), n)
    rate = jnp.where(MIXED.categorical, 0.15, 0.5)
    move = jax.jit(functools.partial(proposals, MIXED))
    args = (jnp.full(n, 0.02), jnp.full(n, turns), jnp.zeros_like(unit), bits(2, *unit.shape))
    after = np.asarray(move(unit, *args, jax.random.uniform(jax.random.key(3), (n,)), rate))
    assert ((after >= 0) & (after <= 1)).all()
    before, alive, reborn = (np.asarray(x) for x in (unit, MIXED.active(unit), MIXED.active(after)))
    has_levels, changed = MIXED.levels > 0, before != after
    changed[:, has_levels] = np.asarray(MIXED.level(unit)) != np.asarray(MIXED.level(after))
    assert (changed & alive).any(axis=1).all()
    assert not changed[:, MIXED.names.index("only")].any()
    # A branch that comes to life is drawn afresh.
    born = reborn & ~alive
    assert born.any() and abs(after[born].mean() - 0.5) < 0.03 and abs(after[born].std() - 12**-0.5) < 0.03
    if turns:
        # Nothing but the one coordinate that had to: a level up or down, or any other level.
        assert (changed & alive).sum(axis=1).max() == 1
        for name in ("n", "log", "branch.left.z"):
            at = MIXED.names.index(name)
            column = np.flatnonzero(has_levels).tolist().index(at)
            gap = np.abs(np.asarray(MIXED.level(unit) - MIXED.level(after)))[:, column]
            assert gap[changed[:, at] & alive[:, at] & reborn[:, at]].max() == 1


def test_repair_at_the_ends_of_an_integer_goes_inward():
    space = hpo.Space({"n": hpo.Int(0, 2)})
    unit = jnp.array([[0.1], [0.1], [0.9], [0.9]])
    sign = jnp.array([[0], [2**31], [0], [2**31]], jnp.uint32)
    assert space.level(repaired(space, unit, unit, unit, unit, jnp.zeros(4), sign))[:, 0].tolist() == [1, 1, 1, 1]


def test_first_points_are_a_latin_hypercube_and_of_one_chain_the_middle():
    space = hpo.Space({"x": hpo.Array(6, 0.0, 1.0), "c": hpo.Categorical(tuple(range(4)))})
    assert starts(space, jax.random.key(0), 1)[0, space.names.index("x[0]")] == 0.5
    drawn = jax.jit(jax.vmap(lambda key: starts(space, key, 1)[0, 0]))(jax.random.split(jax.random.key(0), 20))
    assert len(set((drawn * 4).astype(int).tolist())) > 1 and space.names[0] == "c"
    unit = np.asarray(starts(space, jax.random.key(0), 8))[:, 1:]
    np.testing.assert_allclose(np.sort(unit, axis=0), np.broadcast_to((np.arange(8) + 0.5)[:, None] / 8, (8, 6)))
    method = annealing(space, chains=8, batch=3)
    asked, told = run(method, method.settings, bowl, 3)
    first = np.concatenate([trials.unit for trials, _ in asked])[:8]
    np.testing.assert_array_equal(first, method.init(jax.random.key(0)).unit)


@pytest.mark.parametrize("chains, batch, schedule", [(1, 1, "ladder"), (4, 4, "ladder"), (3, 5, "reheat")])
def test_neither_scale_nor_offset_of_the_loss_matters(chains, batch, schedule):
    method = annealing(REALS, chains=chains, schedule=schedule, batch=batch)
    # Multiples of a power of 2, so that all differences are exact.
    rounded = lambda trials: jnp.round(bowl(trials) * 1024) / 1024  # noqa: E731
    plain, _ = run(method, method.settings, rounded, 30)
    other, _ = run(method, method.settings, lambda trials: 64 * rounded(trials) - 1000, 30)
    for (a, _), (b, _) in zip(plain, other, strict=True):
        np.testing.assert_array_equal(a.unit, b.unit)


def test_of_several_rows_of_a_chain_the_best_is_the_candidate():
    method = annealing(REALS, chains=2, batch=6)
    state = method.init(jax.random.key(0), settings_of(method, follow=0))
    unit = jnp.linspace(0, 1, 18).reshape(6, 3)
    aux = Row(jnp.array([0, 1, 0, 1, 0, 1]), jnp.full(6, 0.999), jnp.ones(6, bool))
    trials = black_box(REALS, unit, first=jnp.int32(0), aux=aux)
    state = jitted(method.tell)(state, trials, jnp.array([3.0, 5.0, 1.0, jnp.nan, 2.0, 4.0]))
    np.testing.assert_array_equal(state.unit, unit[jnp.array([2, 5])])
    assert state.loss.tolist() == [1.0, 4.0] and state.age.tolist() == [3.0, 3.0]
    before = state.step
    state = jitted(method.tell)(state, trials, jnp.array([0.5, 5.0, 9.0, 6.0, 9.0, 7.0]))
    assert state.loss.tolist() == [0.5, 4.0] and not state.turns.any()
    s = jax.tree.map(float, state.settings)
    growth = [np.exp(s.adaptation * (share - s.target) / (1 - s.target)) for share in (1 / 3, 0)]
    np.testing.assert_allclose(state.step, np.asarray(before) * growth, rtol=1e-5)


def test_chains_without_a_finite_loss_start_afresh_until_they_have_one():
    method = annealing(REALS, chains=2, batch=4)
    asked, told = run(method, method.settings, lambda trials: jnp.full(4, jnp.nan), 60)
    later = np.concatenate([trials.unit for trials, _ in asked[1:]])
    np.testing.assert_allclose([later.mean(), later.std()], [0.5, 12**-0.5], atol=0.04)
    assert np.isinf(told[-1].loss).all()
    trials, state = jitted(method.ask)(jax.random.key(5), told[-1])
    state = jitted(method.tell)(state, trials, jnp.array([jnp.nan, 7.0, 3.0, 4.0]))
    np.testing.assert_array_equal(state.unit, trials.unit[jnp.array([2, 3])])


def test_of_one_chain_a_failed_row_after_padding_is_what_was_rejected():
    method = annealing(REALS, chains=1, batch=2)
    _, told = run(method, method.settings, bowl, 3)
    trials, state = jitted(method.ask)(jax.random.key(9), told[-1])
    aux = trials.aux._replace(may_turn=jnp.ones(2, bool))
    unit = jnp.stack([jnp.full(3, jnp.nan), trials.unit[1]])
    rows = trials._replace(unit=unit, active=jnp.array([False, True]), aux=aux)
    after = jitted(method.tell)(state, rows, jnp.array([0.0, jnp.nan]))
    assert after.turns.all() and after.loss == state.loss
    np.testing.assert_array_equal(after.turn[0], state.unit[0] - trials.unit[1])


DEGENERATE = {
    "one dim": {"x": hpo.Float(0.0, 1.0)},
    "levels": {"a": hpo.Categorical(("x", "y")), "n": hpo.Int(0, 1), "o": hpo.Ordinal((1, 2, 3))},
    "constant": {"a": hpo.Categorical(("x",)), "o": hpo.Ordinal((3,))},
    "wide": {"x": hpo.Array(1000, 0.0, 1.0)},
    "mixed": MIXED,
}


@pytest.mark.parametrize(
    "space, chains, batch, schedule",
    [
        ("one dim", 2, 3, "ladder"),
        ("levels", 2, 2, "ladder"),
        ("constant", 1, 1, "ladder"),
        ("wide", 2, 5, "reheat"),
        ("mixed", 1, 1, "reheat"),
    ],
)
def test_degenerate_problems_leave_no_trace(space, chains, batch, schedule):
    method = annealing(DEGENERATE[space], chains=chains, schedule=schedule, batch=batch)
    kinds = [jnp.nan, jnp.inf, 1.0, 1.0, -jnp.inf, 3e38, -3e38, 1e-38, 0.0, 0.0]
    asked, told = run(method, method.settings, lambda rows: jnp.full(batch, kinds[int(rows.id[0]) // batch % 10]), 20)
    for trials, _ in asked:
        assert trials.active.all() and ((trials.unit >= 0) & (trials.unit <= 1)).all()
    for leaf in jax.tree.leaves(told[-1]):
        assert not np.isnan(leaf).any()


def best_of(method, rounds, studies=15):
    objective = lambda key, h: ((h["x"] - 1.234) ** 2).sum()  # noqa: E731
    study = jax.jit(jax.vmap(hpo.study(objective, method, rounds=rounds)))
    _, trace = study(jax.random.split(jax.random.key(1), studies))
    return np.median(np.asarray(trace.losses).reshape(studies, -1).min(axis=1))


def test_finds_the_bottom_of_a_bowl():
    space = {"x": hpo.Array(5, -5.0, 5.0)}
    assert best_of(annealing(space, chains=1, batch=1), 100) < 0.05
    assert best_of(annealing(space, chains=16), 60) < 0.05
    # The mean of the best of 960 random points is about 3.
    assert best_of(annealing(space, chains=16, schedule="reheat"), 60) < 0.5


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="chains must be at least 1, got 0"):
        annealing(REALS, chains=0)
    with pytest.raises(TypeError, match=r"chains must be an integer, got 2\.5"):
        annealing(REALS, chains=2.5)
    with pytest.raises(ValueError, match="batch must be at least 1, got -3"):
        annealing(REALS, batch=-3)
    with pytest.raises(ValueError, match=r"schedule must be one of \['ladder', 'reheat'\], got 'cool'"):
        annealing(REALS, schedule="cool")
    assert annealing(REALS, batch=7).init(jax.random.key(0)).loss.shape == (7,)
