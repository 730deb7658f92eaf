"""The bandit of PB2: where the loss is expected to fall most in the next stretch, by a Gaussian process that forgets.

Parker-Holder, Nguyen and Roberts (2020), Provably efficient online hyperparameter optimization with population-based
bandits: the covariance is one of the hyperparameters times (1 - epsilon)^(|t - t'| / 2), the acquisition an upper
confidence bound (here, of losses, a lower one), and points that are being tried narrow it as if their outcome were what
is expected (Desautels, Krause and Burdick 2014, Parallelizing exploration-exploitation tradeoffs in Gaussian process
bandit optimization).

Lengthscale, noise and epsilon are those of a grid that have the highest likelihood, with the scale of the process
maximised in closed form. Where a trial failed, the loss is taken to have risen as much as it ever did.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import ndtri

from jaxhpo.draws import bits, uniform
from jaxhpo.sequential.surrogate.kernel import apart, features, matern
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import reflect

MEMORY = 256
STRETCHES = 16
ANYWHERE, NEARBY = 128, 128
SPREAD = 0.1
LENGTHSCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the square root of the number of dims
EPSILONS = (0.0, 0.03, 0.1, 0.3)
NOISES = (0.003, 0.03, 0.3)
C1, C2 = 0.2, 0.4
LEAST = 1e-6


class Seen(NamedTuple):
    """The last stretches that were told, arrays [memory], in a ring."""

    unit: jax.Array
    """float[memory, dims]"""
    round: jax.Array
    """i32: the ask that they belong to"""
    change: jax.Array
    """float: of the loss, +inf where the trial failed"""
    mask: jax.Array
    """bool: rows that hold one"""
    number: jax.Array
    """i32[]: stretches told so far"""


class Kernel(NamedTuple):
    """What the covariance depends on, float[] each."""

    lengthscale: jax.Array
    epsilon: jax.Array
    noise: jax.Array


class Model(NamedTuple):
    """The process, conditioned on what was seen."""

    kernel: Kernel
    factor: jax.Array
    """float[memory, memory]: Cholesky factor of the Gram matrix, of an identity in rows that hold nothing"""
    whitened: jax.Array
    """float[memory]: its inverse times the changes, which have mean 0 and standard deviation 1"""
    scale: jax.Array
    """float[]: variance of the process"""
    evidence: jax.Array
    """float[]: logarithm of the likelihood, but for a constant"""


def empty(space: Space, population: int) -> Seen:
    """Nothing seen yet."""
    rows, dtype = max(population, min(STRETCHES * population, MEMORY)), working_dtype()
    nothing = jnp.zeros(rows, jnp.int32)
    return Seen(jnp.zeros((rows, space.dims), dtype), nothing, nothing.astype(dtype), nothing > 0, jnp.int32(0))


def saw(seen: Seen, unit: jax.Array, round: jax.Array, change: jax.Array, active: jax.Array) -> Seen:
    """`seen` with the rows that are active, over the oldest ones; a change that is not finite is a failure."""
    memory = seen.mask.shape[0]
    turn = jnp.cumsum(active, dtype=jnp.int32)
    kept = active & (turn > turn[-1] - memory)
    at = jnp.where(kept, (seen.number + turn - 1) % memory, memory)
    put = lambda old, new: old.at[at].set(new.astype(old.dtype), mode="drop")  # noqa: E731
    return Seen(
        unit=put(seen.unit, unit),
        round=put(seen.round, round),
        change=put(seen.change, jnp.where(jnp.isfinite(change), change, jnp.inf)),
        mask=put(seen.mask, kept),
        number=seen.number + turn[-1],
    )


def standardised(seen: Seen) -> jax.Array:
    """The changes with mean 0 and standard deviation 1, float[memory], 0 in rows that hold nothing."""
    finite = seen.mask & jnp.isfinite(seen.change)
    worst = jnp.max(jnp.where(finite, seen.change, -jnp.inf))
    change = jnp.where(finite, seen.change, jnp.where(jnp.isfinite(worst), worst, 0))
    number = jnp.maximum(seen.mask.sum(), 1)
    centred = jnp.where(seen.mask, change - jnp.where(seen.mask, change, 0).sum() / number, 0)
    deviation = jnp.sqrt((centred**2).sum() / number)
    return centred / jnp.where(deviation > 0, deviation, 1)


def covariance(kernel: Kernel, squares: jax.Array, age: jax.Array) -> jax.Array:
    """Of two sets of points, by their squared distances and how many stretches lie between them."""
    return matern(squares / kernel.lengthscale**2) * (1 - kernel.epsilon) ** (age / 2)


def between(space: Space, a: tuple, b: tuple) -> tuple[jax.Array, jax.Array]:
    """The arguments of `covariance` for (features float[n, dims], round i32[n]) and the same of m: float[n, m] each."""
    dtype = working_dtype()
    squares = (apart(space, a[0], b[0]) ** 2).sum(0)
    return squares, jnp.abs(a[1].astype(dtype)[:, None] - b[1].astype(dtype))


def fit(space: Space, seen: Seen) -> Model:
    """The model of the grid that has the highest likelihood."""
    points, target = (features(space, seen.unit), seen.round), standardised(seen)
    squares, age = between(space, points, points)
    number = seen.mask.sum(dtype=jnp.int32).astype(target.dtype)
    both = seen.mask[:, None] & seen.mask

    def condition(*values: jax.Array) -> Model:
        kernel = Kernel(*values)
        gram = jnp.where(both, covariance(kernel, squares, age), 0)
        factor = jnp.linalg.cholesky(gram + jnp.diag(jnp.where(seen.mask, kernel.noise, 1)))
        whitened = solve_triangular(factor, target, lower=True)
        # As if there had been one more observation, at the mean: the scale of few is not known.
        scale = ((whitened**2).sum() + 1) / (number + 1)
        evidence = -jnp.log(jnp.diag(factor)).sum() - (number + 1) / 2 * jnp.log(scale)
        return Model(kernel, factor, whitened, scale, evidence)

    # One axis after the other, so that what depends on one of them alone is computed once for all of the others.
    for axis in reversed(range(3)):
        condition = jax.vmap(condition, [0 if i == axis else None for i in range(3)])
    lengthscales = np.array(LENGTHSCALES) * space.dims**0.5
    models = condition(*(jnp.asarray(values, target.dtype) for values in (lengthscales, EPSILONS, NOISES)))
    models = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), models)
    return jax.tree.map(lambda x: x[jnp.nanargmax(models.evidence)], models)


def candidates(key: jax.Array, space: Space, unit: jax.Array, copies: jax.Array) -> jax.Array:
    """Points anywhere, and some near the copied ones: float[candidates, dims]."""
    n, each = unit.shape[0], -(-NEARBY // unit.shape[0])
    drawn = uniform(bits(key, (ANYWHERE + 2 * n * each, space.dims)))
    anywhere, new, steps = jnp.split(drawn, (ANYWHERE, ANYWHERE + n * each))
    near = jnp.repeat(unit, each, axis=0)
    moved = reflect(near + SPREAD * ndtri(steps))
    # Of options without order one of ten is another one.
    moved = jnp.where(jnp.asarray(space.categorical), jnp.where(steps < 0.1, new, near), moved)
    return jnp.concatenate([anywhere, jnp.where(jnp.repeat(copies, each)[:, None], moved, new)])


def propose(
    key: jax.Array, space: Space, seen: Seen, now: jax.Array, unit: jax.Array, copies: jax.Array, stays: jax.Array
) -> jax.Array:
    """Where the copies of one ask go, one after the other: float[n, dims].

    Args:
      key: for the candidates.
      space: whose points they are.
      seen: what was told.
      now: i32[], the round.
      unit: float[n, dims], the members' points, those of copies as they were inherited.
      copies: bool[n], members that are to have another point.
      stays: bool[n], members that go on with theirs, whose outcome is pending.
    """
    n = unit.shape[0]
    points = jnp.concatenate([candidates(key, space, unit, copies), unit])
    free = points.shape[0] - n
    model = fit(space, seen)
    known = features(space, seen.unit), seen.round
    asked = features(space, points), jnp.full(points.shape[0], now, jnp.int32)
    along = jnp.where(seen.mask[:, None], covariance(model.kernel, *between(space, known, asked)), 0)
    link = solve_triangular(model.factor, along, lower=True)
    mean = link.T @ model.whitened
    left = covariance(model.kernel, *between(space, asked, asked)) - link.T @ link
    number = seen.mask.sum(dtype=jnp.int32).astype(mean.dtype)
    beta = C1 + jnp.maximum(jnp.log(C2 * jnp.maximum(number, 1)), 0)

    def narrowed(left: jax.Array, at: jax.Array, counts: jax.Array) -> jax.Array:
        """Covariances after an outcome at a point, whatever it is."""
        row = left[at]
        gain = jnp.where(counts, 1 / jnp.maximum(row[at] + model.kernel.noise, LEAST), 0)
        return left - gain * row[:, None] * row

    def pending(i: jax.Array, left: jax.Array) -> jax.Array:
        return narrowed(left, free + i, stays[i])

    def choose(left: jax.Array, copy: jax.Array) -> tuple[jax.Array, jax.Array]:
        deviation = jnp.sqrt(model.scale * jnp.maximum(jnp.diag(left), LEAST))
        best = jnp.argmin((mean - jnp.sqrt(beta) * deviation)[:free])
        return narrowed(left, best, copy), points[best]

    left = lax.fori_loop(0, n, pending, left)
    _, chosen = lax.scan(choose, left, copies)
    return jnp.where(copies[:, None], chosen, unit)
