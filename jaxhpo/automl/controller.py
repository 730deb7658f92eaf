"""A controller: an agent that learns to set hyperparameters while networks train.

Every lane is an environment, a stretch of training steps what an action does, and the reward the fall of the logarithm
of the validation loss. What is learned is a policy that acts on learning curves, to be used on training runs that it
has not seen: `controlled`. Daniel, Taylor and Nowozin (2016), Learning step size controllers for robust neural network
training; Xu, Dai, Kemp and Metz (2019), Learning an adaptive learning rate schedule. It learns by proximal policy
optimization, as `jaxhpo.automl.agent` says.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxhpo.automl.agent import (
    ADAM,
    CURVE,
    Curve,
    Learner,
    Rollout,
    Settings,
    act,
    begun,
    features,
    hidden_of,
    learn,
    level_of,
    network,
    newest,
    outputs_and_value,
    replaced,
    seen,
)
from jaxhpo.automl.policies import log_probs
from jaxhpo.automl.policy_search import SAME
from jaxhpo.checks import real, whole
from jaxhpo.draws import bits, uniform
from jaxhpo.method import Count, Initializer, Method, PyTree, Trials, count, failed, where_rows
from jaxhpo.space import Space, working_dtype
from jaxhpo.trainable import Trainable

MOST_STEPS = 2**31 - 1


class Lanes(NamedTuple):
    """The training runs, arrays [batch]."""

    curve: Curve
    trial: jax.Array
    """i32: number in the order of all starts, -1 before the first"""
    told: jax.Array
    """i32: round of the last loss told, -1 where the trial has none yet"""
    failed: jax.Array
    """bool: whether that was not finite"""


class State(NamedTuple):
    """State of a controller."""

    policy: PyTree
    """what `controlled` takes: parameters of the agent's network, averaged over its last horizons, and the level"""
    params: PyTree
    """those by which it acts"""
    optimizer: optax.OptState
    lanes: Lanes
    rollout: Rollout
    started: jax.Array
    """i32[]: trials started so far"""
    has_level: jax.Array
    """bool[]: whether the level of losses, the median of those that were told first, is known"""
    rate: jax.Array
    """float[] in (0, 1]: share of the learning rate at which the policy learns, less where it moved too far"""
    fresh: jax.Array
    """i32[]: stretches told since it learned"""
    learned: jax.Array
    """i32[]: horizons learned from so far"""
    settings: Settings
    round: Count
    told: Count
    """i32[]: rows told so far, padding included"""


class Row(NamedTuple):
    """What a row of an ask remembers, arrays [batch]."""

    lane: jax.Array
    """i32"""
    trial: jax.Array
    """i32: number in the order of all starts"""
    round: jax.Array
    """i32: the ask"""
    curve: Curve
    """what was seen before"""
    unit: jax.Array
    """float[batch, dims]: as it was drawn"""
    log_prob: jax.Array
    """float[batch]"""


