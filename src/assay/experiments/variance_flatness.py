"""The inverse variance–flatness relation of SGD (Feng and Tu, 2021)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.data import Batches
from assay.functional import HessianOperator, evaluate_classifier, top_eigenvalues
from assay.lab import Claim, Lab, Paper, at_least, at_most, between, close_to
from assay.landscape import (
    FlatSubspacePenalty,
    TrajectoryPCA,
    TrajectoryRecorder,
    VarianceFlatnessFit,
    effective_temperature,
    flatness,
    langevin_step,
    minibatch_statistics,
    variance_flatness_fit,
)

PAPER = Paper(
    slug="variance-flatness",
    title=(
        "The inverse variance–flatness relation in stochastic gradient descent is critical for "
        "finding flat minima"
    ),
    authors=("Y. Feng", "Y. Tu"),
    year=2021,
    url="https://arxiv.org/abs/2001.01678",
    topic="landscape",
    summary=(
        "Principal directions of SGD's own trajectory, the flatness of the loss along each, and "
        "the exponent that links the two: a diagnostic of the noise that SGD makes for itself."
    ),
    components=(
        "assay.landscape.TrajectoryRecorder",
        "assay.landscape.TrajectoryPCA",
        "assay.landscape.flatness",
        "assay.landscape.variance_flatness_fit",
        "assay.landscape.effective_temperature",
        "assay.landscape.minibatch_statistics",
        "assay.landscape.langevin_step",
        "assay.landscape.FlatSubspacePenalty",
    ),
)

_OU = "Ornstein–Uhlenbeck process on a quadratic, noise ∝ curvature^p"

CLAIMS = (
    Claim(
        "slope-known-variances",
        "The fit recovers the exponent 2(p − 1) from known variances",
        paper="closed form",
        expect=at_most(1e-6),
        kind="exact",
        how=f"{_OU}, p = 0, 1, 2, 3: |fitted ψ − 2(p − 1)|",
    ),
    Claim(
        "slope-thermal",
        "Isotropic noise gives thermal equilibrium: wide valleys have large variance",
        paper="σ² ∝ F², ψ = −2",
        expect=close_to(-2.0, tol=0.15),
        kind="exact",
        how=f"{_OU}, p = 0, directions and variances from the simulated trajectory",
    ),
    Claim(
        "slope-square-noise",
        "Noise ∝ curvature² gives an inverse law with half the exponent",
        paper="ψ = 2",
        expect=close_to(2.0, tol=0.15),
        kind="exact",
        how=f"{_OU}, p = 2, directions and variances from the simulated trajectory",
    ),
    Claim(
        "slope-cubic-noise",
        "Noise ∝ curvature³ gives the inverse law",
        paper="ψ = 4",
        expect=close_to(4.0, tol=0.15),
        kind="exact",
        how=f"{_OU}, p = 3, directions and variances from the simulated trajectory",
    ),
    Claim(
        "inverse-relation",
        "Under SGD the variance falls with the flatness of a direction",
        paper="robust over all directions",
        expect=at_most(-0.9),
        unit="Spearman correlation of F and σ²",
        how="hidden layer, principal directions from rank 10 on: the first ones carry drift",
    ),
    Claim(
        "exponent",
        "Under SGD the variance falls as a power of the flatness near the fourth",
        paper="ψ ≈ 4 (from memory, unverified)",
        expect=between(2.5, 5.5),
        unit="ψ",
        how="log σ² = const − ψ log F over the same directions",
    ),
    Claim(
        "thermal-contrast",
        "Isotropic noise of the same strength shows no inverse relation",
        paper="Einstein relation",
        expect=at_least(0.3),
        unit="Spearman correlation of F and σ²",
        how="full-batch descent with Gaussian noise from SGD's solution, Hessian directions",
        discussion=(
            "The descent has not ended where the noise is switched on: along the sharpest "
            "directions the way that it still goes without any noise has more variance than the "
            "noise makes. Recording longer does not help, the loss goes on falling. Without that "
            "way the sign is the thermal one (thermal-contrast-fluctuations)."
        ),
    ),
    Claim(
        "thermal-contrast-fluctuations",
        "Around the way of a noise-free descent, isotropic noise shows no inverse relation",
        paper="Einstein relation",
        unit="Spearman correlation of F and σ²",
        how=(
            "the same trajectory minus that of the same descent without noise, which is the drift; "
            "Hessian directions; thought of after thermal-contrast was measured, hence without a "
            "threshold"
        ),
    ),
    Claim(
        "thermal-contrast-pca",
        "Isotropic noise shows no inverse relation along its own principal directions either",
        unit="Spearman correlation of F and σ²",
        how="as thermal-contrast, directions from the trajectory's own principal components",
    ),
    Claim(
        "noise-strength",
        "SGD's noise is weaker in flatter directions",
        paper="falls with F (from memory, unverified)",
        unit="Spearman correlation of F and D",
        how="D: variance over mini-batches of the slope, at the mean weights; same directions",
    ),
    Claim(
        "correlation-time",
        "SGD's fluctuations are shorter in flatter directions",
        paper="falls with F (from memory, unverified)",
        unit="Spearman correlation of F and τ",
        how="τ: steps until the autocorrelation falls below 1/e; same directions",
    ),
    Claim(
        "effective-temperature",
        "The effective temperature of SGD is lower in flatter directions",
        paper="not one temperature",
        unit="Spearman correlation of F and σ² h",
        how="h: mean over mini-batches of the curvature, at the mean weights; same directions",
    ),
    Claim(
        "dominance",
        "A few directions hold most of the variance",
        expect=at_least(0.9),
        unit="share of the variance",
        how="five leading principal directions; mostly drift, the loss still falls",
    ),
    Claim(
        "forgetting",
        "Holding the sharp directions of a first task reduces forgetting",
        paper="few directions suffice (from memory, unverified)",
        unit="accuracy",
        how=(
            "digits 0–4, then 5–9: accuracy on the first after the second, with the penalty − "
            "without"
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Settings; counts of images, epochs, steps and directions."""

    data: str = "mnist5k"
    images: int = 4000
    hidden: int = 50
    batch_size: int = 50
    lr: float = 0.1
    warmup_epochs: int = 25
    record_epochs: int = 10
    first: int = 10
    last: int = 300
    points: int = 40
    thermal_images: int = 2000
    thermal_warmup_epochs: int = 40
    thermal_burn_in: int = 600
    thermal_steps: int = 2000
    hessian_directions: int = 30
    forgetting_epochs: int = 5
    forgetting_directions: int = 100
    forgetting_strength: float = 0.1


