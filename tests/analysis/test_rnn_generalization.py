"""Norms and bounds of ReLU RNNs against autograd, dense sums, enumeration and exact arithmetic."""

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

from assay.analysis import (
    InputNoise,
    ReLURNN,
    fisher_rao_bound,
    fisher_rao_norm,
    linearized_output,
    log_lambda,
    matrix_norms,
    rnn_bound,
    scaling_derivative,
    smallest_moment,
)
from assay.analysis import rnn_generalization as module


def network(d=3, m=6, k=4, seed=0, scale=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ReLURNN(d, m, k).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


def sequences(n, steps, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, steps, d, generator=g, dtype=torch.float64)


def by_hand(net, x):
    """The definition, step by step: outputs, and hidden states and preactivations of each step."""
    h, states, preactivations = torch.zeros(len(x), len(net.W)).double(), [], []
    for t in range(x.shape[1]):
        g = x[:, t] @ net.U.T + h @ net.W.T
        h = g.clamp_min(0)
        states.append(h)
        preactivations.append(g)
    return h @ net.V.T, states, preactivations


def squared_error(outputs, target):
    return (outputs - (target.unsqueeze(1) == torch.arange(4)).double()).square().sum(1).mean()


class Answering(nn.Module):
    """Somebody's model around an nn.RNN and an nn.Linear."""

    def __init__(self, answer, **options):
        super().__init__()
        options = {"nonlinearity": "relu", "bias": False, "batch_first": True} | options
        self.noise = InputNoise(0.3)
        self.memory = nn.RNN(3, 5, **options)
        self.head = nn.Linear(5, 2, bias=options["bias"])
        self.answer = answer

    def forward(self, x):
        states, last = self.memory(self.noise(x))
        return self.answer(self, states, last)


def last_step(self, states, last):
    return self.head(last[-1])


def test_forward_is_the_definition():
    net, x = network(), sequences(5, 7, 3)
    torch.testing.assert_close(net(x), by_hand(net, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": True}])
def test_takes_the_users_model_where_the_theory_applies(options):
    model = Answering(last_step, **options)
    for name, p in model.named_parameters():
        if "bias" in name:
            nn.init.zeros_(p)
    x = sequences(6, 4, 3).float()
    net = ReLURNN.of(model, x)
    inputs = x if options.get("batch_first", True) else x.transpose(0, 1)
    torch.testing.assert_close(net(x.double()).float(), model.eval()(inputs))
    model.train()
    assert fisher_rao_norm(model, x) == fisher_rao_norm(net, x)
    assert model.training
    # a copy: measuring must not change anybody's weights
    net.U.data.zero_()
    assert model.memory.weight_ih_l0.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Answering(last_step, nonlinearity="tanh"), r"got RNN\(tanh\)"),
        (lambda: Answering(last_step, bias=True), "no biases"),
        (lambda: Answering(last_step, num_layers=2), "num_layers=2"),
        (lambda: Answering(last_step, bidirectional=True), "bidirectional=True"),
        (lambda: Answering(lambda self, s, last: self.head(s.sum(1))), "a sum over the steps"),
        (lambda: Answering(lambda self, s, last: self.head(s[:, 0])), "another step"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "got 0 recurrent and 1 linear"),
        (lambda: nn.ModuleList([nn.GRU(3, 5), nn.Linear(5, 2)]), r"got GRU\(gated\)"),
        (
            lambda: nn.ModuleList(
                [nn.RNN(3, 5, nonlinearity="relu", bias=False), nn.Linear(4, 2, bias=False)]
            ),
            "must read the 5 hidden units",
        ),
    ],
)
def test_refuses_where_it_does_not(make, match):
    with pytest.raises(TypeError, match=match):
        fisher_rao_norm(make(), sequences(4, 6, 3).float())


def test_answers_of_another_type_are_refused():
    with pytest.raises(TypeError, match="answers are different"):
        linearized_output(
            Answering(lambda self, s, last: (self.head(last[-1]),)), sequences(2, 2, 3)
        )


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_scaling_derivative_is_the_sum_of_weights_times_gradients(steps):
    net, x = network(scale=1.5), sequences(5, steps, 3)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def scaled(s):
        u, w, v = (s * p for p in parameters.values())
        h = torch.zeros(len(x), len(w)).double()
        for t in range(steps):
            h = F.relu(x[:, t] @ u.T + h @ w.T)
        return h @ v.T

    _, expected = torch.func.jvp(scaled, (torch.ones(()).double(),), (torch.ones(()).double(),))
    torch.testing.assert_close(scaling_derivative(net, x), expected, rtol=1e-10, atol=1e-12)
    if steps == 1:
        torch.testing.assert_close(expected, 2 * net(x).detach())


