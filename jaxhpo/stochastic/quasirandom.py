"""Quasirandom search: points of a scrambled low-discrepancy sequence, from their index alone.

Sobol' (1967) with the direction numbers of Joe and Kuo (2008), scrambled by a random linear map and a digital shift:
Matousek (1998), On the L2-discrepancy for anchored boxes. Halton (1960), with a random permutation of every digit:
Owen (2017), A randomized Halton algorithm in R. Either way every single point is uniform, so averages have no bias.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.stats import qmc

from jaxhpo.checks import one_of, whole
from jaxhpo.method import Count, Method, PyTree, Trials, black_box, count
from jaxhpo.space import Space, working_dtype

BITS = 32
MAX_SOBOL = qmc.Sobol.MAXDIM
MAX_HALTON = 1000


class Sobol(NamedTuple):
    """A digital sequence in base 2, most significant bit first."""

    directions: jax.Array
    """u32[dims, 32]: point i is the exclusive or of the columns at the set bits of the Gray code of i"""
    shift: jax.Array
    """u32[dims]: the point of index 0"""


class Halton(NamedTuple):
    """A radical inverse in a prime base for every dim."""

    places: jax.Array
    """i32[total]: for dim after dim, digit after digit, value after value: its place in this order after a permutation
    of the values; the least significant digit comes first"""


class State(NamedTuple):
    """Where in the sequence the study is, and how the sequence is scrambled."""

    sequence: Sobol | Halton
    """the scramble"""
    asked: Count
    """i32[]: trials asked for so far, the index of the next point"""


@functools.lru_cache(maxsize=8)
def directions(dims: int) -> np.ndarray:
    """The direction numbers u32[dims, 32] of `scipy.stats.qmc.Sobol`.

    SciPy keeps them private, but its generator, told that it has made 2^k points, moves to the next point by the
    exclusive or with number k, the lowest zero bit of 2^k - 1, whatever its current point is. So successive points
    differ by successive numbers, without walking through 2^31 of them.
    """
    engine = qmc.Sobol(dims, scramble=False, bits=BITS)
    points = np.zeros((BITS + 1, dims), np.uint32)
    for k in range(BITS):
        engine.num_generated = 2**k
        points[k + 1] = np.round(np.ldexp(engine.random(1)[0], BITS))
    numbers = (points[1:] ^ points[:-1]).T
    lowest = np.uint32(1) << np.arange(BITS - 1, -1, -1, dtype=np.uint32)
    if ((numbers & (2 * lowest - 1)) != lowest).any():
        raise RuntimeError("scipy.stats.qmc.Sobol does not yield direction numbers the way it did; please report it")
    return numbers


def scramble_sobol(key: jax.Array, numbers: jax.Array) -> Sobol:
    """A random linear map of the bits, each changed by more significant ones only, and a random shift."""
    key_map, key_shift = jax.random.split(key)
    dims = numbers.shape[0]
    place = jnp.arange(BITS - 1, -1, -1, dtype=jnp.uint32)
    own = jnp.uint32(1) << place
    above = ~((own << 1) - 1)
    rows = jax.random.bits(key_map, (dims, BITS), jnp.uint32) & above | own
    parity = lax.population_count(rows[:, None, :] & numbers[:, :, None]) & 1
    mapped = (parity << place).sum(axis=-1, dtype=jnp.uint32)
    return Sobol(mapped, jax.random.bits(key_shift, (dims,), jnp.uint32))


def sobol(sequence: Sobol, index: jax.Array) -> jax.Array:
    """The points at `index`, i32[n], as fractions of 2^32: u32[n, dims]."""
    gray = (index ^ (index >> 1)).astype(jnp.uint32)
    chosen = (gray[:, None] >> jnp.arange(BITS, dtype=jnp.uint32)) & 1
    terms = jnp.where(chosen[:, None, :] == 1, sequence.directions, 0)
    return lax.reduce(terms, jnp.uint32(0), lax.bitwise_xor, (2,)) ^ sequence.shift


def middles(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Fractions of 2^32 as the middles of the finest cells whose middles are exact: never 0 or 1, and unbiased."""
    kept = min(jnp.finfo(dtype).nmant, BITS)
    return ((bits >> (BITS - kept)).astype(dtype) + 0.5) * 2.0**-kept


class _Bases(NamedTuple):
    """Constants of the first primes, one a dim; every index of 31 bits has all its digits."""

    base: np.ndarray  # i32[dims]
    digits: np.ndarray  # i32[dims]: how many
    power: np.ndarray  # i32[31, dims]: the base to the power of the digit
    start: np.ndarray  # i32[31, dims]: of the digit in the table of permutations
    sizes: np.ndarray  # i32[digits of all dims]: their bases, in the order of that table
    total: int  # length of that table


