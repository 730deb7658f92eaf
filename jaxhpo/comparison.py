"""What `compare` gives back: every evaluation of every repeat of every method, and tables, frames and plots of them."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from rich.text import Text

from jaxhpo.checks import one_of, optional, real
from jaxhpo.records import Records
from jaxhpo.space import Space
from jaxhpo.views.table import TextTable

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

MARKS = 100
BOOTSTRAPS = 1000
LEVEL = 0.9
SHARED = "wall-clock times; the repeats of a method run side by side and share them"


class Runs(NamedTuple):
    """One method on one problem, several times."""

    space: Space
    trials: tuple[Records, ...]
    """every evaluation, of each repeat"""
    cost: tuple[np.ndarray, ...]
    """f64[n], of each repeat: what it has spent after each evaluation"""
    lanes_used: float
    """share in [0, 1] of the lanes that had a trial, each weighed by the steps that it ran; outside JAX, of the rows of
    asks"""
    ask_seconds: float
    """of the method itself for each ask of one repeat, telling included; outside JAX, where nothing is pending"""
    trial_seconds: float
    """of everything for each trial, without compiling; outside JAX with it"""
    seconds: float
    """in all, without compiling; outside JAX with it"""
    compile_seconds: float
    errors: tuple[dict[int, str], ...]
    """what went wrong outside JAX, by trial, of each repeat"""


class Ranks(NamedTuple):
    """Mean ranks of methods, 1 is best, in the order of `Comparison.methods`."""

    mean: np.ndarray
    """f64[methods]"""
    low: np.ndarray
    """f64[methods], the lower end of the bootstrap interval; of a single repeat it says nothing"""
    high: np.ndarray
    """f64[methods], its upper end"""
    first: np.ndarray
    """f64[methods], the share of bootstraps in which the method's mean rank is the lowest"""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Methods side by side, at equal cost.

    A mean rank is that of one repeat of a method among one of each other method, drawn at random: 1 plus the chance of
    each other one to be lower, and half of that to be equal; the mean over problems. Its interval is that of 90% of
    1,000 bootstraps over repeats.

    Args:
      runs: by problem and by method.
      budget: by problem, what each repeat could spend.
      unit: by problem, what costs count: "training steps" or "trials".

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = {"x": hpo.Float(-5.0, 5.0), "y": hpo.Float(-5.0, 5.0)}
      >>> methods = [hpo.random(space, batch=8), hpo.cma_es(space, batch=8)]
      >>> comparison = hpo.compare(
      ...     lambda key, h: h["x"] ** 2 + h["y"] ** 2, methods, key=jax.random.key(0), trials=160, repeats=5)
      >>> comparison.methods, comparison.repeats, comparison.ranks().mean.round(2).tolist()
      (('random', 'cma_es'), 5, [2.0, 1.0])
      >>> cost, best = comparison.best_so_far("cma_es")
      >>> float(cost[-1]), best.shape
      (160.0, (5, 100))
    """

    runs: dict[str, dict[str, Runs]]
    budget: dict[str, float]
    unit: dict[str, str]

    @property
    def problems(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.runs)

    @property
    def methods(self) -> tuple[str, ...]:
        """Their names, in the order given."""
        return tuple(next(iter(self.runs.values())))

    @property
    def repeats(self) -> int:
        """How many times each method ran on each problem."""
        return len(next(iter(next(iter(self.runs.values())).values())).trials)

    def __repr__(self) -> str:
        return f"Comparison({len(self.methods)} methods, {len(self.problems)} problems, repeats={self.repeats})"

    def __or__(self, other: "Comparison") -> "Comparison":
        """Both as one, of the problems of either; the same methods and as many repeats of each.

        Raises:
          ValueError: the methods or the repeats differ, or both have a problem of the same name.
        """
        if set(self.methods) != set(other.methods) or self.repeats != other.repeats:
            raise ValueError(
                f"comparisons to be joined must have the same methods and repeats, got {self.methods} with "
                f"{self.repeats} and {other.methods} with {other.repeats}"
            )
        both = [name for name in other.problems if name in self.problems]
        if both:
            raise ValueError(f"both comparisons have a problem {both[0]!r}; give each a name of its own")
        ordered = {name: {m: runs[m] for m in self.methods} for name, runs in other.runs.items()}
        return Comparison(self.runs | ordered, self.budget | other.budget, self.unit | other.unit)

    def best_so_far(self, method: str, problem: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The lowest loss of a method up to each cost.

        Args:
          method: its name.
          problem: its name; the only one if not given.

        Returns:
          cost: f64[100], evenly up to the budget.
          best: f64[repeats, 100], the lowest finite loss of what was spent by then, +inf as long as there is none.
        """
        problem = self._problem(problem)
        one_of("method", method, self.methods)
        cost = self.budget[problem] * np.arange(1, MARKS + 1) / MARKS
        return cost, self._curves[problem][self.methods.index(method)]

    @functools.cached_property
    def _curves(self) -> dict[str, np.ndarray]:
        """f64[methods, repeats, MARKS] of each problem."""
        return {
            problem: np.stack([_curves_of(methods[m], self.budget[problem]) for m in self.methods])
            for problem, methods in self.runs.items()
        }

    def ranks(self, share: float = 1.0, problem: str | None = None) -> Ranks:
        """Mean ranks by the lowest loss after a share of the budget.

        Args:
          share: of the budget, in [0.01, 1].
          problem: its name; the mean over all of them if not given.
        """
        return ranks(self._after(share, problem))

    def _after(self, share: float = 1.0, problem: str | None = None) -> np.ndarray:
        """f64[problems, methods, repeats]: the lowest losses after a share of the budget."""
        mark = max(math.ceil(real("share", share, 1 / MARKS, 1.0) * MARKS - 1e-9), 1) - 1
        problems = self.problems if problem is None else (self._problem(problem),)
        return np.stack([self._curves[name][:, :, mark] for name in problems])

    def best(self, problem: str | None = None) -> tuple[str, Any, float]:
        """The method, the hyperparameters (native Python values) and the loss of the best trial within the budget.

        Raises:
          ValueError: no trial had a finite loss.
        """
        problem = self._problem(problem)
        found = []
        for name, runs in self.runs[problem].items():
            for records, cost in zip(runs.trials, runs.cost, strict=True):
                losses = np.where(records.counts & _affordable(cost, self.budget[problem]), records.loss, np.inf)
                row = int(np.argmin(losses)) if len(losses) else 0
                found += [(float(losses[row]), name, runs.space, records, row)] if np.isfinite(losses).any() else []
        if not found:
            raise ValueError(f"no trial of any method on {problem!r} had a finite loss within the budget")
        loss, name, space, records, row = min(found, key=lambda item: item[0])
        return name, space.native(records.hparams, row), loss

    def _problem(self, name: str | None) -> str:
        if name is None and len(self.runs) > 1:
            raise ValueError(f"problem must be one of {list(self.problems)}, got None")
        return self.problems[0] if name is None else one_of("problem", name, self.problems)

    def order(self, problem: str | None = None) -> list[str]:
        """The methods by mean rank at the end of the budget, best first; on one problem, if it is given."""
        return [self.methods[i] for i in np.argsort(_mean_ranks(self._after(problem=problem)), kind="stable")]

    def spent(self, method: str) -> float:
        """The share of the budget that a method spent before it ended by itself, 1 if it did not: the mean of all."""
        shares = [
            min(float(cost[-1]) / self.budget[problem], 1.0) if len(cost) else 0.0
            for problem in self.problems
            for cost in self.runs[problem][method].cost
        ]
        return float(np.mean(shares))

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of `table` as text."""
        found = self.ranks()
        header = ["method", "mean rank", f"{LEVEL:.0%} interval"]
        for problem in self.problems:
            of = f" of {problem}" if len(self.problems) > 1 else ""
            header += [f"best loss{of}", "quartiles"]
        body = []
        for name in self.order():
            i = self.methods.index(name)
            interval = f"{found.low[i]:.1f}–{found.high[i]:.1f}" if self.repeats > 1 else "–"
            row = [name, f"{found.mean[i]:.2f}", interval]
            for problem in self.problems:
                last = self._curves[problem][i, :, -1]
                low, median, high = quantiles(last, (0.25, 0.5, 0.75))
                begun = any(_affordable(cost, self.budget[problem]).any() for cost in self.runs[problem][name].cost)
                row += [_loss(median, begun), f"{_loss(low, begun)}–{_loss(high, begun)}"]
            body.append([*row, f"{self.spent(name):.0%}", f"{self._mean('lanes_used', name):.0%}"])
        return [*header, "spent", "lanes"], body

    def table(self) -> TextTable:
        """Methods by mean rank, best first: a function of the key alone, without a time.

        Returns:
          A `rich` table: mean rank and its interval, median and quartiles of the lowest loss at the end of the budget
          for each problem ("failed" where trials were and none had a finite loss, "none" where the budget did not
          reach for one), the share of the budget that was spent, and that of the lanes used.
        """
        return _table(*self.rows(), self.note())

    def note(self) -> str:
        """What was equal for all: budgets and repeats."""
        budgets = {f"{self.budget[name]:,.0f} {self.unit[name]}" for name in self.problems}
        spent = next(iter(budgets)) if len(budgets) == 1 else "as many training steps or trials"
        return f"up to {spent} for each of {self.repeats} repeats of each method; lower losses are better"

    def time_rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of `times` as text."""
        header = ["method", "ms per ask", "ms per trial", "compile s", "run s"]
        body = [
            [
                name,
                f"{1e3 * self._mean('ask_seconds', name):.3g}",
                f"{1e3 * self._mean('trial_seconds', name):.3g}",
                f"{self._sum('compile_seconds', name):.1f}",
                f"{self._sum('seconds', name):.1f}",
            ]
            for name in self.order()
        ]
        return header, body

    def times(self) -> TextTable:
        """How long it took, in the order of `table`.

        Returns:
          A `rich` table: milliseconds of the method itself for an ask and of everything for a trial, where the repeats
          of a method run side by side and share the time; seconds in all to compile and to run.
        """
        return _table(*self.time_rows(), SHARED)

    def _mean(self, field: str, method: str) -> float:
        return float(np.mean([getattr(runs[method], field) for runs in self.runs.values()]))

    def _sum(self, field: str, method: str) -> float:
        return sum(getattr(runs[method], field) for runs in self.runs.values())

    def to_dataframe(self) -> "pandas.DataFrame":
        """Best-so-far curves as a pandas frame, a row for each problem, method, repeat and cost.

        Returns:
          A frame with the columns `problem`, `method`, `repeat`, `cost` and `best`, +inf where there is none yet.

        Raises:
          ImportError: pandas is not installed.
        """
        pandas = optional("pandas", "to_dataframe")
        shape = len(self.methods), self.repeats, MARKS
        method, repeat, mark = (x.ravel() for x in np.indices(shape))
        parts = [
            pandas.DataFrame(
                {
                    "problem": problem,
                    "method": np.asarray(self.methods)[method],
                    "repeat": repeat,
                    "cost": self.budget[problem] * (mark + 1) / MARKS,
                    "best": self._curves[problem].ravel(),
                }
            )
            for problem in self.problems
        ]
        return pandas.concat(parts, ignore_index=True)

    def plot(self, kind: Literal["best_so_far", "ranks", "heat_map"] = "best_so_far", **options: Any) -> "Figure":
        """A plot from `jaxhpo.views.charts`, as a matplotlib figure.

        Args:
          kind: name of the function in `jaxhpo.views.charts`.
          **options: its other arguments.

        Raises:
          ValueError: there is no such plot.
          ImportError: matplotlib is not installed.
        """
        from jaxhpo.views import charts

        return charts.KINDS[one_of("kind", kind, tuple(charts.KINDS))](self, **options)

    def report(self, path: str | Path, *, title: str | None = None, facts: dict[str, str] | None = None) -> Path:
        """Writes all of it into one HTML file, which needs nothing else; see `comparison_report`."""
        from jaxhpo.views.report import comparison_report

        return comparison_report(self, path, title=title, facts=facts)


