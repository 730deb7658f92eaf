"""What makes a parameter invalid, and what the error says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo

BAD = {
    "order": (hpo.Float(2, 1), ValueError, "low=2 and high=1; swap"),
    "equal": (hpo.Int(1, 1), ValueError, "low=1 and high=1; swap them, or use a constant"),
    "np order": (hpo.Float(np.float32(0.1), 0.1), ValueError, "low must be below high"),
    "nan": (hpo.Float(0, math.nan), ValueError, "high must be finite, got nan"),
    "inf": (hpo.Float(-math.inf, 0), ValueError, "low must be finite, got -inf"),
    "huge": (hpo.Float(0, 10**400), ValueError, "high must be finite"),
    "text": (hpo.Float("a", 1), TypeError, "low must be a real number, got 'a'"),
    "bool": (hpo.Float(False, 1), TypeError, "low must be a real number, got False"),
    "int bool": (hpo.Int(0, True), TypeError, "high must be a real number, got True"),
    "log 0": (hpo.Float(0.0, 1, log=True), ValueError, "log=True needs low > 0, got low=0.0; raise low"),
    "log int": (hpo.Int(0, 9, log=True), ValueError, "log=True needs low > 0, got low=0"),
    "log number": (hpo.Int(0, 9, 2), TypeError, "log must be True or False, got 2; name further arguments"),
    "fraction": (hpo.Int(0, 2.5), TypeError, "high must be an integer, got 2.5; use Float"),
    "wide": (hpo.Int(0, 2**31), ValueError, "high must fit 32 bits, got 2147483648"),
    "many": (hpo.Int(-1, 2**31 - 1), ValueError, "got 2147483649; raise step"),
    "step": (hpo.Int(0, 9, step=0), ValueError, "step must be at least 1, got 0"),
    "half step": (hpo.Int(0, 9, step=0.5), TypeError, "step must be an integer, got 0.5"),
    "log step": (hpo.Int(1, 9, log=True, step=2), ValueError, "step=2; list the levels with Ordinal"),
    "ulp": (hpo.Float(0.1, math.nextafter(0.1, 1)), ValueError, "float32 lie between low=0.1 and high=0.1000"),
    "subnormal": (hpo.Float(1e-45, 1e-40), ValueError, "fewer than two numbers of float32"),
    "beyond": (hpo.Array(3, 1e39, 1e40), ValueError, "low=1e+39 and high=1e+40; widen them, enable float64"),
    "no options": (hpo.Categorical(()), ValueError, "options must not be empty, got ()"),
    "str options": (hpo.Categorical("abc"), TypeError, "options must be a sequence, got 'abc'; write them as a tuple"),
    "set options": (hpo.Ordinal({1}), TypeError, "options must be a sequence, got {1}"),
    "twice": (hpo.Categorical((1, "a", 1.0)), ValueError, "got 1.0 twice; drop one"),
    "list twice": (hpo.Categorical(([1], [2], [1])), ValueError, "got [1] twice"),
    "np bool twice": (hpo.Categorical((True, np.bool_(True))), ValueError, "twice"),
    "nan option": (hpo.Categorical((1.0, math.nan)), ValueError, "got nan; use None"),
    "one float32": (hpo.Categorical((2**40, 0.5, 2**40 + 1)), ValueError, "so is 1099511627776; enable float64"),
    "option beyond": (hpo.Categorical((1.0, 1e39)), ValueError, "option 1e+39 is"),
    "option parameter": (hpo.Categorical((hpo.Float(0, 1), 2)), TypeError, "use OneOf"),
    "shape 0": (hpo.Array((2, 0), 0, 1), ValueError, "shape must be positive integers, got (2, 0)"),
    "shape ()": (hpo.Array((), 0, 1), ValueError, "shape must be positive integers, got ()"),
    "shape": (hpo.Array(None, 0, 1), ValueError, "shape must be positive integers, got None"),
    "empty": (hpo.OneOf(), ValueError, "at least one branch, got none"),
    "choice": (hpo.OneOf(a=1, choice=2), ValueError, "may be called 'choice'"),
    "class": (hpo.Float, TypeError, "is the class Float; call it"),
    "space": (hpo.Space(hpo.Float(0, 1)), TypeError, "is a Space; put its tree"),
}


@pytest.mark.parametrize("parameter, kind, fragment", BAD.values(), ids=BAD)
def test_an_error_names_the_path_the_value_and_the_remedy(parameter, kind, fragment):
    tree = {"model": [1, hpo.OneOf(sgd={"x": parameter}, adam={})]}
    with pytest.raises(kind) as error:
        hpo.Space(tree)
    assert "'model.1.sgd.x'" in str(error.value)
    assert fragment in str(error.value)


def test_traced_bounds_are_refused():
    with pytest.raises(TypeError, match="'x': high must be a real number"):
        jax.jit(lambda high: hpo.Space({"x": hpo.Float(0, high)}).decode(jnp.zeros(1)))(1.0)


@pytest.mark.parametrize("tree", [{}, None, {"a": 1}, ()])
def test_a_space_without_parameters_is_refused(tree):
    with pytest.raises(ValueError, match="no parameters"):
        hpo.Space(tree)


def test_a_parameter_for_every_number_of_a_tree():
    template = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": np.zeros(3), "scale": jnp.float32(1)}
    tree = hpo.Array.like(template, 1e-4, 1.0, log=True)
    assert tree == {
        "w": hpo.Array((2, 3), 1e-4, 1.0, log=True),
        "b": hpo.Array((3,), 1e-4, 1.0, log=True),
        "scale": hpo.Float(1e-4, 1.0, log=True),
    }
    space = hpo.Space({"decay": tree})
    point = space.read({"decay": {"w": 1e-2, "b": [1e-4, 1e-2, 1.0], "scale": 1e-2}})
    np.testing.assert_allclose(space.encode(point), [0, 0.5, 1] + [0.5] * 7, atol=1e-6)
    with pytest.raises(ValueError, match=r"'decay.w': 2.0, but it must be \(2, 3\) numbers, or one for all, in"):
        space.read({"decay": {"w": 2.0, "b": 1e-2, "scale": 1e-2}})