PRESETS = {
    "smoke": Config(
        images=500, warmup_epochs=10, record_epochs=10, last=60, points=12,
        thermal_images=200, thermal_warmup_epochs=10, thermal_burn_in=50, thermal_steps=100,
        hessian_directions=4, forgetting_epochs=2, forgetting_directions=20,
    ),
    "small": Config(),
    "paper": Config(
        data="mnist", images=60_000, warmup_epochs=100, last=400, points=80,
        thermal_images=60_000, thermal_warmup_epochs=100, thermal_burn_in=5000,
        thermal_steps=20_000,
    ),
}  # fmt: skip
SEEDS = {"smoke": 1, "small": 3, "paper": 10}

LAYER = ["2.weight"]  # the square hidden matrix


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    _exact(lab)
    data = lab.data(config.data, "train", limit=config.images)
    x, y = data.x.flatten(1).to(lab.device), data.y.to(lab.device)
    rows = []
    shown = None
    for seed in lab.seeds:
        net = _net(lab, config, x.shape[1], "sgd", seed)
        found = _sgd(lab, config, net, x, y, seed)
        rows += _report_fits(lab, config, found, seed)
        shown = shown or found
        contrast = _thermal(lab, config, x, y, seed)
        lab.measure("thermal-contrast", contrast["hessian"], seed=seed)
        lab.measure("thermal-contrast-fluctuations", contrast["fluctuations"], seed=seed)
        lab.measure("thermal-contrast-pca", contrast["pca"], seed=seed)
        lab.measure("forgetting", _forgetting(lab, config, x, y, seed), seed=seed)
    lab.table("fits", rows, "The law over three ranges of principal directions, by rank.")
    lab.note(
        f"The law is reported over the directions of rank {config.first} to {config.last}. The "
        "first ones carry drift — the loss still falls while the trajectory is recorded — with "
        "huge variance along flat valleys; the table shows the fits that include them, and how "
        "long the slowest direction of each fit remembers, in parts of the record: where that is "
        "not small, there is drift in it."
    )
    if shown is not None:
        _plot(lab, config, shown)


