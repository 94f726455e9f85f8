"""Stochastic gradients without the noise of sampling: SVRG."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SVRG(Optimizer):
    r"""Stochastic variance-reduced gradient descent.

    Every m steps a snapshot w̃ of the parameters is taken with the gradient μ = ∇F(w̃) over all
    data. In between, with f_i the loss of the step's batch,

        g = ∇f_i(w) − ∇f_i(w̃) + μ,    w ← w − lr g.

    g has the mean ∇F(w) like ∇f_i(w), but its variance vanishes as w and w̃ come near the
    minimiser: a constant rate converges to it, linearly for a strongly convex F, where SGD stalls
    at a distance that the rate sets. A step costs two gradients of a batch, a snapshot one of all
    data.

    The closure of `step` is called twice a step, at w and at w̃, and must compute the same loss both
    times: draw the batch before, and no dropout and no BatchNorm in training mode.

    Args:
        params: parameters or parameter groups; a group may have its own `lr`.
        lr: learning rate; constant.
        full_closure: clears the gradients, computes the mean loss over all data at the present
            parameters and calls `backward`. Not part of copies and pickles, whose parameters are
            others: set the attribute of a copy before its next step.
        epoch_length: m, steps from one snapshot to the next; the papers use one or two passes over
            the data (n or 2n steps of one sample).

    Raises:
        ValueError: if `lr` is negative or `epoch_length` less than 1.

    Example:
        >>> import torch
        >>> from assay.optim import SVRG
        >>> targets = torch.tensor([1.0, 2.0, 6.0])
        >>> w = torch.nn.Parameter(torch.tensor(0.0))
        >>> def loss_of(batch):
        ...     optimizer.zero_grad()
        ...     loss = (w - batch).square().mean() / 2
        ...     loss.backward()
        ...     return loss
        >>> optimizer = SVRG([w], lr=0.5, full_closure=lambda: loss_of(targets), epoch_length=6)
        >>> for i in range(24):
        ...     _ = optimizer.step(lambda: loss_of(targets[i % 3]))
        >>> round(w.item(), 4)  # single targets, and yet their mean
        3.0

    Reference:
        Johnson, Zhang, "Accelerating Stochastic Gradient Descent Using Predictive Variance
        Reduction", NeurIPS 2013.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        full_closure: Callable[[], Any],
        *,
        epoch_length: int,
    ) -> None:
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must not be negative, got {lr}")
        if epoch_length < 1:
            raise ValueError(f"epoch_length must be at least 1, got {epoch_length}")
        super().__init__(params, {"lr": lr, "epoch_length": epoch_length, "steps": 0})
        self.full_closure: Callable[[], Any] | None = full_closure

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("full_closure", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: clears the gradients, computes the loss of one batch, calls `backward` and
                returns the loss. Afterwards the gradients are the variance-reduced ones.

        Returns:
            The loss of the batch at the parameters before the step.

        Raises:
            ValueError: without a closure, or if a gradient is sparse.
            RuntimeError: if a snapshot is due and this is a copy without a `full_closure`.
        """
        if closure is None:
            raise ValueError("SVRG needs the gradient at two places: call step(closure)")
        groups = self.param_groups
        if groups[0]["steps"] % groups[0]["epoch_length"] == 0:
            self._take_snapshot()
        params = [p for group in groups for p in group["params"] if "snapshot" in self.state[p]]
        with torch.enable_grad():
            loss = closure()
        here = [_gradient_of(p) for p in params]
        present = [p.clone() for p in params]
        for p in params:
            p.copy_(self.state[p]["snapshot"])
        with torch.enable_grad():
            closure()
        for p, value, gradient in zip(params, present, here, strict=True):
            p.copy_(value)
            # In this order: where both gradients are equal, what is left is μ to the last bit.
            p.grad = (gradient - _gradient_of(p)).add_(self.state[p]["full_grad"])
        for group in groups:
            for p in group["params"]:
                if p.grad is not None and "snapshot" in self.state[p]:
                    p.sub_(p.grad, alpha=group["lr"])
            group["steps"] += 1
        return loss

    def _take_snapshot(self) -> None:
        if self.full_closure is None:
            raise RuntimeError(
                "this copy of an SVRG has no full_closure: set optimizer.full_closure to one that "
                "computes the gradient of all data for the copy's own parameters"
            )
        with torch.enable_grad():
            self.full_closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self.state[p]["snapshot"] = p.detach().clone()
                    self.state[p]["full_grad"] = _gradient_of(p).clone()


def _gradient_of(p: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    if p.grad.layout != torch.strided:
        raise ValueError(f"sparse gradients are not supported (parameter of {tuple(p.shape)})")
    # A closure may clear gradients in place, by zero_grad(set_to_none=False).
    return p.grad.clone()
