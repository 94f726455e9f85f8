"""Trajectories, widths and the law between them, against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import nn

from assay.landscape import (
    FlatSubspacePenalty,
    TrajectoryPCA,
    TrajectoryRecorder,
    flatness,
    langevin_step,
    minibatch_statistics,
    variance_flatness_fit,
)


class Quadratic(nn.Module):
    """L(w) = ½ wᵀAw + L₀ as a model with one output."""

    def __init__(self, A, offset):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(A), dtype=torch.float64))
        self.register_buffer("A", A)
        self.offset = offset

    def forward(self, x):
        return (0.5 * self.w @ self.A @ self.w + self.offset).expand(len(x))


def mean_output(output, target):
    return output.mean()


DATA = torch.zeros(4, 1), torch.zeros(4)


def _rotation(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def label_smoothed(output, target):
    return F.cross_entropy(output, target, label_smoothing=0.1)


class Hidden(nn.Module):
    """A model whose layers nobody can see to be a chain."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("moving", [["0.weight"], ["2.weight", "2.bias"], ["5.weight"], None])
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, label_smoothed])
def test_widths_of_a_chain_of_layers_are_those_of_any_model(moving, loss_fn):
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 6), nn.Dropout(0.5), nn.ReLU(),
        nn.Linear(6, 3, bias=False),
    ).double()  # fmt: skip
    data = torch.randn(30, 4).double(), torch.randint(3, (30,))
    chosen = [p for n, p in chain.named_parameters() if moving is None or n in moving]
    directions = F.normalize(torch.randn(5, sum(p.numel() for p in chosen)).double(), dim=1)
    hidden = None if moving is None else [f"model.{name}" for name in moving]
    found = flatness(chain, loss_fn, data, directions, params=moving, rtol=1e-8)
    other = flatness(Hidden(chain), loss_fn, data, directions, params=hidden, rtol=1e-8)
    torch.testing.assert_close(found.width, other.width, rtol=1e-6, atol=0)
    assert found.width.isfinite().any()


def test_width_of_a_quadratic_is_the_closed_form_along_every_eigendirection():
    h = torch.logspace(-1, 2, 8, dtype=torch.float64)
    Q = _rotation(8)
    model = Quadratic(Q.T @ torch.diag(h) @ Q, 0.3)
    found = flatness(model, mean_output, DATA, Q, rtol=1e-9)
    expected = 2 * (2 * (math.e - 1) * 0.3 / h).sqrt()
    torch.testing.assert_close(found.width, expected, rtol=1e-8, atol=0)
    assert found.loss == pytest.approx(0.3)


def test_a_direction_that_never_reaches_the_level_is_infinitely_flat():
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    found = flatness(Quadratic(A, 1.0), mean_output, DATA, torch.eye(2).double())
    assert math.isfinite(found.width[0])
    assert found.width[1] == math.inf
    with pytest.raises(ValueError, match="must be positive and finite"):
        flatness(Quadratic(A, 0.0), mean_output, DATA, torch.eye(2).double())


def test_width_in_batches_and_on_part_of_a_net_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    x, y = torch.randn(20, 3).double(), torch.randint(4, (20,))
    directions = F.normalize(torch.randn(3, 32).double(), dim=1)
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    found = flatness(net, F.cross_entropy, batches, directions, params=["3.weight"], rtol=1e-10)
    net.eval()
    start = net[3].weight.detach().clone()
    for d, left, right in zip(directions, found.left, found.right, strict=True):
        for t in (right, -left):
            with torch.no_grad():
                net[3].weight.copy_(start + t * d.view(4, 8))
                risen = F.cross_entropy(net(x), y).item()
            assert risen == pytest.approx(math.e * found.loss, rel=1e-7)


