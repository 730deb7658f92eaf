"""Every evaluation of a study as arrays, and its hyperparameters as columns and as text."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhpo.codec import Leaf
from jaxhpo.parameters import Categorical, Int, OneOf, Ordinal, Parameter
from jaxhpo.space import Space

PyTree = Any


class Records(NamedTuple):
    """Every evaluation of a study, one row each, in the order told.

    A trial that trains in several stretches has a row for each. Results that the user brought along come first, in
    round -1, with ids below 0.
    """

    round: np.ndarray
    """i32[n]: the ask that it belongs to"""
    id: np.ndarray
    """i32[n]: the trial"""
    unit: np.ndarray
    """float[n, dims] in [0, 1]: the trial as a point of the unit cube"""
    hparams: PyTree
    """shaped like the space, arrays [n, ...]; constants are `None`"""
    steps: np.ndarray
    """i32[n]: training steps reached; 0 where trials carry none"""
    loss: np.ndarray
    """float[n]: lower is better; NaN and the infinities are failures"""
    parent: np.ndarray | None = None
    """i32[n]: the trial whose training state was continued, its own where it went on, -1 where it started afresh;
    `None` where that is not known"""
    gradient_norm: np.ndarray | None = None
    """float[n]: length of the gradient by the unit cube, and by the weights of relaxed choices; NaN where there is none
    and inf where it is not finite, `None` where none is known"""
    soft: np.ndarray | None = None
    """bool[n]: losses at soft weights of a relaxed choice, which are those of no choice; `None` where there are none"""

    @property
    def counts(self) -> np.ndarray:
        """bool[n]: which rows can be the best: their loss is finite, and that of what is written there."""
        return ~self.failed if self.soft is None else ~self.failed & ~self.soft

    @property
    def size(self) -> int:
        """How many trials ran."""
        return len(np.unique(self.id[self.id >= 0]))

    @property
    def failed(self) -> np.ndarray:
        """bool[n]: which rows have no finite loss."""
        return ~np.isfinite(self.loss)

    def best(self, n: int | None = None) -> np.ndarray:
        """The row with the lowest loss of each trial that has a finite one, best trial first; the `n` best of them.

        Ties go to the earlier row, as in the choice of the best training state.

        Returns:
          i64[m], rows.
        """
        order = np.argsort(np.where(self.counts, self.loss, np.inf), kind="stable")
        order = order[: np.count_nonzero(self.counts)]
        _, first = np.unique(self.id[order], return_index=True)
        return order[np.sort(first)][:n]

    def dead(self) -> np.ndarray:
        """The last row of each trial that has no finite loss: i64[m], by id."""
        ids = np.setdiff1d(self.id, self.id[~self.failed])
        rows = np.flatnonzero(np.isin(self.id, ids))[::-1]
        return rows[np.unique(self.id[rows], return_index=True)[1]]


def recorded(trace: Any, first: int) -> Records:
    """The active rows of a `Trace` whose first round is `first`, arrays [rounds, batch, ...]."""
    rounds, lanes = np.nonzero(trace.trials.active)
    take = lambda x: np.asarray(x)[rounds, lanes]  # noqa: E731
    loss, norms, soft = take(trace.losses), trace.gradient_norms, trace.soft
    return Records(
        round=(rounds + first).astype(np.int32),
        id=take(trace.trials.id),
        unit=take(trace.trials.unit),
        hparams=jax.tree.map(take, trace.trials.hparams),
        steps=take(trace.reached),
        loss=loss,
        parent=take(trace.parent),
        gradient_norm=np.full_like(loss, np.nan) if norms is None else take(norms),
        soft=np.zeros(len(loss), bool) if soft is None else take(soft),
    )


def joined(parts: list[Records]) -> Records:
    """The rows of all parts, one after the other."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *parts)


def refuse_minus_infinity(space: Space, records: Records) -> None:
    """Sees that no loss is -inf.

    Raises:
      ValueError: one is; the message says where.
    """
    where = np.flatnonzero(records.loss == -np.inf)
    if len(where):
        hparams = space.native(records.hparams, int(where[0]))
        raise ValueError(
            f"the loss of trial {records.id[where[0]]} is -inf, at {hparams}; a loss must be finite, or NaN for a "
            "trial that failed: look for log(0) or a division by 0 there"
        )


