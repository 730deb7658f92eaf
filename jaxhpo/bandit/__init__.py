"""Bandits: trials compete for training steps."""

from jaxhpo.bandit.asha import asha
from jaxhpo.bandit.bohb import bohb
from jaxhpo.bandit.dehb import dehb
from jaxhpo.bandit.early_stopping import early_stopping
from jaxhpo.bandit.hyperband import hyperband
from jaxhpo.bandit.rules import ExtrapolationRule, MedianRule
from jaxhpo.bandit.successive_halving import successive_halving

__all__ = [
    "ExtrapolationRule",
    "MedianRule",
    "asha",
    "bohb",
    "dehb",
    "early_stopping",
    "hyperband",
    "successive_halving",
]
