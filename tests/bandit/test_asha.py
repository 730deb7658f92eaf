import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.bandit import ladder as ladders
from jaxhpo.bandit.ladder import NOWHERE, Entries
from jaxhpo.bandit.schedulers import read_rungs
from tests.bandit.races import RACE, SPACE, run, trial_loss


def plain_asha(rungs, eta, batch, paused, rounds, loss):
    """Algorithm 2 of Li et al. (2020), a free lane at a time: the (trial, steps reached) of every round."""
    quantum = int(np.gcd.reduce(np.diff((0, *rungs))))
    reached = [{} for _ in rungs]  # trial: loss
    running, waiting, started, history = {}, {}, 0, []

    def place(trial, rung):
        return sorted(reached[rung], key=lambda t: (reached[rung][t], t)).index(trial)

    for _ in range(rounds):
        while len(running) < batch:
            able = {}
            for k in range(len(rungs) - 1):
                quota, there = len(reached[k]) // eta, [t for t, rung in waiting.items() if rung == k]
                there.sort(key=lambda t, k=k: place(t, k))
                moved = len(reached[k + 1]) + sum(rungs[k] <= running[t] < rungs[k + 1] for t in running)
                able |= {t: k for t in there if place(t, k) < quota}
                if paused:  # where some were given up, the best that are there fill the quota
                    able |= {t: k for t in there[: max(quota - moved, 0)]}
            if able:
                trial = min(able, key=lambda t: (-able[t], place(t, able[t])))
                running[trial] = rungs[waiting.pop(trial)]
            else:
                running[started], started = 0, started + 1
        away = {t: ((eta * (place(t, k) + 1) - len(reached[k])) * eta**k, -k, t) for t, k in waiting.items()}
        waiting = {t: waiting[t] for t in sorted(waiting, key=away.get)[:paused]}
        running = {t: s + quantum for t, s in running.items()}
        history.append(sorted(running.items()))
        for trial, steps in sorted(running.items()):
            value = loss(trial, steps)
            if steps in rungs or not np.isfinite(value):
                rung = next(k for k, s in enumerate(rungs) if s >= steps)
                reached[rung][trial] = value if np.isfinite(value) else np.inf
                del running[trial]
                if rung + 1 < len(rungs) and np.isfinite(value):
                    waiting[trial] = rung
    return history


@pytest.mark.parametrize(
    "batch, paused, most, least, eta",
    [(1, 64, 9, 1, 3), (4, 64, 27, 1, 3), (7, 64, 14, 2, 2), (5, 3, 9, 1, 3), (4, 0, 8, 1, 2)],
)
def test_equals_the_published_algorithm(batch, paused, most, least, eta):
    rungs, rounds = read_rungs(most, eta, least), 140
    method = hpo.asha(SPACE, max_steps=most, min_steps=least, eta=eta, batch=batch, paused=paused)
    assert method.slots == batch + paused
    _, trace = run(method, rounds, seed=1)
    ids, x = trace.trials.id, trace.trials.unit[..., 0]
    value = dict(zip(ids.ravel().tolist(), x.ravel().tolist(), strict=True))
    found = [sorted(zip(*row, strict=True)) for row in zip(ids.tolist(), trace.reached.tolist(), strict=True)]
    expected = plain_asha(rungs, eta, batch, paused, rounds, lambda t, s: trial_loss(value[t], s))
    assert found == expected
    assert trace.losses.ravel().tolist() == [
        trial_loss(value[t], s) for t, s in zip(ids.ravel().tolist(), trace.reached.ravel().tolist(), strict=True)
    ]
    assert trace.reached.max() == most, "some trials are trained to the end"


def test_no_lane_ever_waits():
    method = hpo.asha(SPACE, max_steps=27, batch=16)
    _, trace = run(method, 100)
    assert trace.trials.active.all() and (trace.trials.steps == 1).all()
    _, trace = run(hpo.asha(SPACE, max_steps=20, min_steps=4, batch=3), 30)
    assert trace.trials.active.all() and (trace.trials.steps == 4).all()
    assert set(trace.reached.ravel().tolist()) == {4, 8, 12, 16, 20}


def test_rungs_end_at_max_steps():
    assert read_rungs(81, 3, 1) == (1, 3, 9, 27, 81)
    assert read_rungs(52, 3, 1) == (1, 3, 9, 27, 52)
    assert read_rungs(10, 2, 10) == (10,)
    assert read_rungs(243, 3, 1)[-2:] == (81, 243)


def test_failed_trials_are_never_promoted_and_cost_no_more_steps():
    broken = RACE._replace(evaluate=lambda s, h: jnp.where((s[0] < 0.4) & (s[1] > 1), jnp.nan, jnp.abs(s[0] - 0.5)))
    _, trace = run(hpo.asha(SPACE, max_steps=9, batch=8), 100, broken)
    ids, losses, reached = (np.asarray(x).ravel() for x in (trace.trials.id, trace.losses, trace.reached))
    dead = ids[np.isnan(losses)]
    assert len(dead) > 20 and len(set(dead.tolist())) == len(dead)
    assert (reached[np.isin(ids, dead)] <= 2).all()
    assert reached[~np.isin(ids, dead)].max() == 9


