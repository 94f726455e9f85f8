"""Roots and draws of a loss's Hessian in the output."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.functional import Likelihood, per_sample_loss

LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "cross-entropy-sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]).double()),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "ignoring": nn.CrossEntropyLoss(ignore_index=1),
    "weighted-smoothed-ignoring": nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), label_smoothing=0.2, ignore_index=1
    ),
    "squared": nn.MSELoss(),
    "squared-sum": nn.MSELoss(reduction="sum"),
    "binary": nn.BCEWithLogitsLoss(),
    "binary-weighted": nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0).double()),
}
SHAPES = {"vector": (3, 4), "positions": (3, 4, 2), "images": (2, 4, 2, 2)}


def _problem(name, shape):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=g, dtype=torch.float64)
    if isinstance(LOSSES[name], nn.CrossEntropyLoss):
        return z, torch.randint(4, (shape[0], *shape[2:]), generator=g)
    return z, torch.rand(shape, generator=g, dtype=torch.float64)


def _hessian(name, z, target):
    """Of scale · Σ terms, `(N, entries, N, entries)`."""
    size = z[0].numel()
    dense = torch.autograd.functional.hessian(lambda z: LOSSES[name](z, target), z)
    return dense.reshape(len(z), size, len(z), size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_root_times_its_transpose_is_the_hessian(name, shape):
    z, target = _problem(name, SHAPES[shape])
    likelihood = Likelihood.of(LOSSES[name])
    columns = likelihood.factor(z, target).flatten(2)
    scale = likelihood.scale(z, target)
    blocks = scale * torch.einsum("kna,knb->nab", columns, columns)
    dense = _hessian(name, z, target)
    for n in range(len(z)):
        torch.testing.assert_close(blocks[n], dense[n, :, n])


@pytest.mark.parametrize("name", ["cross-entropy", "cross-entropy-sum", "smoothed"])
def test_cross_entropy_needs_one_column_less_than_classes(name):
    z, target = _problem(name, (3, 4))
    assert Likelihood.of(LOSSES[name]).factor(z, target).shape == (3, 3, 4)


@pytest.mark.parametrize("shape", ["vector", "positions"])
@pytest.mark.parametrize("name", LOSSES)
def test_draws_have_the_hessian_as_second_moment(name, shape):
    z, target = _problem(name, SHAPES[shape])
    likelihood = Likelihood.of(LOSSES[name])
    g = torch.Generator().manual_seed(1)
    samples = 40_000
    draws = likelihood.draw(z, target, samples, generator=g).flatten(2) * math.sqrt(samples)
    products = torch.einsum("kna,knb->knab", draws, draws)
    mean, error = products.mean(0), products.std(0) / math.sqrt(samples)
    dense = _hessian(name, z, target) / likelihood.scale(z, target)
    for n in range(len(z)):
        # Five standard errors: at most 8 x 8 entries of 3 samples.
        assert ((mean[n] - dense[n, :, n]).abs() <= 5 * error[n] + 1e-12).all()


@pytest.mark.parametrize("name", LOSSES)
def test_terms_add_up_to_the_loss(name):
    z, target = _problem(name, (3, 4, 2))
    likelihood = Likelihood.of(LOSSES[name])
    total = likelihood.terms(z, target).sum() * likelihood.scale(z, target)
    torch.testing.assert_close(total, LOSSES[name](z, target))
    parts = per_sample_loss(LOSSES[name])(z, target)
    summing = LOSSES[name].reduction == "sum"
    torch.testing.assert_close(parts.sum() if summing else parts.mean(), LOSSES[name](z, target))


def test_a_mean_over_nothing_has_no_scale():
    z = torch.zeros(2, 3)
    assert Likelihood.of(F.cross_entropy).scale(z, torch.tensor([-100, -100])) == math.inf


def test_what_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="CrossEntropyLoss, MSELoss, BCEWithLogitsLoss"):
        Likelihood.of(nn.L1Loss())
    with pytest.raises(ValueError, match="reduction"):
        Likelihood.of(nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match="no `reduction`"):
        per_sample_loss(nn.Identity())
    with pytest.raises(ValueError, match="takes no `reduction`"):
        per_sample_loss(lambda z, y: z.sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 3.0]).double()])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_roots_for_targets_that_are_probabilities_or_sum_to_anything(shape, weight, smoothing):
    z, _ = _problem("cross-entropy", SHAPES[shape])
    target = torch.rand(z.shape, generator=torch.Generator().manual_seed(1)).double()
    loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    likelihood = Likelihood.of(loss)
    columns = likelihood.factor(z, target).flatten(2)
    blocks = likelihood.scale(z, target) * torch.einsum("kna,knb->nab", columns, columns)
    size = z[0].numel()
    dense = torch.autograd.functional.hessian(lambda z: loss(z, target), z)
    dense = dense.reshape(len(z), size, len(z), size)
    for n in range(len(z)):
        torch.testing.assert_close(blocks[n], dense[n, :, n])
