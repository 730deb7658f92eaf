"""DARTS: its gradients against those of the training run written out, its two stages, its guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as hpo
from jaxhpo.engine.lanes import make_lanes
from jaxhpo.method import trial_keys

KEY = jax.random.key(0)
OPTIONS = ("none", "skip_connect", "double")
SPACE = hpo.Space({"edges": [hpo.Categorical(OPTIONS, relaxed=True) for _ in range(3)], "lr": hpo.Float(0.01, 0.2)})
X = jnp.linspace(-1, 1, 8)


def mixed(w, x, edges):
    for i, edge in enumerate(edges):
        x = edge @ jnp.stack([0 * x, x, w[i] * x])
    return x


def fit(w, h):
    return ((mixed(w, X, h["edges"]) - 2 * X) ** 2).mean()


NET = hpo.Trainable(
    init=lambda key, h: 0.5 + 0.1 * jax.random.uniform(key, (3,)),
    step=lambda key, w, h: w - h["lr"] * jax.grad(fit)(w, h),
    evaluate=lambda w, h: fit(w, h) + 0.1 * h["edges"][0][0],
)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_gradients_reach_back_through_the_last_steps(order):
    method = hpo.darts(SPACE, max_steps=8, every=4, order=order, searches=2)
    lanes = make_lanes(NET, method)
    trials, _ = method.ask(KEY, method.init(KEY))
    _, _, told = jax.jit(lanes.run)(*lanes.init(), trial_keys(KEY, trials), trials)

    def by_hand(row, h):
        key = trial_keys(KEY, trials)[row]
        start = jax.tree.map(lambda x: x[row], trials.hparams)
        w = NET.init(jax.random.fold_in(key, 0), start)
        for reached in range(1, 5):
            w = NET.step(key, w, h if reached > 5 - order else start)
        return NET.evaluate(w, h)

    losses, slopes = jax.vmap(jax.value_and_grad(by_hand, 1))(jnp.arange(2), trials.hparams)
    np.testing.assert_allclose(told.losses, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), told.gradients, slopes)
    # Where the steps are left out, the learning rate has no slope.
    assert (np.asarray(told.gradients["lr"]) == 0).all() == (order == 1)


def test_a_search_and_then_what_it_found_from_the_beginning():
    method = hpo.darts(SPACE, max_steps=60, every=2, searches=3, retrain=40)
    result = hpo.minimize(NET, method, key=KEY, progress=False)
    r = result.trials
    assert result.stopped == "method" and len(r.loss) == 3 * 31 and sorted(set(r.id)) == [0, 1, 2, 3, 4, 5]
    assert r.soft[:-3].all() and not r.soft[-3:].any() and r.id[-3:].tolist() == [3, 4, 5]
    assert r.steps[-6:].tolist() == [60, 60, 60, 40, 40, 40] and (r.parent[-3:] == -1).all()
    for i in range(3):
        assert all(
            np.argmax(a[-6 + i]) == np.argmax(b[-3 + i])
            for a, b in zip(r.hparams["edges"], r.hparams["edges"], strict=True)
        )
    best = int(np.argmin(r.loss[-3:]))
    hparams = jax.tree.map(lambda x: jnp.asarray(x[-3 + best]), r.hparams)
    alone = hpo.unroll(NET, 40)(jax.random.fold_in(jax.random.split(KEY)[1], 3 + best), hparams)
    np.testing.assert_allclose(result.best_loss, alone, rtol=1e-5)
    np.testing.assert_allclose(NET.evaluate(jnp.asarray(result.best_state), hparams), result.best_loss, rtol=1e-5)


def test_a_step_of_sgd_is_the_slope_of_the_logits():
    method = hpo.darts(SPACE, optax.sgd(0.5), max_steps=8, searches=2, temperature=2.0, warm_up=0.0, guard=None)
    trials, state = method.ask(KEY, method.init(KEY))
    slope = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trials.hparams)
    after = method.tell(state, trials, jnp.ones(2), slope)
    logits = state.point[:, 4:]

    def linear(logits):
        soft = jax.nn.softmax(logits.reshape(2, 3, 3) / 2.0, axis=-1)
        return sum(jnp.sum(soft[:, i] * slope["edges"][i]) for i in range(3))

    np.testing.assert_allclose(after.point[:, 4:], logits - 0.5 * jax.grad(linear)(logits), rtol=1e-5, atol=1e-6)


# Skip connections are the best at first, later the others are if they have learnt.
RACE = hpo.Trainable(
    init=lambda key, h: jnp.zeros(3),
    step=lambda key, w, h: w + 0.02 * jnp.stack([edge[2] for edge in h["edges"]]),
    evaluate=lambda w, h: -sum(edge[1] + 4 * w[i] * edge[2] for i, edge in enumerate(h["edges"])),
)


# Skip connections become the best, one edge after the other.
LATER = hpo.Trainable(
    init=lambda key, h: jnp.zeros(()),
    step=lambda key, w, h: w + 1,
    evaluate=lambda w, h: -sum(edge[1] * (w - 5 * i) for i, edge in enumerate(h["edges"])) / 4,
)


def skips(trainable, guard, *settings, **arguments):
    """How many of the three edges of each of four searches end as skip connections, for each of some settings."""
    call = {"max_steps": 30, "retrain": 1, "warm_up": 0.0, "guard": guard} | arguments
    method = hpo.darts(SPACE, optax.sgd(0.5), **call)
    run = jax.jit(hpo.study(trainable, method))
    found = [run(KEY, method.settings._replace(**s))[1].trials.hparams["edges"] for s in settings]
    return [sum(edge[-1, :, 1] == 1 for edge in edges).tolist() for edges in found]


def test_early_stopping_keeps_a_search_from_skipping_everything():
    assert skips(LATER, None, {}) == [[3, 3, 3, 3]]
    limits = [{"most": jnp.float32(most)} for most in (0, 1, 2)]
    assert skips(LATER, "early_stopping", *limits) == [[0] * 4, [1] * 4, [2] * 4]


def test_dropout_lets_others_learn():
    rates = [{"dropout": jnp.float32(rate)} for rate in (0.0, 0.9)]
    never, often = skips(RACE, "dropout", *rates, max_steps=60)
    assert never == [3, 3, 3, 3] and np.mean(often) < 1.5


def test_what_is_dropped_has_no_weight_and_no_slope():
    method = hpo.darts(SPACE, optax.sgd(0.5), max_steps=60, searches=64, warm_up=0.0, guard="dropout", dropout=0.6)
    trials, state = method.ask(KEY, method.init(KEY))
    weights = np.stack(trials.hparams["edges"], 1)
    gone = weights[..., 1] == 0
    assert abs(gone.mean() - 0.6) < 0.08
    np.testing.assert_allclose(weights[gone], np.broadcast_to([0.5, 0, 0.5], (gone.sum(), 3)), atol=1e-3)
    np.testing.assert_allclose(weights[~gone], 1 / 3, atol=1e-3)
    slope = jax.tree.map(lambda x: jnp.broadcast_to(jnp.arange(3.0), (64, 3)) if x.ndim == 2 else 0 * x, trials.hparams)
    moved = np.asarray(method.tell(state, trials, jnp.ones(64), slope).point - state.point)[:, 4:].reshape(64, 3, 3)
    assert (moved[gone][:, 1] == 0).all() and (moved[gone][:, [0, 2]] != 0).all() and (moved[~gone][:, 2] < 0).all()
    late = state._replace(round=state.round._replace(value=jnp.int32(59)))
    assert (np.stack(method.ask(KEY, late)[0].hparams["edges"], 1)[..., 1] == 0).mean() < 0.05


def test_choices_stand_still_while_the_network_warms_up():
    method = hpo.darts(SPACE, max_steps=20, searches=2, warm_up=0.5)
    hparams = hpo.minimize(NET, method, key=KEY, progress=False).trials.hparams
    path = np.stack(hparams["edges"], 1).reshape(21, 2, 3, 3)
    assert (path[:11] == path[0]).all() and (path[11] != path[10]).all()
    assert (np.diff(hparams["lr"].reshape(21, 2), axis=0)[:19] != 0).all(), "learning rates move from the first step on"


def test_a_search_that_fails_begins_anew_and_costs_no_other():
    method = hpo.darts(SPACE, max_steps=8, searches=3, warm_up=0.0)
    ask, tell = jax.jit(method.ask), jax.jit(method.tell)
    trials, state = ask(KEY, method.init(KEY))
    slope = jax.tree.map(jnp.ones_like, trials.hparams)
    fine = tell(state, trials, jnp.ones(3), slope)
    for bad in (
        tell(state, trials, jnp.array([1, jnp.nan, 1]), slope),
        tell(state, trials, jnp.ones(3), broken(slope)),
    ):
        again, after = ask(jax.random.key(1), bad)
        assert again.source.tolist() == [0, -1, 2] and again.id.tolist() == [0, 3, 2]
        assert after.age.tolist() == [1, 0, 1] and after.life.tolist() == [0, 1, 0]
        np.testing.assert_array_equal(after.point[::2], fine.point[::2])
        assert np.abs(after.point[1] - state.point[1]).max() > 0.05


def broken(slope):
    return jax.tree.map(lambda x: x.at[1].set(jnp.inf), slope)


def test_studies_of_different_orders_share_no_program(tmp_path):
    call = {"optimizer": optax.sgd(0.5), "max_steps": 8, "every": 2, "searches": 2, "warm_up": 0.0}
    first, second = (hpo.darts(SPACE, order=order, **call) for order in (1, 2))
    losses = hpo.minimize(NET, first, key=KEY, directory=tmp_path).trials.loss
    assert np.abs(losses - hpo.minimize(NET, second, key=KEY).trials.loss).max() > 1e-5
    with pytest.raises(ValueError, match="method"):
        hpo.minimize(NET, second, key=KEY, directory=tmp_path)


def test_losses_of_a_search_never_count():
    # Without skip connections one option is left, and has all of the weight.
    space = {"edge": hpo.Categorical(("skip_connect", "conv"), relaxed=True)}
    growing = hpo.Trainable(lambda key, h: jnp.ones(()), lambda key, w, h: w + 1, lambda w, h: w)
    method = hpo.darts(space, max_steps=9, searches=4, guard="dropout", dropout=0.9, retrain=20)
    trials = hpo.minimize(growing, method, key=KEY, progress=False).trials
    assert trials.soft[:-4].all() and not trials.soft[-4:].any()


def test_integers_may_be_in_the_training_state():
    counting = hpo.Trainable(
        lambda key, h: {"w": jnp.zeros(()), "n": h["n"]},
        lambda key, s, h: {"w": s["w"] + h["n"], "n": s["n"]},
        lambda s, h: (s["w"] / s["n"] - h["n"]) ** 2,
    )
    method = hpo.darts({"n": hpo.Int(1, 8), "edge": SPACE.tree["edges"][0]}, max_steps=4, searches=2)
    result = hpo.minimize(counting, method, key=KEY, progress=False)
    np.testing.assert_allclose(result.trials.loss[-2:], (4 - result.trials.hparams["n"][-2:]) ** 2, rtol=1e-5)


def test_no_search_ends_with_nothing():
    least = LATER._replace(evaluate=lambda w, h: -sum(2 * edge[0] + edge[2] for edge in h["edges"]))
    arguments = {"optimizer": optax.sgd(0.5), "max_steps": 20, "searches": 2, "retrain": 1, "warm_up": 0.0}
    for zero, expected in (("none", 2), ("other", 0)):
        trials = hpo.minimize(least, hpo.darts(SPACE, zero=zero, **arguments), key=KEY).trials
        edges = np.stack(trials.hparams["edges"], 1)
        assert (edges[-4:-2].argmax(-1) == 0).all() and (edges[-2:].argmax(-1) == expected).all()


def test_a_search_that_begins_with_too_many_skips_may_leave_them():
    method = hpo.darts(SPACE, optax.sgd(0.5), max_steps=30, searches=1, retrain=1, warm_up=0.0, most=1)
    away = LATER._replace(evaluate=lambda w, h: sum(edge[1] for edge in h["edges"]))
    run = hpo.study(away, method, initial=[{"edges": ["skip_connect"] * 3, "lr": 0.1}])
    edges = jax.jit(run)(KEY)[1].trials.hparams["edges"]
    assert sum(float(edge[0, 0, 1]) for edge in edges) > 2.9 and sum(edge[-1, 0, 1] for edge in edges) == 0


def test_every_option_of_a_plain_choice_has_a_search():
    space = {"edge": SPACE.tree["edges"][0], "act": hpo.Categorical(("relu", "tanh", "gelu"))}
    method = hpo.darts(space, max_steps=4, searches=4)
    drawn = jax.vmap(lambda key: method.ask(key, method.init(key))[0].hparams["act"])(jax.random.split(KEY, 50))
    assert all(set(row) == {0, 1, 2} for row in np.asarray(drawn).tolist())


def test_a_search_begins_where_the_user_says():
    point = {"edges": ["double", "none", "skip_connect"], "lr": 0.15}
    method = hpo.darts(SPACE, max_steps=4, searches=2)
    run = hpo.study(RACE, method, initial=[point])
    trials = jax.jit(run)(KEY)[1].trials
    lr = trials.hparams["lr"]
    np.testing.assert_allclose(lr[0, 0], 0.15, rtol=1e-5)
    np.testing.assert_allclose(lr[1, 0], 0.15, rtol=1e-4)
    assert [int(np.argmax(e[1, 0])) for e in trials.hparams["edges"]] == [2, 0, 1]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"max_steps": 9, "order": 3}, ValueError, "order=3 reaches back through 2 training steps, but every=1"),
        ({"max_steps": 9, "retrain": 0}, ValueError, "retrain must be at least 1, got 0"),
        ({"max_steps": 9, "guard": "drop"}, ValueError, "guard must be one of .*, got 'drop'"),
        ({"max_steps": 9, "skip": "skip"}, ValueError, "skip='skip' is an option of no relaxed choice.*'skip_connect'"),
        ({"max_steps": 9, "warm_up": 2}, ValueError, "warm_up must be in"),
        ({"max_steps": 9, "most": -1}, ValueError, "most must be in"),
        ({"max_steps": 9, "optimizer": "adam"}, TypeError, "optimizer must be an optax optimizer, got 'adam'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        hpo.darts(SPACE, **arguments)


def test_objectives_without_training_are_refused():
    with pytest.raises(TypeError, match="the trials of 'darts' carry training steps; give a Trainable"):
        hpo.minimize(lambda key, h: h["lr"], hpo.darts(SPACE, max_steps=4), key=KEY)


def test_the_slope_of_a_cells_training_agrees_with_finite_differences():
    with jax.enable_x64(True):
        x = jnp.sin(jnp.arange(4 * 16.0)).reshape(4, 4, 4)
        y = jnp.array([0, 1, 2, 0])
        network = hpo.nas.CellNet(3, channels=2, stages=1)
        cells = hpo.flax_trainable(
            model=lambda h: hpo.nas.build(network, h),
            optimizer=lambda h: optax.sgd(0.1, momentum=0.9),
            loss=optax.softmax_cross_entropy_with_integer_labels,
            train=(x, y),
            valid=(x[:, ::-1], y),
            batch_size=4,
        )
        objective = jax.jit(hpo.unroll(cells, 2))
        edges = jax.nn.softmax(jax.random.normal(KEY, (6, 5)), axis=-1)
        along = 1e-5 * jax.random.normal(jax.random.key(1), (6, 5))
        loss = lambda edges: objective(KEY, {"edges": edges})  # noqa: E731
        slope = jnp.vdot(jax.grad(loss)(edges), along)
        np.testing.assert_allclose(slope, (loss(edges + along) - loss(edges - along)) / 2, rtol=1e-6)
