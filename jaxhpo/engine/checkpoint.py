"""A study on disk: what it is, and where it stands."""

import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhpo.engine.digest import canonical, digest, program
from jaxhpo.method import Method, bare
from jaxhpo.space import working_dtype

PyTree = Any
KEPT = 2
SHARE = 0.05


def describe(method: Method, key: jax.Array, initial: Any, repeats: int, problem: Any) -> dict[str, str]:
    """What makes a study this study: a digest of each part."""
    state = jax.eval_shape(bare(method.init), key, method.settings)
    trials = jax.eval_shape(lambda k, s: method.ask(k, s)[0], key, state)
    losses = jax.ShapeDtypeStruct((method.batch,), working_dtype())
    gradients = (trials.hparams,) if method.uses_gradients else ()
    functions = [
        program(lambda k, s: method.ask(k, s), key, state),
        program(lambda s, t, x, *g: method.tell(s, t, x, *g), state, trials, losses, *gradients),
    ]
    parts = {
        "space": method.space.tree,
        "settings": jax.tree.map(np.asarray, method.settings),
        "method": (method.name, method.rounds, method.slots, method.lookback, *functions),
        "batch": method.batch,
        "key": np.asarray(jax.random.key_data(key)),
        "initial": initial,
        "repeats": repeats,
        "problem": type(problem).__name__,
        "shapes": [(x.dtype.name, x.shape) for x in jax.tree.leaves(state)],
    }
    return {name: digest(canonical(part)) for name, part in parts.items()}


def _checkpointer() -> Any:
    """orbax for the arrays of this process, which waits for no other."""
    import orbax.checkpoint as ocp

    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"jaxhpo{mine}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


class Directory:
    """Where a study keeps itself between runs.

    Args:
      path: made if it does not exist.
      description: of the study, from `describe`.

    Raises:
      ValueError: `path` holds another study.
    """

    def __init__(self, path: str | os.PathLike, description: dict[str, str]):
        self.path = Path(path).absolute()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"directory={str(path)!r} is a file; give a directory, it is made if it does not exist")
        self.path.mkdir(parents=True, exist_ok=True)
        for part in self.path.glob("rounds-*"):
            if not part.name.removeprefix("rounds-").isdigit():  # begun by a run that was killed
                shutil.rmtree(part, ignore_errors=True)
        self.saved, self.cost = -1e9, 0.0
        label = self.path / "study.json"
        if label.exists():
            found = json.loads(label.read_text())
            other = [name for name in description if found.get(name) != description[name]]
            if other:
                raise ValueError(
                    f"directory={str(path)!r} holds another study, which differs in {', '.join(other)}; give another "
                    "directory, or delete this one"
                )
        else:
            draft = self.path / f"study.json.{os.getpid()}"
            draft.write_text(json.dumps(description, indent=1))
            draft.replace(label)

    @property
    def journal(self) -> Path:
        """File for the outcomes of external evaluations."""
        return self.path / "told.jsonl"

    def _checkpoints(self) -> list[tuple[int, Path]]:
        found = [(int(p.name.split("-")[1]), p) for p in self.path.glob("rounds-*") if p.name.split("-")[1].isdigit()]
        return sorted(found)

    def due(self, now: float) -> bool:
        """Whether saving again takes at most a twentieth of the time."""
        return now - self.saved >= self.cost / SHARE

    def save(self, rounds: int, content: PyTree) -> None:
        """Writes a checkpoint; a full disk is a warning, and the one before stays."""
        begun = time.monotonic()
        target = self.path / f"rounds-{rounds}"
        if target.exists():
            return
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(target, content)
            for _, old in self._checkpoints()[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, ValueError) as error:
            warnings.warn(f"no checkpoint in {self.path}: {error}; the study goes on", stacklevel=2)
        self.saved = time.monotonic()
        self.cost = self.saved - begun

    def load(self) -> PyTree | None:
        """The newest checkpoint that can be read, `None` if there is none."""
        for _, path in reversed(self._checkpoints()):
            try:
                with _checkpointer() as checkpointer:
                    return checkpointer.restore(path)
            except (OSError, ValueError, KeyError) as error:
                warnings.warn(f"{path} cannot be read ({error}); the checkpoint before is used", stacklevel=2)
                shutil.rmtree(path, ignore_errors=True)
        return None
