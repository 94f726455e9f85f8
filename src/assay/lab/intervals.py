"""Intervals of what was measured on random draws: parts of the data, probes, minibatches."""

import math
from collections.abc import Callable

import numpy as np
import scipy

CONFIDENCE = 0.95


def mean_interval(draws: np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """The mean of independent draws and its t interval, 95 %; None for a single draw.

    Args:
        draws: at least one, `(n,)`.

    Raises:
        ValueError: if there is none.

    Example:
        >>> import numpy as np
        >>> from assay.lab.intervals import mean_interval
        >>> mean, (low, high) = mean_interval(np.array([1.0, 2.0, 3.0]))
        >>> mean, round(high - mean, 3)  # t(0.975; 2) / √3
        (2.0, 2.484)
    """
    draws = np.asarray(draws, dtype=float)
    n = len(draws)
    if n == 0:
        raise ValueError("draws must not be empty")
    mean = float(draws.mean())
    if n == 1:
        return mean, None
    half = _quantile(n) * float(draws.std(ddof=1)) / math.sqrt(n)
    return mean, (mean - half, mean + half)


def jackknife_interval(
    statistic: Callable[[np.ndarray], float], draws: np.ndarray
) -> tuple[float, tuple[float, float] | None]:
    """A smooth function of means over draws, and its jackknife t interval, 95 %.

    Args:
        statistic: of draws `(n, ...)`, e.g. a ratio of two of their means.
        draws: independent along the first dimension.

    Raises:
        ValueError: if there is none.

    Example:
        >>> import numpy as np
        >>> from assay.lab.intervals import jackknife_interval, mean_interval
        >>> draws = np.array([1.0, 2.0, 6.0])
        >>> same = zip(jackknife_interval(np.mean, draws)[1], mean_interval(draws)[1])
        >>> all(abs(a - b) < 1e-12 for a, b in same)  # of a mean it is the t interval
        True
    """
    n = len(draws)
    if n == 0:
        raise ValueError("draws must not be empty")
    value = float(statistic(draws))
    if n == 1:
        return value, None
    left_out = np.array([statistic(np.delete(draws, i, axis=0)) for i in range(n)])
    error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    half = _quantile(n) * error
    return value, (value - half, value + half)


def _quantile(n: int) -> float:
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))


def median_interval(draws: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The median of independent draws, between the order statistics that hold it in 95 % of cases.

    Free of assumptions on the distribution; of fewer than six draws it is their whole range.

    Args:
        draws: at least one, `(n,)`; infinite ones count as larger than all others.

    Raises:
        ValueError: if there is none.

    Example:
        >>> import numpy as np
        >>> from assay.lab.intervals import median_interval
        >>> median_interval(np.arange(1.0, 10.0))  # P(the second < median < the eighth) = 96 %
        (5.0, (2.0, 8.0))
    """
    draws = np.sort(np.asarray(draws, dtype=float))
    n = len(draws)
    if n == 0:
        raise ValueError("draws must not be empty")
    # The k-th smallest exceeds the median with the chance that fewer than k draws lie below it.
    k = max(1, int(scipy.stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)))
    return float(np.median(draws)), (float(draws[k - 1]), float(draws[n - k]))


def share_interval(
    count: int, n: int, confidence: float = CONFIDENCE
) -> tuple[float, tuple[float, float]]:
    """A share of independent samples and its Wilson interval.

    Args:
        count: samples that have a property.
        n: samples, at least one.
        confidence: of the interval; higher where several shares are looked at together.

    Raises:
        ValueError: if `count` is not between 0 and `n`, or `n` is 0.

    Example:
        >>> from assay.lab.intervals import share_interval
        >>> share, (low, high) = share_interval(0, 100)
        >>> share, low, round(high, 3)
        (0.0, 0.0, 0.037)
    """
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"expected 0 <= count <= n and n >= 1, got {count} of {n}")
    found = scipy.stats.binomtest(count, n).proportion_ci(confidence, method="wilson")
    return count / n, (float(found.low), float(found.high))
