"""Trials per second: jaxhpo against the loops that people write today, side by side in one run.

    pip install -e ".[bench]"
    python benchmarks/trial_throughput.py                  # lanes=64, for 2 CPU cores
    python benchmarks/trial_throughput.py --lanes 512      # for a GPU
    WIDTH=128 python benchmarks/trial_throughput.py        # networks of up to 128 units a layer instead of 64

Everyone trains the same MLPs on scikit-learn's digits: same data, batch size, steps, and ranges of width, depth,
activation, dropout, learning rate and momentum. Each column is run `--repeats` times in turn, the median counts.

  jaxhpo            random search in lanes, one compiled program
  optuna            the usual objective: build the network and optimizer of the trial, jit its train step, loop
  optuna, injected  one padded network and `optax.inject_hyperparams`, so that the step is compiled once; loop
  one by one        one compiled `lax.scan` per trial, on the padded shapes, one trial after the other
"""

import argparse
import json
import os
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from sklearn.datasets import load_digits

import jaxhpo as hpo

WIDTH, DEPTH, BATCH = int(os.environ.get("WIDTH", 64)), 3, 64
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
SPACE = hpo.Space(
    {
        "width": hpo.Int(16, WIDTH, log=True),
        "depth": hpo.Int(1, DEPTH),
        "activation": hpo.Categorical(ACTIVATIONS),
        "dropout": hpo.Float(0.0, 0.5),
        "lr": hpo.Float(1e-3, 1.0, log=True),
        "momentum": hpo.Float(0.0, 0.99),
    }
)
X, Y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)
TRAIN, VALID = (X[:1400], Y[:1400]), (X[1400:], Y[1400:])
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class PlainMLP(nn.Module):
    """The network of one trial, as anyone would write it."""

    width: int
    depth: int
    activation: str
    dropout: float

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(self.depth):
            x = getattr(nn, self.activation)(nn.Dense(self.width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10)(x)


def padded(h):
    return hpo.MLP(
        10, WIDTH, DEPTH, width=h["width"], depth=h["depth"], activation=h["activation"], dropout=h["dropout"]
    )


def trainable():
    return hpo.flax_trainable(
        model=padded,
        optimizer=lambda h: optax.sgd(h["lr"], h["momentum"]),
        loss=cross_entropy,
        train=TRAIN,
        valid=VALID,
        batch_size=BATCH,
    )


def suggest(trial):
    return {
        "width": trial.suggest_int("width", 16, WIDTH, log=True),
        "depth": trial.suggest_int("depth", 1, DEPTH),
        "activation": trial.suggest_categorical("activation", ACTIVATIONS),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        "lr": trial.suggest_float("lr", 1e-3, 1.0, log=True),
        "momentum": trial.suggest_float("momentum", 0.0, 0.99),
    }


def batches(seed, steps):
    rng, data = np.random.default_rng(seed), [jnp.asarray(x) for x in TRAIN]
    for _ in range(steps):
        rows = rng.integers(0, len(TRAIN[0]), BATCH)
        yield data[0][rows], data[1][rows]


def usual_training(trial):
    """The network of a trial with its first parameters, and its train step, jitted for it alone."""
    h = suggest(trial)
    model = PlainMLP(h["width"], h["depth"], h["activation"], h["dropout"])
    optimizer = optax.sgd(h["lr"], h["momentum"])
    key = jax.random.key(trial.number)
    params = model.init(key, TRAIN[0][:1])
    opt_state = optimizer.init(params)

    @jax.jit
    def step(key, params, opt_state, x, y):
        loss = lambda p: cross_entropy(model.apply(p, x, train=True, rngs={"dropout": key}), y).mean()  # noqa: E731
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return model, step, key, params, opt_state


def usual_objective(steps):
    def objective(trial):
        model, step, key, params, opt_state = usual_training(trial)
        for i, (x, y) in enumerate(batches(trial.number, steps)):
            params, opt_state = step(jax.random.fold_in(key, i), params, opt_state, x, y)
        return float(cross_entropy(model.apply(params, VALID[0]), VALID[1]).mean())

    return objective


def injected_objective(steps):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)

    @jax.jit
    def start(key, h):
        params = padded(h).init(key, jnp.asarray(TRAIN[0][:1]))
        opt_state = optimizer.init(params)
        opt_state.hyperparams.update(learning_rate=h["lr"], momentum=h["momentum"])
        return params, opt_state

    @jax.jit
    def step(key, params, opt_state, h, x, y):
        loss = lambda p: cross_entropy(padded(h).apply(p, x, train=True, rngs={"dropout": key}), y).mean()  # noqa: E731
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    evaluate = jax.jit(lambda params, h: cross_entropy(padded(h).apply(params, VALID[0]), VALID[1]).mean())

    def objective(trial):
        h = suggest(trial)
        h["activation"] = ACTIVATIONS.index(h["activation"])
        h = jax.tree.map(jnp.asarray, h)
        key = jax.random.key(trial.number)
        params, opt_state = start(key, h)
        for i, (x, y) in enumerate(batches(trial.number, steps)):
            params, opt_state = step(jax.random.fold_in(key, i), params, opt_state, h, x, y)
        return float(evaluate(params, h))

    return objective


