"""Drawings for a report, computed as coordinates: learning curves, and intervals beside bounds."""

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from assay.lab.numerals import number
from assay.lab.result import ClaimResult

Series = tuple[np.ndarray, np.ndarray]

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 38
STRIP_WIDTH, STRIP_HEIGHT = 150, 18
MAX_POINTS = 400
MAX_MARKS = 50
LARGEST = 1e300  # differences of larger numbers overflow
SMALLEST = 1e-290  # a smaller difference cannot be divided into ticks


# -- learning curves ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Lines that share their axes; a line has one series a seed.

    Args:
        title: the quantity, or the curve's name.
        abscissa: what the steps count.
        lines: by label.

    Example:
        >>> import numpy as np
        >>> panel = Panel("loss", "epoch", {"adam": [(np.arange(3), np.array([4.0, 2.0, 1.0]))]})
        >>> panel.final("adam"), panel.suits_log_scale
        ('1', True)
    """

    title: str
    abscissa: str
    lines: dict[str, list[Series]]

    def final(self, label: str) -> str:
        """The last value of a line, its mean over seeds."""
        return number(float(np.mean([y[-1] for _, y in self.lines[label]])), 3)

    @property
    def values(self) -> np.ndarray:
        """Every value that can be drawn."""
        found = np.concatenate([y for line in self.lines.values() for _, y in line])
        return found[_drawable(found)]

    @property
    def left_out(self) -> int:
        """How many values cannot be drawn."""
        return sum(len(y) for line in self.lines.values() for _, y in line) - len(self.values)

    @property
    def suits_log_scale(self) -> bool:
        """Whether all values are positive and span enough for a logarithmic axis to show more."""
        values = self.values
        return bool(len(values) and values.min() > 0 and values.max() > 3 * values.min())


@dataclass(frozen=True)
class Drawing:
    """A panel on one pair of axes, in the units of its viewBox.

    Args:
        x_ticks: position and text.
        y_ticks: position and text.
        paths: index of the line's label and the `d` of an SVG path.
    """

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[int, str]]


def read_curve(path: Path) -> dict[str, Series]:
    """Read a learning curve: series by name, each with its steps and values.

    Args:
        path: CSV with the columns step, series and value.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is something else.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        if next(rows, None) != ["step", "series", "value"]:
            raise ValueError(f"{path.name} does not begin with step,series,value")
        for row in rows:
            if len(row) != 3:
                raise ValueError(f"{path.name} line {rows.line_num} has not three fields")
            points.setdefault(row[1], []).append((float(row[0]), float(row[2])))
    arrays = {name: np.array(sorted(pairs)) for name, pairs in points.items()}
    return {name: (array[:, 0], array[:, 1]) for name, array in arrays.items()}


def arrange(curves: Mapping[str, Mapping[str, Series]], seeds: Sequence[int]) -> list[Panel]:
    """Put curves that a reader wants to compare on one pair of axes.

    The series of a training history (`Lab.fit`; it has a series `loss`) are different quantities:
    each becomes a panel, with the histories as its lines. The series of any other curve
    (`Lab.log`) are one quantity: the curve is a panel. What differs in its seed alone is one line.

    Args:
        curves: series by curve and name.
        seeds: the run's seeds.

    Example:
        >>> import numpy as np
        >>> history = {"loss": (np.arange(2), np.ones(2)), "accuracy": (np.arange(2), np.ones(2))}
        >>> panels = arrange({"adam-0": history, "adam-1": history, "sgd-0": history}, [0, 1])
        >>> [(panel.title, {k: len(v) for k, v in panel.lines.items()}) for panel in panels]
        [('loss', {'adam': 2, 'sgd-0': 1}), ('accuracy', {'adam': 2, 'sgd-0': 1})]
    """
    curves = {name: series for name, series in curves.items() if series}
    stems = _without_seed(curves, seeds)
    panels: dict[tuple[str, str], Panel] = {}
    for name, series in curves.items():
        is_history = "loss" in series
        labels = dict.fromkeys(series, stems[name]) if is_history else _without_seed(series, seeds)
        for key, points in series.items():
            title = key if is_history else stems[name]
            abscissa = "epoch" if is_history else "step"
            panel = panels.setdefault((title, abscissa), Panel(title, abscissa, {}))
            panel.lines.setdefault(labels[key], []).append(points)
    return list(panels.values())


