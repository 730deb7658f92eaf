"""The registry of the contract suite, and what drives a method through it.

A method joins with one line in `CASES`. `build` takes a search space and fixes the rest: a batch of about five, and so
few trials that a bandit or a grid is done after some twenty asks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo as hpo
from jaxhpo.automl import controller, darts, ppo, regularized_evolution, reinforce
from jaxhpo.bandit import (
    ExtrapolationRule,
    MedianRule,
    asha,
    bohb,
    dehb,
    early_stopping,
    hyperband,
    successive_halving,
)
from jaxhpo.exhaustive import grid
from jaxhpo.gradient import gradient, polish, trust_region
from jaxhpo.method import Method, Trials
from jaxhpo.population import cma_es, differential_evolution, genetic, islands, particle_swarm, pbt
from jaxhpo.sequential import bayesian, coordinate_descent, gp_ei, tpe
from jaxhpo.stochastic import annealing, quasirandom, random
from tests.one_plus_one import one_plus_one
from tests.snippets import page


class Case(NamedTuple):
    """A method under test."""

    name: str
    build: Callable[[Any], Method]
    keyed: bool = True
    """whether another key gives other trials"""
    chaotic: bool = False
    """whether the rounding of a batched program can move a trial far, as what it maximises has many optima"""


NEW_METHOD = "docs/new_method.md"
ADAM, TRUST = optax.adam(0.1), trust_region()
CASES = [
    Case("grid", lambda space: grid(space, points=2, batch=5), keyed=False),
    Case("random", lambda space: random(space, batch=5)),
    Case("quasirandom", lambda space: quasirandom(space, batch=5)),
    Case("quasirandom-halton", lambda space: quasirandom(space, sequence="halton", batch=5)),
    Case("annealing", lambda space: annealing(space, batch=5)),
    Case("annealing-reheat", lambda space: annealing(space, chains=2, schedule="reheat", batch=5)),
    Case("successive_halving", lambda space: successive_halving(space, trials=9, max_steps=9, batch=4)),
    Case("hyperband", lambda space: hyperband(space, max_steps=9, batch=5)),
    Case("asha", lambda space: asha(space, max_steps=9, batch=5)),
    Case(
        "bohb",
        lambda space: bohb(
            space, max_steps=9, enough=4, scheduler="hyperband", random_fraction=0.2, sampler=quasirandom, batch=5
        ),
    ),
    Case("dehb", lambda space: dehb(space, max_steps=9, population=4, batch=5)),
    Case(
        "early_stopping",
        lambda space: early_stopping(tpe(space, startup=5, candidates=8, batch=5), MedianRule(6, every=2, least=2)),
    ),
    Case(
        "early_stopping-extrapolation",
        lambda space: early_stopping(genetic(space, population=6, batch=4), ExtrapolationRule(6, every=1)),
    ),
    Case("cma_es", lambda space: cma_es(space, population=7, batch=5)),
    Case("cma_es-separable", lambda space: cma_es(space, population=4, covariance="separable", elites=0, batch=5)),
    Case("differential_evolution", lambda space: differential_evolution(space, population=7, trials=40, batch=5)),
    Case(
        "differential_evolution-best",
        lambda space: differential_evolution(space, strategy="best/1/bin", population=5, batch=5),
    ),
    Case("coordinate_descent", lambda space: coordinate_descent(space, starts=2, batch=5)),
    Case("coordinate_descent-cyclic", lambda space: coordinate_descent(space, starts=1, order="cyclic", batch=5)),
    Case("gp_ei", lambda space: gp_ei(space, startup=5, batch=5), chaotic=True),
    Case("bayesian-forest", lambda space: bayesian(space, surrogate="forest", startup=5, batch=5), chaotic=True),
    Case("gradient", lambda space: gradient(space, ADAM, starts=5)),
    Case("gradient-halving", lambda space: gradient(space, TRUST, starts=5, halving=3)),
    Case("genetic", lambda space: genetic(space, population=7, batch=5)),
    Case("genetic-rank", lambda space: genetic(space, population=4, selection="rank", crossover="sbx", batch=5)),
    Case("islands", lambda space: islands(genetic(space, population=6, batch=3), 2, every=2)),
    Case("islands-gradient", lambda space: islands(gradient(space, ADAM, starts=3), 2, every=2)),
    Case("particle_swarm", lambda space: particle_swarm(space, particles=5, batch=5)),
    Case("particle_swarm-spso2011", lambda space: particle_swarm(space, particles=7, variant="spso2011", batch=5)),
    Case("pbt", lambda space: pbt(space, population=5, every=3)),
    Case("pbt-gp", lambda space: pbt(space, population=5, every=3, explore="gp"), chaotic=True),
    Case("polish", lambda space: polish(genetic(space, population=6, batch=5), ADAM, every=2)),
    Case("darts", lambda space: darts(space, max_steps=6, every=2, searches=5)),
    Case("regularized_evolution", lambda space: regularized_evolution(space, population=7, sample=3, batch=5)),
    Case("controller", lambda space: controller(space, every=3, max_steps=6, hidden=4, epochs=2, batch=5)),
    Case("reinforce", lambda space: reinforce(space, batch=5)),
    Case("ppo-autoregressive", lambda space: ppo(space, policy="autoregressive", hidden=4, epochs=2, batch=5)),
    Case("tpe", lambda space: tpe(space, startup=5, candidates=8, batch=5)),
    Case("one_plus_one", lambda space: one_plus_one(space, batch=5)),
    Case("lipschitz", lambda space: page(NEW_METHOD)["lipschitz"](space, startup=5, batch=5)),
    Case("survivors", lambda space: page(NEW_METHOD)["survivors"](space, every=3, batch=5)),
    Case("tpe-univariate", lambda space: tpe(space, multivariate=False, startup=5, candidates=8, batch=5)),
]
NAMES = [case.name for case in CASES]

SPACES: dict[str, Any] = {
    "mixed": {
        "lr": hpo.Float(1e-5, 1e-1, log=True),
        "width": hpo.Int(16, 256, log=True),
        "activation": hpo.Categorical(("relu", "gelu", "silu")),
        "batch_size": hpo.Ordinal((16, 64)),
        "weights": hpo.Array(2, -1.0, 1.0),
        "clip": 1.0,
    },
    "conditional": {
        "optimizer": hpo.OneOf(
            sgd={"momentum": hpo.Float(0.0, 0.99), "nesterov": hpo.OneOf(no={}, yes={"gain": hpo.Float(0.5, 2.0)})},
            adam={"b1": hpo.Float(0.8, 0.99)},
        ),
        "lr": hpo.Float(1e-3, 1.0, log=True),
    },
    "categorical": {
        "a": hpo.Categorical(("x", "y", "z")),
        "b": hpo.Categorical((0.5, 1.5, 4.0)),
        "c": hpo.Categorical((False, True)),
    },
    "one": {"x": hpo.Float(-2.0, 3.0)},
}


class Rig(NamedTuple):
    """A method on a space, compiled once for all tests."""

    case: Case
    method: Method
    init: Callable
    ask: Callable
    tell: Callable
    traced: dict[str, int]
    """how often each function has been traced"""


@functools.cache
def sloped(tell: Callable) -> Callable:
    """`tell` with gradients of its own making where it is given none."""

    def function(state: Any, trials: Trials, losses: jax.Array, gradients: Any = None) -> Any:
        slope = lambda x: jnp.cos(x) / 10 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros_like(x)  # noqa: E731
        return tell(state, trials, losses, jax.tree.map(slope, trials.hparams) if gradients is None else gradients)

    return function


def build(name: str, space: Any) -> Method:
    """The registered method `name` on a space."""
    method = next(case for case in CASES if case.name == name).build(space)
    return method._replace(tell=sloped(method.tell)) if method.uses_gradients else method


@functools.cache
def rig(name: str, space: str = "mixed") -> Rig:
    """The registered method `name` on the space of that name."""
    case = next(case for case in CASES if case.name == name)
    method, traced = build(name, hpo.Space(SPACES[space])), {"init": 0, "ask": 0, "tell": 0}

    def counted(which: str) -> Callable:
        def function(*args: Any) -> Any:
            traced[which] += 1
            return getattr(method, which)(*args)

        # By its name a program is found again in the cache of those that were compiled.
        function.__name__ = which
        return jax.jit(function)

    return Rig(case, method, counted("init"), counted("ask"), counted("tell"), traced)


def loss_of(trials: Trials) -> jax.Array:
    """A smooth bowl with distinct values, better with more steps."""
    unit = np.asarray(trials.unit)
    bowl = ((unit - 0.3) ** 2 * np.arange(1, unit.shape[1] + 1)).sum(1)
    return jnp.asarray(bowl + 1 / (1 + np.asarray(trials.steps)), unit.dtype)


def play(
    rig: Rig,
    state: Any,
    rounds: range,
    losses: Callable[[Trials], jax.Array] | None = loss_of,
    seed: int = 0,
) -> tuple[list[Trials], Any]:
    """The asks of some rounds, and the state after them; without `losses` nothing is told."""
    asked = []
    for now in rounds:
        trials, state = rig.ask(jax.random.fold_in(jax.random.key(seed), now), state)
        asked.append(trials)
        if losses is not None:
            state = rig.tell(state, trials, losses(trials))
    return jax.device_get(asked), state


def start(rig: Rig, seed: int = 0) -> Any:
    """A state from `init`."""
    return rig.init(jax.random.key(seed))


def floats(tree: Any) -> list[np.ndarray]:
    """The floating-point leaves."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return [x for x in leaves if np.issubdtype(x.dtype, np.floating)]


