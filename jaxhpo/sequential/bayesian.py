"""Bayesian optimization: a model of the loss from what was told, and the trials that the model thinks best.

Jones, Schonlau and Welch (1998), Efficient global optimization of expensive black-box functions. Trials that are not
told yet, of this ask and of `pending`, are in the model with losses that every member of the ensemble draws from what
it expects there (Snoek, Larochelle and Adams 2012, Practical Bayesian optimization of machine learning algorithms,
section 3.2): the acquisition of the next one is averaged over these fantasies.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri

from jaxhpo import history as record
from jaxhpo.checks import one_of, real, whole
from jaxhpo.draws import bits, uniform
from jaxhpo.history import History
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count, failed
from jaxhpo.sequential import proposal
from jaxhpo.sequential.acquisition import ACQUISITIONS
from jaxhpo.sequential.surrogate import ensemble, gp
from jaxhpo.sequential.surrogate.kernel import features
from jaxhpo.space import Space, working_dtype
from jaxhpo.untried import among, everything, fingerprints
from jaxhpo.variation import latin_hypercube

LEADERS = 8
ENUMERATED = 1024


class Settings(NamedTuple):
    """Numeric settings of Bayesian optimization."""

    lengthscale: jax.Array
    """float[]: median of the prior of lengthscales, times the square root of the number of dims"""
    noise: jax.Array
    """float[]: median of the prior of the noise's variance, that of the Matérn part being 1"""
    trend: jax.Array
    """float[]: median of the prior of the quadratic trend's variance"""
    tail: jax.Array
    """float[]: median of the prior of how much the tail of the losses is drawn in"""
    exploration: jax.Array
    """float[]: margin of an improvement, or for `ucb` how many standard deviations"""


