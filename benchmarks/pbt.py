"""Population-based training against what it replaces, on the toy of its paper and on scikit-learn's digits.

    python benchmarks/pbt.py

Toy: Jaderberg et al. (2017), Figure 2: two members maximise 1.2 - theta_0^2 - theta_1^2 by ascending a surrogate whose
weights h are their hyperparameters; 200 steps at rate 0.01, an exploit every 4, 100 studies as one program.

Digits: a population trains an MLP with SGD; random search trains as many networks in as many lanes for as many steps,
each with one draw of the hyperparameters (the same population that never copies). Losses are those of the validation
set at the end of training. Retrained: the winner, or its schedule, with 20 other keys.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo as hpo
from jaxhpo.demo import digits

TOY = hpo.Trainable(
    init=lambda key, h: jnp.array([0.9, 0.9]),
    step=lambda key, theta, h: theta - 0.01 * 2 * h["h"] * theta,
    evaluate=lambda theta, h: (theta**2).sum() - 1.2,
)
SPACE = {
    "lr": hpo.Float(1e-3, 3.0, log=True),
    "friction": hpo.Float(0.01, 1.0, log=True),  # 1 - momentum
    "decay": hpo.Float(1e-6, 1e-1, log=True),
    "dropout": hpo.Float(0.0, 0.6),
}
POPULATION, EVERY, STEPS, KEYS = 16, 20, 600, 20


def toy(seeds=100):
    """Q of the better member after 200 steps, in every study."""
    space, start = {"h": hpo.Array(2, 0.0, 1.0)}, [{"h": [1.0, 0.0]}, {"h": [0.0, 1.0]}]
    method = hpo.pbt(space, every=4, population=2, max_steps=200, explore="additive")
    study = jax.jit(jax.vmap(hpo.study(TOY, method, initial=start), (0, None)))
    keys = jax.random.split(jax.random.key(0), seeds)
    for name, quantile in (("population", 0.2), ("independent", 0.0)):
        settings = method.settings._replace(quantile=jnp.float32(quantile))
        reached = -np.asarray(study(keys, settings)[1].losses)[:, -1].min(-1)
        low, high = reached.min(), reached.max()
        print(f"toy, {name:11}: median {np.median(reached):.4f} of 1.2, from {low:.4f} to {high:.4f}", flush=True)


def network():
    """Training of an MLP on 300 of the digits."""
    data = digits(0)
    return hpo.flax_trainable(
        model=lambda h: hpo.MLP(10, 32, 1, dropout=h["dropout"]),
        optimizer=lambda h: optax.chain(optax.add_decayed_weights(h["decay"]), optax.sgd(h["lr"], 1 - h["friction"])),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=(data.train[0][:300], data.train[1][:300]),
        valid=data.valid,
        batch_size=32,
    )


def compare(trainable, method, seed):
    """Loss of the winner, the error of its replay, the median loss of those retrained, and its segments."""
    key = jax.random.key(seed)
    result = hpo.minimize(trainable, method, key=key, progress=False)
    winner = result.schedule()[0]
    keys = jnp.concatenate([key[None], jax.random.split(jax.random.key(1000 + seed), KEYS)])
    again, *fresh = np.asarray(jax.vmap(lambda k: hpo.replay(trainable, winner, k).loss)(keys))
    return winner.loss[-1], abs(again / winner.loss[-1] - 1), np.median(fresh), len(winner)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, default=10)
    seeds = options.parse_args().seeds
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    toy()
    build = lambda **how: hpo.pbt(SPACE, every=EVERY, population=POPULATION, max_steps=STEPS, **how)  # noqa: E731
    methods = {
        "random": build(quantile=0.0),
        "truncation, perturb": build(),
        "tournament, perturb": build(exploit="tournament"),
        "truncation, resample": build(explore="resample"),
        "truncation, additive": build(explore="additive"),
        "truncation, gp": build(explore="gp"),
    }
    trainable = network()
    print(f"digits: {POPULATION} networks, {STEPS} steps, exploit every {EVERY}, {seeds} seeds")
    print(f"{'':22}{'loss':>9}{'better':>8}{'retrained':>11}{'better':>8}{'replay off by':>15}{'segments':>10}{'s':>6}")
    base = None
    for name, method in methods.items():
        begun = time.perf_counter()
        loss, error, fresh, segments = np.array([compare(trainable, method, seed) for seed in range(seeds)]).T
        base = (loss, fresh) if base is None else base
        better, fresh_better = (loss < base[0]).sum(), (fresh < base[1]).sum()
        print(
            f"{name:22}{np.median(loss):9.4f}{better:8}{np.median(fresh):11.4f}{fresh_better:8}{error.max():15.1e}"
            f"{np.median(segments):10.0f}{time.perf_counter() - begun:6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
