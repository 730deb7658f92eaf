"""Where a training state comes from: the schedule of hyperparameters that it was trained with, and how to replay it.

A trial that copies another's training state goes on from there with hyperparameters of its own. So what trained a
network is a chain of trials, each up to the step at which the next one took over.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.text import Text

from jaxhpo.checks import one_key
from jaxhpo.engine.digest import canonical
from jaxhpo.engine.lanes import raw_of
from jaxhpo.records import Records, take, texts
from jaxhpo.space import Space, working_dtype
from jaxhpo.trainable import Trainable, hoist, unjitted
from jaxhpo.views.table import TextTable

PyTree = Any
FEWEST = 16


class Segment(NamedTuple):
    """A stretch of training with hyperparameters that stay."""

    id: int
    """the trial"""
    start: int
    """training steps before it"""
    stop: int
    """training steps after it"""
    hparams: PyTree
    """native Python values"""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """The hyperparameters with which a network was trained, from its first step to its last.

    Args:
      space: what was searched.
      id: i32[segments], the trials.
      stop: i32[segments], training steps behind the network at the end of each, increasing.
      loss: float[segments], then.
      hparams: shaped like the space, arrays [segments, ...].

    Example:
      >>> import jax, jaxhpo as hpo
      >>> decay = hpo.Trainable(
      ...     init=lambda key, h: jax.numpy.float32(1), step=lambda key, x, h: x * h["rate"], evaluate=lambda x, h: x)
      >>> method = hpo.successive_halving({"rate": hpo.Float(0.5, 1.0)}, trials=9, max_steps=9, batch=9)
      >>> result = hpo.minimize(decay, method, key=jax.random.key(0), progress=False)
      >>> schedule = result.schedule()[0]
      >>> [(segment.start, segment.stop) for segment in schedule.segments]
      [(0, 9)]
      >>> abs(hpo.replay(decay, schedule, jax.random.key(0)).loss - result.best_loss) < 1e-6
      Array(True, dtype=bool)
    """

    space: Space
    id: np.ndarray
    stop: np.ndarray
    loss: np.ndarray
    hparams: PyTree

    @property
    def start(self) -> np.ndarray:
        """i32[segments]: training steps before each."""
        return np.concatenate([np.zeros(1, np.int32), self.stop[:-1]])

    @property
    def segments(self) -> list[Segment]:
        """One after the other."""
        bounds = zip(self.id.tolist(), self.start.tolist(), self.stop.tolist(), strict=True)
        return [Segment(*bound, self.space.native(self.hparams, i)) for i, bound in enumerate(bounds)]

    def __len__(self) -> int:
        return len(self.id)

    def __repr__(self) -> str:
        return f"Schedule(segments={len(self)}, steps={self.stop[-1]}, loss={self.loss[-1]:.6g})"

    def table(self) -> TextTable:
        """The segments, a row each, to `print` or to show in a notebook."""
        table = TextTable()
        cells = texts(self.space, self.hparams)
        for name in ("id", "from", "to", "loss"):
            table.add_column(Text(name), justify="right", no_wrap=True)
        for name in cells:
            table.add_column(Text(name), overflow="fold")
        for i, segment in enumerate(self.segments):
            head = str(segment.id), str(segment.start), str(segment.stop), f"{self.loss[i]:.4g}"
            table.add_row(*(Text(cell) for cell in (*head, *(column[i] for column in cells.values()))))
        return table


def lineage(space: Space, records: Records, row: int) -> Schedule:
    """How the training state came to be that was evaluated in a row of `records`.

    Raises:
      ValueError: that row is not one of training.
    """
    if records.round[row] < 0 or not records.steps[row]:
        raise ValueError(
            f"trial {records.id[row]} was not trained in the study, so it has no schedule; methods that train in "
            "stretches, such as hpo.pbt, have them"
        )
    rows = [row]
    while True:
        mine = np.flatnonzero((records.id == records.id[rows[-1]]) & (records.round <= records.round[rows[-1]]))
        parent = -1 if records.parent is None else records.parent[mine[0]]
        if parent < 0:
            break
        before = (records.id == parent) & (records.round < records.round[mine[0]])
        rows.append(int(np.flatnonzero(before)[-1]))
    at = np.array(rows[::-1])
    return Schedule(space, records.id[at], records.steps[at], records.loss[at], take(records.hparams, at))


def survivors(space: Space, records: Records) -> list[Schedule]:
    """`Result.schedule`."""
    if not (records.steps > 0).any():
        raise ValueError(
            "the trials of this study carry no training steps, so there are no schedules; methods that train in "
            "stretches, such as hpo.pbt, have them"
        )
    last = np.unique(records.id[::-1], return_index=True)[1]
    last = len(records.id) - 1 - last
    alive = (records.round[last] == records.round.max()) | (records.steps[last] == records.steps.max())
    rows = last[alive & ~records.failed[last]]
    rows = rows[np.argsort(records.loss[rows], kind="stable")]
    return [lineage(space, records, int(row)) for row in rows]


class Replay(NamedTuple):
    """What came of a schedule."""

    loss: jax.Array
    """float[]: at its end"""
    state: PyTree
    """the training state then"""


class _Plan:
    """What a compiled replay depends on; equal when it can be shared."""

    def __init__(self, trainable: Trainable, space: Space, segments: int, key: jax.Array):
        self.parts = trainable, space, segments, jax.ShapeDtypeStruct((), key.dtype)
        # Spaces that differ in a constant are equal, but not to what is trained here.
        constants = canonical(space.tree, opaque=lambda value: f"{id(value)}")
        self.key = trainable, space, constants, segments, key.dtype, working_dtype()

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Plan) and self.key == other.key


@functools.lru_cache(maxsize=16)
def _program(plan: _Plan) -> tuple[Callable, list, Callable]:
    """`(arrays, key, id, stop, hparams) -> (loss, state)`, compiled at its first call; those arrays; and `restore`."""
    trainable, space, segments, key_shape = plan.parts
    raw = raw_of(unjitted(trainable), space, jax.eval_shape(lambda: space.decode(jnp.zeros(space.dims))))

    def run(key: jax.Array, id: jax.Array, stop: jax.Array, hparams: PyTree) -> tuple[jax.Array, PyTree]:
        _, trials_key = jax.random.split(key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(trials_key, id)
        of = lambda i: (keys[i], jax.tree.map(lambda x: x[i], hparams))  # noqa: E731

        def step(i: jax.Array, state: PyTree) -> PyTree:
            trial_key, now = of((stop <= i).sum(dtype=jnp.int32))
            return raw.step(trial_key, state, now, i + 1)

        state = jax.lax.fori_loop(0, stop[-1], step, raw.init(*of(0)))
        return raw.evaluate(state, of(-1)[1]), state

    example = jnp.zeros(segments, jnp.int32)
    hparams = jax.eval_shape(space.decode, jax.ShapeDtypeStruct((segments, space.dims), working_dtype()))
    function, data = hoist(run, key_shape, example, example, hparams)
    return jax.jit(function), jax.device_put(data), raw.restore


def replay(trainable: Trainable, schedule: Schedule, key: jax.Array) -> Replay:
    """Trains a network by a schedule.

    With the key of the study that found it, every step has the key that it had then, and the network is the same again,
    but for rounding. Another key gives a fresh one. Compiles once for all schedules of about the same length, and may
    be batched over keys by `jax.vmap`.

    Args:
      trainable: how a network trains, as in the study.
      schedule: from `Result.schedule` or `Result.best_schedule`.
      key: a PRNG key, as the study's.

    Returns:
      The loss and the training state at the end.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> walk = hpo.Trainable(
      ...     init=lambda key, h: jax.numpy.float32(0),
      ...     step=lambda key, x, h: x + h["drift"] + jax.random.normal(key),
      ...     evaluate=lambda x, h: x,
      ... )
      >>> method = hpo.pbt({"drift": hpo.Float(-1.0, 1.0)}, every=5, population=4)
      >>> result = hpo.minimize(walk, method, key=jax.random.key(0), rounds=8, progress=False)
      >>> schedule = result.schedule()[0]
      >>> bool(abs(hpo.replay(walk, schedule, jax.random.key(0)).loss - schedule.loss[-1]) < 1e-4)
      True
      >>> keys = jax.random.split(jax.random.key(1), 20)
      >>> jax.vmap(lambda key: hpo.replay(walk, schedule, key))(keys).loss.shape
      (20,)
    """
    if not isinstance(trainable, Trainable):
        raise TypeError(f"trainable must be a Trainable, got {trainable!r}; a schedule is of training steps")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {schedule!r}; say result.schedule()[0]")
    key = one_key(key, ", and jax.vmap for many")
    segments = max(FEWEST, 1 << (len(schedule) - 1).bit_length())
    run, data, restore = _program(_Plan(trainable, schedule.space, segments, key))
    padded = lambda x: np.concatenate([x, np.repeat(x[-1:], segments - len(schedule), 0)])  # noqa: E731
    arrays = padded(schedule.id), padded(schedule.stop), jax.tree.map(padded, schedule.hparams)
    loss, state = run(data, key, *arrays)
    return Replay(loss, restore(state))
