"""The record of told trials: what is kept, what leaves, and that its cost follows the count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhpo import history
from jaxhpo.history import buckets, empty, on_bucket, reserve
from jaxhpo.method import axes

append = jax.jit(history.append)


def filled(losses, batch, capacity=64, dims=1):
    """A record told `losses` in batches; the point of a trial is its number over 1000."""
    record = empty(dims, capacity)
    for start in range(0, len(losses), batch):
        row = jnp.arange(start, start + batch)
        unit = jnp.broadcast_to(row[:, None] / 1000, (batch, dims))
        record = append(record, unit, jnp.asarray(losses[start : start + batch]), jnp.ones(batch, bool))
    return record


def numbers(record):
    return np.round(np.asarray(record.unit[:, 0]) * 1000)[np.asarray(record.mask)].astype(int).tolist()


def outside_branches(jaxpr):
    """(primitive, size of its result) of every equation that runs whatever the branches taken."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, max((v.aval.size for v in equation.outvars), default=0)
        inner = equation.params.get("jaxpr") if equation.primitive.name != "cond" else None
        if inner is not None:
            yield from outside_branches(getattr(inner, "jaxpr", inner))


def test_buckets_grow_from_64_and_round_up():
    assert buckets(1) == buckets(64) == (64,)
    assert buckets(65) == (64, 256)
    assert buckets(1025) == (64, 256, 1024, 4096)
    assert buckets(300, growth=2) == (64, 128, 256, 512)
    assert empty(3, 100).unit.shape == (256, 3)
    assert reserve(empty(3), 257).losses.shape == (1024,)
    assert reserve(empty(3, 100), 10).losses.shape == (256,)


def test_append_keeps_failures_and_counts_padding():
    record = append(
        empty(2),
        jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [jnp.nan, 9.0]]),
        jnp.array([1.0, jnp.nan, -jnp.inf, jnp.nan]),
        jnp.array([True, True, True, False]),
    )
    record = append(record, jnp.array([[0.7, 0.8]]), jnp.array([2.0]), jnp.array([True]))
    np.testing.assert_array_equal(record.mask[:6], [True, True, True, False, True, False])
    np.testing.assert_array_equal(record.succeeded[:6], [True, False, False, False, True, False])
    np.testing.assert_array_equal(record.failed[:6], [False, True, True, False, False, False])
    np.testing.assert_array_equal(record.losses[:6], [1, np.inf, np.inf, np.inf, 2, np.inf])
    np.testing.assert_allclose(record.unit[:6, 0], [0.1, 0.3, 0.5, 0.5, 0.7, 0.5])
    assert int(record.count.value) == 5
    assert not np.isnan(record.unit).any()


def test_reserve_keeps_every_row():
    record = filled(np.arange(10.0), batch=5)
    larger = reserve(record, 65)
    assert larger.losses.shape == (256,)
    np.testing.assert_array_equal(larger.losses[:64], record.losses)
    np.testing.assert_array_equal(larger.unit[:64], record.unit)
    assert numbers(larger) == list(range(10))
    assert not larger.mask[64:].any() and np.isposinf(larger.losses[64:]).all() and (larger.unit[64:] == 0.5).all()