def check_asks(method: Method, asked: list[Trials], told: bool = True) -> None:
    """Everything that the contract says about a study's asks, given from the first one on."""
    next_id, bank = 0, dict[int, int]()
    for trials in asked:
        next_id = _check_ask(method, trials, next_id, bank, told)


def _check_ask(method: Method, trials: Trials, next_id: int, bank: dict[int, int], told: bool) -> int:
    n, on = method.batch, trials.active
    assert trials.unit.shape == (n, method.space.dims) and trials.unit.dtype == np.float32
    assert ((trials.unit >= 0) & (trials.unit <= 1)).all()
    for name in ("id", "steps", "source", "slot"):
        assert getattr(trials, name).shape == (n,) and getattr(trials, name).dtype == np.int32, name
    assert on.dtype == bool and (np.diff(on.astype(int)) <= 0).all(), "active rows come first"
    assert (trials.id[~on] == -1).all()
    expected = jax.tree.leaves(decode(method.space, trials.unit))
    for value, same in zip(jax.tree.leaves(trials.hparams), expected, strict=True):
        np.testing.assert_allclose(value, same, rtol=1e-6, atol=1e-7)

    ids = trials.id[on].tolist()
    new = [i for i in ids if i >= next_id]
    assert len(set(ids)) == len(ids) and min(ids, default=0) >= 0
    assert new == list(range(next_id, next_id + len(new))), "new ids count up"

    steps, source, slot = trials.steps[on], trials.source[on], trials.slot[on]
    assert ((trials.slot >= 0) & (trials.slot <= method.slots)).all()
    assert ((trials.source >= -1) & (trials.source < max(method.slots, 1))).all()
    if not method.slots:
        assert (trials.steps == 0).all() and (source == -1).all() and ids == new
        return next_id + len(new)
    assert len(set(steps.tolist())) <= 1 and (steps >= 1).all(), "equal steps"
    written = slot[slot < method.slots].tolist()
    assert len(set(written)) == len(written), "no slot is written twice"
    for i, s, w in zip(ids, source.tolist(), slot.tolist(), strict=True):
        assert i in new or s >= 0, "a trial that goes on has a training state"
        assert w == method.slots or w == s or w not in source.tolist(), "a slot that is read is written by its reader"
        if s >= 0 and i not in new:
            assert bank[s] == i, "a trial goes on from its own training state"
        assert s == -1 or s in bank
    bank.update((w, i) for i, w in zip(ids, slot.tolist(), strict=True) if w < method.slots)
    return next_id + len(new)


@functools.cache
def _decoder(space: hpo.Space) -> Callable:
    return jax.jit(space.decode)


def decode(space: hpo.Space, unit: np.ndarray) -> Any:
    """`space.decode`, compiled once a space."""
    return jax.device_get(_decoder(space)(unit))


def assert_same(a: Any, b: Any) -> None:
    """Equal in every bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Compiles:
    """Counts what JAX traces and compiles."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **kwargs: Any) -> None:
        del duration, kwargs
        self.count += event.endswith(("jaxpr_trace_duration", "backend_compile_duration"))


compiles = Compiles()