@functools.lru_cache(maxsize=256)
def _functions(
    space: Space, every: int, intervals: int, horizon: int, hidden: int, epochs: int, batch: int
) -> tuple[Callable, Callable, Callable]:
    n, net = batch, network(space, hidden)
    see = functools.partial(features, space, intervals=intervals)

    def init(key: jax.Array, settings: Settings) -> State:
        dtype = working_dtype()
        params = net.init(key, jnp.zeros((1, CURVE + space.dims), dtype))
        nobody = jnp.full(n, -1, jnp.int32)
        zeros = lambda *shape: jnp.zeros((horizon, n, *shape), dtype)  # noqa: E731
        nothing = jnp.full((horizon, n), -1, jnp.int32)
        seen_, unit = zeros(CURVE + space.dims), zeros(space.dims) + 0.5
        return State(
            policy={**params, "level": jnp.zeros((), dtype)},
            params=params,
            optimizer=ADAM.init(params),
            lanes=Lanes(begun(space, n), nobody, nobody, jnp.zeros(n, bool)),
            rollout=Rollout(seen_, seen_, unit, zeros(), zeros(), jnp.zeros((horizon, n), bool), nothing, nothing),
            started=jnp.int32(0),
            has_level=jnp.bool_(False),
            rate=jnp.ones((), dtype),
            fresh=jnp.int32(0),
            learned=jnp.int32(0),
            settings=settings,
            round=count(),
            told=count(),
        )

    def ask(key: jax.Array, state: State, pending: Trials | None = None) -> tuple[Trials, State]:
        del pending
        lanes, now = state.lanes, state.round.value
        new = (lanes.trial < 0) | lanes.failed | (lanes.curve.interval >= intervals)
        curve = where_rows(new, begun(space, n), lanes.curve)
        outputs, _ = outputs_and_value(net, state.params, see(curve))
        unit = act(space, outputs, uniform(bits(key, (n, space.dims))))
        trial = jnp.where(new, state.started + jnp.cumsum(new, dtype=jnp.int32) - 1, lanes.trial)
        slot = jnp.arange(n, dtype=jnp.int32)
        trials = Trials(
            hparams=space.decode(unit),
            unit=unit,
            id=trial,
            steps=jnp.full(n, every, jnp.int32),
            source=jnp.where(new, -1, slot),
            slot=slot,
            active=jnp.ones(n, bool),
            aux=Row(slot, trial, jnp.full(n, now), curve, unit, log_probs(space, outputs, unit).sum(-1)),
        )
        # Until its loss is told, a run is where it was but for the stretch behind it.
        asked = Lanes(
            curve._replace(interval=curve.interval + 1, unit=unit),
            trial,
            jnp.where(new, -1, lanes.told),
            jnp.zeros(n, bool),
        )
        started = state.started + new.sum(dtype=jnp.int32)
        return trials, state._replace(lanes=asked, started=started, round=Count(now + 1))

    def heard(lanes: Lanes, row: Row, curve: Curve, is_failed: jax.Array, trained: jax.Array) -> Lanes:
        """The runs after their losses are told, in any order."""
        owner = lanes.trial[row.lane]
        mine = trained & ((owner == row.trial) | (owner < 0)) & (row.round >= lanes.told[row.lane])
        last, any_ = newest(row.lane, row.round, mine, n)
        moved = replaced(lanes, Lanes(curve, row.trial, row.round, is_failed), last, any_)
        # Stretches that were asked for since are behind it, too.
        interval = jnp.maximum(lanes.curve.interval, moved.curve.interval)
        return moved._replace(curve=moved.curve._replace(interval=interval))

    def recorded(rollout: Rollout, written: Rollout, lane: jax.Array, trained: jax.Array) -> Rollout:
        """The rollout with rows, of which the last one stays where several have one place."""
        last, any_ = newest(written.round % horizon * n + lane, written.round, trained, horizon * n)
        last, any_ = last.reshape(horizon, n), any_.reshape(horizon, n)
        return replaced(rollout, written, last, any_ & (written.round[last] >= rollout.round))

    def improved(state: State) -> State:
        """After all epochs on the rollout, which is empty then, if as many stretches were told as it holds."""
        settings, enough = state.settings, state.fresh >= horizon * n
        learner = Learner(state.params, state.optimizer, state.rate)
        params, optimizer, rate = learn(space, net, learner, state.rollout, enough, settings, epochs)
        share = 1 / jnp.clip(state.learned + 1, 1, settings.average)
        average = jax.tree.map(lambda old, new: old + share * (new - old), {"params": state.policy["params"]}, params)
        after = state._replace(
            policy={**average, "level": state.policy["level"]},
            params=params,
            optimizer=optimizer,
            rollout=state.rollout._replace(round=jnp.full_like(state.rollout.round, -1)),
            rate=rate,
            fresh=jnp.int32(0),
            learned=state.learned + 1,
        )
        kept = jax.tree.map(lambda a, b: jnp.where(enough, a, b), after, state)
        # Counts stay as they are, so that they are not batched under `vmap`.
        return kept._replace(round=state.round, told=state.told)

    def tell(state: State, trials: Trials, losses: jax.Array, gradients: PyTree = None) -> State:
        del gradients
        row, settings = trials.aux, state.settings
        # A row without steps is a result that was known beforehand: there is no training run to it.
        trained, is_failed = trials.active & (trials.steps > 0), failed(losses)
        succeeded = trained & ~is_failed
        level = jnp.where(state.has_level | ~succeeded.any(), state.policy["level"], level_of(losses, succeeded))
        level = level.astype(state.policy["level"].dtype)
        unit = jnp.where(trained[:, None], trials.unit, 0.5).astype(row.unit.dtype)
        curve = seen(row.curve, losses, unit, level)
        reward = jnp.where(is_failed, -settings.penalty, jnp.maximum(row.curve.last - curve.last, -settings.penalty))
        before = see(row.curve)
        by_now = log_probs(space, outputs_and_value(net, state.params, before)[0], unit).sum(-1)
        log_prob = jnp.where((jnp.abs(row.unit - unit) <= SAME).all(-1), row.log_prob, by_now)
        ends = is_failed | (curve.interval >= intervals)
        written = Rollout(before, see(curve), unit, log_prob, reward, ends, row.trial, row.round)
        told = state.told.value
        after = state._replace(
            policy={**state.policy, "level": level},
            lanes=heard(state.lanes, row, curve, is_failed, trained),
            rollout=recorded(state.rollout, written, row.lane, trained),
            started=jnp.maximum(state.started, jnp.max(jnp.where(trained, row.trial, -1)) + 1),
            has_level=state.has_level | succeeded.any(),
            fresh=state.fresh + trained.sum(dtype=jnp.int32),
            told=Count(told + losses.shape[0]),
        )
        full = (told + losses.shape[0]) // (horizon * n) > told // (horizon * n)
        return lax.cond(full, improved, lambda state: state, after)

    return init, ask, tell


