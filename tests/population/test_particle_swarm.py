"""Particle swarms against the update rules in NumPy, what a swarm may learn from, and what it does in odd spaces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfinv

import jaxhpo as hpo
from jaxhpo.population import particle_swarm
from jaxhpo.population.flight import choose, constricted, informants, leaders, spherical, uniforms, without_repeats
from jaxhpo.population.particle_swarm import Row


def cube(dims):
    return {"x": hpo.Array(dims, 0.0, 1.0)}


@functools.cache
def jitted(function):
    return jax.jit(function)


def ask(method, state, seed=0):
    return jitted(method.ask)(jax.random.key(seed), state)


def tell(method, state, trials, losses):
    return jitted(method.tell)(state, trials, jnp.asarray(losses, trials.unit.dtype))


def bowl(unit, at=0.9):
    """Its optimum is near a corner, so that bounds are hit."""
    return ((np.asarray(unit, np.float64) - at) ** 2 * np.arange(1, unit.shape[-1] + 1)).sum(-1)


def begun(method, loss=bowl):
    """The state after each particle was told of its first point."""
    state = method.init(jax.random.key(1))
    for seed in range(-(-len(state.loss) // method.batch)):
        trials, state = ask(method, state, seed)
        state = tell(method, state, trials, loss(trials.unit))
    return state


class Swarm:
    """The two rules as the papers have them, particle by particle."""

    def __init__(self, state):
        self.x, self.v = np.array(state.position, np.float64), np.array(state.velocity, np.float64)
        self.p, self.f = self.x.copy(), np.full(len(self.x), np.inf)

    def leader(self, topology, i, known):
        n = len(self.x)
        others = {"global": range(n), "ring": [(i - 1) % n, (i + 1) % n], "adaptive-random": known[i]}[topology]
        best = min([i, *others], key=lambda j: self.f[j])
        return best if self.f[best] < self.f[i] else i

    def constriction(self, i, g, r1, r2):
        chi, c = 0.7298, 2.05
        v = chi * (self.v[i] + c * r1 * (self.p[i] - self.x[i]) + c * r2 * (self.p[g] - self.x[i]))
        v = np.clip(v, -0.5, 0.5)
        x = self.x[i] + v
        v = np.where((x < 0) | (x > 1), -0.5 * v, v)
        return np.where(x < 0, -x, np.where(x > 1, 2 - x, x)), v

    def spso2011(self, i, g, r1, radius):
        w, c = 1 / (2 * np.log(2)), 0.5 + np.log(2)
        x, p, q = self.x[i], self.x[i] + c * (self.p[i] - self.x[i]), self.x[i] + c * (self.p[g] - self.x[i])
        centre = (x + p) / 2 if g == i else (x + p + q) / 3
        direction = erfinv(2 * r1 - 1)
        inside = centre + radius * np.linalg.norm(centre - x) * direction / np.linalg.norm(direction)
        v = w * self.v[i] + inside - x
        return np.clip(x + v, 0, 1), np.where((x + v < 0) | (x + v > 1), -0.5 * v, v)

    def told(self, i, x, v, loss):
        self.x[i], self.v[i] = x, v
        if loss <= self.f[i]:
            self.p[i], self.f[i] = x, loss


@pytest.mark.parametrize(
    "variant, topology, batch",
    [
        ("constriction", "global", 6),
        ("constriction", "ring", 4),
        ("spso2011", "global", 6),
        ("spso2011", "adaptive-random", 4),
    ],
)
def test_follows_the_rules_as_the_papers_have_them(variant, topology, batch):
    n, dims = 6, 3
    method = particle_swarm(cube(dims), particles=n, variant=variant, topology=topology, batch=batch)
    state = method.init(jax.random.key(3))
    swarm = Swarm(state)
    for round in range(9):
        move, scale, *_ = jax.random.bits(jax.random.key(round), (4, 2))
        r1, r2 = (np.asarray(r, np.float64) for r in uniforms(move, (batch, dims)))
        radius = np.asarray(uniforms(scale, (batch, 1))[0], np.float64)
        known, told = np.asarray(informants(state.draw, n)), []
        trials, state = ask(method, state, round)
        for k in range(batch):
            turn = round * batch + k
            i = turn % n
            assert trials.aux.particle[k] == i
            x, v = swarm.x[i], swarm.v[i]
            if turn >= n:
                g = swarm.leader(topology, i, known)
                random = (r1[k], r2[k] if variant == "constriction" else radius[k])
                x, v = getattr(swarm, variant)(i, g, *random)
            np.testing.assert_allclose(trials.unit[k], x, atol=3e-5)
            np.testing.assert_allclose(trials.aux.velocity[k], v, atol=3e-5)
            told.append((i, np.asarray(trials.unit[k]), np.asarray(trials.aux.velocity[k])))
        losses = bowl(trials.unit)
        state = tell(method, state, trials, losses)
        for (i, x, v), loss in zip(told, losses, strict=True):
            swarm.told(i, x, v, loss)
        np.testing.assert_allclose(state.best, swarm.p, atol=1e-7)
        np.testing.assert_allclose(state.loss, swarm.f, rtol=1e-5)


def test_informants_change_after_a_turn_that_brought_nothing():
    method = particle_swarm(cube(3), particles=6, variant="spso2011", batch=4)
    state, draws = method.init(jax.random.key(0)), []
    for round, loss in enumerate([5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0]):
        trials, state = ask(method, state, round)
        state = tell(method, state, trials, np.full(4, loss))
        draws.append(tuple(state.draw.tolist()))
    # The best loss fell with asks 0, 1 and 6; six particles are told of in two asks.
    assert [a != b for a, b in zip(draws, draws[1:], strict=False)] == [False, False, True, False, True, False]
    found = np.asarray(informants(state.draw, 6))
    assert found.shape == (6, 3) and found.min() >= 0 and found.max() <= 5 and len(np.unique(found)) > 2


def test_neighbourhoods():
    loss, rows = jnp.array([3.0, 1.0, 4.0, 4.0, 0.0, 5.0, jnp.inf]), jnp.arange(7)
    draw = jnp.array([1, 2], jnp.uint32)
    of = lambda topology: leaders(topology, loss, draw, rows).tolist()  # noqa: E731
    assert of("global") == [4] * 7
    assert of("ring") == [1, 1, 1, 4, 4, 4, 0]
    known = np.asarray(informants(draw, 7))
    assert of("adaptive-random") == [min([i, *known[i]], key=lambda j: (float(loss[j]), j != i)) for i in range(7)]
    nothing = jnp.full(7, jnp.inf)
    for topology in ("global", "ring", "adaptive-random"):
        assert leaders(topology, nothing, draw, rows).tolist() == list(range(7)), "nobody follows a failure"


def test_a_hypersphere_does_not_know_the_axes_and_constriction_does():
    settings = particle_swarm(cube(3), variant="spso2011").settings
    n = 4000
    x, best, leader = (jnp.tile(jnp.array([[a, 0.5, 0.5]]), (n, 1)) for a in (0.2, 0.4, 0.8))
    still, follows = jnp.zeros((n, 3)), jnp.zeros((n, 1), bool)
    r1, r2 = uniforms(jnp.array([1, 2], jnp.uint32), (n, 3))
    normal = jnp.asarray(erfinv(2 * np.asarray(r1) - 1))
    moved = np.asarray(spherical(settings, x, still, best, leader, follows, normal, r2[:, :1]), np.float64)
    c = 0.5 + np.log(2)
    centre = np.array([c * (0.2 + 0.6) / 3, 0, 0])
    distance = np.linalg.norm(moved - centre, axis=1) / centre[0]
    assert distance.max() <= 1 + 1e-5 and abs(distance.mean() - 0.5) < 0.02, "uniform in its radius"
    np.testing.assert_allclose(moved.mean(0), centre, atol=0.01)
    np.testing.assert_allclose(np.cov(moved.T), np.eye(3) * centre[0] ** 2 / 9, atol=0.003)

    axial = np.asarray(constricted(settings, x, still, best, leader, r1, r2))
    assert (axial[:, 1:] == 0).all() and axial[:, 0].std() > 0.05


def test_a_thousand_swarms_in_one_vmap_equal_a_thousand_runs():
    method = particle_swarm({"x": hpo.Array(3, -5.0, 5.0), "k": hpo.Int(0, 7)}, particles=6, batch=6)

    def loss(key, hparams):
        return (hparams["x"] ** 2).sum() + hparams["k"]

    run = lambda key: hpo.study(loss, method, rounds=5)(key)[1].losses  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 1000)
    together, single = jax.jit(jax.vmap(run))(keys), jax.jit(run)
    apart = np.stack([single(key) for key in keys])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)
    assert len(np.unique(apart[:, -1, 0])) > 990


@pytest.mark.parametrize("variant, topology", [("constriction", "ring"), ("spso2011", "adaptive-random")])
def test_a_monotone_transform_of_the_losses_changes_nothing(variant, topology):
    method = particle_swarm(cube(3), particles=6, variant=variant, topology=topology, batch=4)

    def units(transform):
        state, found = method.init(jax.random.key(2)), []
        for round in range(8):
            trials, state = ask(method, state, round)
            state = tell(method, state, trials, transform(bowl(trials.unit)))
            found.append(np.asarray(trials.unit))
        return found

    np.testing.assert_array_equal(units(lambda y: y), units(lambda y: np.exp(3 * y) - 50))


class TestLearning:
    method = particle_swarm(cube(2), particles=4, batch=4)

    def test_rows_in_any_order_and_in_parts(self):
        state = begun(self.method)
        trials, after = ask(self.method, state, 7)
        losses = jnp.array([0.3, 0.01, jnp.nan, 0.2])
        whole = tell(self.method, after, trials, losses)
        order = jnp.array([2, 0, 3, 1])
        part = lambda at: (jax.tree.map(lambda x: x[at], trials), losses[at])  # noqa: E731
        permuted = tell(self.method, after, *part(order))
        halves = tell(self.method, tell(self.method, after, *part(order[:2])), *part(order[2:]))
        for other in (permuted, halves):
            jax.tree.map(np.testing.assert_array_equal, whole, other)
        np.testing.assert_array_equal(whole.position, trials.unit)
        np.testing.assert_array_equal(whole.velocity, trials.aux.velocity)

    def test_the_best_of_several_rows_of_a_particle_counts(self):
        state = begun(self.method)
        trials, after = ask(self.method, state, 7)
        rows = trials._replace(aux=Row(jnp.array([1, 1, 1, 3]), trials.aux.begins, trials.aux.velocity))
        told = tell(self.method, after, rows, jnp.array([0.02, 0.01, 0.03, jnp.nan]))
        np.testing.assert_array_equal(told.position[1], trials.unit[1])
        np.testing.assert_array_equal(told.best[1], trials.unit[1])
        assert told.loss[1] == np.float32(0.01)
        np.testing.assert_array_equal(told.best[3], state.best[3])
        np.testing.assert_array_equal(told.position[3], trials.unit[3])
        for same in (0, 2):
            np.testing.assert_array_equal(told.position[same], state.position[same])

    def test_an_equal_loss_replaces_the_best_point_and_a_failed_trial_does_not(self):
        state = begun(self.method)
        trials, after = ask(self.method, state, 7)
        losses = state.loss.at[2].set(-jnp.inf).at[3].set(jnp.nan)
        told = tell(self.method, after, trials, losses)
        np.testing.assert_array_equal(told.best[:2], trials.unit[:2])
        np.testing.assert_array_equal(told.best[2:], state.best[2:])
        np.testing.assert_array_equal(told.loss, state.loss)

    def test_what_is_known_beforehand_takes_no_particle_its_beginning(self):
        state = self.method.init(jax.random.key(1))
        asked, _ = ask(self.method, state, 5)
        known = asked._replace(unit=jnp.full((4, 2), 0.9), active=jnp.arange(4) < 2)
        told = tell(self.method, state, known, jnp.array([1e-3, 2e-3, jnp.nan, jnp.nan]))
        first, told = ask(self.method, told, 6)
        np.testing.assert_array_equal(first.unit, state.position)
        second, _ = ask(self.method, tell(self.method, told, first, bowl(first.unit)), 7)
        towards = np.sign(np.float32(0.9) - np.asarray(first.unit))[2:]
        drift = np.asarray(second.unit)[2:] - np.asarray(first.unit)[2:] - 0.7298 * np.asarray(state.velocity)[2:]
        assert (drift * towards > -1e-3).all(), "all follow the known point"

    def test_first_points_cover_every_dim(self):
        method = particle_swarm(cube(3), particles=6, topology="ring", batch=4)
        state, points = method.init(jax.random.key(0)), []
        for round in range(2):
            trials, state = ask(method, state, round)
            points.append(trials.unit)
        first = np.concatenate(points)[:6]
        np.testing.assert_array_equal(np.sort((first * 6).astype(int), axis=0), np.arange(6)[:, None].repeat(3, 1))

    def test_a_swarm_without_a_success_walks_all_over_the_space(self):
        state, seen = self.method.init(jax.random.key(0)), []
        for round in range(200):
            trials, state = ask(self.method, state, round)
            state = tell(self.method, state, trials, np.full(4, np.nan))
            seen.append(np.asarray(trials.unit))
        assert not np.isnan(state.best).any() and (np.asarray(state.loss) == np.inf).all()
        share = np.histogram2d(*np.concatenate(seen).T, 3, [(0, 1), (0, 1)])[0] / 800
        assert share.min() > 1 / 20


TREE = {
    "a": hpo.Categorical(("x", "y", "z")),
    "net": hpo.OneOf(cnn={"k": hpo.Float(0.0, 1.0)}, mlp={"h": hpo.Float(0.0, 1.0)}),
    "lr": hpo.Float(0.0, 1.0),
}


class TestChoices:
    space = hpo.Space(TREE)
    at = {name: i for i, name in enumerate(space.names)}

    def points(self, n):
        """x, best and leader, whose levels and values all differ."""
        return (jnp.full((n, self.space.dims), u) for u in (0.2, 0.6, 0.9))

    def test_come_from_either_best_point_or_anew_with_their_chances(self):
        n = 20_000
        x, best, leader = self.points(n)
        settings = particle_swarm(TREE, recall=0.2, imitation=0.5, mutation=0.1).settings
        child, came = choose(self.space, settings, jnp.array([3, 4], jnp.uint32), x, best, leader)
        a, came = np.asarray(child)[:, self.at["a"]], np.asarray(came)
        shares = [(a == np.float32(u)).mean() for u in (0.2, 0.6, 0.9)]
        np.testing.assert_allclose(shares, [0.2, 0.2, 0.5], atol=0.015)
        anew = a[~np.isin(a, np.float32([0.2, 0.6, 0.9]))]
        np.testing.assert_allclose([len(anew) / n, anew.mean(), anew.std()], [0.1, 0.5, 12**-0.5], atol=0.02)
        assert came[:, self.at["a"]].all() and not came[:, self.at["lr"]].any()
        assert (np.asarray(child)[:, self.at["lr"]] == np.float32(0.2)).all()

    def test_carry_what_is_below_them(self):
        x, best, leader = self.points(200)
        settings = particle_swarm(TREE, recall=0.5, imitation=0.5, mutation=0.0).settings
        child, came = (
            np.asarray(y) for y in choose(self.space, settings, jnp.array([3, 4], jnp.uint32), x, best, leader)
        )
        net, k, h = (child[:, self.at[name]] for name in ("net", "net.cnn.k", "net.mlp.h"))
        assert set(net) == set(np.float32([0.6, 0.9])) and (k == h).all() and (k != np.float32(0.2)).all()
        # Best and leader are in one branch: its inner dims come with the first of them, and fly from there.
        assert came[:, self.at["net.mlp.h"]].all()

    def test_have_no_velocity_and_are_not_pulled(self):
        method = particle_swarm(TREE, particles=3, variant="spso2011", batch=7)
        state = begun(method)
        assert (state.velocity[:, self.space.categorical] == 0).all()
        trials, _ = ask(method, state, 8)
        assert (trials.aux.velocity[:, self.space.categorical] == 0).all()
        lr = self.at["lr"]
        assert (trials.aux.velocity[:, lr] != 0).all()

    @pytest.mark.parametrize(
        "tree",
        [
            {"a": hpo.Categorical(("x", "y", "z")), "b": hpo.Categorical((1, 2)), "c": hpo.Int(0, 3)},
            {"o": hpo.OneOf(p={"c": hpo.Int(0, 5)}, q={"z": hpo.Float(0, 1)}), "two": hpo.Int(3, 4)},
        ],
        ids=["levels only", "a branch with a real dim"],
    )
    def test_no_evaluation_is_spent_on_a_point_that_is_known(self, tree):
        space = hpo.Space(tree)
        method = particle_swarm(space, particles=4, batch=4)
        state = begun(method)

        def what(unit):
            live, level = np.asarray(space.active(unit)), np.asarray(space.level(unit))
            shown = np.array(unit, np.float64)
            shown[:, space.levels > 0] = level
            return [tuple(row[on]) for row, on in zip(shown, live, strict=True)]

        spent = []
        for round in range(10, 40):
            trials, after = ask(method, state, round)
            leader = jnp.broadcast_to(state.best[jnp.argmin(state.loss)], trials.unit.shape)
            known = zip(*map(what, (state.position, state.best, leader)), strict=True)
            spent += [point in others for point, others in zip(what(trials.unit), known, strict=True)]
            state = tell(method, after, trials, bowl(trials.unit))
        # What was changed may have become another of the three.
        assert np.mean(spent) < 0.15

    def test_only_repeats_are_changed_and_in_one_live_dim(self):
        space = hpo.Space({"a": hpo.Int(0, 4), "b": hpo.Categorical(("x", "y", "z"))})
        unit = jnp.array([[0.1, 0.1], [0.5, 0.5], [0.9, 0.9]])
        same = unit.at[1].set(0.05) + 0.01
        changed = np.asarray(without_repeats(space, jnp.array([5, 6], jnp.uint32), unit, (same,)))
        assert ((np.asarray(space.level(changed)) != np.asarray(space.level(unit))).sum(1) == [1, 0, 1]).all()
        np.testing.assert_array_equal(changed[1], unit[1])


@pytest.mark.parametrize(
    "variant, tree, particles, batch",
    [
        ("spso2011", cube(1), 2, 1),
        ("constriction", cube(1000), 3, 3),
        ("constriction", {"c": hpo.Categorical((1, 2))}, 2, 5),
        ("spso2011", TREE, 3, 7),
    ],
    ids=["one dim", "1,000 dims", "one choice", "more rows than particles"],
)
def test_degenerate_spaces_and_losses(variant, tree, particles, batch):
    method = particle_swarm(tree, particles=particles, variant=variant, batch=batch)
    losses = [np.full(batch, np.nan), np.full(batch, 1.0), np.full(batch, np.inf)]
    losses.append(np.where(np.arange(batch) == 0, -1.0, np.nan))
    state = method.init(jax.random.key(0))
    for round in range(8):
        trials, state = ask(method, state, round)
        unit = np.asarray(trials.unit)
        assert ((unit >= 0) & (unit <= 1)).all() and trials.active.all()
        state = tell(method, state, trials, losses[round % 4])
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(state))
    assert float(state.loss.min()) == -1.0


@pytest.mark.parametrize("variant, lands", [("constriction", 0.25), ("spso2011", 0.0)])
def test_bounds_reflect_or_cut_and_turn_the_velocity_round(variant, lands):
    method = particle_swarm(cube(3), particles=6, variant=variant, topology="global", damping=0.25, inertia=1, batch=6)
    # At its own best point, which is the swarm's: inertia alone moves it.
    here = jnp.full((6, 3), 0.125)
    state = begun(method)._replace(position=here, best=here, velocity=here - 0.5, loss=jnp.zeros(6))
    trials, _ = ask(method, state)
    np.testing.assert_allclose(trials.unit, lands, atol=1e-6)
    np.testing.assert_allclose(trials.aux.velocity, 0.25 * 0.375, atol=1e-6)


def test_velocities_are_clamped():
    method = particle_swarm(cube(3), particles=6, max_velocity=0.05, batch=6)
    state = begun(method)
    trials, _ = ask(method, state, 3)
    moves = np.abs(np.asarray(trials.unit) - np.asarray(state.position))
    assert moves.max() <= 0.05 + 1e-6 and (moves > 0.0499).mean() > 0.3


def test_the_other_variant_converges_too():
    method = particle_swarm({"x": hpo.Array(5, -5.0, 5.0)}, particles=20, variant="spso2011", batch=20)
    run = hpo.study(lambda key, hparams: ((hparams["x"] - 1) ** 2).sum(), method, rounds=150)
    best = jax.jit(jax.vmap(lambda key: run(key)[1].losses.min()))(jax.random.split(jax.random.key(0), 16))
    assert np.median(best) < 1e-6 and np.max(best) < 1e-2


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"particles": 1}, r"particles must be at least 2, got 1; one alone"),
        ({"particles": 2.5}, r"particles must be an integer, got 2.5"),
        ({"batch": 0}, r"batch must be at least 1, got 0"),
        ({"variant": "spso"}, r"variant must be one of \['constriction', 'spso2011'\], got 'spso'"),
        ({"topology": "star"}, r"topology must be one of \['global', 'ring', 'adaptive-random'\], got 'star'"),
        ({"inertia": 1.5}, r"inertia must be in \[0, 1\], got 1.5"),
        ({"cognitive": float("nan")}, r"cognitive must be in \[0, 4\], got nan"),
        ({"social": "high"}, r"social must be a number, got 'high'"),
        ({"max_velocity": -0.1}, r"max_velocity must be in \[0, 1\], got -0.1"),
        ({"damping": 2}, r"damping must be in \[0, 1\], got 2"),
        ({"recall": 0.6, "imitation": 0.5}, r"recall, imitation and mutation .* got .*0.6.*lower one of them"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        particle_swarm(cube(2), **wrong)


def test_defaults_are_those_of_the_papers():
    assert len(particle_swarm(cube(2)).init(jax.random.key(0)).loss) == 40
    assert len(particle_swarm(cube(2), batch=64).init(jax.random.key(0)).loss) == 64
    s = particle_swarm(cube(2)).settings
    np.testing.assert_allclose([s.inertia, s.cognitive, s.social], [0.7298, 1.49609, 1.49609], rtol=1e-6)
    s = particle_swarm(cube(2), variant="spso2011").settings
    np.testing.assert_allclose([s.inertia, s.cognitive, s.social], [0.7213475, 1.1931472, 1.1931472], rtol=1e-6)
    assert particle_swarm(cube(2), inertia=0.5, social=2).settings[:3] == (0.5, s.cognitive * 0 + 0.7298 * 2.05, 2)


def test_known_results_are_not_tried_again():
    known = [({"x": x}, x) for x in np.linspace(0.05, 0.95, 16).tolist()]
    method = hpo.particle_swarm({"x": hpo.Float(0.0, 1.0)}, particles=4, batch=16)
    objective = lambda key, h: h["x"]  # noqa: E731
    result = hpo.minimize(objective, method, key=jax.random.key(0), trials=16, initial=known, progress=False)
    tried = np.asarray(result.trials.hparams["x"])[np.asarray(result.trials.id) >= 0]
    assert len(tried) == 16 and np.abs(tried[:, None] - np.array([x for _, x in known])).min() > 1e-5
