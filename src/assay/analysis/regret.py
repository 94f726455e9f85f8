"""Regret of an online optimiser, its bound for AMSGrad, and step sizes that grow."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from assay.optim.amsgrad import AdamNC, AMSGrad
from assay.optim.projected_adam import decayed_lr, decayed_momentum


def amsgrad_regret_bound(
    *,
    steps: int,
    lr: float,
    beta1: float,
    beta2: float,
    diameter: float,
    root_sum: float,
    momentum_sum: float,
    gradient_sum: float,
) -> float:
    """Evaluate the regret bound of AMSGrad with α_t = α/√t and β1_t ≤ β1.

    With γ = β1/√β2 < 1 and D∞ the diameter of F in the maximum norm,

        R_T ≤ D∞² √T / (α(1−β1)) · Σ_i √v̂_{T,i}
            + D∞² / (1−β1)² · Σ_t Σ_i β1_t √v̂_{t,i} / α_t
            + α √(1+ln T) / ((1−β1)² (1−γ) √(1−β2)) · Σ_i ‖g_{1:T,i}‖₂.

    Three cautions. With a constant β1 the second term grows as T^{3/2}, so the bound says nothing;
    the theorem needs a decaying β1_t (λ^{t−1} or 1/t). The published proof has a gap where β1_t
    varies: it telescopes √v̂_t/(α_t(1−β1_t)) as if that were non-decreasing. Later work repairs it
    with other constants. And constants differ between printings of the paper; these are the larger
    ones.

    Args:
        steps: T, at least 1.
        lr: α, positive.
        beta1: β1 in [0, 1).
        beta2: β2 in (0, 1), with β1 < √β2.
        diameter: D∞, at least 0.
        root_sum: Σ_i √v̂_{T,i} after the last step.
        momentum_sum: Σ_t Σ_i β1_t √v̂_{t,i}/α_t.
        gradient_sum: Σ_i ‖g_{1:T,i}‖₂.

    Returns:
        The bound, in units of the loss.

    Raises:
        ValueError: If an argument is out of its range, or β1 ≥ √β2.

    Example:
        >>> round(amsgrad_regret_bound(
        ...     steps=1, lr=1.0, beta1=0.0, beta2=0.75, diameter=2.0,
        ...     root_sum=0.5, momentum_sum=0.0, gradient_sum=1.0), 6)
        4.0

    Reference:
        Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Theorem 4. The gap:
        Tran, Phong, "On the Convergence Proof of AMSGrad and a New Version", IEEE Access 2019.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if not diameter >= 0:
        raise ValueError(f"diameter must be at least 0, got {diameter}")
    if not (0 <= beta1 < 1 and 0 < beta2 < 1 and beta1 < math.sqrt(beta2)):
        raise ValueError(
            f"the bound needs 0 ≤ β1 < √β2 < 1, got beta1={beta1} and beta2={beta2} "
            "(otherwise γ = β1/√β2 ≥ 1)"
        )
    gamma = beta1 / math.sqrt(beta2)
    spread = diameter**2
    noise = lr * math.sqrt(1 + math.log(steps)) / ((1 - gamma) * math.sqrt(1 - beta2))
    return (
        spread * math.sqrt(steps) / (lr * (1 - beta1)) * root_sum
        + spread / (1 - beta1) ** 2 * momentum_sum
        + noise / (1 - beta1) ** 2 * gradient_sum
    )


