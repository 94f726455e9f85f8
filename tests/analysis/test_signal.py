"""The signal report: its figures against direct ones, its advice on nets that are ill by design."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.analysis import propagation_report
from assay.optim import critical_


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def deep(layers, activation, std, width=64):
    net = nn.Sequential()
    for _ in range(layers):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=std / math.sqrt(width))
        net.append(linear).append(activation())
    return net.append(nn.Linear(width, 3, bias=False))


def batch(width=64, n=32):
    return torch.randn(n, width), torch.arange(n) % 3


def named(report):
    return {module.name: module for module in report.modules}


# --------------------------------------------------------------------------------------- figures


def test_figures_are_second_moments_and_norms_of_gradients():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(10, 6).double(), torch.arange(10) % 3
    hidden = net[0](x)
    active = net[1](hidden)
    out = net[2](active)
    loss = F.cross_entropy(out, y)
    tensors = (hidden, active, out)
    gradients = torch.autograd.grad(loss, tensors)
    report = propagation_report(net, (x, y), F.cross_entropy)
    assert report.loss == pytest.approx(loss.item())
    for module, tensor, gradient in zip(report.modules, tensors, gradients, strict=True):
        assert module.second_moment == pytest.approx(tensor.square().mean().item())
        assert module.gradient_norm == pytest.approx(gradient.norm().item())
    assert report.modules[1].dead == pytest.approx((active == 0).all(0).double().mean().item())
    assert [module.name for module in report.layers] == ["0", "2"]


def test_growth_rates_are_those_of_the_mean_field():
    # A ReLU net without biases and with gain g: q changes by g²/2 a layer, and so does ‖δ‖².
    gain = 0.8
    report = propagation_report(deep(30, nn.ReLU, gain, width=256), batch(256), F.cross_entropy)
    expected = math.log(gain**2 / 2)
    assert report.forward_growth == pytest.approx(expected, rel=0.1)
    assert report.backward_growth == pytest.approx(-expected / 2, rel=0.1)


def test_an_inplace_activation_does_not_change_what_is_reported():
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    changed = copy.deepcopy(plain)
    changed[1] = nn.ReLU(inplace=True)
    data = torch.randn(10, 6), torch.arange(10) % 3
    ours, theirs = (propagation_report(net, data, F.cross_entropy) for net in (plain, changed))
    assert ours.modules == theirs.modules


def test_a_module_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    net, (x, y) = Twice(), (torch.randn(5, 4), torch.arange(5) % 3)
    report = propagation_report(net, (x, y), F.cross_entropy)
    first = net.layer(x)
    second = net.layer(first.tanh())
    [layer, tanh] = report.modules
    assert (layer.name, layer.calls, tanh.name) == ("layer", 2, "Twice.tanh()")
    both = torch.cat([first, second]).square().mean().item()
    assert layer.second_moment == pytest.approx(both)
    gradients = torch.autograd.grad(F.cross_entropy(second, y), (first, second))
    assert layer.gradient_norm == pytest.approx(torch.cat(gradients).norm().item())


def test_dead_channels_and_dead_features():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        conv[0].bias[0] = -100.0
        conv[0].bias[1:] = 100.0
    images = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    assert named(propagation_report(conv, images, F.cross_entropy))["1"].dead == 0.25
    tokens = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        tokens[0].bias[:2] = -100.0
        tokens[0].bias[2:] = 100.0
    data = torch.randn(6, 5, 4), torch.arange(6) % 3
    report = propagation_report(tokens, data, lambda out, y: F.cross_entropy(out.mean(1), y))
    assert named(report)["1"].dead == 0.25


# ---------------------------------------------------------------------------------------- advice


def test_vanishing_gradients_are_named():
    report = propagation_report(deep(20, nn.ReLU, 0.5), batch(), F.cross_entropy)
    assert report.advice[0].text.startswith("Gradients vanish on their way back to '0' (Linear)")
    assert any(line.text.startswith("Activations vanish") for line in report.advice)
    assert "critical_" in report.advice[0].text
    assert not report.healthy


def test_exploding_signals_are_named():
    report = propagation_report(deep(20, nn.ReLU, 3.0), batch(), lambda out, y: out.square().mean())
    assert report.advice[0].text.startswith("Gradients explode on their way back to '0' (Linear)")
    [line] = [line for line in report.advice if line.text.startswith("Activations explode")]
    assert "'38' (Linear)" in line.text  # the last of its width


def test_overflow_names_the_first_module_that_overflows():
    net = deep(4, nn.ReLU, 1.0)
    with torch.no_grad():
        net[4].weight.fill_(1e38)
    report = propagation_report(net, batch(), F.cross_entropy)
    assert report.advice[0].text.startswith("Activations overflow: '4' (Linear)")


def test_saturated_and_dead_layers_are_named():
    saturated = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Tanh(),
                              nn.Linear(8, 3))  # fmt: skip
    with torch.no_grad():
        saturated[2].weight.mul_(300)
    report = propagation_report(saturated, batch(8), F.cross_entropy)
    [line] = [line for line in report.advice if line.text.startswith("Saturation")]
    assert "'3' (Tanh)" in line.text
    dying = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        dying[0].bias.fill_(-100.0)
    report = propagation_report(dying, batch(8), F.cross_entropy)
    assert any("Dead units: 100 % of the units of '1' (ReLU)" in a.text for a in report.advice)
    assert any("No gradient arrives at '0' (Linear)" in line.text for line in report.advice)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_critical_net_is_healthy(activation):
    kind = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    net = critical_(deep(30, kind, 1.0, width=128), activation)
    report = propagation_report(net, batch(128), F.cross_entropy)
    assert report.healthy, report.advice
    assert str(report).endswith("Signals and gradients get through.")


def test_a_default_deep_net_is_not():
    layers = [m for _ in range(20) for m in (nn.Linear(64, 64), nn.ReLU())]
    report = propagation_report(nn.Sequential(*layers, nn.Linear(64, 3)), batch(), F.cross_entropy)
    assert report.advice[0].text in str(report)
    assert report.rows()[0]["module"] == "0"


# -------------------------------------------------------------------------------- any nn.Module


class ConvNet(nn.Module):
    """BatchNorm, an in-place activation, a shortcut, functions instead of modules, a mapping."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x -= 0.5  # nobody should, and some do
        h = self.relu(self.norm(self.conv1(x)))
        h = F.relu(h + self.conv2(h))
        return {"logits": self.head(self.drop(h.mean((2, 3)))), "features": h}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, dropout=0.2, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens, scale):
        out, (h, _) = self.lstm(self.embed(tokens))
        return self.head(scale * out[:, -1]), h


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.patch = nn.Conv2d(1, 8, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        return self.head(self.encoder(h)[:, 0])


def first_of(output):
    return output["logits"] if isinstance(output, dict) else output[0]


@pytest.mark.parametrize(
    ("model", "inputs", "loss_fn", "expected"),
    [
        (ConvNet, torch.rand(6, 1, 8, 8), lambda o, y: F.cross_entropy(o["logits"], y),
         ("conv1", "norm", "relu", "conv2", "ConvNet.relu()", "drop", "head")),
        (Recurrent, {"tokens": torch.arange(30).view(6, 5) % 11, "scale": torch.tensor(2.0)},
         lambda o, y: F.cross_entropy(o[0], y), ("embed", "lstm", "head")),
        (Transformer, torch.rand(6, 1, 4, 4), F.cross_entropy,
         ("patch", "encoder.layers.0.self_attn", "encoder.layers.1.linear2", "head")),
    ],
    ids=["cnn", "lstm", "transformer"],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_any_module_is_reported_and_left_as_it_was(model, inputs, loss_fn, expected, training):
    net = model().train(training)
    if training:
        net.head.eval()  # a mode of its own
    kept = inputs.clone() if isinstance(inputs, torch.Tensor) else dict(inputs)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    y = torch.arange(6) % 3
    report = propagation_report(net, (inputs, y), loss_fn)
    found = [module.name for module in report.modules]
    assert set(expected) <= set(found)
    assert [name for name in found if name in expected] == list(expected)
    assert all(math.isfinite(m.second_moment) and m.second_moment > 0 for m in report.modules)
    assert all(m.gradient_norm > 0 for m in report.layers)
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert net.head.weight.grad.eq(1).all()
    assert all(p.grad is None for name, p in net.named_parameters() if name != "head.weight")
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    if isinstance(inputs, torch.Tensor):
        assert torch.equal(inputs, kept)
    assert propagation_report(net, (inputs, y), loss_fn) == report


def test_a_frozen_model_is_reported_through_its_input():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(False)
    report = propagation_report(net, batch(4), F.cross_entropy)
    assert all(module.gradient_norm > 0 for module in report.modules)


def test_a_recomputed_block_is_heard_once():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    report = propagation_report(Checkpointed(), batch(4), F.cross_entropy)
    assert [module.calls for module in report.modules] == [1, 1, 1]
    assert all(module.gradient_norm > 0 for module in report.modules)


def test_hooks_are_gone_after_an_error():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            raise RuntimeError(f"no {self.layer(x).shape}")

    net = Broken()
    with pytest.raises(RuntimeError, match="no torch"):
        propagation_report(net, batch(4), F.cross_entropy)
    assert not net.layer._forward_hooks
    with pytest.raises(ValueError, match="scalar"):
        propagation_report(nn.Linear(4, 3), batch(4), lambda out, y: out)
    with pytest.raises(ValueError, match="does not depend"):
        propagation_report(nn.Linear(4, 3), batch(4), lambda out, y: torch.tensor(1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_laid_to_the_inputs_and_not_to_the_initialisation(bad):
    net = nn.Linear(4, 3)
    x, y = batch(4)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=r"inputs must be finite, got 1 of 128 values"):
        propagation_report(net, (x, y), F.cross_entropy)
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    y[0] = bad
    with pytest.raises(ValueError, match=r"targets must be finite, got 3 of 15 values"):
        propagation_report(net, (x, y), F.mse_loss)


def test_a_mask_of_minus_infinity_is_no_bad_input():
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inputs = {"src": torch.randn(3, 4, 8), "src_mask": torch.full((4, 4), -math.inf).triu(1)}

    def loss(out, y):
        return out.square().mean()

    assert math.isfinite(propagation_report(net, (inputs, None), loss).loss)
    with torch.no_grad():
        net.linear1.weight.fill_(1e30)
        net.linear2.weight.fill_(1e30)
    assert propagation_report(net, (inputs, None), loss).advice[0].kind == "overflow"


def test_a_loss_that_overflows_behind_finite_outputs_is_not_healthy():
    report = propagation_report(nn.Linear(4, 3), batch(4), lambda out, y: (1e38 * out.exp()).sum())
    assert report.loss == math.inf
    assert report.advice[0].kind == "overflow"
    assert report.advice[0].text.startswith("The loss is inf although all outputs are finite")


@pytest.mark.parametrize("inputs", [torch.randn(0, 4), torch.zeros(0, 5, dtype=torch.int64)])
def test_an_empty_batch_says_nothing_about_a_model(inputs):
    net = nn.Linear(4, 3) if inputs.is_floating_point() else nn.Embedding(9, 3)
    with pytest.raises(ValueError, match="at least one sample, got an empty batch"):
        propagation_report(net, (inputs, torch.zeros(0)), lambda out, y: out.sum())
