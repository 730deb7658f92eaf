"""How much of the lanes' time trains something, what deciding who trains costs, and how soon an accuracy is reached.

  pip install -e ".[bench]"
  python benchmarks/lanes.py --parts share,overhead,target

share     lane-steps that trained a trial which was still alive, of all lane-steps, for each method
overhead  a study beside the same training steps without any method: rounds of 10 steps of about 1 ms
target    seconds until a validation error is reached, beside Optuna: TPE and its Hyperband pruner around the usual
          jitted training loop, same data, model and ranges; in turn, the median of some seeds
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from trial_throughput import SPACE, TRAIN, VALID, batches, cross_entropy, padded, usual_training

import jaxhpo as hpo

LINE = hpo.Space({"x": hpo.Float(0.0, 1.0)})
COUNTING = hpo.Trainable(
    init=lambda key, h: jnp.float32(0), step=lambda key, s, h: s + 1, evaluate=lambda s, h: h["x"] + 1 / (1 + s)
)


def methods(batch):
    """Every method that trains in stretches, and how many rounds of it are looked at."""
    ladder = {"max_steps": 81, "batch": batch}
    tpe = hpo.tpe(LINE, batch=batch)
    return {
        "asha": (hpo.asha(LINE, **ladder), 300),
        "bohb": (hpo.bohb(LINE, **ladder), 300),
        "dehb": (hpo.dehb(LINE, **ladder), 300),
        "hyperband, 1 cycle": (hpo.hyperband(LINE, **ladder), None),
        "hyperband, 4 cycles": (hpo.hyperband(LINE, **ladder, cycles=4), None),
        "bohb on hyperband, 4 cycles": (hpo.bohb(LINE, **ladder, scheduler="hyperband", cycles=4), None),
        "successive_halving": (hpo.successive_halving(LINE, **ladder, trials=243), None),
        "early_stopping": (hpo.early_stopping(tpe, hpo.MedianRule(max_steps=81, every=3)), 100),
        "pbt": (hpo.pbt(LINE, population=batch, every=3), 100),
    }


def share(batch):
    for name, (method, rounds) in methods(batch).items():
        trace = jax.device_get(jax.jit(hpo.study(COUNTING, method, rounds))(jax.random.key(0))[1])
        steps = np.where(trace.trials.active, trace.trials.steps, 0)
        useful = np.where(np.isfinite(trace.losses), steps, 0).sum() / (steps.max(1).sum() * batch)
        print(f"{name:30}{useful:8.1%} of the lane-steps")


def burning(width):
    """Training whose step multiplies a matrix by itself."""
    return hpo.Trainable(
        init=lambda key, h: jnp.eye(width) * h["x"],
        step=lambda key, s, h: jnp.tanh(s @ s) + h["x"],
        evaluate=lambda s, h: jnp.abs(s).mean() + h["x"],
    )


def seconds(run):
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


def pure(problem, batch, rounds, steps):
    """The training that `rounds` rounds of a study do, without any method."""
    keys, unit = jax.random.split(jax.random.key(1), batch), LINE.sample(jax.random.key(0), batch)
    hparams = LINE.decode(unit)

    @jax.jit
    def run():
        step = lambda i, s: jax.vmap(problem.step)(keys, s, hparams)  # noqa: E731
        stretch = lambda s, _: (jax.lax.fori_loop(0, steps, step, s), None)  # noqa: E731
        return jax.lax.scan(stretch, jax.vmap(problem.init)(keys, hparams), length=rounds)[0]

    return run


def compiled(problem, method, rounds):
    study = jax.jit(hpo.study(problem, method, rounds))
    return lambda: study(jax.random.key(0))[1].losses


def overhead(batch, rounds, width, repeats):
    """Two views: of a step that costs nothing, what a round costs at all; of one of about 1 ms, pairs run in turn."""
    steps = 10
    ladder = {"max_steps": 270, "min_steps": steps, "batch": batch}
    tpe = hpo.tpe(LINE, batch=batch)
    training = pure(burning(width), batch, rounds, steps)
    seconds(training)
    print(
        f"a step of {batch} lanes: {statistics.median(seconds(training) for _ in range(repeats)) / rounds * 100:.2f} ms"
    )
    for name, method in {
        "asha": hpo.asha(LINE, **ladder),
        "bohb": hpo.bohb(LINE, **ladder),
        "dehb": hpo.dehb(LINE, **ladder),
        "early_stopping": hpo.early_stopping(tpe, hpo.MedianRule(max_steps=270, every=steps)),
        "pbt": hpo.pbt(LINE, population=batch, every=steps),
    }.items():
        idle, busy = (compiled(problem, method, rounds) for problem in (COUNTING, burning(width)))
        seconds(idle), seconds(busy)
        alone = statistics.median(seconds(idle) for _ in range(repeats)) / rounds
        pairs = [seconds(busy) / seconds(training) for _ in range(repeats)]
        print(
            f"{name:16}{alone * 1e6:7.0f} us a round, {alone / 1e-2:6.1%} of 10 steps of 1 ms; beside training "
            f"{statistics.median(pairs) - 1:6.1%} more ({min(pairs) - 1:.1%} to {max(pairs) - 1:.1%})",
            flush=True,
        )


def error_of(outputs, targets):
    return jnp.asarray(outputs.argmax(-1) != targets, jnp.float32)


def ours(error, lanes, seed):
    trainable = hpo.flax_trainable(
        model=padded,
        optimizer=lambda h: optax.sgd(h["lr"], h["momentum"]),
        loss=cross_entropy,
        metric=error_of,
        train=TRAIN,
        valid=VALID,
        batch_size=64,
    )
    method = hpo.bohb(SPACE, max_steps=540, min_steps=20, batch=lanes)
    begun = time.perf_counter()
    result = hpo.minimize(trainable, method, key=jax.random.key(seed), target=error, steps=10**7, progress=False)
    return time.perf_counter() - begun, result.compile_seconds


def theirs(error, seed, limit):
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=27, reduction_factor=3)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    valid = [jnp.asarray(x) for x in VALID]

    def objective(trial):
        model, step, key, params, opt_state = usual_training(trial)
        evaluate = jax.jit(lambda params: error_of(model.apply(params, valid[0]), valid[1]).mean())
        value = 1.0
        for i, (x, y) in enumerate(batches(trial.number, 540)):
            params, opt_state = step(jax.random.fold_in(key, i), params, opt_state, x, y)
            if (i + 1) % 20 == 0:
                value = float(evaluate(params))
                if value <= error:
                    trial.study.stop()
                    return value
                trial.report(value, (i + 1) // 20)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return value

    begun = time.perf_counter()
    study.optimize(objective, timeout=limit, catch=(ValueError,))
    took = time.perf_counter() - begun
    finished = [t.value for t in study.trials if t.value is not None]
    return took, min(finished, default=1.0) <= error


def target(error, lanes, seeds, limit):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for seed in range(seeds):
        jax.clear_caches()
        (mine, compiling), (peer, there) = ours(error, lanes, seed), theirs(error, seed, limit)
        rows.append((mine, peer))
        print(
            f"seed {seed}: {mine:.1f} s, of which compiling {compiling:.1f} s; Optuna {peer:.1f} s"
            f"{'' if there else ', stopped before it was there'}: {peer / mine:.1f}x",
            flush=True,
        )
    mine, peer = (statistics.median(x) for x in zip(*rows, strict=True))
    print(f"validation error {error}: median {mine:.1f} s beside {peer:.1f} s: {peer / mine:.1f}x")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--parts", default="share,overhead,target")
    a.add_argument("--lanes", type=int, default=16)
    a.add_argument("--rounds", type=int, default=60)
    a.add_argument("--width", type=int, default=128, help="of the matrices of the timed step")
    a.add_argument("--repeats", type=int, default=5)
    a.add_argument("--error", type=float, default=0.03)
    a.add_argument("--seeds", type=int, default=3)
    a.add_argument("--limit", type=float, default=300, help="seconds that the peer gets a seed")
    a = a.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    if "share" in a.parts:
        share(a.lanes)
    if "overhead" in a.parts:
        overhead(a.lanes, a.rounds, a.width, a.repeats)
    if "target" in a.parts:
        target(a.error, a.lanes, a.seeds, a.limit)


if __name__ == "__main__":
    main()
