"""Pictures of a result: what is drawn, where, and how often."""

import io
import warnings

import jax
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

import jaxhpo as hpo
from jaxhpo.records import Records
from jaxhpo.result import Result
from jaxhpo.views import plots, scales

SPACE = {
    "lr": hpo.Float(1e-5, 1e-1, log=True),
    "layers": hpo.Int(1, 5),
    "act": hpo.Categorical(("relu", "gelu", "a name that is too long to show")),
    "opt": hpo.OneOf(sgd={"momentum": hpo.Float(0.0, 0.99)}, adam={"b1": hpo.Float(0.8, 0.99)}),
}


def study(losses, tree=None, ids=None, steps=None):
    space = hpo.Space(SPACE if tree is None else tree)
    n = len(losses)
    unit = np.random.default_rng(0).random((max(n, 100), space.dims), dtype=np.float32)
    trials = Records(
        np.arange(n, dtype=np.int32) // 4,
        np.arange(n, dtype=np.int32) if ids is None else np.asarray(ids, np.int32),
        unit[:n],
        jax.tree.map(lambda x: np.asarray(x)[:n], space.decode(unit)),
        np.zeros(n, np.int32) if steps is None else np.asarray(steps, np.int32),
        np.asarray(losses, np.float32),
    )
    return Result(space, trials, None, 0.0, None, {}, "trials", 1.0, 0.5)


def mixed(n=100):
    """Of `n` losses in [1, 2) every tenth failed, and one is an outlier."""
    losses = 1 + np.random.default_rng(1).random(n)
    losses[9::10] = np.nan
    losses[3] = 1e6
    return losses


def draw(figure):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure


def markers(axis, marker):
    """Positions of everything drawn with a marker: [n, 2]."""
    found = [np.stack(line.get_data(), axis=1) for line in axis.lines if line.get_marker() == marker]
    return np.concatenate(found) if found else np.zeros((0, 2))


def offsets(axis):
    return np.concatenate([c.get_offsets() for c in axis.collections if isinstance(c, PathCollection)])


def test_best_so_far_shows_every_evaluation():
    losses = mixed()
    (axis,) = draw(plots.best_so_far(study(losses))).axes
    dots = markers(axis, "o")
    shown = np.isfinite(losses) & (losses < 10)
    np.testing.assert_array_equal(dots[:, 0], np.flatnonzero(shown) + 1)
    np.testing.assert_allclose(dots[:, 1], losses[shown], rtol=1e-6)
    assert markers(axis, "^").shape == (1, 2) and markers(axis, "^")[0, 0] == 4
    np.testing.assert_array_equal(markers(axis, "x")[:, 0], np.arange(10, 101, 10))
    winner = np.nanargmin(losses)
    np.testing.assert_allclose(markers(axis, "*"), [[winner + 1, losses[winner]]], rtol=1e-6)


def test_best_so_far_steps_down_where_the_best_improves():
    (axis,) = plots.best_so_far(study([np.nan, 3.0, 4.0, 2.0, 2.5, 2.5])).axes
    (line,) = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
    np.testing.assert_array_equal(np.stack(line.get_data(), axis=1), [[2, 3], [4, 2], [6, 2]])


def test_an_outlier_does_not_squeeze_the_others():
    (axis,) = plots.best_so_far(study(mixed())).axes
    bottom, top = axis.get_ylim()
    assert axis.get_yscale() == "linear" and bottom < 1 and 2 < top < 3.5


def test_a_wide_range_is_logarithmic():
    (axis,) = plots.best_so_far(study(np.logspace(-6, 0, 30))).axes
    assert axis.get_yscale() == "log"
    assert axis.get_ylim()[0] < 1e-6 and axis.get_ylim()[1] > 1


def test_learning_curves_has_a_line_for_each_trial_with_several_rows():
    ids = [0, 1, 2, 3, 0, 1, 2, 0]
    steps = [3, 3, 3, 3, 9, 9, 9, 27]
    losses = [4.0, 5.0, 6.0, 7.0, 3.0, 4.5, np.nan, 2.0]
    (axis,) = draw(plots.learning_curves(study(losses, ids=ids, steps=steps))).axes
    (lines,) = [c for c in axis.collections if isinstance(c, LineCollection)]
    segments = [segment.tolist() for segment in lines.get_segments()]
    assert segments == [[[3, 5], [9, 4.5]], [[3, 4], [9, 3], [27, 2]]]
    winner = [line for line in axis.lines if to_hex(line.get_color()) == scales.WINNER and len(line.get_xdata()) == 3]
    assert [line.get_ydata().tolist() for line in winner] == [[4.0, 3.0, 2.0]]
    assert markers(axis, "*").tolist() == [[27, 2]]
    assert markers(axis, "o").tolist() == [[3, 6], [3, 7]]
    assert markers(axis, "x")[:, 0].tolist() == [9]


