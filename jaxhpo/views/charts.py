"""Pictures of a comparison, as matplotlib figures.

Of a dozen curves an eye follows a few. So the methods in front have a colour, a band and their name in bold; the others
are thin grey lines that are named all the same.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.comparison import Comparison, quantiles
from jaxhpo.views import scales
from jaxhpo.views.plots import axes, style
from jaxhpo.views.scales import BAD, GOOD, INK, WINNER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (WINNER, GOOD, "#1a9e77", "#8a4fbf", "#b3476b", "#7a7d12")
SHARES = (0.25, 0.5, 0.75, 1.0)


def best_so_far(
    comparison: Comparison, problem: str | None = None, ax: "Axes | None" = None, *, highlight: int = 4
) -> "Figure":
    """The median over repeats of the lowest loss so far, over cost; of the methods in front with its quartiles.

    Args:
      comparison: what to show.
      problem: its name; the only one if not given.
      ax: axes to draw on; a new figure if not given.
      highlight: how many methods are in colour, those with the lowest mean rank on the problem.

    Raises:
      ValueError: no method had a finite loss.
      ImportError: matplotlib is not installed.
    """
    problem = comparison.problems[0] if problem is None and len(comparison.problems) == 1 else problem
    curves = {name: comparison.best_so_far(name, problem) for name in comparison.methods}
    quartiles = {name: quantiles(best, (0.25, 0.5, 0.75)) for name, (_, best) in curves.items()}
    finite = np.concatenate([m[np.isfinite(m)] for _, m, _ in quartiles.values()])
    if not len(finite):
        raise ValueError(f"there is nothing to show: no method on {problem!r} has a finite loss in the median")
    names = comparison.order(problem)
    with style():
        axis = axes(ax, 9.0, 5.0)
        scale = scales.LossScale.of(finite)
        ends = {}
        for place, name in reversed(list(enumerate(names))):
            cost, (low, median, high) = curves[name][0], (_clipped(q, scale) for q in quartiles[name])
            look = _look(place, highlight)
            if place < highlight:
                axis.fill_between(cost, low, high, step="post", color=look["color"], alpha=0.13, linewidth=0)
            axis.step(cost, median, where="post", **look)
            if np.isfinite(median[-1]):
                ends[name] = float(median[-1])
        scale.apply(axis)
        _name_ends(axis, ends, names, highlight, curves[names[0]][0][-1])
        axis.set_xlabel(comparison.unit[str(problem)])
        axis.set_xlim(0, curves[names[0]][0][-1])
        return axis.get_figure()


def rank_curves(
    comparison: Comparison, problem: str | None = None, ax: "Axes | None" = None, *, highlight: int = 4
) -> "Figure":
    """Mean ranks over the share of the budget that is spent; of the methods in front with their bootstrap intervals.

    Args:
      comparison: what to show.
      problem: its name; the mean over all of them if not given.
      ax: axes to draw on; a new figure if not given.
      highlight: how many methods are in colour, those with the lowest mean rank at the end.

    Raises:
      ImportError: matplotlib is not installed.
    """
    shares = np.linspace(0.04, 1.0, 25)
    found = [comparison.ranks(share, problem) for share in shares]
    mean, low, high = (np.stack([getattr(r, field) for r in found]) for field in ("mean", "low", "high"))
    order = np.argsort(mean[-1], kind="stable")
    names = [comparison.methods[i] for i in order]
    with style():
        axis = axes(ax, 9.0, 5.0)
        for place, i in reversed(list(enumerate(order))):
            look = _look(place, highlight)
            if place < highlight:
                axis.fill_between(100 * shares, low[:, i], high[:, i], color=look["color"], alpha=0.13, linewidth=0)
            axis.plot(100 * shares, mean[:, i], **look)
        axis.set_ylim(len(names) + 0.5, 0.5)
        axis.set_xlim(100 * shares[0], 100)
        _name_ends(axis, dict(zip(names, mean[-1][order].tolist(), strict=True)), names, highlight, 100.0)
        axis.set_xlabel("% of the budget")
        axis.set_ylabel("mean rank")
        return axis.get_figure()


def heat_map(comparison: Comparison, ax: "Axes | None" = None) -> "Figure":
    """Mean ranks at the end of the budget, methods by problems; of a single problem, methods by shares of the budget.

    Args:
      comparison: what to show.
      ax: axes to draw on; a new figure if not given.

    Raises:
      ImportError: matplotlib is not installed.
    """
    if len(comparison.problems) > 1:
        columns = list(comparison.problems)
        values = np.stack([comparison.ranks(problem=name).mean for name in columns], axis=1)
    else:
        columns = [f"{share:.0%}" for share in SHARES]
        values = np.stack([comparison.ranks(share).mean for share in SHARES], axis=1)
    names = comparison.order()
    values = values[[comparison.methods.index(name) for name in names]]
    with style():
        from matplotlib.colors import LinearSegmentedColormap

        axis = axes(ax, 2.6 + 1.1 * len(columns), 0.9 + 0.34 * len(names))
        colours = LinearSegmentedColormap.from_list("ranks", [GOOD, "#c9d6e8", "#ececec"])
        axis.imshow(values, cmap=colours, vmin=1, vmax=max(len(names), 2), aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            strong = value < 1 + 0.25 * (len(names) - 1)
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if strong else "#3a3f4a")
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(len(columns)), [scales.short(name) for name in columns])
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        return axis.get_figure()


def sensible(comparison: Comparison) -> list[str]:
    """The problems on which some method had a finite loss in the median."""
    last = lambda p: [quantiles(comparison.best_so_far(m, p)[1][:, -1], (0.5,)) for m in comparison.methods]  # noqa: E731
    return [problem for problem in comparison.problems if np.isfinite(last(problem)).any()]


KINDS: dict[str, Callable[..., "Figure"]] = {"best_so_far": best_so_far, "ranks": rank_curves, "heat_map": heat_map}


def _look(place: int, highlight: int) -> dict[str, Any]:
    if place < highlight:
        return {"color": COLOURS[place % len(COLOURS)], "linewidth": 2.2 if place == 0 else 1.7, "zorder": 5}
    return {"color": BAD, "linewidth": 0.8, "zorder": 2}


def _clipped(losses: np.ndarray, scale: scales.LossScale) -> np.ndarray:
    """Losses beyond the axis lie on its edge; where there is none, there is no line."""
    return np.where(np.isfinite(losses), np.minimum(losses, scale.high), np.nan)


def _name_ends(axis: Any, ends: dict[str, float], names: list[str], highlight: int, x: float) -> None:
    """The name of each curve where it ends, moved apart where they would lie on each other."""
    heights = np.array(
        [axis.transAxes.inverted().transform(axis.transData.transform((x, y)))[1] for y in ends.values()]
    )
    for name, height in zip(ends, _apart(heights, min(0.048, 1 / max(len(ends) - 1, 1))), strict=True):
        is_bold = names.index(name) < highlight
        axis.annotate(
            name,
            (1.01, height),
            xycoords="axes fraction",
            va="center",
            color=_look(names.index(name), highlight)["color"] if is_bold else INK,
            fontweight="bold" if is_bold else "normal",
            fontsize=9,
            annotation_clip=False,
        )


def _apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """The places in [0, 1] nearest to `heights` that are in the same order and at least `gap` apart."""
    order = np.argsort(heights, kind="stable")
    shift = gap * np.arange(len(heights))
    groups: list[list[float]] = []
    # Least squares under an order: neighbours that would change it share their mean.
    for wanted in (heights[order] - shift).tolist():
        groups.append([wanted])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = np.array([np.mean(group) for group in groups for _ in group])
    out = np.empty(len(heights))
    out[order] = np.clip(placed, 0, 1 - shift[-1]) + shift
    return out
