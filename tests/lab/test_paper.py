"""Verdicts follow from the interval and the bound, and from nothing else."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.lab import Claim, Expectation, at_least, at_most, between, close_to


def test_interval_of_the_mean_is_students():
    values = [0.81, 0.84, 0.80, 0.86, 0.83]
    judged = Claim("a", "A", expect=at_least(0.8)).judge(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert judged.interval == pytest.approx((low, high), abs=1e-12)
    assert judged.estimate == pytest.approx(np.mean(values), abs=1e-12)
    assert judged.n == 5


@pytest.mark.parametrize(
    ("values", "expect", "verdict"),
    [
        ([1.0, 1.1, 0.9], at_most(2.0), "holds"),
        ([1.0, 1.1, 0.9], at_most(0.5), "fails"),
        ([1.0, 1.1, 0.9], at_most(1.05), "inconclusive"),
        ([1.0, 1.1, 0.9], between(0.0, 2.0), "holds"),
        ([1.0, 1.1, 0.9], between(1.0, 2.0), "inconclusive"),
        ([1.0], at_most(2.0), "inconclusive"),  # one value has no interval
        ([math.nan, 1.0], at_most(2.0), "fails"),
        ([], at_most(2.0), "not run"),
        ([1.0, 2.0], None, "reported"),
    ],
)
def test_scaled_claim_is_judged_by_the_whole_interval(values, expect, verdict):
    assert Claim("a", "A", expect=expect).judge(values).verdict == verdict


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(-10, 10))
def test_exact_claim_holds_only_if_every_value_does(values, bound):
    judged = Claim("a", "A", expect=at_most(bound), kind="exact").judge(values)
    assert judged.verdict == ("holds" if max(values) <= bound else "fails")
    # The one nearest to violating the bound is shown; by distance: tiny values tie.
    assert judged.estimate - bound == max(values) - bound


def test_every_seed_has_to_satisfy_when_the_claim_says_so():
    claim = Claim("a", "A", expect=at_least(0.0), over_seeds="every")
    assert claim.judge([0.1, 0.2, 0.3]).verdict == "holds"
    assert claim.judge([0.1, -0.01, 0.3]).verdict == "fails"


def test_interval_of_the_median_ignores_an_outlier_that_spoils_the_mean():
    values = [0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, -1e6]
    assert Claim("a", "A", expect=at_least(0.5), over_seeds="median").judge(values).verdict == (
        "holds"
    )
    assert Claim("a", "A", expect=at_least(0.5)).judge(values).verdict == "inconclusive"


def test_t_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    claim = Claim("a", "A", expect=at_most(0))
    intervals = [claim.judge(rng.normal(size=5).tolist()).interval for _ in range(2000)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_expectations_read_as_a_person_writes_them():
    assert str(at_most(1.5)) == "≤ 1.5"
    assert str(at_least(-2)) == "≥ -2"
    assert str(close_to(1.0, tol=0.25)) == "in [0.75, 1.25]"
    with pytest.raises(ValueError, match="low <= high"):
        Expectation(1.0, 0.0)
    with pytest.raises(ValueError, match="needs a bound"):
        Claim("a", "A", kind="exact")