def _net(lab: Lab, config: Config, inputs: int, *key: object) -> nn.Sequential:
    """784-50-50-10 without biases."""
    h = config.hidden
    with lab.seeded(*key):
        return nn.Sequential(
            nn.Linear(inputs, h, bias=False), nn.ReLU(), nn.Linear(h, h, bias=False), nn.ReLU(),
            nn.Linear(h, 10, bias=False),
        ).to(lab.device)  # fmt: skip


# -- Ornstein–Uhlenbeck processes --------------------------------------------------------------


class _Quadratic(nn.Module):
    A: Tensor

    def __init__(self, A: Tensor, offset: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(A), dtype=A.dtype))
        self.register_buffer("A", A)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * self.w @ self.A @ self.w + self.offset).expand(len(x))


def _exact(lab: Lab) -> None:
    h = torch.logspace(0, 1, 30, dtype=torch.float64)
    g = lab.generator("quadratic")
    Q = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64))[0]
    model = _Quadratic(Q.T @ torch.diag(h) @ Q, 0.1)
    width = 2 * (2 * (math.e - 1) * 0.1 / h).sqrt()
    for p in range(4):
        fit = variance_flatness_fit(width, h ** (p - 1), first=1)
        lab.measure("slope-known-variances", abs(fit.exponent - 2 * (p - 1)))
    simulated = ((0, "slope-thermal"), (2, "slope-square-noise"), (3, "slope-cubic-noise"))
    for p, claim in simulated:  # for p = 1 all variances are equal: no principal directions
        walk = _simulate(h, h**p, lab.generator("walk", p)) @ Q
        pca = TrajectoryPCA().fit(walk)
        batch = torch.zeros(1, 1), torch.zeros(1)
        found = flatness(model, lambda out, _: out.mean(), batch, pca.components)
        lab.measure(claim, variance_flatness_fit(found.width, pca.variance, first=1).exponent)


def _simulate(h: Tensor, noise: Tensor, g: torch.Generator, steps: int = 20_000) -> Tensor:
    """Exact samples of dθ = −hθ dt + √(2D) dW, Δt = 1 apart."""
    decay = (-h).exp()
    kick = (noise / h * (1 - decay**2)).sqrt()
    draws = torch.randn(steps, len(h), generator=g, dtype=h.dtype) * kick
    theta = torch.randn(len(h), generator=g, dtype=h.dtype) * (noise / h).sqrt()
    rows = torch.empty_like(draws)
    for t, draw in enumerate(draws):
        theta = decay * theta + draw
        rows[t] = theta
    return rows


# -- the law under SGD -------------------------------------------------------------------------


def _sgd(
    lab: Lab, config: Config, net: nn.Sequential, x: Tensor, y: Tensor, seed: int
) -> dict[str, Tensor]:
    batches = Batches(x, y, config.batch_size, generator=lab.generator("order", seed))
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr)
    steps = config.record_epochs * len(batches)
    recorder = TrajectoryRecorder(net, LAYER, max_snapshots=steps)

    def record(step: int) -> None:
        if step > config.warmup_epochs * len(batches):
            recorder.step()

    epochs = config.warmup_epochs + config.record_epochs
    history = lab.fit(
        f"sgd {seed}", net, optimizer, batches, epochs=epochs, after_step=record,
        keep={"recorder": recorder},
    )  # fmt: skip

    def analysed() -> dict[str, Tensor]:
        pca = TrajectoryPCA(min(config.last, 400)).fit(recorder)
        center = pca.mean.to(x)
        found = flatness(
            net, F.cross_entropy, (x, y), pca.components.to(x), center=center, params=LAYER
        )
        statistics = minibatch_statistics(
            net, F.cross_entropy, Batches(x, y, config.batch_size, shuffle=False),
            pca.components.to(x), center=center, params=LAYER,
        )  # fmt: skip
        return {
            "width": found.width,
            "variance": pca.variance,
            "noise": statistics.slope_variance,
            "temperature": effective_temperature(pca.variance, statistics.curvature.cpu()),
            "share": torch.tensor(float(pca.variance[:5].sum() / pca.total_variance)),
            "time": pca.autocorrelation_time(),
        }

    found = lab.stage(f"law {seed}", analysed)
    losses = [record["loss"] for record in history[-config.record_epochs :]]
    found["loss"] = torch.tensor(losses, dtype=torch.float64)
    lab.measure("dominance", found["share"], seed=seed)
    return found


