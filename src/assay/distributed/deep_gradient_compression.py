"""Deep gradient compression: momentum correction, its DDP communication hook, density warm-up.

With the local gradient g of a worker, momentum m and the compressor C of a parameter,

    u ← m u + g         velocity                  (Nesterov: u ← m (u + g))
    v ← v + u           what is yet to be sent    (Nesterov: v ← v + u + g)
    send C(v);  v ← v − C(v);  u ← 0 on the entries sent

and every worker steps along the average of what all sent, with no momentum of the optimiser.
"""

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from assay.distributed.blockwise import Blockwise, pack, unpack
from assay.distributed.combinations import Compose, ErrorFeedback
from assay.distributed.compressors import Compressor, Identity, check_floating, draw_seed
from assay.distributed.hooks import all_reduce, exchange, ring_bytes
from assay.distributed.payload import Payload
from assay.distributed.selection import SampledTopK
from assay.distributed.sparsifiers import Sparsifier
from assay.kernels.threshold import compensate_

Sent = tuple[Compressor, Payload, Tensor]  # of one parameter, with where the average goes

__all__ = ["DGCState", "DGCWorker", "DensityWarmup", "MomentumCorrection", "dgc_hook"]


class MomentumCorrection(ErrorFeedback):
    """Error feedback on velocities instead of gradients, with momentum factor masking.

    Keeps u and v: u ← m u + g, v ← v + u, sends C(v) and sets v ← v − C(v). Where C is a sparsifier
    (or natural compression and the like on top of one) it also sets u ← 0 on the entries sent, so
    that a stale velocity does not carry on. Error feedback alone would apply momentum to sums of
    gradients of very different ages. Without masking everything sent adds up to all velocities.

    A gradient that is not finite is compressed without the memory and leaves it as it was. The
    memory has at least 32 bits an entry.

    Args:
        compressor: C; one that shrinks, such as `SampledTopK` or `TopK`, but not `RandomK`, whose
            scaled values overshoot. With `Identity` the velocity itself is sent.
        momentum: m, in [0, 1). With 0 this is plain error feedback.
        nesterov: Use Nesterov's form, u ← m (u + g), v ← v + u + g.
        mask_momentum: Set u to 0 on the entries sent.
        pause_zero: A gradient that is zero everywhere sends nothing and leaves the memory as it
            was.

    Attributes:
        velocity: u, flat; None before the first gradient.
        error: v, flat; likewise.

    Raises:
        TypeError: `compressor` is not a compressor.
        ValueError: `momentum` is outside [0, 1), or a tensor has another size than the one before.

    Example:
        >>> from assay.distributed import TopK
        >>> correction = MomentumCorrection(TopK(0.5), momentum=0.5)
        >>> x = torch.tensor([2.0, 3.0])
        >>> [correction.decompress(correction.compress(x)).tolist() for _ in range(2)]
        [[0.0, 3.0], [5.0, 0.0]]

    Reference:
        Lin, Han, Mao, Wang, Dally, Deep Gradient Compression, ICLR 2018,
        https://arxiv.org/abs/1712.01887.
    """

    def __init__(
        self,
        compressor: Compressor,
        momentum: float = 0.9,
        nesterov: bool = False,
        mask_momentum: bool = True,
        pause_zero: bool = False,
    ) -> None:
        super().__init__(compressor)
        _check_momentum(momentum)
        self.momentum, self.nesterov = momentum, nesterov
        self.mask_momentum, self.pause_zero = mask_momentum, pause_zero
        self.velocity: Tensor | None = None

    def __repr__(self) -> str:
        return f"MomentumCorrection({self.compressor!r}, momentum={self.momentum})"

    @torch.no_grad()
    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Compress what is yet to be sent once `x` is added, and remember the rest."""
        check_floating(x)
        if not is_finite(x) or (self.pause_zero and not x.any()):
            return self.compressor.compress(x, generator=generator)
        wide = torch.promote_types(x.dtype, torch.float32)
        gradient = x.detach().reshape(-1).to(wide)
        velocity, error = self._memory(gradient)
        compensate_(velocity, error, gradient, self.momentum, self.nesterov)
        sent = self.compressor.compress(error.view(x.shape), generator=generator)
        entries = sparse_entries(self.compressor, sent)
        if entries is None:
            self.error = error - self.compressor.decompress(sent).view(-1)
        else:
            indices, values = entries
            error.index_add_(0, indices, values, alpha=-1)
            if self.mask_momentum:
                velocity.index_fill_(0, indices.long(), 0)
        return Payload(sent.tensors, sent.shape, x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        """What the compressor inside gives."""
        wide = torch.promote_types(payload.dtype, torch.float32)
        values = self.compressor.decompress(Payload(payload.tensors, payload.shape, wide))
        return values.to(payload.dtype)

    def _memory(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.velocity is None or self.error is None:
            self.velocity, self.error = torch.zeros_like(like), torch.zeros_like(like)
        if len(self.error) != len(like):
            raise ValueError(
                f"x must have {len(self.error)} entries as the tensors before it, got {len(like)}"
            )
        return self.velocity, self.error

    def reset(self) -> None:
        """Forget velocity and error."""
        self.velocity = self.error = None

    def state_dict(self) -> dict[str, Tensor]:
        """Velocity and error, if there are any."""
        if self.velocity is None or self.error is None:
            return {}
        return {"velocity": self.velocity, "error": self.error}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over velocity and error of `state_dict`."""
        self.reset()
        if state:
            self.velocity, self.error = state["velocity"].clone(), state["error"].clone()