def _curves_of(runs: Runs, budget: float) -> np.ndarray:
    """f64[repeats, MARKS]: the lowest loss up to each mark of the budget."""
    marks = budget * np.arange(1, MARKS + 1) / MARKS
    curves = []
    for records, cost in zip(runs.trials, runs.cost, strict=True):
        losses = np.where(records.counts, records.loss.astype(float), np.inf)
        best = np.concatenate([[np.inf], np.minimum.accumulate(losses)])
        curves.append(best[[np.count_nonzero(_affordable(cost, mark)) for mark in marks]])
    return np.stack(curves)


def _affordable(cost: np.ndarray, budget: float) -> np.ndarray:
    """bool[n]: which evaluations a budget reached for."""
    return cost <= budget * (1 + 1e-12)


def _beaten(losses: np.ndarray) -> np.ndarray:
    """f64[methods, repeats, methods, repeats]: 1 where the second loss is lower, 1/2 where they are equal.

    A method is not compared with its own repeats.
    """
    mine, others = losses[:, :, None, None], losses[None, None]
    return ((others < mine) + 0.5 * (others == mine)) * (1 - np.eye(len(losses)))[:, None, :, None]


def _mean_ranks(best: np.ndarray) -> np.ndarray:
    """f64[methods], of losses f64[problems, methods, repeats]."""
    return np.mean([1 + _beaten(losses).mean((1, 3)).sum(1) for losses in best], axis=0)


