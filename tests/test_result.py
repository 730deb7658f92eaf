"""What a study gives back: the best of it, frames, tables and the page."""

import html.parser
import math
import sys

import jax
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.records import Records
from jaxhpo.result import Result

pytestmark = pytest.mark.smoke


def identity(x):
    return x


SPACE = {
    "lr": hpo.Float(1e-5, 1e-1, log=True),
    "width": hpo.Int(16, 256, log=True),
    "activation": hpo.Categorical(("relu", identity, None)),
    "batch": hpo.Ordinal((16, 64, 256)),
    "dropout": hpo.Categorical((0.0, 0.1, 0.5)),
    "nesterov": hpo.Categorical((True, False)),
    "cell": hpo.Categorical(("conv", "pool"), relaxed=True),
    "noise": hpo.Array((2, 2), 0.0, 1.0),
    "optimizer": hpo.OneOf(
        sgd={"momentum": hpo.Float(0.0, 0.99)}, adam={"b1": hpo.Float(0.8, 0.99), "warmup": hpo.Int(0, 10)}
    ),
    "clip": 1.0,
}


def study(tree=None, n=200, ids=None, steps=None, losses=None, errors=None, seed=0):
    """A result of `n` random evaluations, of which every 17th failed."""
    random, space = np.random.default_rng(seed), hpo.Space(SPACE if tree is None else tree)
    n = n if losses is None else len(losses)
    unit = random.random((200, space.dims), dtype=np.float32)
    losses = np.where(np.arange(n) % 17 == 5, np.nan, random.lognormal(0, 2, n)) if losses is None else losses
    trials = Records(
        round=np.arange(n, dtype=np.int32) // 8,
        id=np.arange(n, dtype=np.int32) if ids is None else np.asarray(ids, np.int32),
        unit=unit[:n],
        hparams=jax.tree.map(lambda x: np.asarray(x)[:n], space.decode(unit)),
        steps=np.zeros(n, np.int32) if steps is None else np.asarray(steps, np.int32),
        loss=np.asarray(losses, np.float32),
    )
    best = trials.best(1)
    hparams = space.native(trials.hparams, best[0]) if len(best) else None
    loss = float(trials.loss[best[0]]) if len(best) else math.nan
    return Result(space, trials, hparams, loss, None, errors or {}, "trials", 75.0, 2.5)


def flat(native, path=""):
    """Native hyperparameters by the names of their dims."""
    if isinstance(native, np.ndarray):
        return {f"{path}[{i}]": x for i, x in enumerate(native.ravel().tolist())}
    if not isinstance(native, dict):
        return {path: native}
    found = {}
    for name, value in native.items():
        found |= flat(value, path if name == "choice" else f"{path}.{name}".lstrip("."))
    return found


def test_a_frame_has_the_native_values_of_every_row():
    result = study()
    frame = result.to_dataframe()
    assert list(frame.columns) == ["round", "id", "steps", "loss", "failed", *result.space.names]
    assert len(frame) == 200
    np.testing.assert_array_equal(frame["loss"], result.trials.loss)
    np.testing.assert_array_equal(frame["failed"], np.arange(200) % 17 == 5)
    for i in range(0, 200, 7):
        native = flat(result.space.native(result.trials.hparams, i))
        del native["clip"]
        row = {name: frame[name][i] for name in result.space.names}
        for name, value in native.items():
            assert row[name] == value or (value is None and frame[name].isna()[i]), (i, name)
        missing = set(row) - set(native)
        assert missing and all(frame[name].isna()[i] for name in missing)


def test_a_frame_keeps_types():
    frame = study().to_dataframe()
    kinds = {name: frame[name].dtype.kind for name in ("lr", "width", "batch", "dropout", "nesterov", "noise[3]")}
    assert kinds == {"lr": "f", "width": "i", "batch": "i", "dropout": "f", "nesterov": "b", "noise[3]": "f"}
    assert str(frame["optimizer.adam.warmup"].dtype) == "Int64"
    assert set(frame["activation"].map(type)) <= {str, type(identity), type(None), float}


def test_the_live_branch_of_a_nested_choice():
    tree = {"a": hpo.OneOf(b=hpo.OneOf(c=hpo.Int(1, 3), d={}), e=hpo.Float(3.0, 4.0))}
    result = study(tree, n=100)
    frame = result.to_dataframe()
    in_b = (frame["a"] == "b").to_numpy()
    in_c = in_b & (frame["a.b"] == "c").to_numpy()
    assert 0 < in_c.sum() < in_b.sum() < 100
    np.testing.assert_array_equal(frame["a.b"].notna(), in_b)
    np.testing.assert_array_equal(frame["a.b.c"].notna(), in_c)
    np.testing.assert_array_equal(frame["a.e"].notna(), ~in_b)


