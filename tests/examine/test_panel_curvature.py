"""The curvature panel against dense Hessians, closed forms and rescaled networks."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from assay.examine import examine
from assay.functional import GGNOperator, HessianOperator
from examine.foreign import make

BUDGET = 3600.0  # far more than these networks use: figures do not depend on the machine


def curvature(model, data, tmp_path, budget=BUDGET, **kwargs):
    report = examine(
        model, data, panels=["curvature"], budget=budget, output=tmp_path, resume=False, **kwargs
    )
    return report.panels[0]


def metrics(panel):
    assert panel.status == "done", panel.reason
    return {metric.name: metric for metric in panel.metrics}


def half(metric):
    return (metric.interval[1] - metric.interval[0]) / 2


@pytest.fixture(scope="module")
def net_and_data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=g, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    return model, {"train": (x, y)}


def test_figures_are_those_of_the_dense_matrices(net_and_data, tmp_path):
    model, data = net_and_data
    found = metrics(curvature(model, data, tmp_path))
    loss = nn.CrossEntropyLoss()
    operator = HessianOperator(model, loss, data["train"])
    H = operator.to_dense()
    G = GGNOperator(model, loss, data["train"]).to_dense()
    values = torch.linalg.eigvalsh(H)
    # 31 parameters: Lanczos spans the whole space.
    assert found["top_eigenvalue"].value == pytest.approx(float(values[-1]), rel=1e-9)
    assert found["smallest_eigenvalue"].value == pytest.approx(float(values[0]), rel=1e-6)
    assert found["max_lr"].value == pytest.approx(2 / float(values[-1]), rel=1e-9)
    d = operator.gradient()
    d = d / d.norm()
    assert found["gradient_curvature"].value == pytest.approx(float(d @ H @ d), rel=1e-9)
    assert found["gradient_curvature_ggn"].value == pytest.approx(float(d @ G @ d), rel=1e-9)
    residual = found["gradient_curvature_residual"]
    assert residual.value == pytest.approx(float(d @ (H - G) @ d), rel=1e-6)
    # Random probes: three half-widths of a 95 % interval, some six standard errors.
    trace = found["trace"]
    assert abs(trace.value - float(H.trace())) < 3 * half(trace)
    magnitude = float(values.abs().sum())
    share = found["negative_share"]
    assert abs(share.value + float(values.clamp(max=0).sum()) / magnitude) < 3 * half(share)
    rank = found["effective_rank"]
    assert abs(rank.value - magnitude**2 / float(values.square().sum())) < 3 * half(rank)
    weights = operator.layout.flatten(operator.params).detach().abs()
    relative = torch.linalg.eigvalsh(weights[:, None] * H * weights)
    assert found["invariant_sharpness"].value == pytest.approx(float(relative[-1]), rel=1e-9)


def test_a_rescaled_network_looks_sharper_and_is_not(net_and_data, tmp_path):
    model, data = net_and_data
    sharp = copy.deepcopy(model)
    with torch.no_grad():  # the same function: ReLU is homogeneous
        sharp[0].weight.mul_(10)
        sharp[0].bias.mul_(10)
        sharp[2].weight.div_(10)
    x = data["train"][0]
    torch.testing.assert_close(sharp(x), model(x))
    panels = [curvature(net, data, tmp_path / str(i)) for i, net in enumerate((model, sharp))]
    before, after = map(metrics, panels)
    assert after["top_eigenvalue"].value > 10 * before["top_eigenvalue"].value
    assert after["trace"].value > before["trace"].value
    assert after["max_lr"].value < before["max_lr"].value
    same = before["invariant_sharpness"].value
    assert after["invariant_sharpness"].value == pytest.approx(same, rel=1e-8)
    for panel in panels:  # said whether or not the network was scaled: nobody can tell
        assert any("not invariant under rescaling" in f.text for f in panel.findings)


def test_the_warning_and_the_larger_eigenvalue_survive_a_tight_budget(net_and_data, tmp_path):
    model, data = net_and_data
    panel = curvature(model, data, tmp_path, budget=0.5)
    assert metrics(panel)["top_eigenvalue"].value > 0
    assert any("not invariant" in f.text for f in panel.findings)


def test_a_linear_model_has_no_residual_and_a_closed_form(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=g)
    y = x @ torch.randn(5, 1, generator=g) + torch.randn(64, 1, generator=g)
    found = metrics(curvature(nn.Linear(5, 1, bias=False), {"train": (x, y)}, tmp_path))
    values = torch.linalg.eigvalsh(2 * x.T @ x / 64)
    assert found["top_eigenvalue"].value == pytest.approx(float(values[-1]), rel=1e-5)
    assert found["gradient_curvature_residual"].value == pytest.approx(0, abs=1e-5)
    assert found["negative_share"].value == pytest.approx(0, abs=1e-5)
    expected = float(values.sum() ** 2 / values.square().sum())
    rank = found["effective_rank"]
    assert abs(rank.value - expected) < 3 * half(rank) + 1e-4


class SquaredOnce(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t):
        return 2 * ctx.saved_tensors[0] * t


class SquaredForward(SquaredOnce):
    """One that has no forward-mode derivative either."""

    jvp = torch.autograd.Function.jvp


class Squares(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.function = function

    def forward(self, x):
        return self.function.apply(self.linear(x))


def test_without_second_derivatives_the_gauss_newton_matrix_is_reported(tmp_path):
    g = torch.Generator().manual_seed(0)
    data = {"train": (torch.randn(64, 3, generator=g), torch.arange(64) % 2)}
    model = Squares(SquaredOnce)
    panel = curvature(model, data, tmp_path)
    found = metrics(panel)
    twin = Squares(SquaredOnce)
    twin.load_state_dict(model.state_dict())
    G = GGNOperator(twin, nn.CrossEntropyLoss(), data["train"]).to_dense()
    assert found["top_eigenvalue"].value == pytest.approx(
        float(torch.linalg.eigvalsh(G)[-1]), rel=1e-4
    )
    assert "Gauss-Newton" in found["top_eigenvalue"].label
    assert "gradient_curvature" not in found
    assert "negative_share" not in found
    assert any("cannot be differentiated twice" in note for note in panel.notes)


def test_without_any_such_product_the_panel_says_so(tmp_path):
    data = {"train": (torch.randn(20, 3), torch.arange(20) % 2)}
    panel = curvature(Squares(SquaredForward), data, tmp_path)
    assert panel.status == "not applicable"
    assert "products with the Hessian" in panel.reason


def test_a_frozen_half_precision_model_is_examined_in_single_precision(tmp_path):
    g = torch.Generator().manual_seed(0)
    data = {"train": (torch.randn(32, 3, generator=g), torch.arange(32) % 2)}
    model = nn.Linear(3, 2).bfloat16().requires_grad_(False)
    found = metrics(curvature(model, data, tmp_path))
    assert found["top_eigenvalue"].value > 0
    assert not model.weight.requires_grad


@pytest.mark.parametrize("name", ["residual", "vision-transformer", "tagger"])
def test_foreign_networks(name, tmp_path):
    model, data, call = make(name)
    panel = curvature(model, data, tmp_path, budget=2, call=call)
    found = metrics(panel)
    assert all(np.isfinite(metric.value) for metric in found.values())
    assert {"top_eigenvalue", "invariant_sharpness"} <= set(found)
    assert not any("changed" in note for note in panel.notes)
