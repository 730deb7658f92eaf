"""The genetic algorithm: operators against NumPy and published densities, whole generations, restarts, conditionals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.draws import two_uniforms
from jaxhpo.population import genetic
from jaxhpo.population.genetic import (
    blend,
    linear_rank,
    recombine,
    simulated_binary,
    tournament,
)
from jaxhpo.variation import collapsed, mutate, polynomial_mutation

REALS = {"x": hpo.Array(5, -5.0, 5.0)}
CATEGORICAL = {"a": hpo.Categorical(("x", "y", "z")), "b": hpo.Categorical((0.5, 1.5, 4.0)), "c": hpo.Int(1, 4)}
QUANTILES = (np.arange(20_000) + 0.5) / 20_000


@functools.cache
def jitted(function):
    return jax.jit(function)


def run(method, rounds, loss, seed=0, init=None):
    """Losses told in every round, and the state."""
    state, told = method.init(jax.random.key(seed)) if init is None else init, []
    for now in range(rounds):
        trials, state = jitted(method.ask)(jax.random.fold_in(jax.random.key(seed), now), state)
        told.append(loss(np.asarray(trials.unit, float)))
        state = jitted(method.tell)(state, trials, jnp.asarray(told[-1], jnp.float32))
    return np.array(told), state


def bowl(unit):
    return ((unit - 0.3) ** 2).sum(-1)


def told(method, unit, losses, seed=0):
    """A state in which the members are at `unit` with `losses`."""
    state = method.init(jax.random.key(seed))
    return state._replace(
        unit=jnp.asarray(unit, jnp.float32),
        loss=jnp.asarray(losses, jnp.float32),
        asked=hpo.Count(jnp.int32(len(losses))),
    )


# Operators.


@pytest.mark.parametrize("eta", [0.0, 2.0, 15.0])
def test_the_spread_of_simulated_binary_crossover_has_the_published_density(eta):
    a, b = np.float32(0.25), np.float32(0.75)
    child = np.asarray(simulated_binary(a, b, jnp.asarray(QUANTILES, jnp.float32), eta), float)
    spread = (a + b - 2 * child) / (b - a)
    # The distribution functions of (eta + 1) / 2 * spread^eta below 1 and (eta + 1) / 2 / spread^(eta + 2) above it.
    share = np.where(spread <= 1, 0.5 * spread ** (eta + 1), 1 - 0.5 / np.maximum(spread, 1) ** (eta + 1))
    np.testing.assert_allclose(share, QUANTILES, atol=2e-5)


def test_both_children_of_simulated_binary_crossover_keep_the_parents_mean_and_coincide_with_them_at_the_middle():
    a, b, u = np.array([0.2, 0.1]), np.array([0.7, 0.9]), np.array([0.3, 0.97])
    sums = simulated_binary(a, b, u, 2.0) + simulated_binary(b, a, u, 2.0)
    np.testing.assert_allclose(sums, a + b, rtol=1e-6)
    np.testing.assert_allclose(simulated_binary(a, b, np.full(2, 0.5), 2.0), a, rtol=1e-6)


def test_a_blend_is_uniform_over_the_longer_interval():
    child = np.asarray(blend(jnp.float32(0.6), jnp.float32(0.4), jnp.asarray(QUANTILES, jnp.float32), 0.5))
    np.testing.assert_allclose(np.sort(child), 0.3 + 0.4 * QUANTILES, atol=1e-6)
    np.testing.assert_allclose(blend(0.2, 0.8, jnp.array([0.0, 0.5, 1.0]), 0.25), [0.05, 0.5, 0.95], rtol=1e-5)


@pytest.mark.parametrize("x, eta", [(0.5, 20.0), (0.1, 20.0), (0.9, 3.0), (0.02, 1.0)])
def test_polynomial_mutation_has_the_published_density_and_ends_at_the_bounds(x, eta):
    y = np.asarray(polynomial_mutation(jnp.float32(x), jnp.asarray(QUANTILES, jnp.float32), eta), float)
    # Half of (1 - |step|)^eta on either side, cut at the bound and normalised to a half.
    down = (1 + y - x) ** (eta + 1), (1 - x) ** (eta + 1)
    up = (1 - y + x) ** (eta + 1), x ** (eta + 1)
    share = np.where(y < x, 0.5 * (down[0] - down[1]) / (1 - down[1]), 1 - 0.5 * (up[0] - up[1]) / (1 - up[1]))
    np.testing.assert_allclose(share, QUANTILES, atol=2e-4)
    assert y.min() < x * 0.9 and y.min() >= 0 and y.max() <= 1


def test_polynomial_mutation_leaves_a_bound_inward():
    u = jnp.asarray(QUANTILES, jnp.float32)
    assert (polynomial_mutation(jnp.float32(0), u, 20.0) > 0).all()
    assert (polynomial_mutation(jnp.float32(1), u, 20.0) < 1).all()


def test_tournaments():
    loss = np.array([3.0, 1.0, np.inf, 2.0], np.float32)
    members = np.array([[0, 2, 2, 3], [3, 2, 1, 3], [1, 3, 0, 2]])
    best = members[np.argmin(loss[members], axis=0), np.arange(4)]
    found = tournament(list(members), list(loss[members]), np.array([0.1, 0.7, 0.1, 0.7]), np.float32(0.5))
    np.testing.assert_array_equal(found, [best[0], members[0, 1], best[2], members[0, 3]])


@pytest.mark.parametrize("pressure", [0.0, 0.6, 1.0])
def test_chances_fall_linearly_with_rank(pressure):
    n = 10
    rank = np.asarray(linear_rank(jnp.asarray(QUANTILES, jnp.float32), n, jnp.float32(pressure)))
    middle = (np.arange(n) + 0.5) / n
    expected = (1 + pressure - 2 * pressure * middle) / n
    np.testing.assert_allclose(np.bincount(rank, minlength=n) / rank.size, expected, atol=2e-4)


def test_mutation_moves_integers_by_a_level_at_least_and_options_to_any_other():
    space = hpo.Space({"i": hpo.Int(0, 9), "c": hpo.Categorical(("a", "b", "c", "d")), "x": hpo.Float(0.0, 1.0)})
    names = space.names
    n = 4000
    unit = jnp.asarray(np.random.default_rng(0).random((n, 3)), jnp.float32)
    uniform = jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32)
    before = np.asarray(space.level(unit))
    for dim, name in enumerate(names):
        at = jnp.broadcast_to(jnp.arange(3) == dim, unit.shape)
        moved = mutate(space, unit, at, uniform, 1e3 if name == "i" else 20.0)
        others = np.arange(3) != dim
        np.testing.assert_array_equal(moved[:, others], unit[:, others])
        column = np.flatnonzero(space.levels).tolist().index(dim) if space.levels[dim] else None
        if name == "i":
            # Steps are so small that almost none would change the level by itself.
            step = np.abs(np.asarray(space.level(moved))[:, column] - before[:, column])
            assert step.min() == 1 and (step == 1).mean() > 0.98
        elif name == "c":
            step = (np.asarray(space.level(moved))[:, column] - before[:, column]) % 4
            np.testing.assert_allclose(np.bincount(step, minlength=4) / n, [0, 1 / 3, 1 / 3, 1 / 3], atol=1e-3)
        else:
            np.testing.assert_array_equal(moved[:, dim], polynomial_mutation(unit[:, dim], uniform, 20.0))
    np.testing.assert_array_equal(mutate(space, unit, jnp.zeros(unit.shape, bool), uniform, 20.0), unit)


def test_a_choice_brings_its_branch_along():
    space = hpo.Space(
        {
            "opt": hpo.OneOf(sgd={"m": hpo.Float(0.0, 1.0), "w": hpo.Int(1, 9)}, adam={"b": hpo.Float(0.0, 1.0)}),
            "lr": hpo.Float(0.0, 1.0),
        }
    )
    lr, below = space.names.index("lr"), np.array([p >= 0 for p in space.parent])
    rng = np.random.default_rng(0)
    a, b, u = (jnp.asarray(rng.random((500, space.dims)), jnp.float32) for _ in range(3))
    child = np.asarray(recombine(space, a, b, blend(a, b, u, 0.5), u))
    switch = space.names.index("opt")
    of_b = child[:, switch] == np.asarray(b)[:, switch]
    differ = (np.asarray(a)[:, switch] < 0.5) != (np.asarray(b)[:, switch] < 0.5)
    assert 0.4 < of_b.mean() < 0.6 and differ.sum() > 100
    source = np.where(of_b[:, None], b, a)
    np.testing.assert_array_equal(child[differ][:, below], source[differ][:, below])
    live = np.asarray(space.active(a) & space.active(b))
    mixed = np.asarray(blend(a, b, u, 0.5))
    same_branch = ~differ[:, None] & live & below
    np.testing.assert_array_equal(child[same_branch], mixed[same_branch])
    np.testing.assert_array_equal(child[:, lr], mixed[:, lr])


# Whole generations.


def generation(method, key, state, selection, crossover):
    """The asked points by NumPy, in a space of reals, and which parents they have."""
    n, dims = method.batch, method.space.dims
    s = jax.tree.map(float, state.settings)
    unit, loss = np.asarray(state.unit, float), np.asarray(state.loss)
    key_rows, key_genes, key_parents = jax.random.split(key, 3)
    (crossed, mutated, where), (how, coin_a, coin_b) = (
        np.asarray(u).reshape(3, n) for u in two_uniforms(key_rows, (3 * n,))
    )
    genes = np.concatenate([np.asarray(u).reshape(-1, dims) for u in two_uniforms(key_genes, ((n + 1) // 2 * dims,))])
    u, members = genes[:n].astype(float), np.arange(n)
    if selection == "tournament":
        d = np.asarray(jax.random.randint(key_parents, (5,), 1, n))
        group = (members + np.concatenate([[0], d])[:, None]) % n
        first, second = (g[np.argmin(loss[g], 0), members] for g in (group[:3], group[3:]))
    else:
        order = np.argsort(loss, kind="stable")
        first, second = (order[(n * (1 - np.sqrt(1 - c.astype(float)))).astype(int)] for c in (coin_a, coin_b))
    second = np.where(second == first, (second + 1) % n, second)
    a, b = unit[first], unit[second]
    if crossover == "blend":
        child = a + (2 * u - 0.5) * (b - a)
    else:
        spread = np.where(u <= 0.5, 2 * u, 1 / (2 * (1 - u))) ** (1 / (s.eta_c + 1))
        child = 0.5 * ((1 + spread) * a + (1 - spread) * b)
    child = np.where(child < 0, -child, np.where(child > 1, 2 - child, child))
    child = np.where((crossed < s.crossover_rate)[:, None], child, a)
    for i in np.flatnonzero((mutated < s.mutation_rate) | (crossed >= s.crossover_rate)):
        j, v, e = int(where[i] * dims), float(how[i]), s.eta_m + 1
        x = child[i, j]
        if v < 0.5:
            child[i, j] = x + (2 * v + (1 - 2 * v) * (1 - x) ** e) ** (1 / e) - 1
        else:
            child[i, j] = x + 1 - (2 * (1 - v) + (2 * v - 1) * x**e) ** (1 / e)
    return child


@pytest.mark.parametrize("selection", ["tournament", "rank"])
@pytest.mark.parametrize("crossover", ["blend", "sbx"])
def test_a_generation_is_that_of_numpy(selection, crossover):
    method = genetic(REALS, population=15, batch=15, selection=selection, crossover=crossover)
    rng = np.random.default_rng(1)
    state, key = told(method, rng.random((15, 5)), rng.random(15)), jax.random.key(5)
    trials, _ = jitted(method.ask)(key, state)
    np.testing.assert_allclose(trials.unit, generation(method, key, state, selection, crossover), atol=3e-6)
    for other in [(s, c) for s in ("tournament", "rank") for c in ("blend", "sbx") if (s, c) != (selection, crossover)]:
        assert np.abs(np.asarray(trials.unit) - generation(method, key, state, *other)).max() > 0.05


def test_the_first_trials_are_the_first_population_each_once():
    method = genetic(REALS, population=12, batch=5)
    state = method.init(jax.random.key(0))
    asked, ahead = [], state
    for now in range(3):
        trials, ahead = jitted(method.ask)(jax.random.key(now), ahead)
        asked.append(np.asarray(trials.unit))
    np.testing.assert_array_equal(np.concatenate(asked)[:12], state.unit)
    np.testing.assert_array_equal(
        np.sort(np.floor(np.asarray(state.unit) * 12), 0), np.arange(12)[:, None].repeat(5, 1)
    )


@pytest.mark.parametrize("batch", [8, 20])
def test_a_child_takes_its_place_where_it_is_no_worse(batch):
    method = genetic(REALS, population=8, batch=batch)
    rng = np.random.default_rng(batch)
    state = told(method, rng.random((8, 5)), np.r_[rng.random(7), np.inf])
    trials, asked = jitted(method.ask)(jax.random.key(0), state)
    losses = rng.random(batch).astype(np.float32)
    losses[::4] = np.nan
    losses[1] = state.loss[np.asarray(trials.aux.member)[1]]
    unit, loss = np.array(state.unit), np.array(state.loss)
    for i in np.argsort(losses, kind="stable")[::-1]:
        m = int(trials.aux.member[i])
        if losses[i] <= loss[m]:
            unit[m], loss[m] = trials.unit[i], losses[i]
    after = jitted(method.tell)(asked, trials, losses)
    np.testing.assert_array_equal(after.unit, unit)
    np.testing.assert_array_equal(after.loss, loss)


def test_the_path_depends_on_the_order_of_losses_alone():
    method = genetic({**CATEGORICAL, **REALS}, population=10, batch=10)
    plain, _ = run(method, 30, bowl)
    bent, _ = run(method, 30, lambda unit: np.log(bowl(unit)) * 7 - 3)
    np.testing.assert_allclose(np.exp((bent + 3) / 7), plain, rtol=1e-9)


@pytest.mark.parametrize("space", [CATEGORICAL, {"opt": hpo.OneOf(a={"x": hpo.Int(1, 9)}, b={"y": hpo.Int(1, 9)})}])
def test_no_evaluation_is_spent_on_a_point_that_both_parents_are(space):
    method = genetic(space, population=40, batch=40, mutation_rate=0.0)
    space = method.space
    point = space.encode(space.decode(jnp.full(space.dims, 0.2)))
    trials, _ = jitted(method.ask)(jax.random.key(0), told(method, jnp.tile(point, (40, 1)), np.zeros(40)))
    natives = [space.native(trials.hparams, i) for i in range(40)]
    assert space.native(space.decode(point)) not in natives


# Restarts.


def test_a_collapsed_population_starts_afresh_and_keeps_its_best():
    method = genetic(REALS, population=20, batch=20, elite=2)
    rng = np.random.default_rng(0)
    near, losses = 0.4 + 1e-5 * rng.random((20, 5)), np.arange(20)[::-1] + 1.0
    for unit, restarts in ((near, 1), (near + 1e-3 * np.eye(20, 5), 0)):
        state = told(method, unit, losses)
        trials, asked = jitted(method.ask)(jax.random.key(0), state)
        after = jitted(method.tell)(asked, trials, jnp.full(20, jnp.nan))
        assert int(after.epoch) == restarts
        np.testing.assert_array_equal(after.fresh, [restarts] * 18 + [0, 0])
        np.testing.assert_array_equal(after.loss, np.where(after.fresh, np.inf, losses))
    after = jitted(method.tell)(asked, trials, jnp.full(20, jnp.nan))
    state = told(method, near, losses)
    trials, asked = jitted(method.ask)(jax.random.key(0), state)
    after = jitted(method.tell)(asked, trials, jnp.full(20, jnp.nan))

    fresh, later = jitted(method.ask)(jax.random.key(1), after)
    new = np.asarray(fresh.unit)[:18]
    assert new.std(0).min() > 0.2 and np.abs(new - 0.4).max(1).min() > 0.01
    # What was asked before the restart would bring the old cluster back; only a new best may.
    late = jitted(method.tell)(later, trials, jnp.full(20, 5.0))
    np.testing.assert_array_equal(late.loss, after.loss)
    np.testing.assert_array_equal(late.fresh, after.fresh)
    best = jitted(method.tell)(later, trials, jnp.full(20, 0.5))
    np.testing.assert_array_equal(best.loss, np.r_[np.full(18, np.inf), 2.0, 0.5])
    np.testing.assert_array_equal(best.unit[19], trials.unit[0])
    # Failures too are told: such a place is not free again.
    failed = jitted(method.tell)(later, fresh, jnp.full(20, jnp.nan))
    assert not np.asarray(failed.fresh).any() and np.isinf(np.asarray(failed.loss)[:18]).all()


def test_what_counts_as_collapsed():
    space = hpo.Space({"opt": hpo.OneOf(a={"x": hpo.Float(0.0, 1.0)}, b={"y": hpo.Int(1, 9)}), "z": hpo.Int(0, 1)})
    dims = {name: space.names.index(name) for name in space.names}
    loss = jnp.zeros(4)
    base = jnp.full((4, space.dims), 0.2)
    apart = jnp.array([0.21, 0.2, 0.4, 0.45])
    expect = lambda unit, loss=loss: bool(collapsed(space, unit, loss, 1e-4))  # noqa: E731
    assert expect(base)
    assert not expect(base, loss.at[0].set(jnp.inf))
    assert not expect(base.at[:, dims["opt.a.x"]].set(apart))
    assert expect(base.at[:, dims["z"]].set(apart)), "the same level"
    assert expect(base.at[:, dims["opt.b.y"]].set(apart * 2)), "not live"
    assert not expect(base.at[:, dims["z"]].set(apart * 2))
    assert not expect(base.at[0, dims["opt"]].set(0.9))


def test_restarts_find_an_optimum_that_the_first_population_misses():
    def trap(unit):
        return np.minimum(((unit - 0.2) ** 2).sum(-1) + 0.1, 40 * ((unit - 0.9) ** 2).sum(-1))

    options = dict(population=10, batch=10, elite=0)
    space = {"x": hpo.Array(2, 0.0, 1.0)}
    best = {
        tolerance: [
            run(genetic(space, **options, tolerance=tolerance), 100, trap, seed)[0].min() < 0.05 for seed in range(6)
        ]
        for tolerance in (1e-4, 0.0)
    }
    assert np.mean(best[1e-4]) > np.mean(best[0.0]) and np.mean(best[1e-4]) >= 0.6


# Degenerate cases, and how good it is.


@pytest.mark.parametrize("crossover, least", [("blend", 1e-5), ("sbx", 1e-3)])
def test_finds_the_bottom_of_a_bowl(crossover, least):
    method = genetic(REALS, population=20, batch=20, crossover=crossover)
    best = [run(method, 100, bowl, seed)[0].min() for seed in range(3)]
    assert np.median(best) < least


@pytest.mark.parametrize(
    "space, selection",
    [
        ({"c": hpo.Categorical(("only",))}, "tournament"),
        ({"c": hpo.Categorical((1, 2)), "d": hpo.Categorical((5,))}, "tournament"),
        ({"i": hpo.Int(0, 1)}, "rank"),
    ],
)
def test_degenerate_spaces_and_the_smallest_population(space, selection):
    method = genetic(space, population=2, batch=3, selection=selection)
    state = method.init(jax.random.key(0))
    for now, losses in enumerate(([jnp.nan] * 3, [1.0] * 3, [jnp.inf, 0.5, jnp.nan], [-jnp.inf] * 3)):
        trials, state = jitted(method.ask)(jax.random.key(now), state)
        assert ((trials.unit >= 0) & (trials.unit <= 1)).all()
        state = jitted(method.tell)(state, trials, jnp.asarray(losses))
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(state))


def test_a_thousand_dims():
    method = genetic({"x": hpo.Array(1000, -5.0, 5.0)}, population=10, batch=10)
    losses, state = run(method, 20, bowl)
    assert losses[-1].min() < 0.8 * losses[0].min()
    assert np.isfinite(np.asarray(state.unit)).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(population=1), "population must be at least 2, got 1; a child needs two parents"),
        (dict(population=2**17), "population must be at most 65536, got 131072"),
        (dict(selection="roulette"), "selection must be one of ['tournament', 'rank'], got 'roulette'"),
        (dict(crossover="one-point"), "crossover must be one of ['blend', 'sbx'], got 'one-point'"),
        (dict(population=5, elite=5), "elite must be at most 4, got 5; the others start afresh"),
        (dict(crossover_rate=1.5), "crossover_rate must be in [0, 1], got 1.5; it is a chance"),
        (dict(mutation_rate=float("nan")), "mutation_rate must be in [0, 1], got nan"),
        (dict(eta_c=-1.0), "eta_c must be in [0, 1000], got -1.0; 2 to 20 are usual"),
        (dict(pressure=2.0), "pressure must be in [0, 1], got 2.0"),
        (dict(batch=0), "batch must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_with_its_name_value_and_remedy(arguments, message):
    with pytest.raises(ValueError) as error:
        genetic(REALS, **arguments)
    assert message in str(error.value)
