"""Hamiltonian Monte Carlo: samples of a density by its gradient, many chains side by side.

Meant for chains that are kept between calls while their density changes a little at a time, as a posterior does with
every new observation.

Reference: Neal (2011), MCMC using Hamiltonian dynamics, section 5.3.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri

from jaxhpo.draws import bits, uniform
from jaxhpo.method import where_rows

PyTree = Any
ACCEPTED = 0.8
RATE = 0.3
LEAST, FIRST, MOST = math.log(1e-2), math.log(0.3), math.log(0.5)
VARIED = 0.2


class Chains(NamedTuple):
    """Where the chains are."""

    position: PyTree
    """arrays [chains, ...]"""
    log_step: jax.Array
    """float[]: log of the step size of all"""


def shaped_like(flat: jax.Array, tree: PyTree) -> PyTree:
    """The numbers float[...] in the shapes of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size)
    parts = [flat[a:b].reshape(leaf.shape) for leaf, a, b in zip(leaves, ends, ends[1:], strict=False)]
    return jax.tree.unflatten(treedef, parts)


def start(key: jax.Array, like: PyTree, chains: int) -> Chains:
    """Chains at standard normal positions shaped like `like`."""
    blank = jax.tree.map(lambda x: jnp.zeros((chains, *x.shape), x.dtype), like)
    normal = ndtri(uniform(bits(key, (sum(leaf.size for leaf in jax.tree.leaves(blank)),))))
    return Chains(shaped_like(normal, blank), jnp.full((), FIRST, normal.dtype))


def advance(key: jax.Array, log_density: Callable, chains: Chains, leaps: int) -> Chains:
    """Every chain after one more trajectory; the step size follows how many of them are accepted.

    Args:
      key: of the momenta and of what is accepted.
      log_density: position of one chain -> float[], with a gradient. Nothing is accepted where it is NaN or -inf, and
        a chain that is there starts again.
      chains: where they are.
      leaps: steps of a trajectory, at least 1.
    """
    number = jax.tree.leaves(chains.position)[0].shape[0]
    dtype = chains.log_step.dtype
    value_and_grad = jax.vmap(jax.value_and_grad(log_density))
    size = sum(leaf.size for leaf in jax.tree.leaves(chains.position))
    drawn = uniform(bits(key, (size + 2 * number,)))
    normal, chance = ndtri(drawn[: size + number]), drawn[size + number :]
    momentum = shaped_like(normal, chains.position)
    # Steps of one length can go in circles.
    step = jnp.exp(chains.log_step + VARIED * normal[size:])

    def plus(a: PyTree, scale: jax.Array, b: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: x + jnp.reshape(scale, (-1,) + (1,) * (y.ndim - 1)) * y, a, b)

    def leap(i: jax.Array, carry: tuple) -> tuple:
        position, momentum, first, _ = carry
        value, gradient = value_and_grad(position)
        gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), gradient)
        momentum = plus(momentum, step * jnp.where((i == 0) | (i == leaps), 0.5, 1), gradient)
        position = plus(position, jnp.where(i == leaps, 0, step), momentum)
        return position, momentum, jnp.where(i == 0, value, first), value

    none = jnp.zeros(number, dtype)
    position, end, before, after = lax.fori_loop(0, leaps + 1, leap, (chains.position, momentum, none, none))
    kinetic = functools.partial(_kinetic, number=number)
    log_ratio = after - kinetic(end) - before + kinetic(momentum)
    log_ratio = jnp.where(jnp.isfinite(log_ratio), log_ratio, -jnp.inf)
    moves = jnp.log(chance) < log_ratio
    # A chain that is where the density has no value starts again, at numbers that are as good as new.
    is_lost = ~jnp.isfinite(before)
    moved = where_rows(is_lost, momentum, where_rows(moves, position, chains.position))
    accepted = jnp.where(is_lost, ACCEPTED, jnp.exp(jnp.minimum(log_ratio, 0))).mean()
    return Chains(moved, jnp.clip(chains.log_step + RATE * (accepted - ACCEPTED), LEAST, MOST))


def _kinetic(momentum: PyTree, number: int) -> jax.Array:
    """float[chains]"""
    return sum((m.reshape(number, -1) ** 2).sum(1) for m in jax.tree.leaves(momentum)) / 2
