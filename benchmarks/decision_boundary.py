"""Bisection of 1,000 pairs together against the published loop, one sample at a time."""

import time

import torch
from torch import Tensor, nn

from assay.analysis import bisect_boundary
from assay.lab import at_most
from assay.lab.bench import Samples, benchmark
from assay.models import MLP

PAIRS = 1000
REPEATS = 3  # the loop takes seconds
BETA = 1e-4


@torch.no_grad()
def loop(model: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    """As published: the classes of both ends and of the middle at each step, a pair at a time."""
    found = []
    for x1, x2 in zip(a.split(1), b.split(1), strict=True):
        for _ in range(60):
            middle = (x1 + x2) / 2
            p, first, second = (model(x).softmax(1)[0] for x in (middle, x1, x2))
            winner = int(p.argmax())
            if winner not in (0, 1) or abs(p[0] - p[1]) < BETA:
                break
            if winner == int(first.argmax()):
                x1 = middle
            elif winner == int(second.argmax()):
                x2 = middle
        found.append(middle)
    return found


@torch.no_grad()
def _pairs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs of two classes, of which the model is as sure as a trained one."""
    x = torch.rand(16 * PAIRS, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    last = list(model.modules())[-1]
    logits = torch.cat([model(part) for part in x.split(256)])
    last.bias[:2] -= logits[:, :2].median(0).values
    last.bias[2:] -= logits[:, 2:].max(0).values
    scale = 10 / (logits[:, 0] - logits[:, 1]).std()
    last.weight *= scale
    last.bias *= scale
    predicted = torch.cat([model(part) for part in x.split(256)]).argmax(1)
    a, b = (x[predicted == label][:PAIRS] for label in (0, 1))
    assert len(a) == len(b) == PAIRS
    return a, b


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _compare(model: nn.Module) -> Samples:
    a, b = _pairs(model)

    def ours():
        return bisect_boundary(model, a, b, 0, 1, tol=BETA)

    samples = ours()
    pairs = [(_seconds(ours), _seconds(lambda: loop(model, a, b))) for _ in range(REPEATS)]
    mine, other = zip(*pairs, strict=True)
    return Samples(
        ours=list(mine),
        peer=list(other),
        peer_name="published loop, one sample at a time",
        peer_version="2019",
        extra={"success": samples.success_rate, "steps": samples.iterations.double().mean().item()},
    )


@benchmark("1,000 pairs, MLP 784-50-50-10", target=at_most(0.05), threads=1)
def fully_connected() -> Samples:
    torch.manual_seed(0)
    return _compare(MLP((784, 50, 50, 10)))


# A single image through the convolutions takes 1.5 times what it takes in a batch, so even one
# forward pass a step instead of three is at most five times as fast.
@benchmark("1,000 pairs, CNN of 10 and 10 maps", threads=1)
def convolutional() -> Samples:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 10, 3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(10, 10, 3), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(250, 50), nn.ReLU(), nn.Linear(50, 10)]
    return _compare(nn.Sequential(*layers, *head))
