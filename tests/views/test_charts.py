"""Pictures of a comparison: which curves are there, and where."""

import io
import warnings

import jax
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.comparison import Comparison, Runs
from jaxhpo.records import Records
from jaxhpo.views import charts

SPACE = hpo.Space({"x": hpo.Float(0.0, 1.0)})


def runs(losses):
    """Runs of given losses, [repeats, trials], a step each."""
    n = losses.shape[1]
    unit, ids = np.zeros((n, 1), np.float32), np.arange(n, dtype=np.int32)
    hparams = jax.tree.map(np.asarray, SPACE.decode(unit))
    trials = tuple(Records(ids, ids, unit, hparams, 0 * ids, row.astype(np.float32)) for row in losses)
    return Runs(SPACE, trials, tuple(np.arange(1.0, n + 1) for _ in losses), 1.0, 1e-3, 1e-2, 1.0, 1.0, ())


def comparison(problems=1):
    rng = np.random.default_rng(0)
    names = ("a", "b", "c", "d", "e", "f")
    made = {f"p{p}": {m: runs(rng.random((5, 20)) + i) for i, m in enumerate(names)} for p in range(problems)}
    return Comparison(made, dict.fromkeys(made, 20.0), dict.fromkeys(made, "trials"))


def draw(figure):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure.axes[0]


def named(axis):
    """Bold names and the other ones, written where the curves end."""
    texts = [t for t in axis.texts if t.get_text() in "abcdef"]
    return {t.get_text() for t in texts if t.get_fontweight() == "bold"}, {t.get_text() for t in texts}


def test_best_so_far_has_medians_and_the_quartiles_of_those_in_front():
    c = comparison()
    axis = draw(c.plot("best_so_far", highlight=2))
    assert len(axis.lines) == 6 and len(axis.collections) == 2
    lowest = [np.median(c.best_so_far(m)[1][:, 4:], axis=0) for m in "ab"]
    found = [line.get_ydata() for line in axis.lines if line.get_linewidth() > 1]
    for mine in lowest:
        assert any(np.allclose(mine[46:], y[50:]) for y in found)
    assert named(axis) == ({"a", "b"}, set("abcdef"))
    assert axis.get_xlabel() == "trials" and axis.get_xlim() == (0, 20)
    heights = sorted(t.xy[1] for t in axis.texts if t.get_text() in "abcdef")
    assert (np.diff(heights) > 0.04).all(), "no name lies on another"


def test_ranks_go_from_the_top_with_bands_of_those_in_front():
    c = comparison()
    axis = draw(c.plot("ranks", highlight=3))
    assert len(axis.lines) == 6 and len(axis.collections) == 3 and axis.get_ylim() == (6.5, 0.5)
    ends = sorted(line.get_ydata()[-1] for line in axis.lines)
    np.testing.assert_allclose(ends, np.sort(c.ranks().mean))
    assert named(axis)[0] == {"a", "b", "c"}


def test_a_heat_map_has_a_row_for_each_method():
    c = comparison(3)
    axis = draw(c.plot("heat_map"))
    image = axis.images[0].get_array()
    assert image.shape == (6, 3)
    np.testing.assert_allclose(image[:, 1], c.ranks(problem="p1").mean[[c.methods.index(m) for m in c.order()]])
    assert [t.get_text() for t in axis.get_yticklabels()] == c.order()
    alone = draw(comparison().plot("heat_map"))
    assert alone.images[0].get_array().shape == (6, 4)
    assert [t.get_text() for t in alone.get_xticklabels()] == ["25%", "50%", "75%", "100%"]


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ValueError, match="kind must be one of"):
        comparison().plot("pie")
    with pytest.raises(ValueError, match="problem must be one of"):
        comparison(2).plot("best_so_far")
    nothing = Comparison({"p": {"a": runs(np.full((2, 3), np.nan))}}, {"p": 3.0}, {"p": "trials"})
    with pytest.raises(ValueError, match="nothing to show"):
        nothing.plot("best_so_far")


def test_names_stay_as_near_to_their_curves_as_they_can():
    apart = charts._apart(np.array([0.9, 0.5, 0.5, 0.1]), 0.1)
    np.testing.assert_allclose(apart, [0.9, 0.45, 0.55, 0.1])
    np.testing.assert_allclose(charts._apart(np.array([0.0, 0.02, 1.0, 1.0]), 0.1), [0.0, 0.1, 0.9, 1.0])
    np.testing.assert_allclose(charts._apart(np.full(5, 0.3), 0.25), np.linspace(0, 1, 5))
