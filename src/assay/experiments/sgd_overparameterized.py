"""SGD learns over-parameterized networks that generalize on separable data (Brutzkus, 2018)."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.analysis import (
    TwoLayerLeakyNet,
    compression_bound,
    hard_margin,
    perceptron_step,
    run_perceptron_sgd,
    update_bound,
    update_certificate,
)
from assay.data import Batches
from assay.lab import Claim, Lab, Paper, at_least, at_most

PAPER = Paper(
    slug="sgd-overparameterized",
    title=(
        "SGD Learns Over-parameterized Networks that Provably Generalize on Linearly Separable Data"
    ),
    authors=("A. Brutzkus", "A. Globerson", "E. Malach", "S. Shalev-Shwartz"),
    year=2018,
    url="https://arxiv.org/abs/1710.10174",
    topic="analysis",
    summary=(
        "How many updates SGD can need to fit separable data with a two-layer leaky-ReLU net of "
        "any width, and the error bound that follows because those samples determine the net."
    ),
    components=(
        "assay.analysis.TwoLayerLeakyNet",
        "assay.analysis.run_perceptron_sgd",
        "assay.analysis.hard_margin",
        "assay.analysis.update_bound",
        "assay.analysis.compression_bound",
        "assay.analysis.update_certificate",
    ),
)

_RANDOM = "random separable sets: d 5–50, k 1–512, η 0.01–100, α 0.05–0.9, R 0–1"
_DIGITS = "digits 3 against 5, R = 0.1, η = 1, v = 1/√(2k), to convergence"
_ORTHONORMAL = "10 orthonormal samples, R = 0.1, η = 1"

CLAIMS = (
    Claim(
        "updates-below-instance",
        "SGD never makes more updates than the bound from its own start",
        paper="theorem 2, before it is simplified",
        expect=at_most(1.0),
        kind="exact",
        how=f"updates / bound; {_RANDOM}; and every run on digits",
    ),
    Claim(
        "instance-below-tight",
        "The bound from the start is below that from the largest row norm",
        expect=at_most(1 + 1e-9),
        kind="exact",
        how="ratio of the bounds on the same runs",
    ),
    Claim(
        "tight-below-published",
        "The published form is the loosest",
        expect=at_most(1 + 1e-9),
        kind="exact",
        how="ratio of the bounds on the same runs",
    ),
    Claim(
        "alignment-grows",
        "Every update raises the alignment with w* by at least 2kηvα",
        paper="proof of theorem 2",
        expect=at_least(-1e-9),
        kind="exact",
        how=f"least (ΔF − 2kηvα) / (2kηvα) of the first updates, float64; {_RANDOM}",
    ),
    Claim(
        "norm-grows-slowly",
        "No update raises the squared norm by more than 2η + 2kη²v²",
        paper="proof of theorem 2",
        expect=at_most(1e-9),
        kind="exact",
        how="largest (Δ‖W‖² − g) / g with g = 2η + 2kη²v², on the same updates",
    ),
    Claim(
        "compression-set-rebuilds",
        "The start and the samples that updated it determine the trained net",
        paper="a compression scheme",
        expect=at_most(1e-9),
        kind="exact",
        how="replay in plain torch: largest deviation / largest weight; runs of ≤ 500 updates",
    ),
    Claim(
        "orthonormal-updates",
        "Orthonormal samples need updates of the order of ‖w*‖²",
        paper="Ω(‖w*‖²)",
        expect=at_least(0.5),
        kind="exact",
        how="updates / ‖w*‖², standard basis of 5, 20 and 80 dimensions, k = 1, 10, 100",
    ),
    Claim(
        "width-spread",
        "The number of updates does not depend on the width at α = 0.5",
        paper="independent of the size of the network",
        expect=at_most(0.10),
        unit="(most − fewest) / mean over the widths",
        how=_DIGITS,
    ),
    Claim(
        "width-spread-steep",
        "At α = 0.1 only the bound is independent of the width, the number of updates is not",
        unit="(most − fewest) / mean over the widths",
        how=f"{_DIGITS}; reported",
    ),
    Claim(
        "width-accuracy",
        "The widest net generalises as well as the narrowest",
        paper="over-parameterisation does not overfit",
        expect=at_least(-0.02),
        unit="test accuracy",
        how=f"{_DIGITS}, α = 0.5: widest − narrowest",
    ),
    Claim(
        "converges",
        "SGD reaches zero training loss at every width",
        paper="a global minimum",
        expect=at_most(300),
        over_seeds="every",
        unit="epochs of the slowest width",
        how=f"{_DIGITS}, α = 0.5",
    ),
    Claim(
        "converges-steep",
        "At α = 0.1 SGD reaches zero training loss as well",
        paper="a global minimum",
        over_seeds="every",
        unit="epochs of the slowest width, the narrowest",
        how=f"{_DIGITS}; reported",
    ),
    Claim(
        "digits-bound-vacuous",
        "On digits the bound on the error exceeds 1 and says nothing",
        expect=at_least(1.0),
        over_seeds="every",
        unit="bound on a probability",
        how=(
            "8 c log(n/δ) / n with the c updates really made (fewest of all widths and α), δ = 0.05"
        ),
    ),
    Claim(
        "margin-bound",
        "With a margin of 1/3 and 100,000 samples the bound is informative",
        paper="8 M_k log(n/δ) / n",
        expect=at_most(0.1),
        over_seeds="every",
        unit="bound on a probability",
        how="planted ‖w*‖ = 3, k = 100, η = 10, α = 0.5, R = 0.01, published M_k, δ = 0.05",
        discussion="The bound needs n ≫ 8 M_k log n; with fewer samples it says little.",
    ),
    Claim(
        "margin-error",
        "The error on fresh samples stays below that bound",
        expect=at_most(0.0),
        over_seeds="every",
        unit="error − bound",
        how="as many fresh samples of the same distribution",
    ),
    Claim(
        "relu-stuck-narrow",
        "A ReLU net with one unit of each sign can be stuck for ever",
        paper="with constant probability",
        expect=at_least(0.01),
        over_seeds="every",
        unit="share of starts",
        how=f"{_ORTHONORMAL}, 100 starts, k = 1: samples left on which all units are dead",
    ),
    Claim(
        "relu-stuck-wide",
        "A ReLU net with 16 units of each sign or more is not stuck",
        paper="fits with high probability",
        expect=at_most(0.0),
        over_seeds="every",
        unit="share of starts",
        how=f"{_ORTHONORMAL}, 100 starts, k = 16 and 64, the larger share",
        discussion="The chance that 16 units are dead on one of ten samples is 10 · 2⁻¹⁶ a start.",
    ),
    Claim(
        "leaky-never-stuck",
        "The leaky net is never stuck",
        paper="theorem 2",
        expect=at_most(0.0),
        kind="exact",
        how=f"{_ORTHONORMAL}, α = 0.1, 100 starts, k = 1 to 64, share of starts",
    ),
    Claim(
        "bad-minimum",
        "There are global minima that generalise badly",
        paper="about 40 % test error (from memory, unverified)",
        unit="test error at zero training error",
        how=(
            "k = 200, α = 0.1; zero hinge loss on 400 images, reached while also fitting 300 "
            "wrongly labelled images that are neither in the training nor in the test set"
        ),
    ),
    Claim(
        "both-layers",
        "Width does no harm when both layers are trained either",
        paper="test error does not rise with the width",
        expect=at_least(-0.01),
        kind="paper",
        unit="test accuracy",
        how="both layers trained by SGD on the hinge loss: widest − narrowest",
    ),
)


@dataclass(frozen=True)
class Config:
    """Settings; counts of images, samples, units of each sign, starts and epochs."""

    data: str = "mnist5k"
    images: int = 1000
    train: int = 700
    widths: tuple[int, ...] = (2, 20, 200)
    max_epochs: int = 1000
    configurations: int = 200
    margin_samples: int = 100_000
    margin_features: int = 20
    starts: int = 100
    poisoned: int = 300
    poisoned_width: int = 200
    both_layers_widths: tuple[int, ...] = (10, 100)
    both_layers_epochs: int = 10


PRESETS = {
    "smoke": Config(
        images=300,
        train=200,
        widths=(2, 20),
        configurations=10,
        starts=10,
        poisoned=80,
        poisoned_width=50,
        both_layers_widths=(4, 8),
        both_layers_epochs=1,
    ),
    "small": Config(),
    "paper": Config(
        data="mnist",
        images=5000,
        train=4000,
        widths=(2, 20, 200, 2000),
        poisoned=2000,
        poisoned_width=2000,
        both_layers_widths=(10, 100, 1000, 10_000),
        both_layers_epochs=100,
    ),
}
SEEDS = {"smoke": 1, "small": 5, "paper": 5}

ALPHAS = (0.5, 0.1)
RADIUS = 0.1
DELTA = 0.05


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    _random_configurations(lab, config)
    _orthonormal(lab)
    _stuck(lab, config)
    _with_margin(lab, config)
    x, y = _digits(lab, config)
    _widths(lab, config, x, y)
    _bad_minimum(lab, config, x, y)
    _both_layers(lab, config, x, y)


def separable_samples(
    n: int, d: int, margin: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Unit vectors whose first coordinate has at least the size `margin`, labelled by its sign."""
    y = (torch.rand(n, generator=generator) < 0.5).double() * 2 - 1
    along = margin + (1 - margin) * torch.rand(n, generator=generator, dtype=torch.float64)
    across = torch.randn(n, d - 1, generator=generator, dtype=torch.float64)
    across *= ((1 - along**2).sqrt() / across.norm(dim=1)).unsqueeze(1)
    return torch.cat([(along * y).unsqueeze(1), across], dim=1), y


# -- mathematics -----------------------------------------------------------------------------------


def _random_configurations(lab: Lab, config: Config) -> None:
    rows = []
    for i in lab.track(range(config.configurations), "random configurations"):
        found = lab.stage(f"configuration {i}", lambda i=i: _one_configuration(lab, i))
        lab.measure("updates-below-instance", found["updates"] / found["instance"])
        lab.measure("instance-below-tight", found["instance"] / found["tight"])
        lab.measure("tight-below-published", found["tight"] / found["published"])
        lab.measure("alignment-grows", found["alignment"])
        lab.measure("norm-grows-slowly", found["growth"])
        if "rebuilt" in found:
            lab.measure("compression-set-rebuilds", found["rebuilt"])
        rows.append(found)
    figure, ax = lab.subplots()
    for form, marker in (("instance", "o"), ("published", "+")):
        values = [[row["updates"], row[form]] for row in rows]
        ax.plot(*np.array(values).T, marker, label=f"{form} bound", alpha=0.6)
    low, high = 1, max(row["updates"] for row in rows)
    ax.plot([low, high], [low, high], color="black", linewidth=0.8, label="the updates themselves")
    ax.set(xscale="log", yscale="log", xlabel="updates made", ylabel="bound")
    ax.legend()
    lab.figure("updates-and-bounds", figure, f"Updates and their bounds: {_RANDOM}.")


def _one_configuration(lab: Lab, i: int) -> dict[str, float]:
    """Train on one random separable set; how its updates compare with the theory."""
    g = lab.generator("configuration", i)
    choice = torch.rand(6, generator=g, dtype=torch.float64).tolist()
    d, k = 5 + int(choice[0] * 46), round(512 ** choice[1])
    lr, alpha = 100 ** (2 * choice[2] - 1), 0.05 + 0.85 * choice[3]
    x, y = separable_samples(50, d, 0.05 + 0.25 * choice[4], g)
    net = TwoLayerLeakyNet(d, k, alpha, radius=choice[5], generator=g).double()
    start = copy.deepcopy(net)
    promised = update_certificate(net, x, y, lr)
    result = run_perceptron_sgd(net, x, y, lr)
    if not result.converged:
        raise RuntimeError(f"configuration {i} did not converge within the theorem's bound")
    found = {
        "updates": float(result.nonzero_updates),
        "instance": promised.instance,
        "tight": promised.tight,
        "published": promised.published,
    }
    w_star = hard_margin(x, y).w_star
    assert w_star is not None
    advance, growth = 2 * k * lr * net.v * alpha, 2 * lr + 2 * k * (lr * net.v) ** 2
    least, most = math.inf, -math.inf
    alignment, square = start.alignment(w_star), start.weight.square().sum().item()
    replayed = result.compression_set[:500].tolist()
    for j in replayed:
        perceptron_step(start, x[j] * result.scale, y[j], lr)
        now, size = start.alignment(w_star), start.weight.square().sum().item()
        least = min(least, (now - alignment - advance) / advance)
        most = max(most, (size - square - growth) / growth)
        alignment, square = now, size
    if len(replayed) == result.nonzero_updates:
        deviation = (start.weight - net.weight).abs().max() / net.weight.abs().max()
        found["rebuilt"] = deviation.item()
    return {**found, "alignment": least, "growth": most}


def _orthonormal(lab: Lab) -> None:
    for d in (5, 20, 80):
        for k in (1, 10, 100):
            g = lab.generator("orthonormal", d, k)
            y = torch.randint(0, 2, (d,), generator=g).double() * 2 - 1
            net = TwoLayerLeakyNet(d, k, 0.5, radius=RADIUS, generator=g).double()
            result = run_perceptron_sgd(net, torch.eye(d), y)
            lab.measure("orthonormal-updates", result.nonzero_updates / d)


def _stuck(lab: Lab, config: Config) -> None:
    widths = (1, 4, 16, 64)
    rows = []
    for seed in lab.seeds:
        shares = {}
        for alpha in (0.0, 0.1):
            for k in widths:
                key = ("stuck", alpha, k, seed)
                shares[alpha, k] = lab.stage(
                    " ".join(map(str, key)), lambda key=key: _share_stuck(lab, config, *key)
                )
                slope = "ReLU" if alpha == 0 else f"α = {alpha}"
                rows.append({"σ": slope, "k": k, "seed": seed, "stuck": shares[alpha, k]})
        lab.measure("relu-stuck-narrow", shares[0.0, 1], seed=seed)
        lab.measure("relu-stuck-wide", max(shares[0.0, 16], shares[0.0, 64]), seed=seed)
        lab.measure("leaky-never-stuck", max(shares[0.1, k] for k in widths))
    lab.table("stuck", rows, f"Share of the starts whose training never ends: {_ORTHONORMAL}.")


def _share_stuck(lab: Lab, config: Config, study: str, alpha: float, k: int, seed: int) -> float:
    stuck = 0
    for i in range(config.starts):
        g = lab.generator(study, alpha, k, seed, i)
        y = torch.randint(0, 2, (10,), generator=g).double() * 2 - 1
        net = TwoLayerLeakyNet(10, k, alpha, radius=RADIUS, generator=g).double()
        stuck += not run_perceptron_sgd(net, torch.eye(10), y, max_epochs=5000).converged
    return stuck / config.starts


def _with_margin(lab: Lab, config: Config) -> None:
    n, k, lr, alpha, radius = config.margin_samples, 100, 10.0, 0.5, 0.01
    bound = update_bound(3.0, lr=lr, k=k, alpha=alpha, radius=radius)
    promised = compression_bound(n, bound, DELTA)
    rows = []
    for seed in lab.track(lab.seeds, "samples with a margin"):

        def trained(seed: int = seed) -> dict[str, float]:
            g = lab.generator("margin", seed)
            x, y = separable_samples(n, config.margin_features, 1 / 3, g)
            net = TwoLayerLeakyNet(
                config.margin_features, k, alpha, radius=radius, generator=g
            ).double()
            result = run_perceptron_sgd(net, x, y, lr, max_epochs=math.floor(bound) + 2)
            fresh, truth = separable_samples(n, config.margin_features, 1 / 3, g)
            with torch.no_grad():
                error = (net(fresh) * truth <= 0).double().mean().item()
            return {"updates": float(result.nonzero_updates), "error": error}

        found = lab.stage(f"margin {seed}", trained)
        lab.measure("updates-below-instance", found["updates"] / bound)
        lab.measure("margin-bound", promised, seed=seed)
        lab.measure("margin-error", found["error"] - promised, seed=seed)
        rows.append({"seed": seed, **found, "bound on updates": bound, "bound on error": promised})
    lab.table("margin", rows, f"{n:,} samples in 20 dimensions with ‖w*‖ = 3; w* is planted.")


# -- digits ----------------------------------------------------------------------------------------