def controller(
    space: PyTree,
    *,
    every: int,
    max_steps: int,
    horizon: int | None = None,
    hidden: int = 32,
    epochs: int = 10,
    learning_rate: float = 3e-3,
    discount: float = 1.0,
    trace: float = 0.95,
    clip: float = 0.2,
    entropy: float = 0.003,
    penalty: float = 5.0,
    average: int = 20,
    divergence: float = 0.05,
    batch: int = 32,
) -> Method:
    """An agent that learns to set hyperparameters while networks train, by proximal policy optimization.

    Every lane trains a network, `every` steps at a time. Before each stretch the agent sees the logarithm of its
    validation loss, by how much that fell, the lowest one, the share of the budget that is gone, and the
    hyperparameters that it has; it then draws those of the next stretch. Its reward is how much the logarithm of the
    loss falls, so losses are to be positive. A run whose loss is not finite ends with a penalty; its lane, like one
    that has trained `max_steps`, starts a new network. Only what `Trainable.step` reads of the hyperparameters at every
    step can be controlled.

    The policy is `state.policy`, a pytree that `flax.serialization` saves; `controlled` trains by it. Known results,
    which come without a training run, tell it nothing. Losses count in units of the median of those that are told
    first.

    Args:
      space: a pytree of parameters, or a `Space`: what is controlled.
      every: training steps between two actions, at least 1.
      max_steps: training steps of a run, a multiple of `every`.
      horizon: asks that the agent learns from at once; those of one run if not given.
      hidden: size of the two layers of policy and value, at least 1.
      epochs: steps of Adam for each horizon, at least 1.
      learning_rate: of Adam, in (0, 1]; that of the policy falls, for a time, where it would move too far.
      discount: of rewards, for every stretch, in [0, 1].
      trace: the lambda of generalised advantages, in [0, 1]: with 1 an action is judged by what the whole rest of the
        run brings, with less the more by the value that the agent has learned.
      clip: of the ratio of probabilities, in (0, 1).
      entropy: weight of the policy's entropy, at least 0.
      penalty: for a failure, at least 0; a rise of the logarithm of the loss costs no more.
      average: horizons whose policies are averaged to the one that is learned, at least 1.
      divergence: of Kullback and Leibler, from the policy before a horizon to that after it, at least 0: a step beyond
        it is taken back.
      batch: networks that train side by side, at least 1; also the training states that are kept.

    Returns:
      A `Method` whose settings are learning_rate, discount, trace, clip, entropy, penalty, average and divergence.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> import jax, jaxhpo as hpo
      >>> descent = hpo.Trainable(
      ...     init=lambda key, h: jax.random.normal(key, (2,)),
      ...     step=lambda key, x, h: x - h["lr"] * x * jax.numpy.array([1.0, 4.0]),
      ...     evaluate=lambda x, h: (x**2).sum(),
      ... )
      >>> space = {"lr": hpo.Float(0.01, 2.0, log=True)}
      >>> method = hpo.controller(space, every=2, max_steps=10, batch=16)
      >>> state, _ = jax.jit(hpo.study(descent, method, rounds=50))(jax.random.key(0))
      >>> train = hpo.controlled(descent, space, state.policy, every=2, max_steps=10)
      >>> loss, schedule = train(jax.random.key(1))
      >>> schedule["lr"].shape
      (5,)

    Reference:
      Daniel, Taylor and Nowozin (2016), Learning step size controllers for robust neural network training. Schulman et
      al. (2017), Proximal policy optimization algorithms.
    """
    space, batch = Space.of(space), whole("batch", batch, 1)
    every, intervals = _intervals(every, max_steps)
    horizon = intervals if horizon is None else whole("horizon", horizon, 1)
    hidden, epochs = whole("hidden", hidden, 1), whole("epochs", epochs, 1)
    values = (
        real("learning_rate", learning_rate, 1e-7, 1, "0.003 is usual"),
        real("discount", discount, 0, 1, "1 is usual, as runs end"),
        real("trace", trace, 0, 1, "0.95 is usual; 1 looks to the end of a run"),
        real("clip", clip, 1e-3, 0.999, "0.2 is usual"),
        real("entropy", entropy, 0, 100, "0.003 is usual"),
        real("penalty", penalty, 0, 1e6, "5 is usual"),
        whole("average", average, 1),
        real("divergence", divergence, 0, 1e6, "0.05 is usual"),
    )
    settings = Settings(*(jnp.asarray(value, working_dtype()) for value in values))
    init, ask, tell = _functions(space, every, intervals, horizon, hidden, epochs, batch)
    return Method("controller", space, settings, Initializer(init, settings), ask, tell, batch, slots=batch)


