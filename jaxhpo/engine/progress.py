"""How far a study is, for callbacks and on the terminal."""

import math
import sys
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from jaxhpo.engine.budget import Budget, Tally


class Report(NamedTuple):
    """What a callback sees after each chunk of rounds."""

    trials: int
    """started so far"""
    steps: int
    """training steps of all trials together"""
    rounds: int
    """asks told so far"""
    best_loss: float
    """lowest finite loss; inf if there is none"""
    best_hparams: Any
    """native Python values of the trial that had it; `None` if there is none"""
    seconds: float
    """since the study began, or was resumed"""


def share(budget: Budget, tally: Tally, seconds: float) -> float:
    """Which part of the budget is used, in [0, 1]."""
    parts = [
        tally.trials / budget.trials,
        tally.steps / budget.steps,
        tally.rounds / budget.rounds,
        seconds / budget.time_limit,
    ]
    return min(1.0, max(parts))


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['left']} left", style="cyan")


class Bar:
    """A progress bar, or nothing.

    Args:
      name: of the method.
      show: `None` shows it on a terminal only.
    """

    def __init__(self, name: str, show: bool | None):
        console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        if console.is_terminal if show is None else show:
            text = TextColumn("{task.fields[facts]}")
            self.bar = Progress(SpinnerColumn(), TextColumn(name), BarColumn(24), text, _Left(), console=console)
            self.task = self.bar.add_task(name, total=1.0, facts="starting", left="?")

    def __enter__(self) -> "Bar":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, used: float, report: Report, speed: float) -> None:
        """Draws the bar: the share of the budget that is used, and steps (or trials) a second."""
        if self.bar:
            unit = "steps/s" if report.steps else "trials/s"
            facts = f"{report.trials} trials, best {report.best_loss:.4g}, {speed:,.0f} {unit}"
            self.draw(used, facts, report.seconds)

    def draw(self, used: float, facts: str, seconds: float) -> None:
        """Draws the bar: the share of the work that is done, what to say of it, and the seconds that it took."""
        if self.bar:
            left = seconds * (1 - used) / used if used else math.inf
            self.bar.update(self.task, completed=used, facts=facts, left=duration(left))
