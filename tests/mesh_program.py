"""What tests of meshes run: in one process with 8 devices, or in several that have 8 together."""

import pickle
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jaxhpo as hpo
from jaxhpo.engine import checkpoint, device
from tests.problems import MIXED, Counter, exact

KEY = jax.random.key(3)
DEVICES = 8
COUNTER = Counter().trainable
RACE = hpo.hyperband(MIXED, max_steps=27, batch=12)
SIDE = 64
FLAX_SPACE = {"width": hpo.Int(4, 16, log=True), "lr": hpo.Float(1e-3, 1e-1, log=True)}


def flax_objective():
    """Fifty training steps of an MLP."""
    x = jax.random.normal(jax.random.key(0), (256, 6))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32) + (x[:, 2] > 1)
    trainable = hpo.flax_trainable(
        model=lambda h: hpo.MLP(3, 16, 1, width=h["width"]),
        optimizer=lambda h: optax.adam(h["lr"]),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=(x[:192], y[:192]),
        valid=(x[192:], y[192:]),
        batch_size=32,
    )
    return hpo.unroll(trainable, steps=50)


def searches(mesh=None):
    """Studies whose results may not depend on the mesh; 8 devices divide neither 12 trials nor 5."""
    race = hpo.minimize(COUNTER, RACE, key=KEY, mesh=mesh)
    box = hpo.differential_evolution(MIXED, population=5)
    training = hpo.random(FLAX_SPACE, batch=16)
    return {
        "race": (race.trials, jax.device_get(race.best_state), race.best_hparams),
        "box": hpo.minimize(exact, box, key=KEY, mesh=mesh, rounds=4).trials,
        "flax": hpo.minimize(flax_objective(), training, key=KEY, mesh=mesh, rounds=1).trials.loss,
    }


def begin(mesh, directory):
    """The first rounds of the race, on disk."""
    hpo.minimize(COUNTER, RACE, key=KEY, mesh=mesh, directory=directory, callbacks=lambda report: report.rounds == 3)


def cost(mesh=None):
    """Of a chunk of training rounds on one device: operations, bytes that are updated in place, those of the bank."""
    weights = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    trainable = hpo.Trainable(
        init=lambda key, h: jnp.full((SIDE, SIDE), h["x"]),
        step=lambda key, state, h: state + jnp.tanh(state @ weights),
        evaluate=lambda state, h: state.mean(),
    )
    method = hpo.hyperband(MIXED, max_steps=9, batch=16)
    plan = device.Plan(trainable, method, None, mesh, None)
    carry = jax.eval_shape(lambda: device.engine_of(plan).start(KEY, method.settings, 16))
    program = device.lower(plan, 4, carry, KEY)[0].compile()
    return {
        "flops": program.cost_analysis()["flops"],
        "in place": program.memory_analysis().alias_size_in_bytes,
        "bank": carry.bank.states.size * 4,
        "incumbent": SIDE * SIDE * 4,
    }


def decisions(mesh):
    """What the first process decides for all."""
    calls = []

    def stop(report):
        calls.append(report.rounds)
        return report.rounds >= 2

    def fail(report):
        raise KeyError("no such run")

    def message(problem=COUNTER, method=RACE, **arguments):
        try:
            hpo.minimize(problem, method, key=KEY, mesh=mesh, **arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    stopped = hpo.minimize(COUNTER, RACE, key=KEY, mesh=mesh, callbacks=stop)
    timed = hpo.minimize(COUNTER, RACE, key=KEY, mesh=mesh, time_limit=2.0, callbacks=pause)
    index = jax.process_index()
    return {
        "calls": calls,
        "stopped": (stopped.stopped, stopped.trials, stopped.seconds),
        "timed": (timed.stopped, timed.trials),
        "failed": message(callbacks=fail),
        "unlike": message(rounds=2 + index, lanes=4 + index),
        "external": message(hpo.external(abs), hpo.random(MIXED), trials=4),
    }


def pause(report):
    """A callback that takes its time."""
    time.sleep(0.2)


def main(folder, count, index):
    """Writes what came of it to a file in `folder`."""
    mesh = jax.make_mesh((DEVICES,), ("lanes",))
    # Stops after every round and saves each time.
    checkpoint.SHARE, device.CHUNK_SECONDS = 1.0, 1e-6
    name = f"{count} processes"
    # Only the first process has these files.
    root = folder if index == 0 else Path("/not/here")
    out = {"devices": jax.device_count(), "searches": searches(mesh)}
    begin(mesh, root / name)
    if count == 1:
        out["cost"] = cost(mesh)
        trace = jax.jit(hpo.study(COUNTER, RACE, lanes=3, mesh=mesh))(KEY)[1]
        out["3 lanes"] = jax.device_get(trace.losses[trace.trials.active])
        shutil.copytree(folder / name, folder / "4 devices")
        mesh = jax.make_mesh((4,), ("lanes",), devices=jax.devices()[:4])
        out["resumed"] = hpo.minimize(COUNTER, RACE, key=KEY, mesh=mesh, directory=folder / "4 devices").trials
    else:
        begin(mesh, root / "other")
        out["resumed"] = hpo.minimize(COUNTER, RACE, key=KEY, mesh=mesh, directory=root / "other").trials
        out["decisions"] = decisions(mesh)
    with open(folder / f"{name} {index}.pickle", "wb") as file:
        pickle.dump(out, file)
    if count > 1:
        hpo.minimize(COUNTER, RACE, key=KEY, mesh=mesh, directory=root / "killed", callbacks=pause)
