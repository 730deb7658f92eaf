"""Tune a character-level language model with BOHB: models of what trained longest choose what trains next.

pip install jaxhpo
python examples/bohb_char_lm.py                    # on a text that ships with Python
python examples/bohb_char_lm.py --text shakespeare.txt
"""

import argparse
import codecs
import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo as hpo

LENGTH, WIDTH, CONTEXT = 64, 64, 4
SPACE = {
    "width": hpo.Int(8, WIDTH, log=True),
    "context": hpo.Int(1, CONTEXT),
    "dropout": hpo.Float(0.0, 0.5),
    "lr": hpo.Float(1e-4, 1e-1, log=True),
    "b1": hpo.Float(0.5, 0.99),
    "weight_decay": hpo.Float(1e-6, 1e-1, log=True),
}


class CharacterModel(nn.Module):
    """The next character from the last few and from a memory of all before: a gated recurrent unit.

    The hyperparameters are values, not shapes: units beyond `width` are silent, characters before `context` unseen.
    """

    characters: int
    width: jax.Array
    context: jax.Array
    dropout: jax.Array

    @nn.compact
    def __call__(self, text, train=False):  # i32[batch, length] -> float[batch, length, characters]
        live = jnp.arange(WIDTH) < self.width
        embedded = nn.Embed(self.characters, WIDTH)(text) * live
        shifted = [jnp.pad(embedded, ((0, 0), (k, 0), (0, 0)))[:, : text.shape[1]] for k in range(CONTEXT)]
        seen = jnp.concatenate([x * (k < self.context) for k, x in enumerate(shifted)], axis=-1)
        hidden = nn.RNN(nn.GRUCell(WIDTH))(nn.Dense(WIDTH)(seen)) * live
        if train:
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout, hidden.shape)
            hidden = jnp.where(kept, hidden / (1 - self.dropout), 0)
        return nn.Dense(self.characters)(hidden)


class Outcome(NamedTuple):
    """What came of it."""

    result: hpo.Result
    bits: float
    """bits a character, on the part of the text that is for validation"""
    chance: float
    """the same of the frequencies of the characters"""


def read(path):
    """A text: the file, or the Zen of Python and some modules of its library."""
    if path is not None:
        return Path(path).read_text()
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    code = "".join(Path(module.__file__).read_text() for module in (argparse, codecs, contextlib))
    return codecs.decode(this.s, "rot13") + code


def windows(text):
    """The text as windows: i32[n, LENGTH + 1]."""
    characters = sorted(set(text))
    index = {c: i for i, c in enumerate(characters)}
    codes = np.array([index[c] for c in text], np.int32)
    starts = np.arange(0, len(codes) - LENGTH - 1, LENGTH)
    return codes[starts[:, None] + np.arange(LENGTH + 1)], len(characters)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a text file")
    parser.add_argument("--characters", type=int, default=100_000, help="how much of it")
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=270)
    parser.add_argument("--steps", type=int, default=8_000, help="of all trials together")
    options = parser.parse_args(arguments)
    rows, characters = windows(read(options.text)[: options.characters])
    order = np.random.default_rng(0).permutation(len(rows))
    train, valid = rows[order[len(rows) // 5 :]], rows[order[: len(rows) // 5]]

    trainable = hpo.flax_trainable(
        model=lambda h: CharacterModel(characters, h["width"], h["context"], h["dropout"]),
        optimizer=lambda h: optax.adamw(h["lr"], b1=h["b1"], weight_decay=h["weight_decay"]),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=(train[:, :-1], train[:, 1:]),
        valid=(valid[:, :-1], valid[:, 1:]),
        batch_size=32,
    )
    method = hpo.bohb(
        SPACE, max_steps=options.max_steps, min_steps=max(options.max_steps // 27, 1), batch=options.lanes
    )
    result = hpo.minimize(trainable, method, key=jax.random.key(0), steps=options.steps)

    share = np.bincount(train[:, 1:].ravel(), minlength=characters) + 1
    chance = float(-np.log2(share / share.sum())[valid[:, 1:]].mean())
    bits = result.best_loss / float(np.log(2))
    print(result.table())
    print(f"{bits:.3f} bits a character, where their frequencies alone give {chance:.3f}")
    return Outcome(result, bits, chance)


if __name__ == "__main__":
    main()