def draw(panel: Panel, *, log: bool = False) -> Drawing:
    """Compute axes and paths; what is not finite leaves a gap.

    Args:
        panel: what to draw.
        log: a logarithmic ordinate; all values have to be positive.
    """
    steps = np.concatenate([x for line in panel.lines.values() for x, _ in line])
    x_low, x_high = _span(steps, margin=0)
    values = np.log10(panel.values) if log else panel.values
    y_low, y_high = _span(values, margin=0.04)
    across = (WIDTH - LEFT - RIGHT) / (x_high - x_low)
    down = (HEIGHT - TOP - BOTTOM) / (y_high - y_low)

    def x_at(x: np.ndarray) -> np.ndarray:
        return LEFT + (x - x_low) * across

    def y_at(y: np.ndarray) -> np.ndarray:
        return TOP + (y_high - (np.log10(y) if log else y)) * down

    x_ticks = [(t, text) for t, text in _ticks(x_low, x_high) if float(t).is_integer()]
    y_ticks = _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high)
    return Drawing(
        _placed(x_ticks, x_at),
        _placed(y_ticks, y_at),
        [
            (index, " ".join(_path(x_at(x[run]), y_at(y[run])) for run in _finite_runs(y)))
            for index, line in enumerate(panel.lines.values())
            for x, y in line
        ],
    )


def _placed(
    ticks: list[tuple[float, str]], at: Callable[[np.ndarray], np.ndarray]
) -> list[tuple[float, str]]:
    positions = at(np.array([tick for tick, _ in ticks])).round(1).tolist()
    return [(place, text) for place, (_, text) in zip(positions, ticks, strict=True)]


def _without_seed(names: Iterable[str], seeds: Sequence[int]) -> dict[str, str]:
    """Each name without its trailing seed, if the name occurs with every seed of the run."""
    names = list(names)
    matches = {name: re.fullmatch(r"(.+?)[-_ /](?:seed[-_ ]?)?(\d+)", name) for name in names}
    found: dict[str, set[int]] = {}
    for match in matches.values():
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    complete = {stem for stem, numbers in found.items() if numbers == set(seeds)}
    return {n: m[1] if (m := matches[n]) and m[1] in complete else n for n in names}


def _drawable(y: np.ndarray) -> np.ndarray:
    return np.isfinite(y) & (np.abs(y) < LARGEST)


def _finite_runs(y: np.ndarray) -> list[np.ndarray]:
    """Indices of the unbroken stretches of drawable values, thinned to what can be seen."""
    finite = np.flatnonzero(_drawable(y))
    if len(finite) == 0:
        return []
    runs = np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1)
    return [_thin(run, y) for run in runs]


def _thin(run: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of a long run the lowest and the highest value of each of many short stretches."""
    if len(run) <= MAX_POINTS:
        return run
    stretches = np.array_split(run[1:-1], MAX_POINTS // 2)
    kept = {run[0], run[-1]}
    for stretch in stretches:
        kept |= {stretch[y[stretch].argmin()], stretch[y[stretch].argmax()]}
    return np.array(sorted(kept))


def _path(x: np.ndarray, y: np.ndarray) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f"M{points}" + ("h0" if len(x) == 1 else "")


def _span(values: np.ndarray, margin: float) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if high - low < SMALLEST:
        half = abs(low) / 2 if abs(low) > SMALLEST else 1.0
        low, high = low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five multiples of 1, 2 or 5 times a power of ten, with their texts."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = math.ceil(math.log10(max(abs(first), abs(last), 1))) + 2
    return [(k * step, number(k * step, min(digits, 17))) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten, or 1, 2 and 5 times these where they are too few; the ends are logarithms."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = math.ceil(len(decades) / 6)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    candidates = [m * 10.0**k for k in decades if k % every == 0 for m in factors]
    return [(t, number(t, 1)) for t in candidates if low <= math.log10(t) <= high]


# -- an interval beside its bound --------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """A claim's estimate, interval and values beside its bound, as positions on a line.

    Args:
        expected: where the claim holds, or None.
        interval: ends of the interval, or None.
        estimate: the estimate.
        values: the measured values.
    """

    expected: tuple[float, float] | None
    interval: tuple[float, float] | None
    estimate: float
    values: list[float]


def strip(claim: ClaimResult) -> Strip | None:
    """Compute the positions; None where there is no finite estimate to draw.

    Args:
        claim: with its measurements.
    """
    interval = claim.interval
    shown = np.array([claim.estimate, *(interval or ())], dtype=np.float64)  # None becomes NaN
    if not _drawable(shown).all():
        return None
    measured = np.array([m.value for m in claim.measurements])
    measured = measured[_drawable(measured)]
    values = measured[:: math.ceil(len(measured) / MAX_MARKS) or 1]
    ends = [end for end in claim.bound or () if end is not None]
    low, high = _span(np.concatenate([shown, values, ends]), margin=0.12)

    def at(value: float) -> float:
        return round((value - low) / (high - low) * STRIP_WIDTH, 1)

    expected = None
    if claim.bound is not None:
        start, stop = claim.bound
        expected = (
            0.0 if start is None else at(start),
            float(STRIP_WIDTH) if stop is None else at(stop),
        )
    return Strip(
        expected,
        None if interval is None else (at(interval[0]), at(interval[1])),
        at(float(shown[0])),
        [at(float(value)) for value in values],
    )
