"""The harness alternates, and its ratio is the one that the clock would give."""

import itertools

import pytest

from assay.lab import at_most
from assay.lab.bench import Comparison, Samples, benchmark, find_benchmarks, measure

SOURCE = """
from assay.lab import at_most
from assay.lab.bench import Samples, benchmark

@benchmark("halves", target=at_most(0.5))
def halves():
    return Samples([1.0, 2.0, 3.0], [2.0, 4.0, 12.0], "peer", "1.2", {"bytes": 9.0})
"""


def test_benchmarks_are_found_in_a_folder_and_judged_by_the_median_ratio(tmp_path):
    (tmp_path / "some_family.py").write_text(SOURCE)
    (entry,) = find_benchmarks(tmp_path)
    row = measure(entry)
    assert (row.family, row.name) == ("some-family", "halves")
    assert row.ratio == 0.5
    assert row.verdict == "met"
    assert row.extra == {"bytes": 9.0}
    with pytest.raises(FileNotFoundError, match="checkout"):
        list(find_benchmarks(tmp_path / "none"))


def test_calls_alternate_and_the_clock_decides(monkeypatch):
    now = itertools.count()
    calls = []

    def ours():
        calls.append("ours")

    def peer():
        calls.append("peer")
        for _ in range(3):
            next(now)

    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    entry = benchmark("b", target=at_most(0.1))(lambda: Comparison(ours, peer, "p", "0"))
    row = measure(entry, repeats=4)
    assert calls[-8:] == ["ours", "peer"] * 4
    assert row.ratio == 1 / 4  # the clock ticks once for ours, four times for the peer
    assert row.verdict == "missed"


def test_samples_come_in_pairs():
    with pytest.raises(ValueError, match="pairs"):
        Samples([1.0], [], "p", "0")
