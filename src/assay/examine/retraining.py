"""Copies of the network under examination, trained anew from fresh weights."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from assay.data import Batches
from assay.examine.differentiable import differentiable, fitting
from assay.examine.panel import NotApplicable
from assay.examine.sample import BATCH, LossFn, Split
from assay.functional import reinitialize

BATCH_SIZE = 64
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
WEIGHT_DECAY = 1e-2
RULE = (
    f"AdamW (weight decay {WEIGHT_DECAY:g}, batches of {BATCH_SIZE}) with the learning rate of "
    f"{', '.join(f'{lr:g}' for lr in LEARNING_RATES)} that reaches the lowest loss in a few trial "
    "steps from the same weights on the same batches"
)


class Trainee:
    """A freshly initialised copy of a network with its optimizer and its batches.

    Args:
        model: whose architecture it has; left as it was. Frozen parameters stay as they are.
        split: to train on.
        loss_fn: mean loss.
        lr: learning rate of AdamW.
        generator: of the weights and the order of samples.

    Raises:
        NotApplicable: if some parameters cannot be initialised anew; it names them.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        loss_fn: LossFn,
        *,
        lr: float,
        generator: torch.Generator,
    ) -> None:
        with differentiable(model) as network:
            self.model = copy.deepcopy(network)
        try:
            # The user's module inside the subject: its names are those that the user knows.
            reinitialize(self.model.get_submodule("model"), generator=generator)
        except ValueError as error:
            raise NotApplicable(f"it cannot be trained anew: {error}") from error
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=WEIGHT_DECAY)
        self.loss_fn = loss_fn
        self.steps = 0
        self._batches = self._forever(split, generator)

    def _forever(self, split: Split, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        # BatchNorm cannot take a last batch of one sample.
        batches = Batches(
            fitting(self.model, split.x), split.y, BATCH_SIZE, generator=generator,
            drop_last=len(split) >= BATCH_SIZE,
        )  # fmt: skip
        while True:
            yield from batches

    def step(self) -> Tensor:
        """One step of the optimizer; the loss of its batch before it, not waited for."""
        self.model.train()
        x, y = next(self._batches)
        with torch.enable_grad():
            loss = self.loss_fn(self.model(x), y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """What it answers, in evaluation mode.

        Args:
            x: inputs.
        """
        self.model.eval()
        return torch.cat([self.model(part) for part in fitting(self.model, x).split(BATCH)])


def choose_learning_rate(make: Callable[[float], Trainee], steps: int) -> float:
    """The learning rate of `LEARNING_RATES` that goes lowest in a few steps; the smaller in a tie.

    Args:
        make: a trainee of a learning rate, always from the same weights with the same batches.
        steps: of each trial; the loss of the last third counts.
    """
    tail = max(1, steps // 3)
    found: dict[float, Any] = {}
    for lr in LEARNING_RATES:
        trainee = make(lr)
        losses = torch.stack([trainee.step() for _ in range(steps)])
        found[lr] = losses[-tail:].mean().nan_to_num(nan=torch.inf).item()
    return min(LEARNING_RATES, key=lambda lr: found[lr])
