"""The float arrays in a tree, apart from what cannot be differentiated, and functions of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from jaxhpo.trainable import hoist

PyTree = Any


class Floats(NamedTuple):
    """A tree in two parts."""

    values: list[jax.Array]
    """its float arrays; Python numbers are constants"""
    rebuild: Callable
    """(values) -> the tree with others in their place"""


def split_floats(tree: PyTree) -> Floats:
    """`tree` as its float arrays and the way back."""
    leaves, treedef = jax.tree.flatten(tree)
    at = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)]

    def rebuild(values: Sequence) -> PyTree:
        merged = list(leaves)
        for i, value in zip(at, values, strict=True):
            merged[i] = value
        return jax.tree.unflatten(treedef, merged)

    return Floats([leaves[i] for i in at], rebuild)


def is_zero(tangent: Any) -> bool:
    """Whether nothing is differentiated with respect to what has this tangent."""
    return isinstance(tangent, SymbolicZero)


def refuse_others(tangents: Sequence, adjoint: str) -> None:
    """Raises where a derivative with respect to more than the hyperparameters is asked for."""
    if not all(map(is_zero, jax.tree.leaves(tangents, is_leaf=is_zero))):
        raise TypeError(
            f"{adjoint} differentiates with respect to hparams only, but the functions of the Trainable close over "
            "something that is differentiated too; make it a hyperparameter, or use Reverse()"
        )


def basis(values: list[jax.Array]) -> list[jax.Array]:
    """The unit vectors of the space of `values`, stacked on a leading axis."""
    flat, unravel = ravel_pytree(values)
    return jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))


def push(fn: Callable, primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree, PyTree]:
    """The derivatives of `fn` along many tangents at once.

    Args:
      fn: `(*primals) -> (value, aux)`.
      primals: trees of float arrays.
      tangents: the same with a leading axis.

    Returns:
      The value, its derivatives with that leading axis, and aux.
    """
    if jax.tree.leaves(tangents)[0].shape[0] == 1:
        # Products of matrices with a batch of one are slower than without one.
        value, slopes, aux = jax.jvp(fn, primals, jax.tree.map(lambda t: t[0], tangents), has_aux=True)
        return value, jax.tree.map(lambda t: t[None], slopes), aux
    along = lambda t: jax.jvp(fn, primals, t, has_aux=True)  # noqa: E731
    return jax.vmap(along, out_axes=(None, 0, None))(tangents)


def forward_mode(fn: Callable, path: Callable, values: list[jax.Array], adjoint: str) -> jax.Array:
    """`fn(values)`, whose derivative is that of `path(values)`, carried along with it.

    Only the values that something is differentiated with respect to get tangents, and none does in plain evaluation.

    Args:
      fn: `(values) -> float[]`.
      path: the same, of which the derivative is taken.
      values: what may be differentiated with respect to.
      adjoint: whose name errors have.
    """
    plain, plain_consts = hoist(fn, values)
    traced, path_consts = (plain, plain_consts) if path is fn else hoist(path, values)

    @jax.custom_jvp
    def loss(consts: tuple, values: list) -> jax.Array:
        return plain(consts[0], values)

    def rule(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        (consts, values), (others, along) = primals, tangents
        refuse_others(others, adjoint)
        at = [i for i, t in enumerate(along) if not is_zero(t)]
        if not at:
            value = plain(consts[0], values)
            return value, jnp.zeros_like(value)

        def of(some: list) -> tuple[jax.Array, None]:
            merged = list(values)
            for i, x in zip(at, some, strict=True):
                merged[i] = x
            return traced(consts[1], merged), None

        some = [values[i] for i in at]
        value, slopes, _ = push(of, (some,), (basis(some),))
        sizes = np.cumsum([x.size for x in some])[:-1]
        parts = jnp.split(slopes, sizes)
        slope = sum(
            jnp.sum(part.reshape(x.shape).astype(x.dtype) * along[i])
            for part, x, i in zip(parts, some, at, strict=True)
        )
        return (value if path is fn else plain(consts[0], values)), jnp.asarray(slope, value.dtype)

    loss.defjvp(rule, symbolic_zeros=True)
    return loss((plain_consts, path_consts), values)
