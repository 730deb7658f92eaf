"""CMA-ES against the `cmaes` package on the same samples, its invariances, and what each of its variants is for."""

import functools
import sys

import cmaes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, norm

import jaxhpo as hpo
from jaxhpo.method import black_box
from jaxhpo.population import cma_es
from jaxhpo.population.cma_es import AGE, Layout, asks_per_decomposition, normals
from jaxhpo.population.cma_margin import (
    integers_of,
    learned_categories,
    least_probability,
    limits,
    uniform_categories,
    with_margin,
)
from jaxhpo.population.cma_update import standings, weights_of
from jaxhpo.population.restarts import first_run, largest, next_run

TEXTBOOK = {"elites": 0, "restarts": None}


def cube(dims):
    return {"x": hpo.Array(dims, 0.0, 1.0)}


@functools.cache
def compiled(function):
    return jax.jit(function)


@pytest.fixture
def decompose(monkeypatch):
    """Sets how old a decomposition may be; 0 is one a generation."""
    module = sys.modules["jaxhpo.population.cma_es"]

    def set_age(age):
        monkeypatch.setattr(module, "AGE", age)
        module._functions.cache_clear()

    yield set_age
    module._functions.cache_clear()


def rows(method, unit, active=None):
    active = None if active is None else jnp.asarray(active)
    return black_box(method.space, jnp.asarray(unit, jnp.float32), jnp.int32(0), active)


def tell(method, state, unit, losses, active=None):
    return compiled(method.tell)(state, rows(method, unit, active), jnp.asarray(losses, jnp.float32))


def ask(method, state, seed=0):
    return compiled(method.ask)(jax.random.key(seed), state)


def run(method, loss, rounds, seed=0):
    """The last state of a study, and its losses and points; `loss` takes trials."""
    state, seen = method.init(jax.random.key(seed)), []
    for key in jax.random.split(jax.random.key(seed), rounds):
        trials, state = compiled(method.ask)(key, state)
        told = jax.device_get(trials)
        losses = np.asarray(loss(told), np.float32)
        state = compiled(method.tell)(state, trials, losses)
        seen.append((losses, told.unit))
    return state, tuple(map(np.stack, zip(*seen, strict=True)))


def ellipsoid(unit, optimum=0.45, condition=1e4):
    scales = condition ** (np.arange(unit.shape[-1]) / max(unit.shape[-1] - 1, 1))
    return ((unit - optimum) ** 2 * scales).sum(-1)


