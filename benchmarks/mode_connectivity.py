"""Curves between networks: training steps on a curve, and evaluation along it.

A step on a curve makes passes over the weights that a plain step does not: φ(t) from three points,
its gradient in one vector, the gradient of ‖φ(t)‖² and a factor. How long they take by themselves
is the row's "passes over the weights / plain step"; a ratio below one and that share cannot be had.
For the MLP, which has many weights for the work done with them, it was 0.23 at batch 64 and 0.15 at
batch 256, so that the target of 1.15 is out of reach. What remains is overhead: views of φ(t) in
autograd's graph, fresh memory, the call with other weights.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.functional import parameters_to_vector
from assay.lab import at_most
from assay.lab.bench import Comparison, benchmark
from assay.landscape import BezierCurve, evaluate
from assay.models import build

SIZES = (784, 128, 128, 10)
WEIGHT_DECAY = 5e-4


class CurveLinear(nn.Module):
    """The usual way to find curves: every layer written again, with a weight for each bend."""

    def __init__(self, ends: list[nn.Linear]) -> None:
        super().__init__()
        middle = [
            torch.lerp(*pair, 0.5) for pair in zip(*(e.parameters() for e in ends), strict=True)
        ]
        self.weights = nn.ParameterList(
            [ends[0].weight.detach(), middle[0].detach(), ends[1].weight.detach()]
        )
        self.biases = nn.ParameterList(
            [ends[0].bias.detach(), middle[1].detach(), ends[1].bias.detach()]
        )
        for fixed in (self.weights[0], self.weights[2], self.biases[0], self.biases[2]):
            fixed.requires_grad_(False)
        self.l2 = torch.zeros(())

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """The layer at φ(t), which it computes anew."""
        weight, bias = (
            sum(c * w for c, w in zip(coefficients, weights, strict=True))
            for weights in (self.weights, self.biases)
        )
        self.l2 = weight.square().sum() + bias.square().sum()
        return F.linear(x, weight, bias)


class CurveMLP(nn.Module):
    """A Bezier curve between two MLPs of re-written layers."""

    def __init__(self, ends: list[nn.Sequential]) -> None:
        super().__init__()
        pairs = zip(*([m for m in end if isinstance(m, nn.Linear)] for end in ends), strict=True)
        self.layers = nn.ModuleList(CurveLinear(list(pair)) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at a t drawn from U(0, 1)."""
        t = torch.rand(())
        coefficients = torch.stack(((1 - t) ** 2, 2 * t * (1 - t), t**2))
        for layer in self.layers[:-1]:
            x = F.relu(layer(x, coefficients))
        return self.layers[-1](x, coefficients)


def mlp() -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(SIZES):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def training_step(
    model: nn.Module, x: Tensor, y: Tensor, penalty: Callable[[], Tensor] | None, decay: float
) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=decay)
    model.train()

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        if penalty is not None:
            loss = loss + 0.5 * WEIGHT_DECAY * penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def passes_over_weights(curve: BezierCurve) -> Callable[[], None]:
    """The arithmetic on whole weight vectors that a step on a curve needs beyond a plain step."""
    first, last = curve.ends
    bend, gradient = curve.inner[0].detach(), torch.randn_like(first)
    parts = gradient.split([shape.numel() for shape in curve.layout.shapes])

    def passes() -> None:
        point = torch.add(torch.add(0.25 * first, last, alpha=0.25), bend, alpha=0.5)
        point.dot(point)
        torch.cat(parts).add_(point * WEIGHT_DECAY).mul_(0.5)

    return passes


def seconds(call: Callable[[], None]) -> float:
    """Median time of a call."""
    times = []
    for _ in range(50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain_and_curve(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> Comparison:
    """A step on a curve against a step on the network itself, both with weight decay."""
    torch.manual_seed(0)
    curve = BezierCurve([make(), make()])
    plain = training_step(make(), x, y, None, decay=WEIGHT_DECAY)
    return Comparison(
        ours=training_step(curve, x, y, curve.l2, decay=0.0),
        peer=plain,
        peer_name="the same step on the plain network",
        peer_version=torch.__version__,
        extra={
            "parameters": float(curve.layout.numel),
            "batch": float(len(x)),
            "passes over the weights / plain step": seconds(passes_over_weights(curve))
            / seconds(plain),
        },
    )


@benchmark("training step on a Bezier curve vs plain step, MLP, batch 64", target=at_most(1.15))
def step_mlp_64() -> Comparison:
    return plain_and_curve(mlp, torch.randn(64, 784), torch.randint(10, (64,)))


@benchmark("training step on a Bezier curve vs plain step, MLP, batch 256", target=at_most(1.15))
def step_mlp_256() -> Comparison:
    return plain_and_curve(mlp, torch.randn(256, 784), torch.randint(10, (256,)))


@benchmark(
    "training step on a Bezier curve vs plain step, ResNet-20, batch 64", target=at_most(1.15)
)
def step_resnet_64() -> Comparison:
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    return plain_and_curve(lambda: build("resnet20"), images, labels)


@benchmark("training step on a Bezier curve vs re-written layers, MLP, batch 64", target=at_most(1))
def step_rewritten() -> Comparison:
    torch.manual_seed(0)
    x, y = torch.randn(64, 784), torch.randint(10, (64,))
    ends = [mlp(), mlp()]
    curve, rewritten = BezierCurve(ends), CurveMLP(ends)
    return Comparison(
        ours=training_step(curve, x, y, curve.l2, decay=0.0),
        peer=training_step(
            rewritten, x, y, lambda: sum(layer.l2 for layer in rewritten.layers), decay=0.0
        ),
        peer_name="re-written layers, w(t) computed in each",
        peer_version=torch.__version__,
        extra={"batch": 64.0},
    )


def along_a_line(samples: int) -> Comparison:
    """Loss and accuracy at 61 points, against loading each into the model and calling it."""
    torch.manual_seed(0)
    model = mlp().eval()
    x, y = torch.randn(samples, 784), torch.randint(10, (samples,))
    batches = list(zip(x.split(1000), y.split(1000), strict=True))
    points = torch.lerp(
        parameters_to_vector(model), parameters_to_vector(mlp()), torch.linspace(0, 1, 61)[:, None]
    )

    @torch.no_grad()
    def loop() -> list[tuple[float, float]]:
        results = []
        for point in points:
            nn.utils.vector_to_parameters(point, model.parameters())
            loss = right = 0.0
            for inputs, targets in batches:
                out = model(inputs)
                loss += F.cross_entropy(out, targets, reduction="sum").item()
                right += (out.argmax(1) == targets).sum().item()
            results.append((loss / samples, right / samples))
        return results

    return Comparison(
        ours=lambda: evaluate(model, points, {"test": batches}, chunk_size=16),
        peer=loop,
        peer_name="one point after the other",
        peer_version=torch.__version__,
        extra={"points": 61.0, "samples": float(samples)},
    )


@benchmark("61 points of an MLP at once vs a loop, 64 samples")
def evaluation_small() -> Comparison:
    return along_a_line(64)


@benchmark("61 points of an MLP at once vs a loop, 2,000 samples")
def evaluation_large() -> Comparison:
    return along_a_line(2000)
