"""Stochastic search: points that are drawn, not learned."""

from jaxhpo.stochastic.quasirandom import quasirandom
from jaxhpo.stochastic.random import random

__all__ = ["quasirandom", "random"]
