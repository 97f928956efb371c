"""The statistics of a record: one-sample tests against the target, Welch's comparison, power."""
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq

TARGET = 2.92  # nats/token
ALPHA = 0.01  # one-sided
POWER = 0.9
CONFIDENCE = 0.95
# Nats/token between runs of one script. The field's value, pooled over its records of the medium track; the 26
# published runs of Smear-MTP alone give 0.00068.
POOLED_SIGMA = 0.0008
MAX_RUNS = 100_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval and two-sided p; the latter three are nan where n = 1 forbids them."""
    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class TargetTest:
    """Mean loss against the target, over all runs. `t` and `t_p` are nan for one run or equal runs."""
    n: int
    mean: float
    std: float
    t: float
    t_p: float
    z: float
    z_p: float
    low: float
    high: float
    runs_needed: int | None


def format_p(p: float) -> str:
    return "unknown" if math.isnan(p) else f"{p:.2e}" if p < 0.001 else f"{p:.4f}"


def signed(value: float, spec: str) -> str:
    """As `format` has it, but without a minus before a zero."""
    text = format(value, spec)
    return text.replace("-", "+") if float(text) == 0 else text


def plus_minus(mean: float, spread: float, spec: str) -> str:
    """A mean and its deviation; of one run, which has none, the value alone."""
    return format(mean, spec) + (f" +- {spread:{spec}}" if math.isfinite(spread) else "")


def std(values: Sequence[float]) -> float:
    """Sample standard deviation, nan for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean; nan for one value."""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, max(len(values) - 1, 1)) * std(values) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def against_target(losses: Sequence[float], target: float = TARGET, sigma: float = POOLED_SIGMA) -> TargetTest:
    """One-sided: is the mean below `target`? By the runs' own spread (t) and by the field's sigma (z).

    The z-test is there because two runs that happen to agree pass a t-test at any margin.
    """
    n, mean, spread = len(losses), float(np.mean(losses)), std(losses)
    t = (mean - target) / (spread / math.sqrt(n)) if spread > 0 else math.nan
    z = (mean - target) / (sigma / math.sqrt(n))
    return TargetTest(n, mean, spread, t, float(stats.t.cdf(t, n - 1)) if spread > 0 else math.nan,
                      z, float(stats.norm.cdf(z)), *mean_interval(losses), runs_needed(target - mean, sigma))


def welch(a: Sequence[float], b: Sequence[float]) -> Interval:
    """mean(b) - mean(a) without assuming equal spreads [Welch 1947]; degrees of freedom by Satterthwaite."""
    difference = float(np.mean(b) - np.mean(a))
    if min(len(a), len(b)) < 2:
        return Interval(difference, math.nan, math.nan, math.nan)
    variances = np.array([np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)])
    error = math.sqrt(variances.sum())
    if error == 0:
        return Interval(difference, difference, difference, 1.0 if difference == 0 else 0.0)
    freedom = variances.sum() ** 2 / (variances ** 2 / np.array([len(a) - 1, len(b) - 1])).sum()
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Interval(difference, difference - half, difference + half,
                    float(2 * stats.t.sf(abs(difference) / error, freedom)))


def paired(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The mean of b - a over two pairs or more, Student's interval, and the paired t-test's p."""
    differences = np.subtract(b, a)
    value, error = float(differences.mean()), std(differences) / math.sqrt(len(differences))
    t = abs(value) / error if error else math.inf if value else 0.0
    return Interval(value, *mean_interval(differences), float(2 * stats.t.sf(t, len(differences) - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p corrected for the number of comparisons: the chance that any of them errs stays below alpha [Holm 1979]."""
    p, order = np.asarray(p_values), np.argsort(p_values)
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def t_test_power(n: int, margin: float, sigma: float, alpha: float = ALPHA) -> float:
    """Chance that n runs, normal with mean `margin` below the target, pass the t-test: noncentral t."""
    critical = stats.t.ppf(alpha, n - 1)
    return float(stats.nct.cdf(critical, n - 1, -margin / sigma * math.sqrt(n)))


def runs_needed(margin: float, sigma: float = POOLED_SIGMA, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Smallest n at which the t-test reaches p < alpha with this power; None if 100,000 runs would not do."""
    if margin <= 0 or runs_needed_z(margin, sigma, alpha, power) > MAX_RUNS:
        return None
    numbers = range(2, 2 * runs_needed_z(margin, sigma, alpha, power) + 100)
    return numbers[bisect_left(numbers, power, key=lambda n: t_test_power(n, margin, sigma, alpha))]


def runs_needed_z(margin: float, sigma: float = POOLED_SIGMA, alpha: float = ALPHA, power: float = POWER) -> int:
    """The same for the z-test, in closed form."""
    return math.ceil(((stats.norm.isf(alpha) + stats.norm.ppf(power)) * sigma / margin) ** 2)


def margin_needed(n: int, sigma: float = POOLED_SIGMA, alpha: float = ALPHA, power: float = POWER) -> float:
    """Margin below the target at which n >= 2 runs pass the t-test with this power, in nats/token."""
    # In units of sigma the answer depends on n alone: about 150 for n = 2 at 1 %.
    return sigma * brentq(lambda effect: t_test_power(n, effect, 1.0, alpha) - power, 0.0, 1e4)
