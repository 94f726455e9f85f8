"""The one plain training loop; `assay.lab` adds checkpoints, Fabric and learning curves to it."""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from assay.functional.modes import evaluating

Record = dict[str, float]


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    scheduler: LRScheduler | None = None,
    step_scheduler: LRScheduler | None = None,
    penalty: Callable[[], Tensor] | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    after_step: Callable[[int], None] | None = None,
    after_epoch: Callable[[list[Record]], None] | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    history: list[Record] | None = None,
) -> list[Record]:
    """Train `model` in place on `batches` for a number of epochs.

    One step is `loss_fn(model(x), y) + penalty()`, its gradient, one optimizer step. Batches are
    moved to the device of the model's first parameter. The model is in training mode during an
    epoch, whatever `evaluate` did to it, and is left in evaluation mode.

    Args:
        model: any module whose forward takes one tensor.
        optimizer: steps over the parameters that are to be trained.
        batches: yields `(x, y)`; iterated once an epoch.
        epochs: total number of epochs, those of `history` included.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        scheduler: stepped after each epoch.
        step_scheduler: stepped after each optimizer step.
        penalty: an addition to the loss, evaluated after the forward pass of each step.
        evaluate: called after each epoch; what it returns is added to the epoch's record.
        after_step: called with the number of steps done so far.
        after_epoch: called with the history after each epoch, last of all (checkpoints).
        backward: replaces `loss.backward()`, e.g. Fabric's.
        history: records of epochs already done; training continues behind them.

    Returns:
        One record an epoch: `epoch` (from 1), `step` (optimizer steps so far), `loss` (mean over
        samples, penalty excluded) and what `evaluate` gave.

    Raises:
        ValueError: if `epochs` is negative or `batches` yields nothing.
        FloatingPointError: if a loss is NaN; the message names epoch and step.

    Example:
        >>> import torch
        >>> from assay.functional import fit
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> line = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(line.parameters(), lr=0.1)
        >>> history = fit(line, sgd, [(x, 3 * x)], epochs=200, loss_fn=torch.nn.functional.mse_loss)
        >>> abs(line.weight.item() - 3) < 1e-2
        True
    """
    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    history = [] if history is None else history
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    step = int(history[-1]["step"]) if history else 0
    for epoch in range(len(history) + 1, epochs + 1):
        model.train()
        # Summed on the device: a .item() each step would wait for it.
        total = torch.zeros((), dtype=torch.float64, device=device)
        samples = 0
        for x, y in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = loss_fn(model(x), y)
            objective = loss if penalty is None else loss + penalty()
            optimizer.zero_grad(set_to_none=True)
            backward(objective)
            optimizer.step()
            if step_scheduler is not None:
                step_scheduler.step()
            total += loss.detach().double() * len(x)
            samples += len(x)
            step += 1
            if after_step is not None:
                after_step(step)
        if samples == 0:
            raise ValueError("batches is empty: nothing to train on")
        mean = (total / samples).item()
        if mean != mean:
            raise FloatingPointError(f"the training loss became NaN in epoch {epoch}")
        if scheduler is not None:
            scheduler.step()
        model.eval()
        record: Record = {"epoch": epoch, "step": step, "loss": mean}
        if evaluate is not None:
            record.update({name: float(value) for name, value in evaluate().items()})
        history.append(record)
        if after_epoch is not None:
            after_epoch(history)
    model.eval()
    return history


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int = 1024,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
) -> Record:
    """Mean loss and accuracy of a classifier on tensors, in evaluation mode.

    Args:
        model: returns logits of shape `(N, C)`; its training mode is restored afterwards.
        x: inputs `(N, ...)`.
        y: class indices `(N,)`.
        batch_size: samples a forward pass.
        loss_fn: `(logits, y, reduction="sum") -> scalar`.

    Returns:
        `{"loss": mean loss in nats, "accuracy": share of right predictions in [0, 1]}`.

    Raises:
        ValueError: if there are no samples or `x` and `y` differ in length.

    Example:
        >>> import torch
        >>> from assay.functional import evaluate_classifier
        >>> x = torch.eye(3)
        >>> evaluate_classifier(torch.nn.Identity(), x, torch.arange(3))["accuracy"]
        1.0
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y must be non-empty and of one length, got {len(x)} and {len(y)}")
    device = next((p.device for p in model.parameters()), x.device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    with evaluating(model):
        for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = model(inputs.to(device))
            targets = targets.to(device)
            loss += loss_fn(logits, targets, reduction="sum").double()
            right += (logits.argmax(dim=1) == targets).sum()
    return {"loss": (loss / len(x)).item(), "accuracy": right.item() / len(x)}
