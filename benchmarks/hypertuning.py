"""What thousands of hyperparameters are worth: tuned by hypergradients, against searching for one or two.

    python benchmarks/hypertuning.py --parts decay,schedule

decay     an MLP of 64-64-10 on 200 of scikit-learn's digits, one weight decay for each of its 4,810 parameters, against
          the best of 200 random trials of a single one
schedule  an MLP of 64-64-10 in 60 steps of Adam, one learning rate for each of them, against the best of 200 random
          constant rates and of 100 random (peak, warm-up) pairs of a cosine, each run with 2 keys

All choices are made on the validation set, at equal cost: a value-and-gradient counts its multiple of training, which
is measured first; the descents begin at the best of the first trials of random search, which count too. The winners
are trained again with 20 other keys, the same for all. Five splits; the intervals are those of Student's t.
"""

import argparse
import functools
import statistics
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhpo as hpo

WIDTH, BATCH, TRIALS, KEYS = 64, 100, 200, 20
DECAY = {"low": 1e-5, "high": 1.0, "log": True}
RATE = {"low": 1e-4, "high": 0.1, "log": True}


class Split(NamedTuple):
    """Inputs and labels of the three sets."""

    train: tuple
    valid: tuple
    test: tuple


def split(seed, train, valid):
    """The digits, so many to train and to choose by, and the others to judge by."""
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    x, x_test, y, y_test = train_test_split(x, y, train_size=train + valid, stratify=y, random_state=seed)
    x, x_valid, y, y_valid = train_test_split(x, y, train_size=train, stratify=y, random_state=seed)
    return Split(*jax.tree.map(jnp.asarray, ((x, y), (x_valid, y_valid), (x_test, y_test))))


def begin(key):
    """The parameters of the network before training."""
    a, c = jax.random.split(key)
    return {
        "a": jax.random.normal(a, (64, WIDTH)) / 8,
        "b": jnp.zeros(WIDTH),
        "c": jax.random.normal(c, (WIDTH, 10)) / 8,
        "d": jnp.zeros(10),
    }


def predict(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"] + params["d"]


def cross_entropy(params, data):
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, data[0]), data[1]).mean()


def decayed(data):
    """Gradient descent with momentum on the whole training set; `h["decay"]` is shaped like the parameters."""

    def loss(params, h):
        penalties = jax.tree.map(lambda decay, p: jnp.sum(decay * p**2) / 2, h["decay"], params)
        return cross_entropy(params, data.train) + sum(jax.tree.leaves(penalties))

    def init(key, h):
        params = begin(key)
        return params, jax.tree.map(jnp.zeros_like, params)

    def step(key, state, h):
        params, velocity = state
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, jax.grad(loss)(params, h))
        return jax.tree.map(lambda p, v: p - 0.3 * v, params, velocity), velocity

    return hpo.Trainable(init, step, lambda state, h: cross_entropy(state[0], data.valid))


def scheduled(data):
    """Adam on minibatches; `h["lr"]` has the learning rate of every step."""
    adam = optax.scale_by_adam(eps_root=1e-8)

    def init(key, h):
        params = begin(key)
        return params, adam.init(params), jnp.int32(0)

    def step(key, state, h):
        params, adam_state, reached = state
        rows = jax.random.choice(key, len(data.train[1]), (BATCH,), replace=False)
        slopes = jax.grad(cross_entropy)(params, jax.tree.map(lambda d: d[rows], data.train))
        updates, adam_state = adam.update(slopes, adam_state)
        params = jax.tree.map(lambda p, u: p - h["lr"][reached] * u, params, updates)
        return params, adam_state, reached + 1

    return hpo.Trainable(init, step, lambda state, h: cross_entropy(state[0], data.valid))


def cosine(h, steps):
    """Learning rates that rise to a peak and fall to 0 along a cosine."""
    warm, t = h["warm_up"] * steps, jnp.arange(steps)
    rise = jnp.minimum((t + 1) / jnp.maximum(warm, 1), 1)
    return h["peak"] * jnp.where(t < warm, rise, (1 + jnp.cos(jnp.pi * (t - warm) / (steps - warm))) / 2)


