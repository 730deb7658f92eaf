"""Generations per second in one `lax.scan`, beside evosax on the same objective, in the same run.

    python benchmarks/generations.py [--only genetic,cma_es] [--repeats 5] [--seconds 0.5]

A generation is ask, the losses of all candidates (Rastrigin's function), and tell. Ours and the peer's take turns; the
ratio is the median over the repeats. `limit` is how many times longer a generation takes than it would if it only read
and wrote the method's state once, at the bandwidth of a copy that is measured on the same machine. Compile times are
apart, at 10 and at 1,000 dims.
"""

import argparse
import time

import evosax.algorithms as peers
import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms.distribution_based.base import DistributionBasedAlgorithm

import jaxhpo as hpo

SHAPES = [(256, 10), (4096, 10), (1024, 100)]
PAIRS = [
    ("genetic", "SimpleGA", lambda s, n: hpo.genetic(s, population=n, batch=n)),
    (
        "particle_swarm constriction",
        "PSO",
        lambda s, n: hpo.particle_swarm(s, particles=n, variant="constriction", topology="global", batch=n),
    ),
    ("particle_swarm spso2011", "PSO", lambda s, n: hpo.particle_swarm(s, particles=n, variant="spso2011", batch=n)),
    ("annealing", "SimulatedAnnealing", lambda s, n: hpo.annealing(s, chains=n, batch=n)),
    ("annealing one chain", "SimulatedAnnealing", lambda s, n: hpo.annealing(s, chains=1, batch=n)),
    (
        "differential_evolution rand/1/bin",
        "DifferentialEvolution",
        lambda s, n: hpo.differential_evolution(s, strategy="rand/1/bin", population=n, batch=n),
    ),
    (
        "differential_evolution SHADE",
        "DifferentialEvolution",
        lambda s, n: hpo.differential_evolution(s, population=n, batch=n),
    ),
    ("cma_es", "CMA_ES", lambda s, n: hpo.cma_es(s, population=n, restarts=None, batch=n)),
    ("cma_es with restarts", "CMA_ES", lambda s, n: hpo.cma_es(s, population=n, batch=n)),
]


def rastrigin(x):
    return 10 * x.shape[-1] + (x * x - 10 * jnp.cos(2 * jnp.pi * x)).sum(-1)


def ours(build, population, dims):
    """(key, generations) -> best loss, and the bytes of the method's state."""
    method = build(hpo.Space({"x": hpo.Array(dims, -5.0, 5.0)}), population)

    def run(key, keys):
        def generation(carry, key):
            state, best = carry
            trials, state = method.ask(key, state)
            losses = rastrigin(trials.hparams["x"])
            return (method.tell(state, trials, losses), jnp.minimum(best, losses.min())), None

        return jax.lax.scan(generation, (method.init(key), jnp.float32(jnp.inf)), keys)[0][1]

    state = jax.eval_shape(method.init, jax.random.key(0))
    return run, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def theirs(name, population, dims):
    """The same of a method of evosax."""
    method = getattr(peers, name)(population_size=population, solution=jnp.zeros(dims))
    params = method.default_params

    def run(key, keys):
        key, key_points = jax.random.split(key)
        points = jax.random.uniform(key_points, (population, dims), minval=-5.0, maxval=5.0)
        if isinstance(method, DistributionBasedAlgorithm):
            state = method.init(key, points[0], params)
        else:
            state = method.init(key, points, rastrigin(points), params)

        def generation(carry, key):
            state, best = carry
            key_ask, key_tell = jax.random.split(key)
            points, state = method.ask(key_ask, state, params)
            losses = rastrigin(points)
            state, _ = method.tell(key_tell, points, losses, state, params)
            return (state, jnp.minimum(best, losses.min())), None

        return jax.lax.scan(generation, (state, jnp.float32(jnp.inf)), keys)[0][1]

    return run


def compiled(run, generations):
    """`run` compiled for a number of generations, and the seconds that took."""
    key = jax.random.key(0)
    began = time.perf_counter()
    program = jax.jit(run).lower(key, jax.random.split(key, generations)).compile()
    return program, time.perf_counter() - began


def seconds_of(program, generations, seed=0):
    key = jax.random.key(seed)
    keys = jax.random.split(key, generations)
    began = time.perf_counter()
    jax.block_until_ready(program(key, keys))
    return time.perf_counter() - began


def bandwidth():
    """Bytes a second that a copy reads and writes."""
    x = jnp.zeros(2**25)
    copy = jax.jit(lambda x: x + 1)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - began)
    return 2 * x.nbytes / float(np.median(times))


def pair(build, peer, population, dims, repeats, seconds):
    """Seconds a generation of ours and the peer's, and the median of their ratio over the repeats."""
    run, bytes_ = ours(build, population, dims)
    programs = []
    for candidate in (run, theirs(peer, population, dims)):
        probe, _ = compiled(candidate, 10)
        seconds_of(probe, 10)
        generations = int(np.clip(seconds / (seconds_of(probe, 10) / 10), 10, 20_000))
        programs.append((compiled(candidate, generations)[0], generations))
    times = [[seconds_of(p, n, seed) / n for p, n in programs] for seed in range(repeats)]
    mine, other = np.array(times).T
    return float(np.median(mine)), float(np.median(other)), float(np.median(other / mine)), bytes_


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of ours, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run")
    options = parser.parse_args()
    speed = bandwidth()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, copies at {speed / 1e9:.1f} GB/s")
    print(f"{'':36}{'peer':23}{'shape':>10}{'ours/s':>10}{'peer/s':>10}{'ratio':>7}{'limit':>8}", flush=True)
    chosen = [p for p in PAIRS if options.only is None or p[0].split()[0] in options.only.split(",")]
    for name, peer, build in chosen:
        for population, dims in SHAPES:
            mine, other, ratio, bytes_ = pair(build, peer, population, dims, options.repeats, options.seconds)
            row = f"{name:36}{peer:23}{f'{population}x{dims}':>10}{1 / mine:10.0f}{1 / other:10.0f}{ratio:7.1f}"
            print(f"{row}{mine / (2 * bytes_ / speed):8.1f}", flush=True)
    print(f"\n{'compile seconds':36}{'peer':23}{'dims':>10}{'ours':>10}{'peer':>10}")
    for name, peer, build in chosen:
        for dims in (10, 1000):
            mine = compiled(ours(build, 256, dims)[0], 100)[1]
            other = compiled(theirs(peer, 256, dims), 100)[1]
            print(f"{name:36}{peer:23}{dims:10}{mine:10.2f}{other:10.2f}", flush=True)


if __name__ == "__main__":
    main()
