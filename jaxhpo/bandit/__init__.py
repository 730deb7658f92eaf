"""Bandits: trials compete for training steps."""

from jaxhpo.bandit.asha import asha
from jaxhpo.bandit.bohb import bohb
from jaxhpo.bandit.dehb import dehb
from jaxhpo.bandit.hyperband import hyperband
from jaxhpo.bandit.successive_halving import successive_halving

__all__ = ["asha", "bohb", "dehb", "hyperband", "successive_halving"]
