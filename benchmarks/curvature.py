"""One call of the curvature engine against BackPACK and Opacus, on DeepOBS's two networks."""

import ctypes
import gc
import importlib
import os
import statistics
import subprocess
import sys
import warnings
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from assay.curvature import compute
from assay.lab import at_most
from assay.lab.bench import Benchmark, Comparison, Samples, benchmark
from assay.models import MLP, ThreeConvThreeDense

FIRST_ORDER = ("grad", "grad_batch", "batch_l2", "second_moment", "variance")
NETWORKS = {
    "MLP 784-500³-10, N = 128": (lambda: MLP((784, 500, 500, 500, 10)), (128, 1, 28, 28)),
    "3C3D, N = 32": (ThreeConvThreeDense, (32, 3, 32, 32)),
}
# Quantity, ours, BackPACK's extensions, largest ratio.
ROWS = (
    ("individual gradients", ("grad", "grad_batch"), ("BatchGrad",), 0.5),
    (
        "four first-order quantities",
        FIRST_ORDER,
        ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"),
        0.2,
    ),
    ("KFAC", ("grad", "kfac"), ("KFAC",), 1 / 1.2),
    ("exact GGN diagonal", ("grad", "diag_ggn"), ("DiagGGNExact",), 1 / 1.2),
    ("KFLR", ("grad", "kflr"), ("KFLR",), 1.0),
    ("GGN diagonal and KFLR", ("grad", "diag_ggn", "kflr"), ("DiagGGNExact", "KFLR"), 1 / 1.4),
)


