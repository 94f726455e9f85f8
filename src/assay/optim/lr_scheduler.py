"""Learning-rate schedules for curves between networks and for fast geometric ensembling."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class FGECyclicLR(LRScheduler):
    r"""The triangular cycle of fast geometric ensembling.

    Iteration i = 1, 2, ... of a cycle of c iterations runs at

        α(i) = (1 − 2t) α₁ + 2t α₂        for 0 < t ≤ ½,
        α(i) = (2 − 2t) α₂ + (2t − 1) α₁  for ½ < t ≤ 1,    t = ((i − 1) mod c + 1) / c,

    which is lowest, α₂, in the middle of the cycle. The weights after that iteration are a member
    of the ensemble: `is_snapshot_step` says so once `step()` has been called behind it.

    Args:
        optimizer: all its parameter groups get the same learning rate.
        max_lr: α₁, at the ends of a cycle.
        min_lr: α₂, in its middle.
        cycle_steps: c, even; the paper's cycles are of 2 or 4 epochs.

    Raises:
        ValueError: if `cycle_steps` is odd or below 2, or not `0 <= min_lr < max_lr`.

    Example:
        >>> import torch
        >>> from assay.optim import FGECyclicLR
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = FGECyclicLR(sgd, max_lr=0.05, min_lr=0.01, cycle_steps=4)
        >>> for iteration in range(1, 5):
        ...     lr = sgd.param_groups[0]["lr"]
        ...     sgd.step()
        ...     schedule.step()
        ...     print(iteration, round(lr, 3), schedule.is_snapshot_step)
        1 0.03 False
        2 0.01 True
        3 0.03 False
        4 0.05 False

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
        Ensembling of DNNs", NeurIPS 2018.
    """

    def __init__(
        self, optimizer: Optimizer, max_lr: float, min_lr: float, cycle_steps: int
    ) -> None:
        if cycle_steps < 2 or cycle_steps % 2:
            raise ValueError(f"cycle_steps must be even and at least 2, got {cycle_steps}")
        if not 0 <= min_lr < max_lr:
            raise ValueError(
                f"expected 0 <= min_lr < max_lr, got min_lr={min_lr} and max_lr={max_lr}"
            )
        self.max_lr = max_lr
        self.min_lr = min_lr
        self.cycle_steps = cycle_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The learning rate of the next iteration, for each parameter group."""
        # last_epoch iterations are done: the next one is number i = last_epoch + 1.
        t = (self.last_epoch % self.cycle_steps + 1) / self.cycle_steps
        if t <= 0.5:
            lr = (1 - 2 * t) * self.max_lr + 2 * t * self.min_lr
        else:
            lr = (2 - 2 * t) * self.min_lr + (2 * t - 1) * self.max_lr
        return [lr for _ in self.optimizer.param_groups]

    @property
    def is_snapshot_step(self) -> bool:
        """Whether the iteration before the last `step()` ran at the lowest learning rate."""
        return self.last_epoch % self.cycle_steps == self.cycle_steps // 2


class HoldDecayLR(LRScheduler):
    """Constant for the first half, linear to 1 % at 90 %, then 1 %.

    The schedule by which networks and the curves between them are trained.

    Args:
        optimizer: its learning rates are those of the first half.
        total_steps: number of calls of `step()` in the whole training, epochs or iterations.

    Raises:
        ValueError: if `total_steps` is below 1.

    Example:
        >>> import torch
        >>> from assay.optim import HoldDecayLR
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = HoldDecayLR(sgd, total_steps=10)
        >>> lrs = []
        >>> for _ in range(10):
        ...     lrs.append(round(sgd.param_groups[0]["lr"], 4))
        ...     sgd.step()
        ...     schedule.step()
        >>> lrs
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7525, 0.505, 0.2575, 0.01]

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, "Loss Surfaces, Mode Connectivity, and Fast
        Ensembling of DNNs", NeurIPS 2018.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self.total_steps = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The learning rate of the next step, for each parameter group."""
        progress = self.last_epoch / self.total_steps
        decayed = min(max((progress - 0.5) / 0.4, 0.0), 1.0)
        return [float(lr) * (1 - 0.99 * decayed) for lr in self.base_lrs]