def ranks(best: np.ndarray) -> Ranks:
    """Mean ranks with bootstrap intervals.

    Args:
      best: f64[problems, methods, repeats], losses.
    """
    problems, methods, repeats = best.shape
    rng, drawn = np.random.default_rng(0), np.zeros((BOOTSTRAPS, methods))
    for losses in best:
        table = _beaten(losses).reshape(methods * repeats, methods * repeats)
        weight = rng.multinomial(repeats, np.full(repeats, 1 / repeats), (BOOTSTRAPS, methods)) / repeats
        weight = weight.reshape(BOOTSTRAPS, -1)
        drawn += (1 + (weight * (weight @ table.T)).reshape(BOOTSTRAPS, methods, repeats).sum(-1)) / problems
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    lowest = np.isclose(drawn, drawn.min(1, keepdims=True))
    return Ranks(_mean_ranks(best), low, high, (lowest / lowest.sum(1, keepdims=True)).mean(0))


def quantiles(losses: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """f64[shares, ...] of losses f64[repeats, ...]; between a number and +inf there is no middle, so that is +inf."""
    upper = np.quantile(losses, shares, axis=0, method="higher")
    finite = np.where(np.isfinite(losses), losses, np.finfo(float).max / 4)
    return np.where(np.isfinite(upper), np.quantile(finite, shares, axis=0), np.inf)


def _loss(value: float, begun: bool) -> str:
    if math.isfinite(value):
        return f"{value:.3g}"
    return "failed" if begun else "none"


def _table(header: list[str], body: list[list[str]], note: str) -> TextTable:
    table = TextTable(note)
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left")
    for i, row in enumerate(body):
        table.add_row(*(Text(cell) for cell in row), style="bold green" if i == 0 else None)
    return table
