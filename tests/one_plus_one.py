"""A method of one's own, from docs/new_method.md and public names alone: the (1+1) evolution strategy.

The fifth of successes: Rechenberg (1973), Evolutionsstrategie. Its form for each trial, a factor for a success and the
inverse of its fourth root for a failure: Kern et al. (2004), Learning probability distributions in continuous
evolutionary algorithms, section 3.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxhpo as hpo


class State(NamedTuple):
    unit: jax.Array
    """float[dims]: the parent"""
    loss: jax.Array
    """float[]: its loss, +inf before one is known"""
    sigma: jax.Array
    """float[]: standard deviation of a mutation, in the unit cube"""
    settings: dict
    asked: hpo.Count


@functools.cache
def functions(space, batch):
    def init(key, settings):
        loss = jnp.array(jnp.inf, float)
        return State(space.sample(key, 1)[0], loss, settings["sigma"], settings, hpo.Count(jnp.int32(0)))

    def ask(key, state, pending=None):
        key_uniform, key_normal = jax.random.split(key)
        anywhere = space.sample(key_uniform, batch)
        child = jnp.clip(state.unit + state.sigma * jax.random.normal(key_normal, (batch, space.dims)), 0, 1)
        unit = jnp.where(jnp.isinf(state.loss), anywhere, child)
        asked = state.asked.value
        return hpo.black_box(space, unit, asked), state._replace(asked=hpo.Count(asked + batch))

    def tell(state, trials, losses, gradients=None):
        losses = jnp.where(trials.active & jnp.isfinite(losses), losses, jnp.inf)
        best, is_child = jnp.argmin(losses), trials.active & jnp.isfinite(state.loss)
        is_success = is_child & (losses <= state.loss)
        wins = jnp.isfinite(losses[best]) & (losses[best] <= state.loss)
        powers = is_success.sum() - 0.25 * (is_child & ~is_success).sum()
        return state._replace(
            unit=jnp.where(wins, trials.unit[best], state.unit),
            loss=jnp.minimum(losses[best], state.loss),
            sigma=jnp.minimum(state.sigma * state.settings["growth"] ** powers, 1),
        )

    return init, ask, tell


def one_plus_one(space, *, sigma=0.2, growth=1.5, batch=1):
    """A (1+1) evolution strategy, which takes the best of a batch where it has several trials an ask."""
    space = hpo.Space.of(space)
    settings = {"sigma": jnp.asarray(sigma, float), "growth": jnp.asarray(growth, float)}
    init, ask, tell = functions(space, batch)
    return hpo.Method("one_plus_one", space, settings, hpo.Initializer(init, settings), ask, tell, batch)
