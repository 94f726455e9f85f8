"""Twelve models trained at once against one after another, the same loop and the same data."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from assay.data import Batches
from assay.functional import Ensemble, EnsembleBatches, EnsembleLoss, fit
from assay.lab import at_most
from assay.lab.bench import Comparison, benchmark
from assay.models import MLP

MODELS, BATCH = 12, 64
IMAGES = 3000  # one epoch of the experiment


def _together(models: list[nn.Module], x: torch.Tensor, y: torch.Tensor) -> None:
    ensemble = Ensemble(models)
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.05)
    batches = EnsembleBatches(x, y, BATCH, len(models))
    fit(ensemble, optimizer, batches, epochs=1, loss_fn=EnsembleLoss())


def _in_turn(models: list[nn.Module], x: torch.Tensor, y: torch.Tensor) -> None:
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        fit(model, optimizer, Batches(x, y, BATCH), epochs=1)


def _comparison(make: Callable[[], nn.Module]) -> Comparison:
    torch.manual_seed(0)
    models = [make() for _ in range(MODELS)]
    x, y = torch.rand(IMAGES, 1, 28, 28), torch.randint(10, (IMAGES,))
    return Comparison(
        ours=lambda: _together(models, x, y),
        peer=lambda: _in_turn(models, x, y),
        peer_name="one after another, same loop",
        peer_version=torch.__version__,
        extra={"models": MODELS, "batch": BATCH, "steps": -(-IMAGES // BATCH)},
    )


@benchmark("12 MLPs 784-64-64-10 at once, batch 64", target=at_most(1 / 1.5), threads=1)
def small_mlps() -> Comparison:
    return _comparison(partial(MLP, (784, 64, 64, 10)))


@benchmark("12 MLPs with BatchNorm 784-64-64-10 at once (vmap)", threads=1)
def mlps_with_batch_norm() -> Comparison:
    return _comparison(partial(MLP, (784, 64, 64, 10), batch_norm=True))
