"""The signal panel names the layers at fault, and is silent on healthy networks."""

import numpy as np
import pytest
import torch
from torch import nn

from assay.examine import examine
from examine.foreign import make


def signal(model, data, tmp_path, budget=4.0, **kwargs):
    report = examine(model, data, panels=["signal"], budget=budget, output=tmp_path, **kwargs)
    return report.panels[0]


def metrics(panel):
    assert panel.status == "done", panel.reason
    return {metric.name: metric for metric in panel.metrics}


def deep(activation, initialise, depth=12, width=64):
    """Linear layers 0, 2, 4, …, each but the last with an activation behind it."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(width, width if i < depth - 1 else 3), activation()]
    model = nn.Sequential(*layers[:-1])
    for module in model:
        if isinstance(module, nn.Linear):
            initialise(module.weight, generator)
            nn.init.zeros_(module.bias)
    return model


def he(weight, generator):
    nn.init.kaiming_normal_(weight, generator=generator)


def orthogonal(weight, generator):
    nn.init.orthogonal_(weight, generator=generator)


@pytest.fixture(scope="module")
def data():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    return {"train": (x, torch.arange(256) % 3)}


@pytest.mark.parametrize(("activation", "initialise"), [(nn.ReLU, he), (nn.Tanh, orthogonal)])
def test_a_healthy_network_gets_no_finding(activation, initialise, data, tmp_path):
    panel = signal(deep(activation, initialise, depth=8), data, tmp_path)
    assert metrics(panel)
    assert not panel.findings, panel.findings


def test_a_vanishing_initialisation_is_named_by_layer(data, tmp_path):
    model = deep(nn.Tanh, lambda w, g: nn.init.normal_(w, std=0.02, generator=g))
    panel = signal(model, data, tmp_path)
    found = metrics(panel)
    # Each layer multiplies the mean square by 64 · 0.02², the gradient on its way back likewise.
    expected = np.log(64 * 0.02**2)
    assert found["forward_growth"].value == pytest.approx(expected, rel=0.1)
    assert found["backward_growth"].value == pytest.approx(-expected / 2, rel=0.15)
    texts = [finding.text for finding in panel.findings]
    assert any("Gradients vanish" in text and "'0' (Linear)" in text for text in texts)
    assert any("Activations vanish" in text and "'22' (Linear)" in text for text in texts)


def test_a_saturated_layer_is_named(data, tmp_path):
    model = deep(nn.Tanh, orthogonal)
    with torch.no_grad():
        model[6].weight.mul_(200)
    panel = signal(model, data, tmp_path)
    saturated = [f for f in panel.findings if f.text.startswith("Saturation")]
    assert len(saturated) == 1
    assert "'7' (Tanh)" in saturated[0].text
    assert "'5'" not in saturated[0].text
    assert metrics(panel)["saturated_share"].value > 0.9


def test_dead_layers_are_named(data, tmp_path):
    model = deep(nn.ReLU, he, depth=6)
    with torch.no_grad():
        model[4].bias[:48] = -1e3
    panel = signal(model, data, tmp_path)
    dead = [f for f in panel.findings if f.text.startswith("Dead units")]
    assert len(dead) == 1
    assert "75 %" in dead[0].text
    assert "'5' (ReLU)" in dead[0].text
    assert metrics(panel)["dead_share"].value == pytest.approx(0.75, abs=0.05)


def test_a_single_layer_out_of_proportion_is_named(data, tmp_path):
    model = deep(nn.ReLU, he)
    with torch.no_grad():
        model[10].weight.mul_(1e-4)
    texts = [f.text for f in signal(model, data, tmp_path).findings]
    assert any("vanishes at '10' (Linear)" in text for text in texts), texts


def test_the_jacobian_of_a_linear_map_is_its_matrix(tmp_path):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(6, 4)
    found = metrics(signal(model, {"train": (x, torch.arange(40) % 4)}, tmp_path))
    values = torch.linalg.svdvals(model.weight.detach().double())
    assert found["jacobian_norm"].value == pytest.approx(float(values[0]), rel=1e-5)
    assert found["jacobian_mean_square"].value == pytest.approx(
        float(values.square().sum()) / 6, rel=1e-5
    )
    condition = float((values[0] / values[-1]).log10())
    assert found["jacobian_log_condition"].value == pytest.approx(condition, rel=1e-4)
    low, high = found["jacobian_norm"].interval
    assert high - low < 1e-5  # the same at every input


@pytest.mark.parametrize("name", ["residual", "vision-transformer", "lstm", "tagger", "keyword"])
def test_foreign_networks(name, tmp_path):
    model, data, call = make(name)
    panel = signal(model, data, tmp_path, budget=1, call=call)
    found = metrics(panel)
    assert all(np.isfinite(metric.value) for metric in found.values())
    assert ("jacobian_norm" in found) == (name != "tagger")  # tokens have no Jacobian
    names = [row["module"] for row in panel.tables[0].rows]
    assert not any(module.startswith("model.") for module in names)
    assert not any("changed" in note for note in panel.notes)