class TestAgainstPeer:
    """The same samples, from the peer, give the same distribution."""

    @pytest.mark.parametrize("kind", ["full", "separable"])
    def test_follows_cmaes_step_by_step(self, kind, decompose):
        decompose(0)
        dims, population = 5, 10
        peer_of = {"full": cmaes.CMA, "separable": cmaes.SepCMA}[kind]
        peer = peer_of(mean=np.full(dims, 0.5), sigma=0.03, population_size=population, seed=1)
        active = kind == "full"
        method = cma_es(
            cube(dims), population=population, batch=population, sigma=0.03, covariance=kind, active=active, **TEXTBOOK
        )
        state = method.init(jax.random.key(0))
        for generation in range(30):
            points = np.array([peer.ask() for _ in range(population)])
            losses = ellipsoid(points)
            peer.tell(list(zip(points, losses, strict=True)))
            state = tell(method, ask(method, state)[1], points, losses)
            d = state.search.distribution
            assert d.generation == generation + 1
            np.testing.assert_allclose(d.mean, peer._mean, atol=1e-5)
            np.testing.assert_allclose(d.sigma, peer._sigma, rtol=1e-4)
            np.testing.assert_allclose(d.covariance, peer._C, atol=1e-4)
            np.testing.assert_allclose(d.path_sigma, peer._p_sigma, atol=2e-4)
            np.testing.assert_allclose(d.path_c, peer._pc, atol=2e-4)
        assert peer._sigma < 0.02 and np.ptp(np.diag(peer._C) if active else peer._C) > 0.3, "something was learned"

    def test_follows_cmaes_with_margin(self, decompose):
        decompose(0)
        # Four levels each of two dims, whose level k is the k-th quarter, and two real dims on the same scale.
        population, sigma = 8, 0.1
        bounds = np.array([[0, 3], [0, 3], [-100, 100], [-100, 100]], float)
        steps = np.array([1.0, 1.0, 0.0, 0.0])
        peer = cmaes.CMAwM(
            mean=np.full(4, 1.5), sigma=4 * sigma, bounds=bounds, steps=steps, population_size=population, seed=3
        )
        space = {"a": hpo.Int(0, 3), "b": hpo.Ordinal((1, 2, 4, 8)), "x": hpo.Float(0, 1), "y": hpo.Float(0, 1)}
        method = cma_es(space, population=population, batch=population, sigma=sigma, **TEXTBOOK)
        state, corrected = method.init(jax.random.key(0)), False
        for _ in range(25):
            told, points = [], []
            for _ in range(population):
                value, raw = peer.ask()
                told.append((raw, np.abs(value - [2, 1, 1.2, 1.7]) @ [0.3, 0.3, 1.0, 1.0]))
                points.append(peer._cma._mean + peer._A * (raw - peer._cma._mean))
            peer.tell(list(told))
            state = tell(method, ask(method, state)[1], (np.array(points) + 0.5) / 4, [loss for _, loss in told])
            d = state.search.distribution
            np.testing.assert_allclose(4 * d.mean - 0.5, peer._cma._mean, atol=1e-3)
            np.testing.assert_allclose(4 * d.sigma, peer._cma._sigma, rtol=1e-3)
            np.testing.assert_allclose(d.covariance, peer._cma._C, atol=2e-3)
            np.testing.assert_allclose(d.scale, peer._A[:2], rtol=2e-3)
            corrected |= bool((np.abs(peer._A[:2] - 1) > 0.1).any())
        assert corrected, "the margin had something to do"

    def test_categoricals_follow_catcma(self):
        number = np.array([3, 2, 4, 3, 3, 2] * 4)
        population = 10
        peer = cmaes.CatCMA(mean=np.zeros(2), sigma=1.0, cat_num=number, population_size=population, seed=0)
        q = uniform_categories(number)
        step = jax.jit(lambda q, gradient: learned_categories(q, gradient, number))
        weights = np.maximum(np.log((population + 1) / 2) - np.log(np.arange(1, population + 1)), 0)
        steps = 0
        while peer._eps <= 1:
            asked = [peer.ask() for _ in range(population)]
            losses = [x @ x - c[:, 0].sum() for x, c in asked]
            order = np.argsort(losses)
            gradient = np.einsum("i,ijk->jk", weights / weights.sum(), np.array([asked[i][1] for i in order]) - q.q)
            # The package takes its step by the trust region of the iteration before.
            peer._delta = peer._delta_init / peer._Delta
            peer.tell(list(zip(asked, losses, strict=True)))
            # Beyond 1 it goes on, where ours ends at the distribution of the weighted rows.
            q, steps = step(q, gradient), steps + 1
            if peer._eps <= 1:
                np.testing.assert_allclose(q.q, peer._q, atol=1e-4)
        assert steps > 15 and peer._q[:, 0].mean() > 0.6, "something was learned"


class TestWeights:
    def ranks(self, losses, mask=None):
        losses = jnp.asarray(losses, jnp.float32)
        mask = jnp.ones(len(losses), bool) if mask is None else jnp.asarray(mask)
        less, equal = standings(losses, mask)
        weights = weights_of(less, equal, mask.sum(), (mask & jnp.isfinite(losses)).sum(), False)
        return less, equal, weights

    @pytest.mark.parametrize("m", [9, 300])
    def test_standings_are_counts(self, m):
        losses = np.random.default_rng(0).integers(-3, 3, m) * 0.5
        losses[losses == 0] = np.random.default_rng(1).choice([0.0, -0.0], (losses == 0).sum())
        mask = np.random.default_rng(2).random(m) < 0.7
        less, equal, _ = self.ranks(losses, mask)
        np.testing.assert_array_equal(less[mask], (losses[None, mask] < losses[mask, None]).sum(1))
        np.testing.assert_array_equal(equal[mask], (losses[None, mask] == losses[mask, None]).sum(1))

    def test_ties_share_and_failed_rows_never_lead(self):
        inf = np.inf
        _, _, w = self.ranks([3.0, 1.0, inf, 1.0, inf, inf, 9.0, 9.0], [True] * 7 + [False])
        raw = np.log(4) - np.log(np.arange(1, 8))  # seven rows: 1 1 3 9 failed failed failed
        lead = np.array([raw[2], raw[:2].mean(), 0, raw[:2].mean(), 0, 0, 0, 0])
        trail = np.array([0, 0, raw[4:].mean(), 0, raw[4:].mean(), raw[4:].mean(), raw[3], 0])
        np.testing.assert_allclose(w.positive, lead / lead.sum(), atol=1e-6)
        np.testing.assert_allclose(w.negative, -trail / trail.sum(), atol=1e-6)
        _, _, w = self.ranks([inf, 2.0, inf, inf])
        np.testing.assert_allclose(w.positive, [0, 1, 0, 0])

    def test_a_plateau_moves_no_weight(self):
        _, _, w = self.ranks(np.ones(6))
        np.testing.assert_allclose(w.positive, 1 / 6, rtol=1e-5)
        np.testing.assert_allclose(w.negative, -1 / 6, rtol=1e-5)

    def test_normals_are_normal(self):
        z = np.asarray(normals(jax.random.key(0), 999, 7))
        assert z.shape == (999, 7) and kstest(z.ravel(), "norm").pvalue > 0.01
        np.testing.assert_allclose(np.corrcoef(z.T), np.eye(7), atol=0.12)


