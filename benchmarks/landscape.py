"""Loss surfaces: many weight vectors at once, widths along directions, curvature along one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.curvature import directional_curvature
from assay.functional import call_with_vector, parameters_to_vector
from assay.lab import at_most
from assay.lab.bench import Benchmark, Comparison, benchmark
from assay.landscape import (
    MultiPointLoss,
    PlaneModel,
    TrajectoryPCA,
    flatness,
    random_plane,
    scan_plane,
)
from assay.models import MLP

VERSION = torch.__version__


def _data(samples: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(samples, 784, generator=g), torch.randint(10, (samples,), generator=g)


def _scan(samples: int) -> Comparison:
    torch.manual_seed(0)
    net = MLP((784, 64, 64, 10)).eval()
    x, y = _data(samples)
    plane = random_plane(net)
    axis = torch.linspace(-1, 1, 9)
    origin = parameters_to_vector(net)

    @torch.no_grad()
    def loop() -> Tensor:
        losses = []
        for a in axis:
            for b in axis:
                out = call_with_vector(net, origin + a * plane[0] + b * plane[1], x)
                losses.append(F.cross_entropy(out, y))
        return torch.stack(losses)

    def ours() -> Tensor:
        return scan_plane(net, plane, {"data": [(x, y)]}, first=axis, second=axis)["data"].loss

    assert torch.allclose(ours().float(), loop(), rtol=1e-4)
    return Comparison(ours, loop, "one forward pass a point", VERSION)


def _scan_rows() -> list[Benchmark]:
    return [
        benchmark(f"plane of 81 points, MLP 784-64-64-10, {n} samples", target=at_most(1 / 3))(
            lambda n=n: _scan(n)
        )
        for n in (128, 1024)
    ]


scan_128, scan_1024 = _scan_rows()


@benchmark("step of a plane at 16 points, MLP 784-64-64-10, batch 128", target=at_most(1 / 3))
def plane_step() -> Comparison:
    """A training step of multi-point optimisation against one pass a point."""
    torch.manual_seed(0)
    plane = PlaneModel([MLP((784, 64, 64, 10)) for _ in range(3)])
    template = MLP((784, 64, 64, 10))
    x, y = _data(128)
    points = torch.randn(16, 2)
    good = torch.arange(16) < 8
    criterion = MultiPointLoss()

    def ours() -> None:
        criterion(plane(x, points), y, good).backward()

    def loop() -> None:
        logits = [call_with_vector(template, w, x) for w in plane.weights(points)]
        criterion(torch.stack(logits), y, good).backward()

    return Comparison(ours, loop, "one pass a point", VERSION)


@benchmark("widths along 40 directions of a hidden layer, 2,000 images", target=at_most(0.25))
def widths() -> Comparison:
    """Both sides of 40 directions, against a loop of bisections with whole forward passes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, 50, bias=False), nn.ReLU(), nn.Linear(50, 50, bias=False), nn.ReLU(),
        nn.Linear(50, 10, bias=False),
    ).eval()  # fmt: skip
    x, y = _data(2000)
    directions = F.normalize(torch.randn(40, 2500), dim=1)
    weight = net[2].weight
    start = weight.detach().clone()

    def ours() -> Tensor:
        return flatness(
            net, F.cross_entropy, (x, y), directions, params=["2.weight"], step=0.5, rtol=1e-3
        ).width

    @torch.no_grad()
    def loop() -> list[float]:
        level = math.e * F.cross_entropy(net(x), y).item()

        def excess(d: Tensor, t: float) -> float:
            weight.copy_(start + t * d)
            return F.cross_entropy(net(x), y).item() - level

        found = []
        for d in directions:
            total = 0.0
            for side in (d.view(50, 50), -d.view(50, 50)):
                low, high = 0.0, 0.5
                while excess(side, high) < 0:
                    low, high = high, 2 * high
                while high - low > 1e-3 * (low + high) / 2:
                    middle = (low + high) / 2
                    if excess(side, middle) < 0:
                        low = middle
                    else:
                        high = middle
                total += (low + high) / 2
            found.append(total)
        weight.copy_(start)
        return found

    assert torch.allclose(ours(), torch.tensor(loop()).double(), rtol=3e-3)
    return Comparison(ours, loop, "loop of bisections", VERSION)


@benchmark("curvature along the gradient, MLP 784-512-512-10, 256 images", target=at_most(1 / 1.3))
def along_the_gradient() -> Comparison:
    """κ, κ_G and κ_H against a Hessian product by double backward and a second pass for G."""
    torch.manual_seed(0)
    net = MLP((784, 512, 512, 10))
    x, y = _data(256)
    params = list(net.parameters())

    def ours() -> float:
        return directional_curvature(net, F.cross_entropy, (x, y)).total

    def peer() -> tuple[float, float, float]:
        loss = F.cross_entropy(net(x), y)
        g = torch.autograd.grad(loss, params)
        squared = sum((a * a).sum() for a in g)
        again = torch.autograd.grad(F.cross_entropy(net(x), y), params, create_graph=True)
        Hg = torch.autograd.grad(again, params, g)
        total = sum((a * b).sum() for a, b in zip(g, Hg, strict=True)) / squared
        z = net(x)
        w = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, params, w, create_graph=True)
        (u,) = torch.autograd.grad(pulled, w, g)
        p = z.softmax(1)
        form = ((p * u * u).sum(1) - (p * u).sum(1).square()).mean() / squared
        bent = (p * u - p * (p * u).sum(1, keepdim=True)) / len(x)
        Gg = torch.autograd.grad(net(x), params, bent.detach())
        residual = [a - b for a, b in zip(Hg, Gg, strict=True)]
        length = sum((a * a).sum() for a in residual).sqrt()
        return float(total.detach()), float(form.detach()), float(length.detach())

    assert abs(ours() - peer()[0]) < 1e-3 * abs(ours())
    return Comparison(ours, peer, "double backward and further passes", VERSION)


@benchmark("PCA of a trajectory, 400 snapshots of 2,500 weights", target=None)
def trajectory_pca() -> Comparison:
    """Against scikit-learn's full PCA."""
    import sklearn
    from sklearn.decomposition import PCA

    walk = torch.randn(400, 2500, generator=torch.Generator().manual_seed(0)).cumsum(0)
    array = walk.double().numpy()
    return Comparison(
        lambda: TrajectoryPCA().fit(walk), lambda: PCA().fit(array), "sklearn PCA",
        sklearn.__version__,
    )  # fmt: skip
