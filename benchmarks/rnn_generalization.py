"""Fisher–Rao norm of a ReLU RNN: one forward recursion against gradients of every sample."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from assay.analysis import ReLURNN, fisher_rao_norm
from assay.lab import at_most
from assay.lab.bench import Comparison, benchmark

SAMPLES, STEPS, FEATURES, HIDDEN, CLASSES = 1000, 8, 8, 128, 10
CHUNK = 100  # samples whose gradients are held at a time


def _per_sample(weights: tuple[Tensor, ...], x: Tensor, y: Tensor) -> float:
    def loss(weights: tuple[Tensor, ...], sample: Tensor, target: Tensor) -> Tensor:
        u, w, v = weights
        h = sample.new_zeros(HIDDEN)
        for step in sample:
            h = F.relu(u @ step + w @ h)
        return F.cross_entropy(v @ h, target)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=CHUNK)(weights, x, y)
    pairs = zip(gradients, weights, strict=True)
    products = sum((g * w).flatten(1).sum(1) for g, w in pairs)
    return products.square().mean().sqrt().item()


@benchmark("Fisher–Rao norm, n = 1000, m = 128 vs gradients of each sample", target=at_most(0.1))
def recursion_against_gradients() -> Comparison:
    net = ReLURNN(FEATURES, HIDDEN, CLASSES).double()
    x = torch.rand(SAMPLES, STEPS, FEATURES, dtype=torch.float64)
    y = torch.arange(SAMPLES) % CLASSES
    weights = tuple(p.detach() for p in (net.U, net.W, net.V))
    return Comparison(
        ours=lambda: fisher_rao_norm(net, x, y, kind="fr"),
        peer=lambda: _per_sample(weights, x, y),
        peer_name="torch.func.vmap(grad)",
        peer_version=torch.__version__,
        extra={
            "norm": fisher_rao_norm(net, x, y, kind="fr"),
            "norm of the peer": _per_sample(weights, x, y),
        },
    )
