from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.bandit.dehb import adopted
from jaxhpo.bandit.sampling import by_level
from jaxhpo.method import Count, black_box, count
from tests.bandit.races import RACE, SPACE, run

BOWL = hpo.Trainable(
    init=lambda key, h: (h["x"], jnp.int32(0)),
    step=lambda key, state, h: (state[0], state[1] + 1),
    evaluate=lambda state, h: jnp.abs(state[0] - 0.7) + 1 / (1.0 + state[1]),
)


class Memo(NamedTuple):
    """What a method was told, and how often it was asked."""

    told: jax.Array
    failed: jax.Array
    steps: jax.Array
    pending: jax.Array
    asked: Count


def memo(space, *, batch):
    """A method whose points say what its state is: 0.5 + told / 1024 + the last digit of pending / 65536."""

    def init(key, settings=None):
        zero = jnp.int32(0)
        return Memo(zero, zero, zero, zero, count())

    def ask(key, state, pending=None):
        waits = 0 if pending is None else pending.active.sum()
        unit = jnp.full((batch, 1), 0.5) + state.told / 1024 + waits / 65536
        return black_box(space, unit, state.asked.value), state._replace(
            asked=Count(state.asked.value + batch), pending=jnp.int32(waits)
        )

    def tell(state, trials, losses, gradients=None):
        good = trials.active & jnp.isfinite(losses)
        told = [x.sum(dtype=jnp.int32) for x in (good, trials.active & ~good, jnp.where(good, trials.steps, 0))]
        return state._replace(told=state.told + told[0], failed=state.failed + told[1], steps=state.steps + told[2])

    return hpo.Method("memo", space, (), init, ask, tell, batch)


def is_memo(unit):
    """Whether a memo has chosen a point, and not chance."""
    return np.abs(unit * 65536 - np.round(unit * 65536)) < 1e-3


def stacked(state):
    """The memos of all levels."""
    return Memo(*[x.tolist() for x in state.sampler.states])


@pytest.mark.parametrize("scheduler", ["asha", "hyperband"])
def test_every_level_is_told_who_has_reached_it(scheduler):
    method = hpo.bohb(SPACE, max_steps=27, scheduler=scheduler, sampler=memo, batch=4, enough=1000)
    state, trace = run(method, None if scheduler == "hyperband" else 150)
    memos = stacked(state)
    if scheduler == "hyperband":
        # Members of the rungs, and those who have left at the rungs below: Li et al. 2018, Table 1, for R = 27.
        assert memos.told == [27, 18, 12, 8] and memos.failed == [0, 18, 18 + 12, 18 + 12 + 8]
    else:
        assert memos.told == [int((trace.reached == level).sum()) for level in (1, 3, 9, 27)]
        left = np.diff([0, *memos.failed]).tolist()
        assert left[0] == 0 and min(left) >= 0 and sum(left) == trace.trials.id.max() + 1 - 4 - 16 - memos.told[3]
    assert memos.steps == [n * s for n, s in zip(memos.told, (1, 3, 9, 27), strict=True)]
    assert state.sampler.told.tolist() == memos.told and min(memos.told) > 0
    assert memos.asked == [0, 0, 0, 0], "none knew enough, so chance has chosen"
    assert len(np.unique(trace.trials.unit[trace.trials.active])) > 40


def test_the_highest_level_that_knows_enough_chooses():
    method = hpo.bohb(SPACE, max_steps=9, sampler=memo, batch=3, enough=4)
    _, trace = run(method, 60)
    told = {1: 0, 3: 0, 9: 0}
    chosen_by = set()
    seen = set()
    for ids, unit, reached in zip(trace.trials.id, trace.trials.unit[..., 0], trace.reached, strict=True):
        able = [level for level in told if told[level] >= 4]
        new = [i for i in range(3) if int(ids[i]) not in seen]
        for i in new:
            seen.add(int(ids[i]))
            if able:
                known = int((float(unit[i]) - 0.5) * 1024)
                assert known == told[max(able)]
                chosen_by.add(max(able))
        for steps in reached.tolist():
            if steps in told:
                told[steps] += 1
    assert chosen_by == {1, 3, 9}


def test_what_is_on_its_way_to_the_level_is_pending():
    method = hpo.bohb(SPACE, max_steps=9, sampler=memo, batch=3, enough=2, paused=0, random_fraction=0.7)
    _, trace = run(method, 120, seed=1)
    seen, told, checked = set(), {1: 0, 3: 0, 9: 0}, set()
    for ids, unit, reached in zip(trace.trials.id, trace.trials.unit[..., 0], trace.reached, strict=True):
        able = [level for level in told if told[level] >= 2]
        new = [i for i in range(3) if int(ids[i]) not in seen]
        going = [s for i, s in enumerate(reached.tolist()) if i not in new]
        if able:
            # A trial that has now reached s steps had s - 1, so it was on its way to s or further.
            expected = sum(s <= max(able) for s in going)
            for i in new:
                if not is_memo(unit[i]):
                    continue
                pending = round((float(unit[i]) - 0.5) * 65536) % 64
                assert pending == expected
                checked.add(pending)
        seen |= {int(i) for i in ids}
        for steps in reached.tolist():
            if steps in told:
                told[steps] += 1
    assert {0, 1} <= checked


def test_chance_has_its_share():
    method = hpo.bohb(SPACE, max_steps=9, sampler=memo, batch=8, enough=1)
    study, shares = jax.jit(hpo.study(RACE, method, 60)), []
    for fraction in (0.0, 0.5, 1.0):
        _, trace = jax.device_get(
            study(jax.random.key(0), method.settings | {"random_fraction": jnp.float32(fraction)})
        )
        first = np.unique(trace.trials.id, return_index=True)[1]
        x = trace.trials.unit.ravel()[first][8:]
        shares.append(float(np.mean(~is_memo(x))))
    assert study._cache_size() == 1, "a setting compiles nothing"
    assert shares[0] == 0 and 0.4 < shares[1] < 0.6 and shares[2] > 0.9


