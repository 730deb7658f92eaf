"""A study on one page: a single HTML file that needs no network, in light or dark as the reader's system is."""

import io
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxhpo.checks import optional
from jaxhpo.records import columns, show, take
from jaxhpo.result import Result
from jaxhpo.views import plots, scales

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "best_so_far": ("Best so far", "Every evaluation, and the lowest loss up to it. Triangles lie beyond the axis."),
    "learning_curves": ("Learning curves", "Trials that trained in several stretches, the best one highlighted."),
    "parallel_coordinates": (
        "Parallel coordinates",
        "Each line is a trial: the bluer, the better; the best highlighted.",
    ),
    "slices": ("Slices", "The loss against each hyperparameter; a bar is the median of an option."),
}

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #667085; --line: #dfe3e9; --card: #f6f7f9; --paper: #ffffff;
  --winner: #c2570a; --failed: #c01f38 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #98a2b3; --line: #343a46; --card: #1e222b;
  --paper: #15181f; --winner: #f39242; --failed: #f06a7f } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif }
h1 { margin: 0 0 1.5rem; font-size: 1.7rem; line-height: 1.2 }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.15rem }
p { margin: .25rem 0 .75rem; color: var(--soft) }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; margin: 0 }
dl div { padding: .7rem .9rem; border-radius: .5rem; background: var(--card) }
dt { color: var(--soft); font-size: .8rem }
dd { margin: .1rem 0 0; font-weight: 600; overflow-wrap: anywhere }
.best dd { color: var(--winner) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .32rem .9rem .32rem 0; text-align: left; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 }
.number { text-align: right }
tbody tr:first-child td { color: var(--winner); font-weight: 600 }
.failures td:first-child { color: var(--failed) }
figure { margin: 0 0 1rem }
svg { display: block; width: 100%; height: auto; max-width: var(--natural) }
"""


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
    matplotlib = optional("matplotlib", "report")
    title = "Hyperparameter study" if title is None else title
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "jaxhpo", "savefig.dpi": 120}):
        pictures = "".join(_picture(kind, plots.KINDS[kind](result)) for kind in plots.sensible(result))
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{_definitions(_headline(result) | (facts or {}))}{_best(result)}{_table(result, trials)}{_failures(result)}"
        f"{pictures}</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


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
        "time": f"{_duration(result.seconds)}, {_duration(result.compile_seconds)} of it compiling",
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _definitions(facts: dict[str, Any], name: str = "facts") -> str:
    items = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>\n" for k, v in facts.items())
    return f'<dl class="{name}">\n{items}</dl>\n'


def _best(result: Result) -> str:
    best = result.trials.best(1)
    if not len(best):
        return ""
    found = columns(result.space, take(result.trials.hparams, best))
    values = {column.name: show(column.native().tolist()[0]) for column in found if column.live[0]}
    return f"<h2>Best hyperparameters</h2>\n<p>of trial {result.trials.id[best[0]]}</p>\n{_definitions(values, 'best')}"


def _table(result: Result, trials: int) -> str:
    header, body = result.rows(trials, parameters=30)
    if not body:
        return ""
    numeric = ("rank", "id", "steps", "loss")
    kind = [' class="number"' if name in numeric else "" for name in header]
    head = "".join(f"<th{k}>{escape(name)}</th>" for k, name in zip(kind, header, strict=True))
    cells = ["".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kind, row, strict=True)) for row in body]
    rows = "".join(f"<tr>{row}</tr>\n" for row in cells)
    return (
        f"<h2>Best trials</h2>\n<p>Each at its lowest loss.</p>\n"
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n'
    )


def _failures(result: Result) -> str:
    failures = result.failures()
    if not failures:
        return ""
    rows = "".join(f'<tr><td class="number">{n:,}</td><td>{escape(m)}</td></tr>\n' for m, n in failures.items())
    table = f'<table class="failures">\n<tbody>\n{rows}</tbody>\n</table>'
    return f'<h2>Failed trials</h2>\n<div class="scroll">{table}</div>\n'


def _picture(kind: str, figure: "Figure") -> str:
    """The figure as inline SVG, whose ink follows the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    # Several figures share the page: an id, or a reference to one, is told apart by its figure.
    svg = re.sub(r'\bid="', f'id="{kind}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{kind}-", svg)
    for colour, name in ((scales.INK, "ink"), (scales.FAINT, "line"), (scales.PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{name})")
    title, caption = CAPTIONS[kind]
    natural = f"{figure.get_figwidth() * 96:.0f}px"
    label = f'role="img" aria-label="{escape(title)}" style="--natural: {natural}" '
    svg = svg.replace("<svg ", f"<svg {label}", 1)
    return f"<h2>{title}</h2>\n<p>{caption}</p>\n<figure>{svg}</figure>\n"
