"""Hundreds of different CNNs as one program: is each trained as alone, how much faster, and is the best one better?

    pip install -e ".[bench]"
    python benchmarks/nas_training.py --parts lanes,search,sharing

lanes    random architectures of the CNN space on scikit-learn's digits, 50 steps each: all at once; and one after the
         other as flax modules, as one writes it today (build, jit, loop), from the same initial weights and batches
search   a searched CNN beside a fixed one that has at least as many parameters, whose training is tuned at the same
         cost; images are split anew for each seed, and the test images are seen by neither search
sharing  how the losses by the shared weights of a supernet rank architectures, beside training each alone
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxhpo as hpo
from jaxhpo.flax import batch_indices

nas = hpo.nas
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
CHANNELS, DEPTH, KERNEL, BATCH = 8, 2, 3, 32
NETWORK = nas.CNN(10, max_channels=CHANNELS, max_depth=DEPTH, max_kernel=KERNEL, activations=("relu", "gelu", "tanh"))
FIXED = NETWORK.clone(activation="relu")  # the largest, without skip connections
TRAINING = {"lr": hpo.Float(1e-3, 0.1, log=True), "norm": hpo.Categorical((False, True))}
TUNED = hpo.Space({"network": {}, **TRAINING})
SEARCHED = hpo.Space({"network": nas.cnn_space(NETWORK, min_channels=4), **TRAINING})
USUAL = {"lr": 0.01, "norm": False}
LARGEST = {"activation": "relu", "channels": (CHANNELS,) * 2, "depth": (DEPTH,) * 2}
LARGEST |= {"kernel": ((KERNEL,) * DEPTH,) * 2, "skip": ((False,) * DEPTH,) * 2}
PLAIN = hpo.Space(nas.cnn_space(NETWORK))


def digits(seed):
    """Training, validation and test images."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32).reshape(-1, 8, 8), y[order]
    return [(x[part], y[part]) for part in (slice(900), slice(900, 1200), slice(1200, None))]


def training(model, train, valid, optimizer=lambda h: optax.adam(h["lr"])):
    return hpo.flax_trainable(
        model=model, optimizer=optimizer, loss=cross_entropy, train=train, valid=valid, batch_size=BATCH
    )


def seconds(run):
    begun = time.perf_counter()
    out = jax.block_until_ready(run())
    return time.perf_counter() - begun, out


