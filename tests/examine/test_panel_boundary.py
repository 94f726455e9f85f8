"""The boundary panel against boundaries whose place is known."""

import math
import time

import pytest
import torch
from torch import nn

from assay.examine import Sample, Split
from assay.examine.budget import Budget
from assay.examine.panel import NotApplicable
from assay.examine.panels.boundary import boundary
from assay.examine.sample import task_loss
from assay.examine.subject import Snapshot, Subject, prepare
from examine.foreign import make


@pytest.fixture(autouse=True)
def _own_time(monkeypatch):
    """Budgets count the processor's time: a busy machine does not make the panels thinner."""
    monkeypatch.setattr("assay.examine.budget.time.perf_counter", time.process_time)


def halves(size: int = 6, n: int = 300) -> Sample:
    """A linear classifier of two clouds, with labels that it gets right."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(size, 2)
    model.weight.data = torch.randn(2, size, generator=generator)
    model.bias.data = torch.tensor([0.3, -0.2])
    x = torch.randn(2 * n, size, generator=generator)
    with torch.no_grad():
        y = model(x).argmax(1)
    train, test = (Split(x[part], y[part], torch.arange(n)) for part in (slice(n), slice(n, None)))
    subject = Subject(model, None, "classification").eval()
    return Sample(subject, train, test, "classification", ("left", "right"),
                  task_loss("classification"))  # fmt: skip


def metrics(panel) -> dict:
    return {metric.name: metric for metric in panel.metrics}


def test_a_linear_classifier_has_the_closed_form():
    """|w·x + b| / ‖w‖ with w and b the differences of the two rows."""
    data = halves()
    panel = boundary(data.model, data, Budget(5.0))
    layer = data.model.model
    w = (layer.weight[0] - layer.weight[1]).detach()
    b = (layer.bias[0] - layer.bias[1]).detach()
    exact = ((data.test.x @ w + b).abs() / w.norm()).median().item()
    found = metrics(panel)
    assert found["median_distance"].value == pytest.approx(exact, rel=1e-2)
    low, high = found["median_distance"].interval
    assert low < exact < high
    # Segments between points on a plane stay on it: rounding alone changes the class there, and
    # never more than a straight line through one plane could.
    assert found["linearity"].value > 0.95
    assert found["relative_distance"].value == pytest.approx(exact / typical(data.test), rel=0.15)


def typical(split: Split) -> float:
    gaps = torch.cdist(split.x, split.x)
    return gaps[split.y[:, None] != split.y].median().item()


def test_token_inputs_are_not_applicable():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))
    split = Split(torch.randint(5, (40, 3)), torch.arange(40) % 2, torch.arange(40))
    data = Sample(Subject(model).eval(), split, split, "classification", ("a", "b"),
                  task_loss("classification"))  # fmt: skip
    with pytest.raises(NotApplicable, match="token"):
        boundary(data.model, data, Budget(1.0))


def test_a_network_without_linear_layer_and_with_one_class_never_right():
    class Nearest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.tensor([[0.0, 0.0], [4.0, 0.0], [99.0, 99.0]]))

        def forward(self, x):
            return -torch.cdist(x, self.centres).square()

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 2, generator=generator)
    x[:, 0] += 4.0 * (y == 1)
    split = Split(x, y, torch.arange(90))
    subject = Subject(Nearest()).eval()
    data = Sample(
        subject, split, split, "classification", ("a", "b", "c"), task_loss("classification")
    )
    budget = Budget(3.0)
    panel = boundary(subject, data, budget)
    found = metrics(panel)
    # The boundary between the first two centres is x_0 = 2, half way.
    exact = (x[:, 0] - 2).abs().median().item()
    assert found["median_distance"].value == pytest.approx(exact, rel=1e-2)
    assert "linearity" not in found
    assert any("no sample of class 2" in note for note in budget.notes)


@pytest.mark.parametrize("name", ["residual", "vision-transformer", "lstm", "keyword"])
def test_foreign_networks(name):
    model, splits, call = make(name)
    data = prepare(model, splits, call=call)
    before = Snapshot(data.model)
    panel = boundary(data.model, data, Budget(1.5))
    assert before.changes(data.model) == []
    found = metrics(panel)
    assert {"median_distance", "relative_distance", "linearity"} <= found.keys()
    for metric in found.values():
        assert math.isfinite(metric.value)
        low, high = metric.interval
        assert low <= metric.value <= high
    pictures = [picture.name for picture in panel.figures]
    assert pictures[0] == "distances"
    assert ("border" in pictures) == (data.test.x.ndim == 4)
