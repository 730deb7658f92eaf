"""Regularised evolution: the best of a random sample is mutated in one parameter, and the oldest member dies.

Real, Aggarwal, Huang and Le (2019), Regularized evolution for image classifier architecture search, Algorithm 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.checks import real, whole
from jaxhpo.draws import bits, uniform
from jaxhpo.history import on_prefix
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count, ranked
from jaxhpo.space import Space, working_dtype
from jaxhpo.untried import among, fingerprints
from jaxhpo.variation import mutate, one_dim

CAPACITY = 256
FURTHER = 8
UNTOLD = 0


class Settings(NamedTuple):
    """Numeric settings of regularised evolution."""

    eta: jax.Array
    """float[]: distribution index of the polynomial mutation of reals and integers"""


class State(NamedTuple):
    """State of regularised evolution."""

    unit: jax.Array
    """float[population, dims]: the members, a ring in the order of being told"""
    loss: jax.Array
    """float[population]: theirs, +inf where a trial failed"""
    born: jax.Array
    """i32[]: trials told so far; the next one takes the place of the member that is that many modulo the population"""
    seen: jax.Array
    """u32[capacity]: hashes of what was told, 0 where there is none; of length 0 where points may come again"""
    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""
    told: Count
    """i32[]: rows told so far, padding included"""


def codes(space: Space, unit: jax.Array) -> jax.Array:
    """Hashes of what points decode to, none of which is that of no point: u32[n] for float[n, dims]."""
    return jnp.maximum(fingerprints(space, unit), 1)


def mutated(space: Space, unit: jax.Array, drawn: jax.Array, eta: jax.Array) -> jax.Array:
    """Points that differ from float[n, dims] in one of their live dims, by uniform numbers float[2, n]."""
    live = space.active(unit) if space.nesting else None
    return mutate(space, unit, one_dim(space, live, drawn[0]), drawn[1], eta)


def was_told(code: jax.Array, seen: jax.Array, told: Count) -> jax.Array:
    """Which of the hashes u32[n] are among those that were told: bool[n]; the cost follows how many those are.

    Args:
      code: u32[n].
      seen: u32[capacity], as of the state.
      told: rows told so far.
    """
    return on_prefix(lambda known: among(code, known, known != UNTOLD), seen, told)


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, population: int, sample: int, distinct: bool, batch: int
) -> tuple[Callable, Callable, Callable, Callable]:
    def init(key: jax.Array, settings: Settings) -> State:
        return State(
            unit=space.sample(key, population),
            loss=jnp.full(population, jnp.inf, working_dtype()),
            born=jnp.int32(0),
            seen=jnp.full(CAPACITY if distinct else 0, UNTOLD, jnp.uint32),
            settings=settings,
            asked=count(),
            told=count(),
        )

    def winners(drawn: jax.Array, state: State) -> jax.Array:
        """The best of a sample of the living for each child, drawn with replacement: i32[batch]."""
        alive = jnp.clip(state.born, 1, population)
        chosen = jnp.minimum((drawn * alive).astype(jnp.int32), alive - 1)
        best = jnp.argmin(state.loss[chosen], axis=1)
        return jnp.take_along_axis(chosen, best[:, None], axis=1)[:, 0]

    def untried(child: jax.Array, drawn: jax.Array, state: State, pending: Trials | None) -> jax.Array:
        """`child`, mutated further for as long as it is known: float[batch, dims]."""
        waits = jnp.zeros(0, jnp.uint32)
        if pending is not None:
            waits = jnp.where(pending.active, codes(space, pending.unit), UNTOLD)

        def further(child: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
            code = codes(space, child)
            twice = jnp.tril(code[:, None] == code, -1).any(1)
            is_known = twice | among(code, waits, waits != UNTOLD) | was_told(code, state.seen, state.told)
            return jnp.where(is_known[:, None], mutated(space, child, pair, state.settings.eta), child), None

        return lax.scan(further, child, drawn)[0]

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        key_sample, key_children, key_fresh = jax.random.split(key, 3)
        asked, row = state.asked.value, jnp.arange(batch, dtype=jnp.int32)
        parent = state.unit[winners(uniform(bits(key_sample, (batch, sample))), state)]
        drawn = uniform(bits(key_children, ((1 + FURTHER) if distinct else 1, 2, batch)))
        anywhere = space.sample(key_fresh, batch)
        is_first = ((asked + row < population) & (state.born < population)) | (state.born == 0)
        child = jnp.where(is_first[:, None], anywhere, mutated(space, parent, drawn[0], state.settings.eta))
        if distinct:
            child = untried(child, drawn[1:], state, pending)
        return black_box(space, child, asked), state._replace(asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        on, rows = trials.active, losses.shape[0]
        nth = jnp.cumsum(on, dtype=jnp.int32)
        # Of more than a population, the last ones live.
        lives = on & (nth > nth[-1] - population)
        at = jnp.where(lives, (state.born + nth - 1) % population, population)
        seen, told = state.seen, state.told.value
        if distinct:
            code = jnp.where(on, codes(space, jnp.where(on[:, None], trials.unit, 0.5)), UNTOLD)
            seen = seen.at[(told + jnp.arange(rows)) % seen.size].set(code)
        return state._replace(
            unit=state.unit.at[at].set(trials.unit.astype(state.unit.dtype), mode="drop"),
            loss=state.loss.at[at].set(ranked(losses.astype(state.loss.dtype)), mode="drop"),
            born=state.born + nth[-1],
            seen=seen,
            told=Count(told + rows),
        )

    def reserve(state: State, capacity: int) -> State:
        if not distinct:
            return state
        more = max(capacity - state.seen.shape[-1], 0)
        return state._replace(seen=jnp.pad(state.seen, (0, more), constant_values=UNTOLD))

    return init, ask, tell, reserve


def regularized_evolution(
    space: PyTree,
    *,
    population: int = 50,
    sample: int = 10,
    distinct: bool = True,
    eta: float = 5.0,
    batch: int = 1,
) -> Method:
    """Regularised evolution: the best of a random sample is mutated in one parameter, and the oldest member dies.

    That all die of age, the good ones too, keeps the search from staying with what was lucky once. Age counts trials
    that were told since. Options and the branches of a `OneOf` mutate to any other, reals and integers by a polynomial,
    integers by a level at least; only what is live mutates.

    Args:
      space: a pytree of parameters, or a `Space`.
      population: members, at least 1; as many random trials come first.
      sample: members that are drawn, with replacement, for one to become a parent, at least 1: of more, the chosen one
        is better.
      distinct: whether a child that was told before, or is pending, is mutated on until it is another point, eight
        times at most. False is the algorithm of the paper, for losses that are noisy.
      eta: distribution index of mutation, in [0, 1000]: a high one makes small steps.
      batch: trials per ask, at least 1.

    Returns:
      A `Method` whose setting is eta.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> cell = {f"edge{i}": hpo.Categorical(("none", "skip", "conv")) for i in range(6)}
      >>> is_conv = lambda key, h: -sum((operation == 2).astype(float) for operation in h.values())
      >>> method = hpo.regularized_evolution(cell, population=20, sample=5)
      >>> hpo.minimize(is_conv, method, key=jax.random.key(0), trials=120).best_loss
      -6.0

    Reference:
      Real et al. (2019), Regularized evolution for image classifier architecture search.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    population = whole("population", population, 1)
    sample = whole("sample", sample, 1, "10 of 50 is usual")
    if not isinstance(distinct, bool | np.bool_):
        raise TypeError(f"distinct must be True or False, got {distinct!r}")
    settings = Settings(jnp.asarray(real("eta", eta, 0, 1000, "5 to 20 are usual"), working_dtype()))
    init, ask, tell, reserve = _functions(space, population, sample, bool(distinct), batch)
    initializer = Initializer(init, settings)
    return Method("regularized_evolution", space, settings, initializer, ask, tell, batch, reserve=reserve)
