"""A study that is killed at any moment and resumed ends as if it had not been."""

import multiprocessing
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.engine import checkpoint
from tests import killed_study
from tests.problems import MIXED, Counter, assert_same, exact

KEY = jax.random.key(11)
KILLS = 20


class Runs:
    """The same study in many processes, all forked from one that has imported everything, and with its own files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([killed_study.__name__])

    def start(self, name: str) -> multiprocessing.process.BaseProcess:
        files = str(self.folder / name), str(self.folder / f"{name}.pickle"), str(self.folder / "cache")
        child = self.context.Process(target=killed_study.run, args=files)
        child.start()
        return child

    def has_checkpoint(self, name: str) -> bool:
        return any((self.folder / name).glob("rounds-*"))

    def has_ended(self, name: str) -> bool:
        return (self.folder / f"{name}.pickle").exists()

    def outcome(self, name: str):
        """What comes of the study, which is started or goes on."""
        child = self.start(name)
        child.join()
        assert child.exitcode == 0
        return pickle.loads((self.folder / f"{name}.pickle").read_bytes())


def test_killed_runs_end_like_the_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    runs = Runs(tmp_path)
    expected = runs.outcome("straight")
    begun = time.monotonic()
    runs.outcome("warm")
    whole = time.monotonic() - begun
    moments = np.random.default_rng(0).uniform(0, 1, KILLS)

    def kill_and_resume(i: int) -> bool:
        name = f"run{i}"
        child = runs.start(name)
        if i % 2:  # some time after the first checkpoint; the others at any time
            while not runs.has_checkpoint(name) and child.is_alive():
                time.sleep(0.002)
        time.sleep(moments[i] * whole * (0.3 if i % 2 else 1.0))
        child.kill()
        child.join()
        resumed = runs.has_checkpoint(name) and not runs.has_ended(name)
        assert_same(runs.outcome(name), expected)
        return resumed

    with ThreadPoolExecutor(2) as pool:
        resumed = sum(pool.map(kill_and_resume, range(KILLS)))
    assert resumed >= KILLS // 4


def test_a_finished_study_is_not_run_again(tmp_path):
    counter = Counter()
    method = hpo.hyperband(MIXED, max_steps=27, batch=8)
    first = hpo.minimize(counter.trainable, method, key=KEY, directory=tmp_path)
    second = hpo.minimize(counter.trainable, method, key=KEY, directory=tmp_path)
    assert_same(first.trials, second.trials)
    assert_same(jax.device_get(first.best_state), jax.device_get(second.best_state))
    assert second.compile_seconds == 0.0


def test_a_study_goes_on_with_a_larger_budget_and_other_lanes(tmp_path):
    counter = Counter()
    method = hpo.hyperband(MIXED, max_steps=27, batch=8)
    straight = hpo.minimize(counter.trainable, method, key=KEY)
    part = hpo.minimize(counter.trainable, method, key=KEY, directory=tmp_path, rounds=3)
    rest = hpo.minimize(counter.trainable, method, key=KEY, directory=tmp_path, lanes=3)
    assert part.stopped == "rounds" and len(part.trials.id) < len(rest.trials.id)
    assert_same(rest.trials, straight.trials)


@pytest.mark.parametrize(
    "change, part",
    [
        (dict(key=jax.random.key(1)), "key"),
        (dict(space={**MIXED, "n": hpo.Int(1, 9)}), "space"),
        (dict(space={**MIXED, "clip": 2.0}), "space"),
        (dict(batch=8), "batch"),
        (dict(repeats=2), "repeats"),
        (dict(make=hpo.quasirandom), "method"),
        (
            dict(
                initial=[
                    (
                        {
                            "x": 0.0,
                            "lr": 0.1,
                            "n": 1,
                            "act": "relu",
                            "opt": {"choice": "sgd", "sgd": {"momentum": 0.1}},
                        },
                        1.0,
                    )
                ]
            ),
            "initial",
        ),
    ],
)
def test_a_directory_that_holds_another_study(tmp_path, change, part):
    def run(key=KEY, space=MIXED, batch=4, make=hpo.random, **more):
        return hpo.minimize(exact, make(space, batch=batch), key=key, trials=8, directory=tmp_path, **more)

    run()
    with pytest.raises(
        ValueError, match=rf"directory='.*' holds another study, which differs in .*{part}.*; give another"
    ):
        run(**change)


def test_tables_of_the_same_shape_are_other_studies(tmp_path):
    def run(name, first, second, problem=exact):
        hpo.minimize(problem, first, key=KEY, directory=tmp_path / name)
        with pytest.raises(ValueError, match="differs in method"):
            hpo.minimize(problem, second, key=KEY, directory=tmp_path / name)

    space = {"x": hpo.Float(0.0, 1.0), "y": hpo.Float(0.0, 1.0)}
    sum_ = lambda key, h: h["x"] + h["y"]  # noqa: E731
    run("grid", hpo.grid(space, points={"x": 2, "y": 8}), hpo.grid(space, points={"x": 8, "y": 2}), sum_)
    race = [hpo.successive_halving({"x": hpo.Float(0.0, 1.0)}, trials=9, max_steps=9 * k, min_steps=k) for k in (1, 10)]
    run("halving", *race, Counter().trainable)


def test_a_space_with_functions_is_recognised(tmp_path):
    space = {"x": hpo.Float(0.0, 1.0), "act": hpo.Categorical((jax.nn.relu, np.tanh, lambda x: x)), "scale": np.ones(2)}
    results = []
    for _ in range(2):
        space = {**space, "scale": np.ones(2), "act": hpo.Categorical((jax.nn.relu, np.tanh, lambda x: x))}
        results.append(hpo.minimize(lambda key, h: h["x"], hpo.random(space), key=KEY, trials=16, directory=tmp_path))
    assert np.array_equal(results[0].trials.loss, results[1].trials.loss) and results[1].compile_seconds == 0.0


def test_a_full_disk_costs_the_checkpoint_only(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    counter = Counter()
    method = hpo.hyperband(MIXED, max_steps=27, batch=8)
    hpo.minimize(counter.trainable, method, key=KEY, directory=tmp_path, rounds=3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.warns(UserWarning, match="No space left on device.*the study goes on"):
        result = hpo.minimize(counter.trainable, method, key=KEY, directory=tmp_path)
    assert_same(result.trials, hpo.minimize(counter.trainable, method, key=KEY).trials)
    assert max(p.name for p in tmp_path.glob("rounds-*")) == "rounds-3"


def test_a_broken_checkpoint_is_passed_over(tmp_path):
    counter = Counter()
    method = hpo.hyperband(MIXED, max_steps=27, batch=8)
    for rounds in (3, 5):
        hpo.minimize(counter.trainable, method, key=KEY, directory=tmp_path, rounds=rounds)
    for file in (tmp_path / "rounds-5").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match="rounds-5 cannot be read"):
        result = hpo.minimize(counter.trainable, method, key=KEY, directory=tmp_path)
    assert_same(result.trials, hpo.minimize(counter.trainable, method, key=KEY).trials)


def test_saving_takes_a_twentieth_of_the_time():
    store = checkpoint.Directory.__new__(checkpoint.Directory)
    store.saved, store.cost = 100.0, 0.5
    assert [store.due(now) for now in (105.0, 109.9, 110.1)] == [False, False, True]
