"""Critical weights against quadrature, isometries against the SVD, LSUV against its definition."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from assay.optim import (
    critical_,
    delta_orthogonal_,
    edge_of_chaos,
    fixup_,
    lsuv_,
    mean_field,
)


def expectation(function):
    """E function(z), z ~ N(0, 1), by Gauss-Hermite with 200 nodes."""
    z, w = np.polynomial.hermite_e.hermegauss(200)
    return float((w * function(z)).sum() / math.sqrt(2 * math.pi))


# ------------------------------------------------------------------------------------ mean field


@pytest.mark.parametrize(
    ("sigma_b2", "sigma_w2", "q"),
    [(0.05, 1.76095, 0.5700), (0.01, 1.4242, 0.2733), (0.1, 1.9861, 0.8058)],
)
def test_the_critical_line_of_tanh_is_the_known_one(sigma_b2, sigma_w2, q):
    found = edge_of_chaos("tanh", sigma_b2)
    assert found.sigma_w2 == pytest.approx(sigma_w2, abs=5e-5)
    assert found.q == pytest.approx(q, abs=5e-5)


@pytest.mark.parametrize("sigma_b2", [0.02, 0.3])
def test_both_equations_hold_by_another_quadrature(sigma_b2):
    sigma_w2, q = edge_of_chaos(torch.tanh, sigma_b2)
    root = math.sqrt(q)
    assert sigma_w2 * expectation(lambda z: 1 / np.cosh(root * z) ** 4) == pytest.approx(
        1, abs=1e-9
    )
    again = sigma_w2 * expectation(lambda z: np.tanh(root * z) ** 2) + sigma_b2
    assert again == pytest.approx(q, abs=1e-9)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("relu", 2.0), ("identity", 1.0), (nn.LeakyReLU(0.5), 2 / 1.25), ("tanh", 1.0), ("gelu", 4.0)],
)
def test_without_biases_the_slopes_at_zero_decide(activation, expected):
    assert edge_of_chaos(activation).sigma_w2 == pytest.approx(expected, rel=1e-9)


def test_elu_has_its_kink_where_panels_meet():
    sigma_w2, q = edge_of_chaos("elu", 0.05)

    def moment(function):
        def density(z):
            return function(math.sqrt(q) * z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

        return sum(integrate.quad(density, a, b, epsabs=1e-12)[0] for a, b in ((-12, 0), (0, 12)))

    slope = moment(lambda u: 1.0 if u > 0 else math.exp(2 * u))
    square = moment(lambda u: u * u if u > 0 else math.expm1(u) ** 2)
    assert sigma_w2 * slope == pytest.approx(1, abs=1e-9)
    assert sigma_w2 * square + 0.05 == pytest.approx(q, abs=1e-9)


def test_mean_field_of_relu_in_closed_form():
    # q = σ_w²/2 q + σ_b², χ = σ_w²/2
    found = mean_field("relu", 1.0, 0.1)
    assert found.q == pytest.approx(0.2)
    assert found.chi == pytest.approx(0.5)
    assert found.depth_scale == pytest.approx(1 / math.log(2))
    assert mean_field("relu", 2.0) == (1.0, 1.0, math.inf)


def test_mean_field_predicts_a_wide_random_net():
    sigma_w2, sigma_b2, width = 2.5, 0.3, 3000
    g = torch.Generator().manual_seed(0)
    h = torch.randn(width, generator=g)
    for _ in range(12):
        W = torch.randn(width, width, generator=g) * math.sqrt(sigma_w2 / width)
        h = W @ h.tanh() + math.sqrt(sigma_b2) * torch.randn(width, generator=g)
    # The mean of 3,000 squares, standard deviation q √2: three standard errors are 8 %.
    assert h.square().mean().item() == pytest.approx(
        mean_field("tanh", sigma_w2, sigma_b2).q, rel=0.08
    )


def test_chaos_has_a_negative_depth_scale():
    assert mean_field("tanh", 4.0).depth_scale < 0 < mean_field("tanh", 0.5).depth_scale


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: edge_of_chaos("relu", 0.1), "no edge of chaos"),
        (lambda: edge_of_chaos("softplus"), "no edge of chaos"),
        (lambda: edge_of_chaos("rulu"), "activation must be one of"),
        (lambda: edge_of_chaos("tanh", -0.1), "sigma_b2 must be at least 0"),
        (lambda: mean_field("relu", 3.0), "grow without bound"),
        (lambda: mean_field("tanh", -1.0), "sigma_w2 must be at least 0"),
        (lambda: critical_(nn.Flatten(), "relu"), "no linear or convolutional layer"),
    ],
)
def test_what_has_no_answer_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --------------------------------------------------------------------------------------- weights


def test_a_deep_orthogonal_linear_net_is_an_isometry():
    net = nn.Sequential(*(nn.Linear(24, 24) for _ in range(50))).double()
    critical_(net, "identity", generator=torch.Generator().manual_seed(0))
    J = torch.func.jacrev(net)(torch.zeros(24, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.svdvals(J), torch.ones(24).double(), rtol=0, atol=1e-12)


def test_variances_of_gaussian_critical_weights_and_biases():
    net = nn.Sequential(nn.Conv2d(16, 64, 5), nn.Linear(500, 400))
    critical_(
        net, "tanh", sigma_b2=0.05, orthogonal=False, generator=torch.Generator().manual_seed(0)
    )
    for layer, fan_in in zip(net, (16 * 25, 500), strict=True):
        # A sample variance of n normals has the relative standard deviation √(2/n).
        n = layer.weight.numel()
        bound = 4 * math.sqrt(2 / n)
        assert layer.weight.var().item() * fan_in == pytest.approx(1.76095, rel=bound)
    assert net[1].bias.var().item() == pytest.approx(0.05, rel=4 * math.sqrt(2 / 400))


def test_critical_convolutions_that_cannot_be_isometries_are_gaussian():
    net = nn.Sequential(nn.Conv1d(8, 4, 3), nn.Conv2d(2, 4, 2), nn.ConvTranspose2d(4, 4, 3))
    critical_(net, "relu", generator=torch.Generator().manual_seed(0))
    assert all((layer.weight != 0).all() for layer in net)
    good = nn.Conv2d(2, 4, 3)
    critical_(good, "relu")
    assert int((good.weight != 0).sum()) == 8
    assert torch.allclose(
        good.weight[:, :, 1, 1].T @ good.weight[:, :, 1, 1], 2 * torch.eye(2), atol=1e-5
    )


def test_tied_weights_are_drawn_once():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    g = torch.Generator().manual_seed(0)
    critical_(nn.Sequential(first, second), "identity", generator=g)
    alone = critical_(nn.Linear(6, 6), "identity", generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.weight, alone.weight)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_delta_orthogonal_convolution_keeps_norms(conv):
    layer = conv(3, 5, 3, padding=1, bias=False).double()
    delta_orthogonal_(layer.weight, 2.0)
    x = torch.randn(2, 3, *[6] * (layer.weight.ndim - 2), dtype=torch.float64)
    torch.testing.assert_close(layer(x).norm(), 2 * x.norm())


def test_groups_are_isometries_of_their_own():
    layer = nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False).double()
    delta_orthogonal_(layer.weight, groups=2)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    for half in (slice(0, 2), slice(2, 4)):
        part = torch.zeros_like(x)
        part[:, half] = x[:, half]
        torch.testing.assert_close(layer(part).norm(), part.norm())


def test_flattened_orthogonal_weights_are_no_isometry():
    layer = nn.Conv2d(4, 36, 3, padding=1, bias=False).double()
    nn.init.orthogonal_(layer.weight)
    x = torch.ones(1, 4, 9, 9, dtype=torch.float64)
    assert abs((layer(x).norm() / x.norm()).item() - 1) > 0.1


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 3, 3), (4, 4, 2, 2)])
def test_weights_that_cannot_be_delta_orthogonal(shape):
    with pytest.raises(ValueError, match=r"odd size|at least as many outputs"):
        delta_orthogonal_(torch.empty(shape))


def test_half_precision_and_generators():
    a, b = (torch.empty(4, 4, 3, dtype=torch.bfloat16) for _ in range(2))
    delta_orthogonal_(a, generator=torch.Generator().manual_seed(1))
    delta_orthogonal_(b, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------ LSUV


class Branches(nn.Module):
    """Layers that run in another order than they are registered in, one of them twice."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(12, 3)
        self.unused = nn.Linear(2, 2)
        self.shared = nn.Linear(12, 12)
        self.first = nn.Conv1d(1, 2, 3)

    def forward(self, x):
        h = self.first(x).flatten(1).tanh()
        return self.last(self.shared(torch.relu(self.shared(h))))