class TestMargin:
    def test_limits_are_where_the_levels_meet(self):
        space = hpo.Space(
            {"a": hpo.Int(3, 40, log=True), "b": hpo.Categorical(("x", "y", "z")), "c": hpo.Int(0, 9, step=3)}
        )
        integers = integers_of(space)
        mean = jnp.array([0.5, 0.4])
        low, high = limits(space, integers, mean)
        for end, side in ((low, -1), (high, 1)):
            here, beyond = (
                space.level(jnp.array([[e[0], 0.5, e[1]]])[0]) for e in (end - side * 1e-4, end + side * 1e-4)
            )
            assert (np.asarray(beyond - here)[[0, 2]] == side).all()
        for at, expected in ((0.01, 0.25), (0.99, 0.75)):
            low, high = limits(space, integers, jnp.array([0.5, at]))
            np.testing.assert_allclose([low[1], high[1]], expected, atol=1e-6)

    def test_every_side_keeps_its_share_and_nothing_else_moves(self):
        low = jnp.array([0.25, 0.25, 0.5, 0.25])
        high = jnp.array([0.5, 0.5, 0.75, 0.25])
        mean = jnp.array([0.3, 0.375, 0.6, 0.02])
        deviation = jnp.array([0.01, 0.001, 0.2, 0.003])
        moved, scale = with_margin(mean, deviation, jnp.ones(4), low, high, jnp.float32(0.05))
        below, above = norm.cdf((low - moved) / (deviation * scale)), norm.sf((high - moved) / (deviation * scale))
        np.testing.assert_allclose(below[:2], 0.025, rtol=0.02)
        np.testing.assert_allclose(above[:2], 0.025, rtol=0.02)
        assert (moved[2], scale[2]) == (mean[2], 1)
        np.testing.assert_allclose(above[3], 0.05, rtol=0.01)
        assert scale[3] == 1 and moved[3] < 0.25

    def test_the_margin_finds_what_lies_beyond_the_next_level(self):
        space = {"n": hpo.Array(4, -5.0, 5.0), **{f"k{i}": hpo.Int(0, 9) for i in range(6)}}

        def loss(t):
            ks = np.stack([t.hparams[f"k{i}"] for i in range(6)], -1)
            return 1e4 * (t.hparams["n"] ** 2).sum(-1) + ((ks - 8) ** 2).sum(-1)

        def solved(margin):
            method = cma_es(space, population=12, batch=12, sigma=0.05, margin=margin, **TEXTBOOK)
            return sum(float(run(method, loss, 250, seed)[1][0].min()) < 0.5 for seed in range(2))

        assert solved(True) == 2
        assert solved(False) == 0


