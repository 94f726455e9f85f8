"""Deep gradient compression: selection, compensation, and a whole step against a 1 Gb/s link."""

import itertools
import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from assay.distributed import DGCState, DGCWorker, LinkModel, Payload, SampledTopK, dgc_hook
from assay.distributed.blockwise import pack
from assay.distributed.deep_gradient_compression import add_message
from assay.distributed.testing import spawn
from assay.kernels import threshold
from assay.lab import at_most
from assay.lab.bench import Comparison, Samples, benchmark

N, DENSITY = 10_000_000, 0.001
STEPS = 12


def exact_selection(x: Tensor) -> Tensor:
    return x.abs().topk(int(DENSITY * N), sorted=False).indices


def _selection() -> Comparison:
    x = torch.randn(N)
    sampled = SampledTopK(DENSITY)
    generator = torch.Generator().manual_seed(0)
    counts = [len(sampled.select(x, generator)) for _ in range(10)]
    return Comparison(
        ours=lambda: sampled.select(x, generator),
        peer=lambda: exact_selection(x),
        peer_name="Tensor.abs().topk",
        peer_version=torch.__version__,
        extra={"fewest / k": min(counts) / (DENSITY * N), "most / k": max(counts) / (DENSITY * N)},
    )


@benchmark("selecting 0.1 % of 10 M float32 vs topk", target=at_most(0.25), threads=1)
def selection_against_topk() -> Comparison:
    return _selection()


@benchmark("selecting 0.1 % of 10 M float32 vs topk", target=at_most(0.25), threads=2)
def selection_against_topk_on_two_threads() -> Comparison:
    return _selection()


@benchmark(
    "momentum correction, 10 M float32, vs three eager calls", target=at_most(0.5), threads=1
)
def compensation_against_eager() -> Comparison:
    # Three eager calls move 8 vectors through memory, one pass 5: on a memory-bound machine the
    # ratio cannot fall below 5/8 by that alone.
    u, v, g = (torch.randn(N) for _ in range(3))

    def eager() -> None:
        u.mul_(0.9)
        u.add_(g)
        v.add_(u)

    return Comparison(
        ours=lambda: threshold.compensate_(u, v, g, 0.9),
        peer=eager,
        peer_name="mul_, add_, add_",
        peer_version=torch.__version__,
    )


@benchmark("Nesterov correction, 10 M float32, vs eager calls", target=at_most(0.5), threads=1)
def nesterov_against_eager() -> Comparison:
    u, v, g = (torch.randn(N) for _ in range(3))
    return Comparison(
        ours=lambda: threshold.compensate_(u, v, g, 0.9, nesterov=True),
        peer=lambda: threshold.compensate_reference_(u, v, g, 0.9, nesterov=True),
        peer_name="add_, mul_, +, add_",
        peer_version=torch.__version__,
    )


# -- a whole step --------------------------------------------------------------------------------


def network() -> nn.Module:
    """Return a network of 25.2 M parameters, none of whose gradients is computed."""
    sizes = (1024, 3072, 3072, 3072, 1024)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def _step_against_link(workers: int) -> Samples:
    """Everything a rank does besides sending: check, compress, decode all messages, average."""
    model = network()
    state = DGCState(model, density=DENSITY, warmup=None)
    parameters = list(model.parameters())
    gradients = [torch.randn_like(p) for p in parameters]
    d = sum(g.numel() for g in gradients)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    # The messages of the other ranks have to be decoded too; they are as long as ours.
    theirs = DGCWorker([p.shape for p in parameters], density=DENSITY)
    payloads = theirs.compress_blocks([g.view(-1) for g in gradients])
    message = Payload(pack(payloads), (), torch.float32)
    seconds, busy = [], []
    for _ in range(STEPS + 2):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.as_tensor(parameter.grad).copy_(gradient)
        start, start_busy = time.perf_counter(), time.process_time()
        state.average_gradients()
        outputs = [torch.as_tensor(p.grad).view(-1) for p in parameters]
        sent = list(zip(theirs.inner, payloads, outputs, strict=True))
        for _ in range(workers - 1):
            add_message(message, sent, 1 / workers)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    link = LinkModel(bandwidth=1e9, latency=50e-6)
    return Samples(
        ours=seconds[2:],
        peer=[link.all_reduce(32 * d, workers)] * STEPS,
        peer_name=f"fp32 ring all-reduce of {workers} workers by LinkModel, 1 Gb/s",
        peer_version=torch.__version__,
        extra={
            "parameters": d,
            "CPU time of a step, s": statistics.median(busy[2:]),
            "MB a message": message.nbytes / 1e6,
            "sending it, s": link.seconds((workers - 1) * 8 * message.nbytes, workers - 1),
        },
    )


@benchmark("a DGC step without sending, 25 M, vs the link", target=at_most(0.25), threads=1)
def step_against_link() -> Samples:
    return _step_against_link(2)


@benchmark("a DGC step without sending, 25 M, vs the link", target=at_most(0.25), threads=2)
def step_against_link_on_two_threads() -> Samples:
    return _step_against_link(2)


@benchmark("a DGC step without sending, 25 M, vs the link of 8", target=at_most(0.25), threads=1)
def step_against_link_of_eight() -> Samples:
    return _step_against_link(8)


# -- the hook on one machine ---------------------------------------------------------------------


def steps(model_seed: int) -> dict[str, list[float]]:
    """Time of backward passes without compression and with DGC, in turn."""
    torch.manual_seed(model_seed)
    sizes = (784, 1536, 1536, 1024, 10)
    models = {
        name: DistributedDataParallel(
            nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
        )
        for name in ("none", "DGC")
    }
    models["DGC"].register_comm_hook(DGCState(models["DGC"], warmup=None), dgc_hook)
    x, y = torch.randn(64, 784), torch.randint(0, 10, (64,))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(STEPS + 3):  # the first steps rebuild buckets
        for name, model in models.items():
            dist.barrier()
            start = time.perf_counter()
            nn.functional.cross_entropy(model(x), y).backward()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[3:] for name, times in seconds.items()}


@benchmark("DDP step, DGC vs no compression, 5.2 M parameters, 2 processes on one machine")
def hook_against_none() -> Samples:
    seconds = spawn(steps, 2, 0)[0]
    return Samples(
        ours=seconds["DGC"],
        peer=seconds["none"],
        peer_name="DDP without a hook, through memory",
        peer_version=torch.__version__,
    )
