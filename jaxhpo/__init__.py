from jaxhpo.parameters import Array, Categorical, Float, Int, OneOf, Ordinal
from jaxhpo.space import Space
