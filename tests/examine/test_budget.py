"""How much a panel may do: what fits into its time, between its own bounds."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.examine import Budget


@given(
    cost=st.floats(0, 1e6),
    low=st.integers(0, 100),
    extra=st.integers(0, 1000),
    share=st.floats(0, 1),
    seconds=st.floats(0, 1e9) | st.just(math.inf),
)
def test_count_lies_between_its_bounds_and_fits_above_the_lower(cost, low, extra, share, seconds):
    count = Budget(seconds).count(cost, low, low + extra, share)
    assert isinstance(count, int)
    assert low <= count <= low + extra
    if count > low and seconds < math.inf:
        assert count * cost <= share * seconds * (1 + 1e-12)


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_refuses_time_that_is_none(seconds):
    with pytest.raises(ValueError, match="seconds must be at least 0"):
        Budget(seconds)


def test_refuses_bounds_upside_down():
    with pytest.raises(ValueError, match="low must not exceed high, got 3 and 2"):
        Budget(1.0).count(1.0, 3, 2)


def test_time_passes_and_is_never_negative(monkeypatch):
    now = 100.0
    monkeypatch.setattr("assay.examine.budget.time", SimpleNamespace(perf_counter=lambda: now))
    budget = Budget(10.0)
    now = 104.0
    assert (budget.spent, budget.left) == (4.0, 6.0)
    assert budget.count(cost=0.5, low=0, high=100) == 12
    assert budget.count(cost=0.5, low=0, high=100, share=0.5) == 6
    now = 200.0
    assert (budget.spent, budget.left) == (100.0, 0.0)
    assert budget.count(cost=0.5, low=2, high=100) == 2


def test_timed_gives_the_seconds_of_the_call(monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([1.0, 5.0, 7.5]).__next__)
    monkeypatch.setattr("assay.examine.budget.time", clock)
    assert Budget(1.0).timed(lambda: "done") == ("done", 2.5)


def test_a_note_is_kept_once():
    budget = Budget(1.0)
    for text in ("half of it", "little", "half of it"):
        budget.note(text)
    assert budget.notes == ["half of it", "little"]
