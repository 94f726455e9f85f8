"""One-dimensional online problems on [−1, 1] on which Adam goes to the worst point.

All losses are linear, f_t(x) = s_t x, with a slope s_t that is a large positive number now and then
and a small negative one otherwise. The mean slope is positive, so −1 is the best fixed point; Adam
forgets the large slope before it has weighed it and drifts to +1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOWER, UPPER, OPTIMUM = -1.0, 1.0, -1.0


def _check_slopes(large: float, small: float) -> None:
    if not small < 0 < large:
        raise ValueError(f"slopes must satisfy small < 0 < large, got large={large}, small={small}")


@dataclass(frozen=True)
class PeriodicSlopes:
    """s_t = `large` if t mod `period` = 1, else `small`; t counts from 1.

    Args:
        large: The rare positive slope.
        small: The frequent negative slope.
        period: At least 2.

    Raises:
        ValueError: If the signs or the period are wrong, or the mean slope is not positive.

    Example:
        >>> PeriodicSlopes(large=4.0, small=-1.0, period=3).slopes(5)
        tensor([ 4., -1., -1.,  4., -1.], dtype=torch.float64)
    """

    large: float
    small: float
    period: int

    def __post_init__(self) -> None:
        _check_slopes(self.large, self.small)
        if self.period < 2:
            raise ValueError(f"period must be at least 2, got {self.period}")
        if not self.mean_slope > 0:
            raise ValueError(f"the mean slope must be positive, got {self.mean_slope} for {self}")

    @property
    def mean_slope(self) -> float:
        """Mean of s_t over a period."""
        return (self.large + (self.period - 1) * self.small) / self.period

    def slopes(self, steps: int, *, start: int = 1) -> Float[Tensor, " steps"]:
        """Return s_t for t = `start`, …, `start` + `steps` − 1, float64.

        Args:
            steps: How many.
            start: The first t.
        """
        t = torch.arange(start, start + steps)
        slopes = torch.full((steps,), float(self.small), dtype=torch.float64)
        slopes[t % self.period == 1] = float(self.large)
        return slopes


@dataclass(frozen=True)
class RandomSlopes:
    """s_t = `large` with `probability`, else `small`, independently.

    Args:
        large: The rare positive slope.
        small: The frequent negative slope.
        probability: Of the large slope, in (0, 1).

    Raises:
        ValueError: If the signs or the probability are wrong, or the mean slope is not positive.

    Example:
        >>> import torch
        >>> problem = RandomSlopes(large=1010.0, small=-10.0, probability=0.01)
        >>> problem.slopes(3, paths=2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """

    large: float
    small: float
    probability: float

    def __post_init__(self) -> None:
        _check_slopes(self.large, self.small)
        if not 0 < self.probability < 1:
            raise ValueError(f"probability must lie in (0, 1), got {self.probability}")
        if not self.mean_slope > 0:
            raise ValueError(f"the mean slope must be positive, got {self.mean_slope} for {self}")

    @property
    def mean_slope(self) -> float:
        """Expectation of s_t."""
        return self.probability * self.large + (1 - self.probability) * self.small

    def slopes(
        self, steps: int, *, paths: int, generator: torch.Generator
    ) -> Float[Tensor, "steps paths"]:
        """Draw the slopes of independent paths, float64.

        Args:
            steps: How many, consecutive calls with one generator continue a path.
            paths: How many paths.
            generator: CPU generator.
        """
        draws = torch.rand(steps, paths, generator=generator)
        slopes = torch.full((steps, paths), float(self.small), dtype=torch.float64)
        slopes[draws < self.probability] = float(self.large)
        return slopes


def theorem_1(C: float) -> PeriodicSlopes:
    """Return C x every third step, −x otherwise: defeats Adam with β1 = 0, β2 = 1/(1 + C²).

    Args:
        C: More than 2.

    Returns:
        The problem, with mean slope (C − 2)/3.

    Raises:
        ValueError: If C ≤ 2.

    Example:
        >>> theorem_1(4.0).mean_slope
        0.6666666666666666
    """
    if not C > 2:
        raise ValueError(f"C must be more than 2, got {C}")
    return PeriodicSlopes(C, -1.0, 3)


def theorem_2(C: int) -> PeriodicSlopes:
    """Return C x every C-th step, −x otherwise: defeats Adam with β1 < √β2 if C is large enough.

    Args:
        C: At least 2; how large it must be depends on β1 and β2.

    Returns:
        The problem, with mean slope 1/C.

    Raises:
        ValueError: If C < 2.

    Example:
        >>> theorem_2(10).mean_slope
        0.1
    """
    if C < 2:
        raise ValueError(f"C must be at least 2, got {C}")
    return PeriodicSlopes(float(C), -1.0, C)


def theorem_3(C: float, delta: float) -> RandomSlopes:
    """Return C x with probability (1 + δ)/(C + 1), −x otherwise: the stochastic counter-example.

    Args:
        C: Positive; the theorem needs it large, depending on δ, β1 and β2.
        delta: δ in (0, C), the mean slope.

    Returns:
        The problem.

    Raises:
        ValueError: If δ is not in (0, C).

    Example:
        >>> round(theorem_3(9.0, 0.5).mean_slope, 12)
        0.5
    """
    if not 0 < delta < C:
        raise ValueError(f"delta must lie in (0, C) = (0, {C}), got {delta}")
    return RandomSlopes(C, -1.0, (1 + delta) / (C + 1))


def online_experiment() -> PeriodicSlopes:
    """Return the paper's online experiment: 1010 x if t mod 101 = 1, −10 x otherwise.

    Returns:
        The problem, with mean slope 10/101.

    Example:
        >>> online_experiment().period
        101
    """
    return PeriodicSlopes(1010.0, -10.0, 101)


def stochastic_experiment() -> RandomSlopes:
    """Return the paper's stochastic experiment: 1010 x with probability 0.01, −10 x otherwise.

    Returns:
        The problem, with mean slope 0.2.

    Example:
        >>> round(stochastic_experiment().mean_slope, 12)
        0.2
    """
    return RandomSlopes(1010.0, -10.0, 0.01)
