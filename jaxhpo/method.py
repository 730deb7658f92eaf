"""The contract every search method keeps: three pure functions over one pytree, and the trials they speak of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo.space import Space

PyTree = Any


class Trials(NamedTuple):
    """What a method asks for: a struct of arrays, leading axis = batch, active rows first."""

    hparams: PyTree
    """shaped like the space, arrays [batch, ...]; constants are `None`"""
    unit: jax.Array
    """float[batch, dims] in [0, 1]: the same point in the unit cube"""
    id: jax.Array
    """i32[batch]: fresh trials count up, -1 is padding; a trial that goes on keeps its id"""
    steps: jax.Array
    """i32[batch]: training steps to run now, equal over the active rows of an ask"""
    source: jax.Array
    """i32[batch]: bank slot whose training state to continue, -1 is a fresh one"""
    slot: jax.Array
    """i32[batch]: bank slot to write; `method.slots` is not kept"""
    active: jax.Array
    """bool[batch]: False is padding"""
    aux: PyTree = ()
    """the method's own memory of the row, carried by wrappers and drivers, not recorded"""


class Count(NamedTuple):
    """A leaf of a method's state that does not depend on the key, such as the round."""

    value: jax.Array


def count(value: int | jax.Array = 0) -> Count:
    """A `Count` that starts at `value`."""
    return Count(jnp.asarray(value, jnp.int32))


def is_count(x: PyTree) -> bool:
    """Whether a node of a state is a `Count`."""
    return isinstance(x, Count)


def axes(state: PyTree) -> PyTree:
    """The `vmap` axes of a batched state: 0, and `None` at a `Count`, so that branching on one stays a branch.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.random({"x": hpo.Float(0, 1)}, batch=2)
      >>> states = jax.vmap(method.init, out_axes=hpo.axes(method.init(jax.random.key(0))))(
      ...     jax.random.split(jax.random.key(0), 8))
    """
    return jax.tree.map(lambda x: None if is_count(x) else 0, state, is_leaf=is_count)


