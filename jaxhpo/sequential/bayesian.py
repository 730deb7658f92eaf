"""Bayesian optimization: a model of the loss from what was told, and the trials that are worth most to it.

Jones, Schonlau and Welch (1998), Efficient global optimization of expensive black-box functions. Trials that are not
told yet, of this ask and of `pending`, are in the model with losses that every member of the ensemble draws from what
it expects there (Snoek, Larochelle and Adams 2012, Practical Bayesian optimization of machine learning algorithms,
section 3.2): the acquisition of the next one is averaged over these fantasies.
"""

import functools
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
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, black_box, count
from jaxhpo.sequential import proposal
from jaxhpo.sequential.acquisition import ACQUISITIONS
from jaxhpo.sequential.surrogate import ensemble, trees
from jaxhpo.sequential.surrogate.slopes import by_unit
from jaxhpo.sequential.surrogate.surrogate import Prediction, Surrogate
from jaxhpo.space import Space, working_dtype
from jaxhpo.untried import among, everything, fingerprints
from jaxhpo.variation import latin_hypercube

SURROGATES = ("gp", "forest")
THOMPSON = "thompson"
LEADERS = 8
ENUMERATED = 1024
OTHERS = 16
GROWN_AT_ONCE = 64


class Settings(NamedTuple):
    """Numeric settings of Bayesian optimization."""

    surrogate: PyTree
    """of the surrogate: `ensemble.Settings` of "gp", none of "forest\""""
    exploration: jax.Array
    """float[]: by how much a loss must improve, in standard deviations of the losses, or for "ucb" how many standard
    deviations of the posterior count; without meaning for "thompson\""""


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


