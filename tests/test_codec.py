"""The codec against plain NumPy and exact fractions."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.space import working_dtype

TENTH = np.float32(0.1)  # above 0.1


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield working_dtype()


NASTY = [
    hpo.Float(0.1, 0.3),
    hpo.Float(-0.3, -0.1),
    hpo.Float(Fraction(1, 10), Fraction(3, 10)),
    hpo.Float(TENTH, np.nextafter(TENTH, np.float32(1))),
    hpo.Float(TENTH, np.nextafter(TENTH, np.float32(1)), log=True),
    hpo.Float(1e-5, 1e-1, log=True),
    hpo.Float(1000, 1000.01, log=True),
    hpo.Float(1e-45, 1e-30),
    hpo.Float(1e-45, 1.0, log=True),
    hpo.Float(1.2e-38, 2.4e-38),
    hpo.Float(-1e-40, 5),
    hpo.Float(-3e38, 1e-40),
    hpo.Float(-3e38, 3e38),
    hpo.Float(1e-38, 3.4e38, log=True),
    hpo.Float(-1e300, 1e300),
    hpo.Float(1e-300, 1e300, log=True),
    hpo.Float(2**53 + 1, 2**54 + 3),
    hpo.Float(0, 2**31 - 1),
    hpo.Int(-(2**31), -2),
    hpo.Int(-(2**31), 2**31 - 1, step=3),
    hpo.Int(1, 2**31 - 1),
    hpo.Int(1, 2**31 - 1, log=True),
    hpo.Int(np.int32(2**31 - 8), np.int32(2**31 - 1)),
    hpo.Int(2**30, 2**30 + 5, log=True),
    hpo.Int(0, 10, step=4),
]


def exact(x: Any) -> Fraction:
    return Fraction(x.item() if isinstance(x, np.generic | jax.Array) else x)


def test_no_decoded_value_is_outside_the_bounds(dtype):
    info, one, zero = np.finfo(dtype), dtype.type(1), dtype.type(0)
    extremes = [0, 1, np.nextafter(zero, one), np.nextafter(one, zero), info.tiny, info.tiny / 2, info.eps]
    space = hpo.Space(NASTY)

    @jax.jit
    def ends(unit):
        hparams = space.decode(jnp.broadcast_to(unit[:, None], (unit.size, space.dims)))
        return [(x.min(), x.max(), jnp.isnan(x).any() if x.dtype == dtype else False) for x in hparams]

    random = np.random.default_rng(0).random(10**6, dtype)
    for unit in (random, random**8):
        unit[: len(extremes)] = extremes
        for parameter, (smallest, largest, is_nan) in zip(NASTY, ends(unit), strict=True):
            assert not is_nan, parameter
            assert exact(parameter.low) <= exact(smallest) <= exact(largest) <= exact(parameter.high), parameter


def test_encode_is_the_inverse_for_reals(dtype):
    space = hpo.Space([p for p in NASTY if isinstance(p, hpo.Float)])
    unit = np.random.default_rng(1).random((2000, space.dims), dtype)
    decode = jax.jit(space.decode)
    values = decode(unit)
    encoded = jax.jit(space.encode)(values)
    assert encoded.min() >= 0 and encoded.max() <= 1
    eps = np.finfo(dtype).eps
    for parameter, value, again in zip(space.tree, values, decode(encoded), strict=True):
        if parameter.log:
            width = float(np.log(float(parameter.high)) - np.log(float(parameter.low)))
            np.testing.assert_allclose(again, value, rtol=(2 + width) * eps)
        else:
            np.testing.assert_allclose(again, value, rtol=0, atol=3 * eps * float(jnp.abs(value).max()))


def test_reals_are_uniform_or_log_uniform(dtype):
    unit = np.linspace(0, 1, 1001, dtype=dtype)
    space = hpo.Space([hpo.Float(-2, 5), hpo.Float(1e-5, 1e-1, log=True), hpo.Array(2, 2.0, 8.0, log=True)])
    linear, log, array = jax.jit(space.decode)(np.repeat(unit[:, None], 4, axis=1))
    exact_unit = unit.astype(float)
    tolerance = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(linear, -2 + 7 * exact_unit, rtol=0, atol=tolerance)
    np.testing.assert_allclose(log, 1e-5 * 1e4**exact_unit, rtol=tolerance)
    np.testing.assert_allclose(array, np.repeat(2 * 4 ** exact_unit[:, None], 2, axis=1), rtol=tolerance)


CHOICES = {
    "text": hpo.Categorical(("relu", "gelu", None, ("a", (1, 2)), [1, 2], np.arange(2))),
    "types": hpo.Categorical([jnp.float32, jnp.bfloat16, math.sqrt]),
    "bool": hpo.Categorical((True, False)),
    "mixed": hpo.Categorical((True, 1, 2)),
    "numbers": hpo.Categorical((1, 2.5, Fraction(1, 3), math.inf, -math.inf)),
    "tenths": hpo.Ordinal((0.1, 0.2, 0.3)),
    "beyond float32": hpo.Ordinal((2**24, 2**24 + 1, -(2**31), 2**31 - 1)),
    "beyond int32": hpo.Ordinal((1, 2**31, 10**30)),
    "numpy": hpo.Categorical((np.float32(0.1), np.int64(3), jnp.float32(0.5))),
    "numpy bool": hpo.Ordinal((np.bool_(False), np.bool_(True))),
    "relaxed": hpo.Categorical(("a", "b", "c"), relaxed=True),
    "relaxed pair": hpo.Categorical((0.5, 0.25), relaxed=True),
    "single": hpo.Categorical(("only",)),
    "one of": hpo.OneOf(a={}, b=1, c="x"),
    "step": hpo.Int(-3, 11, step=3),
    "log": hpo.Int(3, 700, log=True),
}


@pytest.mark.parametrize("parameter", CHOICES.values(), ids=CHOICES)
def test_every_level_comes_back(parameter, dtype):
    space = hpo.Space({"x": parameter})
    assert space.levels == [parameter.levels]
    middles = space._codec().middle(jnp.arange(parameter.levels)[:, None])
    np.testing.assert_array_equal(space.level(middles)[:, 0], np.arange(parameter.levels))
    hparams = jax.jit(space.decode)(middles)
    np.testing.assert_allclose(jax.jit(space.encode)(hparams), middles, rtol=4 * np.finfo(dtype).eps)
    natives = [space.native(hparams, i) for i in range(parameter.levels)]
    if isinstance(parameter, hpo.Categorical | hpo.Ordinal):
        assert all(native["x"] is option for native, option in zip(natives, parameter.options, strict=True))
    elif isinstance(parameter, hpo.Int):
        assert [native["x"] for native in natives] == list(range(parameter.low, parameter.high + 1, parameter.step))
    for i, native in enumerate(natives):
        for got, expected in zip(space.flatten(space.read(native)), space.flatten(hparams), strict=True):
            assert got.dtype == expected.dtype and np.array_equal(got, expected[i])


LARGE = [
    hpo.Int(0, 2**22 - 1),
    hpo.Int(-9, 3 * 10**6, step=7),
    hpo.Int(-(2**31), 2**31 - 1, step=4096),
    hpo.Int(1, 2**17, log=True),
]


@pytest.mark.parametrize("parameter", LARGE, ids=repr)
def test_every_level_of_a_large_integer_comes_back(parameter):
    space = hpo.Space(parameter)
    values = np.arange(parameter.low, parameter.high + 1, parameter.step).astype(np.int32)
    np.testing.assert_array_equal(jax.jit(lambda x: space.decode(space.encode(x)))(values), values)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "log"])
def test_levels_have_equal_shares(name):
    space = hpo.Space(CHOICES[name])
    grid = (np.arange(1000 * space.levels[0]) + 0.5) / (1000 * space.levels[0])
    np.testing.assert_array_equal(np.bincount(jax.jit(space.level)(grid[:, None])[:, 0]), 1000)


def test_levels_of_a_log_integer_have_the_share_of_what_rounds_to_them(dtype):
    space = hpo.Space(hpo.Int(1, 100, log=True))
    n = 200_000
    counts = np.bincount(jax.jit(space.decode)((np.arange(n)[:, None] + 0.5) / n), minlength=101)[1:]
    value = np.arange(1, 101)
    np.testing.assert_allclose(counts, n * np.log((value + 0.5) / (value - 0.5)) / np.log(201), atol=2)


FEW = {"x": hpo.Float(-0.7, 1.3), "lr": hpo.Float(1e-5, 0.3, log=True), "b": hpo.Float(0.5, 8.0, log=True)}
MANY = {
    "linear": [hpo.Float(-0.7 * k, 1.3 * k) for k in range(1, 5)],
    "log": [hpo.Float(1e-5, 0.3 * k, log=True) for k in range(1, 5)],
    "int": [hpo.Int(1, 1000, log=True), hpo.Int(0, 9)],
    "one": hpo.OneOf(a=hpo.Array(3, -0.3, 0.7), b=hpo.Float(0.1, 2.0, log=True)),
}


@pytest.mark.parametrize("tree", [FEW, MANY], ids=["few", "many"])
def test_a_point_decodes_to_the_same_bits_in_every_program(tree, dtype):
    space = hpo.Space(tree)
    n, key = 512, jax.random.key(3)
    unit = space.sample(key, n)
    decode = jax.jit(space.decode)

    def used(unit):
        hparams = space.decode(unit)
        return hparams, sum(jnp.sum(x * 1.7 + 0.3) for x in jax.tree.leaves(hparams))

    def batches(size):
        parts = [decode(part) for part in unit.reshape(-1, size, space.dims)[:8]]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    expected = decode(unit)
    others = {
        "eager": space.decode(unit),
        "rows": jax.jit(jax.vmap(space.decode))(unit),
        "one by one": jax.jit(lambda unit: jax.lax.map(space.decode, unit))(unit),
        "sampled": jax.jit(lambda key: space.decode(space.sample(key, n)))(key),
        "used": jax.jit(used)(unit)[0],
        "used in rows": jax.jit(jax.vmap(used))(unit)[0],
        "alone": jax.tree.map(lambda *x: np.stack(x), *[decode(row) for row in unit[:8]]),
    } | {f"in batches of {size}": batches(size) for size in (1, 4, 8)}
    for name, other in others.items():
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(other), strict=True):
            assert np.array_equal(np.asarray(a)[: len(b)], b), name


def test_sample_is_uniform():
    points = np.asarray(hpo.Space([hpo.Float(0, 1), hpo.Int(0, 3)]).sample(jax.random.key(2), 10_000))
    counts = np.stack([np.bincount((points[:, i] * 10).astype(int), minlength=10) for i in range(2)])
    assert ((counts - 1000) ** 2 / 1000).sum(axis=1).max() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("unit", [0.0, 1e-8, 0.3, 1.0])
@pytest.mark.parametrize("parameter", [hpo.Float(-2, 3), hpo.Float(1e-4, 2.0, log=True)], ids=repr)
def test_gradients_are_those_of_the_formula_up_to_the_ends(parameter, unit):
    space = hpo.Space(parameter)
    value, slope = jax.value_and_grad(lambda u: space.decode(u[None]))(jnp.asarray(unit))
    expected = value * np.log(parameter.high / parameter.low) if parameter.log else parameter.high - parameter.low
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: space.encode(x)[0])(value), 1 / expected, rtol=1e-5)


def equations(function, *args) -> int:
    def count(jaxpr):
        inner = [x for e in jaxpr.eqns for x in jax.tree.leaves(list(e.params.values())) if hasattr(x, "eqns")]
        return len(jaxpr.eqns) + sum(count(getattr(x, "jaxpr", x)) for x in inner)

    return count(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: hpo.Float(0, i + 1),
        lambda i: hpo.Float(1, i + 2, log=True),
        lambda i: hpo.Int(0, i + 1),
        lambda i: hpo.Categorical(("a", "b", "c")),
        lambda i: hpo.Categorical(tuple(np.arange(i + 1) / 2)),
        lambda i: hpo.Categorical(tuple(range(i + 1)), relaxed=True),
        lambda i: hpo.OneOf(a={}, b={}),
    ],
)
def test_a_leaf_adds_only_its_output_to_the_program(make):
    few, many = (hpo.Space([make(i) for i in range(n)]) for n in (10, 100))
    unit = {space: np.full(space.dims, 0.5, np.float32) for space in (few, many)}
    assert equations(many.decode, unit[many]) - equations(few.decode, unit[few]) <= 90
    hparams = {space: jax.eval_shape(space.decode, unit[space]) for space in (few, many)}
    assert equations(many.encode, hparams[many]) - equations(few.encode, hparams[few]) <= 90


def test_dims_add_nothing_to_the_program():
    few, many = (hpo.Space({"w": hpo.Array(n, 0.0, 1.0), "n": hpo.Int(0, 3)}) for n in (10, 1000))
    assert equations(few.decode, np.zeros(11)) == equations(many.decode, np.zeros(1001))
