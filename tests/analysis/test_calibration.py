"""Calibration error against torchmetrics, temperature against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from assay.analysis.calibration import calibration_error, confidence_bins, fit_temperature


def answers(n, seed, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (n,), generator=generator)


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 10**6))
def test_equal_width_is_that_of_torchmetrics(n, bins, seed):
    logits, y = answers(n, seed)
    confidence, predicted = logits.softmax(1).max(1)
    ours = calibration_error(
        confidence, (predicted == y).double(), confidence_bins(confidence, bins)
    )
    theirs = multiclass_calibration_error(logits.softmax(1), y, num_classes=4, n_bins=bins)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 10**6))
def test_adaptive_bins_differ_by_one_sample_at_most(n, bins, seed):
    confidence = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    found = confidence_bins(confidence, bins, adaptive=True)
    counts = torch.bincount(found, minlength=bins)
    assert counts.max() - counts.min() <= 1
    order = confidence.argsort()
    assert (found[order].diff() >= 0).all()


def test_weights_count_samples():
    confidence, correct = torch.rand(30), (torch.rand(30) < 0.5).float()
    bins = confidence_bins(confidence, 5)
    counts = torch.randint(0, 3, (1, 30)).float()
    repeated = counts[0].long().repeat(1)
    index = torch.repeat_interleave(torch.arange(30), repeated)
    expected = calibration_error(confidence[index], correct[index], bins[index])
    assert torch.allclose(calibration_error(confidence, correct, bins, counts), expected)


@given(st.integers(0, 1000))
def test_no_other_temperature_is_better(seed):
    logits, y = answers(50, seed)
    y = torch.where(torch.arange(50) % 2 == 0, logits.argmax(1), y)
    best = fit_temperature(logits, y)
    loss = F.cross_entropy(logits / best, y)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert loss <= F.cross_entropy(logits / min(50, max(0.02, best * factor)), y) + 1e-12


def test_separable_and_hopeless_answers_meet_the_bounds():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == 0.02
    assert fit_temperature(logits, torch.tensor([1, 0])) == 50.0


def test_bad_input():
    with pytest.raises(ValueError, match="bins"):
        confidence_bins(torch.rand(3), 0)
    with pytest.raises(ValueError, match="at least one"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    ends = torch.tensor([1.0 + 5e-7, 0.0])  # what rounding makes of a sum of probabilities
    assert confidence_bins(ends, 4).tolist() == [3, 0]


def test_correctness_may_be_boolean():
    confidence, correct = torch.rand(30), torch.rand(30) < 0.5
    bins = confidence_bins(confidence, 5)
    as_numbers = calibration_error(confidence, correct.float(), bins)
    assert torch.equal(calibration_error(confidence, correct, bins), as_numbers)
    assert torch.equal(calibration_error(confidence, correct.long(), bins), as_numbers)


HALF = torch.full((3,), 0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: confidence_bins(torch.tensor([math.nan, 0.5, 1.5, -1.0])),
            r"confidence must be in \[0, 1\], got 3 of 4 values that are not, e.g. nan",
        ),
        (
            lambda: confidence_bins(torch.tensor([math.nan, 0.5]), adaptive=True),
            "confidence must not be NaN, got 1 NaN",
        ),
        (
            lambda: calibration_error(HALF, torch.tensor([0, 7, 1]), torch.zeros(3).long()),
            r"correct must be in \[0, 1\], got 1 of 3 values that are not, e.g. 7",
        ),
        (
            lambda: calibration_error(HALF, torch.ones(1), torch.zeros(3).long()),
            r"correct must hold one value a confidence, \(3,\), got \(1,\)",
        ),
        (
            lambda: calibration_error(HALF, torch.ones(3), torch.zeros(2).long()),
            r"bin_of must hold one value a confidence, \(3,\), got \(2,\)",
        ),
        (
            lambda: fit_temperature(torch.full((5, 3), math.nan), torch.zeros(5).long()),
            "logits must be finite, got 15 of 15 values",
        ),
        (
            lambda: fit_temperature(torch.zeros(5, 3), torch.arange(5)),
            "y must hold class indices from 0 to 2, got 2 of 5 that are not, e.g. 3",
        ),
        (
            lambda: fit_temperature(torch.zeros(5, 3), torch.arange(4)),
            r"y must hold one class index a sample, 5 integers in one dimension, got shape \(4,\)",
        ),
    ],
)
def test_what_is_no_confidence_correctness_logit_or_label_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
