"""What a paper claims, and what a measurement says about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from assay.lab.intervals import CONFIDENCE, mean_interval

Kind = Literal["exact", "scaled", "paper"]
Verdict = Literal["holds", "fails", "inconclusive", "reported", "not run"]
OverSeeds = Literal["mean", "median", "every"]

BOOTSTRAP_RESAMPLES = 10_000


@dataclass(frozen=True)
class Expectation:
    """The closed interval in which a claim says that its figure lies.

    Made by `at_most`, `at_least`, `between` and `close_to`.

    Args:
        low: lower end, may be `-inf`.
        high: upper end, may be `inf`.

    Raises:
        ValueError: if the interval is empty or an end is NaN.

    Example:
        >>> from assay.lab import at_most
        >>> str(at_most(1.125)), at_most(1.125).contains(1.2)
        ('≤ 1.125', False)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"an expectation needs low <= high, got {self.low} and {self.high}")

    def contains(self, value: float) -> bool:
        """Whether `value` satisfies the expectation; NaN never does."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.low == -math.inf:
            return f"≤ {self.high:g}"
        if self.high == math.inf:
            return f"≥ {self.low:g}"
        return f"in [{self.low:g}, {self.high:g}]"


def at_most(bound: float) -> Expectation:
    """Expect a figure of at most `bound`.

    Args:
        bound: the largest value that satisfies the claim.

    Example:
        >>> at_most(1.5).contains(1.5)
        True
    """
    return Expectation(-math.inf, float(bound))


def at_least(bound: float) -> Expectation:
    """Expect a figure of at least `bound`.

    Args:
        bound: the smallest value that satisfies the claim.

    Example:
        >>> at_least(0.9).contains(0.89)
        False
    """
    return Expectation(float(bound), math.inf)


def between(low: float, high: float) -> Expectation:
    """Expect a figure in the closed interval [`low`, `high`].

    Args:
        low: lower end.
        high: upper end.

    Example:
        >>> str(between(-0.01, 0.01))
        'in [-0.01, 0.01]'
    """
    return Expectation(float(low), float(high))


def close_to(value: float, *, tol: float) -> Expectation:
    """Expect a figure within the absolute tolerance `tol` of `value`.

    Args:
        value: the centre.
        tol: largest distance from it.

    Example:
        >>> close_to(1.0, tol=0.25).contains(0.75)
        True
    """
    return Expectation(float(value) - tol, float(value) + tol)


@dataclass(frozen=True)
class Claim:
    """One statement of a paper with the bound that was fixed before it was measured.

    Args:
        id: short name in kebab-case, unique in its paper.
        statement: what is claimed, one sentence.
        paper: the paper's own figure, as text; `""` if it gives none.
        expect: the bound, or None if the figure is only reported.
        kind: `"exact"` (mathematics: every value has to satisfy the bound), `"scaled"` (one value a
            seed, judged by an interval) or `"paper"` (needs the `paper` preset).
        unit: unit of the figure.
        how: how it is measured, one line.
        over_seeds: what the bound is about: the `"mean"` (t interval), the `"median"` (bootstrap
            interval) or `"every"` value.
        discussion: the best explanation when the claim does not hold here.

    Raises:
        ValueError: if an exact claim has no bound.

    Example:
        >>> from assay.lab import Claim, at_most
        >>> Claim("gap", "No loss", expect=at_most(0.01)).judge([0.0, 0.001, 0.002]).verdict
        'holds'
    """

    id: str
    statement: str
    paper: str = ""
    expect: Expectation | None = None
    kind: Kind = "scaled"
    unit: str = ""
    how: str = ""
    over_seeds: OverSeeds = "mean"
    discussion: str = ""

    def __post_init__(self) -> None:
        if self.kind == "exact" and self.expect is None:
            raise ValueError(f"claim {self.id!r} is exact and needs a bound in `expect`")

    def judge(self, values: Sequence[float]) -> "Judgement":
        """Compare measured values with the bound.

        Args:
            values: one figure a seed; for an exact claim any number of figures.

        Returns:
            The verdict with the estimate and the interval it rests on.
        """
        if len(values) == 0:
            return Judgement("not run", None, None, "", 0)
        sample = np.array(values, dtype=np.float64)
        if self.kind == "exact" or self.over_seeds == "every":
            return self._judge_every(sample.tolist())
        if self.over_seeds == "median":
            estimate, interval, method = _median_interval(sample)
        else:
            estimate, interval, method = _mean_interval(sample)
        return Judgement(self._verdict(interval), estimate, interval, method, len(sample))

    def _judge_every(self, sample: list[float]) -> "Judgement":
        if self.expect is None:
            verdict: Verdict = "reported"
        else:
            verdict = "holds" if all(map(self.expect.contains, sample)) else "fails"
        several = len(sample) > 1
        span = (min(sample), max(sample)) if several else None
        method = "every value" if several else "single value"
        return Judgement(verdict, max(sample, key=self._violation), span, method, len(sample))

    def _violation(self, value: float) -> float:
        """How near to (or beyond) the bound a value lies; the largest is the one to show."""
        if math.isnan(value):
            return math.inf
        if self.expect is None:
            return abs(value)
        return max(self.expect.low - value, value - self.expect.high)

    def _verdict(self, interval: tuple[float, float] | None) -> Verdict:
        if self.expect is None:
            return "reported"
        if interval is None:
            return "inconclusive"
        low, high = interval
        if math.isnan(low) or math.isnan(high):
            return "fails"
        if self.expect.contains(low) and self.expect.contains(high):
            return "holds"
        if high < self.expect.low or low > self.expect.high:
            return "fails"
        return "inconclusive"


@dataclass(frozen=True)
class Judgement:
    """A verdict and the numbers that it rests on.

    Args:
        verdict: *holds*, *fails*, *inconclusive*, *reported* or *not run*.
        estimate: mean or median; for an exact claim the value nearest to violating the bound.
        interval: 95 % confidence interval (exact claims: the range of the values), or None.
        method: how the interval was made.
        n: number of values.

    Example:
        >>> from assay.lab import Claim, at_most
        >>> Claim("gap", "No loss", expect=at_most(0.01)).judge([0.0]).verdict
        'inconclusive'
    """

    verdict: Verdict
    estimate: float | None
    interval: tuple[float, float] | None
    method: str
    n: int


def _mean_interval(sample: np.ndarray) -> tuple[float, tuple[float, float] | None, str]:
    mean, interval = mean_interval(sample)
    return mean, interval, "single value" if interval is None else "t interval of the mean, 95 %"


def _median_interval(sample: np.ndarray) -> tuple[float, tuple[float, float] | None, str]:
    median = float(np.median(sample))
    if len(sample) == 1:
        return median, None, "single value"
    rng = np.random.default_rng(0)
    draws = rng.choice(sample, size=(BOOTSTRAP_RESAMPLES, len(sample)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(draws, axis=1), [tail, 1 - tail])
    return median, (float(low), float(high)), "bootstrap interval of the median, 95 %"


@dataclass(frozen=True)
class Paper:
    """A paper's card.

    Args:
        slug: name on the command line, kebab-case.
        title: full title.
        authors: in the paper's order.
        year: of publication.
        url: where to read it.
        topic: the topic package with its method.
        summary: what it gives a user, one or two sentences.
        components: dotted names of the public components that implement it.

    Example:
        >>> from assay.lab import Paper
        >>> Paper("adam", "Adam", ("D. Kingma", "J. Ba"), 2015, "https://arxiv.org/abs/1412.6980",
        ...       "optim", "An optimizer.").reference
        'D. Kingma, J. Ba. Adam. 2015. https://arxiv.org/abs/1412.6980'
    """

    slug: str
    title: str
    authors: tuple[str, ...]
    year: int
    url: str
    topic: str
    summary: str
    components: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The paper as one line of a list of references."""
        return f"{', '.join(self.authors)}. {self.title}. {self.year}. {self.url}"
