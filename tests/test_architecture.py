"""ARCHITECTURE.md says what is there, and imports run as it says."""

import ast
import re
from pathlib import Path

import pytest

import jaxhpo as hpo
from tests.snippets import ROOT, page

TEXT = (ROOT / "ARCHITECTURE.md").read_text()
FAMILIES = ("exhaustive", "stochastic", "sequential", "population", "bandit", "gradient", "automl")
SHARED = {
    *("chain", "checks", "codec", "coordinates", "draws", "history", "layers", "method", "modules", "parameters"),
    *("scalars", "space", "steppers", "trainable", "untried", "variation"),
}
# What a file takes of another room beside public methods.
FURTHER = {
    "bandit/dehb.py": {"population.differential_evolution"},
    "population/time_varying.py": {"sequential.surrogate.kernel"},
    "automl/nas/pictures.py": {"views.plots", "views.scales"},
}
FILES = [path for family in FAMILIES for path in sorted((ROOT / "jaxhpo" / family).rglob("*.py"))]


def imported(path):
    """(module, name) of every import from jaxhpo, modules without the `jaxhpo.` in front."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            top, _, module = (node.module or "").partition(".")
            if top == "jaxhpo":
                found += [(module or alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[2], "") for alias in node.names if alias.name.startswith("jaxhpo")]
    return found


def test_every_path_is_there_and_every_file_of_the_root_is_named():
    paths = re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.(?:py|md))`", TEXT)
    assert len(paths) > 50
    for path in paths:
        assert (ROOT / path).exists() or path == "__init__.py", path
    rows = set(re.findall(r"^\| `jaxhpo/(\w+\.py|\w+/)` \|", TEXT, re.M))
    here = {
        path.name + "/" * path.is_dir() for path in (ROOT / "jaxhpo").iterdir() if not path.name.startswith("__pyc")
    }
    assert rows == here - {"py.typed"}


def test_every_method_is_in_its_folder():
    rows = dict(re.findall(r"^\| `jaxhpo/(\w+)/` \| (.+) \|$", TEXT, re.M))
    for name in hpo.__all__:
        module = getattr(getattr(hpo, name), "__module__", None) or ""
        family = module.split(".")[1] if module.startswith("jaxhpo.") else ""
        if family in FAMILIES and getattr(getattr(hpo, name), "__annotations__", {}).get("return") is hpo.Method:
            assert f"`{name}`" in rows[family], name


def test_the_loop_by_hand_equals_the_others():
    names = page("ARCHITECTURE.md")
    assert names["trace"].losses.shape == (8, 4) and names["by_minimize"].std() > 0.1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "jaxhpo")))
def test_families_import_as_it_is_said(path: Path):
    place = path.relative_to(ROOT / "jaxhpo")
    for module, name in imported(path):
        room = module.split(".")[0]
        if room == place.parts[0] or room in SHARED:
            continue
        is_public = room in FAMILIES and name in hpo.__all__
        assert is_public or module in FURTHER.get(str(place), ()), f"{place} imports {name} of {module}"
