"""The pages of documentation: snippets run, links lead somewhere, and tables say what the code says."""

import inspect
import re

import jax
import numpy as np
import pytest

import jaxhpo as hpo
from tests.snippets import ROOT, page, snippets

METHODS = "docs/methods.md"
RESULTS = "benchmarks/RESULTS.md"
PAGES = [*sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")), "ARCHITECTURE.md"]
PARTS = ["What it does", "When to use it", "When not", "What it costs", "Settings", "The call", "Paper"]
BUILDERS = [
    name
    for name in hpo.__all__
    if inspect.isfunction(getattr(hpo, name)) and inspect.signature(getattr(hpo, name)).return_annotation is hpo.Method
]
ADJOINTS = ["Reverse", "Forward", "Truncated", "Implicit", "Online"]
# Of the best loss in the snippet of a section; 1e-3 is the least that training there can reach.
BOUNDS = {
    "grid": 0.4,
    "random": 0.3,
    "quasirandom": 0.3,
    "annealing": 0.05,
    "tpe": 0.01,
    "coordinate_descent": 1e-3,
    "genetic": 1e-4,
    "differential_evolution": 1e-4,
    "particle_swarm": 1e-3,
    "pbt": 1.1e-3,
    "successive_halving": 2e-3,
    "hyperband": 1.1e-3,
    "asha": 1.1e-3,
    "gradient": 1.1e-3,
    "unroll": 1.1e-3,
    "regularized_evolution": 0.1,
    "darts": 1e-6,
    "reinforce": 0.01,
    "ppo": 0.01,
    "controller": 1.1e-3,
}
# Seconds to compile, and run by the examples of their docstrings: here a round of the study is only traced.
TRACED = ["bayesian", "gp_ei", "cma_es", "islands", "bohb", "dehb", "early_stopping", "polish"]


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def sections(text):
    """The text below each heading, those below deeper ones included, by anchor."""
    found, taken = {}, re.sub(r"^```.*?^```$", lambda m: re.sub(r"^#", " ", m[0], flags=re.M), text, flags=re.S | re.M)
    headings = list(re.finditer(r"^(#+) (.+)$", taken, re.M))
    for i, heading in enumerate(headings):
        rest = (h.start() for h in headings[i + 1 :] if len(h[1]) <= len(heading[1]))
        name, more = anchor(heading[2]), 1
        while name in found:
            name, more = f"{anchor(heading[2])}-{more}", more + 1
        found[name] = text[heading.end() : next(rest, len(text))]
    return found


def read(path):
    return (ROOT / path).read_text()


def section(name):
    """That of a method on its page."""
    return sections(read(METHODS))[name.lower()]


def settings_table(name):
    """The default of every setting in the table of a section, as it is written there."""
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \| .+ \|$", section(name), re.M)
    return {setting: default.strip("`") for names, default in rows for setting in names.strip("`").split(", ")}


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", read(path))
    for link in links:
        if link.startswith("http"):
            continue
        target, _, heading = link.partition("#")
        file = (ROOT / path).parent / target if target else ROOT / path
        assert file.exists(), link
        assert not heading or heading in sections(file.read_text()), link


def test_figures_are_in_the_sections_that_they_link_to():
    results = {name: text.replace("**", "") for name, text in sections(read(RESULTS)).items()}
    figures = re.findall(r"\[([^\[\]|\n]+)\]\(\.\./benchmarks/RESULTS\.md#([^)]+)\)", read(METHODS))
    assert len(figures) > 100
    for figure, heading in figures:
        assert heading in results, heading
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d|\.\d)", results[heading]), (figure, heading)


def test_every_method_has_a_row_and_a_section():
    assert {"tpe", "quasirandom", "controller", "islands", "early_stopping", "polish"} < set(BUILDERS) and len(
        BUILDERS
    ) > 26
    table = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| .+ \| .+ \| .+ \|$", read(METHODS), re.M)
    assert sorted(table) == sorted([*BUILDERS, *ADJOINTS, "unroll"])
    assert set(map(str.lower, table)) < set(sections(read(METHODS)))


@pytest.mark.parametrize("name", [*BUILDERS, *ADJOINTS, "unroll"])
def test_a_section_has_all_parts_and_says_what_the_code_says(name):
    text = section(name)
    assert re.findall(r"^\*\*([\w ]+)\.\*\*", text, re.M) == PARTS
    assert text.count("```math") == 1 and text.count("```python") == 1
    assert re.search(r"\*\*Paper\.\*\* .+\(\d{4}\)", text)
    table, arguments = settings_table(name), inspect.signature(getattr(hpo, name)).parameters
    assert set(arguments) - {"space"} <= set(table)
    for argument, parameter in arguments.items():
        if argument in table:
            default = parameter.default
            written = f"hpo.{default.__name__}" if inspect.isfunction(default) else repr(default).replace("'", '"')
            assert table[argument] == ("required" if default is inspect.Parameter.empty else written), argument


def traced(problem, method, **arguments):
    """What `minimize` is called with, as one round of the study without its numbers."""
    inspect.signature(hpo.minimize).bind(problem, method, **arguments)
    _, trace = jax.eval_shape(hpo.study(problem, method, rounds=1), arguments["key"])
    assert trace.losses.shape == (1, method.batch)
    return method


def names_of(settings):
    """Of the settings of a method, but for those of a method that it is made of."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(settings)]
    own = [path for path in paths if {"method", "sampler"}.isdisjoint(getattr(key, "key", "") for key in path)]
    return {getattr(path[-1], "name", None) or path[-1].key for path in own}


@pytest.mark.parametrize("name", [*BUILDERS, *ADJOINTS, "unroll"])
def test_the_call_of_a_section_runs(name, monkeypatch):
    first, *_ = snippets(METHODS)
    (call,) = re.findall(r"^```python\n(.*?)^```$", section(name), re.S | re.M)
    asked = []
    run = traced if name in TRACED else hpo.minimize
    monkeypatch.setattr(
        hpo, "minimize", lambda problem, method, **more: asked.append(method) or run(problem, method, **more)
    )
    names: dict = {}
    exec(first, names)
    exec(call, names)
    assert f"hpo.{name}(" in call
    if name in ADJOINTS:
        assert not asked and names["trained"].adjoint == eval(re.search(r"adjoint=(.+)\)", call)[1], names)
        return
    assert [method.name for method in asked] == ["tpe" if name == "unroll" else name]
    assert name == "unroll" or names_of(asked[0].settings) <= set(settings_table(name))
    if name not in TRACED:
        assert names["result"].best_loss < BOUNDS[name]


def test_slopes_of_the_adjoints():
    names: dict = {}
    exec(snippets(METHODS)[0], names)
    slopes = {}
    for name in ("Reverse", "Forward", "Truncated"):
        (call,) = re.findall(r"^```python\n(.*?)^```$", section(name), re.S | re.M)
        exec(call, names)
        slopes[name] = float(names["slopes"]["lr"])
    np.testing.assert_allclose(slopes["Reverse"], slopes["Forward"], rtol=1e-4)
    assert slopes["Reverse"] < slopes["Truncated"] < 0
    (call,) = re.findall(r"^```python\n(.*?)^```$", section("Implicit"), re.S | re.M)
    exec(call, names)
    # The loss (1 / (1 + l2) - 1 / 2)^2 at l2 = 1 / 2.
    np.testing.assert_allclose(names["slopes"]["l2"], -2 * (2 / 3 - 1 / 2) * (2 / 3) ** 2, rtol=1e-4)


def test_other_pages_run():
    for path in PAGES:
        if path != METHODS:
            page(path)