def test_linearized_forms_are_the_dense_sums():
    net, x = network(), sequences(5, 6, 3)
    u, w, v = net.U.detach(), net.W.detach(), net.V.detach()
    paths = [x[:, i] @ (v @ torch.linalg.matrix_power(w, 5 - i) @ u).T for i in range(6)]
    torch.testing.assert_close(linearized_output(net, x), sum(paths), rtol=1e-10, atol=1e-12)
    weighted = sum((7 - i) * path for i, path in enumerate(paths))
    found = scaling_derivative(net, x, linearized=True)
    torch.testing.assert_close(found, weighted, rtol=1e-10, atol=1e-12)
    norm = weighted.abs().amax(1).square().mean().sqrt().item()
    assert fisher_rao_norm(net, x) == pytest.approx(norm, rel=1e-12)


def test_output_is_the_linear_part_and_what_the_relus_cut_off():
    net, x = network(scale=1.3), sequences(5, 6, 3)
    output, states, preactivations = by_hand(net, x)
    paths = [net.V @ torch.linalg.matrix_power(net.W, 5 - i) for i in range(6)]
    cut = sum((h - g) @ path.T for h, g, path in zip(states, preactivations, paths, strict=True))
    torch.testing.assert_close(
        output.detach() - linearized_output(net, x), cut.detach(), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, squared_error])
def test_fisher_rao_norm_is_that_of_the_gradients_of_each_sample(loss_fn):
    net, x = network(), sequences(8, 5, 3)
    y = torch.arange(8) % 4
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, sample, target):
        h = torch.zeros(6).double()
        u, w, v = parameters.values()
        for step in sample:
            h = F.relu(u @ step + w @ h)
        return loss_fn((v @ h).unsqueeze(0), target.unsqueeze(0))

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    products = sum((g * parameters[name]).flatten(1).sum(1) for name, g in gradients.items())
    found = fisher_rao_norm(net, x, y, kind="fr", loss_fn=loss_fn)
    assert found == pytest.approx(products.square().mean().sqrt().item(), rel=1e-8)


@given(st.fractions(0, 6, max_denominator=1000), st.integers(1, 60))
def test_lambda_is_the_closed_form_in_exact_arithmetic(beta, steps):
    if beta == 1:
        exact = Fraction(steps * (steps + 1), 2)
    else:
        exact = ((1 - beta**steps) / (1 - beta) - steps * beta**steps) / (1 - beta)
    assert math.exp(log_lambda(float(beta), steps)) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("offset", [1e-6, -1e-6, 1e-12, 0.0])
def test_lambda_is_accurate_beside_one(offset):
    # The closed form cancels there; Λ(1 + ε) = L(L+1)/2 + ε Σ j(j+1) + O(ε²)
    steps = 100
    expected = 5050 + offset * sum(j * (j + 1) for j in range(steps))
    assert math.exp(log_lambda(1 + offset, steps)) == pytest.approx(expected, rel=1e-8)


def test_lambda_does_not_overflow():
    # Λ → L β^{L−1} · β²/(β−1)² … for large β; at β = 10^6 the last term is all
    expected = math.log(1000) + 999 * math.log(1e6)
    assert log_lambda(1e6, 1000) == pytest.approx(expected, rel=1e-9)
    assert log_lambda(0.0, 5) == 0.0


def test_matrix_norms_are_sums_of_rows():
    net = ReLURNN(2, 2, 2).double()
    with torch.no_grad():
        net.U.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        net.W.copy_(torch.tensor([[1.0, 0.0], [-4.0, 0.5]]))
        net.V.copy_(torch.tensor([[3.0, 3.0], [5.0, 0.0]]))
    norms = matrix_norms(net)
    assert (norms.beta_u, norms.beta_w, norms.beta_v) == (3.0, 4.5, 6.0)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_fisher_rao_norm_is_below_its_bound_by_the_weights(scale):
    net, x = network(scale=scale), sequences(20, 7, 3)
    bound = fisher_rao_bound(net, 7, x.abs().max().item())
    assert fisher_rao_norm(net, x) <= bound
    norms = matrix_norms(net)
    if norms.beta_w < 1:
        rest = 1 / (1 - norms.beta_w)
        limit = norms.beta_v * norms.beta_u * x.abs().max().item() * (rest**2 + rest)
        assert bound <= limit
        assert fisher_rao_bound(net, 2000, x.abs().max().item()) == pytest.approx(limit, rel=1e-9)


