"""A study, or a comparison of methods, on one page of HTML."""

from html import escape
from pathlib import Path

from jaxhpo.comparison import SHARED, Comparison
from jaxhpo.records import columns, show, take
from jaxhpo.result import Result
from jaxhpo.views import charts, page, plots

CAPTIONS = {
    "best_so_far": ("Best so far", "Every evaluation, and the lowest loss up to it. Triangles lie beyond the axis."),
    "learning_curves": ("Learning curves", "Trials that trained in several stretches, the best one highlighted."),
    "parallel_coordinates": (
        "Parallel coordinates",
        "Each line is a trial: the bluer, the better; the best highlighted.",
    ),
    "slices": ("Slices", "The loss against each hyperparameter; a bar is the median of an option."),
}
CHARTS = {
    "best_so_far": ("Best so far", "The median of the repeats; of the methods in front, the quartiles, too."),
    "ranks": ("Mean rank", "Over cost; 1 is best. Bands are bootstrap intervals of 90%."),
    "heat_map": ("Mean rank by problem", "The bluer, the better."),
}


def report(
    result: Result,
    path: str | Path,
    *,
    title: str | None = None,
    facts: dict[str, str] | None = None,
    trials: int = 20,
) -> Path:
    """Writes a study on one page: headline facts, the best hyperparameters, the best trials, what failed, and plots.

    Args:
      result: what to write about.
      path: file to write, replaced if it is there; its folder is made.
      title: heading of the page; "Hyperparameter study" if not given.
      facts: further headline facts by name, such as the data set or the method.
      trials: number of trials in the table.

    Returns:
      `path`.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> import tempfile, jax, jaxhpo as hpo
      >>> space = {"x": hpo.Float(-1.0, 1.0)}
      >>> result = hpo.minimize(lambda key, h: h["x"] ** 2, hpo.random(space), key=jax.random.key(0), trials=16)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     report(result, f"{folder}/study.html", title="A parabola", facts={"method": "random"}).name
      'study.html'
    """
    with page.drawing():
        pictures = [page.picture(kind, plots.KINDS[kind](result), *CAPTIONS[kind]) for kind in plots.sensible(result)]
    facts = _headline(result) | (facts or {})
    parts = page.definitions(facts), _best(result), _table(result, trials), _failures(result)
    return page.write(path, "Hyperparameter study" if title is None else title, *parts, *pictures)


def _headline(result: Result) -> dict[str, str]:
    t = result.trials
    trials, failed = t.size, len(t.dead())
    facts = {
        "best loss": f"{result.best_loss:.6g}",
        "trials": f"{trials:,}" + (f" ({failed:,} failed)" if failed else ""),
    }
    if (t.id >= 0).sum() > trials:
        facts["evaluations"] = f"{(t.id >= 0).sum():,}"
    if (t.steps > 0).any():
        facts["longest training"] = f"{t.steps.max():,} steps"
    return facts | {
        "ended by": "the method, which was done" if result.stopped == "method" else result.stopped.replace("_", " "),
        "time": f"{page.duration(result.seconds)}, {page.duration(result.compile_seconds)} of it compiling",
    }


def _best(result: Result) -> str:
    best = result.trials.best(1)
    if not len(best):
        return ""
    found = columns(result.space, take(result.trials.hparams, best))
    values = {column.name: show(column.native().tolist()[0]) for column in found if column.live[0]}
    caption = f"of trial {result.trials.id[best[0]]}"
    return page.section("Best hyperparameters", caption, page.definitions(values, "best"))


def _table(result: Result, trials: int) -> str:
    header, body = result.rows(trials, parameters=30)
    if not body:
        return ""
    table = page.table(header, body, ("rank", "id", "steps", "loss"))
    return page.section("Best trials", "Each at its lowest loss.", table)


def _failures(result: Result) -> str:
    failures = result.failures()
    if not failures:
        return ""
    rows = "".join(f'<tr><td class="number">{n:,}</td><td>{escape(m)}</td></tr>\n' for m, n in failures.items())
    table = f'<table class="failures">\n<tbody>\n{rows}</tbody>\n</table>'
    return f'<h2>Failed trials</h2>\n<div class="scroll">{table}</div>\n'


def comparison_report(
    comparison: Comparison, path: str | Path, *, title: str | None = None, facts: dict[str, str] | None = None
) -> Path:
    """Writes a comparison on one page: the table of methods, plots, and how long it took.

    Args:
      comparison: what to write about.
      path: file to write, replaced if it is there; its folder is made.
      title: heading of the page; "Comparison of methods" if not given.
      facts: headline facts by name, such as the data set or the device.

    Returns:
      `path`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    header, body = comparison.rows()
    table = page.section("Methods", comparison.note() + ".", page.table(header, body, header[1:]))
    several, shown = len(comparison.problems) > 1, charts.sensible(comparison)
    with page.drawing():
        figures = [("best_so_far", f": {p}" * several, charts.best_so_far(comparison, p)) for p in shown]
        figures += [(kind, "", charts.KINDS[kind](comparison)) for kind in ("ranks", "heat_map")]
        pictures = [
            page.picture(f"{kind}-{i}", figure, CHARTS[kind][0] + of, CHARTS[kind][1])
            for i, (kind, of, figure) in enumerate(figures)
        ]
    header, body = comparison.time_rows()
    times = page.section("Time", SHARED.capitalize() + ".", page.table(header, body, header[1:]))
    headline = page.definitions(facts) if facts else ""
    return page.write(path, "Comparison of methods" if title is None else title, headline, table, *pictures, times)
