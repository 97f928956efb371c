"""records/tools/inference.py against closed forms, scipy's own tests and simulation."""
import math

import numpy as np
import pytest
from scipy import stats

import inference

LOSSES = [2.9191, 2.9203, 2.9188, 2.9186, 2.9195]
OTHERS = [2.9199, 2.9189, 2.9201]


def test_target_test_is_scipys_t_test_and_the_textbooks_z_test():
    ours, theirs = inference.against_target(LOSSES), stats.ttest_1samp(LOSSES, 2.92, alternative="less")
    assert (ours.t, ours.t_p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-12)
    assert ours.z == pytest.approx((np.mean(LOSSES) - 2.92) / (0.0008 / math.sqrt(5)), rel=1e-12)
    assert ours.z_p == pytest.approx(0.5 * math.erfc(-ours.z / math.sqrt(2)), rel=1e-9)
    low, high = stats.ttest_1samp(LOSSES, 2.92).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("losses", [[2.919], [2.919, 2.919]])
def test_no_t_without_spread(losses):
    test = inference.against_target(losses)
    assert math.isnan(test.t) and math.isnan(test.t_p) and math.isfinite(test.z_p)


def test_welch_is_scipys():
    ours, theirs = inference.welch(LOSSES, OTHERS), stats.ttest_ind(OTHERS, LOSSES, equal_var=False)
    low, high = theirs.confidence_interval(0.95)
    assert (ours.value, ours.low, ours.high, ours.p) == pytest.approx(
        (np.mean(OTHERS) - np.mean(LOSSES), low, high, theirs.pvalue), rel=1e-10)


def test_one_run_has_no_interval():
    interval = inference.welch([2.92], [2.91])
    assert math.isnan(interval.low) and inference.signed(interval.value, "+.1f") == "+0.0"


@pytest.mark.parametrize("n, margin", [(2, 0.02), (5, 0.0018), (20, 0.0007)])
def test_power_is_that_of_simulated_records(n, margin):
    rng = np.random.default_rng(n)
    trials = 20_000
    losses = rng.normal(2.92 - margin, 0.0008, (trials, n))
    t = (losses.mean(1) - 2.92) / (losses.std(1, ddof=1) / math.sqrt(n))
    passed = (stats.t.cdf(t, n - 1) < 0.01).mean()
    power = inference.t_test_power(n, margin, 0.0008)
    assert abs(passed - power) < 5 * math.sqrt(power * (1 - power) / trials)


@pytest.mark.parametrize("margin", [0.0002, 0.0005, 0.0007, 0.002, 0.01])
def test_runs_needed_is_the_smallest_number(margin):
    n = inference.runs_needed(margin)
    assert inference.t_test_power(n, margin, 0.0008) >= 0.9
    assert n == 2 or inference.t_test_power(n - 1, margin, 0.0008) < 0.9
    z = inference.runs_needed_z(margin)
    power = [stats.norm.cdf(margin * math.sqrt(k) / 0.0008 - stats.norm.isf(0.01)) for k in (z, z - 1)]
    assert power[0] >= 0.9 > power[1]


@pytest.mark.parametrize("margin", [0.0, -0.001, 1e-9])
def test_no_number_of_runs_suffices(margin):
    assert inference.runs_needed(margin) is None


@pytest.mark.parametrize("n", [2, 3, 10, 40])
def test_margin_needed_inverts_power(n):
    margin = inference.margin_needed(n)
    assert inference.t_test_power(n, margin, 0.0008) == pytest.approx(0.9, abs=1e-6)


def test_p_values_are_printed_for_people():
    assert [inference.format_p(p) for p in (0.25, 1.134e-5, math.nan)] == ["0.2500", "1.13e-05", "unknown"]
