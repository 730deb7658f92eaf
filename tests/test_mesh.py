"""What a mesh of devices, of one process or of several, may not change."""

import fcntl
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxhpo as hpo
from tests import mesh_program
from tests.mesh_program import COUNTER, KEY, RACE
from tests.problems import assert_same

ROOT = Path(__file__).parents[1]
START = """
import sys, jax
from pathlib import Path
folder, (count, index, port) = Path(sys.argv[1]), map(int, sys.argv[2:])
jax.config.update("jax_num_cpu_devices", 8 // count)
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index, shutdown_timeout_seconds=2)
from tests.mesh_program import main
main(folder, count, index)
"""


def start(folder: Path, count: int, index: int, port: int) -> subprocess.Popen:
    """One of the processes that have 8 devices together."""
    command = [sys.executable, "-c", START, str(folder), str(count), str(index), str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with open(folder / f"log {count} {index}", "wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def wait(ready, *processes: subprocess.Popen) -> None:
    """Until `ready()`, while the processes are alive."""
    while not ready():
        assert all(process.poll() is None for process in processes), "a process ended early"
        time.sleep(0.02)


def build(folder: Path) -> None:
    """Runs the studies on 8 devices of one process, and on two with 4 each, of which the second is killed."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start(folder, 2, index, port) for index in (0, 1)]
    alone = start(folder, 1, 0, port)
    try:
        wait(lambda: list((folder / "killed").glob("rounds-?")), *pair)
        pair[1].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        assert pair[0].wait(60) != 0
        (folder / "survived").write_text(str(time.monotonic() - begun))
        assert alone.wait() == 0
    finally:
        for process in (alone, *pair):
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, testrun_uid) -> Path:
    """What `build` leaves, made by the first of the test workers that comes here."""
    folder = tmp_path_factory.getbasetemp().parent / f"mesh {testrun_uid}"
    with open(f"{folder} lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            build(folder)
    return folder


def outcome(folder: Path, count: int, index: int = 0):
    """What a process wrote."""
    return pickle.loads((folder / f"{count} processes {index}.pickle").read_bytes())


@pytest.fixture(scope="module")
def expected():
    """The studies on one device."""
    return mesh_program.searches()


@pytest.mark.parametrize("count, index", [(1, 0), (2, 0), (2, 1)])
def test_devices_and_processes_give_the_result_of_one_device(folder, expected, count, index):
    out = outcome(folder, count, index)
    assert out["devices"] == 8
    losses = out["searches"].pop("flax")
    assert (
        np.allclose(losses, expected["flax"], rtol=1e-3, atol=0) and losses.min() < 0.75 < np.ptp(losses) + losses.min()
    )
    assert_same(out["searches"], {name: value for name, value in expected.items() if name != "flax"})


def test_a_device_trains_its_share_and_the_bank_is_updated_in_place(folder):
    one, eight = mesh_program.cost(), outcome(folder, 1)["cost"]
    assert one["flops"] / 8 < eight["flops"] < 1.1 * one["flops"] / 8
    for cost, devices in ((one, 1), (eight, 8)):
        assert cost["in place"] >= cost["bank"] / devices + cost["incumbent"]
        assert cost["bank"] > 8 * cost["incumbent"]


def test_the_first_process_decides_for_all(folder):
    first, second = (outcome(folder, 2, index)["decisions"] for index in (0, 1))
    assert first.pop("calls") == [1, 2] and second.pop("calls") == []
    assert first["stopped"][0] == "callback" and first["stopped"][1].round.max() == 1
    assert first["timed"][0] == "time_limit" and first["timed"][1].round.max() < RACE.rounds - 1
    assert first["failed"] == "KeyError: 'no such run'"
    assert "different arguments (budget, lanes)" in first["unlike"]
    assert "external function has its own workers" in first["external"]
    assert_same(first, second)


@pytest.mark.parametrize("name", ["1 processes", "2 processes", "killed"])
def test_what_a_mesh_saved_goes_on_with_one_device(folder, expected, name):
    saved = [int(path.name.split("-")[1]) for path in (folder / name).glob("rounds-*") if path.name[7:].isdigit()]
    reports: list = []
    resumed = hpo.minimize(COUNTER, RACE, key=KEY, directory=folder / name, callbacks=reports.append)
    assert 0 < max(saved) < RACE.rounds and reports
    assert_same(resumed.trials, expected["race"][0])


def test_what_8_devices_saved_goes_on_with_4(folder, expected):
    assert_same(outcome(folder, 1)["resumed"], expected["race"][0])


def test_lanes_that_do_not_divide_the_devices(folder, expected):
    assert_same(outcome(folder, 1)["3 lanes"], expected["race"][0].loss)


@pytest.mark.parametrize("index", [0, 1])
def test_only_the_first_process_needs_the_directory(folder, expected, index):
    assert_same(outcome(folder, 2, index)["resumed"], expected["race"][0])


def test_a_process_that_lost_another_ends_with_an_error(folder):
    assert float((folder / "survived").read_text()) < 30
    assert "Gloo" in (folder / "log 2 0").read_text()
