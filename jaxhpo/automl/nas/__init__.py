"""Architecture search: networks whose architecture is a point of an ordinary space.

A network is written once at its largest, `hpo.MLP`, `hpo.CNN` or `nas.CellNet`. `mlp_space`, `cnn_space` and
`cell_space` are the spaces of its architectures, `build` is the network of one of them, traced or native, and `export`
the trained network alone, in flax's own layers.
"""

from jaxhpo.automl.nas.cells import EDGES, OPERATIONS, CellNet
from jaxhpo.automl.nas.export import export
from jaxhpo.automl.nas.pictures import describe, draw
from jaxhpo.automl.nas.plain import Block, PlainCell, PlainCNN, PlainMLP
from jaxhpo.automl.nas.sharing import shared_weights, train_supernet
from jaxhpo.automl.nas.spaces import build, cell_space, cnn_space, mlp_space
from jaxhpo.modules import CNN, MLP

__all__ = [
    "CNN",
    "EDGES",
    "MLP",
    "OPERATIONS",
    "Block",
    "CellNet",
    "PlainCNN",
    "PlainCell",
    "PlainMLP",
    "build",
    "cell_space",
    "cnn_space",
    "describe",
    "draw",
    "export",
    "mlp_space",
    "shared_weights",
    "train_supernet",
]