def test_learning_curves_need_stretches():
    with pytest.raises(ValueError, match="no trial has two finite losses"):
        plots.learning_curves(study([1.0, 2.0]))


def test_parallel_coordinates_puts_values_where_their_ticks_are():
    tree = {"a": hpo.Float(1e-4, 1.0, log=True), "b": hpo.Float(-1.0, 3.0), "c": hpo.Int(1, 1000)}
    result = study([1.0, 2.0, 3.0], tree)
    (axis,) = draw(plots.parallel_coordinates(result)).axes
    (line,) = [line for line in axis.lines if to_hex(line.get_color()) == scales.WINNER]
    native = result.space.native(result.trials.hparams, 0)
    wanted = [np.log10(native["a"]) / 4 + 1, (native["b"] + 1) / 4, (native["c"] - 1) / 999, 0.0]
    np.testing.assert_allclose(line.get_ydata(), wanted, atol=1e-6)
    ticks = {text.get_text(): text.xy for text in axis.texts if text.xy[0] == 0 and text.xy[1] < 1.0001}
    assert {"0.0001": (0, 0), "0.01": (0, 0.5), "1": (0, 1)}.items() <= {
        label: (x, round(float(y), 6)) for label, (x, y) in ticks.items()
    }.items()


def test_parallel_coordinates_marks_what_failed_and_what_is_not_live():
    losses = mixed()
    result = study(losses)
    (axis,) = draw(plots.parallel_coordinates(result)).axes
    failed, succeeded = [np.array(c.get_segments()) for c in axis.collections if isinstance(c, LineCollection)]
    assert failed.shape == (10, 7, 2) and succeeded.shape == (90, 7, 2)
    assert (failed[:, -1, 1] == 1.1).all() and (succeeded[:, -1, 1] <= 1).all()
    at = result.space.names.index("opt.sgd.momentum")
    live = np.array([result.space.native(result.trials.hparams, i)["opt"]["choice"] == "sgd" for i in range(100)])
    assert (succeeded[:, at, 1] < 0).sum() == (~live & np.isfinite(losses)).sum()
    assert sum(text.get_text() == "not live" for text in axis.texts) == 2


def test_parallel_coordinates_colours_by_rank():
    (axis,) = plots.parallel_coordinates(study([3.0, 1.0, 1e9, 2.0], {"x": hpo.Float(0, 1)})).axes
    lines = axis.collections[-1]
    order = np.array(lines.get_segments())[:, -1, 1]
    assert (np.diff(order) <= 0).all()
    blue = lines.get_colors()[:, 2]
    assert (np.diff(blue - lines.get_colors()[:, 0]) > 0).all()
    assert to_hex(lines.get_colors()[-1]) == scales.GOOD and to_hex(lines.get_colors()[0]) == scales.BAD


def test_of_many_trials_the_best_are_all_shown():
    losses = np.random.default_rng(0).permutation(3000) + 1.0
    result = study(losses, {"x": hpo.Float(0, 1), "y": hpo.Float(0, 1)})
    (axis,) = plots.parallel_coordinates(result).axes
    x = np.array(axis.collections[-1].get_segments())[:, 0, 1]
    assert len(x) == plots.MAX_LINES
    best = result.trials.hparams["x"][np.argsort(losses)[:50]]
    np.testing.assert_allclose(x[::-1][:50], best, atol=1e-6)