def test_lsuv_gives_every_layer_variance_one_in_the_order_they_run():
    torch.manual_seed(0)
    net = Branches()
    unused = net.unused.weight.detach().clone()
    x = 30 * torch.randn(64, 1, 8)
    variances = lsuv_(net, x, tol=1e-3)
    assert list(variances) == ["first", "shared", "last"]
    found, hooks = {}, []
    for name, layer in net.named_children():
        hooks.append(
            layer.register_forward_hook(
                lambda m, i, o, name=name: found.update(
                    {name: found.get(name) or o.var(correction=0).item()}
                )
            )
        )
    net(x)
    assert found == pytest.approx(variances, rel=1e-5)
    assert all(abs(v - 1) <= 1e-3 for v in found.values())
    assert torch.equal(net.unused.weight, unused)


def test_lsuv_is_orthogonal_weights_times_a_scalar():
    net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4))
    lsuv_(net, torch.randn(50, 10))
    for layer in (net[0], net[2]):
        gram = layer.weight @ layer.weight.T
        assert torch.allclose(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-5)
        assert not layer.bias.any()


def test_lsuv_costs_one_pass():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    net = nn.Sequential(*(Counted(8, 8) for _ in range(20)))
    lsuv_(net, torch.randn(32, 8))
    # For each layer its variance before and after the one scaling.
    assert 20 < len(calls) <= 2 * 20