class Tried(NamedTuple):
    """Hashes of points that are not to be proposed."""

    code: jax.Array
    """u32[n]"""
    mask: jax.Array
    """bool[n]: those that count"""

    def has(self, code: jax.Array) -> jax.Array:
        """Which of u32[m] are among them."""
        return among(code, self.code, self.mask)

    def add(self, turn: jax.Array, code: jax.Array) -> "Tried":
        """With one more, u32[], in the row i32[], counted from the end."""
        at = self.code.shape[0] + turn
        return Tried(self.code.at[at].set(code), self.mask.at[at].set(True))


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, surrogate: Surrogate, acquisition: str, startup: int, uses_gradients: bool, batch: int
) -> tuple[Callable, Callable, Callable, Callable]:
    samples = acquisition == THOMPSON
    score = ACQUISITIONS["ucb" if samples else acquisition]
    is_finite = bool(space.levels.all())
    designed = -(-startup // batch) * batch
    # Thompson's draws are independent: nothing has to be known of the other rows of an ask.
    fantasies = 0 if batch == 1 or samples else batch

    def init(key: jax.Array, settings: Settings) -> State:
        key_design, key_model = jax.random.split(key)
        history = record.empty((1 + uses_gradients) * space.dims, max(batch, record.SMALLEST), ensemble.GROWTH)
        return State(
            history=history,
            design=latin_hypercube(key_design, designed, space.dims),
            model=surrogate.init(key_model, settings.surrogate, history.losses.shape[0]),
            settings=settings,
            asked=count(),
        )

    def tried_of(history: History, rows: int | None, pending: Trials | None) -> Tried:
        """What the first rows of a history hold, or all, and what is pending; with room for an ask."""
        units, masks = [history.unit[:rows, : space.dims]], [history.mask[:rows]]
        if pending is not None:
            units, masks = [*units, pending.unit], [*masks, pending.active]
        none = jnp.zeros(batch, jnp.uint32)
        codes = [fingerprints(space, unit) for unit in units]
        return Tried(jnp.concatenate([*codes, none]), jnp.concatenate([*masks, none > 0]))

    def expect(
        key: jax.Array, state: State, level: int, normal: jax.Array, pending: Trials | None
    ) -> tuple[PyTree, PyTree, Tried]:
        """The model, its posterior with room for the fantasies of an ask, and what was tried already."""
        plans = surrogate.plans(state.history.losses.shape[0])
        waiting = normal.shape[0] - batch
        newest, room = min(batch, GROWN_AT_ONCE), waiting + fantasies
        parts = key, state.settings.surrogate, state.model, state.history, level, newest, room
        model, posterior = surrogate.observe(*parts)
        is_last = level == len(plans) - 1
        tried = tried_of(state.history, None if is_last else plans[level].rows, pending)
        if pending is not None:

            def wait(posterior: PyTree, row: tuple) -> tuple[PyTree, None]:
                return surrogate.fantasize(posterior, *row)[0], None

            turns = jnp.arange(-room, -fantasies)
            posterior, _ = lax.scan(wait, posterior, (turns, pending.unit, normal[batch:], pending.active))
        return model, posterior, tried

    def propose(level: int, key: jax.Array, state: State, pending: Trials | None) -> tuple[jax.Array, PyTree]:
        history, waiting = state.history, 0 if pending is None else pending.unit.shape[0]
        plan = surrogate.plans(history.losses.shape[0])[level]
        key_model, key_pool, key_picks = jax.random.split(key, 3)
        drawn = bits(key_picks, ((waiting + batch) * plan.members + 2 * batch,))
        seeds, normal = drawn[: 2 * batch].reshape(batch, 2), ndtri(uniform(drawn[2 * batch :]))
        normal = normal.reshape(-1, plan.members)
        model, posterior, tried = expect(key_model, state, level, normal, pending)

        points = everything(space, ENUMERATED)
        if points is None:
            best = lax.top_k(-jnp.where(history.mask, history.losses, jnp.inf), LEADERS)[1]
            pool = proposal.candidates(key_pool, space, history.unit[best, : space.dims], plan.candidates)
        else:
            pool = points.astype(history.unit.dtype)
        # Where a point always has real dims, the shortlist alone is compared with what was tried.
        codes = fingerprints(space, pool) if is_finite or samples or space.nesting else None

        def worth(posterior: PyTree, prediction: Prediction) -> jax.Array:
            std = surrogate.std(posterior, prediction.variance)
            values = score.value(prediction.mean, std, posterior.best[:, None], state.settings.exploration)
            # A model that is not sound counts as one that is.
            is_sound = ~jnp.isnan(values).any(1)
            values = score.ensemble(jnp.where(is_sound[:, None], values, values[jnp.argmax(is_sound)]), 0)
            return jnp.where(jnp.isnan(values), -jnp.inf, values)

        def shortlist(
            posterior: PyTree, values: jax.Array, seed: jax.Array, tried: Tried
        ) -> tuple[jax.Array, jax.Array]:
            """Points to choose from and how good they are."""
            if points is not None or samples:
                return pool, values
            value = lambda unit: worth(posterior, surrogate.predict(posterior, unit))  # noqa: E731
            start = pool[lax.top_k(values, plan.starts)[1]]
            top = proposal.climbed(value, space, start, plan.steps) if plan.steps else start
            moves = space.levels > 0 if plan.steps else space.levels >= 0
            top = proposal.neighboured(seed, value, space, top, moves, plan.rounds)
            both = jnp.concatenate([top, start])
            return both, jnp.where(tried.has(fingerprints(space, both)), -jnp.inf, value(both))

        def pick(carry: tuple, row: tuple) -> tuple[tuple, jax.Array]:
            posterior, prediction, tried = carry
            turn, seed, normal = row
            if samples:
                key = jax.random.wrap_key_data(seed, impl="threefry2x32")
                values = -surrogate.draw(key, posterior, prediction, pool)
                values = jnp.where(jnp.isnan(values), -jnp.inf, values)
            else:
                values = worth(posterior, prediction)
            if codes is not None:
                again = tried.has(codes)
                values = jnp.where(again & ~again.all(), -jnp.inf, values)
            choice, values = shortlist(posterior, values, seed, tried)
            chosen = choice[jnp.argmax(values)]
            tried = tried.add(turn, fingerprints(space, chosen))
            if fantasies:
                posterior, link = surrogate.fantasize(posterior, turn, chosen, normal, jnp.ones((), bool))
                prediction = surrogate.updated(posterior, prediction, pool, link, turn)
            return (posterior, prediction, tried), chosen

        turns = jnp.arange(-batch, 0)
        carry = posterior, surrogate.predict(posterior, pool), tried
        _, chosen = lax.scan(pick, carry, (turns, seeds, normal[:batch]))
        return chosen, model

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        asked, told = state.asked.value, state.history.count.value
        sizes = [plan.rows for plan in surrogate.plans(state.history.losses.shape[0])]
        level = sum((told > size).astype(jnp.int32) for size in sizes[:-1])

        def begin() -> tuple[jax.Array, PyTree]:
            design = lax.dynamic_slice_in_dim(state.design, jnp.minimum(asked, designed - batch), batch)
            if not is_finite:
                return design, state.model
            others = everything(space, ENUMERATED)
            others = space.sample(key, OTHERS + batch) if others is None else jax.random.permutation(key, others)

            def pick(tried: Tried, row: tuple) -> tuple[Tried, jax.Array]:
                turn, point = row
                options = jnp.concatenate([point[None], others])
                codes = fingerprints(space, options)
                index = jnp.argmin(tried.has(codes))
                return tried.add(turn, codes[index]), options[index]

            rows = jnp.arange(-batch, 0), design
            return lax.scan(pick, tried_of(state.history, None, pending), rows)[1], state.model

        # Results that are known make the design superfluous; up to a batch of those rows may be padding.
        is_design = (asked < designed) & (told < designed + batch - 1)
        branches = [begin] + [functools.partial(propose, i, key, state, pending) for i in range(len(sizes))]
        unit, model = lax.switch(jnp.where(is_design, 0, level + 1), branches)
        return black_box(space, unit, asked), state._replace(model=model, asked=Count(asked + batch))

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        unit = trials.unit
        if uses_gradients:
            unknown = jnp.full_like(unit, jnp.nan)
            unit = jnp.concatenate([unit, unknown if gradients is None else by_unit(space, unit, gradients)], axis=1)
        return state._replace(history=record.append(state.history, unit, losses, trials.active))

    def reserve(state: State, capacity: int) -> State:
        history = record.reserve(state.history, capacity, ensemble.GROWTH)
        return state._replace(history=history, model=surrogate.reserve(state.model, history.losses.shape[0]))

    return init, ask, tell, reserve


def bayesian(
    space: PyTree,
    *,
    surrogate: str = "gp",
    acquisition: str = "log_ei",
    startup: int | None = None,
    exploration: float | None = None,
    lengthscale: float = 0.3,
    noise: float = 1e-4,
    trend: float = 1.0,
    tail: float = 1.0,
    input_warping: bool = False,
    gradients: bool = False,
    batch: int = 1,
) -> Method:
    """Bayesian optimization, with the surrogate and the acquisition function by name.

    The surrogate "gp" is an ensemble of Gaussian processes whose covariance is a Matérn 5/2, with a lengthscale for
    each dim and a Hamming distance where levels have no order, and a quadratic trend. The hyperparameters of each are
    sampled from their posterior by Hamiltonian Monte Carlo, among them how much the upper tail of the losses is drawn
    in. Up to 1,024 trials all of them are in the models, from then on the best, others of all ranks, and the latest.
    "forest" is 64 randomised trees, for many dims, many categoricals or many trials. Failed trials count as the worst.

    The acquisition is tried at hundreds of candidates and climbed from the best ones. The rows of an ask, and
    `pending` trials, count as told with losses that the models draw. A point that was tried is not tried again as long
    as others can be found.

    Args:
      space: a pytree of parameters, or a `Space`.
      surrogate: "gp" or "forest".
      acquisition: "log_ei", the logarithm of the expected improvement; "pi", that of its probability; "ucb", the lower
        confidence bound; or "thompson", one function drawn from the posterior for each row.
      startup: trials of the random design that comes first, a Latin hypercube, at least 1; rounded up to whole
        batches. One a dim, but 3 to 5, if not given.
      exploration: margin that a loss must improve by, in standard deviations of the losses, at least 0; for "ucb" the
        standard deviations of the posterior that count. 0, and 2 for "ucb", if not given.
      lengthscale: median of the prior of lengthscales in the unit cube, over the square root of the number of dims,
        above 0; only of "gp", as all that follow but the last.
      noise: median of the prior of the variance of the noise, that of the Matérn part being 1, above 0.
      trend: median of the prior of the variance of the quadratic trend, above 0.
      tail: median of the prior of a, where the models see log(1 + a t) of the distance t from the best loss in units
        of the median's, above 0: small is nearly linear.
      input_warping: whether the models learn to bend the unit interval of each dim, by the Kumaraswamy distribution.
      gradients: whether the objective is differentiable: the models then observe the slopes of the best trials along
        real dims as well. Not with `input_warping`, nor for problems that are not JAX.
      batch: trials per ask, of any size. One learns the most from each trial, more fill a device.

    Returns:
      A `Method` whose settings are exploration and, for "gp", lengthscale, noise, trend and tail.

    Raises:
      ValueError, TypeError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> space = {"x": hpo.Array(2, -5.0, 5.0), "kind": hpo.Categorical(("a", "b"))}
      >>> objective = lambda key, hparams: (hparams["x"] ** 2).sum() + hparams["kind"]
      >>> method = hpo.bayesian(space, surrogate="forest", batch=4)
      >>> hpo.minimize(objective, method, key=jax.random.key(0), trials=64, progress=False).best_loss < 1
      True

    Reference:
      Jones, Schonlau and Welch (1998), Efficient global optimization of expensive black-box functions. Snoek,
      Larochelle and Adams (2012), Practical Bayesian optimization of machine learning algorithms. Ament et al. (2023),
      Unexpected improvements to expected improvement for Bayesian optimization.
    """
    one_of("surrogate", surrogate, SURROGATES)
    one_of("acquisition", acquisition, (*ACQUISITIONS, THOMPSON))
    if surrogate == "forest" and (input_warping or gradients):
        name = "input_warping" if input_warping else "gradients"
        raise ValueError(f'{name}=True is for surrogate="gp", but surrogate="forest"; leave it out')
    if input_warping and gradients:
        raise ValueError("gradients=True is for inputs as they are, but input_warping=True; leave one of them out")
    space, batch = Space.of(space), whole("batch", batch, 1)
    startup = min(max(space.dims, 3), 5) if startup is None else whole("startup", startup, 1)
    usual = 0.0 if acquisition == THOMPSON else ACQUISITIONS[acquisition].exploration
    exploration = real("exploration", usual if exploration is None else exploration, 0, 1e6, f"{usual:g} is usual")
    medians = (
        real("lengthscale", lengthscale, 1e-3, 1e3, "0.3 is usual"),
        real("noise", noise, 1e-12, 1e3, "1e-4 is usual"),
        real("trend", trend, 1e-12, 1e6, "1 is usual"),
        real("tail", tail, 1e-6, 1e6, "1 is usual"),
    )
    array = functools.partial(jnp.asarray, dtype=working_dtype())
    if surrogate == "gp":
        inner: PyTree
        model, inner = (
            ensemble.surrogate(space, bool(input_warping), bool(gradients)),
            ensemble.Settings(*map(array, medians)),
        )
    else:
        model, inner = trees.surrogate(space), ()
    settings = Settings(inner, array(exploration))
    init, ask, tell, reserve = _functions(space, model, acquisition, startup, bool(gradients), batch)
    return Method(
        "bayesian",
        space,
        settings,
        Initializer(init, settings),
        ask,
        tell,
        batch,
        uses_gradients=bool(gradients),
        reserve=reserve,
    )
