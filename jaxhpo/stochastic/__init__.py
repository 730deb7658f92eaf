"""Stochastic search: points that are drawn, not learned."""

from jaxhpo.stochastic.annealing import annealing
from jaxhpo.stochastic.quasirandom import quasirandom
from jaxhpo.stochastic.random import random

__all__ = ["annealing", "quasirandom", "random"]