def _digits(lab: Lab, config: Config) -> tuple[Tensor, Tensor]:
    """Digits 3 (+1) and 5 (−1) of both splits in random order, rows of pixels, separable."""
    from sklearn.svm import LinearSVC

    parts = [lab.data(config.data, split) for split in ("train", "test")]
    x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
    chosen = ((y == 3) | (y == 5)).nonzero().squeeze(1)
    chosen = chosen[torch.randperm(len(chosen), generator=lab.generator("digits"))][: config.images]
    x, y = x[chosen].flatten(1).double(), (y[chosen] == 3).double() * 2 - 1
    if hard_margin(x, y).separable:
        return x, y
    machine = LinearSVC(C=1.0, fit_intercept=False, max_iter=10**5).fit(x.numpy(), y.numpy())
    right = torch.from_numpy(machine.decision_function(x.numpy())) * y > 0
    lab.note(
        f"Of {len(y)} images {int((~right).sum())} that a linear support vector machine gets wrong "
        "were left out, so that the rest is separable."
    )
    return x[right], y[right]


def _split(lab: Lab, config: Config, n: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=lab.generator("split", seed))
    return order[: config.train], order[config.train :]


def _widths(lab: Lab, config: Config, x: Tensor, y: Tensor) -> None:
    runs: dict[tuple[float, int, int], dict[str, Any]] = {}
    for seed in lab.track(lab.seeds, "digits of all widths"):
        for alpha in ALPHAS:
            for k in config.widths:
                runs[alpha, k, seed] = found = lab.stage(
                    f"digits {alpha} {k} {seed}",
                    lambda key=(alpha, k, seed): _one_width(lab, config, x, y, *key),
                )
                lab.measure("updates-below-instance", found["updates"] / found["instance"])
                lab.measure("instance-below-tight", found["instance"] / found["tight"])
                lab.measure("tight-below-published", found["tight"] / found["published"])
                if seed == lab.seeds[0]:
                    for epoch, updates in enumerate(found["history"], start=1):
                        lab.log(f"updates alpha {alpha} k {k}", epoch, updates=updates)
        for alpha, suffix in zip(ALPHAS, ("", "-steep"), strict=True):
            mine = [runs[alpha, k, seed] for k in config.widths]
            counts = [found["updates"] for found in mine]
            spread = (max(counts) - min(counts)) / np.mean(counts)
            lab.measure(f"width-spread{suffix}", spread, seed=seed)
            slowest = max(f["epochs"] if f["converged"] else math.inf for f in mine)
            lab.measure(f"converges{suffix}", slowest, seed=seed)
        accuracies = [runs[ALPHAS[0], k, seed]["accuracy"] for k in config.widths]
        lab.measure("width-accuracy", accuracies[-1] - accuracies[0], seed=seed)
        fewest = min(found["updates"] for key, found in runs.items() if key[2] == seed)
        lab.measure(
            "digits-bound-vacuous", compression_bound(config.train, fewest, DELTA), seed=seed
        )
    _show_widths(lab, config, runs)


def _one_width(
    lab: Lab, config: Config, x: Tensor, y: Tensor, alpha: float, k: int, seed: int
) -> dict[str, Any]:
    train, test = _split(lab, config, len(x), seed)
    net = TwoLayerLeakyNet(
        x.shape[1], k, alpha, radius=RADIUS, generator=lab.generator("net", alpha, k, seed)
    ).double()
    promised = update_certificate(net, x[train], y[train])
    result = run_perceptron_sgd(
        net, x[train], y[train], order="shuffle", max_epochs=config.max_epochs,
        generator=lab.generator("order", seed),
    )  # fmt: skip
    with torch.no_grad():
        accuracy = (net(x[test]) * y[test] > 0).double().mean().item()
    return {
        "updates": float(result.nonzero_updates),
        "epochs": float(result.epochs),
        "converged": result.converged,
        "accuracy": accuracy,
        "norm": promised.norm,
        "instance": promised.instance,
        "tight": promised.tight,
        "published": promised.published,
        "history": result.history.tolist(),
    }


