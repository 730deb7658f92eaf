"""A method that was written from docs/new_method.md alone; the contract suite has it among its own."""

import ast
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from tests import one_plus_one as module
from tests.one_plus_one import one_plus_one
from tests.snippets import page

SPACE = {"x": hpo.Array(5, -5.0, 5.0)}


def sphere(key, h):
    return (h["x"] ** 2).sum()


def told(method, state, losses):
    """The state after one ask whose rows have these losses."""
    trials, state = method.ask(jax.random.key(1), state)
    return method.tell(state, trials, jnp.array(losses))


def test_it_imports_nothing_but_public_names():
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"functools", "typing", "jax", "jax.numpy", "jaxhpo"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hpo"
    }
    assert used == {"Count", "Initializer", "Method", "Space", "black_box"} and used <= set(hpo.__all__)


def test_the_step_follows_the_fifth_of_successes():
    method = one_plus_one(SPACE, sigma=0.2, growth=1.5)
    state = told(method, method.init(jax.random.key(0)), [4.0])
    np.testing.assert_allclose(state.sigma, 0.2, rtol=1e-6)  # the first trial has no parent
    better, worse, failed = (told(method, state, [loss]) for loss in (3.0, 5.0, np.nan))
    np.testing.assert_allclose(better.sigma, 0.2 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(worse.sigma, 0.2 * 1.5**-0.25, rtol=1e-6)
    np.testing.assert_allclose(failed.sigma, worse.sigma, rtol=1e-6)
    assert [float(s.loss) for s in (better, worse, failed)] == [3.0, 4.0, 4.0]
    # One success in five leaves the step as it is.
    batch = one_plus_one(SPACE, sigma=0.2, batch=5)
    first = told(batch, batch.init(jax.random.key(0)), [4.0] * 5)
    np.testing.assert_allclose(told(batch, first, [5.0, 3.0, 5.0, 5.0, 5.0]).sigma, 0.2, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_far_better_than_random_search_on_a_sphere(seed):
    key = jax.random.key(seed)
    result = hpo.minimize(sphere, one_plus_one(SPACE), key=key, trials=300, progress=False)
    by_chance = hpo.minimize(sphere, hpo.random(SPACE, batch=1), key=key, trials=300, progress=False)
    assert result.best_loss < by_chance.best_loss / 10_000
    losses = result.trials.loss
    is_success = losses[1:] <= np.minimum.accumulate(losses)[:-1]
    # Below a fifth, by as much as the step has to shrink with the distance.
    assert 0.1 < is_success[100:].mean() < 0.2
    powers = is_success.sum() - (~is_success).sum() / 4
    np.testing.assert_allclose(result.method_state.sigma, 0.2 * 1.5**powers, rtol=1e-3)


def test_the_step_grows_on_a_slope():
    method = one_plus_one({"x": hpo.Array(50, 0.0, 1.0)}, sigma=1e-4)
    result = hpo.minimize(lambda key, h: h["x"].sum(), method, key=jax.random.key(0), trials=60, progress=False)
    # Every second step succeeds there: by 1.5^(1/2 - 1/8) a trial as long as the bounds are far.
    assert result.method_state.sigma > 100 * 1e-4


def test_methods_of_the_page_find_something():
    names = page("docs/new_method.md")
    trained = names["result"]
    assert trained.best_loss < 1e-12 and trained.trials.steps.max() == 60
    bowl, space = names["bowl"], names["space"]
    lost = []
    for seed in range(3):
        run = functools.partial(hpo.minimize, bowl, key=jax.random.key(seed), trials=100, progress=False)
        lost.append([run(method).best_loss for method in (names["lipschitz"](space), hpo.random(space, batch=4))])
    assert all(a < b / 2 for a, b in lost)
    np.testing.assert_allclose(names["traces"].losses[1].min(), lost[0][0], rtol=1e-5)