def test_slices_have_a_point_for_each_trial_that_is_live():
    losses = mixed()
    result = study(losses)
    figure = draw(plots.slices(result))
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_title(loc="left")}
    assert list(panels) == result.space.names
    succeeded = np.isfinite(losses)
    sgd = np.array([result.space.native(result.trials.hparams, i)["opt"]["choice"] == "sgd" for i in range(100)])
    assert len(offsets(panels["lr"])) == 90 and len(markers(panels["lr"], "x")) == 10
    assert len(offsets(panels["opt.sgd.momentum"])) == (sgd & succeeded).sum()
    assert len(offsets(panels["opt.adam.b1"])) == (~sgd & succeeded).sum()
    assert panels["lr"].get_xscale() == "log"
    points = offsets(panels["lr"])
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(result.trials.hparams["lr"][succeeded]), rtol=1e-6)
    assert [t.get_text() for t in panels["act"].get_xticklabels()] == ["relu", "gelu", "a name th…"]
    assert panels["lr"].get_ylim()[1] < 3.5


def test_slices_show_the_median_of_an_option():
    result = study(np.arange(1.0, 41.0), {"k": hpo.Categorical(("a", "b"))})
    (panel,) = [axis for axis in plots.slices(result).axes if axis.get_title(loc="left") == "k"]
    bars = [line.get_ydata()[0] for line in panel.lines if len(line.get_xdata()) == 2]
    chosen = np.asarray(result.trials.hparams["k"])
    assert bars == [np.median(result.trials.loss[chosen == k]) for k in (0, 1)]


def test_the_dims_that_matter_are_chosen():
    tree = {f"p{i}": hpo.Float(0.0, 1.0) for i in range(30)}
    result = study(np.ones(400), tree)
    values = {name: np.asarray(result.trials.hparams[name]) for name in ("p7", "p21")}
    loss = (values["p7"] - 0.5) ** 2 + values["p21"] ** 2
    result = Result(result.space, result.trials._replace(loss=loss), None, 0.0, None, {}, "trials", 1.0, 0.5)
    figure = plots.slices(result, limit=2)
    assert {a.get_title(loc="left") for a in figure.axes} - {""} == {"p7", "p21"}
    figure = plots.slices(result, parameters=["p3"])
    assert {a.get_title(loc="left") for a in figure.axes} - {""} == {"p3"}
    with pytest.raises(ValueError, match="parameters must be some of .*, got \\['p99'\\]"):
        plots.slices(result, parameters=["p99"])


@pytest.mark.parametrize("kind", ["best_so_far", "learning_curves", "parallel_coordinates"])
def test_a_plot_draws_on_given_axes(kind):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    result = study([3.0, 2.0, 1.0, 4.0], ids=[0, 0, 1, 1], steps=[1, 2, 1, 2])
    assert result.plot(kind, ax=right) is figure
    assert right.has_data() and not left.has_data()


def test_slices_draw_on_a_given_figure():
    figure = Figure()
    assert study(mixed()).plot("slices", figure=figure) is figure
    assert len(figure.axes) >= 6


def test_a_plot_leaves_the_users_style_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    study(mixed()).plot("slices")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "losses", [[0.5], [1.0] * 5, [0.0] * 3 + [np.nan], [-3.0, -1.0, -2.0], [1e-30, 1.0, 3e38], [np.nan, 1.0, np.inf]]
)
def test_odd_losses_are_drawn(losses):
    result = study(losses)
    assert plots.sensible(result) == ["best_so_far", "parallel_coordinates", "slices"]
    for kind in plots.sensible(result):
        draw(result.plot(kind))


def test_nothing_to_show():
    result = study([np.nan, np.inf])
    assert plots.sensible(result) == []
    for kind in plots.KINDS:
        with pytest.raises(ValueError, match="all 2 evaluations failed"):
            result.plot(kind)


def test_names_are_not_mathematics():
    result = study([1.0, 2.0], {"$\\frac$": hpo.Float(0, 1), "k": hpo.Categorical(("$x^$", "$y$"))})
    for kind in plots.sensible(result):
        shown = [text for text in draw(result.plot(kind)).findobj(Text) if "$" in text.get_text()]
        assert not any(text.get_parse_math() for text in shown)
        assert kind == "best_so_far" or {"$\\frac$", "$x^$"} <= {text.get_text() for text in shown}


@pytest.mark.parametrize(
    "low, high, marks",
    [
        (32, 128, [50, 70, 100]),
        (16, 256, [20, 50, 100, 200]),
        (1e-5, 1e-1, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        (2, 3, [2, 2.5, 3]),
    ],
)
def test_log_axes_have_few_round_ticks(low, high, marks):
    assert scales.round_numbers(low, high, True) == pytest.approx(marks)