def sparse_entries(compressor: Compressor, payload: Payload) -> tuple[Tensor, Tensor] | None:
    """Indices and values that a sparsifier, alone or inside `Compose`, has sent; else None."""
    if isinstance(compressor, Sparsifier):
        indices, values = payload.tensors
        return indices, values
    if isinstance(compressor, Compose) and isinstance(compressor.inner, Sparsifier):
        indices, *kept = payload.tensors
        inside = Payload(tuple(kept), (len(indices),), payload.dtype)
        return indices, compressor.outer.decompress(inside)
    return None


def add_message(message: Payload, sent: Sequence[Sent], factor: float) -> None:
    """Add what a rank sent to the vectors of `sent`, times a factor, without making it dense."""
    for (compressor, _, output), tensors in zip(sent, unpack(message.tensors), strict=True):
        payload = Payload(tensors, tuple(output.shape), output.dtype)
        entries = sparse_entries(compressor, payload)
        if entries is None:
            output.add_(compressor.decompress(payload), alpha=factor)
        else:
            output.index_add_(0, *entries, alpha=factor)


def is_finite(x: Tensor) -> bool:
    """Whether no entry is infinite or NaN; one pass, unless squares overflow."""
    return bool(torch.linalg.vector_norm(x).isfinite()) or bool(x.isfinite().all())


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")


# ----------------------------------------------------------------------------- a worker's algorithm


@dataclass(frozen=True)
class DensityWarmup:
    """Density that falls geometrically over the first epochs.

    In epoch e = 0, 1, … it is max(final, final^((e + 1) / (epochs + 1))): for 0.1 % and four epochs
    25, 6.3, 1.6 and 0.4 %, then 0.1 %.

    Args:
        epochs: Epochs until the final density; 0 for no warm-up.

    Raises:
        ValueError: `epochs` is negative.

    Example:
        >>> warmup = DensityWarmup(epochs=4)
        >>> [round(warmup(0.001, epoch), 4) for epoch in range(6)]
        [0.2512, 0.0631, 0.0158, 0.004, 0.001, 0.001]

    Reference:
        Lin, Han, Mao, Wang, Dally, Deep Gradient Compression, ICLR 2018, section 3.3,
        https://arxiv.org/abs/1712.01887.
    """

    epochs: int = 4

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")

    def __call__(self, final: float, epoch: int) -> float:
        """Density of an epoch, counted from 0."""
        return max(final, final ** ((epoch + 1) / (self.epochs + 1)))


