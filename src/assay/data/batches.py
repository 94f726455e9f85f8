"""Mini-batches of tensors that are already in memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Transform = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Iterate over `(x, y)` in mini-batches, again and again, reshuffling every time.

    A whole batch is gathered by one `index_select`; no Python runs per example, so it is many
    times faster than a `DataLoader` over a `TensorDataset`. All randomness (the order, and what
    `transform` draws) comes from `generator`: saving `generator.get_state()` between two epochs
    and restoring it later continues with the very same batches.

    Every batch is a copy: changing it in place does not change `x` or `y`.

    Args:
        x: Inputs, `(N, ...)`.
        y: Targets, `(N, ...)`.
        batch_size: Examples a batch.
        shuffle: Draw a new order at the start of every pass.
        generator: Source of randomness; `None` makes one, seeded from torch's global generator.
        drop_last: Leave out a last batch that is smaller than `batch_size`.
        transform: Called as `transform(x_batch, generator)` on each batch, e.g. the result of
            `assay.data.random_crop_flip()`.
        device: Where to send each batch; `None` leaves it on the device of `x`.

    Raises:
        ValueError: If `x` and `y` differ in length, `batch_size` is not a positive integer, or
            `drop_last` would leave no batch at all.

    Example:
        >>> import torch
        >>> from assay.data import Batches
        >>> x, y = torch.arange(10.0).view(10, 1), torch.arange(10)
        >>> batches = Batches(x, y, 4, generator=torch.Generator().manual_seed(0))
        >>> len(batches), [len(target) for _, target in batches]
        (3, [4, 4, 2])
        >>> sorted(torch.cat([target for _, target in batches]).tolist()) == list(range(10))
        True
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        *,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        transform: Transform | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise ValueError(
                "x and y must hold the same number of examples along their first dimension, "
                f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size}")
        if drop_last and 0 < len(x) < batch_size:
            raise ValueError(
                f"drop_last=True leaves no batch: batch_size is {batch_size} "
                f"and there are only {len(x)} examples"
            )
        if generator is None:
            # As a DataLoader does: reproducible under torch.manual_seed, independent afterwards.
            seed = int(torch.randint(2**62, ()).item())
            generator = torch.Generator().manual_seed(seed)
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.drop_last = drop_last
        self.transform = transform
        self.device = None if device is None else torch.device(device)

    @property
    def num_samples(self) -> int:
        """How many examples one pass yields."""
        total = len(self.x)
        return total - total % self.batch_size if self.drop_last else total

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order() if self.shuffle else None
        for start in range(0, self.num_samples, self.batch_size):
            stop = min(start + self.batch_size, self.num_samples)
            if order is None:
                x, y = self.x[start:stop].clone(), self.y[start:stop].clone()
            else:
                index = order[start:stop]
                x = self.x.index_select(0, index)
                y = self.y.index_select(0, index.to(self.y.device))
            if self.device is not None:
                x, y = x.to(self.device), y.to(self.device)
            if self.transform is not None:
                x = self.transform(x, self.generator)
            yield x, y

    def _order(self) -> Tensor:
        device = self.generator.device
        order = torch.randperm(len(self.x), generator=self.generator, device=device)
        return order.to(self.x.device)

    def __repr__(self) -> str:
        return (
            f"Batches({self.num_samples:,} examples, batch_size={self.batch_size}, "
            f"shuffle={self.shuffle}, drop_last={self.drop_last})"
        )
