"""The communication panel on gradients that are known."""

import numpy as np
import pytest
import torch
from torch import nn

from assay.distributed import LinkModel
from assay.examine import examine
from examine.foreign import make


def communication(model, data, tmp_path, budget=5.0, **kwargs):
    report = examine(
        model, data, panels=["communication"], budget=budget, output=tmp_path, **kwargs
    )
    return report.panels[0]


def metrics(panel):
    assert panel.status == "done", panel.reason
    return {metric.name: metric for metric in panel.metrics}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A thousand weights, of which ten have gradients, all alike."""
    x = torch.zeros(128, 1000)
    x[:, :10] = 1.0
    y = torch.randn(128, 1, generator=torch.Generator().manual_seed(0)) + 3.0
    model = nn.Linear(1000, 1, bias=False)
    panel = communication(model, {"train": (x, y)}, tmp_path_factory.mktemp("known"))
    return panel, metrics(panel)


def test_energy_is_counted_in_the_largest_entries(known):
    found = known[1]
    assert found["topk_energy_01pct"].value == pytest.approx(0.1, rel=1e-6)  # one entry of ten
    assert found["topk_energy_1pct"].value == pytest.approx(1.0)
    assert found["topk_energy_10pct"].value == pytest.approx(1.0)


def test_bits_are_those_of_real_payloads(known):
    found = known[1]
    assert found["fp32_megabytes"].value == pytest.approx(0.004)
    assert found["natural_bits"].value == pytest.approx(9.0)
    # Three bits of level, one of sign, and the norm of the only tensor.
    assert found["natural_dithering_bits"].value == pytest.approx(4.0, abs=0.3)
    rows = {row["method"]: row for row in known[0].tables[0].rows}
    assert rows["float32"]["bits an entry"] == 32
    assert rows["float32"]["relative squared error"] == 0
    assert rows["float16"]["bits an entry"] == 16
    # One entry of a thousand: a value and an index.
    assert rows["top 0.1 % (DGC)"]["bits an entry"] == pytest.approx(64 / 1000)
    assert rows["top 0.1 % (DGC)"]["relative squared error"] == pytest.approx(0.9, rel=1e-5)


def test_levels_that_hit_the_entries_lose_nothing(known):
    # All entries are the norm itself, which is a level of both kinds of dithering.
    assert known[1]["random_dithering_error"].value == pytest.approx(0, abs=1e-12)
    # Rounding between powers of two is at most an eighth in expectation; 10 like entries each.
    assert 0 <= known[1]["natural_error"].value < 0.25


def test_times_are_those_of_the_link_model(known):
    rows = {row["method"]: row for row in known[0].tables[1].rows}
    link = LinkModel(1e9, 50e-6)
    assert rows["float32"]["1 Gbit/s: link"] == pytest.approx(1e3 * link.all_reduce(32_000, 8))
    # Sparse messages are gathered: seven of 64 bits.
    gathered = 1e3 * link.seconds(7 * 64, 7)
    assert rows["top 0.1 % (DGC)"]["1 Gbit/s: link"] == pytest.approx(gathered)
    found = known[1]
    saved = found["step_fp32_1gbit"].value - found["step_fp32_100gbit"].value
    expected = 1e3 * (link.all_reduce(32_000, 8) - LinkModel(1e11, 50e-6).all_reduce(32_000, 8))
    assert saved == pytest.approx(expected, rel=1e-6)
    assert "predicted" in found["step_fp32_1gbit"].method


def test_without_a_gradient_there_is_nothing_to_send(tmp_path):
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    panel = communication(model, {"train": (torch.randn(64, 3), torch.zeros(64, 1))}, tmp_path)
    assert panel.status == "not applicable"
    assert "nothing to send" in panel.reason


def test_gaussian_gradients_have_the_energy_of_a_gaussian(tmp_path):
    # One sample's gradient is its own input: for normal inputs the largest 10 % of the squares
    # hold 2(z φ(z) + 1 − Φ(z)) of the energy, z = 1.645.
    x = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(20_000, 1, bias=False)
    panel = communication(model, {"train": (x, torch.full((4, 1), 10.0))}, tmp_path)
    z = 1.6449
    expected = 2 * (z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi) + 0.05)
    assert metrics(panel)["topk_energy_10pct"].value == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", ["residual", "vision-transformer", "regression", "tagger"])
def test_foreign_networks(name, tmp_path):
    model, data, call = make(name)
    panel = communication(model, data, tmp_path, budget=1, call=call)
    found = metrics(panel)
    assert all(np.isfinite(metric.value) for metric in found.values())
    assert 0 < found["natural_error"].value < 0.125
    assert not any("changed" in note for note in panel.notes)
