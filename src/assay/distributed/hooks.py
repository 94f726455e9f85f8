"""Compressed gradient exchange for `DistributedDataParallel` and FSDP2.

Compressed messages cannot be added on the way, so an all-reduce becomes: cut the vector into one
shard a rank, send each compressed shard to its owner, let owners add, and gather the compressed
sums. Every rank decodes the same bytes and holds the same result bit for bit.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Generator, Tensor
from torch.futures import Future

from assay.distributed import integer_aggregation as integers
from assay.distributed.combinations import ErrorFeedback
from assay.distributed.compressors import Compressor, NaturalCompressor, draw_seed
from assay.distributed.payload import Payload

__all__ = [
    "CompressionState",
    "two_way_compression_hook",
    "CompressedReduceScatter",
    "all_reduce",
    "exchange",
    "ring_bytes",
]


class CompressionState:
    """What `two_way_compression_hook` knows and remembers.

    To be constructed by all ranks at the same point: it opens a process group of its own, so that
    its messages never mix with other communication.

    Args:
        process_group: Ranks to exchange with; all by default. Its timeout is kept.
        worker: Compressor C_W of each rank's gradient (default: natural compression).
        master: Compressor C_M of the sum (default: natural compression).
        generator: CPU generator that randomness starts from (default: torch's initial seed). Each
            rank draws different numbers even when generators are seeded alike.
        warmup_steps: Steps at the beginning that are averaged without compression.
        min_numel: Buckets with fewer entries than this are averaged without compression.

    Attributes:
        step: Backward passes so far.
        bytes_sent: Bytes that this rank has sent to other ranks.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        TypeError: `worker` or `master` is not a compressor.
        ValueError: `worker` or `master` is `ErrorFeedback` (the hook compresses shards of buckets,
            which DDP rearranges), or a number is negative.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
        >>> state = CompressionState()
        >>> model.register_comm_hook(state, two_way_compression_hook)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> model.module.weight.grad, state.step
        (tensor([[1., 1., 1.]]), 1)
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        worker: Compressor | None = None,
        master: Compressor | None = None,
        generator: Generator | None = None,
        warmup_steps: int = 0,
        min_numel: int = 0,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed must be initialised before CompressionState")
        self.worker = NaturalCompressor() if worker is None else worker
        self.master = NaturalCompressor() if master is None else master
        for name, compressor in (("worker", self.worker), ("master", self.master)):
            _check_compressor(name, compressor)
        if warmup_steps < 0 or min_numel < 0:
            raise ValueError(
                "warmup_steps and min_numel must not be negative, got "
                f"{warmup_steps} and {min_numel}"
            )
        self.warmup_steps, self.min_numel = warmup_steps, min_numel
        group = dist.new_group(
            dist.get_process_group_ranks(process_group or dist.group.WORLD),
            timeout=_timeout(process_group or dist.group.WORLD),
            backend=dist.get_backend(process_group),
            use_local_synchronization=True,
        )
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError("process_group must contain this rank")
        self.group = group
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        start = torch.initial_seed() if generator is None else int(draw_seed(generator))
        self.generator = torch.Generator().manual_seed((start + self.rank) % 2**63)
        self.step = 0
        self.bytes_sent = 0

    def state_dict(self) -> dict:
        """Step, traffic and random state of this rank (they differ by rank)."""
        return {
            "step": self.step,
            "bytes_sent": self.bytes_sent,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` of the same rank was taken."""
        self.step, self.bytes_sent = state["step"], state["bytes_sent"]
        self.generator.set_state(state["generator"])

    def __deepcopy__(self, memo: dict) -> "CompressionState":
        """Copy with its own random state and the same process group, which cannot be copied."""
        twin = copy.copy(self)
        vars(twin).pop("_thread", None)
        twin.generator = self.generator.clone_state()
        return twin

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        """Works buckets off in their order while the backward pass goes on.

        One thread only: collectives must start in the same order on every rank.
        """
        return ThreadPoolExecutor(1, thread_name_prefix="assay-hook")


def _timeout(group: Any) -> timedelta | None:
    """What a group was opened with; a new one would wait for half an hour instead."""
    device = torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")
    return getattr(group._get_backend(device).options, "_timeout", None)


def two_way_compression_hook(state: CompressionState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Average a bucket as C_M(Σᵢ C_W(gᵢ)) / n; a DDP communication hook.

    Infinities and NaN pass, so `GradScaler` sees them; float16 and bfloat16 buckets are added in
    float32. With `NaturalCompressor(integer=True)` as worker the ranks add integers (see
    `assay.distributed.integer_aggregation`), unless one of them holds a value that is not finite:
    then that bucket is averaged without compression.

    On CPU the work runs beside the backward pass in a thread; on other devices (not run on GPU
    here) in place, on the current stream.

    Args:
        state: The settings, one object for each `register_comm_hook`.
        bucket: Given by DDP.

    Returns:
        A future of the averaged bucket.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
        >>> model.register_comm_hook(CompressionState(), two_way_compression_hook)
        >>> dist.destroy_process_group()

    Reference:
        Horváth et al., Natural Compression for Distributed Deep Learning, 2019,
        https://arxiv.org/abs/1905.10988.
    """
    buffer = bucket.buffer()
    dense = state.step < state.warmup_steps or buffer.numel() < state.min_numel
    if dense:
        average = _average
    elif isinstance(state.worker, NaturalCompressor) and state.worker.integer:
        average = _average_integers
    else:
        average = _average_compressed
    if bucket.is_last():
        state.step += 1
    return _in_order(state, functools.partial(_into_buffer, average, state, buffer), buffer.device)


def _in_order(
    state: CompressionState, work: Callable[[], Tensor], device: torch.device
) -> Future[Tensor]:
    if device.type != "cpu":
        done: Future[Tensor] = Future(devices=[device])
        done.set_result(work())
        return done
    future: Future[Any] = Future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # DDP raises it at the end of the backward pass
            future.set_exception(error)
        else:
            future.set_result(result)

    state._thread.submit(run)
    return future


@torch.no_grad()
def _into_buffer(average: Callable, state: CompressionState, buffer: Tensor) -> Tensor:
    wide = buffer.to(torch.promote_types(buffer.dtype, torch.float32))  # itself, unless 16 bits
    average(state, wide)
    return buffer if wide is buffer else buffer.copy_(_fitting(wide, buffer.dtype))


def _fitting(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding up must not turn what `dtype` can hold into infinity."""
    if x.dtype == dtype:
        return x
    largest = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x)


# Each of these replaces x by the average over ranks, in place.


def _average(state: CompressionState, x: Float[Tensor, " d"]) -> None:
    x /= state.world_size
    all_reduce(x, state.group)
    state.bytes_sent += ring_bytes(x, state.world_size)


def _average_compressed(state: CompressionState, x: Float[Tensor, " d"]) -> None:
    shards = x.tensor_split(state.world_size)
    messages = [state.worker.compress(s, generator=state.generator).to_bytes() for s in shards]
    received, sent = exchange(messages, state.group)
    state.bytes_sent += sent
    total = _decoded_sum(received, shards[state.rank], state.worker)
    message = state.master.compress(total, generator=state.generator).to_bytes()
    # The owner alone draws for its shard; it sends it to itself too, so that all decode alike.
    received, sent = exchange([message] * state.world_size, state.group)
    state.bytes_sent += sent
    for theirs, shard in zip(received, shards, strict=True):
        shard.copy_(state.master.decompress(Payload.from_bytes(theirs, shard.shape, x.dtype)))
    x /= state.world_size


def _average_integers(state: CompressionState, x: Float[Tensor, " d"]) -> None:
    n, compressor = state.world_size, NaturalCompressor()
    rounded = compressor.decompress(compressor.compress(x, generator=state.generator))
    # The first rank's seed comes with the exponent: all round the sum with the same numbers.
    seed = int(draw_seed(state.generator)) if state.rank == 0 else 0
    agreed = torch.stack([integers.largest_exponent(rounded).cpu(), torch.tensor(seed)])
    agreed = agreed.to(x.device)
    all_reduce(agreed, state.group, dist.ReduceOp.MAX)
    state.bytes_sent += ring_bytes(agreed, n)
    exponent, seed = agreed.tolist()
    if exponent == integers.NOT_FINITE:
        _average(state, x)
        return
    total = integers.to_integers(rounded, exponent, n, state.generator)
    all_reduce(total, state.group)
    state.bytes_sent += ring_bytes(total, n)
    master = seed if isinstance(state.master, NaturalCompressor) else None
    x.copy_(integers.from_integers(total, exponent, n, x.dtype, master)).div_(n)


class CompressedReduceScatter:
    """Reduce-scatter of compressed gradients for FSDP2's `set_custom_reduce_scatter`.

    The first half of `two_way_compression_hook`: every rank sends its compressed shards to their
    owners, who add them. FSDP2 has no second half, since only the owner needs the sum.

    Args:
        worker: Compressor C_W (default: natural compression).
        generator: CPU generator that randomness starts from (default: torch's initial seed); each
            rank draws different numbers.

    Attributes:
        bytes_sent: Bytes that this rank has sent to other ranks.

    Raises:
        TypeError: `worker` is not a compressor.
        ValueError: `worker` is `ErrorFeedback`.

    Example:
        >>> def shard(model):  # in each process, with torch ≥ 2.9
        ...     from torch.distributed.fsdp import fully_shard
        ...     fully_shard(model).set_custom_reduce_scatter(CompressedReduceScatter())
    """

    def __init__(
        self, worker: Compressor | None = None, generator: Generator | None = None
    ) -> None:
        self.worker = NaturalCompressor() if worker is None else worker
        _check_compressor("worker", self.worker)
        start = torch.initial_seed() if generator is None else int(draw_seed(generator))
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.generator = torch.Generator().manual_seed((start + rank) % 2**63)
        self.bytes_sent = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give FSDP2 a buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """Write the sum (or, for `ReduceOp.AVG`, mean) of this rank's shard to `output_tensor`."""
        n = dist.get_world_size(group)
        wide = input_tensor.view(-1).to(torch.promote_types(input_tensor.dtype, torch.float32))
        shards = wide.tensor_split(n)
        messages = [self.worker.compress(s, generator=self.generator).to_bytes() for s in shards]
        received, sent = exchange(messages, group)
        self.bytes_sent += sent
        total = _decoded_sum(received, shards[dist.get_rank(group)], self.worker)
        if op == dist.ReduceOp.AVG:
            total /= n
        elif op != dist.ReduceOp.SUM:
            raise ValueError(f"op must be ReduceOp.SUM or ReduceOp.AVG, got {op}")
        output_tensor.copy_(_fitting(total, output_tensor.dtype).view(output_tensor.shape))


def _check_compressor(name: str, compressor: object) -> None:
    if not isinstance(compressor, Compressor):
        raise TypeError(f"{name} must be a compressor, got {type(compressor).__name__}")
    if isinstance(compressor, ErrorFeedback):
        raise ValueError(
            f"{name} must keep no memory, got {compressor!r}: buckets are cut into shards and "
            "rearranged by DDP"
        )


@contextlib.contextmanager
def losing_ranks(group: Any) -> Iterator[None]:
    """Say in plain words what an error of a collective inside means: another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} lost another rank while it exchanged gradients: one of "
            "them ended, or was silent for the timeout of the process group. Restart all ranks "
            "from their last checkpoint."
        ) from error


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce in place, with a clear error when a rank is lost; gives `x` back."""
    with losing_ranks(group or dist.group.WORLD):
        dist.all_reduce(x, op, group=group)
    return x


def exchange(
    messages: list[UInt8[Tensor, " _"]], group: dist.ProcessGroup
) -> tuple[list[UInt8[Tensor, " _"]], int]:
    """Send a message to each rank of a group, whatever their lengths.

    Receives are posted before sends: gloo tells the sender of a receive in the same stream as data,
    and a note behind megabytes of data would make the two directions wait for each other.

    Args:
        messages: The i-th is for rank i of the group; this rank's own is handed back as it is.
        group: Ranks that all call this.

    Returns:
        What all ranks sent to this one, and the bytes that left it.
    """
    rank, device = dist.get_rank(group), messages[0].device
    sizes = torch.tensor([len(message) for message in messages], device=device)
    theirs = torch.empty_like(sizes)
    with losing_ranks(group):
        dist.all_to_all_single(theirs, sizes, group=group)
    others = [peer for peer in range(len(messages)) if peer != rank]
    received = list(messages)
    for peer in others:
        received[peer] = torch.empty(int(theirs[peer]), dtype=torch.uint8, device=device)
    receives = [dist.P2POp(dist.irecv, received[i], group=group, group_peer=i) for i in others]
    sends = [dist.P2POp(dist.isend, messages[i], group=group, group_peer=i) for i in others]
    if others:
        with losing_ranks(group):
            for work in dist.batch_isend_irecv([*receives, *sends]):
                work.wait()
    return received, sum(len(messages[i]) + sizes.element_size() for i in others)


def _decoded_sum(messages: list[Tensor], like: Tensor, compressor: Compressor) -> Tensor:
    first, *others = (
        compressor.decompress(Payload.from_bytes(message, like.shape, like.dtype))
        for message in messages
    )
    for other in others:
        first += other
    return first


def ring_bytes(x: Tensor, workers: int) -> int:
    """Bytes that a rank sends in a ring all-reduce of `x`."""
    return 2 * (workers - 1) * x.numel() * x.element_size() // workers
