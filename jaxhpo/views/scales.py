"""How a picture looks: colours and type, and losses and hyperparameters as positions and ticks."""

from typing import Any, NamedTuple

import numpy as np

from jaxhpo.parameters import Int
from jaxhpo.records import Column, show

INK, FAINT, PAPER = "#2b303b", "#c8cdd5", "#fefefe"  # no other artist has these colours: a report replaces them
GOOD, BAD = "#2375d6", "#9aa3af"
WINNER, FAILED = "#e8730c", "#dc3550"

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.parse_math": False,
}


class LossScale(NamedTuple):
    """How an axis of losses is laid out."""

    low: float
    high: float  # outliers are drawn here
    log: bool

    @classmethod
    def of(cls, losses: np.ndarray) -> "LossScale":
        low, most, top = (float(q) for q in np.quantile(losses.astype(float), [0, 0.8, 1]))
        log = low > 0 and most > 10 * low
        reach = most * (most / low) if log else most + (most - low)
        return cls(low, min(top, reach) if most > low else top, log)

    def height(self, losses: np.ndarray) -> np.ndarray:
        """Losses on an axis from 0 to 1."""
        f = np.log if self.log else np.asarray
        with np.errstate(invalid="ignore"):
            clipped = np.clip(losses.astype(float), self.low, self.high)
        return (f(clipped) - f(self.low)) / max(f(self.high) - f(self.low), 1e-30)

    def ticks(self) -> list[tuple[float, str]]:
        marks = [
            (float(self.height(np.array([v]))[0]), number(v)) for v in round_numbers(self.low, self.high, self.log)
        ]
        return marks or [(0.0, number(self.low))]

    def apply(self, axis: Any, label: bool = True) -> None:
        f, inverse = (np.log, np.exp) if self.log else (np.asarray, np.asarray)
        pad = (f(self.high) - f(self.low)) or abs(self.low) or 1.0
        if self.log:
            axis.set_yscale("log")
            plain(axis.yaxis)
        axis.set_ylim(inverse(f(self.low) - 0.12 * pad), inverse(f(self.high) + 0.12 * pad))
        axis.grid(False, axis="x")
        if label:
            axis.set_ylabel("loss")


def plain(axis: Any) -> None:
    """Numbers on a log axis as they are written elsewhere, without mathematics: a name may have a dollar sign in it."""
    axis.set_major_formatter(lambda value, _: number(value))
    axis.set_minor_formatter(lambda value, _: "")


def ranks(losses: np.ndarray) -> np.ndarray:
    """0 for the best to 1 for the worst."""
    order = np.argsort(np.argsort(losses, kind="stable"), kind="stable")
    return order / max(len(losses) - 1, 1)


def colour(rank: float, crowd: float = 1.0) -> tuple[float, ...]:
    """Of a loss by its rank in [0, 1], paler the larger the crowd."""
    from matplotlib.colors import to_rgb

    blend = float(np.sqrt(rank))
    rgb = (1 - blend) * np.array(to_rgb(GOOD)) + blend * np.array(to_rgb(BAD))
    return (*rgb.tolist(), crowd * (0.9 - 0.6 * blend))


def influence(column: Column, rank: np.ndarray, bins: int = 8) -> float:
    """The correlation ratio: the share of the variance of `rank` that lies between the bins of a dim."""
    values, rank = column.values[column.live], rank[column.live]
    if len(values) < 2:
        return 0.0
    cuts = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])
    group = values if column.options is not None else np.searchsorted(cuts, values)
    _, group = np.unique(group, return_inverse=True)
    count = np.bincount(group)
    mean = np.bincount(group, rank) / count
    between = np.sum(count * (mean - rank.mean()) ** 2)
    return float(between / len(column.live)) if len(count) > 1 else 0.0


BELOW = -0.13


def is_log(column: Column) -> bool:
    """Whether the axis of a dim is logarithmic."""
    return bool(getattr(column.parameter, "log", False))


def height(column: Column) -> np.ndarray:
    """Where on an axis from 0 to 1, or below it where not live."""
    return np.where(column.live, np.clip(place(column, column.values + spread(column)), 0, 1), BELOW)


def bounds(column: Column) -> tuple[float, float]:
    """The ends of the axis of a number."""
    return float(column.parameter.low), float(column.parameter.high)  # type: ignore[attr-defined]


def spread(column: Column) -> np.ndarray:
    """Small shifts that part the trials at one level, in levels; none where levels are many."""
    if column.options is None and not (isinstance(column.parameter, Int) and column.parameter.levels <= 20):
        return np.zeros(len(column.values))
    if is_log(column):
        return np.zeros(len(column.values))
    step = getattr(column.parameter, "step", 1)
    return step * 0.36 * ((np.arange(len(column.values)) * 0.618034) % 1 - 0.5)


def place(column: Column, values: np.ndarray) -> np.ndarray:
    """Where on an axis from 0 to 1 the values of a dim are."""
    if column.options is not None:
        return (values + 0.5) / len(column.options)
    f = np.log if is_log(column) else np.asarray
    low, high = bounds(column)
    return (f(values) - f(low)) / (f(high) - f(low))


def ticks(column: Column) -> list[tuple[float, str]]:
    """Places from 0 to 1 and labels of a dim's axis."""
    if column.options is not None:
        count = len(column.options)
        some = np.unique(np.linspace(0, count - 1, min(count, 10), dtype=int))
        return [((i + 0.5) / count, short(show(column.options[i]))) for i in some.tolist()]
    marks = round_numbers(*bounds(column), is_log(column), integer=isinstance(column.parameter, Int))
    return [(float(place(column, np.array(v))), number(v)) for v in marks]


def round_numbers(low: float, high: float, log: bool, integer: bool = False) -> list[float]:
    """A few numbers in [low, high] that are easy to read."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    slack = 1e-9 * (high - low)
    inside = lambda marks: [float(v) for v in marks if low - slack <= v <= high + slack]  # noqa: E731
    if not log:
        return inside(MaxNLocator(5, integer=integer, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    finest_first = np.arange(1.0, 10.0, 0.5), (1.0, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)
    found = [inside(LogLocator(subs=tuple(subs), numticks=7).tick_values(low, high)) for subs in finest_first]
    return next((marks for marks in found if len(marks) <= 5), found[-1])


def number(value: float) -> str:
    """A number as a label."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def short(text: str, width: int = 14) -> str:
    """Text cut to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"