def parameters(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# Lanes beside a loop.


def one_by_one(module, params, batches, valid, optimizer):
    """Builds, jits and trains one network as one writes it today: seconds of all, of the steps alone, and the loss."""
    begun = time.perf_counter()
    jax.jit(module.init)(jax.random.key(0), batches[0][0][:1])
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(lambda p: cross_entropy(module.apply({"params": p}, x), y).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def evaluate(params):
        return cross_entropy(module.apply({"params": params}, valid[0]), valid[1]).mean()

    jax.block_until_ready((step(params, opt_state, *batches[0]), evaluate(params)))
    compiled = time.perf_counter()
    for x, y in batches:
        params, opt_state = step(params, opt_state, x, y)
    loss = float(evaluate(params))
    return time.perf_counter() - begun, time.perf_counter() - compiled, loss


def lanes(count, alone, steps, repeats):
    train, valid, _ = digits(0)
    network, optimizer = NETWORK.clone(norm=True), optax.adam(0.01)
    trainable = training(lambda h: nas.build(network, h), train, valid, lambda h: optimizer)
    traces = 0

    @jax.jit
    @jax.vmap
    def run(unit, key):
        nonlocal traces
        traces += 1
        h = PLAIN.fill(PLAIN.decode(unit))
        begun = trainable.init(jax.random.fold_in(key, 0), h)
        step = lambda i, state: trainable.step(jax.random.fold_in(key, i), state, h)  # noqa: E731
        return begun, trainable.evaluate(jax.lax.fori_loop(1, steps + 1, step, begun), h)

    units, keys = PLAIN.sample(jax.random.key(0), count), jax.random.split(jax.random.key(1), count)
    hparams = PLAIN.decode(units)
    native = [PLAIN.native(hparams, i) for i in range(count)]
    first, (begun, losses) = seconds(lambda: run(units, keys))
    warm = float(np.median([seconds(lambda: run(units, keys))[0] for _ in range(repeats)]))
    different = len({str(nas.export(network, h, row(begun.params, i))[0]) for i, h in enumerate(native)})
    print(f"{count} lanes, {different} different networks, {traces} trace, {steps} steps: {first:.1f} s", end=" ")
    print(f"with compiling, {warm:.2f} s without", flush=True)
    totals, runs, errors = [], [], []
    for i in range(min(alone, count)):
        module, small = nas.export(network, native[i], row(begun.params, i))
        rows = [np.asarray(batch_indices(begun.order[i], jnp.int32(s), len(train[0]), BATCH)) for s in range(steps)]
        batches = [(train[0][r], train[1][r]) for r in rows]
        total, ran, loss = one_by_one(module, small, batches, valid, optimizer)
        totals.append(total)
        runs.append(ran)
        errors.append(abs(loss / float(losses[i]) - 1))
    print(f"one by one ({len(totals)} of them): {np.mean(totals):.2f} s each with compiling,", end=" ")
    print(f"{np.mean(runs):.3f} s without")
    print(f"ratio {np.mean(totals) / (first / count):.1f} with compiling, {np.mean(runs) / (warm / count):.2f} without")
    span = f"{float(losses.min()):.2f} to {float(losses.max()):.2f}"
    print(f"losses {span}; largest relative difference from the one alone {max(errors):.1e}", flush=True)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


# A searched network beside a fixed one.


def contest(network, space, data, total, steps, seed, first, again=4, keys=6):
    """Searches from a first point, and trains the best few by other keys again: test loss and accuracy, and more."""
    train, valid, test = data
    build = lambda h: nas.build(network, h["network"]).clone(norm=h["norm"])  # noqa: E731
    trainable = training(build, train, valid)
    key = jax.random.key(seed)
    method = hpo.bohb(space, max_steps=steps, min_steps=steps // 9, eta=3, batch=16)
    result = hpo.minimize(trainable, method, key=key, steps=total, initial=[first])
    best = result.trials.best(again)

    @jax.jit
    def several(keys, hparams):
        def one(key, hparams):
            h = space.fill(hparams)
            step = lambda i, state: trainable.step(jax.random.fold_in(key, i), state, h)  # noqa: E731
            state = jax.lax.fori_loop(1, steps + 1, step, trainable.init(jax.random.fold_in(key, 0), h))
            outputs = build(h).apply({"params": state.params}, test[0])
            right = outputs.argmax(-1) == test[1]
            return trainable.evaluate(state, h), cross_entropy(outputs, test[1]).mean(), right.mean()

        return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, hparams)

    found = jax.tree.map(lambda x: jnp.asarray(x[best]), result.trials.hparams)
    valids, losses, accuracies = several(jax.random.split(jax.random.fold_in(key, 1), keys), found)
    winner = int(valids.mean(1).argmin())
    native = space.native(found, winner)
    masked = nas.build(network, native["network"]).clone(norm=native["norm"])
    module, small = nas.export(masked, {}, masked.init(jax.random.key(0), train[0][:1])["params"])
    scores = np.array([losses[winner].mean(), accuracies[winner].mean()])
    return scores, parameters(small), module, native, len(np.unique(result.trials.id))


def search(seeds, total, steps):
    gains = []
    for seed in range(seeds):
        data = digits(400 + seed)
        begun = time.perf_counter()
        ours, size, module, native, tried = contest(
            NETWORK, SEARCHED, data, total, steps, seed, {"network": LARGEST, **USUAL}
        )
        middle = time.perf_counter()
        fixed, fixed_size, _, tuned, others = contest(FIXED, TUNED, data, total, steps, seed, {"network": {}, **USUAL})
        assert fixed_size >= size
        gains.append((fixed[0] - ours[0], ours[1] - fixed[1]))
        took = f"{middle - begun:.0f} and {time.perf_counter() - middle:.0f} s"
        print(f"seed {seed}: searched {ours.round(4)} ({size} parameters, {tried} trials),", end=" ")
        print(f"fixed {fixed.round(4)} ({fixed_size}, {others}), {took}")
        print("  " + nas.describe(module).replace("\n", "; "))
        print(
            f"  norm {native['norm']}, lr {native['lr']:.4f}; fixed: norm {tuned['norm']}, lr {tuned['lr']:.4f}",
            flush=True,
        )
    for name, gain in zip(("test cross-entropy", "test accuracy"), np.array(gains).T, strict=True):
        half = 2.776 * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) == 5 else np.nan
        print(f"gain in {name} {gain.mean():.4f} +- {half:.4f} (95%, paired), above in {(gain > 0).sum()} seeds")


# Shared weights.


def ranks(x):
    return np.argsort(np.argsort(x)).astype(float)


def sharing(count, supernet_steps, steps):
    train, valid, _ = digits(0)
    network = NETWORK.clone(norm=True)
    model = functools.partial(nas.build, network)
    took, state = seconds(
        lambda: nas.train_supernet(
            training(model, train, valid, lambda h: optax.adam(0.003)), PLAIN, supernet_steps, key=jax.random.key(0)
        )
    )
    alone = hpo.unroll(training(model, train, valid, lambda h: optax.adam(0.01)), steps)
    objective = nas.shared_weights(training(model, train, valid, lambda h: optax.adam(0.003)), state)
    units = PLAIN.sample(jax.random.key(2), count)
    fill = lambda unit: PLAIN.fill(PLAIN.decode(unit))  # noqa: E731
    shared = np.asarray(jax.jit(jax.vmap(lambda u: objective(None, fill(u))))(units))
    run = jax.jit(
        jax.vmap(lambda k, u: jnp.mean(jnp.stack([alone(jax.random.fold_in(k, i), fill(u)) for i in range(2)])))
    )
    trained = np.asarray(run(jax.random.split(jax.random.key(3), count), units))
    spearman = np.corrcoef(ranks(shared), ranks(trained))[0, 1]
    best = trained[shared.argmin()]
    print(f"supernet {supernet_steps} steps, {took:.1f} s with compiling;", end=" ")
    print(f"{count} architectures: rank correlation {spearman:.2f}")
    print(f"validation loss after training alone: best by shared weights {best:.3f},", end=" ")
    print(f"best of all {trained.min():.3f}, median {np.median(trained):.3f}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default="lanes,search,sharing")
    p.add_argument("--lanes", type=int, default=64)
    p.add_argument("--alone", type=int, default=64, help="how many of them are also trained alone")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--steps", type=int, default=50, help="of the lanes")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--total", type=int, default=24_000, help="training steps of a search, all trials together")
    p.add_argument("--search-steps", type=int, default=270, help="most training steps of a trial")
    p.add_argument("--supernet-steps", type=int, default=3000)
    a = p.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    if "lanes" in a.parts:
        lanes(a.lanes, a.alone, a.steps, a.repeats)
    if "search" in a.parts:
        search(a.seeds, a.total, a.search_steps)
    if "sharing" in a.parts:
        sharing(a.lanes, a.supernet_steps, a.search_steps)


if __name__ == "__main__":
    main()
