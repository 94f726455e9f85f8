"""Individual gradients by brute force, the noise scale of a known distribution, flipped labels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay import data as named
from assay.data import Batches
from assay.examine import Budget, examine
from assay.examine.panels.gradients import gradients
from assay.examine.subject import Snapshot, prepare
from assay.functional import fit
from examine.foreign import FOREIGN, make


def look(model, data, seconds=300.0, **kwargs):
    sample = prepare(model, data, **kwargs)
    found = gradients(sample.model, sample, Budget(seconds))
    return {metric.name: metric for metric in found.metrics}, found


def rows(model, x, y, loss_fn):
    """Every sample's gradient, one backward pass each."""
    found = []
    for a, b in zip(x.split(1), y.split(1), strict=True):
        loss = loss_fn(model(a), b)
        g = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([part.flatten() for part in g]))
    return torch.stack(found).double()


def test_all_train_samples_by_brute_force():
    model, data, _ = make("residual")
    x, y = data["train"]
    metrics, found = look(model, data)
    g = rows(model, x, y, F.cross_entropy)
    n = len(g)
    # Of the whole train data nothing is estimated: |G|² is that of its mean gradient.
    variance = g.var(0, correction=1).sum().item()
    signal = g.mean(0).square().sum().item()
    assert metrics["mean_norm"].value == pytest.approx(g.norm(dim=1).mean().item(), rel=1e-4)
    assert metrics["variance"].value == pytest.approx(variance, rel=1e-4)
    assert metrics["signal"].value == pytest.approx(signal, rel=1e-3)
    assert metrics["noise_scale"].value == pytest.approx(variance / signal, rel=1e-3)
    assert metrics["noise_scale"].interval is None
    squares = g.square().sum(1).sort(descending=True).values
    assert metrics["outlier_share"].value == pytest.approx(
        (squares[: math.ceil(n / 100)].sum() / squares.sum()).item(), rel=1e-4
    )
    shares = [row["share of the variance"] for row in found.tables["Layers"]]
    assert sum(shares) == pytest.approx(1.0)


class Mean(nn.Module):
    """Regresses on a constant: the gradient of sample n is 2 (w − y_n) / d."""

    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        return self.w + 0 * x


def stream(seed, n=512, d=4, mean=0.2):
    """Targets of known mean and variance in a stream of unknown length."""
    generator = torch.Generator().manual_seed(seed)
    y = mean + torch.randn(n, d, generator=generator)
    return [(torch.zeros(n, d), y)]


def unknown_size(sample):
    sample.sizes["train"] = None
    return sample


def test_the_noise_scale_of_a_known_distribution():
    d, mean = 4, 0.2
    truth = d / (d * mean**2)  # tr Σ / |G|²: the factors 2 / d cancel
    estimates, covered = [], 0
    for seed in range(12):
        sample = unknown_size(prepare(Mean(d), {"train": stream(seed)[0]}))
        found = gradients(sample.model, sample, Budget(300.0))
        metrics = {metric.name: metric for metric in found.metrics}
        low, high = metrics["noise_scale"].interval
        covered += low <= truth <= high
        estimates.append(metrics["signal"].value * (d / 2) ** 2)  # in units of the targets
    signal = d * mean**2
    spread = math.sqrt(4 * signal / 512 + 2 * d / 512**2)  # of one estimate
    assert sum(estimates) / 12 == pytest.approx(signal, abs=4 * spread / math.sqrt(12))
    assert covered >= 9  # P(fewer than 9 of 12 at 95 %) = 0.2 %


def test_a_mean_gradient_of_zero_gives_a_lower_bound():
    sample = unknown_size(prepare(Mean(4), {"train": stream(0, mean=0.0)[0]}))
    found = gradients(sample.model, sample, Budget(300.0))
    scale = next(metric for metric in found.metrics if metric.name == "noise_scale")
    assert scale.value > 50
    assert scale.interval == (scale.value, math.inf)


def test_a_loss_of_the_users_own():
    model, data, _ = make("regression")
    x, y = data["train"]

    def loss_fn(output, target):
        return (output - target).abs().pow(1.5).sum(1).mean()

    metrics, _ = look(model, {"train": (x, y)}, loss_fn=loss_fn)
    g = rows(model, x, y, loss_fn)
    assert metrics["mean_norm"].value == pytest.approx(g.norm(dim=1).mean().item(), rel=1e-4)


@pytest.fixture(scope="module")
def flipped():
    """A network trained on digits of whose labels 5 % are wrong."""
    train = named.load("digits", "train")
    generator = torch.Generator().manual_seed(0)
    y = train.y.clone()
    wrong = torch.randperm(len(y), generator=generator)[: len(y) // 20]
    y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(train.x[0].numel(), 64), nn.ReLU(), nn.Linear(64, 10)
        )
        batches = Batches(train.x, y, 64, shuffle=True, generator=generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        fit(model, optimizer, batches, epochs=15, loss_fn=F.cross_entropy)
    return model, train.x, y, wrong


def test_flipped_labels_stand_out(flipped):
    model, x, y, wrong = flipped
    _, found = look(model, {"train": (x, y)})
    top = [row["index"] for row in found.tables["Samples that stand out"]]
    share = len(set(top) & set(wrong.tolist())) / len(top)
    assert share >= 5 * len(wrong) / len(y)
    assert any("contradicted" in f.text for f in found.findings)
    assert "outliers" in {picture.name for picture in found.figures}


def test_a_frozen_network_is_differentiated_all_the_same(flipped):
    model, x, y, _ = flipped
    free, _ = look(model, {"train": (x[:100], y[:100])})
    model.requires_grad_(False)
    try:
        frozen, _ = look(model, {"train": (x[:100], y[:100])})
    finally:
        model.requires_grad_(True)
    assert frozen["mean_norm"].value == pytest.approx(free["mean_norm"].value)


@pytest.mark.parametrize("name", FOREIGN)
def test_any_network(name, tmp_path):
    model, data, call = make(name)
    before = Snapshot(model)
    report = examine(model, data, call=call, panels=["gradients"], budget=2, output=tmp_path)
    (panel,) = report.panels
    assert panel.status == "done", panel.reason
    assert not [note for note in panel.notes if "put back" in note]
    assert before.changes(model) == []
    names = {metric.name for metric in panel.metrics}
    assert names >= {"noise_scale", "mean_norm", "signal_to_noise", "outlier_share"}
