"""SGD for gradients that carry their momentum already; only weight decay has its own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class DGCSGD(Optimizer):
    """The optimiser beside deep gradient compression: momentum for the weight decay alone.

    The averaged gradient G comes with momentum (`assay.distributed.DGCState` has it), while the
    weight decay λw is known to all workers and never sent, so its momentum is kept here:

        b ← m b + λ w
        w ← w − lr (G + b)            (Nesterov: w ← w − lr (G + λ w + m b))

    With nothing left out of G this is `torch.optim.SGD` with momentum m and weight decay λ. Without
    weight decay it is plain SGD and keeps nothing.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, at least 0.
        momentum: m in [0, 1), the same as in `DGCState`.
        weight_decay: λ, at least 0.
        nesterov: As in `DGCState`.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> import torch
        >>> from assay.optim import DGCSGD
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DGCSGD([w], lr=0.1, momentum=0.5, weight_decay=1.0)
        >>> for _ in range(2):
        ...     w.grad = torch.zeros(1)
        ...     optimizer.step()
        >>> w  # 1 − 0.1 · 1, then 0.9 − 0.1 · (0.5 · 1 + 0.9)
        Parameter containing:
        tensor([0.7600], requires_grad=True)

    Reference:
        Lin, Han, Mao, Wang, Dally, Deep Gradient Compression, ICLR 2018,
        https://arxiv.org/abs/1712.01887.
    """

    momentum_of_decay_only = True  # what `DGCState` asks before it warns of momentum

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; `closure`, if there is one, evaluates the loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        if weight_decay:
            decay, state = weight_decay * parameter, self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].mul_(momentum).add_(decay)
            parameter.sub_(
                decay.add_(buffer, alpha=momentum) if group["nesterov"] else buffer, alpha=lr
            )
        parameter.sub_(gradient, alpha=lr)
