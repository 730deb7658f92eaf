"""Pictures of a result, as matplotlib figures.

Losses of a study are heavy-tailed, and the interesting ones lie close together at the bottom. So colour goes by the
rank of a loss, and an axis of losses leaves room for outliers at its edge only. What failed is a red cross.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.checks import optional
from jaxhpo.parameters import Int
from jaxhpo.records import Column, Records, columns, show, take
from jaxhpo.result import Result
from jaxhpo.views import scales
from jaxhpo.views.scales import BAD, FAILED, FAINT, GOOD, INK, PAPER, STYLE, WINNER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LINES, MAX_POINTS = 500, 5000


def best_so_far(result: Result, ax: "Axes | None" = None) -> "Figure":
    """The loss of every evaluation, and the lowest up to it.

    Args:
      result: what to show.
      ax: axes to draw on; a new figure if not given.

    Raises:
      ValueError: no trial succeeded.
      ImportError: matplotlib is not installed.

    Example:
      >>> import io, jax, jaxhpo as hpo
      >>> space = {"x": hpo.Float(-1.0, 1.0)}
      >>> result = hpo.minimize(lambda key, h: h["x"] ** 2, hpo.random(space), key=jax.random.key(0), trials=16)
      >>> figure = best_so_far(result)  # or result.plot("best_so_far")
      >>> figure.savefig(io.BytesIO())
    """
    with style():
        axis = axes(ax, 7.0, 4.0)
        records = result.trials
        scale = scales.LossScale.of(_successes(records))
        evaluations, best = result.best_so_far()
        loss, failed = records.loss.astype(float), records.failed
        outlier = ~failed & (loss > scale.high)
        shown = ~failed & ~outlier
        dots = {"linestyle": "none", "markeredgewidth": 0, "rasterized": True}
        size = float(np.clip(60 / np.sqrt(len(loss)), 1.5, 5))
        axis.plot(evaluations[shown], loss[shown], marker="o", markersize=size, color=BAD, alpha=0.6, **dots)
        if outlier.any():
            above = np.full(outlier.sum(), scale.high)
            axis.plot(evaluations[outlier], above, marker="^", markersize=size, color=BAD, alpha=0.6, **dots)
        improved = best < np.append(np.inf, best[:-1])
        corners = np.append(np.flatnonzero(improved), len(best) - 1)
        axis.step(evaluations[corners], np.minimum(best[corners], scale.high), where="post", color=GOOD, linewidth=2)
        winner = corners[-2]
        axis.plot(evaluations[winner], best[winner], marker="*", markersize=14, color=WINNER, markeredgewidth=0)
        right = winner > 0.85 * len(best)
        _label(axis, f"{best[winner]:.4g}", (evaluations[winner], best[winner]), "right" if right else "center")
        _mark_failed(axis, evaluations[failed])
        scale.apply(axis)
        axis.set_xlim(0.5 - 0.01 * len(loss), len(loss) * 1.02 + 0.5)
        axis.xaxis.set_major_locator(_integers())
        axis.set_xlabel("evaluation")
        return axis.get_figure()


def learning_curves(result: Result, ax: "Axes | None" = None) -> "Figure":
    """The loss over training steps of every trial that was evaluated several times, the best one highlighted.

    A dot is a trial that was evaluated once, a cross at the top one that failed.

    Args:
      result: what to show.
      ax: axes to draw on; a new figure if not given.

    Raises:
      ValueError: no trial was evaluated more than once.
      ImportError: matplotlib is not installed.
    """
    with style():
        from matplotlib.collections import LineCollection

        axis = axes(ax, 7.0, 4.0)
        records = result.trials
        scale = scales.LossScale.of(_successes(records))
        curves, single = _curves(records)
        if not curves:
            raise ValueError("no trial has two finite losses; learning curves need a method that trains in stretches")
        best = int(records.id[records.best(1)[0]])
        last = np.array([records.loss[rows[-1]] for rows in curves])
        paint, depth = scales.ranks(last), np.argsort(-last, kind="stable")
        segments = [
            np.stack([records.steps[rows], np.minimum(records.loss[rows], scale.high)], axis=1) for rows in curves
        ]
        axis.add_collection(
            LineCollection(
                [segments[i] for i in depth],
                colors=[scales.colour(paint[i]) for i in depth],
                linewidths=float(np.clip(20 / np.sqrt(len(curves)), 0.6, 1.5)),
                rasterized=len(curves) > 1000,
            )
        )
        for rows, segment in zip(curves, segments, strict=True):
            if records.id[rows[0]] == best:
                axis.plot(*segment.T, color=WINNER, linewidth=2.5, solid_capstyle="round", zorder=4)
                low = segment[np.argmin(segment[:, 1])]
                axis.plot(*low, marker="*", markersize=13, color=WINNER, markeredgewidth=0, zorder=5)
                _label(axis, f"trial {best}: {low[1]:.4g}", tuple(low), "right")
        height = np.minimum(records.loss[single], scale.high)
        axis.plot(records.steps[single], height, "o", color=BAD, alpha=0.5, markersize=3, markeredgewidth=0)
        axis.xaxis.set_major_locator(_integers())
        axis.autoscale_view()
        _mark_failed(axis, records.steps[records.failed])
        steps = np.unique(records.steps[records.steps > 0])
        if len(steps) and steps[-1] >= 27 * steps[0]:
            axis.set_xscale("log")
            scales.plain(axis.xaxis)
            if _apart(steps):
                axis.set_xticks(steps, [str(s) for s in steps])
                axis.minorticks_off()
        scale.apply(axis)
        axis.set_xlabel("training steps")
        return axis.get_figure()


def parallel_coordinates(
    result: Result, ax: "Axes | None" = None, *, parameters: list[str] | None = None, limit: int = 10
) -> "Figure":
    """Every trial as a line over an axis for each hyperparameter, coloured by the rank of its loss.

    Each trial is shown at its lowest loss; of many, the best and an even selection of the others. A line that runs
    along the bottom belongs to a trial in which that hyperparameter is not live, a red one to a trial that failed.

    Args:
      result: what to show.
      ax: axes to draw on; a new figure if not given.
      parameters: names of dims, out of `space.names`; if not given, those which the loss varies with most.
      limit: the most that are shown where `parameters` is not given.

    Raises:
      ValueError: no trial succeeded, or a name is not known.
      ImportError: matplotlib is not installed.
    """
    with style():
        from matplotlib.collections import LineCollection

        records = result.trials
        _successes(records)
        best = records.best()
        scale = scales.LossScale.of(records.loss[best])
        chosen = _chosen(result, parameters, limit)
        axis = axes(ax, max(5.0, 1.25 * (len(chosen) + 1)), 4.2)
        if len(best) > MAX_LINES:
            few = MAX_LINES // 10
            best = np.concatenate([best[:few], best[np.linspace(few, len(best) - 1, MAX_LINES - few, dtype=int)]])
        dead = records.dead()[:100]
        rows = np.concatenate([best, dead])
        found = [c for c in columns(result.space, take(records.hparams, rows)) if c.name in chosen]
        heights = np.stack([*(scales.height(c) for c in found), scale.height(records.loss[rows])], axis=1)
        heights[len(best) :, -1] = 1.1
        x = np.arange(len(found) + 1)
        lines = np.stack([np.broadcast_to(x, heights.shape), heights], axis=2)
        rank = scales.ranks(records.loss[best])
        crowd = float(np.clip(12 / np.sqrt(len(rows)), 0.25, 1))
        fade = {"linewidths": 0.5 + crowd}
        axis.add_collection(LineCollection(list(lines[len(best) :]), colors=FAILED, alpha=0.5 * crowd, **fade))
        colours = [scales.colour(r, crowd) for r in rank]
        axis.add_collection(LineCollection(list(lines[: len(best)][::-1]), colors=colours[::-1], **fade))
        axis.plot(x, heights[0], color=WINNER, linewidth=2.5, zorder=4, solid_joinstyle="round")
        for i, column in enumerate(found):
            _vertical(axis, i, column.name.replace(".", ".\n"), scales.ticks(column), not column.live.all())
        _vertical(axis, len(found), "loss", scale.ticks())
        if len(dead):
            beside = {"textcoords": "offset points", "color": FAILED, "fontsize": 8, "va": "center"}
            axis.annotate("failed", (len(found), 1.1), (5, 0), annotation_clip=False, **beside)
        axis.set_xlim(-0.3, len(found) + 0.5)
        axis.set_ylim(scales.BELOW - 0.1, 1.15)
        axis.set_axis_off()
        return axis.get_figure()


def slices(
    result: Result, figure: "Figure | None" = None, *, parameters: list[str] | None = None, limit: int = 12
) -> "Figure":
    """The loss against each hyperparameter, one panel each.

    Each trial is shown at its lowest loss, only where the hyperparameter is live, coloured by the training steps
    it had there, or by when it ran. A bar is the median of an option. Of many trials an even selection is shown.

    Args:
      result: what to show.
      figure: an empty figure to draw on; a new one if not given.
      parameters: names of dims, out of `space.names`; if not given, those which the loss varies with most.
      limit: the most that are shown where `parameters` is not given.

    Raises:
      ValueError: no trial succeeded, or a name is not known.
      ImportError: matplotlib is not installed.
    """
    with style():
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
        from matplotlib.figure import Figure

        records = result.trials
        _successes(records)
        best, dead = records.best(), records.dead()
        scale = scales.LossScale.of(records.loss[best])
        chosen = _chosen(result, parameters, limit)
        across = min(len(chosen), *sorted((3, 4, 5), key=lambda a: (-len(chosen) % a, abs(a - 4)))[:1])
        down = -(-len(chosen) // across)
        if figure is None:
            figure = Figure(figsize=(max(2.6 * across, 4) + 0.6, 2.4 * down + 0.3), layout="constrained")
        panels: Any = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
        if len(best) > MAX_POINTS:
            best = best[np.linspace(0, len(best) - 1, MAX_POINTS, dtype=int)]
        # Good trials on top of bad ones, late ones would hide early ones.
        rows = np.concatenate([dead, best[::-1]])
        trained = len(np.unique(records.steps[best])) > 1
        shade = records.steps[rows] if trained else records.round[rows]
        wide = trained and shade.min() > 0 and shade.max() >= 27 * shade.min()
        norm = (LogNorm if wide else Normalize)(shade.min(), max(shade.max(), shade.min() + 1))
        colours = LinearSegmentedColormap.from_list("order", [BAD, GOOD])
        succeeded = np.arange(len(rows)) >= len(dead)
        height = np.minimum(records.loss[rows].astype(float), scale.high)
        size = float(np.clip(300 / np.sqrt(len(rows)), 6, 25))
        outlier = records.loss[rows] > scale.high
        look = {"cmap": colours, "norm": norm, "s": size, "alpha": 0.75, "linewidths": 0, "rasterized": len(rows) > 500}
        found = [c for c in columns(result.space, take(records.hparams, rows)) if c.name in chosen]
        for panel, column in zip(panels, found, strict=False):
            _dressed(panel)
            x, good, bad = _abscissa(panel, column), column.live & succeeded, column.live & ~succeeded
            for mask, marker in ((good & ~outlier, "o"), (good & outlier, "^")):
                panel.scatter(x[mask], height[mask], c=shade[mask], marker=marker, **look)
            if column.options is not None:
                for level in np.unique(column.values[good]):
                    median = np.median(height[good & (column.values == level)])
                    panel.plot([level - 0.35, level + 0.35], [median, median], color=INK, linewidth=1.5)
            if good[-1]:
                panel.plot(x[-1], height[-1], marker="*", markersize=13, color=WINNER, markeredgewidth=0, zorder=5)
            _mark_failed(panel, x[bad], legend=False)
            scale.apply(panel, label=False)
            panel.set_title(column.name, loc="left", fontweight="bold")
        for panel in panels[len(found) :]:
            panel.set_axis_off()
        for panel in panels[::across]:
            panel.set_ylabel("loss")
        if shade.max() > shade.min():
            stops = np.unique(shade)
            bar: Any = figure.colorbar(
                ScalarMappable(norm, colours), ax=list(panels), shrink=0.6, fraction=0.03, pad=0.01, aspect=25
            )
            bar.set_label("training steps" if trained else "round")
            bar.outline.set_visible(False)
            _dressed(bar.ax)
            if not wide:
                bar.locator = _integers()
            elif _apart(stops):
                bar.set_ticks(stops, labels=[str(s) for s in stops])
                bar.minorticks_off()
            else:
                scales.plain(bar.ax.yaxis)
        return figure


KINDS: dict[str, Callable[..., "Figure"]] = {
    "best_so_far": best_so_far,
    "learning_curves": learning_curves,
    "parallel_coordinates": parallel_coordinates,
    "slices": slices,
}


def sensible(result: Result) -> list[str]:
    """The kinds of plot that have something to show."""
    records = result.trials
    if records.failed.all():
        return []
    return [kind for kind in KINDS if kind != "learning_curves" or _curves(records)[0]]


def style() -> Any:
    """A context in which matplotlib draws in the style of these plots."""
    return optional("matplotlib", "a plot").rc_context(STYLE)


def axes(ax: "Axes | None", width: float, height: float) -> Any:
    """`ax`, or if it is `None` the axes of a new figure, of a width and a height in inches."""
    from matplotlib.figure import Figure

    if ax is not None:
        return ax
    return _dressed(Figure(figsize=(width, height), layout="constrained").subplots())


def _dressed(axis: Any) -> Any:
    # Ticks are made when they are drawn, by then without the style.
    colours = {"color": INK, "labelcolor": INK, "grid_color": FAINT, "grid_linewidth": STYLE["grid.linewidth"]}
    axis.tick_params(which="both", labelsize=STYLE["xtick.labelsize"], **colours)
    return axis


def _successes(records: Records) -> np.ndarray:
    losses = records.loss[~records.failed]
    if not len(losses):
        raise ValueError(f"there is nothing to show: all {len(records.loss)} evaluations failed")
    return losses


def _label(axis: Any, text: str, where: tuple[float, float], ha: str) -> None:
    style = {"color": WINNER, "fontweight": "bold", "ha": ha, "va": "top"}
    axis.annotate(text, where, (0, -9), textcoords="offset points", **style)


def _apart(steps: np.ndarray) -> bool:
    """Whether there is room on a log axis for a tick at each."""
    return len(steps) <= 8 and bool((steps[1:] >= 1.5 * steps[:-1]).all())


def _integers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=True, min_n_ticks=1)


def _mark_failed(axis: Any, x: np.ndarray, legend: bool = True) -> None:
    if len(x):
        size = float(np.clip(60 / np.sqrt(len(x)), 2.5, 5))
        at_top = {"transform": axis.get_xaxis_transform(), "clip_on": False, "rasterized": len(x) > 500}
        axis.plot(x, np.full(len(x), 0.97), "x", color=FAILED, markersize=size, label=f"{len(x)} failed", **at_top)
        if legend:
            axis.legend(loc="upper right", bbox_to_anchor=(1, 1.1), handletextpad=0.1, borderaxespad=0)


def _curves(records: Records) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows, in the order told, of each trial that has several finite losses; and the rows of those that have one."""
    order = np.argsort(records.id, kind="stable")
    order = order[~records.failed[order]]
    _, starts = np.unique(records.id[order], return_index=True)
    trials = np.split(order, starts[1:])
    return [rows for rows in trials if len(rows) > 1], np.array([rows[0] for rows in trials if len(rows) == 1], int)


