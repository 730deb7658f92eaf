"""What can be wrong with a problem, told before anything is compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxhpo.checks import whole
from jaxhpo.engine.lanes import value_and_gradient
from jaxhpo.method import Method, example
from jaxhpo.trainable import Trainable, unjitted

PyTree = Any

_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
)


def check_call(method: Method, lanes: int | None, mesh: Mesh | None) -> None:
    """Sees that what a study is given beside its problem is what it should be."""
    if not isinstance(method, Method):
        raise TypeError(f"method must be a jaxhpo Method, got {method!r}; build one, such as hpo.random(space)")
    if lanes is not None:
        whole("lanes", lanes, 1, "leave it out for the method's batch")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}; say jax.make_mesh((8,), ('lanes',))")


def check(
    problem: Callable | Trainable,
    method: Method,
    *,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    rounds: int | None = None,
) -> int | None:
    """Sees that a problem suits a method, by abstract evaluation.

    Returns:
      The rounds of the study: what is given, or else what the method needs to end by itself, if it does.

    Raises:
      TypeError, ValueError: it does not; the message says what to do instead.
    """
    check_call(method, lanes, mesh)
    if rounds is not None:
        whole("rounds", rounds, 1)
    if isinstance(problem, Trainable):
        _check_trainable(problem, method)
    elif callable(problem):
        _check_objective(problem, method)
    else:
        raise TypeError(
            f"problem must be an objective (key, hparams) -> loss or a Trainable, got {problem!r}; hpo.minimize also "
            "takes hpo.external(fn)"
        )
    return method.rounds if rounds is None else rounds


def _traced(what: str, fn: Callable, hparams: PyTree, *args: Any) -> Any:
    try:
        return jax.eval_shape(fn, *args, hparams)
    except _NOT_TRACEABLE as error:
        raise TypeError(
            f"{what} cannot be traced by JAX: {str(error).splitlines()[0]} Write it with jax.numpy and jax.lax, or, "
            "where it has to be plain Python, wrap a function of a dict: hpo.external(fn)"
        ) from error
    except Exception as error:
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(hparams)[0]]
        error.add_note(
            f"This came up while JAX traced {what}, where the hyperparameters are abstract values: {', '.join(names)}. "
            "They cannot be shapes; hpo.MLP and hpo.CNN are networks whose widths and depths they may be."
        )
        raise


def _check_loss(what: str, loss: Any) -> None:
    leaves = jax.tree.leaves(loss)
    if (
        not jax.tree_util.all_leaves([loss])
        or len(leaves) != 1
        or leaves[0].shape != ()
        or jnp.issubdtype(leaves[0].dtype, jnp.complexfloating)
    ):
        shapes = [f"{x.dtype.name}{list(x.shape)}" for x in leaves]
        got = ", ".join(shapes) if jax.tree_util.all_leaves([loss]) else str(jax.tree.structure(loss))
        raise TypeError(f"{what} must return a scalar loss, got {got}; reduce it, say by its mean")


def _check_objective(objective: Callable, method: Method) -> None:
    if method.slots:
        raise TypeError(
            f"problem is an objective, but the trials of '{method.name}' carry training steps; give a Trainable(init, "
            "step, evaluate), or choose a black-box method such as hpo.random"
        )
    key, hparams = example(method)
    call = lambda k, h: objective(k, method.space.fill(h))  # noqa: E731
    loss = _traced("the objective as objective(key, hparams)", call, hparams, key)
    _check_loss("the objective", loss)


def check_slope(objective: Callable, method: Method) -> None:
    """Sees that an objective can be differentiated, by abstract evaluation.

    Raises:
      Exception: what JAX raises where it cannot, with a note of what was traced.
    """
    key, hparams = example(method)
    slope = functools.partial(value_and_gradient, method.space, unjitted(objective))
    _traced("the gradient of the objective", slope, hparams, key)


def _check_trainable(trainable: Trainable, method: Method) -> None:
    if not method.slots:
        raise TypeError(
            f"problem is a bare Trainable, but the trials of '{method.name}' carry no training steps; give "
            "hpo.unroll(trainable, steps=...), or choose a method that trains in stretches, such as hpo.hyperband"
        )
    for name in ("init", "step", "evaluate"):
        if not callable(getattr(trainable, name)):
            raise TypeError(f"Trainable.{name} must be a function, got {getattr(trainable, name)!r}")
    fill = method.space.fill
    key, hparams = example(method)
    state = _traced("Trainable.init", lambda k, h: trainable.init(k, fill(h)), hparams, key)
    after = _traced("Trainable.step", lambda k, s, h: trainable.step(k, s, fill(h)), hparams, key, state)
    shape: Any = jax.tree.structure(state)
    if shape != jax.tree.structure(after):
        raise TypeError(
            "Trainable.step must return a train_state of the same structure as init, got "
            f"{jax.tree.structure(after)} after {shape}"
        )
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    for (path, old), new in zip(paths, jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                f"Trainable.step changed train_state{jax.tree_util.keystr(path)} from {old.dtype}{list(old.shape)} to "
                f"{new.dtype}{list(new.shape)}; let init return what step returns"
            )
    loss = _traced("Trainable.evaluate", lambda s, h: trainable.evaluate(s, fill(h)), hparams, after)
    _check_loss("Trainable.evaluate", loss)