def where_rows(mask: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """The rows of `a` where `mask`, bool[rows], is True, and those of `b` elsewhere; arrays [rows, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y), a, b)


def keep(state: PyTree, capacity: int) -> PyTree:
    """`reserve` of a method in which nothing grows."""
    del capacity
    return state


class Initializer:
    """The `init` of a method: `bare(key, settings)` with default settings.

    The builders cache `bare`, so composites and drivers, which pass settings explicitly, compile it once.

    Args:
      bare: (key, settings) -> state.
      settings: what it gets where a call has none, a pytree of arrays.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> init = hpo.Initializer(lambda key, settings: settings["step"], {"step": 0.3})
      >>> init(jax.random.key(0)), init(jax.random.key(0), {"step": 0.1})
      (0.3, 0.1)
    """

    def __init__(self, bare: Callable, settings: PyTree):
        self.bare, self.settings = bare, settings

    def __call__(self, key: jax.Array, settings: PyTree = None) -> PyTree:
        return self.bare(key, self.settings if settings is None else settings)


def bare(init: Callable) -> Callable:
    """`init` without its defaults."""
    return init.bare if isinstance(init, Initializer) else init


class Method(NamedTuple):
    """A search method.

    `init(key, settings=None) -> state`, `ask(key, state, pending=None) -> (trials, state)` and
    `tell(state, trials, losses, gradients=None) -> state` are pure, `jit`-able and `vmap`-able, with static shapes.
    """

    name: str
    """as in `hpo.random`"""
    space: Space
    """what it searches"""
    settings: PyTree
    """numeric settings, arrays of the working dtype: the default of `init`"""
    init: Callable
    """(key, settings=None) -> state"""
    ask: Callable
    """(key, state, pending=None) -> (trials, state)"""
    tell: Callable
    """(state, trials, losses, gradients=None) -> state; reads only what its rows carry and their losses"""
    batch: int
    """trials per ask"""
    slots: int = 0
    """training states kept; 0 is a black-box method, whose trials carry no steps"""
    rounds: int | None = None
    """asks after which it ends by itself"""
    uses_gradients: bool = False
    """whether `tell` wants the gradients of the losses"""
    reserve: Callable = keep
    """(state, capacity) -> state with room for that many told trials"""
    lookback: int = 0
    """training steps that gradients reach back through, where trials carry steps: at most those of an ask"""


def example(method: Method) -> tuple[jax.Array, PyTree]:
    """The shapes of a key and of the hyperparameters of one trial, as `method` asks for it."""

    def of() -> tuple[jax.Array, PyTree]:
        key, space = jax.random.key(0), method.space
        if not method.uses_gradients:
            return key, space.decode(jnp.zeros(space.dims))
        # Integers are floats here, so that they have slopes.
        return key, jax.tree.map(lambda x: x[0], method.ask(key, method.init(key))[0].hparams)

    return jax.eval_shape(of)


def endless(method: Any, example: str, slots: str, rounds: str) -> Method:
    """`method`, if it is a black-box method that can be asked for ever.

    Args:
      method: what was given.
      example: what would be right, as in "hpo.genetic(space)".
      slots: why training states that it keeps are in the way, and the remedy.
      rounds: why an end is in the way, and the remedy.

    Raises:
      TypeError, ValueError: it is none.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method, got {method!r}; give what a builder returns, such as {example}")
    if method.slots:
        raise ValueError(f"method '{method.name}' keeps slots={method.slots} training states, {slots}")
    if method.rounds is not None:
        raise ValueError(f"method '{method.name}' ends by itself, after rounds={method.rounds} asks, {rounds}")
    return method


def black_box(
    space: Space, unit: jax.Array, first: int | jax.Array, active: jax.Array | None = None, aux: PyTree = ()
) -> Trials:
    """Fresh trials that carry no steps and keep no training state.

    Args:
      space: what `unit` is decoded by.
      unit: float[batch, dims] in [0, 1].
      first: i32[], id of the first row; the others count up from it.
      active: bool[batch], active rows first; all if not given.
      aux: the method's own memory of the rows.

    Returns:
      `Trials` of `batch` rows, padding with the id -1.

    Example:
      >>> import jax.numpy as jnp, jaxhpo as hpo
      >>> trials = hpo.black_box(hpo.Space({"x": hpo.Float(0.0, 8.0)}), jnp.array([[0.25], [0.5]]), first=7)
      >>> trials.id.tolist(), trials.hparams["x"].tolist()
      ([7, 8], [2.0, 4.0])
    """
    n = unit.shape[0]
    active = jnp.ones(n, bool) if active is None else active
    zeros = jnp.zeros(n, jnp.int32)
    return Trials(
        hparams=space.decode(unit),
        unit=unit,
        id=jnp.where(active, first + jnp.arange(n, dtype=jnp.int32), -1),
        steps=zeros,
        source=zeros - 1,
        slot=zeros,
        active=active,
        aux=aux,
    )


def failed(losses: jax.Array) -> jax.Array:
    """Which losses count as a failed trial: NaN and the infinities."""
    return ~jnp.isfinite(losses)


def ranked(losses: jax.Array) -> jax.Array:
    """Losses to sort by: a failed trial comes last, at +inf."""
    return jnp.where(failed(losses), jnp.inf, losses)


INIT_ROUND = 2**31 - 1


def ask_key(key: jax.Array, round: int | jax.Array = INIT_ROUND) -> jax.Array:
    """The key of a study's round for `ask`; without a round, the one for `init`.

    Args:
      key: of the study, as `minimize` takes it.
      round: i32[] or an int, from 0.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> key, method = jax.random.key(0), hpo.random({"x": hpo.Float(0, 1)}, batch=2)
      >>> trials, state = method.ask(hpo.ask_key(key, 0), method.init(hpo.ask_key(key)))
    """
    method_key, _ = jax.random.split(key)
    return jax.random.fold_in(method_key, round)


def trial_keys(key: jax.Array, trials: Trials) -> jax.Array:
    """The keys of the trials of a study: key[batch], a function of the study's key and a trial's id alone.

    Args:
      key: of the study, as `minimize` takes it.
      trials: what was asked for.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> key, method = jax.random.key(0), hpo.random({"x": hpo.Float(0, 1)}, batch=2)
      >>> trials, _ = method.ask(hpo.ask_key(key, 0), method.init(hpo.ask_key(key)))
      >>> hpo.trial_keys(key, trials).shape
      (2,)
    """
    _, trials_key = jax.random.split(key)
    return jax.vmap(jax.random.fold_in, (None, 0))(trials_key, trials.id)
