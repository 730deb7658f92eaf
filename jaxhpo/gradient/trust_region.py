"""A quasi-Newton optimizer that asks for one value and gradient a step: a trust region with SR1 updates.

Nocedal and Wright (2006), Numerical optimization: algorithm 6.2 (SR1 trust region), section 4.3 (the step). Where a
training run pays for each evaluation, two things matter that first-order optimizers do not have: what gradients say
about curvature, also that of a step that failed, and that a step to a higher loss is taken back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxhpo.checks import real

MOST = 512
HALVINGS = 40
GOOD, POOR = 0.75, 0.25
LONG = 0.8
DEPENDENT = 1e-4


class TrustRegionState(NamedTuple):
    """Where the lowest value was, and what is known of the function around it."""

    point: jax.Array
    """float[n]"""
    value: jax.Array
    """float[]: there, +inf before there is one"""
    slope: jax.Array
    """float[n]: there"""
    hessian: jax.Array
    """float[n, n]: as the gradients so far have it"""
    radius: jax.Array
    """float[]: how far that is trusted"""
    learns: jax.Array
    """bool[]: whether the Hessian is from gradients yet"""


def step_within(hessian: jax.Array, slope: jax.Array, radius: jax.Array) -> jax.Array:
    """The step of least slope @ p + p @ hessian @ p / 2 with a length of at most `radius` (theorem 4.1).

    The hard case, a slope without any part along the least curvature, gets a shorter step.
    """
    curvature, axes = jnp.linalg.eigh(hessian)
    along = axes.T @ slope
    length = jnp.linalg.norm(slope)
    tiny = jnp.finfo(slope.dtype).eps * jnp.maximum(jnp.abs(curvature).max(), length / radius)
    low = jnp.maximum(0, tiny - curvature[0])
    part = lambda shift: along / jnp.maximum(curvature + shift, jnp.finfo(slope.dtype).tiny)  # noqa: E731

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        is_long = jnp.linalg.norm(part(middle)) > radius
        return jnp.where(is_long, middle, low), jnp.where(is_long, high, middle)

    is_inside = jnp.linalg.norm(part(low)) <= radius
    _, high = jax.lax.fori_loop(0, HALVINGS, halve, (low, low + length / radius))
    return -axes @ part(jnp.where(is_inside, low, high))


def trust_region(radius: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """A quasi-Newton optimizer for few parameters, by trust region and SR1 updates.

    Each step goes to where a quadratic model of the function is least within a radius of the best point so far: first
    as far as the radius down the slope, later by the curvature that the gradients have shown. The radius doubles where
    the model holds and shrinks where it does not, and a step to a higher value is taken back. One value and gradient a
    step, no line search: for `gradient` and `polish`, where each is a training run. For functions without noise.

    Args:
      radius: of the first step, above 0; in the coordinates of `gradient`, 1 is from the middle of a parameter's range
        to about three quarters of it.

    Returns:
      An optax optimizer whose `update` needs `value`, as `gradient` and `polish` give it.

    Raises:
      ValueError, TypeError: `radius` is out of its range; at `init`, there are more than 512 parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhpo as hpo
      >>> valley = lambda key, h: (1 - h["x"]) ** 2 + 100 * (h["y"] - h["x"] ** 2) ** 2
      >>> space = {"x": hpo.Float(-2.0, 2.0), "y": hpo.Float(-1.0, 3.0)}
      >>> method = hpo.gradient(space, hpo.trust_region(), starts=1, patience=100)
      >>> result = hpo.minimize(valley, method, key=jax.random.key(0), trials=60)
      >>> result.best_loss < 1e-4
      True

    Reference:
      Nocedal and Wright (2006), Numerical optimization, chapters 4 and 6.
    """
    radius = real("radius", radius, 1e-6, 1e6, "1 is usual")

    def init(params: Any) -> TrustRegionState:
        x, _ = ravel_pytree(params)
        if x.size > MOST:
            raise ValueError(
                f"trust_region keeps a matrix of all pairs of parameters, at most {MOST}, got {x.size}; use optax.adam"
            )
        full = lambda value: jnp.full((), value, x.dtype)  # noqa: E731
        zeros = jnp.zeros_like(x)
        return TrustRegionState(
            x, full(jnp.inf), zeros, jnp.zeros((x.size, x.size), x.dtype), full(radius), x.sum() > jnp.inf
        )

    def learned(state: TrustRegionState, moved: jax.Array, slope: jax.Array) -> jax.Array:
        """The Hessian after one more gradient (6.24), where that says anything (6.26)."""
        change = slope - state.slope
        # Before the first update the scale is unknown: that of the curvature along the step (6.20).
        size = jnp.maximum(moved @ moved, jnp.finfo(slope.dtype).tiny)
        scaled = jnp.abs(moved @ change) / size * jnp.eye(slope.size, dtype=slope.dtype)
        hessian = jnp.where(state.learns, state.hessian, scaled)
        rest = change - hessian @ moved
        along = rest @ moved
        is_fine = jnp.abs(along) > DEPENDENT * jnp.linalg.norm(moved) * jnp.linalg.norm(rest)
        return hessian + jnp.where(is_fine, jnp.outer(rest, rest) / jnp.where(is_fine, along, 1), 0)

    def update(
        updates: Any, state: TrustRegionState, params: Any = None, *, value: jax.Array, **extra: Any
    ) -> tuple[Any, TrustRegionState]:
        del extra
        slope, _ = ravel_pytree(updates)
        x, unravel = ravel_pytree(params)
        value = jnp.asarray(value, x.dtype)
        is_first = jnp.isinf(state.value)
        moved = x - state.point
        length = jnp.linalg.norm(moved)
        foreseen = -(state.slope @ moved + moved @ state.hessian @ moved / 2)
        gain = jnp.where(is_first, 0, state.value - value) / jnp.maximum(foreseen, jnp.finfo(x.dtype).tiny)
        grown = jnp.where((gain > GOOD) & (length > LONG * state.radius), 2 * state.radius, state.radius)
        reach = jnp.where(is_first, state.radius, jnp.where(gain < POOR, POOR * length + 1e-12, grown))
        learns = ~is_first & (length > 0)
        hessian = jnp.where(learns, learned(state, moved, slope), state.hessian)
        is_lower = value < state.value
        point = jnp.where(is_lower, x, state.point)
        at = jnp.where(is_lower, slope, state.slope)
        known = state.learns | learns
        step = jnp.where(
            known,
            step_within(hessian, at, reach),
            -at / jnp.maximum(jnp.linalg.norm(at), jnp.finfo(x.dtype).tiny) * reach,
        )
        after = TrustRegionState(point, jnp.minimum(value, state.value), at, hessian, reach, known)
        return unravel(point + step - x), after

    return optax.GradientTransformationExtraArgs(init, update)
