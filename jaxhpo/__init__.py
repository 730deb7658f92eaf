"""jaxhpo: hyperparameter optimization as pure functions, for people who train with JAX and Flax."""

from jaxhpo.bandit import hyperband, successive_halving
from jaxhpo.exhaustive import grid
from jaxhpo.gradient import unroll
from jaxhpo.history import History
from jaxhpo.method import Count, Method, Trials, ask_key, axes, trial_keys
from jaxhpo.parameters import Array, Categorical, Float, Int, OneOf, Ordinal
from jaxhpo.space import Space
from jaxhpo.stochastic import quasirandom, random
from jaxhpo.study import Trace, study
from jaxhpo.trainable import Trainable
from jaxhpo.external import external
from jaxhpo.minimize import AllTrialsFailed, minimize
from jaxhpo.result import Result
