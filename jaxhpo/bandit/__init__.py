"""Bandits: trials compete for training steps."""

from jaxhpo.bandit.hyperband import hyperband
from jaxhpo.bandit.successive_halving import successive_halving

__all__ = ["hyperband", "successive_halving"]
