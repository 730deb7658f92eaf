"""Trees of any kind, conditional branches, native points and the equality of spaces."""

import math
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo


class Pair(NamedTuple):
    a: Any
    b: Any


@flax.struct.dataclass
class Record:
    rate: Any
    label: Any = flax.struct.field(pytree_node=False, default="static")


NESTED = {
    "arch": hpo.OneOf(
        mlp={"act": hpo.Categorical(("relu", "gelu")), "norm": hpo.OneOf(none={}, layer={"eps": hpo.Float(1e-6, 1.0)})},
        conv=hpo.OneOf(
            deep=hpo.OneOf(wide={"k": hpo.Int(1, 9, step=2)}, thin=hpo.Array((2,), 0.0, 1.0)),
            flat=hpo.Categorical((1, 2.5)),
        ),
    ),
    "soft": hpo.Categorical((3, 5, 7), relaxed=True),
    "lr": hpo.Float(1e-5, 1e-1, log=True),
    "clip": 1.0,
    "nothing": None,
}


def leaves_of(native: Any, path: str = "") -> set[str]:
    """Names of the dims in a native point of `NESTED`, a `OneOf` by its own path."""
    if isinstance(native, dict):
        own = {path} if "choice" in native else set()
        below = (leaves_of(v, f"{path}.{k}" if path else k) for k, v in native.items() if k != "choice")
        return own.union(*below)
    if isinstance(native, np.ndarray):
        return {f"{path}[{i}]" for i in range(native.size)}
    return {path} - {"clip", "nothing"}


# Trees.

TREES = {
    "bare": (hpo.Float(0, 2), ["value"], 1.0),
    "dict": ({"b": hpo.Int(0, 9), "a": {"c": hpo.Float(0, 2)}}, ["a.c", "b"], {"a": {"c": 1.0}, "b": 5}),
    "list": ([hpo.Float(0, 2), "text", (None, hpo.Int(0, 9))], ["0", "2.1"], [1.0, "text", (None, 5)]),
    "namedtuple": (Pair(print, hpo.Ordinal((1, 2, 3))), ["b"], Pair(print, 2)),
    "flax": ({"x": Record(hpo.Float(0, 2), "mine")}, ["x.rate"], {"x": Record(1.0, "mine")}),
    "array": ({"w": hpo.Array((2, 1), 0, 2)}, ["w[0]", "w[1]"], {"w": np.array([[1.0], [1.0]])}),
    "int shape": (hpo.Array(np.int64(2), 0, 2), ["value[0]", "value[1]"], np.array([1.0, 1.0])),
    "one branch": (hpo.OneOf(only=hpo.Float(0, 2)), ["value", "only"], {"choice": "only", "only": 1.0}),
    "empty branches": ({"o": hpo.OneOf(a={}, b=7), "c": 1}, ["o"], {"o": {"choice": "b", "b": 7}, "c": 1}),
    "array in a branch": (hpo.OneOf(a=[], b=hpo.Array(1, 0, 2)), ["value", "b"], {"choice": "b", "b": np.ones(1)}),
    "list in a branch": ([hpo.OneOf(z=[1, hpo.Int(0, 9)])], ["0", "0.z.1"], [{"choice": "z", "z": [1, 5]}]),
}  # fmt: skip


@pytest.mark.parametrize("tree, names, middle", TREES.values(), ids=TREES)
def test_any_pytree(tree, names, middle):
    space = hpo.Space(tree)
    hparams = jax.jit(space.decode)(np.full(space.dims, 0.5))
    assert space.names == names
    native = space.native(hparams)
    assert jax.tree.structure(native) == jax.tree.structure(middle)
    for got, expected in zip(jax.tree.leaves(native), jax.tree.leaves(middle), strict=True):
        assert type(got) is type(expected) and np.all(got == expected)
    for got, expected in zip(jax.tree.leaves(space.read(native)), jax.tree.leaves(hparams), strict=True):
        assert got.dtype == expected.dtype and np.array_equal(got, expected)


def test_constants_are_none_when_traced_and_filled_natively():
    constants = [1, "text", None, np.arange(3), math.sqrt]
    space = hpo.Space({"x": hpo.Float(0, 1), "c": constants})
    hparams = space.decode(np.zeros((4, 1)))
    assert hparams["c"] == [None] * 5
    assert all(a is b for a, b in zip(space.fill(hparams)["c"], constants, strict=True))


def test_a_node_registered_without_keys():
    class Box:
        def __init__(self, content):
            self.content = content

    jax.tree_util.register_pytree_node(Box, lambda box: ((box.content,), None), lambda _, children: Box(*children))
    space = hpo.Space(Box(hpo.Int(0, 9)))
    point = space.native(space.decode(jnp.array([0.99])))
    assert point.content == 9 and int(space.read(point).content) == 9


