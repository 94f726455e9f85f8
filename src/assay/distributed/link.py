"""Time that counted bits take on a network link."""

from dataclasses import dataclass

__all__ = ["LinkModel"]


@dataclass(frozen=True)
class LinkModel:
    """A network link with a bandwidth and a latency; the α-β model of communication.

    Sending b bits in m messages takes m · latency + b / bandwidth seconds.

    Args:
        bandwidth: Bits a second, each direction.
        latency: Seconds a message.

    Raises:
        ValueError: `bandwidth` is not positive or `latency` is negative.

    Example:
        >>> gigabit = LinkModel(bandwidth=1e9, latency=50e-6)
        >>> gigabit.seconds(32e6)
        0.03205
        >>> round(gigabit.all_reduce(32e6, workers=4), 6)
        0.0483
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, got {self.bandwidth}")
        if not self.latency >= 0:
            raise ValueError(f"latency must not be negative, got {self.latency}")

    def seconds(self, bits: float, messages: int = 1) -> float:
        """Time for `bits` bits in `messages` messages one after the other."""
        return messages * self.latency + bits / self.bandwidth

    def all_reduce(self, bits: float, workers: int) -> float:
        """Time for a ring all-reduce (or a reduce-scatter and an all-gather) of `bits` bits.

        Each worker sends 2 (n − 1) messages of bits / n.
        """
        messages = 2 * (workers - 1)
        return self.seconds(messages * bits / workers, messages)
