"""Draws the figure of the README: the comparison of `jaxhpo compare`.

python docs/comparison.py
"""

from pathlib import Path

import jax
from matplotlib.figure import Figure

from jaxhpo.field import digits, field
from jaxhpo.views import plots

comparison = field(digits(0), jax.random.key(0))
print(comparison.table())
with plots.style():
    figure = Figure(figsize=(13.5, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    comparison.plot("best_so_far", ax=left)
    comparison.plot("ranks", ax=right)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
