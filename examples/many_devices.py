"""Hyperband trains networks on every device of every process that takes part.

By itself, with 8 virtual devices on a CPU (GPUs and TPUs are taken as they are):

    python examples/many_devices.py

As two processes with 4 devices each, here on one machine; over hosts, give the address of the first:

    python examples/many_devices.py --processes 2 --process 1 &
    python examples/many_devices.py --processes 2 --process 0
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import jaxhpo as hpo


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="how many take part")
    parser.add_argument("--process", type=int, default=0, help="which of them this one is")
    parser.add_argument("--coordinator", default="localhost:12355", help="address and port of process 0")
    parser.add_argument("--cpu-devices", type=int, default=8, help="virtual devices of all processes together")
    parser.add_argument("--max-steps", type=int, default=81)
    parser.add_argument("--directory", help="where to keep checkpoints; read and written by process 0 only")
    return parser.parse_args(arguments)


def problem() -> hpo.Trainable:
    """MLPs that tell the sign of a product."""
    x = jax.random.normal(jax.random.key(1), (2048, 8))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
    return hpo.flax_trainable(
        model=lambda h: hpo.MLP(2, max_width=64, max_depth=2, width=h["width"], depth=h["depth"]),
        optimizer=lambda h: optax.adam(h["lr"]),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        train=(x[:1536], y[:1536]),
        valid=(x[1536:], y[1536:]),
        batch_size=64,
    )


def join(args: argparse.Namespace) -> None:
    """Has to come before JAX is used for the first time."""
    jax.config.update("jax_num_cpu_devices", max(1, args.cpu_devices // args.processes))
    if args.processes > 1:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)


def search(args: argparse.Namespace) -> hpo.Result:
    """Runs in every process, on all of their devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("lanes",))
    space = {"lr": hpo.Float(1e-4, 1e-1, log=True), "width": hpo.Int(8, 64, log=True), "depth": hpo.Int(1, 2)}
    method = hpo.hyperband(space, max_steps=args.max_steps, batch=32)
    result = hpo.minimize(problem(), method, key=jax.random.key(0), mesh=mesh, directory=args.directory)
    if jax.process_index() == 0:
        print(f"{mesh.size} devices of {jax.process_count()} processes")
        print(result.table())
    return result


if __name__ == "__main__":
    arguments = parse()
    join(arguments)
    search(arguments)
