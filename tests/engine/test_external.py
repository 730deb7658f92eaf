import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxhpo as hpo
from tests.functions import crash, loss

KEY = jax.random.key(2)
SPACE = {"x": hpo.Float(-1.0, 1.0), "kind": hpo.Categorical(("a", "b"))}


def traced(key, h):
    return h["x"] ** 2 + (h["kind"] == 1)


def test_equals_the_traced_study():
    method = hpo.random(SPACE, batch=4)
    outside = hpo.minimize(hpo.external(loss, workers=2), method, key=KEY, trials=20)
    inside = hpo.minimize(traced, method, key=KEY, trials=20)
    assert outside.trials.id.tolist() == inside.trials.id.tolist() == list(range(20))
    assert np.array_equal(outside.trials.unit, inside.trials.unit)
    assert np.allclose(outside.trials.loss, inside.trials.loss, rtol=1e-6)
    assert outside.best_hparams == inside.best_hparams and outside.errors == {}


def remembering(batch):
    """A method whose asks depend on all that was told, in order, and on what is pending."""
    import jax.numpy as jnp

    inner = hpo.random(SPACE, batch=batch)

    def ask(key, state, pending=None):
        trials, rest = inner.ask(key, state[0])
        waits = 0 if pending is None else jnp.where(pending.active, pending.unit[:, 0], 0).sum()
        unit = trials.unit.at[:, 0].set((trials.unit[:, 0] + state[1] + waits) % 1)
        return trials._replace(unit=unit, hparams=inner.space.decode(unit)), (rest, state[1])

    def tell(state, trials, losses, gradients=None):
        return state[0], (state[1] * 0.7 + jnp.where(trials.active, losses, 0).sum()) % 1

    init = lambda key, settings=None: (inner.init(key), jnp.float32(0))  # noqa: E731
    return inner._replace(init=init, ask=ask, tell=tell)


@pytest.mark.parametrize("batch", [1, 3])
def test_timing_does_not_change_the_result(batch):
    def jittery(seed):
        delays = np.random.default_rng(seed).uniform(0, 0.01, 64)
        turn = iter(delays)
        return lambda h: time.sleep(next(turn)) or loss(h)

    runs = [
        hpo.minimize(hpo.external(jittery(s), workers=3, pool="thread"), remembering(batch), key=KEY, trials=24)
        for s in range(3)
    ]
    for run in runs[1:]:
        assert np.array_equal(run.trials.unit, runs[0].trials.unit)
        assert np.array_equal(run.trials.loss, runs[0].trials.loss)
    alone = hpo.minimize(hpo.external(loss, workers=1, pool="thread"), remembering(batch), key=KEY, trials=24)
    assert not np.array_equal(alone.trials.unit, runs[0].trials.unit)


def test_workers_are_not_idle_while_asks_are_left():
    running, most, lock = 0, [], threading.Lock()

    def watched(h):
        nonlocal running
        with lock:
            running += 1
            most.append(running)
        time.sleep(0.02 if len(most) % 4 else 0.06)
        with lock:
            running -= 1
        return loss(h)

    hpo.minimize(hpo.external(watched, workers=4, pool="thread"), hpo.random(SPACE, batch=4), key=KEY, trials=48)
    assert max(most) == 4 and np.mean(np.array(most[4:-4]) >= 3) > 0.9


def test_exceptions_are_failed_trials():
    def picky(h):
        if h["kind"] == "b":
            raise OSError("no b here")
        return h["x"] ** 2

    result = hpo.minimize(hpo.external(picky, pool="thread"), hpo.random(SPACE, batch=4), key=KEY, trials=16)
    failed = result.trials.id[np.isnan(result.trials.loss)].tolist()
    assert result.errors == {id: "OSError: no b here" for id in failed} and 0 < len(failed) < 16
    assert result.best_hparams["kind"] == "a"
    with pytest.raises(hpo.AllTrialsFailed, match="ZeroDivisionError: division by zero"):
        hpo.minimize(hpo.external(lambda h: 1 / 0, pool="thread"), hpo.random(SPACE, batch=4), key=KEY, trials=4)


