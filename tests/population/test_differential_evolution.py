"""Differential evolution against a plain NumPy version, and what its variants are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri

import jaxhpo as hpo
from jaxhpo.draws import two_uniforms
from jaxhpo.population.differential_evolution import Row, differ, draw_weights, others
from jaxhpo.variation import levels

DIMS, MEMBERS = 3, 8
CUBE = hpo.Space({"x": hpo.Array(DIMS, -1.0, 1.0)})


def bowl(unit):
    return ((np.asarray(unit) - 0.3) ** 2 * np.arange(1, unit.shape[-1] + 1)).sum(-1)


@functools.cache
def jitted(space, **arguments):
    method = hpo.differential_evolution(space, **arguments)
    return method, jax.jit(method.init), jax.jit(method.ask), jax.jit(method.tell)


def play(rounds, loss=bowl, space=CUBE, seed=0, **arguments):
    """All trials and losses of some rounds, and the last state."""
    method, init, ask, tell = jitted(space, **arguments)
    state, asked, told = init(jax.random.key(seed)), [], []
    for now in range(rounds):
        trials, state = ask(jax.random.key(1000 + now), state)
        losses = np.asarray(loss(trials.unit), np.float32)
        state = tell(state, trials, losses)
        asked.append(jax.device_get(trials))
        told.append(losses)
    return asked, told, state


class Plain:
    """Differential evolution as the papers have it, a member at a time, with the random numbers of `ask`."""

    def __init__(self, unit, strategy, weight, rate, greediness):
        self.unit, self.strategy, self.greediness = np.array(unit, np.float64), strategy, greediness
        self.loss, self.archive = bowl(self.unit).astype(np.float32), [None] * len(unit)
        self.weights, self.rates, self.place = [weight] * 6, [rate] * 6, 0

    def generation(self, key):
        key_rows, key_genes = jax.random.split(key)
        n = len(self.unit)
        u = np.float64(jax.random.uniform(key_rows, (7, n), minval=1e-6, maxval=1 - 1e-6))
        cross, chance = np.float64(two_uniforms(key_genes, self.unit.shape))
        children, weights, rates = [], [], []
        for i, x in enumerate(self.unit):
            pool = [m for m in range(n) if m != i]
            draw = lambda number, pool: pool.pop(int(number * len(pool)))  # noqa: E731
            if self.strategy == "current-to-pbest/1":
                entry = int(u[0, i] * 6)
                centre = self.weights[entry]
                positive = 0.5 + np.arctan(-centre / 0.1) / np.pi
                weight = min(centre + 0.1 * np.tan(np.pi * (positive + (1 - positive) * u[1, i] - 0.5)), 1)
                rate = 0 if self.rates[entry] < 0 else np.clip(self.rates[entry] + 0.1 * ndtri(u[2, i]), 0, 1)
                chosen = max(2, round(n * self.greediness))
                leader = self.unit[np.argsort(self.loss, kind="stable")[int(u[3, i] * chosen)]]
                first = draw(u[4, i], pool)
                pool += range(n, 2 * n)
                second = draw(u[5, i], pool)
                kept = lambda m: self.unit[m] if self.archive[m] is None else self.archive[m]  # noqa: E731
                away = self.unit[second] if second < n else kept(second - n)
                mutant = x + weight * (leader - x) + weight * (self.unit[first] - away)
            else:
                weight, rate = self.weights[0], self.rates[0]
                base = int(np.argmin(self.loss)) if self.strategy == "best/1/bin" else draw(u[0, i], pool)
                pool = [m for m in pool if m != base]
                first, second = draw(u[1, i], pool), draw(u[2, i], pool)
                mutant = self.unit[base] + weight * (self.unit[first] - self.unit[second])
            mutant = np.where(mutant < 0, x / 2, np.where(mutant > 1, (1 + x) / 2, mutant))
            take = cross[i] < rate
            always = int(u[6, i] * len(x))
            take[always] = True
            child = np.where(take, mutant, x)
            if np.abs(child - x).max() < 1e-8:
                child[always] = chance[i, always]
            children.append(child)
            weights.append(weight)
            rates.append(rate)
        return np.array(children), np.array(weights), np.array(rates)

    def select(self, children, losses, weights, rates):
        gains = np.maximum(self.loss - losses, 0)
        for i in np.flatnonzero(losses <= self.loss):
            self.archive[i] = self.unit[i].copy()
            self.unit[i], self.loss[i] = children[i], losses[i]
        if gains.any():
            lehmer = lambda x: (gains * x**2).sum() / (gains * x).sum()  # noqa: E731
            self.weights[self.place] = lehmer(weights)
            dead = self.rates[self.place] < 0 or not (gains * rates).any()
            self.rates[self.place] = -1 if dead else lehmer(rates)
            self.place = (self.place + 1) % 6


@pytest.mark.parametrize("strategy", ["current-to-pbest/1", "rand/1/bin", "best/1/bin"])
def test_generations_equal_those_of_a_plain_version(strategy):
    method, _, ask, tell = jitted(CUBE, strategy=strategy, population=MEMBERS, batch=MEMBERS, greediness=0.25)
    first, _, state = play(1, strategy=strategy, population=MEMBERS, batch=MEMBERS, greediness=0.25)
    plain = Plain(first[0].unit, strategy, 0.5, 0.9, 0.25)
    for now in range(12):
        key = jax.random.key(77 + now)
        trials, state = ask(key, state)
        children, weights, rates = plain.generation(key)
        np.testing.assert_allclose(trials.unit, children, atol=2e-5)
        losses = bowl(trials.unit).astype(np.float32)
        state = tell(state, trials, losses)
        plain.select(np.float64(trials.unit), losses, weights, rates)
    if strategy == "current-to-pbest/1":
        np.testing.assert_allclose(state.memory.weight, plain.weights, rtol=1e-3)
        np.testing.assert_allclose(state.memory.rate, plain.rates, rtol=1e-3)
        assert plain.place >= 2 or len(set(plain.weights)) == 6


def test_a_generation_in_several_asks_remembers_once():
    _, _, state = play(4, population=MEMBERS, batch=MEMBERS // 4)
    for now in range(4):
        assert state.memory.place == 0, now
        _, _, state = play(5 + now, population=MEMBERS, batch=MEMBERS // 4)
    assert state.memory.place == 1 and state.memory.told == 0


def test_weights_are_drawn_from_the_positive_part_of_a_cauchy_distribution():
    u = (np.arange(10_000) + 0.5) / 10_000
    drawn = np.asarray(draw_weights(jnp.asarray(u), jnp.float32(0.2)))
    below = 0.5 + np.arctan(-2) / np.pi  # probability of what is not positive
    for value in (0.1, 0.2, 0.5, 0.9):
        expected = (0.5 + np.arctan((value - 0.2) / 0.1) / np.pi - below) / (1 - below)
        assert abs((drawn <= value).mean() - expected) < 1e-3
    assert drawn.min() > 0 and drawn.max() == 1


def test_others_are_distinct_and_uniform():
    u = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 60_000)), jnp.float32)
    member = jnp.arange(60_000) % 5
    first = others(u[0], jnp.int32(5), member)
    second = others(u[1], jnp.int32(5), member, first)
    third = others(u[2], jnp.int32(5), member, first, second)
    chosen = np.stack([member, first, second, third])
    assert (np.diff(np.sort(chosen, axis=0), axis=0) > 0).all()
    share = np.bincount(np.asarray(third)[np.asarray(member) == 0], minlength=5) / 12_000
    np.testing.assert_allclose(share, [0, 0.25, 0.25, 0.25, 0.25], atol=0.02)


def test_the_population_shrinks_and_loses_the_worst():
    asked, told, state = play(30, population=20, trials=300, batch=10)
    for now, trials in enumerate(asked):
        members = round(4 + 16 * (1 - (max(10 * now - 20, 0) / 280) ** 0.5))
        assert trials.aux.member.max() < members and len(set(trials.aux.member)) == min(10, members), now
    best = np.sort(np.concatenate(told))[:4]
    assert np.isin(best[0], state.loss[:4]) and state.loss[:4].max() < np.median(np.concatenate(told))
    steady, *_ = play(30, population=20, batch=10)
    assert max(trials.aux.member.max() for trials in steady[-2:]) == 19


def test_a_late_row_of_a_member_that_has_left_is_not_lost():
    method, init, ask, tell = jitted(CUBE, population=20, trials=60, batch=10)
    trials, state = ask(jax.random.key(0), init(jax.random.key(0)))
    trials, state = ask(jax.random.key(1), state)
    late = trials  # members 10 to 19
    for now in range(6):
        _, state = ask(jax.random.key(now), state)
    state = tell(state, late, jnp.where(jnp.arange(10) == 7, -5.0, 1.0))
    assert state.loss[:4].min() == -5
    np.testing.assert_array_equal(state.unit[jnp.argmin(state.loss)], late.unit[7])


def test_of_two_rows_of_one_member_the_better_one_wins():
    _, _, state = play(2, population=4, batch=8, strategy="rand/1/bin")
    trials, _ = jitted(CUBE, population=4, batch=8, strategy="rand/1/bin")[2](jax.random.key(5), state)
    assert trials.aux.member.tolist() == [0, 1, 2, 3] * 2
    told = jitted(CUBE, population=4, batch=8, strategy="rand/1/bin")[3](state, trials, -jnp.arange(1.0, 9.0))
    assert told.loss.tolist() == [-5, -6, -7, -8]
    np.testing.assert_array_equal(told.unit, trials.unit[4:])


@pytest.mark.parametrize("strategy", ["rand/1/bin", "best/1/bin"])
def test_a_monotone_transform_of_the_loss_changes_nothing(strategy):
    arguments = {"strategy": strategy, "population": 6, "batch": 4}
    straight, *_ = play(12, **arguments)
    bent, *_ = play(12, lambda unit: np.exp(3 * bowl(unit)) - 7, **arguments)
    for a, b in zip(straight, bent, strict=True):
        np.testing.assert_array_equal(a.unit, b.unit)


def test_levels_without_order_come_from_others_and_no_child_repeats_its_parent():
    space = hpo.Space({"a": hpo.Categorical(tuple("abcdef")), "b": hpo.Categorical(("x", "y")), "c": hpo.Int(0, 3)})
    arguments = {"population": 8, "batch": 8, "space": space, "crossover_rate": 0.2}
    loss = lambda unit: (np.asarray(space.level(unit)) * [1, 10, 100]).sum(-1)  # noqa: E731
    asked, told, state = play(25, loss, **arguments)
    _, _, before = play(24, loss, **arguments)
    assert (np.asarray(space.level(asked[-1].unit)) != np.asarray(space.level(before.unit))).any(-1).all()
    assert min(map(min, told)) == 0


@pytest.mark.parametrize("strategy", ["current-to-pbest/1", "rand/1/bin", "best/1/bin"])
@pytest.mark.parametrize("population, dims", [(2, 1), (3, 1000)])
def test_small_populations_and_many_dims(strategy, population, dims):
    space = hpo.Space({"x": hpo.Array(dims, 0.0, 1.0)})
    losses = iter([np.nan, 1.0, 1.0, 1.0, 0.5, np.inf] * 2)
    one_or_none = lambda unit: np.full(len(unit), next(losses))  # noqa: E731
    asked, _, state = play(6, one_or_none, space, strategy=strategy, population=population, batch=3)
    assert all(((t.unit >= 0) & (t.unit <= 1)).all() for t in asked)
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(state))
    assert np.isfinite(state.loss).all() and state.loss.min() == 0.5


def best_of(seeds, evaluations, **arguments):
    """Median over the seeds of the lowest loss on Rosenbrock's function in five dims."""
    space = hpo.Space({"x": hpo.Array(5, -5.0, 5.0)})

    def rosenbrock(key, hparams):
        x = hparams["x"]
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    method = hpo.differential_evolution(space, **arguments)
    study = hpo.study(rosenbrock, method, rounds=evaluations // method.batch)
    _, traces = jax.jit(jax.vmap(study))(jax.random.split(jax.random.key(0), seeds))
    return float(jnp.median(traces.losses.min((1, 2))))


def test_adaptation_and_shrinking_find_better_optima():
    fixed = best_of(16, 4000, strategy="rand/1/bin", population=40, batch=20)
    adaptive = best_of(16, 4000, population=40, batch=20)
    shrinking = best_of(16, 4000, population=40, trials=4000, batch=20)
    assert shrinking < adaptive / 3 < fixed / 9 and adaptive < 0.01, (shrinking, adaptive, fixed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strategy": "rand"}, "strategy must be one of"),
        ({"population": 1}, "population must be at least 2, got 1"),
        ({"population": 2.5}, "population must be an integer, got 2.5"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"weight": float("nan")}, "weight must be in .*, got nan; 0.5 is usual"),
        ({"crossover_rate": 1.1}, "crossover_rate must be in .*, got 1.1; 0.9 is usual"),
        ({"greediness": 0.5}, "greediness must be in .*0.25.*, got 0.5"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        hpo.differential_evolution(CUBE, **arguments)


def test_rows_say_how_they_were_made():
    asked, *_ = play(2, population=MEMBERS, batch=MEMBERS)
    assert isinstance(asked[0].aux, Row)
    assert (asked[0].aux.weight == 0).all() and (asked[1].aux.weight > 0).all()


def test_a_population_that_has_become_one_starts_anew():
    loss = lambda unit: np.abs(np.asarray(unit) - 0.4).max(-1)  # noqa: E731
    arguments = {"population": 6, "batch": 3, "strategy": "best/1/bin"}
    straight, _, state = play(80, loss, tolerance=0, **arguments)
    assert state.start == 0 and np.ptp(state.unit, axis=0).max() < 0.1
    asked, told, state = play(80, loss, tolerance=0.01, **arguments)
    begin = int(np.flatnonzero(np.diff([t.aux.start[0] for t in asked]))[0] + 1)
    assert asked[begin].aux.start[0] == 3 * begin and (asked[begin].aux.weight == 0).all()
    for now in range(begin):
        np.testing.assert_array_equal(asked[now].unit, straight[now].unit)
    assert np.ptp(np.concatenate([t.unit for t in asked[begin : begin + 2]]), axis=0).min() > 0.3
    method, _, _, tell = jitted(CUBE, tolerance=0.01, **arguments)
    np.testing.assert_array_equal(tell(state, asked[begin - 1], jnp.full(3, state.best)).loss, state.loss)
    assert tell(state, asked[begin - 1], jnp.array([5.0, -1.0, 5.0])).loss.min() == -1


def test_tells_that_lag_a_population_behind_do_not_keep_it_from_starting_anew():
    method, init, ask, tell = jitted(CUBE, population=4, batch=4, tolerance=0.05)
    state, waiting, starts = init(jax.random.key(0)), [], []
    for now in range(150):
        trials, state = ask(jax.random.key(now), state)
        waiting.append(trials)
        starts.append(int(state.start))
        if len(waiting) > 1:
            late = waiting.pop(0)
            state = tell(state, late, jnp.asarray(bowl(late.unit), jnp.float32))
    assert 2 <= len(set(starts)) < 20 and np.isfinite(state.loss).sum() >= 2


def test_live_dims_alone_decide_whether_members_have_become_one():
    space = hpo.Space({"net": hpo.OneOf(a={"x": hpo.Float(0, 1)}, b={"y": hpo.Float(0, 1), "z": hpo.Float(0, 1)})})
    at = space.names.index("net.a.x")
    loss = lambda unit: np.where(np.asarray(unit)[:, 0] < 0.5, np.abs(np.asarray(unit)[:, at] - 0.3), 9.0)  # noqa: E731
    _, _, state = play(120, loss, space, population=6, batch=6)
    assert state.start > 0 and state.best < 1e-3


def test_known_results_are_not_tried_again():
    space, known = {"x": hpo.Float(0.0, 1.0)}, [({"x": x}, x) for x in (0.2, 0.4, 0.6, 0.8)]
    method = hpo.differential_evolution(space, population=4, batch=4)
    objective = lambda key, h: h["x"]  # noqa: E731
    result = hpo.minimize(objective, method, key=jax.random.key(0), trials=4, initial=known, progress=False)
    tried = np.asarray(result.trials.hparams["x"])[np.asarray(result.trials.id) >= 0]
    assert len(tried) == 4 and np.abs(tried[:, None] - [0.2, 0.4, 0.6, 0.8]).min() > 1e-4


def test_a_small_population_does_not_grow():
    asked, _, _ = play(20, population=2, trials=40, batch=2)
    assert max(trials.aux.member.max() for trials in asked) == 1


@pytest.mark.parametrize("strategy", ["current-to-pbest/1", "rand/1/bin"])
def test_no_child_decodes_to_its_parent(strategy):
    only = hpo.Categorical(("only",))
    space = hpo.Space(
        {
            "net": hpo.OneOf(a={"x": hpo.Int(0, 2)}, b={"y": hpo.Categorical(tuple("pqr")), "one": only}),
            "c": only,
            "lr": hpo.Int(1, 4),
        }
    )
    method, init, ask, tell = jitted(space, strategy=strategy, population=8, batch=8, crossover_rate=0.2)
    state = init(jax.random.key(0))
    view = lambda unit: np.where(space.active(unit), levels(space, unit), -1)  # noqa: E731
    for now in range(12):
        trials, after = ask(jax.random.key(now), state)
        if now:
            assert (view(trials.unit) != view(state.unit)).any(-1).all()
        state = tell(after, trials, jnp.arange(8.0) + now)


def test_a_branch_comes_with_what_its_owner_has_below_it():
    space = hpo.Space({"net": hpo.OneOf(a={"x": hpo.Float(0, 1)}, b={"y": hpo.Float(0, 1)})})
    base = jnp.tile(jnp.array([0.2, 0.3, 0.05]), (64, 1))
    leader = jnp.tile(jnp.array([0.8, 0.1, 0.9]), (64, 1))
    chance = jnp.tile(jnp.linspace(0.01, 0.99, 64)[:, None], (1, 3))
    mutant = np.asarray(differ(space, jnp.full(64, 0.5), chance, base, [(leader, base)]))
    switched = mutant[:, 0] > 0.5
    assert switched.tolist() == (np.asarray(chance[:, 0]) < 0.5).tolist()
    np.testing.assert_allclose(mutant[switched, 2], 0.9)
    np.testing.assert_allclose(mutant[~switched, 2], 0.475)