def multiple(objective, hparams, repeats=9):
    """Time of a value-and-gradient over that of the value: median of runs in turn."""
    key = jax.random.key(0)
    runs = [jax.jit(objective), jax.jit(jax.value_and_grad(objective, 1))]

    def seconds(run):
        begun = time.perf_counter()
        jax.block_until_ready(run(key, hparams))
        return time.perf_counter() - begun

    for run in runs:
        seconds(run)
    return statistics.median((lambda plain: seconds(runs[1]) / plain)(seconds(runs[0])) for _ in range(repeats))


def after(expand, objective):
    """The objective as a function of the few numbers that `expand` makes many of."""
    return lambda key, h: objective(key, expand(h))


def search(objective, space, trials, seed, repeats=1):
    """Random search, all of its trials as one program."""
    method = hpo.random(space, batch=trials)
    key = jax.random.key(seed)
    return hpo.minimize(objective, method, key=key, trials=trials, repeats=repeats, progress=False)


def smooth(width):
    """Gradients as weighted means over neighbouring steps, by a Gaussian: noise is averaged, a trend is not."""

    def update(gradient, params):
        del params
        t = jnp.arange(gradient.size)
        kernel = jnp.exp(-(((t[:, None] - t) / width) ** 2) / 2)
        return kernel @ gradient / kernel.sum(1)

    return optax.stateless(update)


def descend(objective, space, optimizer, start, rounds, seed):
    """Descent from `start`, a point and its loss; each step with a key of its own."""
    method, key = hpo.gradient(space, optimizer, starts=1), jax.random.key(500 + seed)
    return hpo.minimize(objective, method, key=key, rounds=rounds, initial=[start], progress=False)


def best_of_first(result, first):
    """The best of the first trials, in Python values, and its loss."""
    losses = np.where(result.trials.failed, np.inf, result.trials.loss)[:first]
    best = int(np.argmin(losses))
    return result.space.native(result.trials.hparams, best), float(losses[best])


@functools.partial(jax.jit, static_argnames=("training", "steps"))
def judged(training, steps, data, hparams, keys):
    """Mean test cross-entropy and error of networks trained with some keys: float[2]."""
    trainable = training(data)._replace(evaluate=lambda state, h: state[0])
    params = jax.vmap(hpo.unroll(trainable, steps), (0, None))(keys, hparams)
    wrong = jax.vmap(lambda p: jnp.mean(predict(p, data.test[0]).argmax(-1) != data.test[1]))(params)
    return jnp.stack([jax.vmap(cross_entropy, (0, None))(params, data.test).mean(), wrong.mean()])


def fresh_keys(seed):
    return jax.random.split(jax.random.key(9000 + seed), KEYS)


def interval(differences):
    """Mean and 95% interval of paired differences."""
    mean = np.mean(differences)
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def table(figures, ours):
    """Prints the means over the splits, and how much lower `ours` is."""
    print("| | test cross-entropy | lower by, 95% interval | error | lower by |\n|---|---|---|---|---|")
    for name in figures[0]:
        loss, error = np.array([f[name] for f in figures]).T
        lower = ["", ""]
        if name != ours and len(figures) > 1:
            lower = [
                interval(x - y) for x, y in zip((loss, error), np.array([f[ours] for f in figures]).T, strict=True)
            ]
        print(f"| {name} | {loss.mean():.4f} | {lower[0]} | {100 * error.mean():.2f}% | {lower[1]} |")
    print("by split: " + "; ".join(", ".join(f"{f[name][0]:.4f}" for name in f) for f in figures), flush=True)


