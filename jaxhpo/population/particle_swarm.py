"""Particle swarm optimization: particles that fly through the space, drawn to the best points that they know of.

Kennedy and Eberhart (1995), Particle swarm optimization. The two update rules:

"constriction": Clerc and Kennedy (2002), The particle swarm: explosion, stability, and convergence in a
multidimensional complex space, IEEE TEC 6(1), with the velocity clamp of Eberhart and Shi (2000), Comparing inertia
weights and constriction factors in particle swarm optimization. The coefficients chi and phi/2 are multiplied out.

"spso2011": Clerc (2012), Standard Particle Swarm Optimisation (hal-00764996); Zambrano-Bigiarini, Clerc and Rojas
(2013), Standard Particle Swarm Optimisation 2011 at CEC-2013: a baseline for future PSO improvements. In the standard
each particle informs 3 others; here each is informed by 3.

Both move by `flight`. A particle that has heard of no success walks at random, since there is nothing to follow.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import erfinv

from jaxhpo.checks import one_of, real, whole
from jaxhpo.draws import hashed_bits
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count, ranked
from jaxhpo.population.flight import (
    Settings,
    choose,
    constricted,
    leaders,
    spherical,
    uniforms,
    without_repeats,
)
from jaxhpo.space import Space, working_dtype
from jaxhpo.variation import best_rows, latin_hypercube, reflect

# Multiplied out, chi = 0.7298 and phi = 4.1; the other rule's are those of the standard.
DEFAULTS = {
    "constriction": {"inertia": 0.7298, "cognitive": 0.7298 * 2.05, "social": 0.7298 * 2.05, "max_velocity": 0.5},
    "spso2011": {
        "inertia": 1 / (2 * math.log(2)),
        "cognitive": 0.5 + math.log(2),
        "social": 0.5 + math.log(2),
        "max_velocity": 1.0,
    },
}
TOPOLOGIES = {"constriction": "global", "spso2011": "adaptive-random"}


class State(NamedTuple):
    """State of a particle swarm."""

    position: jax.Array
    """float[particles, dims]: where each particle was told of last, at first where it begins"""
    velocity: jax.Array
    """float[particles, dims]: its, 0 where a dim has no order"""
    best: jax.Array
    """float[particles, dims]: its best point; the last one as long as all have failed"""
    loss: jax.Array
    """float[particles]: the loss there, +inf where no trial has succeeded"""
    draw: jax.Array
    """u32[2]: what the random informants are drawn from"""
    stale: jax.Array
    """i32[]: rows told since the swarm's best loss fell or the informants changed"""
    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""


class Row(NamedTuple):
    """What a row of an ask remembers."""

    particle: jax.Array
    """i32[batch]: who flies there"""
    begins: jax.Array
    """bool[batch]: whether it is its first point"""
    velocity: jax.Array
    """float[batch, dims]: its velocity on arrival"""


