"""Does differentiable architecture search end in skip connections, and do the guards help?

    pip install -e ".[bench]"
    python benchmarks/darts.py

The cell of NAS-Bench-201 on scikit-learn's digits: five searches from keys of their own for each guard and order of the
gradient, all of them as one program. Of the six operations found, the share of skip connections, and the validation
loss of the cell found, trained from the beginning; beside it, that of cells drawn at random and trained the same way.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxhpo as hpo

nas = hpo.nas
SPACE = hpo.Space(nas.cell_space(relaxed=True))
SKIP = nas.OPERATIONS.index("skip_connect")


def training(channels, rate, steps):
    """A network of cells on digits: 600 images to train on, 300 for the choices, 500 to judge what was found."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:1400]
    x, y = (x[order] / 16).astype(np.float32).reshape(-1, 8, 8), y[order]
    network = nas.CellNet(10, channels=channels, stages=2)
    part = {"train": (x[:600], y[:600]), "valid": (x[600:900], y[600:900])}
    return tuple(
        hpo.flax_trainable(
            model=lambda h: nas.build(network, h),
            optimizer=lambda h: optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9),
            loss=optax.softmax_cross_entropy_with_integer_labels,
            train=part["train"],
            valid=valid,
            batch_size=32,
        )
        for valid in (part["valid"], (x[900:], y[900:]))
    )


def judge(judged, steps, edges, key):
    """Losses on images that no search saw, of cells trained from the beginning: float[n] for float[n, 6, 5]."""
    run = jax.jit(jax.vmap(lambda k, e: hpo.unroll(judged, steps)(k, {"edges": tuple(e)})))
    return np.asarray(run(jax.random.split(key, len(edges)), edges))


def found(result, n):
    """The cells that n searches ended with, one-hot: float[n, 6, 5]."""
    return np.stack(result.trials.hparams["edges"], 1)[-n:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--random", type=int, default=20)
    args = parser.parse_args()
    searched, judged = training(args.channels, args.rate, args.steps)
    key = jax.random.key(0)
    drawn = jax.nn.one_hot(jax.random.randint(key, (args.random, 6), 0, 5), 5)
    losses = judge(judged, args.steps, drawn, jax.random.key(1))
    print(f"{args.random} cells drawn at random: loss {np.median(losses):.3f}, best {losses.min():.3f}", flush=True)
    print("guard           order  skips of each search  share  loss (median, best)  seconds")
    for guard in (None, "early_stopping", "dropout"):
        for order in (1, 2):
            method = hpo.darts(
                SPACE,
                optax.adam(0.02),
                max_steps=args.steps,
                every=args.every,
                order=order,
                searches=args.seeds,
                retrain=1,
                guard=guard,
            )
            begun = time.perf_counter()
            edges = found(hpo.minimize(searched, method, key=key, progress=False), args.seeds)
            seconds = time.perf_counter() - begun
            skips = (edges.argmax(-1) == SKIP).sum(1)
            losses = judge(judged, args.steps, jnp.asarray(edges), jax.random.key(1))
            print(
                f"{guard or 'none':<15} {order:>5}  {skips.tolist()!s:<20}  {skips.mean() / 6:.2f}"
                f"   {np.median(losses):.3f}, {losses.min():.3f}       {seconds:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
