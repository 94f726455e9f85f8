"""The card counts what a hand count gives, and sees what does nothing."""

import pytest
import torch
from torch import nn

from assay.examine import Budget, examine
from assay.examine.panels.card import card
from assay.examine.subject import Snapshot, prepare
from examine.foreign import FOREIGN, make


def figures(model, x, y, call=None):
    sample = prepare(model, {"train": (x, y)}, call=call)
    found = card(sample.model, sample, Budget(60.0))
    return {metric.name: metric.value for metric in found.metrics}, found


def test_a_small_network_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )  # fmt: skip
    model(torch.randn(8, 1, 6, 6))  # sets the statistics
    values, found = figures(model, torch.randn(20, 1, 6, 6), torch.arange(20) % 5)
    weights = 4 * 9 + 4 + 2 * 4 + 144 * 5 + 5
    assert values["parameters"] == weights
    assert values["weight_bytes"] == 4 * weights + 4 * 2 * 4 + 8  # and BatchNorm's buffers
    assert values["multiply_adds"] == 36 * 4 * 9 + 144 * 5
    assert values["flops"] == 2 * values["multiply_adds"]
    assert values["activation_bytes"] == 4 * (3 * 144 + 5)  # Flatten returns a view
    assert values["saved_bytes"] < 4 * 1000  # of one sample, not of all that share its storage
    assert values["batchnorms"] == 1
    rows = {row["layer"]: row for row in found.tables["Layers"]}
    assert rows["0"]["output"] == "4 × 6 × 6"
    assert rows["4"]["multiply-adds"] == 720
    assert sum(row["parameters"] for row in rows.values()) == weights


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_arithmetic(bidirectional):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 8, batch_first=True, bidirectional=bidirectional)
            self.head = nn.Linear(8 * (1 + bidirectional), 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    values, _ = figures(Last(), torch.randn(10, 12, 3), torch.arange(10) % 2)
    directions = 1 + bidirectional
    gates = directions * 12 * 4 * 8 * (3 + 8)
    assert values["multiply_adds"] == gates + 8 * directions * 2


def test_attention_arithmetic():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(5 * 8, 3))
    values, _ = figures(model, torch.randn(10, 5, 8), torch.arange(10) % 3)
    projections = 5 * 8 * (3 * 8 + 8)
    products = 2 * 5 * 5 * 8
    assert values["multiply_adds"] == projections + products + 2 * 5 * 8 * 16 + 40 * 3
    assert values["attentions"] == 1


def test_batchnorm_that_was_never_trained_is_told():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    _, found = figures(model, torch.randn(20, 4), torch.arange(20) % 2)
    assert any("BatchNorm" in f.text and f.severity > 0.7 for f in found.findings)
    model(torch.randn(20, 4))
    _, found = figures(model, torch.randn(20, 4), torch.arange(20) % 2)
    assert not any("BatchNorm" in f.text for f in found.findings)


class PartlyDead(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.unused = nn.Linear(4, 7)
        self.last = nn.Linear(6, 2)
        with torch.no_grad():
            self.first.weight[:2] = 0
            self.first.bias[:2] = -1  # two units that ReLU never lets through

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_dead_structure_is_found():
    torch.manual_seed(0)
    values, found = figures(PartlyDead(), torch.randn(200, 4), torch.arange(200) % 2)
    assert values["dead_parameters"] == 4 * 7 + 7
    assert values["dead_units"] == pytest.approx(2 / 8)
    assert any("unused.weight" in f.text for f in found.findings)
    assert any("layer first (2 of 6)" in f.text for f in found.findings)


def test_frozen_and_tied_parameters():
    model, data, call = make("tagger")
    model.lstm.requires_grad_(False)
    values, found = figures(model, *data["train"], call)
    frozen = sum(p.numel() for p in model.lstm.parameters())
    assert values["parameters"] - values["trainable_parameters"] == frozen
    assert values["tied_parameters"] == 12 * 8
    assert found.tables["Tied weights"] == [{"used as": "embedding.weight, head.weight"}]
    assert sum(row["parameters"] for row in found.tables["Layers"]) == values["parameters"]


@pytest.mark.parametrize("name", FOREIGN)
def test_any_network(name, tmp_path):
    model, data, call = make(name)
    before = Snapshot(model)
    report = examine(model, data, call=call, panels=["card"], budget=2, output=tmp_path)
    (panel,) = report.panels
    assert panel.status == "done", panel.reason
    assert not [note for note in panel.notes if "put back" in note]
    assert before.changes(model) == []
    assert report["card.parameters"] == sum(p.numel() for p in model.parameters())
    assert report["card.flops"] > 0
    assert report["card.dead_parameters"] == 0