@pytest.mark.parametrize("shape", [(40, 7), (12, 50)])
def test_principal_directions_are_those_of_scikit_learn(shape):
    g = torch.Generator().manual_seed(0)
    walk = torch.randn(shape, generator=g, dtype=torch.float64).cumsum(0)
    ours = TrajectoryPCA(5).fit(walk)
    peer = PCA(5).fit(walk.numpy())
    m = shape[0]
    torch.testing.assert_close(
        ours.variance, torch.from_numpy(peer.explained_variance_) * (m - 1) / m
    )
    signs = (ours.components * torch.from_numpy(peer.components_)).sum(1)
    torch.testing.assert_close(signs.abs(), torch.ones(5).double())
    torch.testing.assert_close(ours.projections.square().mean(0), ours.variance)
    torch.testing.assert_close((walk - ours.mean) @ ours.components.T, ours.projections)


def test_detrending_removes_a_drift_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 3, generator=g, dtype=torch.float64)
    drift = torch.linspace(0, 50, 500).double().unsqueeze(1) * torch.tensor([0.0, 0.0, 1.0])
    assert TrajectoryPCA(1).fit(noise + drift).variance[0] > 100
    assert TrajectoryPCA(1, detrend=True).fit(noise + drift).variance[0] < 1.5


def test_autocorrelation_time_of_an_autoregressive_process():
    g = torch.Generator().manual_seed(0)
    times = torch.tensor([5.0, 20.0]).double()
    decay = (-1 / times).exp()
    x = torch.zeros(2).double()
    rows = []
    for _ in range(40_000):
        x = decay * x + (1 - decay**2).sqrt() * torch.randn(2, generator=g).double()
        rows.append(x * torch.tensor([1.0, 3.0]))
    measured = TrajectoryPCA().fit(torch.stack(rows)).autocorrelation_time()
    assert measured[0] == pytest.approx(20, rel=0.15)
    assert measured[1] == pytest.approx(5, rel=0.25)  # whole snapshots


@pytest.mark.parametrize("p", [0, 1, 2, 3])
def test_exponent_of_ornstein_uhlenbeck_processes(p):
    # Noise D ∝ h^p on a quadratic: σ² = D/h ∝ h^(p−1), F ∝ h^(−1/2), so log σ² has slope
    # −2(p − 1) in log F: +2 in thermal equilibrium, −4 for noise ∝ curvature³.
    h = torch.logspace(0, 1, 30, dtype=torch.float64)
    Q = _rotation(30)
    model = Quadratic(Q.T @ torch.diag(h) @ Q, 0.1)
    F_exact = 2 * (2 * (math.e - 1) * 0.1 / h).sqrt()
    variance = h ** (p - 1)
    fit = variance_flatness_fit(F_exact, variance, first=1)
    assert fit.exponent == pytest.approx(2 * (p - 1), abs=1e-6)
    # Simulated, with directions and variances estimated from the trajectory.
    g = torch.Generator().manual_seed(p)
    coordinates = torch.randn(20_000, 30, generator=g, dtype=torch.float64) * variance.sqrt()
    if p == 1:
        return  # all variances are equal: there are no principal directions to find
    pca = TrajectoryPCA().fit(coordinates @ Q)
    width = flatness(model, mean_output, DATA, pca.components).width
    simulated = variance_flatness_fit(width, pca.variance, first=1)
    assert simulated.exponent == pytest.approx(2 * (p - 1), abs=0.15)


def test_recorder_keeps_tiny_fluctuations_and_survives_a_restart(tmp_path):
    model = nn.Linear(1, 2, bias=False).double()
    start = model.weight.detach().clone()
    steps = 1e-9 * torch.arange(1, 7).double()

    def record(recorder, which):
        for step in which:
            with torch.no_grad():
                model.weight.copy_(start + step)
            recorder.step()

    whole = TrajectoryRecorder(model, max_snapshots=5, file=tmp_path / "rows.bin")
    record(whole, steps)
    assert len(whole) == 5  # the sixth has no room
    expected = (steps[:5] - steps[0]).float().unsqueeze(1).expand(5, 2)
    torch.testing.assert_close(whole.snapshots(), expected, rtol=1e-6, atol=1e-16)
    first = TrajectoryRecorder(model, max_snapshots=5)
    record(first, steps[:2])
    again = TrajectoryRecorder(model, max_snapshots=5)
    again.load_state_dict(first.state_dict())
    record(again, steps[2:])
    assert torch.equal(again.snapshots(), whole.snapshots())


