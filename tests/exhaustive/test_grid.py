"""The full factorial: every combination once, conditional parameters only where they are live."""

import itertools

import jax
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.exhaustive import grid


def asks(method):
    """The rows of all asks, in order: unit, id, active, and the native point of every active row."""
    ask, state, key = jax.jit(method.ask), method.init(jax.random.key(0)), jax.random.key(1)
    rows = []
    for _ in range(method.rounds):
        trials, state = ask(key, state)
        rows.append(trials)
    trials = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    points = [method.space.native(trials.hparams, i) for i in np.flatnonzero(trials.active)]
    return trials, points


def test_mixed_grid_is_the_product_in_order():
    space = {
        "a": hpo.Float(-1.0, 1.0),
        "b": hpo.Float(1e-4, 1.0, log=True),
        "c": hpo.Categorical(("x", "y", "z")),
        "d": hpo.Int(1, 3),
        "e": hpo.Ordinal((16, 64)),
        "f": "constant",
    }
    trials, points = asks(grid(space, points={"a": 3, "b": 5}, batch=16))
    values = ([-1, 0, 1], [1e-4, 1e-3, 1e-2, 1e-1, 1], "xyz", [1, 2, 3], [16, 64])
    expected = list(itertools.product(*values))
    assert len(points) == len(expected) == 3 * 5 * 3 * 3 * 2
    for point, (a, b, c, d, e) in zip(points, expected, strict=True):
        assert (point["a"], point["c"], point["d"], point["e"], point["f"]) == (a, c, d, e, "constant")
        assert point["b"] == pytest.approx(b, rel=1e-5)
    np.testing.assert_array_equal(trials.id[:270], range(270))
    np.testing.assert_array_equal(trials.active, np.arange(272) < 270)
    np.testing.assert_array_equal(trials.id[270:], [-1, -1])


def test_conditional_grid_is_a_sum_without_duplicates():
    space = {
        "optimizer": hpo.OneOf(
            sgd={"momentum": hpo.Float(0.0, 1.0), "nesterov": hpo.OneOf(no={}, yes={"gain": hpo.Float(0.0, 3.0)})},
            adam={"b1": hpo.Float(0.0, 1.0), "b2": hpo.Categorical((0.9, 0.99, 0.999))},
            none={},
        ),
        "width": hpo.Int(1, 2),
    }
    method = grid(
        space, points={"optimizer.sgd.momentum": 3, "optimizer.adam.b1": 2, "optimizer.sgd.nesterov.yes.gain": 4}
    )
    trials, points = asks(method)
    sgd = [
        {"momentum": m, "nesterov": {"choice": c, c: below}}
        for m in (0, 0.5, 1)
        for c, below in [("no", {})] + [("yes", {"gain": g}) for g in (0, 1, 2, 3)]
    ]
    adam = [{"b1": b1, "b2": b2} for b1 in (0, 1) for b2 in (0.9, 0.99, 0.999)]
    branches = [("sgd", x) for x in sgd] + [("adam", x) for x in adam] + [("none", {})]
    expected = [{"optimizer": {"choice": c, c: x}, "width": w} for c, x in branches for w in (1, 2)]
    assert len(expected) == (3 * 5 + 2 * 3 + 1) * 2 == 44
    assert [{"optimizer": p["optimizer"], "width": p["width"]} for p in points] == expected
    unit = trials.unit[:44]
    assert len(np.unique(unit, axis=0)) == 44
    assert (unit[~np.asarray(method.space.active(unit))] == 0.5).all()


