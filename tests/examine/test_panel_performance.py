"""Figures of performance agree with torchmetrics and with what is known of the answers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional import mean_squared_error, r2_score
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from assay.examine import Budget, examine
from assay.examine.panels.performance import performance
from assay.examine.subject import Snapshot, prepare
from examine.foreign import FOREIGN, make


class Answers(nn.Module):
    """Returns its inputs as logits; has a weight to be a model."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x


def look(data, model=None, **kwargs):
    sample = prepare(model or Answers(), data, **kwargs)
    found = performance(sample.model, sample, Budget(300.0))
    return {metric.name: metric for metric in found.metrics}, found


def drawn(n, temperature, seed, classes=5):
    """Logits whose labels follow softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    y = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
    return logits, y


def test_classification_agrees_with_torchmetrics():
    test = drawn(600, 2.0, 1)
    metrics, _ = look({"train": drawn(500, 1.0, 2), "test": test})
    assert metrics["accuracy"].value == pytest.approx(
        multiclass_accuracy(*test, num_classes=5, average="micro").item()
    )
    assert metrics["ece"].value == pytest.approx(
        multiclass_calibration_error(*test, num_classes=5, n_bins=15).item(), abs=1e-6
    )
    assert metrics["nll"].value == pytest.approx(F.cross_entropy(*test).item(), rel=1e-5)
    gap = metrics["train_accuracy"].value - metrics["accuracy"].value
    assert metrics["gap"].value == pytest.approx(gap)
    for metric in metrics.values():
        if metric.interval is not None:
            assert metric.interval[0] <= metric.value <= metric.interval[1], metric.name


def test_the_true_temperature_is_in_its_interval():
    metrics, found = look({"train": drawn(500, 2.0, 2), "test": drawn(2000, 2.0, 1)})
    low, high = metrics["temperature"].interval
    assert low <= 2.0 <= high < 2.5
    assert any("overconfident" in f.text for f in found.findings)


def test_a_calibrated_network_is_not_accused():
    metrics, found = look({"train": drawn(500, 1.0, 2), "test": drawn(2000, 1.0, 1)})
    assert not any("confident:" in f.text for f in found.findings)
    assert metrics["ece"].interval[0] < 0.03


def test_chance_is_told():
    generator = torch.Generator().manual_seed(0)
    data = {"train": (torch.randn(300, 3, generator=generator), torch.arange(300) % 3),
            "test": (torch.randn(300, 3, generator=generator), torch.arange(300) % 3)}  # fmt: skip
    _, found = look(data)
    assert max(f.severity for f in found.findings) == 0.9


def test_the_weak_class_and_the_confused_pair_are_named():
    y = torch.arange(900) % 3
    said = y.clone()
    said[(y == 2) & (torch.arange(900) % 2 == 0)] = 0  # half of class c is taken for a
    logits = 4 * F.one_hot(said, 3).float()
    _, found = look({"train": (logits, y), "test": (logits + 0.01, y), "classes": "abc"})
    assert found.tables["Classes"][0]["class"] == "c"
    assert found.tables["Classes"][0]["recall"] == pytest.approx(0.5)
    first = found.tables["Most confused"][0]
    assert (first["class"], first["taken for"], first["samples"]) == ("c", "a", 150)
    assert any("Class c" in f.text for f in found.findings)


def test_probabilities_are_recognised():
    logits, y = drawn(400, 1.0, 1)
    metrics, found = look({"train": (logits.softmax(1), y)})
    assert any("returns probabilities" in f.text for f in found.findings)
    assert metrics["nll"].value == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)


def test_without_test_data_there_is_no_gap():
    metrics, _ = look({"train": drawn(100, 1.0, 1)})
    assert "gap" not in metrics
    assert metrics["accuracy"].value == metrics["train_accuracy"].value


def test_test_samples_that_were_trained_on_are_counted():
    x, y = drawn(200, 1.0, 1, classes=10)
    new, labels = drawn(90, 1.0, 2, classes=10)
    data = {"train": (x, y), "test": (torch.cat([new, x[:10]]), torch.cat([labels, y[:10]]))}
    _, found = look(data)
    assert any(f.text.startswith("10 of 100 test samples") for f in found.findings)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_agrees_with_torchmetrics(outputs):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(300, outputs, generator=generator) + 5
    x = y + 0.3 * torch.randn(300, outputs, generator=generator)
    metrics, found = look({"train": (x[:100], y[:100]), "test": (x, y)})
    assert metrics["rmse"].value == pytest.approx(
        mean_squared_error(x, y, squared=False).item(), rel=1e-5
    )
    expected = r2_score(x, y, multioutput="variance_weighted").item()
    assert metrics["r2"].value == pytest.approx(expected, rel=1e-4)
    low, high = metrics["rmse"].interval
    error = metrics["rmse"].value / math.sqrt(2 * y.numel())  # of normal residuals
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert found.tables["Worst test samples"][0]["index"] == int((x - y).square().sum(1).argmax())


def test_tokens_that_are_padding_do_not_count():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, 4, generator=generator)
    y = x.argmax(2)
    y[:, 0] = (y[:, 0] + 1) % 4  # one of six is wrong,
    y[:, 1] = -100  # one does not count
    metrics, _ = look({"train": (x, y)})
    assert metrics["accuracy"].value == pytest.approx(4 / 5)
    expected = F.cross_entropy(x.flatten(0, 1), y.flatten()).item()
    assert metrics["perplexity"].value == pytest.approx(math.exp(expected), rel=1e-5)


NAMES = {
    "classification": {"accuracy", "train_accuracy", "gap", "nll", "ece", "adaptive_ece"},
    "regression": {"rmse", "r2", "gap"},
    "sequence": {"accuracy", "train_accuracy", "gap", "nll", "ece", "perplexity"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_any_network(name, tmp_path):
    model, data, call = make(name)
    before = Snapshot(model)
    report = examine(model, data, call=call, panels=["performance"], budget=2, output=tmp_path)
    (panel,) = report.panels
    assert panel.status == "done", panel.reason
    assert not [note for note in panel.notes if "put back" in note]
    assert before.changes(model) == []
    assert {metric.name for metric in panel.metrics} >= NAMES[report.data.task]