class DGCWorker(Blockwise):
    """What one worker does with its gradient in deep gradient compression.

    A compressor of the whole gradient, one block a parameter: large tensors go through
    `MomentumCorrection` of a sparsifier, small ones and vectors (biases, scales of norms) through
    momentum alone, and are sent whole. Each simulated worker has one
    (`SimulatedWorkers(model, loss, n, worker=DGCWorker(...))`); `DGCState` has one in each process.

    With `momentum=0` and the momentum left in the optimiser this is gradient dropping.

    Args:
        shapes: Shapes of the parameters, in the order of the gradient.
        density: Fraction of the entries of large tensors that is sent, in (0, 1]; an attribute to
            be set as training goes on. At 1 there are no indices, and no momentum is masked.
        momentum: m, in [0, 1).
        nesterov: Use Nesterov's momentum.
        clip_norm: What one would clip the norm of the averaged gradient to. Workers' gradients are
            clipped instead, before they are accumulated: independent ones have a norm √n times as
            large as that of their average, so to √n · `clip_norm`. (The paper counts g / n as the
            worker's gradient; then it reads clip_norm / √n.)
        workers: n.
        mask_momentum: Set velocities to 0 where they were sent.
        sparsifier: Called with a density, returns what selects entries: `SampledTopK`, `TopK`, …
        values: Compressor of the selected values, e.g. `NaturalCompressor()` or
            `Cast(torch.float16)`; what it rounds off is sent later. None: sent as they are.
        dense_below: Tensors of fewer entries are sent whole.
        pause_zero: See `MomentumCorrection`.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> worker = DGCWorker([(100, 50), (50,)], density=0.01)
        >>> payload = worker.compress(torch.randn(5050))
        >>> int((worker.decompress(payload) != 0).sum())  # 1 % of 5000, and 50 sent whole
        100

    Reference:
        Lin, Han, Mao, Wang, Dally, Deep Gradient Compression, ICLR 2018, algorithm 4,
        https://arxiv.org/abs/1712.01887.
    """

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        *,
        density: float = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        clip_norm: float | None = None,
        workers: int = 1,
        mask_momentum: bool = True,
        sparsifier: Callable[[float], Compressor] = SampledTopK,
        values: Compressor | None = None,
        dense_below: int = 2**10,
        pause_zero: bool = False,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {clip_norm}")
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        shapes = [tuple(shape) for shape in shapes]
        sizes = [math.prod(shape) for shape in shapes]
        _check_momentum(momentum)
        self.blocks = [
            MomentumCorrection(Identity(), momentum, nesterov, mask_momentum, pause_zero)
            for _ in shapes
        ]
        super().__init__(self.blocks, sizes)
        self.momentum = momentum
        self.clip_norm, self.workers = clip_norm, workers
        self.sparsifier, self.values = sparsifier, values
        self._sparse = [
            block
            for block, shape, size in zip(self.blocks, shapes, sizes, strict=True)
            if len(shape) > 1 and size >= dense_below
        ]
        self.density = density

    @property
    def density(self) -> float:
        """Fraction of the entries of large tensors that is sent."""
        return self._density

    @density.setter
    def density(self, density: float) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        self._density = density
        for block in self._sparse:
            block.compressor = self._compressor(density)

    @property
    def inner(self) -> list[Compressor]:
        """What each block sends with: `Identity` where it is sent whole."""
        return [block.compressor for block in self.blocks]

    def _compressor(self, density: float) -> Compressor:
        if density == 1:
            return self.values or Identity()
        sparsifier = self.sparsifier(density)
        return sparsifier if self.values is None else Compose(self.values, sparsifier)

    def compress_blocks(
        self, blocks: Sequence[Tensor], generator: Generator | None = None
    ) -> list[Payload]:
        """Clip the gradient, then compress each parameter's."""
        return super().compress_blocks(self._clipped(blocks), generator)

    def _clipped(self, blocks: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.clip_norm is None or not blocks:
            return blocks
        norms = [torch.linalg.vector_norm(block.double()) for block in blocks]
        norm = float(torch.stack(norms).norm())
        limit = math.sqrt(self.workers) * self.clip_norm
        # A norm that is not finite clips nothing: the worker's blocks see to it.
        return [block * (limit / norm) for block in blocks] if limit < norm < math.inf else blocks


# ----------------------------------------------------------------------------------- process groups

_WARMUP = DensityWarmup()


def _check_warmup(warmup: object) -> None:
    if not (warmup is None or callable(warmup)):
        raise TypeError(
            "warmup must be None or callable as (density, epoch) -> density, got "
            f"{warmup!r}: for four epochs give DensityWarmup(4)"
        )


class DGCState:
    """What `dgc_hook` knows and remembers: deep gradient compression between processes.

    With DDP, two lines: ``state = DGCState(model)`` and
    ``model.register_comm_hook(state, dgc_hook)``. Without DDP, `attach` makes any optimiser
    exchange gradients before it steps. Either way the momentum is here: give the optimiser none, or
    use `assay.optim.DGCSGD` if there is weight decay. Call `step_epoch` after each epoch, and keep
    `state_dict` (of each rank: they differ) in checkpoints.

    Everything is sent once a step, after the last bucket: messages are so short that their latency
    counts more than their overlap with the backward pass, clipping needs the norm of the whole
    gradient, and a step that some rank has to skip is skipped by all of it. Memory is kept by
    parameter, so DDP may rearrange its buckets. If a gradient is not finite on any rank, all ranks
    get NaN (which `GradScaler` sees) and remember nothing of that step.

    Args:
        parameters: A module (plain or in DDP), named parameters, or parameters.
        density: See `DGCWorker`, as for the six arguments below.
        momentum: m, in [0, 1). With 0, momentum stays with the optimiser: gradient dropping.
        nesterov: Use Nesterov's momentum.
        clip_norm: Norm that one would clip the averaged gradient to.
        mask_momentum: Set velocities to 0 where they were sent.
        sparsifier: Called with a density, returns what selects entries.
        values: Compressor of the selected values.
        dense_below: Tensors of fewer entries are averaged whole.
        warmup: From the final density and the epoch to the density, e.g. `DensityWarmup(4)`; None
            for no warm-up.
        loss_scale: For scaled losses, what tells their scale (`GradScaler.get_scale`), so that the
            memory does not depend on it.
        pause_unused: For DDP with `find_unused_parameters`: where a gradient is zero everywhere,
            send nothing and let the velocity rest. DDP drops what comes for parameters that no rank
            used.
        process_group: Ranks to exchange with; all by default. One process alone is a group of one.
        generator: CPU generator for the samples of `SampledTopK` (default: torch's initial seed).

    Attributes:
        epoch: Calls of `step_epoch` so far.
        step: Exchanges so far, skipped ones included.
        skipped: Exchanges in which some rank's gradient was not finite.
        bytes_sent: Bytes that this rank has sent to other ranks, indices and headers included.
        worker: The `DGCWorker` of this process.

    Raises:
        TypeError: `warmup` is neither callable nor None.
        ValueError: A number is out of its range, or there are no parameters that need gradients.

    Warns:
        UserWarning: At the first step of an optimiser that has momentum of its own.

    Example:
        >>> from assay.optim import DGCSGD
        >>> model = nn.Linear(40, 30)
        >>> state = DGCState(model, density=0.01, warmup=None)
        >>> optimizer = DGCSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> handle = state.attach(optimizer)
        >>> model(torch.ones(1, 40)).square().sum().backward()
        >>> optimizer.step()
        >>> int((model.weight.grad != 0).sum())
        12

    Reference:
        Lin, Han, Mao, Wang, Dally, Deep Gradient Compression, ICLR 2018,
        https://arxiv.org/abs/1712.01887.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[Any],
        *,
        density: float = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        clip_norm: float | None = None,
        mask_momentum: bool = True,
        sparsifier: Callable[[float], Compressor] = SampledTopK,
        values: Compressor | None = None,
        dense_below: int = 2**10,
        warmup: Any = _WARMUP,
        loss_scale: Callable[[], float] | None = None,
        pause_unused: bool = False,
        process_group: dist.ProcessGroup | None = None,
        generator: Generator | None = None,
    ) -> None:
        _check_warmup(warmup)
        self.parameters = _named(parameters)
        alone = not (dist.is_available() and dist.is_initialized())
        self.group: dist.ProcessGroup | None = None if alone else process_group or dist.group.WORLD
        self.rank = 0 if alone else dist.get_rank(self.group)
        self.world_size = 1 if alone else dist.get_world_size(self.group)
        self.density, self.loss_scale = density, loss_scale
        self.warmup: Callable[[float, int], float] | None = warmup
        self.worker = DGCWorker(
            [parameter.shape for parameter in self.parameters.values()],
            density=density,
            momentum=momentum,
            nesterov=nesterov,
            clip_norm=clip_norm,
            workers=self.world_size,
            mask_momentum=mask_momentum,
            sparsifier=sparsifier,
            values=values,
            dense_below=dense_below,
            pause_zero=pause_unused,
        )
        start = torch.initial_seed() if generator is None else int(draw_seed(generator))
        self.generator = torch.Generator().manual_seed((start + self.rank) % 2**63)
        self.epoch = self.step = self.skipped = self.bytes_sent = 0
        self._places = {id(p): i for i, p in enumerate(self.parameters.values())}
        self._arrived: dict[int, Tensor] = {}
        self._waiting: list[tuple[Future[Tensor], Tensor]] = []
        self._set_density()
        if momentum > 0:
            _warn_of_momentum(self)

    def _set_density(self) -> None:
        warmup = self.warmup
        density = self.density if warmup is None else warmup(self.density, self.epoch)
        self.worker.density = density

    def step_epoch(self) -> None:
        """Go on to the next epoch of the warm-up."""
        self.epoch += 1
        self._set_density()

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Make `optimizer` exchange gradients before each of its steps, for models without DDP.

        Args:
            optimizer: Any optimiser over the same parameters, without momentum of its own.

        Returns:
            A handle whose `remove` undoes it.
        """
        return optimizer.register_step_pre_hook(lambda *_: self.average_gradients())

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Replace `.grad` of all parameters by what the ranks sent, averaged (without DDP)."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._average([parameter.grad for parameter in self.parameters.values()])

    @torch.no_grad()
    def _average(self, gradients: Sequence[Any]) -> None:
        """Replace gradients, one a parameter, by the average of what all ranks sent."""
        for name, gradient in zip(self.parameters, gradients, strict=True):
            if gradient.layout != torch.strided:
                raise ValueError(f"gradients must be dense, got that of {name}: {gradient.layout}")
        self.step += 1
        if not self._all_finite(gradients):
            self.skipped += 1
            for gradient in gradients:
                gradient.fill_(torch.nan)
            return
        scale = 1.0 if self.loss_scale is None else float(self.loss_scale())
        blocks = [_wide(gradient) for gradient in gradients]
        if scale != 1:
            blocks = [block / scale for block in blocks]
        payloads = self.worker.compress_blocks(blocks, self.generator)
        # Written where the gradients were: from here on `blocks` are no longer what they were.
        outputs = [_output(gradient) for gradient in gradients]
        sent = list(zip(self.worker.inner, payloads, outputs, strict=True))
        factor = scale / self.world_size
        self._average_dense([item for item in sent if isinstance(item[0], Identity)], factor)
        self._average_others([item for item in sent if not isinstance(item[0], Identity)], factor)
        for gradient, output in zip(gradients, outputs, strict=True):
            if output.data_ptr() != gradient.data_ptr():
                gradient.copy_(output.view(gradient.shape))

    def _all_finite(self, gradients: Sequence[Tensor]) -> bool:
        """Whether all gradients of all ranks are."""
        bad = not all(is_finite(gradient) for gradient in gradients)
        if self.world_size == 1:
            return not bad
        anywhere = torch.tensor(int(bad), device=gradients[0].device)
        all_reduce(anywhere, self.group, dist.ReduceOp.MAX)
        self.bytes_sent += ring_bytes(anywhere, self.world_size)
        return not anywhere

    def _average_dense(self, sent: Sequence[Sent], factor: float) -> None:
        """Add what is sent whole in one all-reduce."""
        if not sent:
            return
        flat = torch.cat([payload.tensors[0] for _, payload, _ in sent])
        if self.world_size > 1:
            all_reduce(flat, self.group)
            self.bytes_sent += ring_bytes(flat, self.world_size)
        flat *= factor
        parts = flat.split([len(output) for _, _, output in sent])
        for (_, _, output), part in zip(sent, parts, strict=True):
            output.copy_(part)

    def _average_others(self, sent: Sequence[Sent], factor: float) -> None:
        """Add what all ranks send in one message each; messages may differ in length."""
        if not sent:
            return
        own = Payload(pack([payload for _, payload, _ in sent]), (), sent[0][1].dtype)
        if self.group is None:
            messages = [own]
        else:
            copies = [own.to_bytes()] * self.world_size
            received, bytes_sent = exchange(copies, self.group)
            self.bytes_sent += bytes_sent
            messages = [Payload.from_bytes(message, (), own.dtype) for message in received]
        for message in messages:
            add_message(message, sent, factor)

    def state_dict(self) -> dict:
        """Counters, random state and, by name of parameter, the memory of this rank."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "skipped": self.skipped,
            "bytes_sent": self.bytes_sent,
            "generator": self.generator.get_state(),
            "memory": {
                name: {key: kept.view(parameter.shape) for key, kept in block.state_dict().items()}
                for (name, parameter), block in self._memories()
            },
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` of the same rank was taken.

        Raises:
            ValueError: It is of other parameters.
        """
        memory = state["memory"]
        if set(memory) != set(self.parameters):
            different = sorted(set(memory) ^ set(self.parameters))
            raise ValueError(f"state is of other parameters: {', '.join(different)}")
        for (name, parameter), block in self._memories():
            for key, kept in memory[name].items():
                if kept.shape != parameter.shape:
                    raise ValueError(
                        f"state: {key} of {name} must have shape {tuple(parameter.shape)}, got "
                        f"{tuple(kept.shape)}"
                    )
            device = parameter.device
            block.load_state_dict({k: v.view(-1).to(device) for k, v in memory[name].items()})
        self.epoch, self.step, self.skipped = state["epoch"], state["step"], state["skipped"]
        self.bytes_sent = state["bytes_sent"]
        self.generator.set_state(state["generator"])
        self._set_density()

    def _memories(self) -> Iterable[tuple[tuple[str, Tensor], MomentumCorrection]]:
        return zip(self.parameters.items(), self.worker.blocks, strict=True)

    def __deepcopy__(self, memo: dict) -> "DGCState":
        """Copy with its own memory and the same process group, which cannot be copied.

        It is for the same parameters, unless they are copied in the same call.
        """
        twin = copy.copy(self)
        twin.parameters = {k: memo.get(id(p), p) for k, p in self.parameters.items()}
        twin._places = {id(p): i for i, p in enumerate(twin.parameters.values())}
        twin.worker = copy.deepcopy(self.worker, memo)
        twin.generator = self.generator.clone_state()
        twin._arrived, twin._waiting = {}, []
        if self.worker.momentum > 0:
            _warn_of_momentum(twin)
        return twin


def dgc_hook(state: DGCState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Average gradients by deep gradient compression; a DDP communication hook.

    The exchange follows the last bucket of a backward pass; the futures of all are done then.
    Accumulation under `no_sync` enters once, at the backward pass that synchronises. Averages are
    the same on all ranks bit for bit. On devices other than the CPU (not run on GPU here) plain
    torch operations take the place of the kernels.

    Args:
        state: The settings and the memory, one object for each `register_comm_hook`.
        bucket: Given by DDP.

    Returns:
        A future of the averaged bucket.

    Raises:
        ValueError: The parameters in DDP's buckets are not those of `state`.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.parallel.DistributedDataParallel(nn.Linear(40, 30))
        >>> state = DGCState(model, density=0.01, warmup=None)
        >>> model.register_comm_hook(state, dgc_hook)
        >>> model(torch.ones(1, 40)).sum().backward()
        >>> int((model.module.weight.grad != 0).sum())
        12
        >>> dist.destroy_process_group()

    Reference:
        Lin, Han, Mao, Wang, Dally, Deep Gradient Compression, ICLR 2018,
        https://arxiv.org/abs/1712.01887.
    """
    if bucket.index() == 0:  # also after a backward pass that raised
        state._arrived, state._waiting = {}, []
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        place = state._places.get(id(parameter))
        if place is None:
            raise ValueError("state must hold all parameters of the model that DDP wraps")
        state._arrived[place] = gradient
    buffer = bucket.buffer()
    devices: list[int | str | torch.device] = []
    if buffer.device.type != "cpu":
        devices.append(buffer.device)
    future: Future[Tensor] = Future(devices=devices)
    state._waiting.append((future, buffer))
    if bucket.is_last():
        missing = [k for i, k in enumerate(state.parameters) if i not in state._arrived]
        if missing:
            raise ValueError(f"state holds parameters that DDP does not: {', '.join(missing)}")
        state._average([state._arrived[i] for i in range(len(state.parameters))])
        for waiting, averaged in state._waiting:
            waiting.set_result(averaged)
        state._arrived, state._waiting = {}, []
    return future


def _named(parameters: nn.Module | Iterable[Any]) -> dict[str, Tensor]:
    """Trainable parameters by name, without the prefix that DDP adds."""
    if isinstance(parameters, DistributedDataParallel):
        parameters = parameters.module
    if isinstance(parameters, nn.Module):
        parameters = parameters.named_parameters()
    pairs = [p if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(parameters)]
    named = {name: p for name, p in pairs if p.requires_grad}
    if not named:
        raise ValueError("parameters must hold at least one that needs gradients")
    return named


def _wide(gradient: Tensor) -> Tensor:
    """As a vector of at least 32 bits an entry."""
    return gradient.reshape(-1).to(torch.promote_types(gradient.dtype, torch.float32))


def _output(gradient: Tensor) -> Tensor:
    """Zeros to add to, in the memory of the gradient where its layout and dtype allow."""
    wide = _wide(gradient)
    own = wide.data_ptr() == gradient.data_ptr()
    return wide.zero_() if own else torch.zeros_like(wide)


def _warn_of_momentum(state: DGCState) -> None:
    """Look at the first optimiser that steps these parameters."""
    reference, seen = weakref.ref(state), []

    def look(optimizer: Optimizer, *_: Any) -> None:
        living = reference()
        if living is None or seen:
            return
        groups = optimizer.param_groups
        if not any(id(p) in living._places for group in groups for p in group["params"]):
            return
        seen.append(optimizer)
        doubled = any(group.get("momentum", 0) for group in groups)
        if doubled and not getattr(optimizer, "momentum_of_decay_only", False):
            warnings.warn(
                f"{type(optimizer).__name__} has momentum, and so has DGCState: it is applied "
                "twice. Give the optimiser momentum=0, or use DGCSGD",
                UserWarning,
                stacklevel=2,
            )

    # The registry is not changed while torch goes through it: the handle leaves with the state.
    weakref.finalize(state, register_optimizer_step_pre_hook(look).remove)
