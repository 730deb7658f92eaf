"""Draws the figure of the README: the learning curves of the demo's study.

python docs/learning_curves.py
"""

from pathlib import Path

import jax

from jaxhpo.demo import digits, tune

result = tune(digits(0), jax.random.key(0))
result.plot("learning_curves").savefig(Path(__file__).with_suffix(".png"), dpi=110)