def _report_fits(
    lab: Lab, config: Config, found: dict[str, Tensor], seed: int
) -> list[dict[str, float | int | str]]:
    rows = []
    fall = float(found["loss"][-1] / found["loss"][0]) if len(found["loss"]) else math.nan
    for first in (1, 3, config.first):
        fit = variance_flatness_fit(
            found["width"], found["variance"], first=first, last=config.last, points=config.points
        )
        rows.append(
            {
                "seed": seed,
                "ranks": f"{first}–{config.last}",
                "ψ": fit.exponent,
                "standard error": fit.standard_error,
                "Spearman": fit.spearman,
                "never risen": fit.infinite,
                "longest correlation time / record": float(
                    found["time"][[rank - 1 for rank in fit.used]].max() / _steps(config)
                ),
                "last / first training loss": fall,
            }
        )
    lab.measure("inverse-relation", fit.spearman, seed=seed)
    lab.measure("exponent", fit.exponent, seed=seed)
    for claim, name in (
        ("noise-strength", "noise"),
        ("correlation-time", "time"),
        ("effective-temperature", "temperature"),
    ):
        lab.measure(claim, _rank_correlation(fit, found["width"], found[name]), seed=seed)
    return rows


def _rank_correlation(fit: VarianceFlatnessFit, width: Tensor, values: Tensor) -> float:
    """Of the widths and something else, over the directions of a fit."""
    from scipy.stats import spearmanr

    chosen = [rank - 1 for rank in fit.used]
    found: Any = spearmanr(width[chosen].cpu(), values[chosen].cpu())
    return float(found[0])


def _steps(config: Config) -> int:
    """How many steps of SGD are recorded."""
    return config.record_epochs * math.ceil(config.images / config.batch_size)


def _plot(lab: Lab, config: Config, found: dict[str, Tensor]) -> None:
    figure, (left, right) = lab.subplots(1, 2, width=8)
    ranks = torch.arange(1, len(found["width"]) + 1)
    drift = ranks < config.first
    for chosen, label, marker in (
        (drift, "drift, not in the fit", "x"),
        (~drift, "in the fit", "."),
    ):
        width, variance = found["width"][chosen].numpy(), found["variance"][chosen].numpy()
        left.loglog(width, variance, marker, label=label)
        right.loglog(ranks[chosen].numpy(), width, marker, label=label)
    fit = variance_flatness_fit(
        found["width"], found["variance"], first=config.first, last=config.last,
        points=config.points,
    )  # fmt: skip
    used = [rank - 1 for rank in fit.used]
    log_width, log_variance = found["width"][used].log(), found["variance"][used].log()
    across = torch.linspace(float(log_width.min()), float(log_width.max()), 2)
    line = log_variance.mean() - fit.exponent * (across - log_width.mean())
    left.loglog(
        across.exp().numpy(), line.exp().numpy(), "k-", label=f"σ² ∝ F^(−{fit.exponent:.1f})"
    )
    left.set(xlabel="flatness F / weight units", ylabel="variance σ² / weight units²")
    left.legend()
    right.set(xlabel="rank of the direction, by variance", ylabel="flatness F / weight units")
    lab.figure(
        "variance-flatness", figure,
        "Principal directions of the hidden layer, first seed. F: width of the valley in which the "
        "training loss is less than e times that at the mean weights.",
    )  # fmt: skip


# -- thermal noise instead ---------------------------------------------------------------------


def _thermal(lab: Lab, config: Config, x: Tensor, y: Tensor, seed: int) -> dict[str, float]:
    x, y = x[: config.thermal_images], y[: config.thermal_images]
    net = _net(lab, config, x.shape[1], "thermal", seed)
    batches = Batches(x, y, config.batch_size, generator=lab.generator("thermal order", seed))
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr)
    lab.fit(
        f"before thermal noise {seed}", net, optimizer, batches,
        epochs=config.thermal_warmup_epochs,
    )  # fmt: skip
    return lab.stage(f"thermal {seed}", lambda: _shaken(lab, config, net, batches, seed))


