"""Spectra, tangent kernels and LSUV against dense routes, SciPy, curvlinops and lsuv."""

import contextlib
import importlib
import threading
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import scipy
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from assay.analysis import ntk
from assay.functional import HessianOperator, lanczos, top_eigenvalues
from assay.lab import at_most
from assay.lab.bench import Comparison, benchmark
from assay.models import MLP
from assay.optim import lsuv_

Problem = tuple[nn.Module, tuple[Tensor, Tensor]]


def problem() -> Problem:
    """A net of about 100,000 parameters after a little training, and 500 samples."""
    torch.manual_seed(0)
    net = MLP((784, 120, 60, 10), activation="tanh")
    prototypes = torch.randn(10, 784)
    y = torch.randint(10, (500,))
    x = prototypes[y] + torch.randn(500, 784)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(10):
        sgd.zero_grad()
        F.cross_entropy(net(x), y).backward()
        sgd.step()
    return net, (x, y)


def peer(module: str, package: str) -> object:
    """Import a peer, or say in one line what is missing."""
    warnings.simplefilter("ignore")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(f"this row compares with {package}: pip install {package}") from (
            error
        )


STEPS = 20


@benchmark("a Lanczos step against a gradient, MLP of 102,000 parameters", target=at_most(2.5))
def lanczos_against_gradient() -> Comparison:
    net, (x, y) = problem()
    hessian = HessianOperator(net, F.cross_entropy, (x, y))
    params = list(net.parameters())
    g = torch.Generator().manual_seed(0)

    def gradients() -> None:
        for _ in range(STEPS):
            torch.autograd.grad(F.cross_entropy(net(x), y), params)

    return Comparison(
        ours=lambda: lanczos(hessian, STEPS, generator=g),
        peer=gradients,
        peer_name=f"{STEPS} gradients by torch.autograd",
        peer_version=torch.__version__,
        extra={"parameters": float(hessian.numel)},
    )


class Counted(HessianOperator):
    """A Hessian that knows how many products it has made."""

    products = 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.products += 1
        return super().__matmul__(vectors)


def _top_five(theirs: LinearOperator, name: str, of: str, problem: Problem) -> Comparison:
    net, data = problem
    hessian = Counted(net, F.cross_entropy, data)

    def ours() -> Tensor:
        g = torch.Generator().manual_seed(0)
        return top_eigenvalues(hessian, 5, which="largest", tol=1e-3, generator=g)[0]

    def reference() -> Tensor:
        values = eigsh(theirs, k=5, which="LA", tol=1e-3, return_eigenvectors=True)[0]
        return torch.from_numpy(values.copy()).flip(0)

    error = (ours() / reference().float() - 1).abs().max().item()
    products = hessian.products
    return Comparison(
        ours=ours,
        peer=reference,
        peer_name=name,
        peer_version=of,
        extra={"largest relative difference": error, "products": float(products)},
    )


@benchmark("top five eigenvalues to 1e-3, Hessian of 102,000 parameters", target=at_most(1.0))
def eigenvalues_against_scipy() -> Comparison:
    """ARPACK with our products."""
    net, data = problem()
    hessian = HessianOperator(net, F.cross_entropy, data)

    def product(v: object) -> object:
        return (hessian @ torch.as_tensor(v, dtype=torch.float32).flatten()).numpy()

    shape = (hessian.numel, hessian.numel)
    operator = LinearOperator(shape, matvec=product, dtype="float32")
    return _top_five(operator, "eigsh with our products", scipy.__version__, (net, data))


@benchmark(
    "top five eigenvalues to 1e-3 against curvlinops, Hessian of 102,000 parameters",
    target=at_most(1.0),
)
def eigenvalues_against_curvlinops() -> Comparison:
    """ARPACK with curvlinops' products, as its documentation does."""
    curvlinops = peer("curvlinops", "curvlinops-for-pytorch")
    net, data = problem()
    operator = curvlinops.HessianLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [data], check_deterministic=False
    ).to_scipy()
    found = version("curvlinops-for-pytorch")
    return _top_five(operator, "eigsh with curvlinops' products", found, (net, data))


def _kernel_problem() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MLP((784, 120, 60, 10)), torch.randn(64, 784)


def materialised(net: nn.Module, x: Tensor) -> Tensor:
    """The kernel as a product of the whole Jacobian with itself."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def output(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, params, (sample[None],))[0]

    rows = torch.func.vmap(torch.func.jacrev(output), (None, 0))(params, x)
    n, c = len(x), 10
    J = torch.cat([row.reshape(n * c, -1) for row in rows.values()], dim=1)
    return (J @ J.T).view(n, c, n, c).transpose(1, 2)


@contextlib.contextmanager
def growth_of_memory() -> Iterator[list[float]]:
    """Largest growth of this process's resident memory inside the block, in MB."""
    status = Path("/proc/self/statm")

    def resident() -> int:
        return int(status.read_text().split()[1])

    peak = start = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found: list[float] = []
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append((peak - start) * 4096 / 1e6)


@benchmark("tangent kernel of 64 × 64 samples and 10 logits, 102,000 parameters", target=at_most(1))
def kernel_against_jacobian() -> Comparison:
    net, x = _kernel_problem()
    extra: dict[str, float | str] = {}
    reference, found = materialised(net, x), ntk(net, x)
    extra["largest relative difference"] = float(
        (found - reference).abs().max() / reference.abs().max()
    )
    if Path("/proc/self/statm").exists():
        with growth_of_memory() as ours:
            ntk(net, x)
        with growth_of_memory() as theirs:
            materialised(net, x)
        extra |= {"MB": ours[0], "peer's MB": theirs[0], "memory ratio": ours[0] / theirs[0]}
    return Comparison(
        ours=lambda: ntk(net, x),
        peer=lambda: materialised(net, x),
        peer_name="torch.func.jacrev and a product",
        peer_version=torch.__version__,
        extra=extra,
    )


def _deep() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MLP((784, *[256] * 29, 10), activation="tanh"), torch.randn(256, 784)


@benchmark("LSUV of 30 layers against lsuv", target=at_most(0.2))
def lsuv_against_lsuv() -> Comparison:
    theirs = peer("lsuv", "lsuv")
    net, x = _deep()
    return Comparison(
        ours=lambda: lsuv_(net, x),
        peer=lambda: theirs.lsuv_with_singlebatch(net, x, std_tol=0.01, verbose=False),
        peer_name="lsuv",
        peer_version=version("lsuv"),
    )


@benchmark("LSUV of 30 layers against one pass and the orthogonal weights", target=at_most(2))
def lsuv_against_a_pass() -> Comparison:
    """Each layer runs twice: before its scaling, and after it."""
    net, x = _deep()
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]

    def baseline() -> None:
        with torch.no_grad():
            for layer in layers:
                nn.init.orthogonal_(layer.weight)
            net(x)

    return Comparison(
        ours=lambda: lsuv_(net, x),
        peer=baseline,
        peer_name="nn.init.orthogonal_ and a forward pass",
        peer_version=torch.__version__,
    )