def _chosen(result: Result, parameters: list[str] | None, limit: int) -> set[str]:
    names = result.space.names
    if parameters is not None:
        unknown = [name for name in parameters if name not in names]
        if unknown or not parameters:
            raise ValueError(f"parameters must be some of {names}, got {parameters}")
        return set(parameters)
    if len(names) <= limit:
        return set(names)
    best = result.trials.best()
    found = columns(result.space, take(result.trials.hparams, best))
    strength = np.array([scales.influence(c, scales.ranks(result.trials.loss[best])) for c in found])
    return {names[i] for i in np.argsort(-strength, kind="stable")[:limit]}


def _vertical(axis: Any, x: float, name: str, ticks: list[tuple[float, str]], conditional: bool = False) -> None:
    """One of the parallel axes, its labels legible on top of the lines."""
    from matplotlib.markers import TICKLEFT
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground=PAPER)]
    axis.plot([x, x], [0, 1], color=INK, linewidth=0.9, zorder=5)
    axis.plot([x] * len(ticks), [height for height, _ in ticks], marker=TICKLEFT, color=INK, linestyle="none", zorder=5)
    beside = {"textcoords": "offset points", "fontsize": 8, "ha": "right", "va": "center"}
    for height, label in ticks:
        axis.annotate(label, (x, height), (-7, 0), zorder=6, path_effects=halo, **beside)
    if conditional:
        axis.plot([x, x], [scales.BELOW, 0], color=INK, linewidth=0.9, linestyle=":", zorder=5)
        axis.text(
            x, scales.BELOW - 0.02, "not live", fontsize=8, ha="center", va="top", style="italic", path_effects=halo
        )
    axis.annotate(name, (x, 1), (x, 1.16), ha="center", va="bottom", fontweight="bold", annotation_clip=False)


def _abscissa(panel: Any, column: Column) -> np.ndarray:
    """Where the points of a panel go; sets up its x axis."""
    if column.options is not None:
        count = len(column.options)
        some = np.unique(np.linspace(0, count - 1, min(count, 6), dtype=int))
        labels = [scales.short(show(column.options[i]), 10) for i in some.tolist()]
        crowded = sum(len(label) for label in labels) > 22
        panel.set_xticks(some, labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
        panel.set_xlim(-0.5, count - 0.5)
    else:
        low, high = scales.bounds(column)
        marks = scales.round_numbers(low, high, scales.is_log(column), integer=isinstance(column.parameter, Int))
        if scales.is_log(column):
            panel.set_xscale("log")
            panel.minorticks_off()
        panel.set_xticks(marks, [scales.number(v) for v in marks])
        f, inverse = (np.log, np.exp) if scales.is_log(column) else (np.asarray, np.asarray)
        margin = max(0.05 * (f(high) - f(low)), np.abs(scales.spread(column)).max(initial=0) * 1.5)
        panel.set_xlim(inverse(f(low) - margin), inverse(f(high) + margin))
    return column.values + scales.spread(column)
