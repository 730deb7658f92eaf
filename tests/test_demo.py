import re

import numpy as np

import jaxhpo as hpo
from jaxhpo import demo
from jaxhpo.__main__ import main


def test_digits_are_split_in_equal_shares():
    parts = demo.digits(3)
    assert [len(x) for x, _ in parts] == [1077, 360, 360]
    rows = {row.tobytes() for x, _ in parts for row in x}
    assert len(rows) == 1797 and max(x.max() for x, _ in parts) == 1.0
    for _, y in parts:
        assert np.abs(np.bincount(y) / len(y) - 0.1).max() < 0.005


def test_the_demo_tunes_digits(tmp_path, capsys):
    main(["demo", "--seed", "1", "--report", str(tmp_path / "report.html")])
    shown = capsys.readouterr().out
    accuracy, trials = re.search(r"([\d.]+)% of 360", shown), re.search(r"(\d+) networks", shown)
    assert accuracy and float(accuracy[1]) >= 95.5
    assert trials and int(trials[1]) >= 200
    assert "report.html" in shown and "width" in shown
    page = (tmp_path / "report.html").read_text()
    assert f"{accuracy[1]}%" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_demo_searches_at_least_six_hyperparameters_some_conditional():
    space = hpo.Space(demo.SPACE)
    live = np.asarray(space.active(np.random.default_rng(0).uniform(size=(100, space.dims)).astype(np.float32)))
    assert live.sum(1).min() >= 6 and 0 < live.mean(0).min() < 1
