"""Sequential search: where the next trials are chosen by what all earlier ones have shown."""

from jaxhpo.sequential.coordinate_descent import coordinate_descent
from jaxhpo.sequential.tpe import tpe

__all__ = ["coordinate_descent", "tpe"]