class TiedLanguageModel(nn.Module):
    """The output layer's weight is the embedding's, which comes before all that was scaled."""

    def __init__(self, words=11, features=8):
        super().__init__()
        self.embedding = nn.Embedding(words, features)
        self.hidden = nn.Linear(features, features)
        self.output = nn.Linear(features, words, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, words):
        return self.output(torch.tanh(self.hidden(self.embedding(words)).mean(1)))


@pytest.mark.parametrize("seed", range(5))
def test_lsuv_of_tied_weights_returns_the_variances_of_the_end(seed):
    torch.manual_seed(seed)
    net = TiedLanguageModel().double()
    words = torch.randint(11, (64, 5))
    variances = lsuv_(net, words)
    assert net.output.weight is net.embedding.weight
    hidden = net.hidden(net.embedding(words))
    found = {"hidden": hidden, "output": net.output(torch.tanh(hidden.mean(1)))}
    found = {name: out.var(correction=0).item() for name, out in found.items()}
    assert found == pytest.approx(variances, rel=1e-12)
    assert all(abs(v - 1) <= 0.02 for v in found.values())


def test_lsuv_says_so_where_tied_weights_cannot_have_variance_one():
    # One scaling a pass, one further pass: the variances are not 1, and not said to be.
    torch.manual_seed(0)
    net = TiedLanguageModel().double()
    words = torch.randint(11, (64, 5))
    variances = lsuv_(net, words, tol=1e-12, max_iter=1)
    hidden = net.hidden(net.embedding(words))
    assert variances["hidden"] == pytest.approx(hidden.var(correction=0).item(), rel=1e-12)
    assert abs(variances["hidden"] - 1) > 1e-12


def test_lsuv_leaves_no_trace_but_weights():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    lsuv_(net, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),
          generator=torch.Generator().manual_seed(1))  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert not net[1].running_mean.any()
    assert not any(module._forward_hooks for module in net.modules())


def test_lsuv_of_a_transformer_and_of_keyword_inputs():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    variances = lsuv_(net, {"src": torch.randn(6, 5, 8)})
    assert len(variances) == 6
    assert all(abs(v - 1) <= 0.02 for v in variances.values())


def test_lsuv_names_the_layer_behind_dead_units():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[1].register_forward_hook(lambda m, i, o: torch.zeros_like(o))
    with pytest.raises(ValueError, match="layer '2' has variance 0"):
        lsuv_(net, torch.randn(8, 4))
    assert len(net[0]._forward_hooks) == 0
    with pytest.raises(ValueError, match="layer '0' has variance nan"):
        lsuv_(net, torch.full((8, 4), math.nan))
    with pytest.raises(ValueError, match="no layer"):
        lsuv_(nn.Tanh(), torch.randn(2, 2))
    with pytest.raises(ValueError, match="tol"):
        lsuv_(net, torch.randn(2, 4), tol=0.0)


# ----------------------------------------------------------------------------------------- Fixup


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.branch(x)


def residual_net(blocks=16, channels=8):
    net = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
    net.append(nn.Flatten())
    net.append(nn.Linear(channels * 16, 3))
    return net


def test_fixup_scales_by_the_number_of_branches():
    net = residual_net(blocks=16, channels=16)
    fixup_(net, [net[i].branch for i in range(16)], head=net[-1],
           generator=torch.Generator().manual_seed(0))  # fmt: skip
    branch = net[0].branch
    # m = 3: L^(−1/4) = 1/2, so the variance is a quarter of He's 2/fan_in; 2,304 weights each.
    for layer in (branch[0], branch[2]):
        found = layer.weight.var().item() * 16 * 9
        assert found == pytest.approx(2 / 4, rel=4 * math.sqrt(2 / 2304))
    assert not branch[4].weight.any()
    assert not net[-1].weight.any()
    names = {name.rpartition(".")[2] for name, _ in net.named_parameters()}
    assert {"fixup_bias", "fixup_multiplier", "fixup_output_bias"} <= names


def test_a_fixup_net_copies_pickles_and_trains():
    torch.manual_seed(0)
    net = residual_net(blocks=4)
    fixup_(net, [net[i].branch for i in range(4)], head=net[-1])
    x, y = torch.randn(16, 8, 4, 4), torch.arange(16) % 3
    assert torch.equal(net[:-1](x), x.flatten(1))
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(x), y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert loss.item() < 0.2
    assert net[0].branch.fixup_multiplier.item() != 1
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
        with torch.no_grad():
            twin[0].branch.fixup_multiplier.add_(1)
        assert not torch.equal(twin(x), net(x))


def test_fixup_refuses_what_are_no_branches():
    net = residual_net(blocks=1)
    with pytest.raises(ValueError, match="blocks is empty"):
        fixup_(net, [])
    with pytest.raises(ValueError, match="not a sub-module"):
        fixup_(net, [nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="has no linear"):
        fixup_(net, [net[1]])
    fixup_(net, [net[0].branch])
    with pytest.raises(ValueError, match="before"):
        fixup_(net, [net[0].branch])
