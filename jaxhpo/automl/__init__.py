"""Search for the structure of networks, and agents that learn to tune."""

from jaxhpo.automl import nas
from jaxhpo.automl.controller import controlled, controller
from jaxhpo.automl.darts import darts
from jaxhpo.automl.ppo import ppo
from jaxhpo.automl.regularized_evolution import regularized_evolution
from jaxhpo.automl.reinforce import reinforce

__all__ = ["controlled", "controller", "darts", "nas", "ppo", "regularized_evolution", "reinforce"]
