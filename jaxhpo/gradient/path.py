"""Where on the way of a training run a number stops being finite, or its derivative starts to explode."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.gradient.exact import begin
from jaxhpo.gradient.floats import split_floats
from jaxhpo.gradient.tangents import Carried, Line, carry_init, carry_loss, carry_step
from jaxhpo.gradient.unroll import Unrolled
from jaxhpo.trainable import Trainable, unjitted

PyTree = Any
NEVER = np.iinfo(np.int32).max


class NonFinite(NamedTuple):
    """The first number of a training run that is not finite."""

    step: int
    """that made it: 0 is `init`, one more than there are steps is `evaluate`"""
    leaf: str
    """of the training state, or "loss" """
    what: str
    """"value", "tangent", the derivative on the way forward, or "cotangent", that on the way back"""

    def __str__(self) -> str:
        where = "init" if self.step == 0 else "evaluate" if self.leaf == "loss" else f"step {self.step}"
        return f"the {self.what} of {self.leaf} is the first that is not finite, in {where}"


class Path(NamedTuple):
    """What was seen along a training run."""

    value: NonFinite | None
    """the first value that is not finite"""
    tangent: NonFinite | None
    """the first derivative along a direction that is not"""
    norms: np.ndarray
    """float[steps + 1]: of the derivative of the training state along a direction, after each step"""

    @property
    def growth(self) -> float:
        """By what factor the derivative grew over the last half of the run."""
        before, after = self.norms[len(self.norms) // 2], self.norms[-1]
        if not (np.isfinite(before) and np.isfinite(after)):
            return float("inf")
        return float(after / before) if before > 0 else 1.0


def _look(seen: jax.Array, leaves: list[jax.Array], step: Any) -> jax.Array:
    """i32[leaves]: the first step at which each was not finite, after another one."""
    bad = [~jnp.isfinite(x).all() for x in leaves]
    return jnp.where((seen == NEVER) & jnp.stack(bad), step, seen) if bad else seen


def _first(seen: jax.Array, names: list[str], what: str, backward: bool = False) -> NonFinite | None:
    at = np.where(np.asarray(seen) == NEVER, -1 if backward else NEVER, seen)
    i = int(at.argmax() if backward else at.argmin())
    return None if at[i] in (NEVER, -1) else NonFinite(int(at[i]), names[i], what)


def _names(trainable: Trainable, key: jax.Array, hparams: PyTree) -> list[str]:
    """The float leaves of a training state, and "loss"."""
    state = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, begin(trainable, key, hparams)))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    real = [path for path, x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    return [f"train_state{jax.tree_util.keystr(path)}" for path in real] + ["loss"]


def look_along(objective: Unrolled, key: jax.Array, line: Line) -> Path:
    """One pass over a training run and over its derivative along the first of the directions of `line`."""
    trainable, steps = unjitted(objective.trainable), objective.steps

    def size(carried: Carried) -> jax.Array:
        return jnp.sqrt(sum((jnp.vdot(t, t).real for t in carried.tangents), jnp.zeros(())))

    @jax.jit
    def run(key: jax.Array, at: PyTree, along: PyTree) -> tuple:
        here = Line(line.place, at, along)

        def look(seen: tuple, carried: Carried, step: Any) -> tuple:
            values = split_floats(carried.state).values
            return _look(seen[0], values, step), _look(seen[1], carried.tangents, step)

        def step(carry: tuple, reached: jax.Array) -> tuple[tuple, jax.Array]:
            carried = carry_step(trainable, key, reached, carry[0], here)
            return (carried, look(carry[1], carried, reached)), size(carried)

        first = carry_init(trainable, key, here)
        never = jnp.full(len(first.tangents), NEVER)
        (last, seen), sizes = jax.lax.scan(step, (first, look((never, never), first, 0)), jnp.arange(1, steps + 1))
        ends = [_look(jnp.full(1, NEVER), [x], steps + 1) for x in carry_loss(trainable, last, here)]
        joined = [jnp.concatenate(pair) for pair in zip(seen, ends, strict=True)]
        return *joined, jnp.concatenate([size(first)[None], sizes])

    values, tangents, norms = run(key, line.at, jax.tree.map(lambda t: t[:1], line.along))
    names = _names(trainable, key, line.place(line.at))
    return Path(_first(values, names, "value"), _first(tangents, names, "tangent"), np.asarray(norms))


def look_back(objective: Unrolled, key: jax.Array, hparams: PyTree) -> NonFinite | None:
    """The first cotangent that is not finite on the way back: of which leaf, and in which step. Keeps every state."""
    trainable, steps = unjitted(objective.trainable), objective.steps

    @jax.jit
    def run(key: jax.Array, values: list) -> jax.Array:
        hparams_of = split_floats(given).rebuild
        hparams = hparams_of(values)

        def forward(state: PyTree, reached: jax.Array) -> tuple[PyTree, PyTree]:
            return trainable.step(jax.random.fold_in(key, reached), state, hparams), state

        def backward(carry: tuple, step: tuple) -> tuple[tuple, None]:
            (cotangents, seen), (reached, state) = carry, step
            floats, state_of = split_floats(state)

            def after(floats: list, values: list) -> list:
                moved = trainable.step(jax.random.fold_in(key, reached), state_of(floats), hparams_of(values))
                return split_floats(moved).values

            cotangents, slopes = jax.vjp(after, floats, values)[1](cotangents)
            return (cotangents, _look(seen, cotangents + slopes, reached)), None

        def before(values: list) -> list:
            return split_floats(jax.tree.map(jnp.asarray, begin(trainable, key, hparams_of(values)))).values

        first = jax.tree.map(jnp.asarray, begin(trainable, key, hparams))
        reached = jnp.arange(1, steps + 1)
        last, states = jax.lax.scan(forward, first, reached)
        floats, state_of = split_floats(last)
        loss = lambda x, values: trainable.evaluate(state_of(x), hparams_of(values))  # noqa: E731
        cotangents, slopes = jax.grad(loss, (0, 1))(floats, values)
        seen = _look(jnp.full(len(floats) + len(values), NEVER), cotangents + slopes, steps + 1)
        (cotangents, seen), _ = jax.lax.scan(backward, (cotangents, seen), (reached, states), reverse=True)
        slopes = jax.vjp(before, values)[1](cotangents)[0]
        return _look(seen, [jnp.zeros(())] * len(floats) + slopes, 0)

    given = hparams
    leaves = jax.tree_util.tree_flatten_with_path(hparams)[0]
    real = [path for path, x in leaves if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)]
    names = _names(trainable, key, hparams)[:-1] + [f"hparams{jax.tree_util.keystr(path)}" for path in real]
    return _first(run(key, split_floats(hparams).values), names, "cotangent", backward=True)


def find_nonfinite(objective: Unrolled, hparams: PyTree, *, key: jax.Array | None = None) -> NonFinite | None:
    """The first number in a training run that is not finite: a value, else a derivative, by its step and its leaf.

    Args:
      objective: what `unroll` returned.
      hparams: pytree of one trial; its Python floats count as arrays.
      key: the trial's; `jax.random.key(0)` if not given.

    Returns:
      A `NonFinite(step, leaf, what)`, or `None` where all is finite.

    Raises:
      TypeError: `objective` is no unrolled training, or there is no float in `hparams`.

    Example:
      >>> import jax.numpy as jnp, jaxhpo as hpo
      >>> doubling = hpo.Trainable(
      ...     lambda key, h: {"x": h["x"]}, lambda key, s, h: {"x": s["x"] ** 2}, lambda s, h: s["x"])
      >>> print(hpo.find_nonfinite(hpo.unroll(doubling, steps=9), {"x": 10.0}))
      the value of train_state['x'] is the first that is not finite, in step 6
    """
    if not isinstance(objective, Unrolled):
        raise TypeError(f"objective must be unrolled training, got {objective!r}; say hpo.unroll(trainable, steps=...)")
    key = jax.random.key(0) if key is None else key
    hparams = as_arrays(hparams)
    values, rebuild = split_floats(hparams)
    if not values:
        raise TypeError(f"hparams must have a float to differentiate with respect to, got {hparams!r}")
    along = [jnp.ones((1, *x.shape), x.dtype) for x in values]
    path = look_along(objective, key, Line(rebuild, values, along))
    return path.value or path.tangent or look_back(objective, key, hparams)


def as_arrays(hparams: PyTree) -> PyTree:
    """`hparams` with arrays in the place of its Python and NumPy floats."""

    def array(x: Any) -> Any:
        real = isinstance(x, float) or (isinstance(x, np.ndarray | np.generic) and np.issubdtype(x.dtype, np.floating))
        return jnp.asarray(x) if real else x

    return jax.tree.map(array, hparams)
