"""One call of the curvature engine against BackPACK and Opacus, on DeepOBS's two networks."""

import importlib
import warnings
from importlib.metadata import version
from itertools import product

import torch
from torch import Tensor, nn

from assay.curvature import compute
from assay.lab import at_most
from assay.lab.bench import Benchmark, Comparison, benchmark
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


def against_backpack(network: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> Comparison:
    """Both with the mean gradient; ours writes into the memory of its last result."""
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
        ours=lambda: compute(net, loss_fn, x, y, ours, out=earlier),
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


# The harness collects what the module holds.
globals().update(_rows())
globals().update(_opacus_rows())