class TestCategories:
    def test_a_step_goes_no_further_than_the_rows_themselves(self):
        number = np.array([2])
        q = learned_categories(uniform_categories(number), jnp.array([[0.1, -0.1]]), number)
        np.testing.assert_allclose(q.q, [[0.6, 0.4]], rtol=1e-5)

    def test_probabilities_keep_their_margin(self):
        number = np.array([4, 2, 1])
        q = uniform_categories(number)
        gradient = jnp.array([[0.75, -0.25, -0.25, -0.25], [-0.5, 0.5, 0, 0], [0, 0, 0, 0]])
        for _ in range(30):
            q = learned_categories(q, gradient, number)
        assert not any(np.isnan(x).any() for x in q)
        np.testing.assert_allclose(q.q.sum(1), 1, rtol=1e-5)
        least = least_probability(number)[:, 0]
        np.testing.assert_allclose(q.q[0, 1:], least[0], rtol=1e-4)
        np.testing.assert_allclose([q.q[1, 0], q.q[2, 0]], [least[1], 1], rtol=1e-4)

    def test_finds_the_best_of_categories(self):
        space = {f"c{i}": hpo.Categorical(("a", "b", "c", "d")) for i in range(8)}
        loss = lambda t: sum((t.hparams[f"c{i}"] != i % 4) * 1.0 for i in range(8))  # noqa: E731
        _, (losses, _) = run(cma_es(space, batch=16), loss, 40)
        assert losses.min() == 0  # one of 65,536 points, after 640 trials

    def test_dims_of_a_branch_that_is_not_chosen_have_no_say(self):
        space = hpo.Space({"m": hpo.OneOf(a={"k": hpo.Categorical(("x", "y", "z"))}, b={})})
        method = cma_es(space, population=4, batch=4, **TEXTBOOK)
        state = method.init(jax.random.key(0))
        unit = jnp.array([[0.75, 0.1], [0.75, 0.1], [0.25, 0.9], [0.25, 0.9]])
        q = tell(method, state, unit, [1.0, 2.0, 3.0, 4.0]).search.categories.q
        assert q[0, 1] > 0.7
        np.testing.assert_allclose(q[1], 1 / 3, rtol=1e-5)


class TestInvariance:
    def test_a_rotated_function_gives_a_rotated_path_of_the_full_covariance_only(self):
        dims, population, rng = 4, 12, np.random.default_rng(0)
        rotation = np.linalg.qr(rng.standard_normal((dims, dims)))[0]
        turn = lambda x: (x - 0.5) @ rotation.T + 0.5  # noqa: E731
        gap = {}
        for kind in ("full", "separable"):
            method = cma_es(
                cube(dims), population=population, batch=population, sigma=0.02, covariance=kind, **TEXTBOOK
            )
            plain = turned = method.init(jax.random.key(0))
            for _ in range(20):
                d = plain.search.distribution
                c = np.asarray(d.covariance) if kind == "full" else np.diag(d.covariance)
                points = rng.multivariate_normal(d.mean, d.sigma**2 * c, population)
                losses = ellipsoid(points)
                plain = tell(method, ask(method, plain)[1], points, losses)
                turned = tell(method, ask(method, turned)[1], turn(points), losses)
            a, b = plain.search.distribution, turned.search.distribution
            gap[kind] = abs(np.log(a.sigma / b.sigma))
            np.testing.assert_allclose(turn(np.asarray(a.mean)), b.mean, atol=1e-6)
            if kind == "full":
                np.testing.assert_allclose(rotation @ a.covariance @ rotation.T, b.covariance, atol=2e-3)
        assert gap["full"] < 1e-3 < 0.05 < gap["separable"]

    def test_a_monotone_transform_changes_nothing(self):
        method = cma_es({"x": hpo.Array(3, -5.0, 5.0), "c": hpo.Categorical(("a", "b"))}, batch=5, population=9)
        plain = other = method.init(jax.random.key(0))
        for i in range(60):
            (trials, plain), (same, other) = (ask(method, state, i) for state in (plain, other))
            np.testing.assert_array_equal(trials.unit, same.unit)
            loss = (np.asarray(trials.hparams["x"], float) ** 2).sum(-1) + 0.3 * np.asarray(trials.hparams["c"])
            plain = compiled(method.tell)(plain, trials, jnp.asarray(loss, jnp.float32))
            other = compiled(method.tell)(other, same, jnp.asarray(3 * np.log(loss) - 7, jnp.float32))
        assert plain.search.distribution.generation > 20

    def test_the_order_of_rows_does_not_matter(self):
        method = cma_es(cube(3), batch=8, restarts=None)
        unit = np.random.default_rng(0).random((8, 3))
        losses = np.array([1.0, 2, 2, 5, np.inf, 3, 0, 2])
        order = np.random.default_rng(1).permutation(8)
        state = method.init(jax.random.key(0))
        a = tell(method, state, unit, losses).search.distribution
        b = tell(method, state, unit[order], losses[order]).search.distribution
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


