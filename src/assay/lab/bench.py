"""Side-by-side timings: our call and the peer's, alternating in one process."""

import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from assay.lab.paper import Expectation

MINIMUM_SECONDS = 0.02
REPEATS = 11


@dataclass(frozen=True)
class Comparison:
    """Two calls that do the same work.

    Args:
        ours: Assay's call.
        peer: the other's.
        peer_name: what it is called.
        peer_version: of the package it comes from.
        extra: further figures for the row, e.g. bytes or accuracies.

    Example:
        >>> from assay.lab.bench import Comparison
        >>> Comparison(ours=lambda: 1, peer=lambda: 1, peer_name="one", peer_version="1").peer_name
        'one'
    """

    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    peer_version: str
    extra: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """What a benchmark measured that has to alternate by itself (several processes).

    Args:
        ours: seconds of Assay's calls, or what else `unit` says.
        peer: seconds of the other's, pair by pair.
        peer_name: what it is called.
        peer_version: of the package it comes from.
        extra: further figures for the row.
        unit: of the figures.

    Raises:
        ValueError: if the two differ in length or are empty.

    Example:
        >>> from assay.lab.bench import Samples
        >>> Samples(ours=[1.0], peer=[2.0], peer_name="slow", peer_version="1").ours
        [1.0]
    """

    ours: list[float]
    peer: list[float]
    peer_name: str
    peer_version: str
    extra: Mapping[str, float | str] = field(default_factory=dict)
    unit: str = "s"

    def __post_init__(self) -> None:
        if len(self.ours) != len(self.peer) or not self.ours:
            raise ValueError(f"samples come in pairs, got {len(self.ours)} and {len(self.peer)}")


@dataclass(frozen=True)
class Benchmark:
    """A named comparison; made by `benchmark`."""

    family: str
    name: str
    target: Expectation | None
    threads: int
    make: Callable[[], Comparison | Samples]


class Row(BaseModel):
    """One row of the benchmark table; `ratio` is ours / peer, below 1 is better.

    `ours_seconds` and `peer_seconds` are in `unit` where that is something else.
    """

    model_config = ConfigDict(extra="forbid")

    family: str
    name: str
    ratio: float
    ratio_quartiles: tuple[float, float]
    ours_seconds: float
    peer_seconds: float
    peer: str
    peer_version: str
    threads: int
    repeats: int
    target: str
    verdict: Literal["met", "missed", "reported"]
    extra: dict[str, float | str]
    torch: str
    unit: str = "s"


def benchmark(
    name: str, *, target: Expectation | None = None, threads: int = 1
) -> Callable[[Callable[[], Comparison | Samples]], Benchmark]:
    """Make a benchmark of a function in a file of `benchmarks/`.

    Args:
        name: the row's name.
        target: bound on the ratio ours / peer, or None.
        threads: torch threads during the measurement.

    Example:
        >>> from assay.lab import at_most
        >>> from assay.lab.bench import Comparison, benchmark
        >>> @benchmark("nothing", target=at_most(2))
        ... def nothing() -> Comparison:
        ...     return Comparison(lambda: None, lambda: None, "nothing", "0")
        >>> nothing.name
        'nothing'
    """

    def mark(make: Callable[[], Comparison | Samples]) -> Benchmark:
        family = make.__module__.rpartition(".")[2].replace("_", "-")
        return Benchmark(family, name, target, threads, make)

    return mark


def find_benchmarks(folder: Path) -> Iterator[Benchmark]:
    """All benchmarks of a folder's modules, in order of file name and definition.

    Args:
        folder: with one Python file a family.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no benchmarks in {folder}: run from a checkout of Assay")
    for path in sorted(folder.glob("*.py")):
        name = f"assay_benchmarks.{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # process groups pickle functions by module name
        spec.loader.exec_module(module)
        for value in list(vars(module).values()):
            if isinstance(value, Benchmark):
                yield value


def measure(entry: Benchmark, repeats: int = REPEATS) -> Row:
    """Run one benchmark.

    Args:
        entry: from `find_benchmarks`.
        repeats: pairs of measurements.

    Returns:
        Its row: the median of the pairwise ratios with quartiles.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(entry.threads)
    try:
        made = entry.make()
        samples = made if isinstance(made, Samples) else _alternate(made, repeats)
    finally:
        torch.set_num_threads(threads)
    ratios = [a / b for a, b in zip(samples.ours, samples.peer, strict=True)]
    ratio = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratio,) * 3
    verdict: Any = "reported"
    if entry.target is not None:
        verdict = "met" if entry.target.contains(ratio) else "missed"
    return Row(
        family=entry.family,
        name=entry.name,
        ratio=ratio,
        ratio_quartiles=(low, high),
        ours_seconds=statistics.median(samples.ours),
        peer_seconds=statistics.median(samples.peer),
        peer=made.peer_name,
        peer_version=made.peer_version,
        threads=entry.threads,
        repeats=len(ratios),
        target=str(entry.target or ""),
        verdict=verdict,
        extra=dict(made.extra),
        torch=torch.__version__,
        unit=made.unit if isinstance(made, Samples) else "s",
    )


def _alternate(comparison: Comparison, repeats: int) -> Samples:
    ours_calls = _calls_for(comparison.ours)
    peer_calls = _calls_for(comparison.peer)
    ours, peer = [], []
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            ours.append(_seconds(comparison.ours, ours_calls))
            peer.append(_seconds(comparison.peer, peer_calls))
    finally:
        gc.enable()
    return Samples(ours, peer, comparison.peer_name, comparison.peer_version, comparison.extra)


def _calls_for(call: Callable[[], object]) -> int:
    """How many calls make one measurement long enough for the clock; warms up on the way."""
    call()
    call()
    return max(1, round(MINIMUM_SECONDS / max(_seconds(call, 1), 1e-7)))


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls
