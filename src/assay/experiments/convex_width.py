"""On the convex behavior of deep neural networks in relation to the layers' width (2020)."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.curvature import DirectionalCurvature, directional_curvature
from assay.functional import HessianOperator, ResidualOperator, fit
from assay.lab import Claim, Lab, Paper, at_least, at_most

PAPER = Paper(
    slug="convex-width",
    title="On the Convex Behavior of Deep Neural Networks in Relation to the Layers' Width",
    authors=("E. Littwin", "L. Wolf"),
    year=2020,
    url="https://arxiv.org/abs/2001.04878",
    topic="curvature",
    summary=(
        "How convex a loss is along the direction in which it is descended: the curvature along "
        "the gradient, split into Gauss-Newton and residual part, cheap enough to follow training."
    ),
    components=(
        "assay.curvature.directional_curvature",
        "assay.curvature.CurvatureProbe",
        "assay.functional.HessianOperator",
        "assay.functional.GGNOperator",
        "assay.functional.ResidualOperator",
    ),
)

_WIDTH_HOW = (
    "bias-free ReLU MLP, He init, full batch of real images, widths 64 to 1024; one value a seed"
)

CLAIMS = (
    Claim(
        "gauss-newton-positive",
        "The Gauss-Newton part of the curvature is not negative",
        paper="G ⪰ 0",
        expect=at_least(-1e-6),
        kind="exact",
        how="κ_G / |κ| at every network of the width study",
    ),
    Claim(
        "parts-sum",
        "The two parts add up to the curvature of the loss",
        paper="∇²L = G + H",
        expect=at_most(1e-9),
        kind="exact",
        how="|κ_G + κ_H − gᵀ(∇²L)g/gᵀg| relative to κ, float64, against the Hessian product",
    ),
    Claim(
        "linear-has-no-residual",
        "A linear model has no residual part",
        paper="H = 0",
        expect=at_most(1e-12),
        kind="exact",
        how="|κ_H| / κ of one linear layer, cross-entropy and squared error, float64",
    ),
    Claim(
        "residual-is-dense-residual",
        "The residual part equals that of the dense matrix",
        expect=at_most(1e-9),
        kind="exact",
        how="two-layer ReLU net of at most 600 parameters, float64, relative difference",
    ),
    *(
        Claim(
            f"width-slope-{loss}-{depth}",
            f"The residual part vanishes with the width: {name}, {depth} hidden layers",
            paper="gradient orthogonal to H in the wide limit",
            expect=at_most(-0.5),
            over_seeds="median",
            unit="slope of log r in log width",
            how=_WIDTH_HOW,
        )
        for loss, name in (("ce", "cross-entropy"), ("mse", "squared error"))
        for depth in (2, 3)
    ),
    *(
        Claim(
            f"wide-ratio-{loss}-{depth}",
            f"The residual part is negligible in a wide net: {name}, {depth} hidden layers",
            paper="→ 0",
            expect=at_most(0.05),
            over_seeds="median",
            unit="|κ_H| / κ_G",
            how="the same, at the largest width",
        )
        for loss, name in (("ce", "cross-entropy"), ("mse", "squared error"))
        for depth in (2, 3)
    ),
    Claim(
        "positive-at-initialisation",
        "At common initialisations the curvature along the gradient is positive",
        paper="strictly positive in the wide limit",
        expect=at_least(0.0),
        over_seeds="every",
        unit="smallest κ of a seed",
        how="all losses, depths and widths ≥ 256 (widths ≥ 64 at the smoke preset)",
    ),
    Claim(
        "wide-training-ratio",
        "The residual part stays negligible while a wide net is trained",
        expect=at_most(0.1),
        unit="largest |κ_H| / κ_G",
        how="full-batch gradient descent with cross-entropy, largest value over the steps",
        discussion=(
            "Once the few images are fitted, κ_G shrinks with p(1 − p) by two orders of "
            "magnitude and the residual part is no longer small beside it. The ratio also depends "
            "on the scale of the inputs (table): it is far larger for pixels in [0, 1]."
        ),
    ),
    Claim(
        "narrow-over-wide",
        "The residual part is larger in a narrow net in training",
        expect=at_least(1.0),
        unit="ratio of the largest |κ_H| / κ_G",
        how="the same in the narrow net / in the wide one",
    ),
    Claim(
        "flat-in-the-middle",
        "A wide net passes from positive through almost zero to positive curvature",
        paper="near zero between start and end of training",
        kind="paper",
        expect=at_most(0.1),
        unit="smallest κ / κ at the end",
        how="training to convergence, smallest curvature of the middle half of the steps",
    ),
)


@dataclass(frozen=True)
class Config:
    """Settings; widths and images are counts, steps are full-batch gradient steps."""

    data: str = "mnist5k"
    images: int = 256
    standardize: bool = True  # subtract the images' mean, divide by their standard deviation
    widths: tuple[int, ...] = (64, 256, 1024)
    depths: tuple[int, ...] = (2, 3)
    narrow: int = 16
    wide: int = 512
    steps: int = 120
    lr: float = 0.05
    probe_every: int = 5


PRESETS = {
    "smoke": Config(images=128, widths=(64, 256, 512), wide=256, steps=10),
    "small": Config(),
    "paper": Config(data="mnist", images=60_000, wide=4096, steps=20_000, probe_every=100),
}
SEEDS = {"smoke": 2, "small": 6, "paper": 10}


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - F.one_hot(target, output.shape[1])).square().sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": F.cross_entropy,
    "mse": _squared_error,
}


def relu_net(sizes: tuple[int, ...]) -> nn.Sequential:
    """A bias-free ReLU net: He init in the hidden layers, variance 1/fan-in in the last."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out, bias=False)
        last = i == len(sizes) - 2
        nn.init.normal_(linear.weight, std=math.sqrt((1 if last else 2) / fan_in))
        layers += [linear] if last else [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    images = lab.data(config.data, "train", limit=config.images)
    raw, y = images.x.flatten(1).to(lab.device), images.y.to(lab.device)
    standardized = (raw - raw.mean()) / raw.std()
    x, other = (standardized, raw) if config.standardize else (raw, standardized)
    _exact(lab, x, y)
    ratios = _width_study(lab, config, x, y)
    _plot_widths(lab, config, ratios)
    _training_study(lab, config, x, y)
    _scaling_study(lab, config, {config.standardize: x, not config.standardize: other}, y)


def _exact(lab: Lab, x: Tensor, y: Tensor) -> None:
    x, y = x[:64].double(), y[:64]
    with lab.seeded("exact"):
        linear = relu_net((x.shape[1], 10)).double().to(lab.device)
        net = relu_net((x.shape[1], 32, 10)).double().to(lab.device)
        tiny = relu_net((20, 18, 10)).double().to(lab.device)
    for loss_fn in LOSSES.values():
        found = directional_curvature(linear, loss_fn, (x, y))
        lab.measure("linear-has-no-residual", abs(found.residual) / found.total)
        found = directional_curvature(net, loss_fn, (x, y))
        hessian = HessianOperator(net, loss_fn, (x, y))
        g = hessian.gradient()
        total = float(g @ (hessian @ g) / (g @ g))
        lab.measure("parts-sum", abs(found.total - total) / abs(total))
        data = x[:, 200:220], y
        found = directional_curvature(tiny, loss_fn, data)
        dense = ResidualOperator(tiny, loss_fn, data)
        g = dense.gradient()
        residual = float(g @ dense.to_dense() @ g / (g @ g))
        lab.measure("residual-is-dense-residual", abs(found.residual - residual) / abs(residual))


def _width_study(lab: Lab, config: Config, x: Tensor, y: Tensor) -> dict[tuple, list[float]]:
    ratios: dict[tuple, list[float]] = {}
    rows = []
    for seed in lab.track(lab.seeds, "networks of all widths"):
        lowest = math.inf
        for loss, loss_fn in LOSSES.items():
            for depth in config.depths:
                series = []
                for width in config.widths:
                    key = (loss, depth, width)
                    found = _at_initialisation(lab, (*key, seed), loss_fn, x, y)
                    ratios.setdefault(key, []).append(found["ratio"])
                    series.append(found["ratio"])
                    lab.measure(
                        "gauss-newton-positive", found["gauss_newton"] / abs(found["total"])
                    )
                    if width >= 256 or lab.preset == "smoke":
                        lowest = min(lowest, found["total"])
                slope = np.polyfit(np.log(config.widths), np.log(series), 1)[0]
                lab.measure(f"width-slope-{loss}-{depth}", slope, seed=seed)
                lab.measure(f"wide-ratio-{loss}-{depth}", series[-1], seed=seed)
        lab.measure("positive-at-initialisation", lowest, seed=seed)
    for (loss, depth, width), values in ratios.items():
        median = float(np.median(values))
        rows.append({"loss": loss, "hidden layers": depth, "width": width, "median r": median})
    lab.table("residual by width", rows, "Median over the seeds of r = |κ_H| / κ_G.")
    return ratios


def _at_initialisation(
    lab: Lab, key: tuple, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, float]:
    _, depth, width, _ = key

    def measured() -> dict[str, float]:
        with lab.seeded("net", *key):
            net = relu_net((x.shape[1], *[width] * depth, 10)).to(lab.device)
        found = directional_curvature(net, loss_fn, (x, y))
        return {name: getattr(found, name) for name in ("total", "gauss_newton", "ratio")}

    return lab.stage("init " + " ".join(map(str, key)), measured)


def _plot_widths(lab: Lab, config: Config, ratios: dict[tuple, list[float]]) -> None:
    figure, axes = lab.subplots(1, len(LOSSES), width=8, sharey=True)
    for ax, loss in zip(axes, LOSSES, strict=True):
        for depth in config.depths:
            values = np.array([ratios[loss, depth, width] for width in config.widths])
            median = np.median(values, axis=1)
            low, high = values.min(axis=1), values.max(axis=1)
            label = f"{depth} hidden layers"
            ax.errorbar(
                config.widths, median, [median - low, high - median], marker="o", capsize=3,
                label=label,
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="width", title=loss)
    axes[0].set_ylabel("r = |κ_H| / κ_G")
    axes[0].legend()
    lab.figure("residual-by-width", figure, "Median and range over the seeds, at initialisation.")


def _training_study(lab: Lab, config: Config, x: Tensor, y: Tensor) -> None:
    series: dict[int, list[list[float]]] = {}
    for seed in lab.seeds:
        peaks = {}
        for width in (config.narrow, config.wide):
            probed = _probed_training(lab, config, width, seed, x, y)
            series.setdefault(width, []).append(probed["total"])
            peaks[width] = max(probed["ratio"])
            for step, total, ratio in zip(
                probed["step"], probed["total"], probed["ratio"], strict=True
            ):
                curve = f"training width {width} seed {seed}"
                lab.log(curve, int(step), curvature=total, residual_ratio=ratio)
        lab.measure("wide-training-ratio", peaks[config.wide], seed=seed)
        lab.measure("narrow-over-wide", peaks[config.narrow] / peaks[config.wide], seed=seed)
        wide = series[config.wide][-1]
        middle = wide[len(wide) // 4 : -(len(wide) // 4) or None]
        lab.measure("flat-in-the-middle", min(middle) / wide[-1], seed=seed)
    figure, ax = lab.subplots()
    for width, runs in series.items():
        steps = config.probe_every * np.arange(len(runs[0]))
        ax.plot(steps, np.median(runs, axis=0), label=f"width {width}")
    ax.set(xlabel="gradient step", ylabel="κ along the gradient", yscale="log")
    ax.legend()
    lab.figure("curvature-in-training", figure, "Median over the seeds, full-batch descent.")


def _scaling_study(lab: Lab, config: Config, inputs: dict[bool, Tensor], y: Tensor) -> None:
    """The same training on pixels in [0, 1] and on standardised ones; not a claim of the paper."""
    rows = []
    for standardize, x in inputs.items():
        kind = "standardised" if standardize else "in [0, 1]"
        for width in (config.narrow, config.wide):
            seed = lab.seeds[0]
            probed = _probed_training(lab, config, width, seed, x, y, f"inputs {kind}")
            row = {"inputs": kind, "width": width, "κ at the start": probed["total"][0]}
            rows.append({**row, "largest r": max(probed["ratio"]), "last r": probed["ratio"][-1]})
    caption = "r = |κ_H| / κ_G during training, one seed: it depends on the scale of the inputs."
    lab.table("residual by scale of the inputs", rows, caption)


def _probed_training(
    lab: Lab, config: Config, width: int, seed: int, x: Tensor, y: Tensor, study: str = ""
) -> dict[str, list[float]]:
    def trained() -> dict[str, list[float]]:
        with lab.seeded("training", width, seed):
            net = relu_net((x.shape[1], width, width, 10)).to(lab.device)
        found: list[DirectionalCurvature] = []
        steps = []

        def probe(step: int) -> None:
            if step % config.probe_every == 0:
                steps.append(float(step))
                found.append(directional_curvature(net, F.cross_entropy, (x, y)))

        probe(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=config.lr)
        fit(net, optimizer, [(x, y)], epochs=config.steps, after_step=probe)
        return {
            "step": steps,
            "total": [f.total for f in found],
            "ratio": [f.ratio for f in found],
        }

    return lab.stage(f"training {width} {seed} {study}", trained)
