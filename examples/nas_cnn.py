"""Architecture search: hundreds of different CNNs in one program, and the best as a plain flax module.

pip install "jaxhpo[demo]"
python examples/nas_cnn.py --out cnn.svg

What is searched is the number of channels and convolutions of each stage, the kernel and the skip connection of each
convolution, the activation, and with them the learning rate. The networks train side by side on scikit-learn's digits:
one compilation, however many architectures there are. The winner leaves without masks, and small.
"""

import argparse
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhpo as hpo


class Outcome(NamedTuple):
    """What came of it."""

    module: nn.Module
    accuracy: float
    """test accuracy of the winner, as exported"""
    parameters: int
    """of the winner"""
    architectures: int
    """how many different ones were trained"""


def split():
    """The images of the digits as (train, valid, test), each inputs and labels."""
    images, y = load_digits(return_X_y=True)
    x = (images / 16).astype("float32").reshape(-1, 8, 8)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    return (x, y), (x_valid, y_valid), (x_test, y_test)


def main(argv: list[str] | None = None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=12, help="the most channels of a convolution")
    parser.add_argument("--depth", type=int, default=2, help="the most convolutions of a stage")
    parser.add_argument("--kernel", type=int, default=3, help="the largest kernel")
    parser.add_argument("--batch", type=int, default=27, help="networks that train side by side")
    parser.add_argument("--max-steps", type=int, default=243, help="training steps of the best")
    parser.add_argument("--out", help="where to draw the winner, such as cnn.svg")
    options = parser.parse_args(argv)

    train, valid, test = split()
    network = hpo.CNN(
        10,
        max_channels=options.channels,
        max_depth=options.depth,
        max_kernel=options.kernel,
        activations=("relu", "gelu", "tanh"),
    )
    space = {"network": hpo.nas.cnn_space(network, min_channels=4), "lr": hpo.Float(5e-3, 0.05, log=True)}
    trainable = hpo.flax_trainable(
        model=lambda h: hpo.nas.build(network, h["network"]),
        optimizer=lambda h: optax.adam(h["lr"]),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=train,
        valid=valid,
        batch_size=32,
    )
    method = hpo.hyperband(space, max_steps=options.max_steps, batch=options.batch)
    result = hpo.minimize(trainable, method, key=jax.random.key(0))

    module, params = hpo.nas.export(network, result.best_hparams["network"], result.best_state.params)
    predicted = module.apply({"params": params}, test[0]).argmax(-1)
    chosen = [
        np.asarray(x).reshape(len(result.trials.id), -1) for x in jax.tree.leaves(result.trials.hparams["network"])
    ]
    outcome = Outcome(
        module,
        float(jnp.mean(predicted == test[1])),
        sum(x.size for x in jax.tree.leaves(params)),
        len(np.unique(np.concatenate(chosen, axis=1), axis=0)),
    )
    print(f"{outcome.architectures} architectures; the best, with {outcome.parameters} parameters, is")
    print(hpo.nas.describe(module))
    print(f"validation loss {result.best_loss:.4f}, test accuracy {outcome.accuracy:.4f}")
    if options.out:
        hpo.nas.draw(module).savefig(options.out)
    return outcome


if __name__ == "__main__":
    main()