def test_hyperparameters_named_like_records():
    frame = study({"loss": hpo.Float(0.0, 1.0), "id": hpo.Int(5, 9)}, losses=[3.0, 2.0]).to_dataframe()
    assert list(frame.columns)[5:] == ["hparams.id", "hparams.loss"]
    assert frame["loss"].tolist() == [3.0, 2.0]
    assert frame["hparams.id"].between(5, 9).all()


def test_relaxed_weights_count_as_their_largest():
    result = study({"cell": hpo.Categorical(("conv", "pool", "skip"), relaxed=True)}, losses=[1.0, 2.0])
    weights = np.array([[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]], np.float32)
    trials = result.trials._replace(hparams={"cell": weights})
    result = Result(result.space, trials, None, 1.0, None, {}, "trials", 0.0, 0.0)
    assert result.to_dataframe()["cell"].tolist() == ["pool", "conv"]


def test_best_so_far_is_a_running_minimum_that_skips_failures():
    result = study(losses=[np.nan, 3.0, np.inf, 4.0, 2.0, -np.inf, np.nan, 2.5, 1.0])
    evaluations, best = result.best_so_far()
    assert evaluations.tolist() == list(range(1, 10))
    assert best.tolist() == [np.inf, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0]
    result = study()
    loss = result.trials.loss.astype(float)
    np.testing.assert_array_equal(result.best_so_far()[1], np.fmin.accumulate(loss))


def test_each_trial_counts_once_at_its_lowest_loss():
    ids, losses = [3, 1, 2, 1, 3, 2, 0, 4], [0.5, 0.9, np.nan, 0.5, 0.7, 0.8, np.nan, np.inf]
    trials = study(ids=ids, losses=losses).trials
    assert trials.id[trials.best()].tolist() == [3, 1, 2]
    assert trials.best().tolist() == [0, 3, 5]
    assert trials.best(1).tolist() == [0]
    assert trials.dead().tolist() == [6, 7]
    assert trials.size == 5


def test_a_table_shows_the_best_trials_and_what_failed():
    errors = {5: "ValueError: singular\nfrom solve", 22: "ValueError: singular"}
    result = study(errors=errors, steps=np.arange(200) + 1)
    best = result.trials.best(3)
    lines = str(result.table(3, parameters=2)).splitlines()
    assert lines[0].split() == [
        "rank",
        "id",
        "steps",
        "loss",
        "activation",
        "batch",
        "+",
        f"{len({name.split(chr(46))[0] for name in best_names(result, best)}) - 2}",
        "more",
    ]
    for line, row in zip(lines[2:5], best, strict=True):
        cells = line.split()
        assert cells[1:4] == [str(result.trials.id[row]), str(row + 1), f"{result.trials.loss[row]:.4g}"]
    assert lines[-1] == "12 of 200 trials failed: 10 × loss not finite, 2 × ValueError: singular"
    assert result.failures() == {"loss not finite": 10, "ValueError: singular": 2}


def best_names(result, rows):
    natives = [flat(result.space.native(result.trials.hparams, row)) for row in rows]
    return set().union(*natives) - {"clip"}


def test_a_table_leaves_markup_alone_and_out_what_is_not_live():
    tree = {
        "noise": hpo.Array(2, 0.0, 1.0),
        "name": hpo.Categorical(("[bold]x[/bold]",)),
        "o": hpo.OneOf(a={}, b=hpo.Int(1, 2)),
    }
    result = study(tree, losses=[1.0])
    text = str(result.table())
    assert "noise[0]" in text and "[bold]x[/bold]" in text
    chosen = result.best_hparams["o"]
    assert text.splitlines()[2].endswith(f"b (b={chosen['b']})" if chosen["choice"] == "b" else "a")


def test_failures_are_counted_by_kind():
    errors = {0: "ValueError: bad 0.1", 1: "ValueError: bad 0.2", 2: "OSError: disk"}
    result = study(losses=[np.nan] * 4 + [1.0], errors=errors)
    assert result.failures() == {"ValueError: 2 different messages": 2, "OSError: disk": 1, "loss not finite": 1}


def test_known_results_come_before_trials():
    result = study(ids=[-1, -2, 0, 1], losses=[0.5, 0.2, 0.3, 0.4])
    assert result.trials.size == 2
    assert [line.split()[1] for line in str(result.table()).splitlines()[2:]] == ["known", "0", "1", "known"]


def test_repr_is_one_short_line():
    assert repr(study()) == (
        f"Result(best_loss={study().best_loss:.6g}, trials=200, failed=12, stopped='trials', seconds=75, "
        "compile_seconds=2.5)"
    )
    assert "best_loss=nan" in repr(study(losses=[np.nan]))