def _show_widths(lab: Lab, config: Config, runs: dict[tuple[float, int, int], dict]) -> None:
    rows = []
    figure, ax = lab.subplots()
    for alpha in ALPHAS:
        means: dict[str, list[float]] = {}
        for k in config.widths:
            mine = [runs[alpha, k, seed] for seed in lab.seeds]
            row = {
                name: float(np.mean([found[name] for found in mine]))
                for name in ("updates", "epochs", "accuracy", "norm", "instance", "published")
            }
            rows.append(
                {
                    "α": alpha, "k": k, "updates": row["updates"], "epochs": row["epochs"],
                    "test accuracy": row["accuracy"], "‖w*‖": row["norm"],
                    "instance bound": row["instance"], "published bound": row["published"],
                    "bound on the error": compression_bound(config.train, row["updates"], DELTA),
                }
            )  # fmt: skip
            for name, value in row.items():
                means.setdefault(name, []).append(value)
        (line,) = ax.plot(config.widths, means["updates"], "o-", label=f"updates, α = {alpha}")
        ax.plot(
            config.widths, means["instance"], "--", color=line.get_color(),
            label=f"instance bound, α = {alpha}",
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="k, units of each sign", ylabel="updates")
    ax.legend()
    caption = f"Means over the seeds: {_DIGITS}."
    lab.figure("updates-by-width", figure, caption)
    lab.table("digits", rows, caption)
    lab.note(
        "The bound on the error is vacuous on digits: a margin of about 1/60 makes SGD use every "
        "image several times, and a compression scheme pays for each use."
    )


def _bad_minimum(lab: Lab, config: Config, x: Tensor, y: Tensor) -> None:
    for seed in lab.track(lab.seeds, "bad minima"):

        def trained(seed: int = seed) -> dict[str, float]:
            order, test = _split(lab, config, len(x), seed)
            labels = y[order].clone()
            labels[-config.poisoned :] *= -1
            net = TwoLayerLeakyNet(
                x.shape[1], config.poisoned_width, 0.1, radius=RADIUS,
                generator=lab.generator("bad minimum", seed),
            ).double()  # fmt: skip
            result = run_perceptron_sgd(
                net, x[order], labels, order="shuffle", max_epochs=config.max_epochs,
                generator=lab.generator("bad order", seed),
            )  # fmt: skip
            good = order[: -config.poisoned]
            with torch.no_grad():
                scaled = net(x[good] * result.scale) * y[good]
                error = (net(x[test]) * y[test] <= 0).double().mean().item()
            return {"loss": (1 - scaled).clamp_min(0).mean().item(), "error": error}

        found = lab.stage(f"bad minimum {seed}", trained)
        if found["loss"] <= 1e-9:
            lab.measure("bad-minimum", found["error"], seed=seed)
        else:
            lab.note(f"Seed {seed}: the wrongly labelled images were not fitted; no bad minimum.")


def _both_layers(lab: Lab, config: Config, x: Tensor, y: Tensor) -> None:
    rows = []
    for seed in lab.seeds:
        train, test = _split(lab, config, len(x), seed)
        inputs = (x / x.norm(dim=1).max()).float()
        accuracies = []
        for width in config.both_layers_widths:
            with lab.seeded("both layers", width, seed):
                net = nn.Sequential(
                    nn.Linear(x.shape[1], width, bias=False),
                    nn.LeakyReLU(0.1),
                    nn.Linear(width, 1, bias=False),
                    nn.Flatten(0),
                )
            batches = Batches(
                inputs[train], y[train].float(), 1, generator=lab.generator("both", width, seed)
            )
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            lab.fit(
                f"both-layers-{width}-{seed}", net, optimizer, batches,
                epochs=config.both_layers_epochs, loss_fn=_hinge,
            )  # fmt: skip
            with torch.no_grad():
                output = net(inputs[test].to(lab.device)).cpu()
            accuracies.append((output * y[test] > 0).double().mean().item())
            rows.append({"width": width, "seed": seed, "test accuracy": accuracies[-1]})
        lab.measure("both-layers", accuracies[-1] - accuracies[0], seed=seed)
    lab.table("both layers", rows, "Both layers trained by SGD with batches of one sample.")


def _hinge(output: Tensor, target: Tensor) -> Tensor:
    return F.relu(1 - output * target).mean()