def test_bound_is_its_formula():
    net, x = network(d=2, m=5, k=3, seed=1), sequences(40, 3, 2, seed=2)
    y = torch.arange(40) % 3
    a, delta, n = 0.4, 0.1, 40
    report = rnn_bound(net, x, y, margin=a, delta=delta)
    norms = matrix_norms(net)
    rows = x.flatten(1)
    eigenvalue = torch.linalg.eigvalsh(rows.T @ rows / n)[0].item()
    outputs = net(x).detach()
    margins = [
        outputs[i, y[i]] - max(outputs[i, j] for j in range(3) if j != y[i]) for i in range(n)
    ]
    series = sum((j + 1) * norms.beta_w**j for j in range(3))
    factor = 4 * 3 / a
    expected = {
        "empirical": sum(bool(m <= a) for m in margins) / n,
        "gradients": factor
        * fisher_rao_norm(net, x) * rows.norm().item() / (2 * n) / math.sqrt(eigenvalue),
        "weights": factor
        * norms.beta_v * norms.beta_u * rows.abs().sum(0).max().item() / n * series,
        "noise": 0.0,
        "confidence": 3 * math.sqrt(math.log(2 / delta) / (2 * n)),
    }  # fmt: skip
    assert report.terms == pytest.approx(expected, rel=1e-10)
    assert report.total == pytest.approx(sum(expected.values()), rel=1e-10)
    assert report.log10_weights == pytest.approx(math.log10(expected["weights"]), rel=1e-10)


def test_bound_with_noise_is_its_formula():
    net, x = network(d=2, m=5, k=3, seed=1), sequences(5, 3, 2, seed=2)
    y = torch.arange(5) % 3
    a, sigma = 0.4, 0.2
    assert rnn_bound(net, x, y, margin=a).total == math.inf  # five samples in six dimensions
    found = rnn_bound(
        net, x, y, margin=a, noise_std=sigma, generator=torch.Generator().manual_seed(3)
    )
    g = torch.Generator().manual_seed(3)
    noisy = x + sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
    outputs = net(noisy).detach()
    margins = outputs[range(5), y] - torch.stack(
        [outputs[i][torch.arange(3) != y[i]].max() for i in range(5)]
    )
    norms = matrix_norms(net)
    product = norms.beta_v * norms.beta_u
    assert found.empirical == pytest.approx((1 - margins / a).clamp(0, 1).mean().item())
    assert found.lambda_min == pytest.approx(sigma**2)
    assert found.gradients == pytest.approx(
        12 / a * fisher_rao_norm(net, noisy) * noisy.norm().item() / (10 * sigma), rel=1e-10
    )
    series = 1 + norms.beta_w + norms.beta_w**2
    price = 2 / a * product * series * sigma * math.sqrt(2 * math.log(4))
    assert found.noise == pytest.approx(price, rel=1e-10)


def test_best_of_a_grid_pays_for_the_grid():
    net, x = network(), sequences(60, 3, 3)
    y = torch.arange(60) % 4
    grid = [0.1, 1.0, 10.0]
    best = rnn_bound(net, x, y, margin_grid=grid, delta=0.06)
    singles = [rnn_bound(net, x, y, margin=a, delta=0.02) for a in grid]
    assert best == min(singles, key=lambda report: report.total)
    assert best.delta == 0.02


def test_overflow_is_reported_not_raised():
    # W² = 0, so that the net forgets after two steps; its row sums do not know
    net, x = network(m=2), sequences(30, 120, 3)
    with torch.no_grad():
        net.W.copy_(1e4 * torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
        net.U.copy_(torch.ones(2, 3))
    report = rnn_bound(net, x, torch.arange(30) % 4, margin=1.0, noise_std=0.1)
    assert (report.total, report.vacuous) == (math.inf, True)
    assert report.log10_weights > 119 * 4
    with pytest.raises(ValueError, match="outputs of model on x are not finite"):
        rnn_bound(network(scale=1e4), x, torch.arange(30) % 4, margin=1.0)


def test_an_outright_zero_net_has_no_complexity():
    report = rnn_bound(network(scale=0.0), sequences(30, 2, 3), torch.arange(30) % 4, margin=1.0)
    assert (report.weights, report.gradients, report.empirical) == (0.0, 0.0, 1.0)
    assert report.vacuous


def test_rademacher_complexity_by_enumeration_is_below_the_bracket():
    # random nets within the norm balls and all 2^8 signs
    n, steps, d, m, k = 8, 3, 2, 3, 2
    x = sequences(n, steps, d, seed=5)
    nets = [network(d, m, k, seed) for seed in range(100)]
    g = torch.Generator().manual_seed(6)
    for net in nets:
        for p, beta in ((net.U, 1.0), (net.W, 0.8), (net.V, 1.0)):
            size = beta * torch.rand((), generator=g, dtype=torch.float64).sqrt()
            p.data.mul_(size / p.data.abs().sum(1).max())
    outputs = torch.cat([net(x).detach().T for net in nets])
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n))).double()
    empirical = (outputs @ signs.T / n).amax(0).mean().item()
    r = max(fisher_rao_norm(net, x) for net in nets)
    rows = x.flatten(1)
    eigenvalue = smallest_moment(x)
    linear = r * rows.norm().item() / (2 * n) / math.sqrt(eigenvalue)
    weights = rows.abs().sum(0).max().item() / n * math.exp(log_lambda(0.8, steps))
    assert 0 < empirical <= linear + weights


