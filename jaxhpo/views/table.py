"""A table for a screen, a log and a notebook."""

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


class TextTable(Table):
    """A `rich` table with a line below it, which `print` shows, too."""

    def __init__(self, note: str = ""):
        super().__init__(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
        self.note = note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from super().__rich_console__(console, options)
        if self.note:
            yield Text(self.note, style="dim")

    def __str__(self) -> str:
        console = Console()
        # Squeezing helps at a screen only: a log can hold the natural width.
        if not console.is_terminal:
            natural = Measurement.get(console, console.options.update(max_width=10_000), self).maximum
            console.width = max(natural, len(self.note))
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")

    __repr__ = __str__
