import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxhpo.bandit import curves as learning

STRETCHES = 27
T = np.arange(1, STRETCHES + 1)
forecast = jax.jit(learning.forecast)


def known(curve, points):
    return jnp.asarray(np.atleast_2d(curve), jnp.float32), jnp.full(len(np.atleast_2d(curve)), points, jnp.int32)


def quantile_of_last(curve, points, loss):
    return np.asarray(learning.chance_below(forecast(*known(curve, points)), loss))


@pytest.mark.parametrize(
    "name, curve",
    [
        ("power", 0.2 + 1.5 * T**-0.7),
        ("exponential", 0.4 + 0.9 * np.exp(-T / 6)),
        ("stretched", 0.1 + 2.0 * np.exp(-np.sqrt(T / 3))),
        ("Hill", 0.3 + 1.0 / (1 + (T / 5) ** 1.8)),
        ("logarithm", 0.1 + 0.5 / np.log(1 + T)),
        ("rising", 1.0 - 0.8 * np.exp(-T / 5)),
    ],
)
def test_predicts_the_end_of_closed_form_curves(name, curve):
    at_half = forecast(*known(curve, 13))
    error = float(learning.expected(at_half)[0]) - curve[-1]
    assert abs(error) < 0.5 * abs(curve[12] - curve[-1]) and abs(error) < 0.03, name
    later = float(learning.expected(forecast(*known(curve, 20)))[0]) - curve[-1]
    assert abs(later) < 0.024, name
    # The rising one is the least sure: its end is at the 3 % quantile of what is predicted.
    assert 0.03 < float(learning.chance_below(at_half, curve[-1])[0]) < 0.95, name


def test_is_a_regression_with_student_errors_where_there_is_one_shape(monkeypatch):
    noise = np.array([0.11, -0.07, 0.05, 0.02, -0.09, 0.04])
    shape = np.exp(-T / 4)
    curve = 0.3 + 1.2 * shape + np.pad(noise, (0, STRETCHES - 6))
    monkeypatch.setattr(learning, "shapes", lambda stretches: (shape / shape[0])[None])
    monkeypatch.setattr(learning, "NOISE", 0.0)
    learning._fits.cache_clear()
    found = learning.forecast(*known(curve, 6))
    learning._fits.cache_clear()

    design = np.stack([np.ones(6), shape[:6]], 1)
    beta, rss, *_ = np.linalg.lstsq(design, curve[:6], rcond=None)
    ahead = np.array([1, shape[-1]])
    scale = np.sqrt(rss[0] / 4 * (1 + ahead @ np.linalg.inv(design.T @ design) @ ahead))
    np.testing.assert_allclose(found.center[0, 0], ahead @ beta, rtol=1e-4)
    np.testing.assert_allclose(found.scale[0, 0], scale, rtol=1e-4)
    assert float(found.freedom[0]) == 4
    chance = stats.t.cdf((0.2 - ahead @ beta) / scale, 4)
    assert abs(float(learning.chance_below(found, 0.2)[0]) - chance) < 0.005


def test_student_is_that_of_scipy():
    t = np.linspace(-30, 30, 601)
    for freedom in (1, 2, 4, 10):
        found = learning.student(jnp.asarray(t, jnp.float32), jnp.float32(freedom))
        assert np.abs(found - stats.t.cdf(t, freedom)).max() < (0.02 if freedom == 1 else 0.008)


@pytest.mark.parametrize("noise", [1e-6, 0.01, 0.05])
def test_chances_are_calibrated_on_noisy_curves_of_several_families(noise):
    rng, n = np.random.default_rng(0), 2000
    floor, height, kind = rng.uniform(0, 1, (n, 1)), rng.uniform(0.2, 2, (n, 1)), rng.integers(3, size=(n, 1))
    power = T ** -rng.uniform(0.3, 1.5, (n, 1))
    exponential = np.exp(-T / (STRETCHES * rng.uniform(0.05, 0.6, (n, 1))))
    hill = 1 / (1 + (T / (STRETCHES * rng.uniform(0.05, 0.4, (n, 1)))) ** rng.uniform(0.8, 2, (n, 1)))
    curves = floor + height * np.choose(kind, [power, exponential, hill])
    curves += noise * rng.standard_normal(curves.shape)
    for points in (6, 13, 20):
        ahead = forecast(*known(curves, points))
        t = (curves[:, -1:] - ahead.center) / ahead.scale
        place = np.asarray((ahead.weight * learning.student(t, ahead.freedom[:, None])).sum(1))
        # A trial that is given up at 5 % would have won in at most 5 % of the cases, and not in far fewer.
        assert np.mean(place < 0.05) < 0.055 and np.mean(place < 0.01) < 0.011
        assert 0.1 < np.mean(place < 0.25) < 0.28 and 0.3 < np.mean(place < 0.5) < 0.55
        # It is far closer than the last loss that was measured.
        error = np.abs(learning.expected(ahead) - curves[:, -1]).mean()
        assert error < (0.8 if noise == 0.05 else 0.55) * np.abs(curves[:, points - 1] - curves[:, -1]).mean()


def test_reads_only_the_known_points_and_no_scale():
    curve = 0.4 + 0.9 * np.exp(-T / 6) + 0.01 * np.cos(7 * T)
    junk = np.where(T <= 13, curve, 1e9)
    clean, dirty = (learning.forecast(*known(c, 13)) for c in (curve, junk))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    for factor in (1e-20, 1e20):
        scaled = float(learning.chance_below(forecast(*known(factor * curve, 13)), factor * 0.42)[0])
        np.testing.assert_allclose(scaled, learning.chance_below(clean, 0.42)[0], atol=2e-3)


def test_level_curves_and_single_points_give_numbers():
    for points in (0, 1, 2, 27):
        ahead = forecast(*known(np.full(STRETCHES, 0.5), points))
        assert all(np.isfinite(x).all() for x in ahead)
    assert float(learning.expected(ahead)[0]) == pytest.approx(0.5, abs=1e-6)
    assert quantile_of_last(np.full(STRETCHES, 0.5), 9, 0.4)[0] == 0
    assert quantile_of_last(np.full(STRETCHES, 0.5), 9, np.inf)[0] == pytest.approx(1)
