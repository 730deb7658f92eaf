"""The Python snippets of the documentation, which run one after the other and share their names."""

import functools
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def snippets(path: str) -> list[str]:
    """Those of a page, given from the root of the repository, at the line where each stands, for tracebacks."""
    text = (ROOT / path).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M)
    return ["\n" * text.count("\n", 0, match.start(1)) + match.group(1) for match in found]


def run(path: str) -> dict[str, Any]:
    """The names that a page has defined at its end."""
    names: dict[str, Any] = {"__name__": path}
    for snippet in snippets(path):
        exec(compile(snippet, str(ROOT / path), "exec"), names)
    return names


@functools.cache
def page(path: str) -> dict[str, Any]:
    """`run`, once for all tests of a process."""
    return run(path)