class RegretTracker:
    """Regret R_T = Σ_t f_t(x_t) − Σ_t f_t(x*) against a fixed comparator x*.

    `update` takes the loss *before* the optimiser's step and the comparator's loss on the same f_t,
    numbers or tensors of one shape (one entry a path). Given an `AMSGrad` with α_t = α/√t, the
    tracker also listens to its steps and collects what the theorem's bound needs.

    Args:
        optimizer: An `AMSGrad` optimiser with one parameter group, or None if no bound is wanted.

    Raises:
        TypeError: If `optimizer` is neither None nor an `AMSGrad`.
        ValueError: If it has several groups, or `lr_decay` is not "sqrt".

    Example:
        >>> import torch
        >>> from assay.optim import AMSGrad, Box
        >>> x = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        >>> optimizer = AMSGrad([x], lr=0.5, betas=(0.0, 0.9), projection=Box(-1, 1))
        >>> tracker = RegretTracker(optimizer)
        >>> for _ in range(100):
        ...     loss = 2 * x
        ...     tracker.update(loss.item(), -2.0)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> tracker.steps, tracker.regret < tracker.bound(diameter=2.0)
        (100, True)

    Reference:
        Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018.
    """

    def __init__(self, optimizer: Any = None) -> None:
        self.steps = 0
        self.regret: Any = 0.0
        self._optimizer = optimizer
        self._momentum_sum = 0.0
        self._squares: dict[Tensor, Tensor] = {}
        if optimizer is None:
            return
        if not isinstance(optimizer, AMSGrad):
            raise TypeError(
                "optimizer must be an AMSGrad (the bound is AMSGrad's) or None, got "
                f"{type(optimizer).__name__}"
            )
        if len(optimizer.param_groups) != 1 or optimizer.param_groups[0]["lr_decay"] != "sqrt":
            raise ValueError(
                "the bound is that of one parameter group with lr_decay='sqrt', got "
                f"{len(optimizer.param_groups)} groups, "
                f"lr_decay={optimizer.param_groups[0]['lr_decay']!r}"
            )
        self._handle = optimizer.register_step_post_hook(self._listen)

    def update(self, loss: float | Tensor, comparator: float | Tensor) -> None:
        """Add one step.

        Args:
            loss: f_t(x_t), before the step.
            comparator: f_t(x*).
        """
        self.regret = self.regret + (_detached(loss) - _detached(comparator))
        self.steps += 1

    @property
    def average_regret(self) -> Any:
        """R_T/T, a number or a tensor as `update` was given; 0 before the first step."""
        return self.regret / max(self.steps, 1)

    @torch.no_grad()
    def _listen(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        (group,) = optimizer.param_groups
        for param in group["params"]:
            if param.grad is None:
                continue
            state = optimizer.state[param]
            step = float(state["step"])
            beta1 = decayed_momentum(group["betas"][0], group["beta1_decay"], step)
            alpha = float(decayed_lr(group["lr"], group["lr_decay"], step))
            roots = state["max_exp_avg_sq"].double().sqrt().sum()
            self._momentum_sum += beta1 * float(roots) / alpha
            squares = param.grad.double().square()
            self._squares[param] = self._squares.get(param, 0.0) + squares

    def bound(self, *, diameter: float) -> float:
        """Evaluate `amsgrad_regret_bound` at the steps seen so far.

        Args:
            diameter: D∞, the largest distance of two points of F in the maximum norm.

        Returns:
            The bound on the sum over all coordinates of the regret.

        Raises:
            RuntimeError: If the tracker was made without an optimiser, or no step was made.
        """
        if not isinstance(self._optimizer, AMSGrad) or not self._squares:
            raise RuntimeError("bound needs RegretTracker(optimizer) and at least one step")
        (group,) = self._optimizer.param_groups
        states = [self._optimizer.state[param] for param in self._squares]
        return amsgrad_regret_bound(
            steps=int(max(float(state["step"]) for state in states)),
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            diameter=diameter,
            root_sum=float(sum(state["max_exp_avg_sq"].double().sqrt().sum() for state in states)),
            momentum_sum=self._momentum_sum,
            gradient_sum=float(sum(total.sqrt().sum() for total in self._squares.values())),
        )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def effective_second_moment(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return V_t of an Adam-type optimiser: what the root of divides the step.

    Read from the state by name: `max_exp_avg_sq` (AMSGrad) before `exp_avg_sq` (Adam family),
    `square_avg` (RMSprop), `sum` (Adagrad) or the square of `exp_inf` (Adamax). Moments of
    optimisers with `betas` are divided by 1 − β2^t as torch divides them, unless the optimiser is
    one of Assay's, whose moments stand as they are used.

    Args:
        state: `optimizer.state[param]`.
        group: The parameter group.

    Returns:
        A tensor of the parameter's shape.

    Raises:
        ValueError: If the state has none of these names.

    Example:
        >>> import torch
        >>> state = {"step": torch.tensor(1.0), "exp_avg_sq": torch.tensor([0.5])}
        >>> effective_second_moment(state, {"betas": (0.9, 0.5)})
        tensor([1.])
    """
    if "exp_inf" in state:
        return state["exp_inf"].square()
    for name in ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum"):
        if name in state:
            corrected_by_torch = name in ("max_exp_avg_sq", "exp_avg_sq") and "betas" in group
            if corrected_by_torch and "lr_decay" not in group:
                return state[name] / (1 - group["betas"][1] ** float(state["step"]))
            return state[name]
    raise ValueError(
        "the optimiser keeps no second moment under a known name; its state has "
        f"{sorted(state) or 'nothing'}; pass second_moment=(state, group) -> Tensor"
    )


@dataclass(frozen=True)
class StepSizeReport:
    """What `StepSizeMonitor` saw.

    Args:
        steps: Number of comparisons made (steps after the first).
        share: Share of all (coordinate, step) pairs with Γ < 0, in [0, 1].
        last_share: Share of coordinates with Γ < 0 at the last step.
        ever_share: Share of coordinates with Γ < 0 at some step.
        largest_violation: Largest −Γ, in units of √V/α; 0 if there was none.
        largest_growth: Largest factor by which a coordinate's step size α/√V grew in one step; 1 if
            none grew.

    Example:
        >>> StepSizeReport(10, 0.0, 0.0, 0.0, 0.0, 1.0).share
        0.0
    """

    steps: int
    share: float
    last_share: float
    ever_share: float
    largest_violation: float
    largest_growth: float


class StepSizeMonitor:
    """Watches whether an Adam-type optimiser's step sizes grow on your own run.

    Convergence of this family needs Γ_t = √V_t/α_t − √V_{t−1}/α_{t−1} ≥ 0 in every coordinate:
    step sizes α_t/√V_t that never grow. The monitor compares √V/α after every step with the one
    before; α_t is the group's `lr` (with the decay of Assay's optimisers), so schedulers count.
    Costs one tensor a parameter of memory and a few operations a step.

    Args:
        optimizer: Any optimiser that keeps a second moment per coordinate.
        second_moment: `(state, group) -> Tensor`, V_t of one parameter; None for
            `effective_second_moment`, which knows the optimisers of torch and of Assay.
        tolerance: Relative decrease of √V/α below which it counts as rounding; None for 8 ulp of
            the parameter's dtype.

    Raises:
        TypeError: If `optimizer` is no optimiser.
        ValueError: If `tolerance` is negative, or, at a step, no second moment is found.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.Adam([x], lr=0.1, betas=(0.9, 0.9))
        >>> monitor = StepSizeMonitor(optimizer)
        >>> for g in (1.0, 0.1, 0.1):
        ...     x.grad = torch.tensor([g])
        ...     optimizer.step()
        >>> monitor.report().share  # a small gradient after a large one
        1.0

    Reference:
        Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Section 3.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        second_moment: Callable[..., Tensor] | None = None,
        tolerance: float | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        self._second_moment = second_moment or effective_second_moment
        self._tolerance = tolerance
        self._roots: dict[Tensor, Tensor] = {}
        self._ever: dict[Tensor, Tensor] = {}
        self._steps = 0
        self._violations = 0
        self._pairs = 0
        self._last = (0, 0)
        self._largest_violation = 0.0
        self._largest_growth = 1.0
        self._handle = optimizer.register_step_post_hook(self._listen)

    @torch.no_grad()
    def _listen(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        violations = pairs = 0
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = optimizer.state.get(param, {})
                before = self._roots.get(param)
                root = self._second_moment(state, group).sqrt() / _step_lr(optimizer, state, group)
                self._roots[param] = root
                if before is not None:
                    violations += self._compare(param, before, root)
                    pairs += root.numel()
        if pairs:
            self._steps += 1
            self._violations += violations
            self._pairs += pairs
            self._last = (violations, pairs)

    def _compare(self, param: Tensor, before: Tensor, root: Tensor) -> int:
        tolerance = self._tolerance
        if tolerance is None:
            tolerance = 8 * torch.finfo(root.dtype).eps
        fell = root < before * (1 - tolerance)
        self._ever[param] = fell | self._ever[param] if param in self._ever else fell
        count = int(fell.sum())
        if count:
            high, low = before[fell], root[fell]
            self._largest_violation = max(self._largest_violation, float((high - low).max()))
            self._largest_growth = max(self._largest_growth, float((high / low).max()))
        return count

    def report(self) -> StepSizeReport:
        """Return what has been seen so far; all zeros before the second step."""
        seen = sum(mask.numel() for mask in self._ever.values())
        ever = sum(int(mask.sum()) for mask in self._ever.values())
        violations, pairs = self._last
        return StepSizeReport(
            steps=self._steps,
            share=self._violations / max(self._pairs, 1),
            last_share=violations / max(pairs, 1),
            ever_share=ever / max(seen, 1),
            largest_violation=self._largest_violation,
            largest_growth=self._largest_growth,
        )

    def close(self) -> None:
        """Stop watching; the report stays."""
        self._handle.remove()


def _step_lr(optimizer: Optimizer, state: dict[str, Any], group: dict[str, Any]) -> Any:
    """Return α_t of the step just made."""
    if isinstance(optimizer, AMSGrad | AdamNC):
        return decayed_lr(group["lr"], group["lr_decay"], float(state["step"]))
    return group["lr"]
