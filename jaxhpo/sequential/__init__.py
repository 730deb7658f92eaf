"""Sequential search: where the next trials are chosen by what all earlier ones have shown."""

from jaxhpo.sequential.bayesian import bayesian
from jaxhpo.sequential.coordinate_descent import coordinate_descent
from jaxhpo.sequential.gp_ei import gp_ei
from jaxhpo.sequential.tpe import tpe

__all__ = ["bayesian", "coordinate_descent", "gp_ei", "tpe"]
