"""What `minimize` gives back: every evaluation as arrays, the best of them, and tables, frames and plots of both."""

import collections
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.text import Text

from jaxhpo.checks import optional
from jaxhpo.parameters import Int
from jaxhpo.records import Column, Records, columns, take, texts
from jaxhpo.space import Space
from jaxhpo.views.table import TextTable

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from jaxhpo.lineage import Schedule

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a study found.

    Args:
      space: what was searched.
      trials: every evaluation, as arrays.
      best_hparams: hyperparameters of the best trial, as native Python values; `None` if every trial failed.
      best_loss: the lowest finite loss told.
      best_state: the training state that had it, `None` where trials keep none.
      errors: what went wrong, by trial; a trial whose loss was not finite has no message.
      stopped: why the study ended: "trials", "steps", "rounds", "method", "target", "time_limit", "patience" or
        "callback".
      seconds: wall-clock time in all.
      compile_seconds: the part of it that went to tracing and compiling.
      method_state: the method's last state, for what it has learned beside the best trial, such as the policy of a
        `controller`.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = {"lr": hpo.Float(0.0, 1.0), "net": hpo.Categorical(("mlp", "cnn"))}
      >>> def objective(key, hparams):
      ...     return jax.numpy.log(hparams["lr"]) ** 2 + hparams["net"]  # no logarithm of 0: that trial fails
      >>> result = hpo.minimize(objective, hpo.grid(space, points=3), key=jax.random.key(0))
      >>> result.best_hparams, result.best_loss, result.stopped
      ({'lr': 1.0, 'net': 'mlp'}, 0.0, 'method')
      >>> print(result.table(3))
       rank  id    loss  lr   net
       ──────────────────────────
          1   4       0  1    mlp
          2   2  0.4805  0.5  mlp
          3   5       1  1    cnn
      <BLANKLINE>
      2 of 6 trials failed: 2 × loss not finite
      >>> result.best_so_far()[1].tolist()[-1]
      0.0
    """

    space: Space
    trials: Records
    best_hparams: PyTree
    best_loss: float
    best_state: PyTree
    errors: dict[int, str]
    stopped: str
    seconds: float
    compile_seconds: float
    method_state: PyTree = None

    def __repr__(self) -> str:
        failed = len(self.trials.dead())
        return (
            f"Result(best_loss={self.best_loss:.6g}, trials={self.trials.size}, "
            f"{f'failed={failed}, ' if failed else ''}stopped={self.stopped!r}, "
            f"seconds={self.seconds:.3g}, compile_seconds={self.compile_seconds:.3g})"
        )

    def best_so_far(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest loss after each evaluation.

        Returns:
          evaluations: i64[n], 1 to n.
          best: f64[n], the lowest finite loss of that many evaluations, +inf as long as there is none.
        """
        losses = np.where(self.trials.counts, self.trials.loss.astype(float), np.inf)
        return np.arange(1, len(losses) + 1), np.minimum.accumulate(losses)

    @property
    def gradient_norms(self) -> np.ndarray:
        """float[n]: length of the gradient at every evaluation, NaN where there is none, inf where it is not finite.

        It is taken by the unit cube, in which every parameter runs from 0 to 1, and by the weights of relaxed choices,
        so parameters of different units compare: 1 is a loss that changes by 1 from one end to the other.
        """
        known = self.trials.gradient_norm
        return np.full(len(self.trials.loss), np.nan, self.trials.loss.dtype) if known is None else known

    def to_dataframe(self) -> "pandas.DataFrame":
        """Every evaluation as a row of a pandas frame.

        Returns:
          A frame with the columns `round`, `id`, `steps`, `loss`, `failed`, then one for each of `space.names` with
          native values: options themselves, and missing where a dim of a conditional is not live. A hyperparameter
          that has the name of one of the first five is found at `hparams.<name>`.

        Raises:
          ImportError: pandas is not installed.
        """
        pandas = optional("pandas", "to_dataframe")
        t = self.trials
        recorded = {"round": t.round, "id": t.id, "steps": t.steps, "loss": t.loss, "failed": t.failed}
        names, data = list(recorded), list(recorded.values())
        for column in columns(self.space, t.hparams):
            names.append(f"hparams.{column.name}" if column.name in recorded else column.name)
            data.append(_series(pandas, column))
        frame = pandas.DataFrame(dict(enumerate(data)))
        frame.columns = names
        return frame

    def failures(self) -> dict[str, int]:
        """How many trials failed of what, most frequent first; messages that differ count as one kind of exception."""
        ids = self.trials.id[self.trials.dead()].tolist()
        messages = [(self.errors.get(i, "").strip() or "loss not finite").splitlines()[0] for i in ids]
        kinds: dict[str, set[str]] = collections.defaultdict(set)
        for message in messages:
            kinds[message.partition(":")[0]].add(message)
        name = {k: f"{k}: {len(v)} different messages" if len(v) > 1 else v.copy().pop() for k, v in kinds.items()}
        return dict(collections.Counter(name[message.partition(":")[0]] for message in messages).most_common())

    def rows(self, n: int = 10, parameters: int = 8) -> tuple[list[str], list[list[str]]]:
        """The `n` best trials as text, best first: header and rows of `table`."""
        t = self.trials
        best = t.best(n)
        shown = texts(self.space, take(t.hparams, best))
        cells, hidden = list(shown.values())[:parameters], len(shown) - parameters
        trained = bool((t.steps > 0).any())
        header = ["rank", "id", *(["steps"] if trained else []), "loss", *list(shown)[:parameters]]
        body = []
        for i, row in enumerate(best.tolist()):
            steps = [str(t.steps[row])] if trained else []
            body.append(
                [
                    str(i + 1),
                    str(t.id[row]) if t.id[row] >= 0 else "known",
                    *steps,
                    f"{t.loss[row]:.4g}",
                    *(c[i] for c in cells),
                ]
            )
        if hidden <= 0:
            return header, body
        return [*header, f"+ {hidden} more"], [[*cells, "…"] for cells in body]

    def table(self, n: int = 10, parameters: int = 8) -> TextTable:
        """The best trials, each at its lowest loss, and a count of what failed, to `print` or to show in a notebook.

        Args:
          n: number of trials.
          parameters: number of hyperparameters, in the order of `space.names`; those of a branch are shown with the
            choice, as in `adam (lr=0.01)`.

        Returns:
          A `rich` table.
        """
        header, body = self.rows(n, parameters)
        table = TextTable(self._note())
        for name in header:
            figure = name in ("rank", "id", "steps", "loss")
            table.add_column(Text(name), justify="right" if figure else "left", no_wrap=figure, overflow="fold")
        for i, row in enumerate(body):
            table.add_row(*(Text(cell) for cell in row), style="bold green" if i == 0 else None)
        return table

    def _note(self) -> str:
        failures = self.failures()
        if not failures:
            return ""
        head = f"{sum(failures.values())} of {self.trials.size} trials failed: "
        most = [f"{count} × {message}" for message, count in list(failures.items())[:3]]
        return head + ", ".join(most + (["…"] if len(failures) > 3 else []))

    def schedule(self) -> "list[Schedule]":
        """How the training states came to be that were alive at the end, best first.

        Those are the states of the last round and of the trials that trained longest, if their last loss is finite.
        The hyperparameters of a schedule change where a trial continued the training state of another.

        Returns:
          Schedules, by their last loss, which `jaxhpo.replay` trains by.

        Raises:
          ValueError: the trials of the study carry no steps.
        """
        from jaxhpo.lineage import survivors

        return survivors(self.space, self.trials)

    def best_schedule(self) -> "Schedule":
        """How `best_state` came to be: the schedule that ends at `best_loss`.

        Raises:
          ValueError: the trials of the study carry no steps, or the best result was known beforehand.
        """
        from jaxhpo.lineage import lineage

        return lineage(self.space, self.trials, int(self.trials.best(1)[0]))

    def plot(
        self,
        kind: Literal["best_so_far", "learning_curves", "parallel_coordinates", "slices"] = "best_so_far",
        **options: Any,
    ) -> "Figure":
        """A plot from `jaxhpo.views.plots`, as a matplotlib figure.

        Args:
          kind: name of the function in `jaxhpo.views.plots`.
          **options: its other arguments.

        Raises:
          ValueError: there is no such plot, or nothing to show in it.
          ImportError: matplotlib is not installed.
        """
        from jaxhpo.views import plots

        if kind not in plots.KINDS:
            raise ValueError(f"kind must be one of {tuple(plots.KINDS)}, got {kind!r}")
        return plots.KINDS[kind](self, **options)

    def report(self, path: str | Path, *, title: str | None = None, facts: dict[str, str] | None = None) -> Path:
        """Writes all of it into one HTML file, which needs nothing else; see `jaxhpo.views.report.report`."""
        from jaxhpo.views.report import report

        return report(self, path, title=title, facts=facts)


def _series(pandas: Any, column: Column) -> Any:
    """A column for a frame, in the tightest dtype that keeps its values as they are."""
    if isinstance(column.parameter, Int):
        return column.values if column.live.all() else pandas.arrays.IntegerArray(column.values, ~column.live)
    types = {type(option) for option in column.options or ()}
    if column.live.all() and types in ({int}, {float}, {bool}):
        return np.asarray(column.options)[column.values]
    return column.native()