def _intervals(every: int, max_steps: int) -> tuple[int, int]:
    """`every`, and how many stretches a run has."""
    every = whole("every", every, 1, most=MOST_STEPS)
    max_steps = whole("max_steps", max_steps, 1, most=MOST_STEPS)
    if max_steps % every:
        enough = every * -(-max_steps // every)
        raise ValueError(f"max_steps must be a multiple of every={every}, got {max_steps}; say {enough}")
    return every, max_steps // every


def controlled(trainable: Trainable, space: PyTree, params: PyTree, *, every: int, max_steps: int) -> Callable:
    """Training whose hyperparameters a learned policy sets.

    Args:
      trainable: how a network trains; another task than that which the policy has learned on is allowed.
      space: what the policy sets.
      params: of the policy, from the state of a `controller` over this space, or as `flax.serialization` restores it.
      every: training steps between two actions, at least 1.
      max_steps: training steps, a multiple of `every`.

    Returns:
      A pure function `(key) -> (loss, schedule)`: `schedule` is shaped like the space, with a leading axis, the values
      of every stretch. The policy takes its most probable actions. `key` is used as a trial's, so an objective of
      `unroll` gets the same network from it.

    Raises:
      TypeError, ValueError: an argument is not what it should be, such as a state for its `policy`.
    """
    if not isinstance(trainable, Trainable):
        raise TypeError(f"trainable must be a Trainable, got {trainable!r}; a controller acts on training steps")
    space = Space.of(space)
    every, intervals = _intervals(every, max_steps)
    net = network(space, hidden_of(params))
    expected = dict(
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, CURVE + space.dims))), level=np.float32(0)
    )
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    if shapes(expected) != shapes(params):
        raise ValueError(f"params are not of a controller over {space!r}; give its space, too")

    def choose(curve: Curve) -> tuple[jax.Array, PyTree]:
        outputs, _ = outputs_and_value(net, {"params": params["params"]}, features(space, curve, intervals))
        unit = act(space, outputs)
        return unit, jax.tree.map(lambda x: x[0], space.decode(unit))

    def run(key: jax.Array) -> tuple[jax.Array, PyTree]:
        def stretch(carry: tuple, i: jax.Array) -> tuple[tuple, tuple]:
            curve, state = carry
            unit, hparams = choose(curve)
            filled = space.fill(hparams)

            def step(k: jax.Array, state: PyTree) -> PyTree:
                return trainable.step(jax.random.fold_in(key, i * every + k + 1), state, filled)

            state = lax.fori_loop(0, every, step, state)
            loss = jnp.asarray(trainable.evaluate(state, filled), working_dtype())
            return (seen(curve, loss[None], unit, params["level"]), state), (loss, hparams)

        curve = begun(space, 1)
        first = trainable.init(jax.random.fold_in(key, 0), space.fill(choose(curve)[1]))
        _, (losses, schedule) = lax.scan(stretch, (curve, first), jnp.arange(intervals))
        return losses[-1], schedule

    return run