@pytest.mark.parametrize(
    "parameter, points, expected",
    [
        (hpo.Int(0, 100), 5, [0, 25, 50, 75, 100]),
        (hpo.Int(0, 100, step=10), 3, [0, 50, 100]),
        (hpo.Int(0, 3), 5, [0, 1, 2, 3]),
        (hpo.Int(1, 1000, log=True), 4, [1, 10, 100, 1000]),
        (hpo.Int(1, 8, log=True), 7, [1, 2, 3, 4, 5, 6, 8]),
        (hpo.Int(7, 9), 1, [8]),
        (hpo.Int(1, 100, log=True), 1, [10]),
        (hpo.Int(-5, 5), 2, [-5, 5]),
    ],
)
def test_integers_have_evenly_spread_distinct_levels_with_both_ends(parameter, points, expected):
    _, found = asks(grid({"n": parameter}, points=points, batch=4))
    assert [p["n"] for p in found] == expected


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("levels, points", [(20, 19), (20, 13), (100, 7), (50, 49)])
def test_integers_are_never_doubled(log, levels, points):
    _, found = asks(grid({"n": hpo.Int(1, levels, log=log)}, points=points, batch=8))
    numbers = [p["n"] for p in found]
    assert len(set(numbers)) == len(numbers) == points
    assert (numbers[0], numbers[-1]) == (1, levels) and numbers == sorted(numbers)


def test_one_point_of_a_real_parameter_is_its_middle():
    _, found = asks(grid({"x": hpo.Float(1e-4, 1.0, log=True), "y": hpo.Array(2, 0.0, 4.0)}, points={"x": 1, "y": 2}))
    assert [p["x"] for p in found] == pytest.approx([1e-2] * 4, rel=1e-5)
    np.testing.assert_array_equal([p["y"] for p in found], [[0, 0], [0, 4], [4, 0], [4, 4]])


def test_a_large_grid_is_no_table():
    method = grid({"x": hpo.Array(13, 0.0, 1.0), "c": hpo.Categorical((0, 1))}, points=4, batch=8)
    assert method.rounds == 2 * 4**13 // 8
    state = method.init(jax.random.key(0))
    cell = 123_456_789
    state = jax.tree.map(lambda x: x + cell, state)
    trials, _ = jax.jit(method.ask)(jax.random.key(0), state)
    digits = [int(d) for d in np.base_repr(cell, 4).rjust(13, "0")]
    # "c" comes first in the tree, then the entries of "x", the last one fastest.
    np.testing.assert_allclose(trials.unit[0, 1:], np.array(digits[-13:]) / 3, rtol=1e-6)
    assert trials.unit[0, 0] == (0.25, 0.75)[cell // 4**13] and int(trials.id[0]) == cell


def test_it_compiles_flat_in_dims():
    def equations(dims):
        method = grid({"x": hpo.Array(dims, 0.0, 1.0), "c": hpo.Categorical(("a", "b"))}, points=1)
        state = method.init(jax.random.key(0))
        return len(jax.make_jaxpr(method.ask)(jax.random.key(0), state).jaxpr.eqns), method.rounds

    assert equations(10) == equations(1000)


@pytest.mark.parametrize(
    "space, points, message",
    [
        ({"w": hpo.Array(1000, 0, 1)}, 5, r"about 10\^699 cells.*'w' with 5 values in each of 1000 .*points={'w': 1}"),
        ({"a": hpo.Float(0, 1), "b": hpo.Float(0, 1)}, 100_000, r"about 10\^10 cells.*use quasirandom"),
        ({"x": hpo.Float(0, 1)}, {"y": 3}, r"points has 'y', but only these parameters take a number: \['x'\]"),
        ({"c": hpo.Categorical((1, 2))}, {"c": 1}, r"points has 'c', but only"),
        ({"x": hpo.Float(0, 1)}, 0, r"points of 'x' must be at least 1, got 0"),
    ],
)
def test_errors_name_the_parameter_and_the_remedy(space, points, message):
    with pytest.raises(ValueError, match=message):
        grid(space, points=points)


def test_points_that_are_not_whole():
    with pytest.raises(TypeError, match="points of 'x' must be an integer, got 2.5"):
        grid({"x": hpo.Float(0, 1)}, points=2.5)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        grid({"x": hpo.Float(0, 1)}, batch=0)
