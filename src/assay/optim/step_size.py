"""Which learning rate? The range test, and what two successive gradients say."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from assay.functional import call_model, keeping_modes


@dataclass(frozen=True)
class LRRange:
    """What a learning-rate range test found.

    Args:
        lrs: learning rates, rising geometrically, one a step.
        losses: loss of each step's batch before the step.
        smoothed: the losses' exponential average, bias-corrected.
        steepest: the rate at which the smoothed loss falls fastest against log(lr): a usual choice.
        largest: the rate at which the smoothed loss is smallest; beyond it training gets worse.
        diverged: whether the loss passed the bound that ends the test.

    Example:
        >>> from assay.optim import LRRange
        >>> LRRange((0.1, 1.0), (2.0, 9.0), (2.0, 9.0), 0.1, 0.1, diverged=True).largest
        0.1
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float
    largest: float
    diverged: bool


def lr_range_test(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Any, Any]],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    divergence: float = 4.0,
) -> LRRange:
    """Train for some steps with a rate that grows from step to step, and watch the loss.

    Model, optimizer and torch's random state are as before afterwards.

    Args:
        model: any module; trained in training mode during the test.
        optimizer: over its parameters; all groups get the same rate.
        batches: `(inputs, targets)`, begun again when it ends before the test does.
        loss_fn: `(output, target) -> scalar`.
        low: first rate.
        high: last rate.
        steps: number of steps.
        smoothing: of the loss, in [0, 1).
        divergence: the test ends early where the smoothed loss exceeds its minimum times this.

    Returns:
        Rates, losses and two suggestions.

    Raises:
        ValueError: if a number is out of its range or `batches` yields nothing.

    Example:
        >>> import torch
        >>> from assay.optim import lr_range_test
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> line = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(line.parameters(), lr=0.1)
        >>> found = lr_range_test(line, sgd, [(x, 3 * x)], loss_fn=torch.nn.functional.mse_loss)
        >>> 0.01 < found.largest < 10  # GD on this line is stable below 1
        True

    Reference:
        Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"expected 0 < low < high, got low={low}, high={high}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    if not divergence > 1:
        raise ValueError(f"divergence must be more than 1, got {divergence}")
    weights = copy.deepcopy(model.state_dict())
    inner = copy.deepcopy(optimizer.state_dict())
    gradients = {p: p.grad for p in model.parameters()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    lrs = [low * (high / low) ** (k / (steps - 1)) for k in range(steps)]
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), keeping_modes(model):
            model.train()
            for step, (inputs, targets) in enumerate(_endless(batches, steps)):
                for group in optimizer.param_groups:
                    group["lr"] = lrs[step]
                loss = loss_fn(call_model(model, inputs), targets)
                losses.append(float(loss.detach()))
                average = smoothing * average + (1 - smoothing) * losses[-1]
                smoothed.append(average / (1 - smoothing ** (step + 1)))
                if not smoothed[-1] <= divergence * min(smoothed):
                    diverged = True
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        model.load_state_dict(weights)
        optimizer.load_state_dict(inner)
        for p, gradient in gradients.items():
            p.grad = gradient
    best = min(range(len(smoothed)), key=lambda k: _finite(smoothed[k]))
    falls = [_finite(smoothed[k + 1]) - _finite(smoothed[k]) for k in range(best)]
    steepest = min(range(best), key=falls.__getitem__) if best else 0
    return LRRange(
        tuple(lrs[: len(losses)]),
        tuple(losses),
        tuple(smoothed),
        lrs[steepest],
        lrs[best],
        diverged,
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _endless(batches: Iterable[tuple[Any, Any]], steps: int) -> Iterable[tuple[Any, Any]]:
    made = 0
    while made < steps:
        before = made
        for batch in batches:
            if made == steps:
                return
            made += 1
            yield batch
        if made == before:
            raise ValueError("batches is empty: nothing to train on")


class StepEstimate(NamedTuple):
    """The two step sizes of Barzilai and Borwein.

    Args:
        long: ⟨s, s⟩/⟨s, y⟩, infinite where the curvature along s is not positive.
        short: ⟨s, y⟩/⟨y, y⟩, 0 where the curvature along s is not positive.

    Example:
        >>> from assay.optim import StepEstimate
        >>> StepEstimate(long=0.5, short=0.4).long
        0.5
    """

    long: float
    short: float


class BarzilaiBorwein:
    """The step size that two successive gradients suggest.

    With s the change of the parameters since the last call and y that of their gradients, the
    inverse Hessian is most like α I for α = ⟨s, s⟩/⟨s, y⟩ (long) or ⟨s, y⟩/⟨y, y⟩ (short). Call it
    after `backward` and before the optimizer's step. With gradients of different batches, y has
    their noise in it: use the same batch, or all data.

    Args:
        params: the parameters whose gradients count.

    Raises:
        ValueError: if there are none.

    Example:
        >>> import torch
        >>> from assay.optim import BarzilaiBorwein
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> estimate = BarzilaiBorwein([w])
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([2.0, 8.0]) * w.detach()  # curvatures 2 and 8
        ...     step = estimate()
        ...     with torch.no_grad():
        ...         w -= torch.tensor([0.1, 0.0])
        >>> round(step.long, 4)  # it has moved along the first axis only
        0.5

    Reference:
        Barzilai, Borwein, "Two-Point Step Size Gradient Methods", IMA J. Numerical Analysis 1988.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = list(params)
        if not self.params:
            raise ValueError("params is empty: expected parameters with gradients")
        self._last: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def __call__(self) -> StepEstimate | None:
        """Compare with the last call; None the first time, and if the parameters have not moved."""
        here = [p.detach().double().clone() for p in self.params]
        slopes = [
            torch.zeros_like(x) if p.grad is None else p.grad.double().clone()
            for p, x in zip(self.params, here, strict=True)
        ]
        last, self._last = self._last, (here, slopes)
        if last is None:
            return None
        s = [a - b for a, b in zip(here, last[0], strict=True)]
        y = [a - b for a, b in zip(slopes, last[1], strict=True)]
        ss, sy, yy = (_inner(a, b) for a, b in ((s, s), (s, y), (y, y)))
        if ss == 0:
            return None
        return StepEstimate(ss / sy, sy / yy) if sy > 0 else StepEstimate(math.inf, 0.0)


def _inner(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
