"""One command runs every benchmark, RESULTS.md names each, and what is recommended follows from ranks."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()


def load(name):
    """The module of a benchmark."""
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_all():
    return load("run_all")


@pytest.fixture(scope="module")
def which_method():
    """It imports other benchmarks by their names, as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        yield load("which_method")


def test_every_script_is_in_the_one_command(run_all):
    scripts = {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "\ndef main(" in p.read_text()} - {"run_all"}
    run = {s for b in run_all.BENCHMARKS for s in re.findall(r"benchmarks/(\w+)\.py", b.command)}
    assert run == scripts


def test_results_name_every_command_and_have_every_section(run_all):
    assert run_all.contents() in RESULTS
    headings = re.findall(r"^##+ (.*)$", RESULTS, re.M)
    listed = [section for section, _ in itertools.groupby(b.section for b in run_all.BENCHMARKS)]
    assert sorted(headings) == sorted(listed)


def test_what_needs_data_is_left_out_and_what_fails_is_named(run_all):
    needs = run_all.Benchmark("x", "python -c 'import sys; sys.exit(3)' DATA", "")
    assert run_all.run(needs, {"DATA": None}, False) == ("left out: no DATA", False)
    outcome, has_failed = run_all.run(needs, {"DATA": "folder"}, True)
    assert has_failed and outcome.startswith("FAILED with status 3")


def test_ranks_are_expectations_over_seeds(which_method):
    losses = [np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.array([3.0])]
    rank = which_method.mean_ranks([which_method.comparisons(losses)], [np.array([2, 2, 1])])
    # The first is lower than the second in half of the pairs, and than the third in 1/2 with 1/2 of a tie.
    np.testing.assert_allclose(rank, [1 + 0.5 + 0.25, 1 + 0.5 + 0, 1 + 0.75 + 1.0])


def test_a_method_is_within_noise_or_it_is_not(which_method):
    rng = np.random.default_rng(1)
    problems = [f"p{i}" for i in range(6)]
    curves = {
        name: {p: shift + rng.normal(size=(8, 1)) for p in problems}
        for name, shift in {"best": 0.0, "as good": 0.0, "worse": 5.0}.items()
    }
    found = which_method.standings(curves, 0)
    assert found["as good"].is_within and found["best"].is_within and not found["worse"].is_within
    assert found["worse"].rank == pytest.approx(3, abs=0.02) and found["worse"].first == 0
    assert sum(x.rank for x in found.values()) == pytest.approx(6)
    assert found["best"].first + found["as good"].first == pytest.approx(1)


def test_a_recommendation_that_does_not_hold_is_told(which_method, tmp_path, monkeypatch, capsys):
    rows = [
        {"problem": f"p{p}", "peer": f"jaxhpo-{name}", "seed": s, "best": [loss + s / 100] * 10}
        for name, loss in (("tpe", 1.0), ("random", 2.0))
        for p in range(3)
        for s in range(2)
    ]
    which_method.append(tmp_path / "mixed.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["which_method.py", "--rows", str(tmp_path), "--kinds", "mixed", "--check"])
    monkeypatch.setattr(which_method, "RECOMMENDED", {"mixed": {"100": "tpe"}})
    which_method.main()
    monkeypatch.setattr(which_method, "RECOMMENDED", {"mixed": {"100": "random"}})
    with pytest.raises(SystemExit) as ended:
        which_method.main()
    assert ended.value.code == 1
    assert "NOT within noise of the first" in capsys.readouterr().out


def test_readme_recommends_what_is_checked(which_method):
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("## Which method should I use?")[2].partition("\n## ")[0]
    names = {name for marks in which_method.RECOMMENDED.values() for name in marks.values()}
    assert len(names) > 2
    for name in names:
        assert f"`{name}`" in table, name
