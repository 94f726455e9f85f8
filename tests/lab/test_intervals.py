"""Intervals hold what they say, by exact count and by simulation."""

import numpy as np
import pytest
from scipy import stats

from assay.lab.intervals import median_interval, share_interval


@pytest.mark.parametrize("n", [6, 7, 20, 101])
def test_the_order_statistics_hold_the_median_in_95_percent(n):
    """P(X_(k) < median < X_(n+1−k)) = 1 − 2 P(Binomial(n, ½) < k), and one further is too few."""
    _, (low, high) = median_interval(np.arange(1, n + 1))
    k = round(low)
    assert high == n + 1 - k
    assert 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(k, n, 0.5) < 0.95


def test_few_and_infinite_draws():
    assert median_interval(np.array([3.0, 1.0])) == (2.0, (1.0, 3.0))
    assert median_interval(np.array([1.0, np.inf, 2.0])) == (2.0, (1.0, np.inf))
    with pytest.raises(ValueError, match="empty"):
        median_interval(np.array([]))


def test_shares_are_covered():
    """Wilson's interval holds a share of 0.1 in about 95 % of samples of 50."""
    weights = stats.binom.pmf(np.arange(51), 50, 0.1)
    held = [low <= 0.1 <= high for low, high in (share_interval(k, 50)[1] for k in range(51))]
    assert 0.93 < float(weights @ np.array(held)) < 0.99
    with pytest.raises(ValueError, match="count"):
        share_interval(3, 2)
