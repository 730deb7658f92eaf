"""The study that tests of resuming kill; imported once, in the process from which the others are forked."""

import pickle
import time

import jax
import orbax.checkpoint  # noqa: F401

import jaxhpo as hpo
from jaxhpo.engine import checkpoint, device
from tests.problems import Counter

SPACE = {"x": hpo.Float(-5.0, 5.0), "n": hpo.Int(1, 8)}


def pause(report):
    """So that there is time to be killed in."""
    time.sleep(0.01)


def run(directory, out, cache):
    """Runs the study, or what is left of it, saving as often as it can, and writes its result."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    checkpoint.SHARE, device.CHUNK_SECONDS = 1.0, 1e-6
    method = hpo.hyperband(SPACE, max_steps=27, batch=8)
    result = hpo.minimize(
        Counter().trainable, method, key=jax.random.key(11), directory=directory, callbacks=pause, progress=False
    )
    state = jax.device_get(result.best_state)
    with open(out, "wb") as file:
        pickle.dump((result.trials, result.best_hparams, result.best_loss, state), file)