def decay(options):
    steps, first = options.steps or 200, options.trials // 5
    shapes = jax.eval_shape(begin, jax.random.key(0))
    few, many = {"decay": hpo.Float(**DECAY)}, {"decay": hpo.Array.like(shapes, **DECAY)}
    everywhere = lambda h: {"decay": jax.tree.map(lambda s: jnp.full(s.shape, h["decay"], jnp.float32), shapes)}  # noqa: E731
    optimizer, figures, rounds = optax.adam(options.rate or 0.2), [], None
    for seed in options.seeds:
        data = split(seed, 200, 700)
        objective = hpo.unroll(decayed(data), steps)
        single = search(after(everywhere, objective), few, options.trials, seed)
        start, loss = best_of_first(single, first)
        if rounds is None:
            cost = multiple(objective, everywhere(start))
            rounds = int((options.trials - first) / cost)
            print(f"decay: a value-and-gradient costs {cost:.2f} trainings, so {rounds} of them after {first} trials")
        known = {"decay": jax.tree.map(lambda _: start["decay"], shapes)}  # noqa: B023
        each = descend(objective, many, optimizer, (known, loss), rounds, seed)
        both = data._replace(train=jax.tree.map(lambda *d: jnp.concatenate(d), data.train, data.valid))
        chosen = {
            "a single decay": (data, everywhere(single.best_hparams)),
            "a decay for each parameter": (data, {"decay": jax.tree.map(jnp.float32, each.best_hparams["decay"])}),
            "a single decay, trained on the validation set, too": (both, everywhere(single.best_hparams)),
        }
        keys = fresh_keys(seed)
        figures.append({name: np.asarray(judged(decayed, steps, d, h, keys)) for name, (d, h) in chosen.items()})
        report(seed, {"single": single, "each": each}, single.best_hparams)
    table(figures, "a decay for each parameter")


def schedule(options):
    steps, first = options.steps or 60, options.trials // 10
    many, optimizer, figures, rounds = {"lr": hpo.Array(steps, **RATE)}, None, [], None
    pair = {"peak": hpo.Float(**RATE), "warm_up": hpo.Float(0.0, 0.5)}
    constant = lambda h: {"lr": jnp.full(steps, h["lr"], jnp.float32)}  # noqa: E731
    annealed = lambda h: {"lr": jnp.float32(cosine(h, steps))}  # noqa: E731
    for seed in options.seeds:
        data = split(seed, 800, 500)
        objective = hpo.unroll(scheduled(data), steps)
        single = search(after(constant, objective), {"lr": hpo.Float(**RATE)}, options.trials, seed)
        cosines = search(after(annealed, objective), pair, options.trials // 2, seed, repeats=2)
        start, loss = best_of_first(single, first)
        if rounds is None:
            cost = multiple(objective, constant(start))
            rounds = int((options.trials - first) / cost)
            moves = optax.adam(optax.linear_schedule(options.rate or 0.25, 0, rounds), 0.9, 0.95)
            optimizer = optax.chain(optax.clip_by_global_norm(0.5), smooth(steps / 20), moves)
            print(f"schedule: a value-and-gradient costs {cost:.2f} trainings, so {rounds} after {first} trials")
        each = descend(objective, many, optimizer, (start, loss), rounds, seed)
        chosen = {
            "a constant rate": constant(single.best_hparams),
            "a cosine with warm-up": annealed(cosines.best_hparams),
            "a rate for each step": {"lr": jnp.float32(each.trials.hparams["lr"][-1])},
        }
        keys = fresh_keys(seed)
        figures.append({name: np.asarray(judged(scheduled, steps, data, h, keys)) for name, h in chosen.items()})
        report(seed, {"constant": single, "cosine": cosines, "each": each}, single.best_hparams | cosines.best_hparams)
        print("  rates:", " ".join(f"{x:.3f}" for x in each.trials.hparams["lr"][-1][:: max(steps // 20, 1)]))
    table(figures, "a rate for each step")


def report(seed, results, found):
    """One line of a split: what the studies chose, and how long they took."""
    shown = ", ".join(
        f"{name} {r.best_loss:.4f} in {r.seconds - r.compile_seconds:.1f} s (compiling {r.compile_seconds:.1f} s)"
        for name, r in results.items()
    )
    print(f"split {seed}: validation {shown}; {', '.join(f'{k} {v:.4g}' for k, v in found.items())}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="decay,schedule")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--rate", type=float, help="learning rate of the descents")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), help="of the splits")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory() as cache:
        # The splits have the same programs.
        jax.config.update("jax_compilation_cache_dir", cache)
        run(options)


def run(options):
    for part in options.parts.split(","):
        {"decay": decay, "schedule": schedule}[part](options)


if __name__ == "__main__":
    main()
