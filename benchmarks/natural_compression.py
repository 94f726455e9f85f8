"""Natural compression: rounding and packing in one pass, and the DDP hook against torch's own."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from assay.distributed import CompressionState, two_way_compression_hook
from assay.distributed.testing import spawn
from assay.kernels import natural
from assay.lab import at_most
from assay.lab.bench import Comparison, Samples, benchmark

N = 10_000_000
STEPS = 12


def eager_bit_trick(x: Tensor) -> Tensor:
    """Rounding alone, without guards for NaN, infinity and subnormal numbers, and no packing."""
    random = torch.randint(0, 1 << 23, x.shape, dtype=torch.int32)
    return ((x.view(torch.int32) + random) & -(1 << 23)).view(torch.float32)


def _against(ours: Callable[[Tensor], object], peer: Callable[[Tensor], object], name: str) -> Any:
    x = torch.randn(N)
    bits = 8 * sum(part.nbytes for part in natural.natural_pack(x, 0)) / N
    return Comparison(
        ours=lambda: ours(x),
        peer=lambda: peer(x),
        peer_name=name,
        peer_version=torch.__version__,
        extra={"bits a value": bits},
    )


@benchmark("rounding + packing vs clone, 10 M float32", target=at_most(2.5), threads=1)
def packing_against_clone() -> Comparison:
    return _against(lambda x: natural.natural_pack(x, 1), torch.clone, "Tensor.clone")


@benchmark("rounding + packing vs clone, 10 M float32", target=at_most(2.5), threads=2)
def packing_against_clone_on_two_threads() -> Comparison:
    return _against(lambda x: natural.natural_pack(x, 1), torch.clone, "Tensor.clone")


@benchmark("rounding + packing vs eager bit trick, 10 M float32", target=at_most(0.25), threads=1)
def packing_against_eager() -> Comparison:
    return _against(lambda x: natural.natural_pack(x, 1), eager_bit_trick, "torch, eager, unpacked")


@benchmark("rounding vs eager bit trick, 10 M float32", threads=1)
def rounding_against_eager() -> Comparison:
    return _against(lambda x: natural.natural_round(x, 1), eager_bit_trick, "torch, eager")


@benchmark("unpacking vs clone, 10 M float32", threads=1)
def unpacking_against_clone() -> Comparison:
    packed = natural.natural_pack(torch.randn(N), 1)
    return _against(
        lambda x: natural.natural_unpack(packed, torch.float32), torch.clone, "Tensor.clone"
    )


# -- two processes -------------------------------------------------------------------------------


def network() -> nn.Module:
    """Return a network of 5.2 M parameters."""
    torch.manual_seed(0)
    sizes = (784, 1536, 1536, 1024, 10)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@contextlib.contextmanager
def counting(counted: list[int]) -> Iterator[None]:
    """Add up what a rank sends in ring all-reduces that other hooks start."""
    all_reduce, workers = dist.all_reduce, dist.get_world_size()

    def counted_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted[0] += 2 * (workers - 1) * tensor.nbytes // workers
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counted_all_reduce):
        yield


def register(model: DistributedDataParallel, hook: str) -> Callable[[], int]:
    """Register a hook; what is returned tells the bytes this rank has sent in it so far."""
    if hook == "natural":
        state = CompressionState()
        model.register_comm_hook(state, two_way_compression_hook)
        return lambda: state.bytes_sent
    if hook == "float16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "none":
        model.register_comm_hook(None, default_hooks.allreduce_hook)
    else:
        settings = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=4, start_powerSGD_iter=2
        )
        model.register_comm_hook(settings, powerSGD_hook.powerSGD_hook)
    return lambda: 0


def steps(hooks: tuple[str, str]) -> dict[str, dict[str, Any]]:
    """Time of training steps with each hook in turn, and the bytes of the last."""
    # PowerSGD's exchanges of several buckets can meet each other on gloo: it gets one.
    caps = {"PowerSGD": 10_000}
    models = {
        hook: DistributedDataParallel(network(), bucket_cap_mb=caps.get(hook, 25)) for hook in hooks
    }
    bytes_sent = {hook: register(models[hook], hook) for hook in hooks}
    x, y = torch.randn(64, 784), torch.randint(0, 10, (64,))
    seconds: dict[str, list[float]] = {hook: [] for hook in hooks}
    last = dict.fromkeys(hooks, 0)
    counted = [0]
    with counting(counted):
        for _ in range(STEPS + 4):  # the first steps rebuild buckets and start PowerSGD
            for hook in hooks:
                dist.barrier()
                before = counted[0] if hook != "natural" else bytes_sent[hook]()
                start = time.perf_counter()
                nn.functional.cross_entropy(models[hook](x), y).backward()
                seconds[hook].append(time.perf_counter() - start)
                after = counted[0] if hook != "natural" else bytes_sent[hook]()
                last[hook] = after - before
    return {hook: {"seconds": seconds[hook][4:], "bytes": last[hook]} for hook in hooks}


def _hook_against(peer: str, name: str) -> Samples:
    results = spawn(steps, 2, ("natural", peer))[0]
    return Samples(
        ours=results["natural"]["seconds"],
        peer=results[peer]["seconds"],
        peer_name=name,
        peer_version=torch.__version__,
        extra={
            "MB sent, ours": results["natural"]["bytes"] / 1e6,
            "MB sent, peer": results[peer]["bytes"] / 1e6,
        },
    )


@benchmark("DDP step, natural vs no compression, 5.2 M parameters, 2 processes")
def hook_against_none() -> Samples:
    return _hook_against("none", "allreduce_hook")


@benchmark("DDP step, natural vs float16, 5.2 M parameters, 2 processes")
def hook_against_float16() -> Samples:
    return _hook_against("float16", "fp16_compress_hook")


@benchmark("DDP step, natural vs PowerSGD, 5.2 M parameters, 2 processes")
def hook_against_powersgd() -> Samples:
    return _hook_against("PowerSGD", "powerSGD_hook, rank 4")