def test_a_trace_sees_values_of_numbers_and_indices_of_all_else():
    tree = {
        "float": hpo.Categorical((1, 2.5)),
        "int": hpo.Ordinal((16, 2**24 + 1)),
        "bool": hpo.Categorical((False, True)),
        "mixed": hpo.Categorical((True, 2)),
        "text": hpo.Categorical(("a", None)),
        "numpy": hpo.Categorical((np.float32(0.5), jnp.float32(0.75))),
        "choice": hpo.OneOf(a={}, b={}),
        "soft": hpo.Categorical(("a", "b", "c"), relaxed=True),
    }
    space = hpo.Space(tree)
    hparams = jax.jit(space.decode)(jnp.full(space.dims, 0.99))
    expected = {
        "float": np.float32(2.5),
        "int": np.int32(2**24 + 1),
        "bool": np.bool_(True),
        "mixed": np.int32(1),
        "text": np.int32(1),
        "numpy": np.float32(0.75),
        "choice": {"choice": np.int32(1), "a": {}, "b": {}},
        "soft": np.array([0, 0, 1], np.float32),
    }
    jax.tree.map(np.testing.assert_array_equal, hparams, expected)
    assert jax.tree.map(lambda x: x.dtype, hparams) == jax.tree.map(lambda x: x.dtype, expected)
    native = space.native(hparams)
    assert (
        native["mixed"] == 2 and native["text"] is None and native["soft"] == "c" and native["choice"]["choice"] == "b"
    )


def test_active_is_what_the_live_branch_shows():
    space = hpo.Space(NESTED)
    unit = space.sample(jax.random.key(0), 200)
    hparams, active = jax.jit(space.decode)(unit), np.asarray(space.active(unit))
    encoded, points = jax.jit(space.encode)(hparams), []
    shapes = set()
    for i in range(200):
        native = space.native(hparams, i)
        live = {name for name, is_live in zip(space.names, active[i], strict=True) if is_live}
        assert live == leaves_of(native)
        assert (native["clip"], native["nothing"]) == (1.0, None)
        shapes.add(frozenset(live))
        points.append(space.read(native))
    assert len(shapes) == 5
    read = jax.tree.map(lambda *rows: np.stack(rows), *points)
    assert jax.tree.map(lambda x: x.dtype, read) == jax.tree.map(lambda x: x.dtype, hparams)
    np.testing.assert_allclose(jax.jit(space.encode)(read), encoded, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(encoded)[~active], 0.5)


def test_jit_vmap_and_leading_axes_agree():
    space = hpo.Space(NESTED)
    decode, encode = jax.jit(space.decode), jax.jit(space.encode)
    unit = space.sample(jax.random.key(1), 6).reshape(2, 3, space.dims)
    plain = decode(unit)
    encoded = encode(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jax.vmap(decode)(unit), plain)
    np.testing.assert_allclose(jax.vmap(encode)(plain), encoded, atol=1e-6)
    for row in np.ndindex(2, 3):
        one = jax.tree.map(lambda x, row=row: np.asarray(x)[row], plain)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), decode(unit[row]), one)
        np.testing.assert_allclose(encode(one), encoded[row], atol=1e-6)


def test_gradients_of_a_mixed_space_are_finite_and_zero_at_levels():
    space = hpo.Space({"nested": NESTED, "large": hpo.Int(1, 2**31 - 1, log=True), "wide": hpo.Float(-3e30, 3e30)})
    is_real = space.levels == 0

    def total(unit):
        return sum(jnp.sum(x / 1e30) for x in jax.tree.leaves(space.decode(unit)) if x.dtype == jnp.float32)

    slope, jacobian = jax.jit(jax.grad(total)), jax.jit(jax.jacobian(lambda u: space.encode(space.decode(u))))
    for unit in (np.zeros(space.dims), np.full(space.dims, 0.3), np.ones(space.dims)):
        gradient = np.asarray(slope(jnp.asarray(unit, jnp.float32)))
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient != 0, is_real)
        back = jacobian(jnp.asarray(unit, jnp.float32))
        live = np.asarray(space.active(unit))
        np.testing.assert_allclose(np.diag(back), is_real & live, atol=1e-4)


# Reading points.


def test_points_of_another_dimension_are_refused():
    space = hpo.Space([hpo.Float(0, 1), hpo.Int(0, 1)])
    for method in (space.decode, space.active, space.level):
        with pytest.raises(ValueError, match=r"unit must be \[..., 2\].*got shape \(3,\)"):
            method(np.zeros(3))