class TestGenerations:
    def test_a_generation_ends_when_enough_is_told_and_uses_all_of_it(self):
        method = cma_es(cube(2), population=5, batch=4, **TEXTBOOK)
        rng, state = np.random.default_rng(0), method.init(jax.random.key(0))
        first, second = rng.random((4, 2)), rng.random((4, 2))
        half = tell(method, state, first, ellipsoid(first))
        assert (half.search.distribution.generation, half.told.count) == (0, 4)
        whole = tell(method, half, second, ellipsoid(second))
        assert (whole.search.distribution.generation, whole.told.count) == (1, 0)
        points = np.concatenate([first, second])
        larger = cma_es(cube(2), population=8, batch=8, **TEXTBOOK)
        at_once = tell(larger, larger.init(jax.random.key(0)), points, ellipsoid(points))
        np.testing.assert_allclose(whole.search.distribution.mean, at_once.search.distribution.mean, rtol=1e-5)
        np.testing.assert_allclose(
            whole.search.distribution.covariance, at_once.search.distribution.covariance, atol=1e-5
        )

    def test_the_best_rows_take_part_again(self):
        method = cma_es(cube(2), population=6, elites=2, batch=4, restarts=None)
        state = method.init(jax.random.key(0))
        unit = np.array([[0.4, 0.5], [0.45, 0.5], [0.6, 0.5], [0.7, 0.5]])
        state = tell(method, state, unit, [1.0, 2.0, 3.0, np.nan])
        np.testing.assert_allclose(state.search.elites.unit, unit[:2], rtol=1e-6)
        before = state.search.distribution
        worse = np.array([[0.6, 0.6]] * 4)
        after = tell(method, state, worse, [7.0, 8.0, 9.0, 10.0])
        textbook = cma_es(cube(2), population=6, batch=6, **TEXTBOOK)
        same = textbook.init(jax.random.key(0))
        same = same._replace(search=same.search._replace(distribution=before))
        same = tell(textbook, same, np.concatenate([unit[:2], worse]), [1.0, 2.0, 7.0, 8.0, 9.0, 10.0])
        np.testing.assert_allclose(after.search.distribution.mean, same.search.distribution.mean, rtol=1e-5)
        np.testing.assert_array_equal(after.search.elites.losses, [1, 2])

    def test_a_failed_generation_widens_the_search(self):
        method = cma_es(cube(2), population=4, batch=4, sigma=0.3, **TEXTBOOK)
        state = method.init(jax.random.key(0))
        narrow = state.search.distribution._replace(sigma=jnp.float32(0.1), mean=jnp.array([0.2, 0.7]))
        state = state._replace(search=state.search._replace(distribution=narrow))
        told = tell(method, state, np.random.default_rng(0).random((4, 2)), [np.nan] * 4).search.distribution
        np.testing.assert_allclose([*told.mean, told.sigma], [0.2, 0.7, 0.15], rtol=1e-6)

    def test_a_row_from_far_away_does_not_break_the_distribution(self):
        method = cma_es(cube(2), population=4, batch=4, sigma=1e-4, **TEXTBOOK)
        unit = np.array([[0.0, 1.0], [0.5, 0.5], [0.5001, 0.5], [0.5, 0.4999]])
        d = tell(method, method.init(jax.random.key(0)), unit, [1.0, 2.0, 3.0, 4.0]).search.distribution
        assert np.abs(d.mean - 0.5).max() < 10e-4
        assert np.abs(d.covariance).max() < 50

    def test_active_weights_forget_bad_directions_faster(self):
        def spread(active):
            method = cma_es(cube(6), population=12, batch=12, sigma=0.1, active=active, **TEXTBOOK)
            end, _ = run(method, lambda t: ellipsoid(t.unit, condition=1e6), 60)
            return np.linalg.cond(end.search.distribution.covariance)

        assert spread(True) > 3 * spread(False)

    def test_a_late_decomposition_costs_no_generations(self, decompose):
        needed, layout = {}, Layout(12, 0, 12, False, True, True, None)
        for age in (0, AGE):
            decompose(age)
            assert (asks_per_decomposition(layout, 20) > 5) == (age > 0)
            method = cma_es(cube(20), population=12, batch=12, sigma=0.2, **TEXTBOOK)
            _, (losses, _) = run(method, lambda t: ellipsoid(t.unit, condition=100), 400)
            needed[age] = int(np.argmax(np.asarray(losses).min(1) < 1e-6))
        assert 0 < needed[AGE] < 1.2 * needed[0]


