"""Coordinate descent: the rules of a line, what it finds in how many trials, and that no trial is wasted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.method import bare
from jaxhpo.sequential import coordinate_descent
from jaxhpo.sequential.coordinate_descent import START, pattern
from jaxhpo.sequential.line import Bracket, Told, close, distinct, place, split

PHI = (1 + 5**0.5) / 2
REAL = {"x": hpo.Array(5, 0.0, 1.0)}
MIXED = {
    "a": hpo.Categorical(("p", "q")),
    "b": hpo.Categorical(tuple("abcdefg")),
    "c": hpo.Int(0, 4),
    "d": hpo.Ordinal((1, 2, 4)),
    "e": hpo.Int(1, 1000, log=True),
}


@functools.cache
def compiled(*functions):
    return tuple(map(jax.jit, functions))


def begin(method, seed=0, settings=None):
    return compiled(bare(method.init))[0](jax.random.key(seed), method.settings if settings is None else settings)


def play(method, fn, rounds, seed=0, state=None, settings=None):
    """Units and losses of some rounds, and the state after them."""
    ask, tell = compiled(method.ask, method.tell)
    state = begin(method, seed, settings) if state is None else state
    units, losses = [], []
    for i in range(rounds):
        trials, state = ask(jax.random.fold_in(jax.random.key(seed), i), state)
        loss = fn(np.asarray(trials.unit))
        state = tell(state, trials, np.asarray(loss, np.float32))
        units.append(np.asarray(trials.unit))
        losses.append(loss)
    return np.concatenate(units), np.concatenate(losses), state


def lowest(method, fn, rounds, seeds=4, settings=None):
    """The lowest loss of every seed."""
    return np.array([play(method, fn, rounds, seed, settings=settings)[1].min() for seed in range(seeds)])


def level_of(method, unit):
    return np.asarray(method.space.level(unit))


# The rules of a line.


def line(x, low, high, n, fresh=False):
    """The coordinates of n points on a line, from the helpers."""
    f = lambda value: jnp.asarray(value, jnp.float32)  # noqa: E731
    section = f(1 - 1 / PHI)
    below, above = f(min(x - low, x / section)), f(min(high - x, (1 - x) / section))
    under = int(split(jnp.int32(n), below, above))
    sides = [(-1, under, below, x), (1, n - under, above, 1 - x)]
    return sorted(
        float(x + sign * place(jnp.int32(i), jnp.int32(k), jnp.int32(n), length, f(bound), jnp.asarray(fresh), section))
        for sign, k, length, bound in sides
        for i in range(1, k + 1)
    )


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_first_line_is_a_grid_over_all_of_it(n):
    # Around the middle: gaps of one step, the incumbent is one of its points, half a step is left at the bounds.
    step = 1 / (n + 1)
    grid = [0.5 + step * i for i in range(-n // 2, n // 2 + 1) if i]
    np.testing.assert_allclose(line(0.5, 0.0, 1.0, n, fresh=True), grid, atol=1e-6)


def test_later_points_cut_the_bracket_evenly_and_a_single_one_by_the_golden_section():
    np.testing.assert_allclose(line(0.5, 0.4, 0.6, 2), [0.45, 0.55], atol=1e-6)
    np.testing.assert_allclose(line(0.5, 0.2, 0.8, 4), [0.3, 0.4, 0.6, 0.7], atol=1e-6)
    np.testing.assert_allclose(line(0.5, 0.4, 0.8, 1), [0.5 + 0.3 * (2 - PHI)], atol=1e-6)
    np.testing.assert_allclose(line(0.5, 0.2, 0.6, 1), [0.5 - 0.3 * (2 - PHI)], atol=1e-6)
    np.testing.assert_allclose(line(0.5, 0.1, 0.7, 6), [0.18, 0.26, 0.34, 0.42, 0.5 + 1 / 15, 0.5 + 2 / 15], atol=1e-6)


def test_a_bracket_that_reaches_out_of_the_cube_asks_its_bound():
    np.testing.assert_allclose(line(0.1, -0.5, 0.3, 2), [0.0, 0.2], atol=1e-6)
    np.testing.assert_allclose(line(0.0, -0.5, 0.3, 2), [0.1, 0.2], atol=1e-6)
    np.testing.assert_allclose(line(0.8, 0.7, 3.0, 1), [1.0], atol=1e-6)


def closed(x, loss, low, high, low_loss, high_loss, at, losses, widen):
    """What a bracket becomes, from sorting the points of its line."""
    told = sorted([(x, loss), *zip(at, losses, strict=True)])
    i = min(range(len(told)), key=lambda k: (told[k][1], told[k][0] != x))
    pivot = told[i][0]
    ends = [told[i - 1] if i else None, told[i + 1] if i + 1 < len(told) else None]
    if ends[0] is None:
        ends[0] = min((low, low_loss), (pivot - widen * (ends[1][0] - pivot), -np.inf))
    if ends[1] is None:
        ends[1] = max((high, high_loss), (pivot + widen * (pivot - ends[0][0]), -np.inf))
    return pivot, *(value for pair in zip(*ends, strict=True) for value in pair)


def test_brackets_close_on_the_neighbours_of_the_best_point():
    rng = np.random.default_rng(0)
    for _ in range(40):
        x, low, high = 0.5, 0.5 - rng.uniform(0.1, 0.4), 0.5 + rng.uniform(0.1, 0.4)
        at = np.concatenate([rng.uniform(low, x, rng.integers(1, 3)), rng.uniform(x, high, rng.integers(1, 3))])
        losses, loss = rng.permutation(len(at) + 1)[:-1].astype(float), rng.uniform(0, len(at))
        order = rng.permutation(len(at))
        f = lambda value: jnp.full((1, 1), value, jnp.float32)  # noqa: E731
        pivot, *expected = closed(x, loss, low, high, 50.0, 60.0, at, losses, PHI)
        n = jnp.zeros(len(at), jnp.int32)
        rows = Told(n == 0, n, n, jnp.asarray(at[order], jnp.float32), jnp.asarray(losses[order], jnp.float32))
        found = close(Bracket(f(low), f(high), f(50), f(60)), f(x), f(loss)[0], f(pivot), rows, jnp.float32(PHI))
        np.testing.assert_allclose([float(z[0, 0]) for z in found], expected, rtol=2e-5)


@pytest.mark.parametrize(("batch", "factor"), [(1, 1 / PHI), (2, 1 / 2), (8, 1 / 5)])
def test_a_bracket_shrinks_by_the_golden_ratio_or_the_number_of_points(batch, factor):
    method = coordinate_descent({"x": hpo.Float(0.0, 1.0)}, starts=1, batch=batch)
    settings = method.settings._replace(resolution=jnp.float32(0))
    fn = lambda unit: np.abs(unit[:, 0] - 0.5)  # noqa: E731, best in the middle of the box, where the first start is
    state, widths = begin(method, settings=settings), []
    for i in range(8):
        state = play(method, fn, 1, seed=i, state=state)[2]
        widths.append(float((state.bracket.high - state.bracket.low)[0, 0]))
    # A single point closes one side, the next one the other.
    shrunk = np.array(widths[4:]) / widths[2:-2]
    np.testing.assert_allclose(shrunk, factor**2, rtol=0.03)


def test_pattern_moves_go_on_along_the_last_cycle():
    rng = np.random.default_rng(1)
    x, base = rng.random((2, 3, 4)).astype(np.float32)
    strides, categorical = np.array([1.0, 2.0, 0.5], np.float32), np.array([False, False, True, False])
    moved = x[:, None] + strides[:, None] * np.where(categorical, 0, x - base)[:, None]
    expected = np.abs((moved + 1) % 2 - 1)
    np.testing.assert_allclose(pattern(x, base, jnp.asarray(strides), categorical), expected, atol=1e-6)


def test_levels_of_a_line_are_distinct():
    offset = jnp.array([[1, 1, 1, 7, 9, 9, 0, 0]])
    segment, i = jnp.array([[3, 3, 3, 2, 2, 2, 5, 5]]), jnp.array([[1, 2, 3, 1, 2, 3, 1, 2]])
    points, room = jnp.array([[3, 3, 3, 3, 3, 3, 2, 2]]), jnp.array([[3, 3, 3, 9, 9, 9, 4, 4]])
    found = distinct(offset, segment, i, points, room)
    assert found.tolist() == [[1, 2, 3, 7, 8, 9, 1, 2]]


# What it finds.


CENTRE = np.array([0.1, 0.9, 0.33, 0.6, 0.71], np.float32)


def bowl(unit):
    return ((unit - CENTRE) ** 2 * 10.0 ** np.arange(5)).sum(-1)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_separable_function_is_solved_in_120_trials(batch):
    method = coordinate_descent(REAL, starts=1, batch=batch)
    units, losses, _ = play(method, bowl, 120 // batch)
    assert np.abs(units[losses.argmin()] - CENTRE).max() < 0.02
    assert losses.min() < 0.02  # in the middle of the box it is 456


def test_the_bound_of_a_box_is_reached():
    method = coordinate_descent(REAL, starts=1, batch=2)
    units, losses, _ = play(method, lambda unit: unit[:, :3].sum(1) - unit[:, 3:].sum(1), 30)
    np.testing.assert_allclose(units[losses.argmin()], [0, 0, 0, 1, 1], atol=1e-6)


def test_adaptive_order_spends_its_trials_where_they_matter():
    one = lambda unit: np.abs(unit[:, 3] - 0.31)  # noqa: E731
    adaptive, cyclic = (
        lowest(coordinate_descent(REAL, starts=1, order=order, batch=2), one, 30) for order in ("adaptive", "cyclic")
    )
    assert np.median(adaptive) < 1e-4 and np.median(cyclic) > 1e-3


def test_no_coordinate_waits_for_ever():
    # The first coordinate always has the worst ends.
    fn = lambda unit: 1e6 * np.abs(unit[:, 0] - 0.31) + np.abs(unit[:, 1:] - 0.77).sum(1)  # noqa: E731
    method = coordinate_descent(REAL, starts=1, batch=2)
    settings = method.settings._replace(resolution=jnp.float32(0))
    _, _, state = play(method, fn, 60, settings=settings)
    assert state.visits[0].min() >= 2 * 5 and state.visits[0, 0] == state.visits[0].max()


def test_pattern_moves_follow_a_rotated_valley():
    def valley(unit):
        across, down = ((unit - 0.5) @ np.array([[1.0, 1.0], [-1.0, 1.0]]) / 2**0.5).T
        return 100 * (across - 0.03) ** 2 + (down - 0.6) ** 2

    method = coordinate_descent({"x": hpo.Array(2, 0.0, 1.0)}, starts=1, batch=2)
    without = method.settings._replace(stride=jnp.float32(0))
    patterns, none = (np.median(lowest(method, valley, 60, settings=s)) for s in (method.settings, without))
    assert patterns < 0.05 and none > 0.05 and patterns < none / 5


def test_more_starts_find_more_valleys():
    def wells(unit):
        return np.minimum(((unit - 0.5) ** 2).sum(-1) + 0.1, ((unit - 0.85) ** 2).sum(-1))

    space = {"x": hpo.Array(2, 0.0, 1.0)}
    single = lowest(coordinate_descent(space, starts=1, batch=2), wells, 15)
    several = lowest(coordinate_descent(space, starts=6, batch=6), wells, 10)
    assert np.median(single) > 0.09 and np.median(several) < 0.02


# What it asks.


def test_every_level_is_asked_in_portions():
    method = coordinate_descent({"a": hpo.Categorical(tuple("abcdefg"))}, starts=1, batch=3)
    units, _, _ = play(method, lambda unit: level_of(method, unit)[:, 0] != 3.0, 3)
    assert set(level_of(method, units)[:, 0]) == set(range(7))
    assert len(set(level_of(method, units)[:7, 0])) == 7


def test_no_trial_of_an_ask_is_wasted():
    method = coordinate_descent(MIXED, starts=1, batch=16)
    weights = np.array([1.0, 3.0, 0.7, 2.0, 1.3])
    loss_of = lambda unit: (level_of(method, unit) / (method.space.levels - 1) * weights).sum(1)  # noqa: E731
    state, seen = None, []
    for i in range(6):
        units, _, after = play(method, loss_of, 1, seed=i, state=state)
        points = [tuple(row) for row in level_of(method, units).tolist()]
        lines = np.asarray(after.visits).sum()
        if i and i < 3:
            assert tuple(level_of(method, np.asarray(state.x))[0].tolist()) not in points
        assert len(set(points)) == len(points) and lines > 0
        state, seen = after, seen + points
    assert len(set(seen)) > 0.8 * len(seen)


def test_one_ask_speaks_of_several_coordinates_with_few_levels():
    method = coordinate_descent(MIXED, starts=1, batch=16)
    trials, _ = compiled(method.ask, method.tell)[0](jax.random.key(0), begin(method))
    kinds = np.asarray(trials.aux.coordinate)
    changed = level_of(method, trials.unit) != level_of(method, trials.unit[0])
    assert kinds[0] == START and (kinds[1:] >= 0).all() and len(set(kinds[1:].tolist())) >= 2
    assert (changed.sum(1) == [0, *[1] * 15]).all() and (changed[1:].argmax(1) == kinds[1:]).all()


def test_only_live_dims_are_moved_and_switches_are_tried():
    space = hpo.Space(
        {
            "net": hpo.OneOf(a={"x": hpo.Float(0.0, 1.0), "y": hpo.Float(0.0, 1.0)}, b={"z": hpo.Float(0.0, 1.0)}),
            "lr": hpo.Float(0.0, 1.0),
        }
    )
    method = coordinate_descent(space, starts=1, batch=2)

    def loss_of(unit):
        is_b = np.asarray(space.level(unit))[:, 0] == 1
        x, y, z, lr = (unit[:, space.names.index(name)] for name in ("net.a.x", "net.a.y", "net.b.z", "lr"))
        return np.where(is_b, np.abs(z - 0.2), 1 + np.abs(x - 0.4) + np.abs(y - 0.4)) + np.abs(lr - 0.3)

    ask, _ = compiled(method.ask, method.tell)
    for seed in range(3):
        units, losses, state = play(method, loss_of, 3, seed=seed)
        dead = ~np.asarray(space.active(state.x[0]))
        trials, _ = ask(jax.random.key(0), state)
        assert not (np.asarray(trials.unit) != np.asarray(state.x[0]))[:, dead].any()
        units, losses, _ = play(method, loss_of, 25, seed=seed, state=state)
        assert losses.min() < 0.01 and set(np.asarray(space.level(units))[:, 0]) == {0, 1}


# What it learns from.


def test_only_the_order_of_losses_counts():
    method = coordinate_descent(REAL, starts=1, batch=2)
    fn = lambda unit: ((unit - 0.31) ** 2 * np.arange(1, 6)).sum(1) + 0.05 * np.sin(20 * unit).sum(1)  # noqa: E731
    plain = play(method, fn, 40)[0]
    for transform in (lambda loss: 64 * loss + 3, lambda loss: np.exp(4 * np.float64(loss)), np.cbrt):
        np.testing.assert_array_equal(plain, play(method, lambda unit, t=transform: t(fn(unit)), 40)[0])


def test_every_start_goes_its_own_way():
    both, one = (coordinate_descent(REAL, starts=n, batch=2 * n) for n in (2, 1))
    fn = bowl
    state = begin(both)
    shared = play(both, fn, 12, state=state)[0].reshape(12, 2, 2, 5)
    for start in range(2):
        pick = lambda leaf: leaf[start : start + 1] if jnp.ndim(leaf) else leaf  # noqa: B023, E731
        alone = play(one, fn, 12, state=jax.tree.map(pick, state))[0].reshape(12, 2, 5)
        np.testing.assert_allclose(shared[:, :, start], alone, atol=1e-6)


def test_starts_take_turns_where_they_are_more_than_the_rows():
    method = coordinate_descent(REAL, starts=7, batch=3)
    _, losses, state = play(method, bowl, 70)
    assert np.asarray(state.known).all() and np.asarray(state.clock).min() > 20
    assert np.float32(losses.min()) == pytest.approx(np.asarray(state.loss).min())


def test_a_start_that_has_converged_begins_anew():
    method = coordinate_descent(REAL, starts=2, batch=4)
    settings = method.settings._replace(resolution=jnp.float32(0.05))
    ask, tell = compiled(method.ask, method.tell)
    state, begun, lows = begin(method, settings=settings), [], []
    for i in range(60):
        trials, state = ask(jax.random.key(i), state)
        loss = bowl(np.asarray(trials.unit)).astype(np.float32)
        begun += [np.asarray(trials.unit[j]) for j in np.flatnonzero(trials.aux.coordinate == START)]
        before, state = state, tell(state, trials, loss)
        lows.append(float(loss.min()))
        if i and (trials.aux.coordinate == START).any():
            start = int(trials.aux.start[np.flatnonzero(trials.aux.coordinate == START)[0]])
            assert state.version[start] > before.version[start] and before.loss[start] < 100
    assert len(begun) >= 4 and len({row.tobytes() for row in begun}) == len(begun)
    gaps = np.abs(np.array(begun)[:, None] - np.array(begun)[None]).max(-1) + np.eye(len(begun))
    assert gaps.min() > 0.05 and min(lows) < 5


def test_rows_that_are_lost_are_asked_again_and_late_ones_still_count():
    method = coordinate_descent(REAL, starts=1, batch=2)
    fn = bowl
    ask, tell = compiled(method.ask, method.tell)
    _, _, state = play(method, fn, 6)
    lost, after = ask(jax.random.key(9), state)
    again, _ = ask(jax.random.key(10), after)
    np.testing.assert_array_equal(lost.unit, again.unit)
    _, _, state = play(method, fn, 3, state=state)
    late = lost._replace(unit=lost.unit.at[1].set(jnp.array([0.1, 0.9, 0.33, 0.6, 0.71])))
    state = tell(state, late, jnp.asarray(fn(np.asarray(late.unit)), jnp.float32))
    np.testing.assert_array_equal(state.x[0], late.unit[1])
    assert state.loss[0] == np.float32(bowl(np.asarray(late.unit))[1])
    worse = tell(state, lost, jnp.asarray(fn(np.asarray(lost.unit)), jnp.float32))
    np.testing.assert_array_equal(worse.x, state.x)


def test_points_of_the_driver_become_incumbents():
    method = coordinate_descent(REAL, starts=1, batch=2)
    ask, tell = compiled(method.ask, method.tell)
    state = begin(method)
    trials, _ = ask(jax.random.key(0), state)
    known = trials._replace(unit=jnp.array([[0.2] * 5, [0.3] * 5]))
    state = tell(state, known, jnp.array([2.0, 1.0]))
    assert state.x[0].tolist() == known.unit[1].tolist() and state.loss[0] == 1 and not state.visits.any()
    trials, _ = ask(jax.random.key(0), state)
    assert ((trials.unit != state.x[0]).sum(1) == 1).all()
    np.testing.assert_allclose(np.asarray(state.bracket.high - state.bracket.low), 1)


def test_what_is_pending_is_not_asked_twice():
    method = coordinate_descent(REAL, starts=1, batch=2)
    ask = compiled(method.ask, method.tell)[0]
    state = play(method, lambda unit: unit.sum(1), 3)[2]
    first, state = ask(jax.random.key(0), state)
    second, _ = ask(jax.random.key(1), state, first)
    rows = [row.tobytes() for trials in (first, second) for row in np.asarray(trials.unit)]
    assert len(set(rows)) == 4
    assert not set(np.asarray(first.aux.coordinate).tolist()) & set(np.asarray(second.aux.coordinate).tolist())


def test_a_start_that_fails_tries_elsewhere():
    method = coordinate_descent(REAL, starts=1, batch=2)
    units, _, _ = play(method, lambda unit: np.where(unit[:, 0] > 0.2, np.nan, unit.sum(1)), 30)
    assert (units[:, 0] <= 0.2).any() and (units[-20:, 0] <= 0.2).mean() > 0.4
    units, _, state = play(method, lambda unit: unit.sum(1) * np.nan, 10)
    assert len({row.tobytes() for row in units}) == 20 and not np.isnan(jax.tree.leaves(state)[6]).any()


# The edges.


@pytest.mark.parametrize(
    ("tree", "options"),
    [
        ({"a": hpo.Categorical(("only",)), "b": hpo.Categorical(("x", "y"))}, {"batch": 5, "starts": 2}),
        ({"a": hpo.Int(0, 10**6), "b": hpo.Int(1, 10**6, log=True)}, {"batch": 3, "starts": 5}),
    ],
)
def test_small_and_large_spaces(tree, options):
    method = coordinate_descent(tree, **options)
    units, _, state = play(method, lambda unit: unit.sum(1), 8)
    assert ((units >= 0) & (units <= 1)).all()
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert not any(np.isnan(leaf).any() for leaf in floats)


def test_programs_do_not_grow_with_the_dims():
    def size(dims):
        method = coordinate_descent({"x": hpo.Array(dims, 0.0, 1.0), "n": hpo.Int(1, 9)}, starts=2, batch=4)
        state = method.init(jax.random.key(0))
        trials = jax.eval_shape(method.ask, jax.random.key(0), state)[0]
        ask = jax.jit(method.ask).lower(jax.random.key(0), state)
        tell = jax.jit(method.tell).lower(state, trials, jnp.zeros(4))
        return len(ask.as_text().splitlines()), len(tell.as_text().splitlines())

    assert size(10) == size(1000)


def test_what_is_no_argument_is_refused():
    space = {"x": hpo.Float(0.0, 1.0)}
    with pytest.raises(ValueError, match="starts must be at least 1, got 0"):
        coordinate_descent(space, starts=0)
    with pytest.raises(TypeError, match="batch must be an integer, got 2.5"):
        coordinate_descent(space, batch=2.5)
    with pytest.raises(ValueError, match=r"order must be one of \['adaptive', 'cyclic'\], got 'random'"):
        coordinate_descent(space, order="random")


def test_a_line_of_more_levels_than_the_dtype_tells_apart_comes_to_an_end():
    space = hpo.Space({"n": hpo.Int(0, 10**8), "x": hpo.Float(0.0, 1.0)})
    method = hpo.coordinate_descent(space, starts=1, batch=2)
    ask, tell, state, seen = jax.jit(method.ask), jax.jit(method.tell), method.init(jax.random.key(0)), []
    for now in range(60):
        trials, state = ask(jax.random.key(now), state)
        seen += np.asarray(trials.unit).tolist()
        state = tell(state, trials, jnp.abs(trials.unit - jnp.array([0.3, 0.7])).sum(-1))
    assert len(set(map(tuple, seen[-40:]))) >= 30


def test_keeps_its_dtypes_under_float64():
    with jax.enable_x64(True):
        method = hpo.coordinate_descent({"x": hpo.Array(2, 0.0, 1.0)}, batch=4)
        _, traces = jax.jit(hpo.study(lambda key, h: ((h["x"] - 0.3) ** 2).sum(), method, rounds=8))(jax.random.key(0))
        assert traces.losses.dtype == np.float64 and traces.losses.min() < 1e-3
