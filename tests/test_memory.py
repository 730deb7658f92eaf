"""What a compiled study needs, by the compiler's own account."""

import jax
import jax.numpy as jnp
import pytest

import jaxhpo as hpo
from jaxhpo.engine.device import Plan, engine_of, lower

STATE = 16384
SPACE = hpo.Space({"x": hpo.Float(0.0, 1.0)})


def big(data):
    return hpo.Trainable(
        init=lambda key, h: jnp.zeros(STATE) + h["x"],
        step=lambda key, state, h: state * 1.001 + jnp.sin(state) * h["x"] + data[0, 0],
        evaluate=lambda state, h: state.sum(),
    )


def compiled(problem, method, lanes, most):
    plan, key = Plan(problem, method, lanes, None, None), jax.random.key(0)
    carry = jax.eval_shape(lambda k: engine_of(plan).start(k, method.settings, most * method.batch), key)
    lowered, _ = lower(plan, most, carry, key)
    return lowered, lowered.compile().memory_analysis()


def peak(memory):
    """Bytes at once: arguments, of which those donated become outputs, and what is needed in between."""
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + outputs


@pytest.mark.parametrize("cycles, in_flight", [(1, 5), (3, 15), (3, 2)])
def test_hyperband_keeps_few_states(cycles, in_flight):
    method = hpo.hyperband(SPACE, max_steps=81, batch=16, cycles=cycles, in_flight=in_flight)
    _, memory = compiled(big(jnp.ones((4, 4))), method, None, 8)
    first = sorted([27, 9, 3, 2, 0] * cycles, reverse=True)[:in_flight]
    assert peak(memory) <= (2 * (16 + sum(first)) + 1) * STATE * 4


def test_memory_does_not_grow_with_trials():
    objective = hpo.unroll(big(jnp.ones((4, 4))), steps=5)
    few = compiled(objective, hpo.random(SPACE, batch=32), 32, 1)[1]
    rounds = compiled(objective, hpo.random(SPACE, batch=32), 32, 32)[1]
    chunks = compiled(objective, hpo.random(SPACE, batch=1000), 32, 1)[1]
    assert peak(rounds) <= 1.2 * peak(few) and peak(chunks) <= 1.2 * peak(few)


def test_the_program_does_not_grow_with_the_data():
    method = hpo.hyperband(SPACE, max_steps=9, batch=4)
    small, large = (compiled(big(jnp.ones((n, 8))), method, None, 2)[0].as_text() for n in (10, 100_000))
    assert abs(len(large) - len(small)) < 200


def test_data_inside_a_jitted_function_is_an_argument_too():
    data = jnp.ones((1000, 8))
    objective = jax.jit(lambda key, h: (data * h["x"]).sum())
    plan, key = Plan(objective, hpo.random(SPACE, batch=4), None, None, None), jax.random.key(0)
    carry = jax.eval_shape(lambda k: engine_of(plan).start(k, (), 8), key)
    assert [x.shape for x in lower(plan, 2, carry, key)[1] if x.size > 100] == [(1000, 8)]
