"""How long a panel may take, and what it left out to keep to that."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Budget:
    """The time of one panel.

    A panel asks how much it can afford and says what it left out; nothing stops it before its
    time is up, so it measures what a unit of its work costs first.

    Args:
        seconds: that the panel may take; not negative.
        training: whether copies of the model may be trained.
        seed: from which everything random derives.

    Raises:
        ValueError: if seconds is negative or not a number.

    Example:
        >>> from assay.examine import Budget
        >>> budget = Budget(10.0)
        >>> budget.count(cost=0.5, low=4, high=12)
        12
        >>> budget.count(cost=100.0, low=4, high=12)
        4
        >>> result, cost = budget.timed(lambda: 1 + 1)
        >>> result
        2
    """

    def __init__(self, seconds: float, *, training: bool = True, seed: int = 0) -> None:
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds}")
        self.seconds = float(seconds)
        self.training = training
        self.seed = seed
        self.notes: list[str] = []
        self._started = time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the panel began."""
        return time.perf_counter() - self._started

    @property
    def left(self) -> float:
        """Seconds that remain; never negative."""
        return max(0.0, self.seconds - self.spent)

    def count(self, cost: float, low: int, high: int, share: float = 1.0) -> int:
        """How many units of work fit into a share of what is left.

        Args:
            cost: seconds a unit.
            low: at least so many, even where they do not fit.
            high: at most so many.
            share: of the time left.

        Raises:
            ValueError: if low exceeds high.
        """
        if low > high:
            raise ValueError(f"low must not exceed high, got {low} and {high}")
        affordable = share * self.left / max(cost, 1e-9)
        return int(min(high, max(low, affordable)))  # seconds may be infinite

    def timed(self, function: Callable[[], T]) -> tuple[T, float]:
        """Call a function; its result and the seconds it took.

        Args:
            function: without arguments.
        """
        start = time.perf_counter()
        result = function()
        return result, time.perf_counter() - start

    def note(self, text: str) -> None:
        """Tell the reader what was subsampled or left out; one sentence.

        Args:
            text: shown under the panel.
        """
        if text not in self.notes:
            self.notes.append(text)
