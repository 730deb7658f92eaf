"""When a run of CMA-ES has nothing left to find, and how the next one starts.

IPOP: Auger and Hansen (2005), A Restart CMA Evolution Strategy with Increasing Population Size. BIPOP: Hansen (2009),
Benchmarking a BI-Population CMA-ES on the BBOB-2009 Function Testbed.

Whether a run goes on is told from the shape of its distribution and from comparisons of losses, never from how much
they differ. So a monotone transform of the losses changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo.space import working_dtype

DOUBLINGS = 5
LARGEST = 2**14


class Run(NamedTuple):
    """The run that goes on, and what earlier ones have cost."""

    population: jax.Array
    """i32[], told rows that end a generation"""
    best: jax.Array
    """float[], lowest loss of the run"""
    median: jax.Array
    """float[], lowest median of a generation of the run"""
    idle: jax.Array
    """i32[], generations since one of the two was lowered"""
    told: jax.Array
    """i32[], rows that the run has learned from"""
    most: jax.Array
    """i32[], rows after which it ends at the latest"""
    is_small: jax.Array
    """bool[], whether it counts for the small populations of BIPOP"""
    doublings: jax.Array
    """i32[], how often the large population was doubled"""
    spent: jax.Array
    """i32[2], rows of earlier runs with large and with small populations"""
    is_over: jax.Array
    """bool[], whether the next ask starts another run"""


def largest(population: int, restarts: str | None) -> int:
    """The largest population that a study may come to."""
    if restarts is None:
        return population
    return max(population, min(population << DOUBLINGS, LARGEST))


def first_run(population: int) -> Run:
    """The run that a study begins with; BIPOP counts it as a small one."""
    i32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    inf = jnp.asarray(jnp.inf, working_dtype())
    return Run(
        population=i32(population),
        best=inf,
        median=inf,
        idle=i32(0),
        told=i32(0),
        most=i32(2**30),
        is_small=jnp.asarray(True),
        doublings=i32(0),
        spent=jnp.zeros(2, jnp.int32),
        is_over=jnp.asarray(False),
    )


def next_run(run: Run, uniforms: jax.Array, population: int, restarts: str) -> tuple[Run, jax.Array]:
    """The run after `run`.

    Args:
      run: the one that is over.
      uniforms: float[2] in [0, 1), by which BIPOP varies its small runs.
      population: that of the first run.
      restarts: "ipop" or "bipop".

    Returns:
      The run, and the factor of its first step size, float[].
    """
    counts = jnp.stack([~run.is_small, run.is_small]).astype(jnp.int32)
    spent = run.spent + counts * run.told
    is_small = jnp.asarray(restarts == "bipop") & (spent[1] < spent[0])
    doublings = jnp.minimum(run.doublings + ~is_small, DOUBLINGS).astype(jnp.int32)
    large = jnp.minimum(population * 2**doublings, largest(population, restarts)).astype(jnp.int32)
    ratio = jnp.maximum(large / (2 * population), 1).astype(uniforms.dtype)
    small = jnp.floor(population * ratio ** (uniforms[0] ** 2)).astype(jnp.int32)
    most_small = jnp.maximum(jnp.where(run.is_small, run.most, run.told) // 2, 10 * population)
    fresh = first_run(population)._replace(
        population=jnp.where(is_small, small, large),
        most=jnp.where(is_small, most_small, 2**30).astype(jnp.int32),
        is_small=is_small,
        doublings=doublings,
        spent=spent,
    )
    return fresh, jnp.where(is_small, 10.0 ** (-2 * uniforms[1]), 1).astype(uniforms.dtype)


def after_generation(
    run: Run, n: jax.Array, best: jax.Array, median: jax.Array, exhausted: jax.Array, dims: int
) -> Run:
    """`run` after a generation.

    Args:
      run: before it.
      n: i32[], rows of the generation.
      best: float[], its lowest loss, +inf where all have failed.
      median: float[], its median loss.
      exhausted: bool[], whether the distribution cannot be narrowed further.
      dims: of the search.
    """
    is_better = (best < run.best) | (median < run.median)
    idle = jnp.where(is_better, 0, run.idle + 1)
    patience = 20 + 30 * dims // run.population
    told = run.told + n
    return run._replace(
        best=jnp.minimum(best, run.best),
        median=jnp.minimum(median, run.median),
        idle=idle,
        told=told,
        is_over=run.is_over | exhausted | (idle > patience) | (told >= run.most),
    )