def problem(network: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network without Assay's own classes, images and labels."""
    build, shape = NETWORKS[network]
    torch.manual_seed(0)
    net = nn.Sequential(*build().children())
    return net, torch.randn(shape), torch.randint(10, shape[:1])


def peer(module: str, package: str) -> object:
    """Import a peer, or say in one line what is missing."""
    warnings.simplefilter("ignore")  # hooks that torch will remove, on every backward pass
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(f"this row compares with {package}: pip install {package}") from (
            error
        )


def against_backpack(
    network: str, ours: tuple[str, ...], theirs: tuple[str, ...], *, reuse: bool = True
) -> Comparison:
    """Both with the mean gradient; ours writes into the memory of its last result.

    BackPACK cannot. Without `reuse` ours takes new memory too, and with it the system's time for
    handing it out, which for individual gradients is most of the call on both sides.
    """
    backpack = peer("backpack", "backpack-for-pytorch")
    net, x, y = problem(network)
    loss_fn = nn.CrossEntropyLoss()
    earlier = compute(net, loss_fn, x, y, ours)
    twin = backpack.extend(problem(network)[0])
    twin_loss = backpack.extend(nn.CrossEntropyLoss())
    extensions = [getattr(backpack.extensions, name) for name in theirs]

    def their_call() -> None:
        twin.zero_grad()
        with backpack.backpack(*(extension() for extension in extensions)):
            twin_loss(twin(x), y).backward()

    return Comparison(
        ours=lambda: compute(net, loss_fn, x, y, ours, out=earlier if reuse else None),
        peer=their_call,
        peer_name="BackPACK",
        peer_version=version("backpack-for-pytorch"),
    )


def _rows() -> dict[str, Benchmark]:
    made = {}
    for network, (label, ours, theirs, target), threads in product(NETWORKS, ROWS, (1, 2)):

        def make(network=network, ours=ours, theirs=theirs) -> Comparison:
            return against_backpack(network, ours, theirs)

        plural = "thread" if threads == 1 else "threads"
        name = f"{label}, {network}, {threads} {plural}"
        made[name] = benchmark(name, target=at_most(target), threads=threads)(make)
        if "grad_batch" in ours:

            def afresh(network=network, ours=ours, theirs=theirs) -> Comparison:
                return against_backpack(network, ours, theirs, reuse=False)

            name = f"{label} in new memory, {network}, {threads} {plural}"
            made[name] = benchmark(name, threads=threads)(afresh)
    return made


def _against_opacus(network: str) -> Comparison:
    opacus = peer("opacus.grad_sample", "opacus")
    net, x, y = problem(network)
    loss_fn = nn.CrossEntropyLoss()
    earlier = compute(net, loss_fn, x, y, ["grad_batch"])
    twin = opacus.GradSampleModule(problem(network)[0], loss_reduction="mean")

    def their_call() -> None:
        for p in twin.parameters():
            p.grad = p.grad_sample = None
        loss_fn(twin(x), y).backward()

    return Comparison(
        ours=lambda: compute(net, loss_fn, x, y, ["grad", "grad_batch"], out=earlier),
        peer=their_call,
        peer_name="Opacus",
        peer_version=version("opacus"),
    )


def _opacus_rows() -> dict[str, Benchmark]:
    made = {}
    for network, threads in product(NETWORKS, (1, 2)):

        def make(network=network) -> Comparison:
            return _against_opacus(network)

        plural = "thread" if threads == 1 else "threads"
        name = f"individual gradients against Opacus, {network}, {threads} {plural}"
        made[name] = benchmark(name, target=at_most(0.5), threads=threads)(make)
    return made


# -- memory --------------------------------------------------------------------------------------

# Freed memory goes back to the system at once, so that what is resident is what is alive.
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip


def peak_memory(network: str, label: str, side: str) -> float:
    """MB (10⁶ bytes) by which one call raises the peak of the resident memory of this process.

    To 0.1 MB: from process to process it varies by some pages.

    Both sides alike: a first call brings in what is imported late and the libraries' own
    workspaces; its results are dropped; then one call makes new ones. Nothing is written over.

    Args:
        network: of `NETWORKS`.
        label: of `ROWS`.
        side: "ours" or "peer".
    """
    ours, theirs = next(row[1:3] for row in ROWS if row[0] == label)
    torch.set_num_threads(1)
    net, x, y = problem(network)
    loss_fn = nn.CrossEntropyLoss()
    attributes = {p: set(vars(p)) for p in net.parameters()}
    if side == "ours":

        def call() -> object:
            return compute(net, loss_fn, x, y, ours)
    else:
        backpack = peer("backpack", "backpack-for-pytorch")
        net, loss_fn = backpack.extend(net), backpack.extend(loss_fn)

        def call() -> object:
            with backpack.backpack(*(getattr(backpack.extensions, name)() for name in theirs)):
                loss_fn(net(x), y).backward()
            return net

    call()
    for p, kept in attributes.items():  # where BackPACK leaves its results
        p.grad = None
        for name in set(vars(p)) - kept:
            delattr(p, name)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM")
    del result
    return round(peak - before, 1)


def _resident(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(entry + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def _peaks(network: str, label: str) -> Samples:
    peer("backpack", "backpack-for-pytorch")
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    for side in ("ours", "peer") * 3:  # a page more or less from process to process
        run = subprocess.run(
            [sys.executable, __file__, network, label, side], env={**os.environ, **GIVE_BACK},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[side].append(float(run.stdout))
    ours, theirs = map(statistics.median, found.values())
    return Samples(
        found["ours"], found["peer"], "BackPACK", version("backpack-for-pytorch"),
        extra={"MB": ours, "BackPACK's MB": theirs}, unit="MB",
    )  # fmt: skip


def _memory_rows() -> dict[str, Benchmark]:
    made = {}
    for network, (label, *_) in product(NETWORKS, ROWS):

        def make(network=network, label=label) -> Samples:
            return _peaks(network, label)

        name = f"peak memory of one call, {label}, {network}"
        made[name] = benchmark(name, target=at_most(1.0))(make)
    return made


# The harness collects what the module holds.
globals().update(_rows())
globals().update(_opacus_rows())
globals().update(_memory_rows())

if __name__ == "__main__":
    print(peak_memory(*sys.argv[1:4]))
