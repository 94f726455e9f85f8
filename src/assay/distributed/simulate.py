"""Many workers in one process: per-worker gradients at once, and how they are combined."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from assay.distributed import integer_aggregation as integers
from assay.distributed.combinations import ErrorFeedback
from assay.distributed.compressors import Compressor, Identity, NaturalCompressor, draw_seed

__all__ = ["worker_gradients", "two_way_sum", "Traffic", "SimulatedWorkers"]

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Traffic:
    """Bits of one exchange.

    Args:
        up: Sent by all workers together to the master.
        down: Sent by the master, counted once (a broadcast).

    Example:
        >>> Traffic(up=400, down=100).total(workers=4)
        800
    """

    up: int
    down: int

    def total(self, workers: int) -> int:
        """Bits received and sent by the master when the broadcast goes to each worker in turn."""
        return self.up + workers * self.down


def worker_gradients(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Tensor,
    targets: Tensor,
    parameters: Tensor | None = None,
) -> tuple[Float[Tensor, "workers d"], Float[Tensor, " workers"]]:
    """Gradient of every worker's batch as one matrix, computed at once with `torch.func.vmap`.

    Layers with running statistics see each worker's batch alone; afterwards the model holds the
    statistics of worker 0, as in `DistributedDataParallel`. Dropout draws differ by worker.

    Args:
        model: Module whose trainable parameters are differentiated; its `.grad` stay untouched.
        loss_fn: `(output, targets) -> 0-dimensional loss` of one worker's batch.
        inputs: Batches of shape (workers, batch, …).
        targets: Targets of shape (workers, batch, …).
        parameters: Flat parameters instead of the model's: (d,) for all workers, or (workers, d)
            for workers that differ, as in decentralised training.

    Returns:
        Gradients (workers, d), in the order of `model.parameters()`, and losses (workers,).

    Raises:
        ValueError: The first dimensions of `inputs`, `targets` and `parameters` differ.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> x, y = torch.randn(4, 8, 3), torch.randn(4, 8, 1)
        >>> gradients, losses = worker_gradients(model, nn.functional.mse_loss, x, y)
        >>> gradients.shape, losses.shape
        (torch.Size([4, 4]), torch.Size([4]))
    """
    workers = len(inputs)
    if len(targets) != workers:
        raise ValueError(f"targets must have {workers} workers as inputs, got {len(targets)}")
    trained = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    fixed = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}
    if parameters is None:
        parameters = torch.cat([p.reshape(-1) for p in trained.values()])
    if parameters.dim() == 2 and len(parameters) != workers:
        raise ValueError(f"parameters must have {workers} rows, got {len(parameters)}")
    sizes = [p.numel() for p in trained.values()]
    # Every worker updates its own running statistics.
    buffers = {k: b.expand(workers, *b.shape).clone() for k, b in model.named_buffers()}

    def loss(flat: Tensor, buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        parts = zip(trained.items(), flat.split(sizes), strict=True)
        weights = {k: part.view(p.shape) for (k, p), part in parts}
        return loss_fn(functional_call(model, {**weights, **fixed, **buffers}, (x,)), y)

    each = vmap(
        grad_and_value(loss),
        in_dims=(0 if parameters.dim() == 2 else None, 0, 0, 0),
        randomness="different",
    )
    gradients, losses = each(parameters.detach(), buffers, inputs, targets)
    for k, buffer in model.named_buffers():
        buffer.copy_(buffers[k][0])
    return gradients, losses


def two_way_sum(
    gradients: Float[Tensor, "workers d"],
    workers: Sequence[Compressor],
    master: Compressor,
    generator: Generator | None = None,
) -> tuple[Float[Tensor, " d"], Traffic]:
    """C_M(Σᵢ C_W(gᵢ)): compress each row, add, and compress the sum.

    Workers that are `NaturalCompressor(integer=True)` are added as integers.

    Args:
        gradients: One row a worker.
        workers: A compressor for each row (one object may serve all rows unless it has memory).
        master: Compressor of the sum.
        generator: Source of all randomness.

    Returns:
        The compressed sum, and the bits that travelled.

    Raises:
        ValueError: There is not one compressor for each row.

    Example:
        >>> gradients = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
        >>> total, traffic = two_way_sum(gradients, [Identity()] * 2, Identity())
        >>> total, traffic
        (tensor([4., 0.]), Traffic(up=128, down=64))
    """
    if len(workers) != len(gradients):
        raise ValueError(f"workers must hold {len(gradients)} compressors, got {len(workers)}")
    if any(isinstance(worker, NaturalCompressor) and worker.integer for worker in workers):
        return _integer_sum(gradients, master, generator)
    total, up = torch.zeros_like(gradients[0]), 0
    for worker, gradient in zip(workers, gradients, strict=True):
        payload = worker.compress(gradient, generator=generator)
        up += worker.bits(payload)
        total += worker.decompress(payload)
    payload = master.compress(total, generator=generator)
    return master.decompress(payload), Traffic(up, master.bits(payload))


def _integer_sum(
    gradients: Tensor, master: Compressor, generator: Generator | None
) -> tuple[Tensor, Traffic]:
    n, d = gradients.shape
    compressor = NaturalCompressor()
    rows = [compressor.compress(row, generator=generator) for row in gradients]
    rounded = torch.stack([compressor.decompress(row) for row in rows])
    exponent = int(integers.largest_exponent(rounded))
    if exponent == integers.NOT_FINITE:
        return rounded.sum(0), Traffic(n * 32 * d, 32 * d)
    total = torch.zeros(d, dtype=torch.int32, device=gradients.device)
    for row in rounded:
        total += integers.to_integers(row, exponent, n, generator)
    seed = int(draw_seed(generator)) if isinstance(master, NaturalCompressor) else None
    result = integers.from_integers(total, exponent, n, gradients.dtype, seed)
    return result, Traffic(n * 32 * d, (9 if seed is not None else 32) * d)


class SimulatedWorkers:
    """Data-parallel training of n workers in one process, with compression both ways.

    Replaces the backward pass of an ordinary training loop: `backward` sets each parameter's
    gradient to C_M(Σᵢ C_W(gᵢ)) / n, then any optimiser steps.

    Args:
        model: Module to train.
        loss_fn: `(output, targets) -> loss` of one worker's batch.
        workers: Number of workers n.
        worker: Compressor of the workers, copied for each (so `ErrorFeedback` keeps n memories).
        master: Compressor of the master.
        generator: Source of the compressors' randomness.

    Raises:
        ValueError: `workers` is below 1.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> group = SimulatedWorkers(model, nn.functional.mse_loss, 4, worker=NaturalCompressor())
        >>> x, y = torch.randn(32, 3), torch.randn(32, 1)
        >>> losses = group.backward(*group.shard(x, y))
        >>> optimizer.step()
        >>> group.bits_up  # 4 entries of 9 bits in whole bytes, from 4 workers
        160
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        workers: int,
        *,
        worker: Compressor | None = None,
        master: Compressor | None = None,
        generator: Generator | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.model, self.loss_fn, self.generator = model, loss_fn, generator
        self.workers = [copy.deepcopy(worker or Identity()) for _ in range(workers)]
        self.master = master or Identity()
        self.bits_up = self.bits_down = 0

    def shard(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Split a batch evenly into (workers, batch / workers, …); the remainder is left out."""
        n = len(self.workers)
        size = len(inputs) // n
        if not size:
            raise ValueError(f"inputs must hold at least {n} entries, one a worker")
        return (
            inputs[: n * size].view(n, size, *inputs.shape[1:]),
            targets[: n * size].view(n, size, *targets.shape[1:]),
        )

    def backward(self, inputs: Tensor, targets: Tensor) -> Float[Tensor, " workers"]:
        """Set `.grad` of every trainable parameter from batches of shape (workers, batch, …).

        Args:
            inputs: A batch a worker, (workers, batch, …); `shard` makes them of one batch.
            targets: Likewise.

        Returns:
            Each worker's loss.

        Raises:
            ValueError: The first dimension of inputs or targets is not that of the workers.
        """
        n = len(self.workers)
        for name, value in (("inputs", inputs), ("targets", targets)):
            if value.ndim == 0 or len(value) != n:
                raise ValueError(
                    f"{name} must be ({n}, batch, …), a batch for each of {n} workers, got shape "
                    f"{tuple(value.shape)}: split one batch with .shard(inputs, targets)"
                )
        gradients, losses = worker_gradients(self.model, self.loss_fn, inputs, targets)
        total, traffic = two_way_sum(gradients, self.workers, self.master, self.generator)
        self.bits_up += traffic.up
        self.bits_down += traffic.down
        trained = [p for p in self.model.parameters() if p.requires_grad]
        parts = (total / len(self.workers)).split([p.numel() for p in trained])
        for parameter, part in zip(trained, parts, strict=True):
            parameter.grad = part.view(parameter.shape).clone()
        return losses

    def state_dict(self) -> dict:
        """Traffic so far, the memories of the workers' compressors and the random state."""
        memories = [w.state_dict() if isinstance(w, ErrorFeedback) else {} for w in self.workers]
        state = {"bits_up": self.bits_up, "bits_down": self.bits_down, "workers": memories}
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""
        self.bits_up, self.bits_down = state["bits_up"], state["bits_down"]
        for worker, memory in zip(self.workers, state["workers"], strict=True):
            if isinstance(worker, ErrorFeedback):
                worker.load_state_dict(memory)
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"])