GOOD = {"lr": 0.1, "n": 4, "w": [0.0, 1.0], "act": "relu", "opt": {"choice": "sgd", "sgd": {"m": 0.5}}}
REFUSED = {
    "high": ({"lr": 0.7}, "'lr': 0.7, but it must be a number in [0.1, 0.3]"),
    "nan": ({"lr": math.nan}, "'lr': nan"),
    "type": ({"lr": "a"}, "'lr': 'a'"),
    "step": ({"n": 3}, "'n': 3, but it must be 0 plus a multiple of 2 in [0, 8]"),
    "bool": ({"n": True}, "'n': True"),
    "fraction": ({"n": 2.5}, "'n': 2.5"),
    "shape": ({"w": [0.5]}, "'w': [0.5], but it must be (2,) numbers, or one for all, in [0, 1]"),
    "entry": ({"w": [0.5, 2.0]}, "'w': [0.5, 2.0]"),
    "option": ({"act": "tanh"}, "'act': 'tanh', but it must be one of ('relu', 1)"),
    "not 1": ({"act": True}, "'act': True, but"),
    "choice": ({"opt": {"choice": "lion"}}, "'opt.choice': 'lion', but 'choice' must be one of ['sgd', 'adam']"),
    "no choice": ({"opt": "sgd"}, "has no 'opt.choice'"),
    "missing": ({"opt": {"choice": "sgd"}}, "has no 'opt.sgd.m'"),
}


@pytest.mark.parametrize("change, fragment", REFUSED.values(), ids=REFUSED)
def test_read_refuses_what_is_not_in_the_space(change, fragment):
    space = hpo.Space(
        {
            "lr": hpo.Float(0.1, 0.3),
            "n": hpo.Int(0, 8, step=2),
            "w": hpo.Array(2, 0, 1),
            "act": hpo.Categorical(("relu", 1)),
            "opt": hpo.OneOf(sgd={"m": hpo.Float(0, 1)}, adam={}),
        }
    )
    assert float(space.read(GOOD)["lr"]) == np.float32(0.1)
    assert space.native(space.read({**GOOD, "opt": {"choice": "adam"}}))["opt"] == {"choice": "adam", "adam": {}}
    with pytest.raises(ValueError) as error:
        space.read({**GOOD, **change})
    assert fragment in str(error.value)


# Equality.

SAME = [
    ({"a": hpo.Float(0, 1), "c": 1}, {"a": hpo.Float(0.0, np.float32(1)), "c": "other"}),
    (hpo.Categorical(("a", "b")), hpo.Categorical((None, print))),
    (hpo.Categorical((1, 2.5)), hpo.Categorical((1.0, np.float32(2.5)))),
    (hpo.Array(3, 0, 1), hpo.Array((3,), 0, 1)),
    (hpo.OneOf(a={"x": hpo.Int(0, 3)}), hpo.OneOf(a={"x": hpo.Int(0.0, 3.0)})),
]
DIFFERENT = [
    (hpo.Float(0, 1), hpo.Float(0, np.nextafter(1, 2))),
    (hpo.Float(1, 2), hpo.Float(1, 2, log=True)),
    (hpo.Float(1, 2), hpo.Int(1, 2)),
    (hpo.Int(0, 8), hpo.Int(0, 8, step=2)),
    (hpo.Categorical((1, 2)), hpo.Categorical((1, 3))),
    (hpo.Categorical((1, 2)), hpo.Categorical((1.0, 2.0))),
    (hpo.Categorical((0, 1)), hpo.Categorical((False, True))),
    (hpo.Categorical(("a", "b")), hpo.Ordinal(("a", "b"))),
    (hpo.Categorical(("a", "b")), hpo.Categorical(("a", "b"), relaxed=True)),
    (hpo.Categorical(("a", "b")), hpo.Categorical(("a", "b", "c"))),
    (hpo.Array((2, 3), 0, 1), hpo.Array((3, 2), 0, 1)),
    (hpo.OneOf(a={}, b={}), hpo.OneOf(b={}, a={})),
    ({"a": hpo.Float(0, 1)}, {"b": hpo.Float(0, 1)}),
    ({"a": hpo.Float(0, 1)}, {"a": hpo.Float(0, 1), "c": 1}),
    (hpo.OneOf(a={"x": hpo.Int(0, 3)}, b={}), hpo.OneOf(a={}, b={"x": hpo.Int(0, 3)})),
]


@pytest.mark.parametrize("a, b", SAME)
def test_spaces_that_compile_alike_are_equal(a, b):
    assert hpo.Space(a) == hpo.Space(b) and hash(hpo.Space(a)) == hash(hpo.Space(b))
    assert hpo.Space.of(hpo.Space(a)) == hpo.Space(hpo.Space(a)) == hpo.Space(a)


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_spaces_that_compile_differently_are_not(a, b):
    assert hpo.Space(a) != hpo.Space(b)


def test_a_space_follows_the_working_dtype():
    space = hpo.Space({"x": hpo.Float(0.1, 0.3), "o": hpo.Categorical((0.1, 0.2))})
    assert [v.dtype for v in space.decode(np.zeros(2)).values()] == [np.float32] * 2
    with jax.enable_x64(True):
        hparams = space.decode(np.zeros(2))
        assert [v.dtype for v in hparams.values()] == [np.float64] * 2
        assert space.native(hparams) == {"x": 0.1, "o": 0.1}
    np.testing.assert_allclose(space.encode(hparams), [0.25, 0.0], atol=1e-7)