@pytest.mark.parametrize("batch", [1, 10, 64])
def test_when_full_the_oldest_that_is_not_among_the_best_leaves(batch):
    losses = np.random.default_rng(0).permutation(260 // batch * batch).astype(np.float32)
    record = filled(losses, batch)
    kept = []
    for start in range(0, len(losses), batch):
        if start + batch > 64:
            best = sorted(kept, key=lambda i: losses[i])[:16]
            # Oldest first, the best quarter last; unused rows go before any trial.
            order = [i for i in kept if i not in best] + [i for i in kept if i in best]
            kept = sorted(set(kept) - set(order[: max(0, len(kept) + batch - 64)]))
        kept += range(start, start + batch)
    assert numbers(record) == kept
    assert int(record.count.value) == len(losses)
    assert batch == 64 or losses.argmin() in kept


def test_padding_leaves_before_any_trial_and_failures_are_never_best():
    record = empty(1)
    for start in range(0, 64, 16):
        rows = jnp.arange(start, start + 16)
        record = append(record, rows[:, None] / 1000, jnp.where(rows < 8, jnp.nan, 1.0 * rows), rows % 2 == 0)
    record = append(record, jnp.full((16, 1), 0.9), jnp.full(16, 99.0), jnp.ones(16, bool))
    assert numbers(record) == list(range(0, 64, 2)) + [900] * 16
    # 16 rows of padding are left and go; of the trials none has to.
    record = append(record, jnp.full((16, 1), 0.8), jnp.full(16, 99.0), jnp.ones(16, bool))
    assert numbers(record) == list(range(0, 64, 2)) + [900] * 16 + [800] * 16
    # Four failures, 0 to 6, are the oldest that are not best.
    record = append(record, jnp.full((4, 1), 0.7), jnp.full(4, 99.0), jnp.ones(4, bool))
    assert numbers(record)[:3] == [8, 10, 12]


def test_a_batch_larger_than_the_record_names_reserve():
    with pytest.raises(ValueError, match=r"65 rows told at once, but the history holds 64; reserve\(state, 65\) first"):
        append(empty(1), jnp.zeros((65, 1)), jnp.zeros(65), jnp.ones(65, bool))


@pytest.mark.parametrize("count, size", [(0, 64), (1, 64), (64, 64), (65, 256), (256, 256), (257, 1024), (5000, 1024)])
def test_on_bucket_takes_the_smallest_that_holds_the_count(count, size):
    record = empty(1, 1024)._replace(count=history.count(count))
    assert int(on_bucket(lambda h, x: h.losses.shape[0] + x, record, 7)) == size + 7


def test_the_bucket_does_not_depend_on_the_capacity():
    small, large = (filled(np.arange(60.0), batch=20, capacity=c) for c in (64, 4000))
    sizes = [int(on_bucket(lambda h: h.mask.sum() * 1000 + h.losses.shape[0], r)) for r in (small, large)]
    assert sizes == [60064, 60064]


def test_batched_studies_keep_the_branch():
    record = jax.vmap(lambda _: empty(2, 1024), out_axes=axes(empty(2, 1024)))(jnp.arange(3))
    losses = jnp.arange(96.0).reshape(3, 32)
    unit = jnp.broadcast_to(losses[..., None] / 100, (3, 32, 2))

    def step(h, u, y):
        h = append(h, u, y, y % 2 == 0)
        return h, on_bucket(lambda h: jnp.where(h.mask, h.unit[:, 0], 0).sum() + h.losses.shape[0], h)

    batched = jax.vmap(step, in_axes=(axes(record), 0, 0), out_axes=(axes(record), 0))
    for _ in range(3):
        record, sums = batched(record, unit, losses)
    assert int(record.count.value) == 96
    each = np.asarray(unit[:, ::2, 0]).sum(1)
    np.testing.assert_allclose(sums, 256 + 3 * each, rtol=1e-5)
    found = list(outside_branches(jax.make_jaxpr(batched)(record, unit, losses).jaxpr))
    assert [name for name, _ in found].count("cond") == 2  # whether it is full, and which bucket
    # A batched branch would be a select over all 3 * 1024 rows; those found act on the 3 * 32 told ones.
    assert max(size for name, size in found if name == "select_n") == unit.size


def test_only_the_bucket_in_use_runs():
    visited = []
    look = jax.jit(lambda r: on_bucket(lambda h: jax.debug.callback(visited.append, h.losses.size), r))
    for told in (60, 80, 300):
        look(empty(1, 1024)._replace(count=history.count(told)))
        jax.effects_barrier()
    assert [int(n) for n in visited] == [64, 256, 1024]


def test_float64_where_it_is_on():
    with jax.enable_x64(True):
        record = append(empty(1), jnp.array([[1 / 3]]), jnp.array([1 / 7]), jnp.array([True]))
        assert record.unit.dtype == record.losses.dtype == np.float64
        assert float(record.losses[0]) == 1 / 7 and record.count.value.dtype == np.int32