class TestRestarts:
    def test_ipop_doubles_and_bipop_spends_alike(self):
        ipop = bipop = first_run(10)._replace(told=jnp.int32(500))
        sizes, spent = [], []
        for i in range(12):
            uniforms = jnp.array([0.5, 0.5]) if i % 2 else jnp.array([1.0, 0.1])
            ipop, factor = next_run(ipop, uniforms, 10, "ipop")
            sizes.append(int(ipop.population))
            assert factor == 1
            bipop, factor = next_run(bipop, uniforms, 10, "bipop")
            spent.append((bool(bipop.is_small), int(bipop.population), float(factor)))
            bipop = bipop._replace(told=bipop.population * 30)
        assert sizes == [20, 40, 80, 160] + [320] * 8 and largest(10, "ipop") == 320
        assert spent[0] == (False, 20, 1) and spent[1][0], "the first run counts as small"
        small, large = [s for s in spent if s[0]], [s for s in spent if not s[0]]
        assert len(small) > len(large) > 1
        assert all(10 <= n <= large[-1][1] / 2 and 0.01 <= factor < 1 for _, n, factor in small)
        assert abs(int(bipop.spent[0]) - int(bipop.spent[1])) <= 30 * largest(10, "bipop")

    @pytest.mark.parametrize("restarts", ["ipop", "bipop", None])
    def test_a_search_that_is_stuck_starts_again_elsewhere(self, restarts):
        # The valley of the centre is wide, that of the corner is deeper.
        def loss(t):
            wide, deep = ((t.unit - 0.5) ** 2).sum(-1), ((t.unit - 0.9) ** 2).sum(-1)
            return np.minimum(wide, 4 * deep - 0.1)

        method = cma_es(cube(2), batch=10, sigma=0.05, restarts=restarts)
        end, (losses, _) = run(method, loss, 400)
        assert (losses.min() < -0.09) == (restarts is not None)
        assert (end.search.run.doublings > 0) == (restarts is not None)

    def test_a_plateau_is_left(self):
        method = cma_es(cube(2), batch=10, sigma=0.05, restarts="ipop")
        end, _ = run(method, lambda t: t.unit[:, 0] * 0, 300)
        assert end.search.run.doublings >= 2


def degenerate(trials):
    """In turns of 40 rounds: all NaN, all equal, one finite, fine."""
    turn = trials.id[0] // (3 * 40) % 4
    one = np.where(trials.id % 3 == 1, 1.0, np.inf)
    return [trials.unit[:, 0] * np.nan, trials.unit[:, 0] * 0, one, ellipsoid(trials.unit)][turn]


SPACES = {
    "one dim": {"x": hpo.Float(0.0, 1.0)},
    "categorical": {"a": hpo.Categorical(("x", "y", "z")), "b": hpo.Categorical((1,)), "c": hpo.Categorical((1, 2))},
    "integers": {"a": hpo.Int(1, 2), "b": hpo.Int(1, 1000, log=True), "c": hpo.Int(0, 2**30)},
}


@pytest.mark.parametrize("space", SPACES)
def test_degenerate_losses_leave_no_nan(space):
    end, (_, unit) = run(cma_es(SPACES[space], population=2, batch=3), degenerate, 320)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(end.search.distribution))
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(end))
    assert ((unit >= 0) & (unit <= 1)).all()


@pytest.mark.parametrize("kind", ["full", "separable"])
def test_goes_on_where_rounding_ends_the_search(kind):
    method = cma_es(cube(2), population=4, batch=4, covariance=kind, **TEXTBOOK)
    end, (_, unit) = run(method, lambda t: ellipsoid(t.unit), 400)
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(end))
    np.testing.assert_allclose(unit[-100:], 0.45, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "separable"])