def test_bound_does_not_see_the_width():
    net = network(d=3, m=6, k=4, seed=7)
    wide = ReLURNN(3, 12, 4).double()
    with torch.no_grad():
        wide.U.copy_(torch.cat([net.U, net.U]))
        wide.W.copy_(torch.cat([torch.cat([net.W, net.W], 1)] * 2) / 2)
        wide.V.copy_(torch.cat([net.V, net.V], 1) / 2)
    x, y = sequences(30, 5, 3), torch.arange(30) % 4
    torch.testing.assert_close(wide(x), net(x), rtol=1e-10, atol=1e-12)
    one, other = (rnn_bound(model, x, y, margin=0.5) for model in (net, wide))
    assert other.terms == pytest.approx(one.terms, rel=1e-9)
    assert vars(other.norms) == pytest.approx(vars(one.norms), rel=1e-12)


@given(
    st.integers(0, 10**6), st.floats(1e-3, 3.0), st.floats(1e-3, 100.0), st.booleans(),
    st.integers(2, 4),
)  # fmt: skip
def test_the_bound_is_never_below_one(seed, scale, margin, noisy, k):
    # The best case for a bound: many samples, and labels that the net itself gives.
    net, x = network(d=2, m=4, k=k, seed=seed, scale=scale), sequences(400, 2, 2, seed)
    y = net(x).argmax(1)
    report = rnn_bound(net, x, y, margin=margin, delta=0.9, noise_std=0.1 if noisy else None)
    # what the argument of the module's text leaves: 1 + 3kQΛ/a
    floor = 1 + 0.75 * report.weights
    assert report.total >= floor - 1e-12


def test_smallest_moment_is_dense_or_iterative(monkeypatch):
    x = sequences(60, 3, 4, seed=8)
    dense = smallest_moment(x)
    rows = x.flatten(1)
    assert dense == pytest.approx(torch.linalg.eigvalsh(rows.T @ rows / 60)[0].item(), rel=1e-9)
    monkeypatch.setattr(module, "_LARGEST_DENSE", 5)
    assert smallest_moment(x) == pytest.approx(dense, rel=1e-6)
    x[:, 0, 0] = 0  # a pixel that is always dark
    assert smallest_moment(x) == 0.0


def test_noise_is_added_in_training_only():
    noise = InputNoise(0.5)
    x = torch.zeros(20_000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert noise(x).std().item() == pytest.approx(0.5, rel=0.02)  # 4 standard errors
    assert noise.eval()(x) is x
    assert InputNoise(0.0)(x) is x
    assert copy.deepcopy(noise).std == 0.5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"margin": None}, "either margin or margin_grid"),
        ({"margin_grid": [1.0]}, "either margin or margin_grid"),
        ({"margin": 0.0}, "margins must be positive"),
        ({"margin": None, "margin_grid": []}, "at least one"),
        ({"delta": 1.0}, r"delta must be in \(0, 1\)"),
        ({"noise_std": 0.0}, "noise_std must be"),
        ({"y": torch.zeros(3).long()}, "class indices"),
        ({"y": torch.tensor([0, 1, 2, 10])}, r"class indices from 0 to \d, got 1 of 4 .* e.g. 10"),
        ({"y": torch.tensor([0, -1, 2, 1])}, r"class indices from 0 to \d, got 1 of 4 .* e.g. -1"),
        ({"y": torch.zeros(4)}, r"4 integers in one dimension, got shape \(4,\) of torch.float32"),
        ({"x": torch.ones(4, 2, 5)}, r"x must be \(n, steps, 3\)"),
        ({"x": torch.ones(0, 2, 3)}, "at least one sample"),
        ({"r": 1e-9}, "r must be at least"),
    ],
)
def test_bad_input_is_named(change, match):
    good = {"x": sequences(4, 2, 3), "y": torch.arange(4), "margin": 1.0}
    with pytest.raises(ValueError, match=match):
        rnn_bound(network(), **{**good, **change})


def test_other_bad_input_is_named():
    net, x = network(), sequences(4, 2, 3)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        ReLURNN(1, 0, 1)
    with pytest.raises(ValueError, match="std must be"):
        InputNoise(-1.0)
    with pytest.raises(ValueError, match="needs y"):
        fisher_rao_norm(net, x, kind="fr")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        log_lambda(1.0, 0)
    with pytest.raises(ValueError, match="beta must be at least 0"):
        log_lambda(math.nan, 3)
    with pytest.raises(ValueError, match="input_bound"):
        fisher_rao_bound(net, 3, -1.0)
    with pytest.raises(ValueError, match="finite"):
        smallest_moment(torch.full((2, 2), math.inf))
