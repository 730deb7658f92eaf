"""The Gaussian processes that are kept between two asks: chains of hyperparameters, and factors that grow.

How much work an ask does depends on how many trials were told, by a table of sizes. Hyperparameters take another
trajectory when enough trials have come since the last; in between, factors get new rows. From 1,025 trials on the
models know 1,024 of them: the best ones, others evenly from all ranks, and the latest.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.history import SMALLEST, History
from jaxhpo.method import Count, count
from jaxhpo.sequential.surrogate import gp, hamiltonian, slopes
from jaxhpo.sequential.surrogate.kernel import features
from jaxhpo.sequential.surrogate.surrogate import Plan, Prediction, Surrogate
from jaxhpo.sequential.surrogate.targets import distances
from jaxhpo.space import Space, working_dtype

GROWTH = 2


PLANS = (
    Plan(64, members=8),
    Plan(128, members=8, period=2),
    Plan(256, members=4, period=8, candidates=600),
    Plan(512, members=3, period=32, candidates=512, starts=4),
    Plan(1024, members=2, period=64, candidates=512, starts=4),
)
MEMBERS = max(plan.members for plan in PLANS)
MOST = PLANS[-1].rows
LATEST = MOST // 8
FITTED = 256
LEAPS, FIRST_TRAJECTORIES = 6, 8
SLOPES = 128


class Settings(NamedTuple):
    """Numeric settings: medians of the priors of hyperparameters."""

    lengthscale: jax.Array
    """float[]: lengthscale over the square root of the number of dims"""
    noise: jax.Array
    """float[]: variance of the noise, that of the Matérn part being 1"""
    trend: jax.Array
    """float[]: variance of the quadratic trend"""
    tail: jax.Array
    """float[]: how much the tail of the losses is drawn in"""


class Model(NamedTuple):
    """The ensemble between two asks."""

    chains: hamiltonian.Chains
    """of hyperparameters, in coordinates in which their prior is standard normal"""
    factors: jax.Array
    """float[...]: `Posterior.w` of the size in use, its members, rows and columns in one row"""
    chosen: jax.Array
    """i32[896]: rows of the history that the models know, where they do not know all"""
    fitted: Count
    """i32[]: rows told before the last trajectory"""
    factored: Count
    """i32[]: rows told before the last change of the factors"""
    chose: Count
    """i32[]: rows told before `chosen` was"""
    layout: Count
    """i32[]: which of the plans `factors` and `chosen` are of, -1 for none"""


def plans(capacity: int) -> tuple[Plan, ...]:
    """What is done at each size of a history with that capacity; in the last the models may not know all of it."""
    return tuple(plan for plan in PLANS if plan.rows <= max(capacity, SMALLEST)) + PLANS[-1:] * (capacity > MOST)


def _room(capacity: int) -> int:
    return max(plan.members * plan.rows**2 for plan in plans(capacity))


def init(key: jax.Array, example: gp.Parameters, capacity: int) -> Model:
    """Before anything was told: chains from the prior of parameters that are shaped like `example`."""
    return Model(
        chains=hamiltonian.start(key, example, MEMBERS),
        factors=jnp.zeros(_room(capacity), working_dtype()),
        chosen=jnp.zeros(MOST - LATEST, jnp.int32),
        fitted=count(),
        factored=count(),
        chose=count(),
        layout=count(-1),
    )


def reserve(model: Model, capacity: int) -> Model:
    """`model` for a history of that capacity."""
    more = _room(capacity) - model.factors.shape[0]
    return model._replace(factors=jnp.pad(model.factors, (0, max(more, 0))))


def representatives(losses: jax.Array, mask: jax.Array, number: int) -> jax.Array:
    """Rows that stand for all: the best half of `number`, then evenly from the other ranks: i32[number].

    Args:
      losses: float[rows], +inf where a trial failed.
      mask: bool[rows], at least `number` of which are True if each is to be chosen once.
      number: of rows to choose.
    """
    order = jnp.argsort(jnp.where(mask, losses, jnp.inf), stable=True).astype(jnp.int32)
    held = jnp.argsort(~mask[order], stable=True)
    best, others = number // 2, number - number // 2
    step = jnp.maximum(mask.sum(dtype=jnp.int32) - best, others) / others
    rank = jnp.concatenate([jnp.arange(best), best + (step * jnp.arange(others)).astype(jnp.int32)])
    return order[held[jnp.minimum(rank, mask.shape[0] - 1)]]


def chosen_of(history: History) -> jax.Array:
    """The rows that the models know where they do not know all: representatives, and the latest: i32[896]."""
    end = jnp.minimum(history.count.value, history.losses.shape[0])
    latest = end - LATEST // 2 + jnp.arange(LATEST // 2, dtype=jnp.int32)
    is_older = history.mask & (jnp.arange(history.losses.shape[0]) < latest[0])
    return jnp.concatenate([representatives(history.losses, is_older, MOST - LATEST - LATEST // 2), latest])


class Seen(NamedTuple):
    """The rows of a history that the models know."""

    unit: jax.Array
    """float[rows, dims]; with gradients, float[rows, 2 dims], of which the second half is the gradient"""
    losses: jax.Array
    mask: jax.Array

    def at(self, rows: jax.Array) -> "Seen":
        """Some of the rows."""
        return jax.tree.map(lambda x: x[rows], self)


def data_of(space: Space, seen: Seen) -> gp.Data:
    """What the models are fitted to: the losses, and the slopes of the best trials where gradients were told."""
    x = features(space, seen.unit[:, : space.dims])
    if seen.unit.shape[1] == space.dims:
        return gp.data_of(x, seen.losses, seen.mask, None)
    reals = np.flatnonzero(space.levels == 0)
    finite = seen.mask & jnp.isfinite(seen.losses)
    most = min(max(SLOPES // max(reals.size, 1), 1), finite.shape[0])
    best = lax.top_k(-jnp.where(finite, seen.losses, jnp.inf), most)[1].astype(jnp.int32)
    value = seen.unit[best][:, space.dims + reals] * distances(seen.losses, seen.mask)[1]
    live = space.active(seen.unit[best][:, : space.dims])[:, reals]
    known = finite[best][:, None] & live & jnp.isfinite(value)
    observed = gp.Slopes(jnp.repeat(best, reals.size), value.reshape(-1), known.reshape(-1))
    at = jnp.concatenate([slopes.valued(x), slopes.along(x[best], reals)])
    return gp.data_of(at, seen.losses, seen.mask, None)._replace(slopes=observed)


def observe(
    key: jax.Array, space: Space, prior: gp.Prior, model: Model, history: History, level: int, newest: int
) -> tuple[Model, gp.Posterior]:
    """The posterior after all that was told, and the model that it came from.

    Args:
      key: of the trajectory.
      space: whose points they are.
      prior: of the hyperparameters.
      model: after the last ask.
      history: what was told.
      level: which of the `plans` of the history's capacity; its models have room for all rows told, unless it is
        behind the last size.
      newest: rows up to which factors are extended one by one, at least 1.
    """
    capacity, told = history.losses.shape[0], history.count.value
    plan = plans(capacity)[level]
    knows_all = level < len(PLANS)
    before = 0 if level == 0 else plans(capacity)[level - 1].rows
    is_due = (told - model.fitted.value >= plan.period) | (model.fitted.value <= before)
    is_new = is_due | (told > capacity) | (told - model.factored.value > newest) | (model.layout.value != level)

    recent = Seen(history.unit, history.losses, history.mask)
    if knows_all:
        seen, first = jax.tree.map(lambda x: x[: plan.rows], recent), model.factored.value
    else:
        chosen = lax.cond(is_new, lambda: chosen_of(history), lambda: model.chosen)
        chose = jnp.where(is_new, told, model.chose.value)
        latest = chose + jnp.arange(LATEST, dtype=jnp.int32)
        seen = recent.at(jnp.concatenate([chosen, jnp.minimum(latest, capacity - 1)]))
        is_told = jnp.concatenate([jnp.ones(MOST - LATEST, bool), latest < jnp.minimum(told, capacity)])
        seen = seen._replace(mask=seen.mask & is_told)
        first = MOST - LATEST + model.factored.value - chose
        model = model._replace(chosen=chosen, chose=Count(chose))

    example = jax.tree.map(lambda leaf: leaf[0], model.chains.position)
    data = data_of(space, seen)

    def known(data: gp.Data) -> gp.Data:
        return data._replace(between=gp.shared(space, example, data.x, data.x))

    def move() -> hamiltonian.Chains:
        some = data
        if plan.rows > FITTED:
            rows = representatives(seen.losses, seen.mask, FITTED)
            some = data_of(space, seen.at(rows))
        mine = jax.tree.map(lambda leaf: leaf[: plan.members], model.chains.position)
        density = functools.partial(gp.log_posterior, space, prior, known(some))

        def trajectory(i: jax.Array, chains: hamiltonian.Chains) -> hamiltonian.Chains:
            return hamiltonian.advance(jax.random.fold_in(key, i), density, chains, LEAPS)

        # The first time the chains come from the prior; later they have only to keep up.
        number = jnp.where(model.fitted.value == 0, FIRST_TRAJECTORIES, 1)
        chains = lax.fori_loop(0, number, trajectory, model.chains._replace(position=mine))
        place = lambda all_, new: all_.at[: plan.members].set(new)  # noqa: E731
        return chains._replace(position=jax.tree.map(place, model.chains.position, chains.position))

    chains = lax.cond(is_due, move, lambda: model.chains)
    parameters = jax.vmap(prior.at)(jax.tree.map(lambda leaf: leaf[: plan.members], chains.position))
    rows = plan.rows
    shape, size = (plan.members, rows, rows), plan.members * rows**2

    def afresh() -> jax.Array:
        return gp.factors(space, parameters, known(data))

    def grown() -> jax.Array:
        w = model.factors[:size].reshape(shape)

        def add(i: jax.Array, w: jax.Array) -> jax.Array:
            at = jnp.minimum(first + i, rows - 1)
            new, _ = gp.extended(space, parameters, data.x, seen.mask & (jnp.arange(rows) < at), w, at, data.x[at])
            new = jnp.where(seen.mask[at] & (first + i < rows), new, w[:, at])
            return lax.dynamic_update_index_in_dim(w, new, at, 1)

        return lax.fori_loop(0, newest, add, w)

    if data.slopes is None:
        w = lax.cond(is_new, afresh, grown)
        model = model._replace(factors=lax.dynamic_update_slice(model.factors, w.reshape(-1), (0,)))
    else:
        # Which trials have their slopes in the model changes with every new one that is among the best.
        w = afresh()
    model = model._replace(
        chains=chains,
        fitted=Count(jnp.where(is_due, told, model.fitted.value)),
        factored=Count(told),
        layout=count(level),
    )
    return model, gp.condition(parameters, w, data)


@functools.lru_cache(maxsize=256)
def surrogate(space: Space, input_warping: bool, gradients: bool) -> Surrogate:
    """The ensemble as a `Surrogate`, with `Settings`.

    Args:
      space: whose points it predicts.
      input_warping: whether the models learn to bend the inputs.
      gradients: whether the second half of the history's dims are gradients.
    """

    def at(unit: jax.Array) -> jax.Array:
        """Where the models see the values of points."""
        x = features(space, unit)
        return slopes.valued(x) if gradients else x

    def prior_of(settings: Settings) -> gp.Prior:
        return gp.prior_of(space, *settings, input_warping)

    def learn(
        key: jax.Array, settings: Settings, model: Model, history: History, level: int, newest: int, waiting: int
    ) -> tuple[Model, gp.Posterior]:
        model, posterior = observe(key, space, prior_of(settings), model, history, level, newest)
        return model, gp.widened(posterior, waiting)

    def row(posterior: gp.Posterior, turn: jax.Array) -> jax.Array:
        return posterior.mask.shape[0] + turn

    def fantasize(posterior: gp.Posterior, turn: jax.Array, unit: jax.Array, *drawn: jax.Array) -> tuple:
        return gp.fantasized(space, posterior, row(posterior, turn), at(unit[None])[0], *drawn)

    def updated(
        posterior: gp.Posterior, before: Prediction, unit: jax.Array, link: gp.Row, turn: jax.Array
    ) -> Prediction:
        return gp.updated(space, posterior, before, at(unit), link, row(posterior, turn))

    return Surrogate(
        plans=plans,
        init=lambda key, settings, capacity: init(key, prior_of(settings).mean, capacity),
        reserve=reserve,
        observe=learn,
        predict=lambda posterior, unit: gp.predict(space, posterior, at(unit)),
        std=gp.deviation,
        fantasize=fantasize,
        updated=updated,
        draw=lambda key, posterior, before, unit: gp.draw(key, space, posterior, before, at(unit)),
    )