class Column(NamedTuple):
    """One dim of the space over the rows of some records."""

    name: str
    """path of the dim, such as "optimizer.sgd.momentum" """
    parameter: Parameter
    options: tuple | None
    """what the parameter chooses from, `None` where it is a number"""
    values: np.ndarray
    """[n]: numbers, or the index of the option"""
    live: np.ndarray
    """bool[n]: False where the branch that it belongs to is not chosen"""

    def native(self) -> np.ndarray:
        """[n]: Python values, options themselves; None or NaN where the dim is not live."""
        if self.options is not None:
            table = np.empty(len(self.options) + 1, object)
            for i, option in enumerate(self.options):
                table[i] = option
            return table[np.where(self.live, self.values, len(self.options))]
        if isinstance(self.parameter, Int):
            values = self.values.astype(object)
            values[~self.live] = None
            return values
        return np.where(self.live, self.values, np.nan)


def _options(parameter: Parameter) -> tuple | None:
    if isinstance(parameter, OneOf):
        return tuple(parameter.branches)
    return tuple(parameter.options) if isinstance(parameter, Categorical | Ordinal) else None


def _values(leaf: Leaf, array: np.ndarray) -> np.ndarray:
    """Numbers or indices of options, from what the leaf decodes to: [n, size]."""
    if leaf.kind == "relaxed":
        return np.argmax(array, axis=-1)[:, None]
    if leaf.kind in ("float", "int", "bool"):
        options = leaf.parameter.options
        seen, position = np.unique(array, return_inverse=True)
        natives = [leaf.parameter.native(value) for value in seen]
        levels = [next(i for i, option in enumerate(options) if option is native) for native in natives]
        return np.array(levels, int)[position][:, None]
    return array.reshape(len(array), leaf.size).astype(float if leaf.kind == "real" else np.int64)


def columns(space: Space, hparams: PyTree) -> list[Column]:
    """The hyperparameters of many trials, dim by dim.

    Args:
      space: the space that they are from.
      hparams: shaped like the space, arrays [n, ...]; constants are `None`.

    Returns:
      One column for each of `space.names`.
    """
    dims: list[Column] = []
    for leaf, array in zip(space.leaves, space.flatten(hparams), strict=True):
        values = _values(leaf, np.asarray(array))
        live = np.ones(len(values), bool)
        if leaf.parent >= 0:
            parent = dims[leaf.parent]
            live = parent.live & (parent.values == leaf.branch)
        options = _options(leaf.parameter)
        for i in range(leaf.size):
            dims.append(Column(space.names[leaf.start + i], leaf.parameter, options, values[:, i], live))
    return dims


def take(hparams: PyTree, rows: np.ndarray) -> PyTree:
    """Some rows of `hparams`."""
    return jax.tree.map(lambda x: np.asarray(x)[rows], hparams)


def show(value: Any) -> str:
    """A hyperparameter as short text."""
    return f"{value:.4g}" if isinstance(value, float) else str(getattr(value, "__name__", value))


def texts(space: Space, hparams: PyTree) -> dict[str, list[str]]:
    """The hyperparameters of some trials by name, those of a branch in brackets behind its choice."""
    owner = {leaf.start + i: leaf for leaf in space.leaves for i in range(leaf.size)}
    found: dict[str, list[str]] = {}
    inside: dict[str, list[list[str]]] = {}
    for dim, column in enumerate(columns(space, hparams)):
        root = owner[dim]
        while root.parent >= 0:
            root = owner[root.parent]
        shown = [show(value) for value in column.native().tolist()]
        if root is owner[dim]:
            found[column.name] = shown
            inside[root.path] = [[] for _ in shown]
            continue
        label = column.name.rpartition(".")[2]
        for notes, text, live in zip(inside[root.path], shown, column.live, strict=True):
            notes += [f"{label}={text}"] * bool(live)
    for name, branches in inside.items():
        if any(branches):
            found[name] = [f"{t} ({', '.join(b)})" if b else t for t, b in zip(found[name], branches, strict=True)]
    return found