def _shaken(
    lab: Lab, config: Config, net: nn.Sequential, batches: Batches, seed: int
) -> dict[str, float]:
    """Both correlations after full-batch descent with Gaussian noise as strong as SGD's."""
    data = x, y = batches.x, batches.y
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in LAYER)
    weight = net.get_parameter(LAYER[0])
    noise_std = _minibatch_noise(net, weight, batches, config.lr)
    hessian = HessianOperator(net, F.cross_entropy, (x, y))
    g = lab.generator("lanczos", seed)
    directions = top_eigenvalues(
        hessian, config.hessian_directions, tol=1e-3, which="largest", max_steps=400, generator=g
    )[1]
    noisy, quiet = (
        _descent(lab, config, net, data, strength, seed) for strength in (noise_std, 0.0)
    )
    center = noisy.mean(0)
    deviation = noisy - quiet
    along = directions.double().T
    pca = TrajectoryPCA(min(config.last, 400)).fit(noisy - center)

    def widths(along: Tensor) -> Tensor:
        return flatness(net, F.cross_entropy, data, along, center=center, params=LAYER).width

    of_hessian = widths(directions)
    own = variance_flatness_fit(
        widths(pca.components), pca.variance, first=min(config.first, 3), last=config.last,
        points=config.points,
    )  # fmt: skip

    def spearman(rows: Tensor) -> float:
        variance = ((rows - rows.mean(0)) @ along).square().mean(0)
        return variance_flatness_fit(of_hessian, variance, first=1).spearman

    return {"hessian": spearman(noisy), "fluctuations": spearman(deviation), "pca": own.spearman}


def _descent(
    lab: Lab,
    config: Config,
    net: nn.Sequential,
    data: tuple[Tensor, Tensor],
    noise_std: float,
    seed: int,
) -> Tensor:
    """Weights of the layer after each recorded step of a full-batch descent, as they were."""
    weight = net.get_parameter(LAYER[0])
    start = weight.detach().clone()
    recorder = TrajectoryRecorder(net, LAYER, max_snapshots=config.thermal_steps)
    noise = lab.generator("thermal noise", seed)
    with torch.no_grad():
        below = net[:2](data[0])  # nothing else moves
    for step in lab.track(
        range(config.thermal_burn_in + config.thermal_steps), f"noise of {noise_std:.1g}, {seed}"
    ):
        loss = F.cross_entropy(net[2:](below), data[1])
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        langevin_step([weight], config.lr, noise_std, generator=noise)
        if step >= config.thermal_burn_in:
            recorder.step()
    with torch.no_grad():
        weight.copy_(start)
    assert recorder.reference is not None
    return recorder.snapshots().double() + recorder.reference


def _minibatch_noise(net: nn.Module, weight: Tensor, batches: Batches, lr: float) -> float:
    """Standard deviation a weight of one SGD step's deviation from the full-batch step."""
    gradients = torch.stack(
        [torch.autograd.grad(F.cross_entropy(net(x), y), [weight])[0] for x, y in batches]
    )
    return lr * float(gradients.var(0, correction=0).mean().sqrt())


# -- two tasks ---------------------------------------------------------------------------------


def _forgetting(lab: Lab, config: Config, x: Tensor, y: Tensor, seed: int) -> float:
    first = y < 5
    tasks = [(x[first], y[first]), (x[~first], y[~first])]
    accuracy = {}
    for penalised in (False, True):
        name = "with penalty" if penalised else "without"
        net = _net(lab, config, x.shape[1], "tasks", seed)
        recorder = TrajectoryRecorder(net, LAYER, max_snapshots=1000)
        batches = Batches(*tasks[0], config.batch_size, generator=lab.generator("one", seed))
        optimizer = torch.optim.SGD(net.parameters(), lr=config.lr)
        lab.fit(
            f"first task {name} {seed}", net, optimizer, batches, epochs=config.record_epochs,
            after_step=lambda _, r=recorder: r.step(), keep={"recorder": recorder},
        )  # fmt: skip
        penalty = None
        if penalised:
            pca = TrajectoryPCA(config.forgetting_directions).fit(recorder)
            along = pca.components.to(x)
            width = flatness(net, F.cross_entropy, tasks[0], along, params=LAYER).width
            penalty = FlatSubspacePenalty(
                net, along, width.to(x), strength=config.forgetting_strength, params=LAYER
            )
        # Only the layer whose flatness is known moves: the others would forget unhindered.
        for parameter_name, parameter in net.named_parameters():
            parameter.requires_grad_(parameter_name in LAYER)
        batches = Batches(*tasks[1], config.batch_size, generator=lab.generator("two", seed))
        optimizer = torch.optim.SGD([net.get_parameter(LAYER[0])], lr=config.lr)
        lab.fit(
            f"second task {name} {seed}", net, optimizer, batches,
            epochs=config.forgetting_epochs, penalty=penalty,
        )  # fmt: skip
        accuracy[penalised] = evaluate_classifier(net, *tasks[0])["accuracy"]
    return accuracy[True] - accuracy[False]