def test_pooled_ranks_those_who_got_further_first():
    losses = []

    def spy(space, *, batch):
        inner = memo(space, batch=batch)

        def tell(state, trials, told, gradients=None):
            jax.debug.callback(
                lambda on, x, s: losses.extend(zip(x[on].tolist(), s[on].tolist(), strict=True)),
                trials.active,
                told,
                trials.steps,
            )
            return inner.tell(state, trials, told)

        return inner._replace(tell=tell)

    method = hpo.bohb(SPACE, max_steps=9, model="pooled", sampler=spy, batch=4, enough=1000)
    state, trace = run(method, 40)
    assert state.sampler.told.shape == (1,)
    by_steps = {s: [x for x, steps in losses if steps == s] for s in (1, 3, 9)}
    assert max(by_steps[9]) < min(by_steps[3]) and max(by_steps[3]) < min(by_steps[1])
    raw = trace.losses[trace.reached == 1]
    assert np.array_equal(np.argsort(raw, kind="stable"), np.argsort(by_steps[1], kind="stable"))


@pytest.mark.parametrize("build", [hpo.bohb, hpo.dehb])
@pytest.mark.parametrize("scheduler", ["asha", "hyperband"])
def test_learns_where_the_optimum_is(build, scheduler):
    options = {"cycles": 8, "in_flight": 3} if scheduler == "hyperband" else {}
    options |= {"population": 8} if build is hpo.dehb else {}
    method = build(SPACE, max_steps=9, batch=4, scheduler=scheduler, **options)
    _, trace = run(method, 100 if scheduler == "asha" else None, BOWL)
    order = np.unique(trace.trials.id[trace.trials.active], return_index=True)[1]
    x = trace.trials.unit[trace.trials.active][order][:, 0]
    early, late = np.abs(x[:20] - 0.7), np.abs(x[-20:] - 0.7)
    assert np.median(early) > 0.15 and np.median(late) < 0.12, (np.median(early), np.median(late))


def test_who_competes_with_whom():
    method = hpo.differential_evolution(SPACE, population=4, batch=4)
    state = method.init(jax.random.key(0))
    rows = method.ask(jax.random.key(1), state)[0].aux
    state = state._replace(loss=jnp.array([1.0, jnp.inf, 3.0, 2.0]), start=jnp.int32(5))
    chance, elsewhere = jnp.array([False, True, False, False]), jnp.array([False, True, False, True])
    row = adopted(state, rows, elsewhere, chance)
    assert row.member.tolist() == [0, 1, 2, 2], "while a place is empty, all others take the worst"
    assert row.start.tolist() == [0, 5, 0, 5] and row.weight[1] == row.weight[3] == 0
    full = state._replace(loss=jnp.array([1.0, 4.0, 3.0, 2.0]))
    assert adopted(full, rows, elsewhere, chance).member.tolist() == [0, 1, 2, 3], "then only those of chance do"
    assert row.weight[0] == rows.weight[0]


@pytest.mark.parametrize("levels", [1, 2, 5, 7])
def test_levels_come_before_losses(levels):
    losses = np.array([-3e38, -1e8, -1.001, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1.001, 1e5, 1.001e5, 1e8, 2e8, 3e38])
    level, loss = (x.ravel() for x in np.meshgrid(np.arange(levels), losses.astype(np.float32)))
    found = np.asarray(by_level(jnp.asarray(loss), jnp.asarray(level), levels))
    assert np.isfinite(found).all() and found.dtype == np.float32
    assert np.array_equal(np.argsort(found, kind="stable"), np.lexsort((loss, -level)))
    assert len(set(found.tolist())) == len(found)


def test_children_compete_with_their_parents_and_chance_fills_the_populations():
    method = hpo.dehb(SPACE, max_steps=9, population=4, batch=4)
    state, trace = run(method, 80, BOWL)
    inner = hpo.differential_evolution(SPACE, population=4, batch=4)
    example = jax.eval_shape(lambda: inner.init(jax.random.key(0)))
    populations = jax.tree.unflatten(jax.tree.structure(example), state.sampler.states)
    for level, steps in enumerate((1, 3, 9)):
        held = populations.loss[level]
        told = trace.losses[trace.reached == steps]
        assert np.isfinite(held).all() and set(held.tolist()) <= set(told.tolist())
        assert held.min() == told.min()
        best = trace.trials.unit[trace.reached == steps][told.argmin()]
        assert populations.unit[level][held.argmin()] == best


@pytest.mark.parametrize(
    "build, call, words",
    [
        (hpo.bohb, dict(scheduler="sha"), "scheduler must be one of .*, got 'sha'"),
        (hpo.bohb, dict(model="all"), "model must be one of .*, got 'all'"),
        (hpo.bohb, dict(enough=0), "enough must be at least 1, got 0"),
        (hpo.bohb, dict(random_fraction=1.5), r"random_fraction must be in \[0, 1\], got 1.5"),
        (hpo.bohb, dict(sampler=hpo.grid), "sampler gave the method 'grid', which ends by itself"),
        (hpo.bohb, dict(min_steps=10), "min_steps must be at most max_steps=9, got 10"),
        (hpo.dehb, dict(population=2), "population must be at least 4, got 2"),
        (hpo.dehb, dict(strategy="best"), "strategy must be one of"),
    ],
)
def test_bad_arguments(build, call, words):
    with pytest.raises(ValueError, match=words):
        build(SPACE, **({"max_steps": 9} | call))
