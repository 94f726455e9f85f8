"""The split of the curvature along a direction, against dense matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.curvature import CurvatureProbe, directional_curvature
from assay.functional import GGNOperator, HessianOperator, ResidualOperator


def _net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*[layer() for layer in layers]).double()


def _mlp(activation=nn.ReLU, bias=False):
    return _net(lambda: nn.Linear(3, 6, bias), activation, lambda: nn.Linear(6, 4, bias))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)

    def forward(self, x):
        return self.layer(x).mean(1)


def _data(shape=(5, 3), classes=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return x, torch.randint(classes, (shape[0],), generator=g)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (_mlp(), _data()),
        (_mlp(nn.GELU, bias=True), _data()),
        (Attention().double().train(), _data((5, 3, 4))),
        (_net(lambda: nn.Linear(3, 6), lambda: nn.BatchNorm1d(6), nn.Tanh), _data(classes=6)),
    ],
    ids=["relu", "gelu", "attention-with-dropout", "batchnorm-train"],
)
def test_parts_are_the_quadratic_forms_of_the_matrices(model, data):
    H, G, R = (
        kind(model, F.cross_entropy, data)
        for kind in (HessianOperator, GGNOperator, ResidualOperator)
    )
    g = H.gradient()
    found = directional_curvature(model, F.cross_entropy, data)
    unit = g / g.norm()
    assert found.total == pytest.approx(float(unit @ (H @ unit)), rel=1e-9, abs=1e-12)
    assert found.gauss_newton == pytest.approx(float(unit @ (G @ unit)), rel=1e-9, abs=1e-12)
    assert found.residual == pytest.approx(float(unit @ (R @ unit)), rel=1e-9, abs=1e-12)
    bent = R @ unit
    assert found.cos_residual == pytest.approx(float(unit @ bent / bent.norm()), rel=1e-8)
    assert found.ratio == pytest.approx(abs(found.residual) / found.gauss_newton)


def test_two_layer_relu_net_has_the_residual_of_its_cross_terms():
    # f = V relu(Wx): ∇²f has only the cross block between V and W, so dᵀHd is
    # 2 Σ_n ⟨∂ℓ/∂f, dV (relu'(Wx) ⊙ dW x)⟩ / N for the direction (dW, dV).
    model = _mlp()
    x, y = _data()
    W, V = model[0].weight.detach(), model[2].weight.detach()
    g = torch.Generator().manual_seed(3)
    dW = torch.randn(W.shape, generator=g, dtype=torch.float64)
    dV = torch.randn(V.shape, generator=g, dtype=torch.float64)
    z = model(x).detach()
    slope = z.softmax(1) - F.one_hot(y, 4)
    gate = (x @ W.T > 0).double()
    cross = ((gate * (x @ dW.T)) @ dV.T * slope).sum(1).mean()
    squared = dW.square().sum() + dV.square().sum()
    found = directional_curvature(
        model, F.cross_entropy, (x, y), direction={"0.weight": dW, "2.weight": dV}
    )
    assert found.residual == pytest.approx(float(2 * cross / squared), rel=1e-10)


def test_batches_give_the_split_of_the_whole():
    model, (x, y) = _mlp(), _data((7, 3))
    whole = directional_curvature(model, F.cross_entropy, (x, y))
    parts = directional_curvature(model, F.cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])])
    assert parts.gauss_newton == pytest.approx(whole.gauss_newton, rel=1e-12)
    assert parts.residual == pytest.approx(whole.residual, rel=1e-10)


class _NoForwardMode(torch.autograd.Function):
    """A sine that knows no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def forward(self, x):
        return _NoForwardMode.apply(x)


class PlainSine(nn.Module):
    def forward(self, x):
        return x.sin()


def test_an_operator_without_forward_mode_falls_back_to_reverse_passes():
    data = _data()
    with_fallback = directional_curvature(_mlp(Sine), F.cross_entropy, data)
    plain = directional_curvature(_mlp(PlainSine), F.cross_entropy, data)
    assert with_fallback.gauss_newton == pytest.approx(plain.gauss_newton, rel=1e-10)
    assert with_fallback.residual == pytest.approx(plain.residual, rel=1e-10)


def test_a_stationary_point_and_a_wrong_direction_are_errors():
    model, (x, y) = _mlp(), _data()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with pytest.raises(ValueError, match="stationary"):
        directional_curvature(model, F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match=r"shape \(42,\)"):
        directional_curvature(model, F.cross_entropy, (x, y), direction=torch.ones(3))
    with pytest.raises(ValueError, match="'grad'"):
        directional_curvature(model, F.cross_entropy, (x, y), direction="up")
    with pytest.raises(ValueError, match="every"):
        CurvatureProbe(model, F.cross_entropy, every=0)


def test_probe_leaves_the_training_as_it_is():
    data = _data()

    def train(probing):
        model = _net(lambda: nn.Linear(3, 6), nn.Dropout, lambda: nn.Linear(6, 4)).train()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = CurvatureProbe(model, F.cross_entropy, every=2)
        torch.manual_seed(5)
        for _ in range(5):
            if probing:
                probe.step(*data)
            sgd.zero_grad()
            F.cross_entropy(model(data[0]), data[1]).backward()
            sgd.step()
        return model[0].weight.detach(), probe.history

    (plain, _), (probed, history) = train(False), train(True)
    assert torch.equal(plain, probed)
    assert [step for step, _ in history] == [0, 2, 4]