TIED = hpo.Trainable(
    init=lambda key, h: jnp.int32(0), step=lambda key, s, h: s + 1, evaluate=lambda s, h: jnp.round(h["x"])
)


def test_ties_and_little_room_do_not_stop_promotions():
    reached = {}
    for paused in (None, 4, 300):
        _, trace = run(hpo.asha(SPACE, max_steps=9, batch=8, paused=paused), 200, TIED)
        reached[paused] = np.array([(trace.reached == steps).sum() for steps in (1, 3, 9)])
    assert (reached[300] > 20).all()
    assert np.allclose(reached[None], reached[300], rtol=0.05) and np.allclose(reached[4], reached[300], rtol=0.15)


def test_a_row_that_is_told_again_changes_nothing():
    method = hpo.asha(SPACE, max_steps=9, batch=4)
    state, losses = method.init(jax.random.key(0)), jnp.array([0.1, 0.2, 0.3, 0.4])
    ask, tell = jax.jit(method.ask), jax.jit(method.tell)
    first, state = ask(jax.random.key(1), state)
    state = tell(state, first, losses)
    again = tell(state, first, losses)
    assert again.ladder.reached.tolist() == state.ladder.reached.tolist() == [4, 0, 0]
    second, state = ask(jax.random.key(2), state)
    assert 0 in second.id.tolist()
    late = tell(state, first, losses)
    np.testing.assert_array_equal(late.kept.rung, state.kept.rung)
    np.testing.assert_array_equal(late.kept.left, state.kept.left)


def test_ranks_are_those_of_the_whole_record(monkeypatch):
    monkeypatch.setattr(ladders, "BUFFER", 8)
    rng, rungs = np.random.default_rng(0), 3
    ladder, told = ladders.reserve(ladders.empty(rungs, 5), 300), []
    insert, rank = jax.jit(ladders.insert), jax.jit(ladders.rank)
    for start in range(0, 250, 5):
        rung = rng.integers(-1, rungs, 5)
        rung[rng.random(5) < 0.2] = NOWHERE
        loss = np.where(rng.random(5) < 0.1, np.inf, rng.integers(0, 20, 5)).astype(np.float32)
        trial = np.arange(start, start + 5)
        ladder = insert(ladder, Entries(*map(jnp.asarray, (rung, loss, trial))))
        told += [(r, x, t) for r, x, t in zip(rung.tolist(), loss.tolist(), trial.tolist(), strict=True) if r >= 0]
        if start % 25 == 0 and told:
            queries = [told[i] for i in rng.integers(0, len(told), 6)]
            found = rank(ladder, Entries(*(jnp.asarray(x) for x in zip(*queries, strict=True))))
            assert found.tolist() == [sum(e[0] == q[0] and e[1:] < q[1:] for e in told) for q in queries]
    assert ladder.reached.tolist() == [sum(e[0] == k for e in told) for k in range(rungs)]


def test_a_full_record_loses_the_worst_of_the_lowest_rung():
    ladder, insert = ladders.empty(2, 64), jax.jit(ladders.insert)
    for start in range(0, 10_000, 64):
        trial = jnp.arange(start, start + 64)
        rung = (trial % 3 == 0).astype(jnp.int32)
        ladder = insert(ladder, Entries(rung, (-trial).astype(jnp.float32), trial))
    assert ladder.sorted.rung.shape[0] == 1024 and ladder.reached.tolist() == [6698, 3350]
    trial = jnp.array([9000, 600, 10_000])
    ranks = ladders.rank(ladder, Entries(jnp.array([1, 1, 0]), (-trial).astype(jnp.float32), trial))
    assert ranks[0] == sum(t % 3 == 0 for t in range(9001, 10_048))
    assert ranks[1:].tolist() == [3350, 6698], "who is not in the record any more is not promoted"


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(max_steps=0), "max_steps must be at least 1, got 0"),
        (dict(max_steps=9, eta=1), "eta must be at least 2, got 1"),
        (dict(max_steps=9, paused=-1), "paused must be at least 0, got -1"),
        (dict(max_steps=9, min_steps=10), "min_steps must be at most max_steps=9, got 10"),
        (dict(max_steps=9, sampler=hpo.grid), "sampler gave the method 'grid', which ends by itself"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        hpo.asha(SPACE, **call)


def test_an_open_end_needs_a_budget():
    with pytest.raises(ValueError, match="'asha' does not end by itself; give a budget, such as steps="):
        hpo.minimize(RACE, hpo.asha(SPACE, max_steps=9, batch=4), key=jax.random.key(0))


def test_a_model_knows_the_rows_of_its_own_ask_and_those_that_train():
    space = hpo.Space({"a": hpo.Int(0, 7), "b": hpo.Int(0, 7)})
    method = hpo.asha(space, max_steps=9, batch=14, sampler=hpo.tpe)
    ask, tell = jax.jit(method.ask), jax.jit(method.tell)
    state, tried = method.init(jax.random.key(0)), []
    for now in range(4):
        trials, state = ask(jax.random.key(now), state)
        fresh = trials.active & (trials.source < 0)
        tried += [tuple(level) for level in space.level(trials.unit)[fresh].tolist()]
        state = tell(state, trials, trials.unit.sum(1))
    assert len(tried) > 30 and len(set(tried)) == len(tried)
