"""Random numbers that cost little: drawn as one row, of as many bits as they need, or hashed from a counter.

On CPU they are most of the work of a generation. XLA computes the counters of an array with a short last axis one by
one, so every draw here is of one axis and takes its shape afterwards.

Reference: C. Wellons (2018), Prospecting for Hash Functions: the constants of `scramble`, there called lowbias32.
"""

import math

import jax
import jax.numpy as jnp

from jaxhpo.space import working_dtype


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.bits`, the same numbers: u32[shape]."""
    return jax.random.bits(key, (math.prod(shape),), jnp.uint32).reshape(shape)


def scramble(x: jax.Array) -> jax.Array:
    """A bijective hash of u32[...] that changes about half the bits when one bit of `x` does."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def hashed_bits(seed: jax.Array, size: int) -> jax.Array:
    """Random bits by hashing a counter, u32[size], for masks and orders: eight times cheaper than `jax.random.bits`.

    Args:
      seed: u32[2], drawn afresh by `jax.random.bits` for every call.
      size: how many.
    """
    counter = jax.lax.iota(jnp.uint32, size) * jnp.uint32(0x9E3779B9)
    return scramble(scramble(counter + seed[0]) ^ seed[1])


def uniform(drawn: jax.Array) -> jax.Array:
    """Uniform numbers in (0, 1) from the upper 23 of 32 bits: float[...] for u32[...]."""
    return ((drawn >> 9).astype(jnp.int32).astype(working_dtype()) + 0.5) * 2.0**-23


def halves(drawn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two independent arrays of uniform numbers from 32 bits, at 2^16 values each, never 0 or 1.

    Enough for weights and decisions.
    """
    # By way of i32: conversions of unsigned integers are not vectorised.
    middle = lambda x: (x.astype(jnp.int32).astype(working_dtype()) + 0.5) * 2.0**-16  # noqa: E731
    return middle(drawn >> 16), middle(drawn & 0xFFFF)


def two_uniforms(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """`halves` of one draw: two of float[shape]."""
    return halves(bits(key, shape))
