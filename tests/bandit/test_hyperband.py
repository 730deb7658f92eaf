import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as hpo
from jaxhpo.bandit.schedule import halving, hyperband_brackets, schedule
from tests.bandit.races import RACE, SPACE, trial_loss

LI_ET_AL = {  # Li et al. 2018, Table 1: R = 81, eta = 3
    4: [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
    3: [(27, 3), (9, 9), (3, 27), (1, 81)],
    2: [(9, 9), (3, 27), (1, 81)],
    1: [(6, 27), (2, 81)],
    0: [(5, 81)],
}


def plain_hyperband(brackets, loss):
    """Which (bracket, rung, member by age) trains how far; the members of a bracket are numbered by age."""
    reached = {}
    for b, ladder in enumerate(brackets):
        members = list(range(ladder[0].members))
        for i, rung in enumerate(ladder):
            for m in members:
                reached[b, m] = rung.steps
            if i + 1 < len(ladder):
                members = sorted(members, key=lambda m: (loss(b, m, rung.steps), m))[: ladder[i + 1].members]
    return reached


def test_brackets_are_those_of_the_published_table():
    brackets = hyperband_brackets(81, 3, 1)
    assert [[tuple(r) for r in b] for b in brackets] == list(LI_ET_AL.values())
    assert [len(b) for b in hyperband_brackets(243, 3, 1)] == [6, 5, 4, 3, 2, 1]
    assert [tuple(b[0]) for b in hyperband_brackets(810, 3, 1)][-1] == (7, 810)
    assert [tuple(r) for r in hyperband_brackets(16, 2, 4)[0]] == [(4, 4), (2, 8), (1, 16)]


@pytest.mark.parametrize(
    "trials, steps, most, rungs",
    [
        (9, 1, 9, [(9, 1), (3, 3), (1, 9)]),
        (9, 1, 81, [(9, 1), (3, 3), (1, 81)]),
        (2, 5, 5, [(2, 5)]),
        (10, 2, 10, [(10, 2), (3, 6), (1, 10)]),
    ],
)
def test_halving_ends_at_max_steps(trials, steps, most, rungs):
    assert [tuple(r) for r in halving(trials, steps, most, 3)] == rungs


@pytest.mark.parametrize("batch", [7, 16, 100])
def test_equals_a_plain_hyperband(batch):
    method = hpo.hyperband(SPACE, max_steps=81, batch=batch)
    _, trace = jax.jit(hpo.study(RACE, method))(jax.random.key(3))
    active = np.asarray(trace.trials.active)
    ids, x = np.asarray(trace.trials.id)[active], np.asarray(trace.trials.unit)[active][:, 0]
    reached, losses = np.asarray(trace.reached)[active], np.asarray(trace.losses)[active]
    value = dict(zip(ids.tolist(), x.tolist(), strict=True))
    assert len(value) == 81 + 27 + 9 + 6 + 5

    plan = schedule(hyperband_brackets(81, 3, 1), batch, 5).table
    starts = plan.fresh.nonzero()
    owner = collections.defaultdict(dict)
    for b, m, t in zip(plan.bracket[starts], plan.member[starts], plan.trial[starts], strict=True):
        owner[int(b)][int(m)] = int(t)
    expected = plain_hyperband(hyperband_brackets(81, 3, 1), lambda b, m, steps: trial_loss(value[owner[b][m]], steps))
    furthest = collections.defaultdict(int)
    for t, r in zip(ids.tolist(), reached.tolist(), strict=True):
        furthest[t] = max(furthest[t], r)
    assert {t: r for t, r in furthest.items()} == {owner[b][m]: r for (b, m), r in expected.items()}
    assert losses.tolist() == [trial_loss(a, s) for a, s in zip(x, reached, strict=True)]
    resumed = sum(
        n * (s - (ladder[i - 1][1] if i else 0)) for ladder in LI_ET_AL.values() for i, (n, s) in enumerate(ladder)
    )
    assert int((np.asarray(trace.trials.steps)[active]).sum()) == resumed == 1404


@pytest.mark.parametrize(
    "max_steps, batch, cycles, in_flight, least",
    [(810, 64, 1, 7, 0.44), (810, 64, 4, 28, 0.85), (81, 16, 1, 5, 0.75), (81, 7, 2, 3, 0.8)],
)
def test_schedule_keeps_lanes_full_in_bounded_memory(max_steps, batch, cycles, in_flight, least):
    brackets = hyperband_brackets(max_steps, 3, 1) * cycles
    plan = schedule(brackets, batch, in_flight)
    assert plan.utilisation >= least
    first = sorted((b[0].members // 3 for b in brackets), reverse=True)[:in_flight]
    assert plan.slots <= batch + sum(first)
    assert (plan.table.standing >= 0).sum(1).max() <= in_flight
    table, run = plan.table, np.zeros(len(brackets), int)
    for r in range(plan.rounds):
        busy = table.bracket[r] >= 0
        assert (np.diff(busy.astype(int)) <= 0).all()
        np.add.at(run, table.bracket[r][busy], table.steps[r])
    work = [sum(n * (s - (b[i - 1].steps if i else 0)) for i, (n, s) in enumerate(b)) for b in brackets]
    assert run.tolist() == work


def test_failed_trials_are_never_promoted_and_cost_no_more_steps():
    def evaluate(state, h):
        return jnp.where(state[0] < 0.5, jnp.nan, state[0])

    method = hpo.hyperband(SPACE, max_steps=81, batch=16)
    _, trace = jax.jit(hpo.study(RACE._replace(evaluate=evaluate), method))(jax.random.key(0))
    active = np.asarray(trace.trials.active)
    ids, losses = np.asarray(trace.trials.id), np.asarray(trace.losses)
    dead = {int(t) for t in ids[active & np.isnan(losses)]}
    told = collections.Counter(ids[active].tolist())
    assert 40 < len(dead) < 90 and all(told[t] == 1 for t in dead)
    assert np.nanmin(losses[active]) >= 0.5
    assert np.isnan(losses[active]).sum() == len(dead)


def test_the_sampler_chooses_and_is_told_each_trial_once():
    def memo(space, *, batch):
        """Asks for one corner, and counts what it is told."""
        inner = hpo.random(space, batch=batch)

        def ask(key, state, pending=None):
            trials, rest = inner.ask(key, state[0])
            return trials._replace(unit=jnp.full_like(trials.unit, 0.25)), (rest, *state[1:])

        def tell(state, trials, losses, gradients=None):
            told = trials.active.sum()
            return state[0], state[1] + told, state[2] + jnp.where(trials.active, trials.steps, 0).sum()

        init = lambda key, settings=None: (inner.init(key, settings), jnp.int32(0), jnp.int32(0))  # noqa: E731
        return inner._replace(init=init, ask=ask, tell=tell)

    method = hpo.hyperband(SPACE, max_steps=27, batch=8, sampler=memo)
    state, trace = jax.jit(hpo.study(RACE, method))(jax.random.key(0))
    assert np.unique(np.asarray(trace.trials.unit)[np.asarray(trace.trials.active)]).tolist() == [0.25]
    sizes = [(27, 1), (9, 3), (6, 9), (4, 27)]
    assert (int(state.sampler[1]), int(state.sampler[2])) == (46, sum(n * s for n, s in sizes))


def test_successive_halving_is_one_bracket():
    method = hpo.successive_halving(SPACE, trials=27, max_steps=27, batch=27)
    _, trace = jax.jit(hpo.study(RACE, method))(jax.random.key(0))
    assert np.asarray(trace.trials.active).sum(1).tolist() == [27, 9, 3, 1]
    assert np.asarray(trace.trials.steps)[:, 0].tolist() == [1, 2, 6, 18]
    best = np.sort(np.asarray(trace.losses)[0])[:9]
    carried = [trial_loss(float(x), 1) for x in np.asarray(trace.trials.unit)[1, :9, 0]]
    assert carried == best.tolist()


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(max_steps=0), "max_steps must be at least 1, got 0"),
        (dict(max_steps=9, eta=1), "eta must be at least 2, got 1"),
        (dict(max_steps=9, batch=0), "batch must be at least 1, got 0"),
        (dict(max_steps=9, cycles=0), "cycles must be at least 1, got 0"),
        (dict(max_steps=9, min_steps=10), "min_steps must be at most max_steps=9, got 10"),
        (dict(max_steps=9, in_flight=0), "in_flight must be at least 1, got 0"),
        (dict(max_steps=9, sampler=hpo.grid), "sampler gave the method 'grid', which ends by itself"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        hpo.hyperband(SPACE, **call)