def optuna_rate(objective, trials):
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    begun = time.perf_counter()
    study.optimize(objective, n_trials=trials, catch=(ValueError,))
    return trials / (time.perf_counter() - begun)


def padding_waste(units):
    """Share of the multiply-adds of the padded networks that the networks in them have no use for."""
    h = SPACE.decode(units)
    width, depth = np.asarray(h["width"], float), np.asarray(h["depth"], float)
    flops = lambda w, d: 64 * w + (d - 1) * w * w + 10 * w  # noqa: E731
    return 1 - flops(width, depth).mean() / flops(WIDTH, DEPTH)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--lanes", type=int, default=64)
    a.add_argument("--steps", type=int, default=200)
    a.add_argument("--asks", type=int, default=2, help="rounds of `lanes` trials in a timed run of jaxhpo")
    a.add_argument("--peer-trials", type=int, default=6)
    a.add_argument("--repeats", type=int, default=3)
    a = a.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    objective = hpo.unroll(trainable(), a.steps)
    method = hpo.random(SPACE, batch=a.lanes)
    compile_seconds = hpo.minimize(objective, method, key=jax.random.key(0), rounds=a.asks).compile_seconds

    def ours(seed):
        begun = time.perf_counter()
        result = hpo.minimize(objective, method, key=jax.random.key(seed), rounds=a.asks)
        return len(result.trials.id) / (time.perf_counter() - begun)

    fill = lambda key, h: objective(key, SPACE.fill(h))  # noqa: E731
    points = SPACE.decode(SPACE.sample(jax.random.key(1), a.peer_trials))
    row = lambda i: jax.tree.map(lambda x: x[i], points)  # noqa: E731
    begun = time.perf_counter()
    single = jax.jit(fill).lower(jax.random.key(0), row(0)).compile()
    single_compile = time.perf_counter() - begun

    def one_by_one(seed):
        begun = time.perf_counter()
        for i in range(a.peer_trials):
            float(single(jax.random.key(i), row(i)))
        return a.peer_trials / (time.perf_counter() - begun)

    injected = injected_objective(a.steps)
    begun = time.perf_counter()
    optuna_rate(injected, 1)
    injected_compile = time.perf_counter() - begun
    columns = {
        "jaxhpo": ours,
        "optuna": lambda seed: optuna_rate(usual_objective(a.steps), a.peer_trials),
        "optuna, injected": lambda seed: optuna_rate(injected, a.peer_trials),
        "one by one": one_by_one,
    }
    rates: dict[str, list[float]] = {name: [] for name in columns}
    for repeat in range(a.repeats):
        for name, measure in columns.items():
            rates[name].append(measure(repeat + 1))
    median = {name: statistics.median(found) for name, found in rates.items()}
    ratio = {name: statistics.median(np.array(rates["jaxhpo"]) / np.array(found)) for name, found in rates.items()}
    compiling = {
        "jaxhpo": compile_seconds,
        "optuna": float("nan"),
        "optuna, injected": injected_compile,
        "one by one": single_compile,
    }
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {a.lanes} lanes, {a.steps} steps of {BATCH} examples"
    )
    print(f"{'':18}{'trials/s':>10}{'jaxhpo is':>12}{'compile, s':>12}")
    for name in columns:
        print(f"{name:18}{median[name]:10.2f}{ratio[name]:11.1f}x{compiling[name]:12.1f}")
    waste = padding_waste(SPACE.sample(jax.random.key(2), 4096))
    print(f"padding wastes {waste:.0%} of the arithmetic of jaxhpo, of 'optuna, injected' and of 'one by one'")
    print(json.dumps({"trials_per_second": median, "ratio": ratio, "padding_waste": waste}))


if __name__ == "__main__":
    main()
