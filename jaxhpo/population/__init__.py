"""Population search: many candidates that learn from one another."""

from jaxhpo.population.cma_es import cma_es
from jaxhpo.population.differential_evolution import differential_evolution
from jaxhpo.population.genetic import genetic
from jaxhpo.population.islands import islands
from jaxhpo.population.particle_swarm import particle_swarm
from jaxhpo.population.pbt import pbt

__all__ = ["cma_es", "differential_evolution", "genetic", "islands", "particle_swarm", "pbt"]