@functools.lru_cache(maxsize=256)
def _functions(space: Space, n: int, variant: str, topology: str, batch: int) -> tuple[Callable, Callable, Callable]:
    dims, ordered = space.dims, ~space.categorical
    has_choices = not ordered.all()
    always_moves = ((space.levels == 0) & (space.parent < 0)).any()

    def init(key: jax.Array, settings: PyTree) -> State:
        key_start, key_velocity, key_draw = jax.random.split(key, 3)
        start = latin_hypercube(key_start, n, dims)
        velocity = jnp.where(ordered, space.sample(key_velocity, n) - start, 0)
        loss = jnp.full(n, jnp.inf, start.dtype)
        draw = jax.random.bits(key_draw, (2,), jnp.uint32)
        return State(start, velocity, start, loss, draw, jnp.zeros((), jnp.int32), settings, count())

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        to_move, to_scale, to_choose, to_change = jax.random.bits(key, (4, 2), jnp.uint32)
        asked, settings = state.asked.value, state.settings
        turn = asked + jnp.arange(batch, dtype=jnp.int32)
        is_first = turn < n
        # A swarm that moves as a whole always moves in order.
        rows = jnp.arange(n, dtype=jnp.int32) if batch == n else turn % n
        of_rows = (lambda y: y) if batch == n else (lambda y: y[rows])
        x, v, best = map(of_rows, (state.position, state.velocity, state.best))
        lead = leaders(topology, state.loss, state.draw, rows)
        if topology == "global":
            first = jnp.argmin(state.loss)
            leader, knows = state.best[first], jnp.isfinite(state.loss[first])
        else:
            leader, knows = state.best[lead], jnp.isfinite(state.loss[lead])[:, None]
        # Long arrays, and barriers where they begin and end: see `flight.uniforms`.
        long = lambda y: y if y.ndim == 0 else jnp.broadcast_to(y, x.shape).reshape(-1)  # noqa: E731
        leader = lax.optimization_barrier(jnp.broadcast_to(leader, x.shape))
        to_best, to_leader = best, leader
        if has_choices:
            # What is not live there was not learned.
            to_best = jnp.where(space.active(best) & ordered, best, x)
            to_leader = jnp.where(space.active(leader) & ordered, leader, x)
        r1, r2 = uniforms(to_move, (batch, dims))
        if variant == "constriction":
            moved = constricted(settings, *map(long, (x, v, to_best, to_leader, r1, r2)))
        else:
            normal = lax.optimization_barrier(erfinv(2 * long(r1) - 1)).reshape(x.shape)
            normal = jnp.where(ordered, normal, 0) if has_choices else normal
            radius, _ = uniforms(to_scale, (batch, 1))
            moved = long(spherical(settings, x, v, to_best, to_leader, (lead == rows)[:, None], normal, radius))
        moved = jnp.where(long(knows), moved, long(r2) - 0.5)
        moved = jnp.clip(moved, -settings.max_velocity, settings.max_velocity)
        begins = long(is_first[0] if batch == n else is_first[:, None])
        moved = lax.optimization_barrier(jnp.where(begins, 0, moved))
        unit = long(x) + moved
        arrives = jnp.where((unit < 0) | (unit > 1), -settings.damping * moved, moved)
        arrives = lax.optimization_barrier(jnp.where(begins, long(v), arrives)).reshape(x.shape)
        unit = reflect(unit) if variant == "constriction" else jnp.clip(unit, 0, 1)
        unit = lax.optimization_barrier(unit).reshape(x.shape)
        if has_choices:
            chosen, inherited = choose(space, settings, to_choose, x, best, leader)
            inherited = inherited & ~is_first[:, None]
            unit, arrives = jnp.where(inherited, chosen, unit), jnp.where(inherited, 0, arrives)
        if not always_moves:
            changed = without_repeats(space, to_change, unit, (x, best, leader))
            unit = jnp.where(is_first[:, None], unit, changed)
        trials = black_box(space, unit, first=asked, aux=Row(rows, is_first, arrives))
        return trials, state._replace(asked=Count(asked + batch))

    def learned(
        state: State, unit: jax.Array, velocity: jax.Array, losses: jax.Array, told: jax.Array, moved: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Position, velocity, best point and loss of every particle; what was told of each in its own row."""
        better = told & (losses <= state.loss)
        return (
            jnp.where(moved[:, None], unit, state.position),
            jnp.where(moved[:, None], velocity, state.velocity),
            jnp.where(better[:, None], unit, state.best),
            jnp.where(better, losses, state.loss),
        )

    def by_particle(state: State, trials: Trials, losses: jax.Array) -> tuple[jax.Array, ...]:
        row, told = best_rows(trials.aux.particle, losses, trials.active, n)
        # A point that a driver has put in the place of the first one is remembered, but the flight begins as planned.
        has_begun = jnp.arange(n, dtype=jnp.int32) < state.asked.value
        moved = told & has_begun & ~trials.aux.begins[row]
        return learned(state, trials.unit[row], trials.aux.velocity[row], losses[row], told, moved)

    def in_order(state: State, trials: Trials, losses: jax.Array) -> tuple[jax.Array, ...]:
        everyone = jnp.ones(n, bool)
        return learned(state, trials.unit, trials.aux.velocity, losses, everyone, everyone)

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        losses = ranked(losses.astype(state.loss.dtype))
        if trials.active.shape[0] == n:
            # The rows of a study do not depend on its key, so that this stays a branch under `vmap`.
            regular = trials.active & ~trials.aux.begins & (trials.aux.particle == jnp.arange(n))
            x, v, best, loss = lax.cond(regular.all(), in_order, by_particle, state, trials, losses)
        else:
            x, v, best, loss = by_particle(state, trials, losses)
        draw, stale = state.draw, state.stale
        if topology == "adaptive-random":
            stale = jnp.where(loss.min() < state.loss.min(), 0, stale + trials.active.sum(dtype=jnp.int32))
            draw = jnp.where(stale >= n, hashed_bits(draw, 2), draw)
            stale = jnp.where(stale >= n, 0, stale)
        return state._replace(position=x, velocity=v, best=best, loss=loss, draw=draw, stale=stale)

    return init, ask, tell


def particle_swarm(
    space: PyTree,
    *,
    particles: int | None = None,
    variant: str = "constriction",
    topology: str | None = None,
    inertia: float | None = None,
    cognitive: float | None = None,
    social: float | None = None,
    max_velocity: float | None = None,
    damping: float = 0.5,
    recall: float = 0.3,
    imitation: float = 0.3,
    mutation: float = 0.1,
    batch: int = 16,
) -> Method:
    """Particle swarm optimization.

    A particle is drawn to the best point that it has seen and to the best that its neighbourhood has seen. Integers
    and ordinals fly like real numbers, levels being cut from the line. Choices without order are inherited from either
    best point or drawn anew. Only comparisons of losses count, so a monotone transform of them changes nothing.

    Args:
      space: a pytree of parameters, or a `Space`.
      particles: at least 2; they are asked for in turns. The larger of `batch` and 40 if not given; with budgets of
        a few hundred trials, 10 find better optima.
      variant: "constriction", in which every coordinate has random weights of its own and bounds reflect, the better
        one on tuning problems and with small budgets; or "spso2011", which does not depend on the axes: a random point
        of a hypersphere, cut at the bounds.
      topology: whose best points a particle knows. "global": everyone's, which converges fast; "ring": those of two
        neighbours, which takes longer and finds better optima of rugged losses; "adaptive-random": those of 3 others,
        drawn anew when a whole turn of the swarm brought nothing. If not given, "global" for "constriction" and
        "adaptive-random" for "spso2011".
      inertia: share of the velocity that is kept, in [0, 1]; 0.7298 (0.7213 for "spso2011") if not given.
      cognitive: pull of the particle's own best point, in [0, 4]; 1.496 (1.193) if not given.
      social: pull of the neighbourhood's best point, in [0, 4]; 1.496 (1.193) if not given.
      max_velocity: of a coordinate, in widths of the space, in [0, 1]; 0.5 (1) if not given.
      damping: share of its velocity, turned round, that a particle has after it has hit a bound, in [0, 1].
      recall: chance that a choice without order is taken from the particle's own best point, in [0, 1].
      imitation: chance that it is taken from its neighbourhood's best point, in [0, 1].
      mutation: chance that it is drawn anew, in [0, 1]. The three may be 1 together.
      batch: trials per ask.

    Returns:
      A `Method`.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> swarm = hpo.particle_swarm({"x": hpo.Array(3, -5.0, 5.0)}, particles=16)
      >>> loss = lambda key, hparams: (hparams["x"] ** 2).sum()
      >>> hpo.minimize(loss, swarm, key=jax.random.key(0), rounds=60).best_loss < 1e-4
      True

    Reference:
      Clerc and Kennedy (2002), The particle swarm: explosion, stability, and convergence in a multidimensional complex
      space. Zambrano-Bigiarini, Clerc and Rojas (2013), Standard Particle Swarm Optimisation 2011 at CEC-2013.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    n = max(batch, 40) if particles is None else whole("particles", particles, 2, "one alone has nobody to follow")
    variant = one_of("variant", variant, list(DEFAULTS))
    topology = TOPOLOGIES[variant] if topology is None else topology
    topology = one_of("topology", topology, ["global", "ring", "adaptive-random"])
    given = {"inertia": inertia, "cognitive": cognitive, "social": social, "max_velocity": max_velocity}
    highest = {"inertia": 1, "cognitive": 4, "social": 4, "max_velocity": 1}
    numbers = {
        name: default if given[name] is None else real(name, given[name], 0, highest[name])
        for name, default in DEFAULTS[variant].items()
    }
    chances = {"recall": recall, "imitation": imitation, "mutation": mutation}
    chances = {name: real(name, value, 0, 1) for name, value in chances.items()}
    if sum(chances.values()) > 1 + 1e-6:
        raise ValueError(f"recall, imitation and mutation must be at most 1 together, got {chances}; lower one of them")
    numbers |= {"damping": real("damping", damping, 0, 1), **chances}
    settings = Settings(**{name: jnp.asarray(value, working_dtype()) for name, value in numbers.items()})
    init, ask, tell = _functions(space, n, variant, topology, batch)
    return Method("particle_swarm", space, settings, Initializer(init, settings), ask, tell, batch)
