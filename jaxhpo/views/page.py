"""The parts of a page: a single HTML file that needs no network, in light or dark as the reader's system is."""

import io
import re
from collections.abc import Collection
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxhpo.checks import optional
from jaxhpo.views import scales

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def write(path: str | Path, title: str, *parts: str) -> Path:
    """Writes a page of these parts, replacing what is at `path`; its folder is made."""
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{''.join(parts)}</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def definitions(facts: dict[str, Any], name: str = "facts") -> str:
    """A list of facts by name."""
    items = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>\n" for k, v in facts.items())
    return f'<dl class="{name}">\n{items}</dl>\n'


def table(header: list[str], body: list[list[str]], numeric: Collection[str]) -> str:
    """A table whose first row is the winner; columns of numbers are flush right."""
    kind = [' class="number"' if name in numeric else "" for name in header]
    head = "".join(f"<th{k}>{escape(name)}</th>" for k, name in zip(kind, header, strict=True))
    cells = ["".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kind, row, strict=True)) for row in body]
    rows = "".join(f"<tr>{row}</tr>\n" for row in cells)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n'


def section(title: str, caption: str, content: str) -> str:
    """A part of a page under a heading."""
    return f"<h2>{escape(title)}</h2>\n<p>{escape(caption)}</p>\n{content}"


def drawing() -> Any:
    """A context in which matplotlib writes the same bytes for the same figure."""
    settings = {"svg.fonttype": "path", "svg.hashsalt": "jaxhpo", "savefig.dpi": 120}
    return optional("matplotlib", "report").rc_context(settings)


def duration(seconds: float) -> str:
    """Seconds as a person writes them."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def picture(kind: str, figure: "Figure", title: str, caption: str) -> str:
    """The figure as inline SVG, whose ink follows the page, under a heading."""
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
    natural = f"{figure.get_figwidth() * 96:.0f}px"
    label = f'role="img" aria-label="{escape(title)}" style="--natural: {natural}" '
    svg = svg.replace("<svg ", f"<svg {label}", 1)
    return section(title, caption, f"<figure>{svg}</figure>\n")