def test_a_dead_worker_fails_its_own_trial_only():
    result = hpo.minimize(hpo.external(crash, workers=2), hpo.random(SPACE, batch=3), key=KEY, trials=6)
    kinds = result.trials.hparams["kind"]
    assert np.isnan(result.trials.loss).tolist() == (kinds == 1).tolist()
    assert (
        set(result.errors.values()) == {"the worker process died, or what it raised cannot be unpickled"}
        and 0 < len(result.errors) < 6
    )


def test_what_was_told_survives_a_kill(tmp_path):
    calls = []

    def counted(h):
        calls.append(h)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return loss(h)

    method = remembering(2)
    with pytest.raises(KeyboardInterrupt):
        hpo.minimize(hpo.external(counted, pool="thread"), method, key=KEY, trials=20, directory=tmp_path)
    with open(tmp_path / "told.jsonl", "a") as file:
        file.write('{"id": 17, "lo')
    known = [json.loads(line)["id"] for line in (tmp_path / "told.jsonl").read_text().splitlines()[:10]]
    assert sorted(known) == list(range(10))
    resumed = hpo.minimize(hpo.external(counted, pool="thread"), method, key=KEY, trials=20, directory=tmp_path)
    assert len(calls) == 21
    straight = hpo.minimize(hpo.external(loss, pool="thread"), method, key=KEY, trials=20)
    assert np.array_equal(resumed.trials.loss, straight.trials.loss)
    again = hpo.minimize(hpo.external(counted, pool="thread"), method, key=KEY, trials=20, directory=tmp_path)
    assert len(calls) == 21 and again.best_hparams == straight.best_hparams


def test_a_journal_is_for_the_points_that_were_asked(tmp_path):
    method = remembering(1)
    run = lambda workers, directory=None: hpo.minimize(  # noqa: E731
        hpo.external(loss, workers=workers, pool="thread"), method, key=KEY, trials=12, directory=directory
    )
    run(1, tmp_path)
    assert np.array_equal(run(3, tmp_path).trials.loss, run(3).trials.loss)


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import jax, jaxhpo as hpo\n"
        "hpo.minimize(hpo.external(abs, workers=1), hpo.random(hpo.Float(0, 1)), key=jax.random.key(0), trials=4)\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True
    )
    assert run.returncode == 1 and b"if __name__ == '__main__':" in run.stderr.splitlines()[-1]


def test_open_ended_studies_have_room(monkeypatch):
    room = []
    monkeypatch.setitem(hpo.external.__globals__, "OPEN_ROWS", 256)
    method = hpo.random(SPACE, batch=80)._replace(reserve=lambda state, rows: room.append(rows) or state)
    result = hpo.minimize(hpo.external(loss, pool="thread"), method, key=KEY, target=-1.0, patience=1500)
    assert room == [256 * 8**i for i in range(len(room))] and room[-1] >= len(result.trials.id) > room[-2]


def test_target_and_time_limit():
    method = hpo.random(SPACE, batch=2)
    hit = hpo.minimize(hpo.external(loss, workers=2, pool="thread"), method, key=KEY, trials=400, target=0.05)
    assert hit.stopped == "target" and (hit.trials.loss[:-2] > 0.05).all() and hit.best_loss <= 0.05

    def slow(h):
        time.sleep(0.2 if h["x"] < 0 else 0.01)
        return loss(h)

    begun = time.perf_counter()
    late = hpo.minimize(hpo.external(slow, workers=2, pool="thread"), method, key=KEY, time_limit=0.6)
    assert late.stopped == "time_limit" and time.perf_counter() - begun < 5
    assert not np.isnan(late.trials.loss).any()


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        ((3,), TypeError, "fn must be a function of one dict, got 3"),
        ((lambda h: 0.0,), ValueError, "cannot be sent to another process.*pool='thread'"),
        ((loss, 0), ValueError, "workers must be at least 1, got 0"),
        ((loss, 1, "fork"), ValueError, "pool must be 'process' or 'thread', got 'fork'"),
    ],
)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind, match=words):
        hpo.external(*arguments)


def test_full_disk_is_a_warning(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device.*the study goes on"):
        result = hpo.minimize(
            hpo.external(loss, pool="thread"), hpo.random(SPACE, batch=2), key=KEY, trials=4, directory=tmp_path
        )
    assert len(result.trials.id) == 4 and math.isfinite(result.best_loss)