def test_a_thousand_dims(kind):
    method = cma_es(cube(1000), covariance=kind, batch=24, sigma=0.02, restarts=None)
    end, (losses, unit) = run(method, lambda t: ((t.unit - 0.4) ** 2).sum(-1), 20)
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(end)) and ((unit >= 0) & (unit <= 1)).all()
    assert losses[-8:].mean() < losses[:8].mean()


@pytest.mark.parametrize("kind", ["full", "separable"])
def test_solves_what_it_is_for(kind):
    if kind == "separable":
        _, (losses, _) = run(
            cma_es(cube(5), batch=10, covariance=kind, restarts=None), lambda t: ellipsoid(t.unit), 200
        )
        assert losses.min() < 1e-9
        return

    def rosenbrock(t):
        x = t.hparams["x"]
        return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(-1)

    _, (losses, _) = run(cma_es({"x": hpo.Array(5, -2.0, 2.0)}, batch=10), rosenbrock, 400)
    assert losses.min() < 1e-6


def test_samples_are_the_distribution():
    method = cma_es(cube(2), batch=4000, **TEXTBOOK)
    state = method.init(jax.random.key(0))
    covariance = jnp.array([[1.0, 0.6], [0.6, 0.5]])
    d = state.search.distribution._replace(covariance=covariance, sigma=jnp.float32(0.03), mean=jnp.array([0.4, 0.6]))
    unit = np.asarray(ask(method, state._replace(search=state.search._replace(distribution=d)))[0].unit)
    np.testing.assert_allclose(unit.mean(0), d.mean, atol=0.002)
    np.testing.assert_allclose(np.cov(unit.T), 0.03**2 * covariance, rtol=0.08)
    z = np.linalg.solve(np.linalg.cholesky(covariance), ((unit - d.mean) / 0.03).T)
    assert kstest(z.ravel(), "norm").pvalue > 0.01


def test_default_population():
    assert cma_es(cube(5), batch=1).init(jax.random.key(0)).search.run.population == 8 - 3
    assert cma_es(cube(5), batch=16).init(jax.random.key(0)).search.run.population == 16


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"population": 1}, ValueError, "population must be at least 2, got 1"),
        ({"population": 8, "elites": 8}, ValueError, "elites must be at most 7, got 8"),
        ({"covariance": "diagonal"}, ValueError, r"covariance must be one of \['full', 'separable'\], got 'diagonal'"),
        ({"restarts": "yes"}, ValueError, r"restarts must be one of \['bipop', 'ipop', None\], got 'yes'"),
        ({"active": 1}, TypeError, "active must be True or False, got 1"),
        ({"margin": None}, TypeError, "margin must be True or False, got None"),
        ({"sigma": 0.0}, ValueError, "sigma must be in .*, got 0.0; it is a standard deviation in the unit cube"),
        ({"sigma": float("nan")}, ValueError, "sigma must be in .*, got nan"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
    ],
)
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=message):
        cma_es(cube(2), **bad)


@pytest.mark.parametrize("rows", [10, 100])
def test_rows_that_do_not_count_have_no_weight(rows):
    losses, mask = jnp.arange(float(rows)) % 7, jnp.arange(rows) < rows // 2
    less, equal = jax.jit(standings)(losses, mask)
    expected = [(losses[mask] == loss).sum() for loss in losses[mask]]
    np.testing.assert_array_equal(equal, [*expected, *[0] * (rows - rows // 2)])
    weights = weights_of(less, equal, jnp.int32(rows // 2), jnp.int32(rows // 2), False)
    for each, total in ((weights.positive, 1), (weights.negative, -1)):
        np.testing.assert_allclose(each[mask].sum(), total, rtol=1e-5)
        assert (each[~mask] == 0).all()


def test_minus_zero_is_as_good_as_zero():
    less, equal = jax.jit(standings)(jnp.array([-0.0, 0.0, 1.0]), jnp.ones(3, bool))
    assert (less.tolist(), equal.tolist()) == ([0, 0, 2], [2, 2, 1])


def test_generations_of_one_row_leave_no_nan():
    method = hpo.cma_es({"x": hpo.Array(2, 0.0, 1.0)}, population=2, batch=1)
    study = hpo.study(lambda key, h: ((h["x"] - 0.3) ** 2).sum(), method, rounds=200)
    state, traces = jax.jit(study)(jax.random.key(0))
    assert np.isfinite(traces.trials.unit).all() and np.isfinite(state.search.distribution.covariance).all()
    assert traces.losses.min() < 1e-2