class State(NamedTuple):
    """State of Bayesian optimization."""

    history: History
    design: jax.Array
    """float[startup, dims]: the first trials"""
    model: PyTree
    """what the surrogate keeps"""
    settings: Settings
    asked: Count
    """i32[]: trials asked for so far"""


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, acquisition: str, startup: int, input_warping: bool, batch: int
) -> tuple[Callable, Callable, Callable, Callable]:
    score = ACQUISITIONS[acquisition]
    all_points = everything(space, ENUMERATED)
    design_rows = -(-startup // batch) * batch
    newest = min(batch, 64)

    def prior_of(settings: Settings) -> gp.Prior:
        return gp.prior_of(space, settings.lengthscale, settings.noise, settings.trend, settings.tail, input_warping)

    def init(key: jax.Array, settings: Settings) -> State:
        key_design, key_model = jax.random.split(key)
        history = record.empty(space.dims, growth=ensemble.GROWTH)
        return State(
            history=history,
            design=latin_hypercube(key_design, design_rows, space.dims),
            model=ensemble.init(key_model, prior_of(settings), history.losses.shape[0]),
            settings=settings,
            asked=count(),
        )

    def propose(level: int, key: jax.Array, state: State, pending: Trials | None) -> tuple[jax.Array, PyTree]:
        history = state.history
        capacity = history.losses.shape[0]
        plan = ensemble.plans(capacity)[level]
        waiting = 0 if pending is None else pending.unit.shape[0]
        key_model, key_pool, key_picks = jax.random.split(key, 3)
        prior = prior_of(state.settings)
        model, posterior = ensemble.observe(key_model, space, prior, state.model, history, level, newest)
        posterior = gp.widened(posterior, waiting + batch * (batch > 1))
        drawn = bits(key_picks, ((waiting + batch) * plan.members + 2 * batch,))
        seeds, normal = drawn[: 2 * batch].reshape(batch, 2), ndtri(uniform(drawn[2 * batch :])).reshape(-1, plan.members)

        told = history if level == len(ensemble.PLANS) else jax.tree.map(lambda x: x[: plan.rows], history[:3])
        unit, losses, mask = told[:3]
        codes, is_code = fingerprints(space, unit), mask
        if pending is not None:
            points = features(space, pending.unit)

            def wait(posterior: gp.Posterior, row: tuple) -> tuple[gp.Posterior, None]:
                return gp.fantasized(space, posterior, plan.rows + row[0], *row[1:])[0], None

            rows = jnp.arange(waiting), points, normal[batch:], pending.active
            posterior, _ = lax.scan(wait, posterior, rows)
            codes = jnp.concatenate([codes, fingerprints(space, pending.unit)])
            is_code = jnp.concatenate([is_code, pending.active])
        codes = jnp.pad(codes, (0, batch))
        is_code = jnp.pad(is_code, (0, batch))

        if all_points is None:
            leaders = unit[lax.top_k(-jnp.where(mask, losses, jnp.inf), min(LEADERS, unit.shape[0]))[1]]
            pool = proposal.candidates(key_pool, space, leaders, plan.candidates)
        else:
            pool = jnp.asarray(all_points, unit.dtype)
        seen = features(space, pool)
        prediction = gp.predict(space, posterior, seen)
        pool_codes = fingerprints(space, pool) if (space.levels > 0).all() else None

        def worth(posterior: gp.Posterior, prediction: gp.Prediction) -> jax.Array:
            std = gp.deviation(posterior, prediction.variance)
            best, exploration = posterior.best[:, None], state.settings.exploration
            values = score.ensemble(score.value(prediction.mean, std, best, exploration), 0)
            return jnp.where(jnp.isnan(values), -jnp.inf, values)

        def pick(carry: tuple, row: tuple) -> tuple[tuple, jax.Array]:
            posterior, prediction, codes, is_code = carry
            turn, seed, normal = row
            values = worth(posterior, prediction)
            if pool_codes is not None:
                values = jnp.where(among(pool_codes, codes, is_code), -jnp.inf, values)
            if all_points is None:
                value = lambda points: worth(posterior, gp.predict(space, posterior, features(space, points)))  # noqa: E731
                start = pool[lax.top_k(values, plan.starts)[1]]
                top = proposal.climbed(value, space, start, plan.steps)
                top = proposal.neighboured(seed, value, space, top)
                shortlist = jnp.concatenate([top, start])
                values = value(shortlist)
                values = jnp.where(among(fingerprints(space, shortlist), codes, is_code), -jnp.inf, values)
            else:
                shortlist = pool
            # Of equals, such as when none is left, any: the first would be the same at every ask.
            chosen = shortlist[jnp.argmax(values)]
            at = codes.shape[0] - batch + turn
            codes, is_code = codes.at[at].set(fingerprints(space, chosen)), is_code.at[at].set(True)
            if batch > 1:
                at = plan.rows + waiting + turn
                always = jnp.ones((), bool)
                point = features(space, chosen)
                posterior, link = gp.fantasized(space, posterior, at, point, normal, always)
                prediction = gp.updated(space, posterior, prediction, seen, link, at)
            return (posterior, prediction, codes, is_code), chosen

        rows = jnp.arange(batch), seeds, normal[:batch]
        _, chosen = lax.scan(pick, (posterior, prediction, codes, is_code), rows)
        return chosen, model

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        asked, told = state.asked.value, state.history.count.value
        sizes = [plan.rows for plan in ensemble.plans(state.history.losses.shape[0])]
        level = sum((told > size).astype(jnp.int32) for size in sizes[:-1])
        # A design that is used up, or results that were known before it, leave the rest to the model.
        starts = (asked < design_rows) & (told < startup)

        def begin() -> tuple[jax.Array, PyTree]:
            first = jnp.minimum(asked, design_rows - batch)
            return lax.dynamic_slice_in_dim(state.design, first, batch), state.model

        branches = [begin] + [functools.partial(propose, i, key, state, pending) for i in range(len(sizes))]
        unit, model = lax.switch(jnp.where(starts, 0, level + 1), branches)
        return black_box(space, unit, asked), state._replace(model=model, asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        return state._replace(history=record.append(state.history, trials.unit, losses, trials.active))

    def reserve(state: State, capacity: int) -> State:
        history = record.reserve(state.history, capacity, ensemble.GROWTH)
        return state._replace(history=history, model=ensemble.reserve(state.model, history.losses.shape[0]))

    return init, ask, tell, reserve


def bayesian(
    space: PyTree,
    *,
    acquisition: str = "log_ei",
    startup: int | None = None,
    lengthscale: float = 0.5,
    noise: float = 1e-4,
    trend: float = 1.0,
    tail: float = 1.0,
    exploration: float | None = None,
    input_warping: bool = False,
    batch: int = 1,
) -> Method:
    space, batch = Space.of(space), whole("batch", batch, 1)
    startup = space.dims if startup is None else whole("startup", startup, 1)
    exploration = ACQUISITIONS[acquisition].exploration if exploration is None else exploration
    settings = Settings(*(jnp.asarray(v, working_dtype()) for v in (lengthscale, noise, trend, tail, exploration)))
    init, ask, tell, reserve = _functions(space, acquisition, startup, input_warping, batch)
    return Method("bayesian", space, settings, Initializer(init, settings), ask, tell, batch, reserve=reserve)


bo = bayesian
