"""How full Hyperband keeps its lanes, and how much memory it needs, by the compiler's account.

    python benchmarks/hyperband.py

Lanes in use: the share of lane-steps that train a trial, from the timetable. Memory: the peak of the compiled study in
training states of 64 KiB, beside the bound 2 * (batch + n/eta summed over the brackets in flight) + 1.
"""

import jax
import jax.numpy as jnp

import jaxhpo as hpo
from jaxhpo.bandit.schedule import hyperband_brackets, schedule
from jaxhpo.engine.device import Plan, engine_of, lower

FLOATS = 16384
SPACE = hpo.Space({"x": hpo.Float(0.0, 1.0)})
TRAINABLE = hpo.Trainable(
    init=lambda key, h: jnp.zeros(FLOATS) + h["x"],
    step=lambda key, state, h: state * 1.001 + jnp.sin(state) * h["x"],
    evaluate=lambda state, h: state.sum(),
)


def peak(problem, method, lanes=None, rounds=8):
    """Bytes that the compiled study has at once."""
    plan, key = Plan(problem, method, lanes, None, None), jax.random.key(0)
    carry = jax.eval_shape(lambda k: engine_of(plan).start(k, method.settings, rounds * method.batch), key)
    memory = lower(plan, rounds, carry, key)[0].compile().memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + outputs


def main():
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    head = f"{'max_steps':>9}{'batch':>7}{'cycles':>8}{'in flight':>11}{'rounds':>8}"
    print(f"{head}{'lanes in use':>14}{'states':>8}{'bound':>7}")
    for max_steps, batch, cycles, in_flight in [
        (810, 64, 1, 7),
        (810, 64, 2, 14),
        (810, 64, 4, 28),
        (810, 64, 4, 7),
        (81, 16, 1, 5),
    ]:
        brackets = hyperband_brackets(max_steps, 3, 1) * cycles
        plan = schedule(brackets, batch, in_flight)
        method = hpo.hyperband(SPACE, max_steps=max_steps, batch=batch, cycles=cycles, in_flight=in_flight)
        states = peak(TRAINABLE, method) / FLOATS / 4
        bound = 2 * (batch + sum(sorted((b[0].members // 3 for b in brackets), reverse=True)[:in_flight])) + 1
        row = f"{max_steps:9}{batch:7}{cycles:8}{in_flight:11}{plan.rounds:8}"
        print(f"{row}{plan.utilisation:14.1%}{states:8.0f}{bound:7}")
    objective = hpo.unroll(TRAINABLE, 10)
    few = peak(objective, hpo.random(SPACE, batch=32), 32, rounds=1)
    for name, batch, rounds in (("32 asks of 32", 32, 32), ("one ask of 1,000", 1000, 1)):
        more = peak(objective, hpo.random(SPACE, batch=batch), 32, rounds)
        print(f"random, {name}, lanes=32: {more / few:.3f} of 32 trials")


if __name__ == "__main__":
    main()
