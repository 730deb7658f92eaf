"""What tests of meshes run: in one process with 8 devices, or in several that have 8 together."""

import pickle
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jaxhpo as hpo
from jaxhpo import checkpoint, device
from tests.problems import MIXED, Counter, exact

KEY = jax.random.key(3)
DEVICES = 8
COUNTER = Counter().trainable
RACE = hpo.hyperband(MIXED, max_steps=9, batch=12)
SMALL_RACE = hpo.hyperband(MIXED, max_steps=9, batch=5)
LONG_RACE = hpo.hyperband(MIXED, max_steps=27, batch=6, cycles=3)
SIDE = 64
FLAX_SPACE = {
    "width": hpo.Int(4, 16, log=True),
    "dropout": hpo.Float(0.0, 0.3),
    "optimizer": hpo.OneOf(sgd={"lr": hpo.Float(1e-3, 0.1, log=True)}, adam={"lr": hpo.Float(1e-3, 1e-2, log=True)}),
}


def flax_objective():
    """Fifty training steps of an MLP."""
    x = jax.random.normal(jax.random.key(0), (256, 6))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32) + (x[:, 2] > 1)
    trainable = hpo.flax_trainable(
        model=lambda h: hpo.MLP(3, 16, 2, width=h["width"], dropout=h["dropout"]),
        optimizer=lambda h: hpo.select_optimizer(
            h["optimizer"], {"sgd": lambda b: optax.sgd(b["lr"], 0.9), "adam": lambda b: optax.adam(b["lr"])}
        ),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=(x[:192], y[:192]),
        valid=(x[192:], y[192:]),
        batch_size=32,
    )
    return hpo.unroll(trainable, steps=50)


def searches(mesh=None):
    """Studies whose results may not depend on the mesh."""
    race = hpo.minimize(COUNTER, RACE, key=KEY, mesh=mesh)
    return {
        "race": (race.trials, jax.device_get(race.best_state), race.best_hparams),
        "5 lanes": hpo.minimize(COUNTER, SMALL_RACE, key=KEY, mesh=mesh).trials,
        "3 lanes": hpo.minimize(COUNTER, SMALL_RACE, key=KEY, mesh=mesh, lanes=3).trials,
        "box": hpo.minimize(
            exact, hpo.differential_evolution(MIXED, population=12), key=KEY, mesh=mesh, rounds=4
        ).trials,
        "flax": hpo.minimize(
            flax_objective(), hpo.random(FLAX_SPACE, batch=16), key=KEY, mesh=mesh, rounds=1
        ).trials.loss,
    }


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
        "bank": carry.bank.states.nbytes if hasattr(carry.bank.states, "nbytes") else carry.bank.states.size * 4,
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

    def message(**arguments):
        try:
            hpo.minimize(COUNTER, LONG_RACE, key=KEY, mesh=mesh, **arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    stopped = hpo.minimize(COUNTER, LONG_RACE, key=KEY, mesh=mesh, callbacks=stop)
    timed = hpo.minimize(
        COUNTER, LONG_RACE, key=KEY, mesh=mesh, time_limit=1.0, callbacks=lambda report: time.sleep(0.2)
    )
    return {
        "calls": calls,
        "stopped": (stopped.stopped, stopped.trials, stopped.seconds),
        "timed": (timed.stopped, timed.trials),
        "failed": message(callbacks=fail),
        "unlike": message(rounds=2 + jax.process_index(), lanes=4 + jax.process_index()),
        "external": message_of_external(mesh),
    }


def message_of_external(mesh):
    """Why an external function takes no mesh of several processes."""
    try:
        hpo.minimize(hpo.external(abs), hpo.random(MIXED), key=KEY, mesh=mesh, trials=4)
    except ValueError as error:
        return str(error)


def main(folder, count, index):
    """Writes what came of it to a file in `folder`."""
    mesh = jax.make_mesh((DEVICES,), ("lanes",))
    # Stops after every round and saves each time.
    checkpoint.SHARE, device.CHUNK_SECONDS = 1.0, 1e-6
    name = f"{count} processes"
    out = {"devices": jax.device_count(), "searches": searches(mesh)}
    # Only the first process has these files.
    root = folder if index == 0 else Path("/not/here")
    part = {"key": KEY, "directory": root / name}
    hpo.minimize(COUNTER, LONG_RACE, mesh=mesh, rounds=3, **part)
    if count == 1:
        out["cost"] = cost(mesh)
        shutil.copytree(folder / name, folder / "4 devices")
        half = jax.make_mesh((4,), ("lanes",), devices=jax.devices()[:4])
        part["directory"] = folder / "4 devices"
        out["resumed"] = hpo.minimize(COUNTER, LONG_RACE, mesh=half, **part).trials
    else:
        out["resumed"] = hpo.minimize(COUNTER, LONG_RACE, mesh=mesh, rounds=5, **part).trials
        out["decisions"] = decisions(mesh)
    with open(folder / f"{name} {index}.pickle", "wb") as file:
        pickle.dump(out, file)
    if count > 1:
        part["directory"] = root / "killed"
        hpo.minimize(COUNTER, LONG_RACE, mesh=mesh, callbacks=lambda report: time.sleep(0.2), **part)
