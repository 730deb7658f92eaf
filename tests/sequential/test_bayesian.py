"""Bayesian optimization: what it proposes, with each surrogate and acquisition, and how its models grow."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo import history as record
from jaxhpo.method import black_box
from jaxhpo.sequential import proposal
from jaxhpo.sequential.surrogate import ensemble, gp
from jaxhpo.sequential.surrogate.kernel import features
from jaxhpo.untried import among, canonical, everything, fingerprints

BOWL = hpo.Space({"x": hpo.Array(2, 0.0, 1.0)})
EIGHT = hpo.Space({n: hpo.Categorical(("no", "yes")) for n in "abc"})
MIXED = hpo.Space(
    {
        "lr": hpo.Float(1e-4, 1.0, log=True),
        "width": hpo.Int(1, 64),
        "opt": hpo.OneOf(sgd={"momentum": hpo.Float(0.0, 1.0)}, adam={}),
    }
)


once = functools.cache(jax.jit)


def jitted(method):
    """The functions of a method, compiled once for all tests."""
    return jax.jit(method.init), once(method.ask), once(method.tell)


def told(method, unit, losses, capacity=64, key=0):
    """A state that was told these trials, and asks its model next."""
    init, _, tell = jitted(method)
    unit = jnp.asarray(unit, jnp.float32)
    state = method.reserve(init(hpo.ask_key(jax.random.key(key))), capacity)
    state = tell(state, black_box(method.space, unit, jnp.int32(0)), jnp.asarray(losses, jnp.float32))
    return state


def ask(method, state, key=0, pending=None):
    return jitted(method)[1](hpo.ask_key(jax.random.key(key), 9), state, *(() if pending is None else (pending,)))


def bowl(unit):
    return ((np.asarray(unit) - 0.3) ** 2).sum(1)


def grid(n):
    return np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n] * 2), -1).reshape(-1, 2)


@pytest.fixture(scope="module")
def seen():
    return grid(4)


def test_expected_improvement_goes_to_the_optimum_and_confidence_bounds_away_from_what_is_known(seen):
    greedy = hpo.gp_ei(BOWL, batch=1)
    trials, _ = ask(greedy, told(greedy, seen, bowl(seen)))
    assert np.abs(np.asarray(trials.unit[0]) - 0.3).max() < 0.05
    curious = hpo.bayesian(BOWL, acquisition="ucb", exploration=1e4, batch=1)
    corner = seen[(seen < 0.6).all(1)]
    trials, _ = ask(curious, told(curious, corner, bowl(corner)))
    assert np.asarray(trials.unit[0]).max() > 0.9, "where the model knows least"


def test_probability_of_improvement_prefers_a_small_sure_gain(seen):
    """Without a margin it stays nearer to the best trial than the expected improvement does."""
    losses = np.sin(9 * seen[:, 0]) + seen[:, 1]
    best = seen[np.argmin(losses)]
    apart = {}
    for name in ("log_ei", "pi"):
        method = hpo.bayesian(BOWL, acquisition=name, batch=1)
        state = told(method, seen, losses)
        apart[name] = [np.abs(np.asarray(ask(method, state, key)[0].unit[0]) - best).max() for key in range(3)]
    assert np.median(apart["pi"]) < np.median(apart["log_ei"])
    margin = hpo.bayesian(BOWL, acquisition="pi", exploration=1.0, batch=1)
    far = [np.abs(np.asarray(ask(margin, told(margin, seen, losses), k)[0].unit[0]) - best).max() for k in range(3)]
    assert np.median(far) > np.median(apart["pi"])


def test_thompson_sampling_spreads_a_batch_as_the_posterior_is_spread(seen):
    method = hpo.bayesian(BOWL, acquisition="thompson", batch=8)
    near = np.asarray(ask(method, told(method, seen, bowl(seen)))[0].unit)
    rng = np.random.default_rng(0)
    far = np.asarray(ask(method, told(method, seen[:4], rng.random(4)))[0].unit)
    assert len(np.unique(near, axis=0)) == 8
    assert near.std(0).max() < 0.15 < far.std(0).min()


def test_rows_of_an_ask_differ_as_each_counts_for_the_next(seen):
    method = hpo.gp_ei(BOWL, batch=6)
    unit = np.asarray(ask(method, told(method, seen, bowl(seen)))[0].unit)
    apart = np.abs(unit[:, None] - unit[None]).max(-1) + np.eye(6)
    assert apart.min() > 1e-4, "not the same point six times"
    assert np.abs(unit[0] - 0.3).max() < 0.05


def test_pending_trials_are_avoided(seen):
    method = hpo.gp_ei(BOWL, batch=1)
    state = told(method, seen, bowl(seen))
    first, _ = ask(method, state)
    again, _ = ask(method, state, pending=first)
    ignored, _ = ask(method, state, pending=first._replace(active=jnp.zeros(1, bool)))
    apart = lambda a: float(jnp.abs(a.unit - first.unit).max())  # noqa: E731
    assert apart(ignored) < 1e-4 and apart(again) > 1e-3


@pytest.mark.parametrize("surrogate", ["gp", "forest"])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_point_of_a_small_space_is_tried_once_before_any_is_twice(surrogate, batch):
    method = hpo.bayesian(EIGHT, surrogate=surrogate, batch=batch)
    init, ask_, tell = jitted(method)
    state, points = init(jax.random.key(1)), []
    for r in range(-(-8 // batch)):
        trials, state = ask_(jax.random.key(r), state)
        losses = jnp.where(trials.id % 3 == 1, jnp.nan, 1.0)
        state = tell(state, trials, losses)
        points += [tuple(p) for p in np.floor(np.asarray(trials.unit) * 2).astype(int).tolist()]
    assert len(set(points[:8])) == 8


def test_a_failed_region_is_left():
    """Half of the space fails, with the optimum in it; a random search would fail half of the time."""

    def loss(key, h):
        return jnp.where(h["x"][0] < 0.5, jnp.nan, ((h["x"] - jnp.array([0.3, 0.45])) ** 2).sum())

    run = jax.jit(jax.vmap(hpo.study(loss, hpo.gp_ei(BOWL, batch=1), rounds=36)))
    losses = np.asarray(run(jax.random.split(jax.random.key(0), 6))[1].losses)
    assert np.isnan(losses[:, 18:]).mean() < 0.25
    assert np.nanmin(losses, axis=(1, 2)).max() < 0.06, "the bound of what works, where it is 0.04"


@pytest.mark.parametrize(
    "losses",
    [
        [1.0] * 6,
        [1e30, -1e30, 5, 1, 2, 3],
        [1e-30, 2e-30, 3e-30, 0, 4e-30, 1e-30],
        [math.nan] * 6,
        [1.0, *[math.nan] * 5],
    ],
)
def test_losses_of_any_size_leave_sound_proposals(losses, seen):
    method = hpo.gp_ei(BOWL, batch=1)
    state = told(method, np.concatenate([seen[:5], seen[:1]]), losses)
    trials, state = ask(method, state)
    assert np.isfinite(trials.unit).all()
    assert np.isfinite(jax.flatten_util.ravel_pytree(state.model.chains)[0]).all()


def test_slopes_find_what_values_alone_do_not():
    """Three values and their gradients determine a quadratic in five dims; three values do not."""
    space = hpo.Space({"x": hpo.Array(5, 0.0, 1.0)})
    optimum = jnp.array([0.2, 0.7, 0.4, 0.6, 0.3])
    objective = lambda key, h: ((h["x"] - optimum) ** 2 * jnp.arange(1, 6)).sum()  # noqa: E731
    best = {}
    for gradients in (False, True):
        method = hpo.gp_ei(space, gradients=gradients, startup=3, batch=1)
        assert method.uses_gradients == gradients
        run = jax.jit(hpo.study(objective, method, rounds=9))
        best[gradients] = [float(run(jax.random.key(k))[1].losses.min()) for k in range(3)]
    assert np.median(best[True]) < 2e-3 < np.median(best[False])


def test_hypergradients_save_trials():
    """Training by momentum, 20 steps: trials until the loss is among the best 0.5% of random ones, which is 0.35."""
    curvature = jnp.array([1.0, 3.0, 9.0])
    trainable = hpo.Trainable(
        lambda key, h: (jnp.ones(3), jnp.zeros(3)),
        lambda key, state, h: (
            state[0] - h["lr"] * (state[1] * h["momentum"] + curvature * state[0]) - h["wd"] * state[0],
            state[1] * h["momentum"] + curvature * state[0],
        ),
        lambda state, h: jnp.log1p(100 * jnp.sum((state[0] - 0.05) ** 2)),
    )
    objective = hpo.unroll(trainable, steps=20)
    space = hpo.Space(
        {
            "lr": hpo.Float(1e-3, 0.1, log=True),
            "momentum": hpo.Float(0.0, 0.9),
            "wd": hpo.Float(1e-5, 1e-1, log=True),
        }
    )
    trials = {}
    for gradients in (False, True):
        method = hpo.gp_ei(space, gradients=gradients, startup=3, batch=1)
        run = jax.jit(hpo.study(objective, method, rounds=14))
        losses = np.stack([run(jax.random.key(k))[1].losses[:, 0] for k in range(3)])
        trials[gradients] = np.argmax(np.pad(losses < 0.35, ((0, 0), (0, 1)), constant_values=True), axis=1) + 1
    assert np.median(trials[True]) <= 12 < np.median(trials[False]), trials


def test_input_warping_changes_what_is_learned(seen):
    losses = np.log(seen[:, 0] + 1e-3) ** 2 + seen[:, 1]
    plain, warped = (hpo.gp_ei(BOWL, input_warping=w, batch=1) for w in (False, True))
    a, b = (ask(m, told(m, seen, losses))[1].model.chains.position for m in (plain, warped))
    assert a.log_bend.shape == (8, 0, 2) and b.log_bend.shape == (8, 2, 2)
    assert float(jnp.abs(b.log_bend).max()) > 0.1


def test_settings_are_priors_that_count(seen):
    method = hpo.gp_ei(BOWL, batch=1)
    init, ask_, tell = jitted(method)
    short = method.settings._replace(surrogate=method.settings.surrogate._replace(lengthscale=jnp.float32(0.01)))
    unit, sizes = [], []
    for settings in (method.settings, short):
        state = init(jax.random.key(0), settings)
        state = tell(state, black_box(BOWL, jnp.asarray(seen, jnp.float32), jnp.int32(0)), jnp.asarray(bowl(seen)))
        unit.append(np.asarray(ask_(jax.random.key(1), state)[0].unit))
        sizes.append(ask_._cache_size())
    assert np.abs(unit[0] - unit[1]).max() > 1e-3
    assert sizes[0] == sizes[1]


def test_models_grow_without_being_made_anew(monkeypatch):
    """The factors after rows were added one by one, and after the models know but some rows, are those made afresh."""
    plans = tuple(p._replace(members=2, period=6) for p in ensemble.PLANS[:1])
    for name, value in {"PLANS": plans, "MEMBERS": 2, "MOST": 64, "LATEST": 8}.items():
        monkeypatch.setattr(ensemble, name, value)
    with jax.enable_x64(True):
        fitted = grow(np.random.default_rng(0))
    assert len(set(fitted)) < len(fitted), "in some rounds the hyperparameters were kept"


def grow(rng):
    """Compares the factors after every round: when the hyperparameters were fitted last."""
    prior = gp.prior_of(BOWL, *ensemble.Settings(*jnp.array([0.5, 0.3, 1.0, 1.0])), False)
    history = record.empty(2, 128, ensemble.GROWTH)
    model = ensemble.init(jax.random.key(0), prior.mean, 128)
    learn = jax.jit(
        lambda key, model, history, level: ensemble.observe(key, BOWL, prior, model, history, level, 2),
        static_argnums=3,
    )
    add, fitted = jax.jit(record.append), []
    identity = lambda x: np.round(np.asarray(x).sum(-1), 9)  # noqa: E731
    for r, more in enumerate([10, 1, 2, 2, 1, 2, 40, 2, 2, 4, 2, 3, 2]):
        unit, active = rng.random((more, 2)), np.arange(more) != 3
        history = add(history, unit, rng.standard_normal(more), active)
        level = int(history.count.value > 64)
        model, posterior = learn(jax.random.key(r), model, history, level)
        data = gp.data_of(posterior.x, jnp.zeros(64), posterior.mask, gp.geometry(BOWL, posterior.x, posterior.x))
        np.testing.assert_allclose(posterior.w, gp.factors(BOWL, posterior.parameters, data), rtol=1e-6, atol=1e-6)
        everyone = set(identity(history.unit)[np.asarray(history.mask)].tolist())
        known = set(identity(posterior.x)[np.asarray(posterior.mask)].tolist())
        assert known <= everyone and len(known) >= min(len(everyone), 54)
        assert level or known == everyone
        fitted.append(int(model.fitted.value))
    return fitted


def test_a_study_in_one_program_finds_the_optimum_of_branin():
    """Its minimum is 0.397887 (Dixon and Szego 1978)."""
    space = {"x": hpo.Float(-5.0, 10.0), "y": hpo.Float(0.0, 15.0)}

    def branin(key, h):
        x, y = h["x"], h["y"]
        a = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
        return a**2 + 10 * (1 - 1 / (8 * math.pi)) * jnp.cos(x) + 10

    run = jax.jit(hpo.study(branin, hpo.gp_ei(space, batch=2), rounds=20))
    losses = np.array([run(jax.random.key(k))[1].losses.min() for k in range(3)])
    assert np.median(losses) < 0.40 and losses.min() > 0.3978


def test_the_forest_beats_random_search_in_a_mixed_space():
    method = hpo.bayesian(MIXED, surrogate="forest", batch=4)

    def loss(key, h):
        return (jnp.log10(h["lr"]) + 2) ** 2 + jnp.abs(h["width"] - 20) / 20 + h["opt"]["choice"]

    best = [
        [float(run(jax.random.key(k))[1].losses.min()) for k in range(3)]
        for run in (jax.jit(hpo.study(loss, m, rounds=12)) for m in (method, hpo.random(MIXED, batch=4)))
    ]
    assert np.median(best[0]) < 0.5 * np.median(best[1])


def test_trials_that_crowd_together_leave_the_factors_sound():
    """Hundreds of trials near one optimum, in batches: no row of an ask repeats another."""
    space = hpo.Space({"x": hpo.Array(2, 0.0, 1.0), "kind": hpo.Categorical(("a", "b", "c"))})
    run = jax.jit(
        hpo.study(lambda key, h: ((h["x"] - 0.4) ** 2).sum() + h["kind"], hpo.gp_ei(space, batch=32), rounds=8)
    )
    state, trace = run(jax.random.key(0))
    unit = np.asarray(canonical(space, trace.trials.unit.reshape(-1, 3)))
    assert len(np.unique(unit, axis=0)) == 256
    assert jnp.isfinite(state.model.factors).all() and float(trace.losses.min()) < 1e-5


def test_losses_that_tie_do_not_draw_in_the_tail_without_a_bound():
    method = hpo.gp_ei(BOWL, batch=1)
    state = told(method, np.random.default_rng(0).random((20, 2)), np.ones(20))
    tails = []
    for r in range(12):
        trials, state = jitted(method)[1](jax.random.key(r), state)
        tails.append(float(jnp.abs(state.model.chains.position.log_tail).max()))
        state = jitted(method)[2](state, trials, jnp.ones(1))
    assert max(tails) < 8


def test_known_results_are_told_at_once_and_make_the_design_superfluous():
    asked = []
    objective = lambda key, h: ((h["x"] - 0.3) ** 2).sum()  # noqa: E731
    known = [({"x": np.array([a, b])}, (a - 0.3) ** 2 + (b - 0.3) ** 2) for a in (0.1, 0.5, 0.9) for b in (0.2, 0.6)]
    for n in (0, 6):
        result = hpo.minimize(
            objective, hpo.gp_ei(BOWL, batch=2), key=jax.random.key(0), rounds=1, initial=known[:n], progress=False
        )
        asked.append(np.asarray(result.trials.unit)[n:])
    assert np.abs(asked[1] - asked[0]).max() > 1e-2


def test_candidates_are_anywhere_and_near_the_leaders():
    leaders = jnp.full((1, 2), 0.5)
    unit = np.asarray(proposal.candidates(jax.random.key(0), BOWL, leaders, 2000))
    near, anywhere = unit[:1000], unit[1000:]
    assert (np.abs(near - 0.5).max(1) > 0).all() and (np.abs(near - 0.5) == 0).any(1).mean() > 0.2
    assert np.median(np.abs(near - 0.5).max(1)) < 0.06
    np.testing.assert_allclose(anywhere.mean(0), 0.5, atol=0.03)


def test_climb_and_neighbours_reach_an_optimum():
    space = hpo.Space({"x": hpo.Float(0.0, 1.0), "n": hpo.Int(0, 9), "c": hpo.Categorical(tuple("abcd"))})
    at = [space.names.index(n) for n in "xnc"]
    best = jnp.array([0.37, 0.75, 0.625])

    def value(unit):
        seen = features(space, unit)[:, jnp.array(at)]
        return -((seen - best) ** 2).sum(1)

    start = jnp.full((3, 3), 0.1)
    climbed = proposal.climbed(value, space, start, 30)
    assert np.abs(climbed[:, at[0]] - 0.37).max() < 2e-3 and (climbed[:, at[2]] == start[:, at[2]]).all()
    seed = jnp.array([1, 2], jnp.uint32)
    top = proposal.neighboured(seed, value, space, climbed, space.levels > 0, 6)
    np.testing.assert_allclose(features(space, top)[:, jnp.array(at)], np.tile(best, (3, 1)), atol=2e-3)


def test_points_that_decode_to_the_same_have_one_fingerprint():
    unit = np.asarray(MIXED.sample(jax.random.key(0), 200))
    code = np.asarray(fingerprints(MIXED, jnp.asarray(unit)))
    distinct = np.unique(np.asarray(canonical(MIXED, jnp.asarray(unit))), axis=0)
    assert len(np.unique(code)) == len(distinct) == 200
    opt, momentum = MIXED.names.index("opt"), MIXED.names.index("opt.sgd.momentum")
    dead = unit.copy()
    dead[:, opt] = 0.9
    other = dead.copy()
    other[:, momentum], other[:, opt] = 0.123, 0.6
    np.testing.assert_array_equal(fingerprints(MIXED, jnp.asarray(dead)), fingerprints(MIXED, jnp.asarray(other)))
    known = jnp.asarray(code)
    assert among(known[:5], known, jnp.arange(200) < 3).tolist() == [True, True, True, False, False]


def test_everything_is_every_point_once():
    points = everything(EIGHT, 8)
    assert sorted(map(tuple, np.floor(points * 2).astype(int))) == [
        (a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)
    ]
    assert everything(EIGHT, 7) is None and everything(BOWL, 100) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"surrogate": "tree"}, r"surrogate must be one of \['gp', 'forest'\], got 'tree'"),
        ({"acquisition": "ei"}, "acquisition must be one of"),
        ({"startup": 0}, "startup must be at least 1, got 0"),
        ({"lengthscale": 0.0}, "lengthscale must be in"),
        ({"noise": -1.0}, "noise must be in"),
        ({"exploration": math.nan}, "exploration must be in"),
        ({"surrogate": "forest", "gradients": True}, 'gradients=True is for surrogate="gp"'),
        ({"input_warping": True, "gradients": True}, "leave one of them out"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_bad_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        hpo.bayesian(BOWL, **wrong)