def test_minibatch_statistics_of_known_parabolas():
    line = nn.Linear(1, 1, bias=False).double()
    xs, ys = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.0, 1.0, -1.0]).double()
    batches = [(x.view(1, 1), y.view(1, 1)) for x, y in zip(xs, ys, strict=True)]
    found = minibatch_statistics(
        line, F.mse_loss, batches, torch.ones(1, 1).double(), center=torch.zeros(1).double()
    )
    h, slope = 2 * xs**2, -2 * xs * ys
    assert found.curvature.item() == pytest.approx(h.mean().item(), rel=1e-8)
    assert found.curvature_variance.item() == pytest.approx(h.var(correction=0).item(), rel=1e-7)
    assert found.slope_variance.item() == pytest.approx(slope.var(correction=0).item(), rel=1e-8)
    shift = ys / xs
    assert found.shift_variance.item() == pytest.approx(shift.var(correction=0).item(), rel=1e-7)


def test_langevin_noise_has_the_asked_spread_and_drift():
    w = torch.zeros(100_000, dtype=torch.float64, requires_grad=True)
    (3 * w).sum().backward()
    langevin_step([w], lr=0.1, noise_std=0.2, generator=torch.Generator().manual_seed(0))
    assert w.detach().mean().item() == pytest.approx(-0.3, abs=5 * 0.2 / math.sqrt(1e5))
    assert w.detach().std().item() == pytest.approx(0.2, rel=5 / math.sqrt(2e5))


def test_penalty_holds_only_the_sharp_directions():
    model = nn.Linear(3, 1, bias=False).double()
    Q = _rotation(3)
    widths = torch.tensor([0.1, 2.0, math.inf], dtype=torch.float64)
    penalty = FlatSubspacePenalty(model, Q, widths, strength=0.5)
    move = torch.tensor([0.3, -0.4, 7.0], dtype=torch.float64)
    with torch.no_grad():
        model.weight.add_((move @ Q).view(1, 3))
    value = penalty()
    assert value.item() == pytest.approx(0.5 * (9 + 0.04), rel=1e-9)
    value.backward()
    pull = torch.tensor([0.3 / 0.01, -0.4 / 4, 0.0], dtype=torch.float64)
    expected = (pull @ Q).view(1, 3)
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-9, atol=1e-9)


def test_mistakes_are_named():
    model = Quadratic(torch.eye(2).double(), 1.0)
    with pytest.raises(ValueError, match=r"directions must have shape \(K, 2\)"):
        flatness(model, mean_output, DATA, torch.ones(1, 3).double())
    with pytest.raises(ValueError, match="level"):
        flatness(model, mean_output, DATA, torch.eye(2).double(), level=1.0)
    with pytest.raises(ValueError, match="3 directions"):
        variance_flatness_fit(torch.full((5,), math.inf), torch.ones(5), first=1)
    with pytest.raises(ValueError, match="at least 3 snapshots"):
        TrajectoryPCA().fit(torch.ones(2, 4))
    with pytest.raises(ValueError, match="did the training diverge"):
        TrajectoryPCA().fit(torch.tensor([[1.0], [math.nan], [2.0]]))
    with pytest.raises(ValueError, match="from 1 on, got 0"):
        variance_flatness_fit(torch.ones(5), torch.ones(5), first=0)
    with pytest.raises(ValueError, match=r"center must have shape \(2,\)"):
        flatness(model, mean_output, DATA, torch.eye(2).double(), center=torch.zeros(3).double())