def test_nothing_succeeded():
    result = study(losses=[np.nan, np.inf])
    assert str(result.table()).endswith("2 of 2 trials failed: 2 × loss not finite")
    assert len(result.to_dataframe()) == 2
    assert study(losses=[]).to_dataframe().shape == (0, 5 + result.space.dims)


def test_large_results_are_handled_by_column(monkeypatch):
    space = hpo.Space({name: SPACE[name] for name in ("lr", "width", "batch", "optimizer")})
    unit = np.random.default_rng(0).random((20_000, space.dims), dtype=np.float32)
    n = np.arange(20_000, dtype=np.int32)
    trials = Records(n, n, unit, jax.tree.map(np.asarray, space.decode(unit)), 0 * n, unit[:, 0])
    calls = []
    for parameter in (hpo.Float, hpo.Int, hpo.Ordinal, hpo.OneOf):
        native = parameter.native
        monkeypatch.setattr(parameter, "native", lambda self, x, native=native: calls.append(x) or native(self, x))
    frame = Result(space, trials, None, 0.0, None, {}, "trials", 0.0, 0.0).to_dataframe()
    assert len(frame) == 20_000 and frame["batch"].isin((16, 64, 256)).all()
    assert sorted(calls) == [16, 64, 256]


def test_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_dataframe needs pandas; install it with: pip install 'jaxhpo\[plot\]'"):
        study().to_dataframe()


@pytest.mark.parametrize("kind", ["best_so_far", "learning_curves", "parallel_coordinates", "slices"])
def test_without_matplotlib(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib; install it with: pip install 'jaxhpo\[plot\]'"):
        study().plot(kind)
    with pytest.raises(ImportError, match="report needs matplotlib"):
        study().report("never.html")


def test_an_unknown_plot():
    with pytest.raises(ValueError, match=r"kind must be one of \('best_so_far', .*\), got 'pie'"):
        study().plot("pie")


class Page(html.parser.HTMLParser):
    """A page read strictly: its text by tag, its references, and whether every tag is closed in order."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.references, self.ids, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.note(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.note(attrs)

    def note(self, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("dt", "dd", "td", "h1", "h2", "th"):
            self.text.append((self.open[-1], data))

    def of(self, tag):
        return [data for name, data in self.text if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    random = np.random.default_rng(0)
    ids = np.concatenate([np.arange(60), np.arange(20)])
    steps = np.repeat([3, 9], [60, 20])
    result = study(ids=ids, steps=steps, losses=random.lognormal(0, 1, 80), errors={})
    path = tmp_path_factory.mktemp("report") / "new" / "study.html"
    returned = result.report(path, title="<b>MLP</b> & digits", facts={"data <set>": "'digits' & more"})
    assert returned == path
    return result, path.read_text(encoding="utf-8")


def test_the_page_has_the_facts(written):
    result, text = written
    page = Page(text)
    facts = dict(zip(page.of("dt"), page.of("dd"), strict=True))
    assert facts["best loss"] == f"{result.best_loss:.6g}"
    assert facts["trials"] == "60" and facts["evaluations"] == "80"
    assert facts["longest training"] == "9 steps"
    assert facts["ended by"] == "trials"
    assert facts["time"] == "1 min 15 s, 2.5 s of it compiling"
    assert facts["width"] == str(result.best_hparams["width"])
    assert page.of("td")[:4] == ["1", str(result.trials.id[result.trials.best(1)[0]]), *page.of("td")[2:4]]
    assert page.of("td")[3] == f"{result.best_loss:.4g}"
    assert page.tags.count("svg") == 4
    assert {"Best so far", "Learning curves", "Parallel coordinates", "Slices"} <= set(page.of("h2"))


def test_the_page_needs_no_network(written):
    _, text = written
    page = Page(text)
    assert page.references
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert {r[1:] for r in page.references if r[0] == "#"} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    for foreign in ("http:", "https:", "@import", "<script", "<link"):
        assert foreign not in text


def test_the_page_escapes_what_users_write(written):
    _, text = written
    page = Page(text)
    assert "<b>" not in text and "<set>" not in text
    assert "".join(page.of("h1")) == "<b>MLP</b> & digits"
    assert "'digits' & more" in page.of("dd")


def test_the_page_follows_light_and_dark(written):
    from jaxhpo.views import plots

    _, text = written
    assert "prefers-color-scheme: dark" in text and "var(--ink)" in text
    assert not any(colour in text for colour in (plots.INK, plots.FAINT, plots.PAPER))


def test_the_page_of_a_study_in_which_all_failed(tmp_path):
    result = study(losses=[np.nan] * 3, errors={0: "ValueError: <no>"})
    page = Page(result.report(tmp_path / "failed.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 0
    assert page.of("td") == ["2", "loss not finite", "1", "ValueError: <no>"]
    assert page.of("h1") == ["Hyperparameter study"]