@functools.lru_cache(maxsize=8)
def bases(dims: int) -> _Bases:
    """The first primes and the layout of their digits."""
    limit = 15 if dims < 6 else int(dims * (np.log(dims) + np.log(np.log(dims)))) + 1
    sieve = np.ones(limit + 1, bool)
    sieve[:2] = False
    for n in range(2, int(limit**0.5) + 1):
        sieve[n * n :: n] = False
    base = np.flatnonzero(sieve)[:dims]
    place = np.arange(31)[:, None]
    exact = np.array([[int(b) ** int(k) for b in base] for k in place[:, 0]], object)
    used = (exact < 2**31).astype(bool)
    sizes = np.where(used, base, 0).T.ravel()
    start = (np.cumsum(sizes) - sizes).reshape(dims, 31).T
    as_i32 = functools.partial(np.asarray, dtype=np.int32)
    return _Bases(
        base=as_i32(base),
        digits=as_i32(used.sum(axis=0)),
        power=as_i32(np.where(used, exact, 1)),
        start=as_i32(start),
        sizes=as_i32(sizes[sizes > 0]),
        total=int(sizes.sum()),
    )


def scramble_halton(key: jax.Array, dims: int) -> Halton:
    """An independent uniform permutation of every digit of every dim, all of them by one sort."""
    b = bases(dims)
    # XLA would spend seconds on folding what does not depend on the key.
    sizes = lax.optimization_barrier(jnp.asarray(b.sizes))
    digit = jnp.repeat(jnp.arange(len(b.sizes)), sizes, total_repeat_length=b.total)
    order = jax.random.bits(key, (b.total,), jnp.uint32)
    return Halton(lax.sort((digit, order, unscrambled_halton(dims).places), num_keys=2)[2])


def unscrambled_halton(dims: int) -> Halton:
    """Every digit as it is."""
    return Halton(jnp.arange(bases(dims).total, dtype=jnp.int32))


def halton(sequence: Halton, index: jax.Array, dims: int) -> jax.Array:
    """The points at `index`, i32[n]: float[n, dims] in [0, 1)."""
    b, dtype = bases(dims), working_dtype()
    base = jnp.asarray(b.base, dtype)
    power, start = jnp.asarray(b.power), jnp.asarray(b.start)

    def digit(i: jax.Array, x: jax.Array) -> jax.Array:
        # Horner's rule from the last digit, so that rounding stays below one unit in the last place.
        k = len(b.power) - 1 - i
        value = sequence.places[start[k] + index[:, None] // power[k] % b.base] - start[k]
        return jnp.where(k < b.digits, (value + x) / base, x)

    # What lies below the last digit is replaced by its mean, a half.
    x = lax.fori_loop(0, len(b.power), digit, jnp.full((index.shape[0], dims), 0.5, dtype))
    return jnp.minimum(x, 1 - jnp.finfo(dtype).epsneg)


@functools.lru_cache(maxsize=256)
def _functions(space: Space, sequence: str, batch: int) -> tuple[Callable, Callable, Callable]:
    def init(key: jax.Array, settings: PyTree = None) -> State:
        del settings
        if sequence == "sobol":
            return State(scramble_sobol(key, jnp.asarray(directions(space.dims))), count())
        return State(scramble_halton(key, space.dims), count())

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del key, pending
        asked = state.asked.value
        index = asked + jnp.arange(batch, dtype=jnp.int32)
        if isinstance(state.sequence, Sobol):
            unit = middles(sobol(state.sequence, index), working_dtype())
        else:
            unit = halton(state.sequence, index, space.dims)
        return black_box(space, unit, first=asked), state._replace(asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del trials, losses, gradients
        return state

    return init, ask, tell


def quasirandom(space: PyTree, *, sequence: str = "sobol", batch: int = 16) -> Method:
    """Quasirandom search: points that fill the space more evenly than random ones do.

    The best trial of n is closer to the optimum than random search's where few dims matter. The key given to `init`
    draws the scramble; `ask` needs none.

    Args:
      space: a pytree of parameters, or a `Space`.
      sequence: "sobol", or "halton", which has no favourite number of trials, for up to some tens of dims.
      batch: trials per ask, of any size; sobol is most even after a power of 2 of trials.

    Returns:
      A `Method` without settings.

    Raises:
      ValueError: the sequence is unknown, or it has fewer dims than the space.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> method = hpo.quasirandom({"x": hpo.Float(0.0, 1.0)}, batch=4)
      >>> trials, _ = method.ask(jax.random.key(1), method.init(jax.random.key(0)))
      >>> sorted((trials.unit[:, 0] * 4).astype(int).tolist())
      [0, 1, 2, 3]

    Reference:
      Joe and Kuo (2008), Constructing Sobol' sequences with better two-dimensional projections.
      Matousek (1998), On the L2-discrepancy for anchored boxes. Owen (2017), A randomized Halton algorithm in R.
    """
    space, batch = Space.of(space, most=None), whole("batch", batch, 1)
    limits = {"sobol": MAX_SOBOL, "halton": MAX_HALTON}
    one_of("sequence", sequence, limits)
    if space.dims > limits[sequence]:
        remedy = "use sequence='sobol'" if sequence == "halton" and space.dims <= MAX_SOBOL else "use random"
        raise ValueError(f"sequence={sequence!r} has {limits[sequence]} dims, the space has {space.dims}; {remedy}")
    init, ask, tell = _functions(space, sequence, batch)
    return Method("quasirandom", space, (), init, ask, tell, batch)
