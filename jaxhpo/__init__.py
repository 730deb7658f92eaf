"""jaxhpo: hyperparameter optimization as pure functions, for people who train with JAX and Flax."""

# What is searched.
from jaxhpo.parameters import Array, Categorical, Float, Int, OneOf, Ordinal
from jaxhpo.space import Space

# What is run.
from jaxhpo.engine.external import external
from jaxhpo.flax import flax_trainable
from jaxhpo.optimizers import select_optimizer
from jaxhpo.gradient import (
    Forward,
    Implicit,
    Online,
    Reverse,
    Truncated,
    check_gradient,
    find_nonfinite,
    unroll,
)
from jaxhpo.modules import CNN, MLP
from jaxhpo.trainable import Trainable

# Architectures.
from jaxhpo.automl import nas

# How it is searched.
from jaxhpo.automl import controlled, controller, darts, ppo, regularized_evolution, reinforce
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
from jaxhpo.population import cma_es, differential_evolution, genetic, islands, particle_swarm, pbt
from jaxhpo.sequential import bayesian, coordinate_descent, gp_ei, tpe
from jaxhpo.stochastic import annealing, quasirandom, random

# Running a study.
from jaxhpo.compare import compare
from jaxhpo.comparison import Comparison
from jaxhpo.lineage import Schedule, replay
from jaxhpo.minimize import AllTrialsFailed, minimize
from jaxhpo.result import Result
from jaxhpo.study import Trace, study

# By hand, and for methods of your own.
from jaxhpo import history
from jaxhpo.history import History
from jaxhpo.method import Count, Initializer, Method, Trials, ask_key, axes, black_box, trial_keys

__all__ = [
    "CNN",
    "MLP",
    "AllTrialsFailed",
    "Array",
    "Categorical",
    "Comparison",
    "Count",
    "ExtrapolationRule",
    "Float",
    "Forward",
    "History",
    "Implicit",
    "Initializer",
    "Int",
    "MedianRule",
    "Method",
    "OneOf",
    "Online",
    "Ordinal",
    "Result",
    "Reverse",
    "Schedule",
    "Space",
    "Trace",
    "Trainable",
    "Trials",
    "Truncated",
    "annealing",
    "asha",
    "ask_key",
    "axes",
    "bayesian",
    "black_box",
    "bohb",
    "check_gradient",
    "cma_es",
    "compare",
    "controlled",
    "controller",
    "coordinate_descent",
    "darts",
    "dehb",
    "differential_evolution",
    "early_stopping",
    "external",
    "find_nonfinite",
    "flax_trainable",
    "genetic",
    "gp_ei",
    "gradient",
    "grid",
    "history",
    "hyperband",
    "islands",
    "minimize",
    "nas",
    "particle_swarm",
    "pbt",
    "polish",
    "ppo",
    "quasirandom",
    "random",
    "regularized_evolution",
    "reinforce",
    "replay",
    "select_optimizer",
    "study",
    "successive_halving",
    "tpe",
    "trial_keys",
    "trust_region",
    "unroll",
]
