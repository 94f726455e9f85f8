"""The landscape panel against losses whose shape is known."""

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from assay.examine import Sample, Split
from assay.examine.budget import Budget
from assay.examine.panel import NotApplicable
from assay.examine.panels.landscape import (
    RADIUS,
    Surroundings,
    _barrier_of,
    _directions,
    _random_rays,
    landscape,
)
from assay.examine.sample import task_loss
from assay.examine.subject import Snapshot, Subject, prepare
from assay.functional import parameters_to_vector
from examine.foreign import FOREIGN, make

N = 64  # few enough that every sample is used


@pytest.fixture(autouse=True)
def _own_time(monkeypatch):
    """Budgets count the processor's time: a busy machine does not make the panels thinner."""
    monkeypatch.setattr("assay.examine.budget.time.perf_counter", time.process_time)


def bowl(curvatures: list[float], weight: list[float], noise: float) -> Sample:
    """Linear regression with loss noise² + Σ c_i (w_i − weight_i)², at its minimum."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(N, 1 + len(weight), generator=generator).double())[0]
    x = basis[:, 1:] * math.sqrt(N) * torch.tensor(curvatures).double().sqrt()
    w = torch.tensor([weight]).double()
    y = x @ w.T + noise * math.sqrt(N) * basis[:, :1]
    model = nn.Linear(len(weight), 1, bias=False).double()
    model.weight.data = w
    split = Split(x, y, torch.arange(N))
    subject = Subject(model, None, "regression").eval()
    return Sample(subject, split, split, "regression", (), task_loss("regression"))


def metrics(panel) -> dict:
    return {metric.name: metric for metric in panel.metrics}


def test_a_round_bowl_is_as_sharp_and_as_wide_as_the_formula():
    """Filter-normalised directions have the weights' norm: the rise is ρ²‖w‖² in each."""
    weight = [1.0, -2.0, 2.0]
    data = bowl([1.0, 1.0, 1.0], weight, noise=1.5)
    found = metrics(landscape(data.model, data, Budget(2.0, training=False)))
    assert found["sharpness"].value == pytest.approx(RADIUS**2 * 9, rel=1e-6)
    low, high = found["sharpness"].interval
    assert high - low < 1e-6
    assert found["width"].value == pytest.approx(1.5 / 3, rel=0.05)  # bisection to 5 %
    assert found["top_direction_sharpness"].value == pytest.approx(RADIUS**2 * 9, rel=1e-6)
    assert "barrier" not in found


def test_the_top_direction_is_the_steepest():
    data = bowl([9.0, 1.0, 0.5], [1.0, 1.0, 1.0], noise=1.0)
    found = metrics(landscape(data.model, data, Budget(2.0, training=False)))
    # Lanczos is exact after three steps in three dimensions.
    assert found["top_direction_sharpness"].value == pytest.approx(9 * RADIUS**2 * 3, rel=1e-4)
    assert found["sharpness"].value < found["top_direction_sharpness"].value


def test_the_rise_along_each_direction_is_its_quadratic_form():
    curvatures, budget = [9.0, 1.0, 0.5], Budget(0.5)
    data = bowl(curvatures, [1.0, 1.0, 1.0], noise=1.0)
    around = Surroundings.of(data.model, parameters_to_vector(data.model), data, budget)
    rays = _random_rays(around, data, budget)
    directions = torch.stack(
        [d for d, _ in zip(_directions(around, data), rays.rises, strict=False)]
    )
    exact = RADIUS**2 * directions.square() @ torch.tensor(curvatures).double()
    np.testing.assert_allclose(rays.rises, exact.numpy(), rtol=1e-9)
    np.testing.assert_allclose(directions.norm(dim=1).numpy(), math.sqrt(3), rtol=1e-9)
    assert rays.reach == pytest.approx(math.sqrt(3))


def test_no_width_where_the_loss_is_nothing_to_double():
    data = bowl([1.0, 1.0], [1.0, 2.0], noise=0.0)
    data.loss_fn = lambda output, y: ((output - y) ** 2).mean() - 1.0
    assert "width" not in metrics(landscape(data.model, data, Budget(0.5, training=False)))


def test_no_barrier_in_a_convex_loss():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(128) % 2
    x = torch.randn(128, 5, generator=generator)
    x[:, 0] += 2.0 * y
    model = nn.Linear(5, 2)
    subject = Subject(model, None, "classification").eval()
    split = Split(x, y, torch.arange(128))
    data = Sample(subject, split, split, "classification", ("a", "b"), task_loss("classification"))
    panel = landscape(subject, data, Budget(3.0))
    found = metrics(panel)
    assert found["barrier"].value <= 1e-6
    assert "epochs" in found["barrier"].method
    assert [picture.name for picture in panel.figures] == ["slice", "rays", "line"]


def test_the_barrier_is_the_excess_over_the_ends():
    assert _barrier_of(np.array([[0.0, 2.0, 1.0], [0.0, 4.0, 1.0]])) == pytest.approx(2.5)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_networks(name):
    model, splits, call = make(name)
    data = prepare(model, splits, call=call)
    before = Snapshot(data.model)
    budget = Budget(0.8)
    panel = landscape(data.model, data, budget)
    assert before.changes(data.model) == []
    found = metrics(panel)
    assert {"sharpness", "width", "top_direction_sharpness"} <= found.keys()
    for metric in found.values():
        assert math.isfinite(metric.value)
        low, high = metric.interval
        assert low <= metric.value <= high
    assert "barrier" in found or any("barrier" in note.lower() for note in budget.notes)


def test_a_network_without_filters_is_not_applicable():
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    split = Split(torch.randn(64, 3), torch.arange(64) % 3, torch.arange(64))
    subject = Subject(Scales()).eval()
    data = Sample(
        subject, split, split, "classification", ("a", "b", "c"), task_loss("classification")
    )
    with pytest.raises(NotApplicable, match="filters"):
        landscape(subject, data, Budget(0.5))
