"""Optax optimizers of trials that train side by side."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhpo.space import Branches

PyTree = Any


def select_optimizer(choice: Any, optimizers: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """The chosen one of several optimizers, by a traced index, so that trials with different ones train side by side.

    Every optimizer is computed and keeps a state; those that are not chosen do not move theirs.

    Args:
      choice: what a `OneOf` over optimizers decodes to, `{"choice": i32[], name: hparams, ...}`; or what a
        `Categorical` of their names does, an index i32[]. Their native values, names, give that optimizer alone.
      optimizers: by name, at a `Categorical` in its order: an `optax.GradientTransformation`, or at a `OneOf` a
        function from the hyperparameters of its branch to one, which natively is called for the live branch only.

    Raises:
      TypeError, ValueError: `optimizers` is no dict, the names are not those of the `OneOf`, or a native choice is not
        among them.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def update(choice):
      ...     optimizer = select_optimizer(choice, {"sgd": optax.sgd(0.5), "sign": optax.sign_sgd(0.1)})
      ...     return optimizer.update(jnp.array(4.0), optimizer.init(jnp.array(0.0)))[0]
      >>> jax.vmap(update)(jnp.arange(2)).round(3).tolist()
      [-2.0, -0.10000000149011612]
    """
    if not isinstance(optimizers, Mapping):
        raise TypeError(f"optimizers must be a dict of optimizers by name, got {type(optimizers).__name__}")
    branches: Mapping[str, Any] = {}
    if isinstance(choice, Mapping):
        branches = {name: hparams for name, hparams in choice.items() if name != "choice"}
        if isinstance(choice, Branches) and set(branches) == set(optimizers):
            optimizers = {name: optimizers[name] for name in branches}
        choice = choice["choice"]
        if not set(branches) <= set(optimizers) or (not isinstance(choice, str) and len(branches) < len(optimizers)):
            raise ValueError(
                f"optimizers must have the names of the OneOf: it has {list(branches)}, got {list(optimizers)}"
            )
    if isinstance(choice, str):
        if choice not in optimizers:
            raise ValueError(f"choice must be one of {list(optimizers)}, got {choice!r}")
        return _branch(choice, optimizers, branches)
    all_of = [_branch(name, optimizers, branches) for name in optimizers]
    index = jnp.clip(jnp.asarray(choice, jnp.int32), 0, len(all_of) - 1)

    def init(params: PyTree) -> tuple:
        return tuple(optimizer.init(params) for optimizer in all_of)

    def update(grads: PyTree, states: tuple, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, tuple]:
        updates, moved = [], []
        for i, (optimizer, state) in enumerate(zip(all_of, states, strict=True)):
            chosen = index == i
            # Ones instead of its gradients: where Adam has seen only zeros its derivative is infinite, and even
            # unchosen, times the zero of the selection, it would turn every hypergradient into NaN.
            seen = jax.tree.map(lambda g, c=chosen: jnp.where(c, g, jnp.ones_like(g)), grads)
            update, new = optimizer.update(seen, state, params, **extra)
            updates.append(jax.tree.map(cast, update, grads))
            moved.append(jax.tree.map(lambda n, o, c=chosen: jnp.where(c, cast(n, o), o), new, state))
        return jax.tree.map(lambda *u: jax.lax.select_n(index, *u), *updates), tuple(moved)

    return optax.GradientTransformationExtraArgs(init, update)


def _branch(
    name: str, optimizers: Mapping[str, Any], branches: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    optimizer = optimizers[name]
    return extended(f"optimizers[{name!r}]", optimizer(branches.get(name)) if callable(optimizer) else optimizer)


def extended(name: str, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, which is an optax optimizer, as one that takes extra arguments.

    Raises:
      TypeError: it is none; the message has its `name`.
    """
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise TypeError(f"{name} must be an optax.GradientTransformation such as optax.adam(lr), got {optimizer!r}")
    return optax.with_extra_args_support(optimizer)


def cast(new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` in the dtype of `old`."""
    return new if new.dtype == old.dtype else new.astype(old.dtype)
