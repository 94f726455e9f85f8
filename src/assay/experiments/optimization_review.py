"""Optimization for deep learning: theory and algorithms (Sun, 2019)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.data import DataLoader, default_collate

from assay.analysis import (
    Contender,
    JacobianOperator,
    compare_optimizers,
    mean_square_singular_value,
    ntk,
    ntk_drift,
    propagation_report,
    sharpness,
)
from assay.data import Batches, Dataset, ImageNet
from assay.data.convex import LogisticRegression, breast_cancer_logistic
from assay.functional import HessianOperator, evaluate_classifier, fit, top_eigenvalues
from assay.lab import Claim, Lab, Paper, at_least, at_most, between, close_to
from assay.lab.result import DataSource
from assay.models import MLP, ResNet50
from assay.optim import (
    SVRG,
    AdamNC,
    AMSGrad,
    critical_,
    delta_orthogonal_,
    edge_of_chaos,
    fixup_,
    lsuv_,
)

PAPER = Paper(
    slug="optimization-review",
    title="Optimization for Deep Learning: Theory and Algorithms",
    authors=("R. Sun",),
    year=2019,
    url="https://arxiv.org/abs/1912.08957",
    topic="optim",
    summary=(
        "Why a network does not train, and what to do: a report on signals and gradients, "
        "initialisations for deep nets, spectra of Jacobian, Hessian and tangent kernel, SVRG, and "
        "a comparison of optimizers that tunes each as much."
    ),
    components=(
        "assay.analysis.propagation_report",
        "assay.analysis.compare_optimizers",
        "assay.optim.edge_of_chaos",
        "assay.optim.mean_field",
        "assay.optim.critical_",
        "assay.optim.delta_orthogonal_",
        "assay.optim.lsuv_",
        "assay.optim.fixup_",
        "assay.optim.SVRG",
        "assay.optim.lr_range_test",
        "assay.optim.BarzilaiBorwein",
        "assay.analysis.JacobianOperator",
        "assay.analysis.singular_values",
        "assay.analysis.sharpness",
        "assay.analysis.block_sharpness",
        "assay.analysis.ntk",
        "assay.analysis.LotteryTicket",
    ),
)

DEEP = "31 layers of width 64, SGD 0.01 with momentum 0.9, batches of 64, 3 epochs: test accuracy"

CLAIMS = (
    Claim(
        "critical-tanh-05",
        "tanh with σ_b² = 0.05 is at the edge of chaos for σ_w² = 1.761",
        paper="1.76",
        expect=close_to(1.7610, tol=1e-3),
        kind="exact",
        how="σ_w² of edge_of_chaos",
    ),
    Claim(
        "critical-tanh-01",
        "tanh with σ_b² = 0.01 is at the edge of chaos for σ_w² = 1.424",
        expect=close_to(1.4242, tol=1e-3),
        kind="exact",
        how="σ_w² of edge_of_chaos",
    ),
    Claim(
        "critical-tanh-10",
        "tanh with σ_b² = 0.1 is at the edge of chaos for σ_w² = 1.986",
        expect=close_to(1.9861, tol=1e-3),
        kind="exact",
        how="σ_w² of edge_of_chaos",
    ),
    Claim(
        "critical-relu",
        "ReLU without biases is at the edge of chaos for σ_w² = 2",
        paper="2",
        expect=close_to(2.0, tol=1e-3),
        kind="exact",
        how="σ_w² of edge_of_chaos",
    ),
    Claim(
        "orthogonal-isometry",
        "A deep linear net with orthogonal weights is an isometry",
        paper="all singular values 1",
        expect=between(1 - 1e-5, 1 + 1e-5),
        kind="exact",
        how="smallest and largest singular value of the Jacobian, 50 layers of width 64, float64",
    ),
    Claim(
        "gaussian-linear",
        "A linear net with Gaussian weights is far from an isometry after 10 layers already",
        expect=at_most(-6.5),
        over_seeds="every",
        unit="log10",
        how=(
            "log10 of smallest / largest singular value, width 64, float64. A prototype in single "
            "precision had found 1e-8, which is where its rounding begins: only the upper end of "
            "10^(-8 ± 1.5) is kept as the bound"
        ),
    ),
    Claim(
        "relu-gain-one",
        "A ReLU net with Gaussian weights of gain 1 loses half of a signal's square a layer",
        paper="2^-L",
        expect=between(-1.5, 1.5),
        unit="log10",
        how=(
            "log10 of (mean square singular value of the Jacobian / 2^-50), 50 layers of width "
            "256, 64 probes; at width 64 single nets of a pilot were below 10^-1.5"
        ),
    ),
    Claim(
        "relu-he",
        "A ReLU net with He's initialisation keeps the square of a signal",
        paper="1",
        expect=between(-1.5, 1.5),
        unit="log10",
        how="log10 of the mean square singular value of the Jacobian, 50 layers of width 256",
    ),
    Claim(
        "deep-tanh-default",
        "A deep tanh net does not train from torch's default initialisation",
        expect=at_most(0.2),
        unit="accuracy",
        how=DEEP,
    ),
    Claim(
        "deep-relu-default",
        "A deep ReLU net does not train from torch's default initialisation",
        expect=at_most(0.2),
        unit="accuracy",
        how=DEEP,
    ),
    Claim(
        "deep-tanh-orthogonal",
        "A deep tanh net trains from orthogonal weights",
        expect=at_least(0.85),
        unit="accuracy",
        how=f"{DEEP}, gain 1.05",
    ),
    Claim(
        "deep-tanh-orthogonal-gain",
        "A deep tanh net trains better from orthogonal than from Gaussian weights",
        expect=at_least(0.05),
        unit="accuracy",
        how=f"{DEEP}, difference",
        discussion=(
            "Orthogonal weights are ahead in all five seeds, by 3 to 18 points and 8 in the mean, "
            "and they vary less: 0.885 to 0.915 against 0.74 to 0.884. Whether the mean lead "
            "exceeds five points five seeds do not settle."
        ),
    ),
    Claim(
        "deep-relu-orthogonal-gain",
        "A deep ReLU net trains better from orthogonal than from He's Gaussian weights",
        expect=at_least(0),
        unit="accuracy",
        how=f"{DEEP}, difference, gain √2",
        discussion=(
            "Orthogonal weights are ahead in four of five seeds and by 15 points in the mean, but "
            "after three epochs accuracies are anywhere between 0.25 and 0.6 for both: ReLU has no "
            "edge of chaos with dynamical isometry, and which units are dead at the start decides "
            "how fast a net leaves its plateau. More seeds or epochs are needed."
        ),
    ),
    Claim(
        "deep-relu-he-gain",
        "A deep ReLU net trains better from He's than from torch's default initialisation",
        expect=at_least(0.15),
        unit="accuracy",
        how=f"{DEEP}, difference",
        discussion=(
            "The default stays at 0.1 in every seed and He's initialisation leaves it in every "
            "seed, by 15 to 42 points and 24 in the mean; the lower end of the interval is at 11."
        ),
    ),
    Claim(
        "gd-converges",
        "Gradient descent on least squares converges at 0.98 × 2/λ_max",
        paper="lr < 2/λ_max",
        expect=at_most(-6),
        kind="exact",
        unit="log10",
        how=(
            "log10 of the distance to the solution after / before 2,000 steps, 200 × 20, float64; "
            "λ_max from `sharpness`"
        ),
    ),
    Claim(
        "gd-diverges",
        "Gradient descent on least squares diverges at 1.02 × 2/λ_max",
        paper="lr > 2/λ_max",
        expect=at_least(6),
        kind="exact",
        unit="log10",
        how="the same",
    ),
    Claim(
        "edge-of-stability",
        "Late in full-batch training, the sharpness of a net settles at 2/lr",
        expect=between(1.5, 2.5),
        unit="lr · λ_max",
        how=(
            "tanh net with two layers of width 64 on 300 images, squared error, lr 0.05: mean of "
            "lr · λ_max at the last four measurements (at lr 0.02, 3,000 steps of a pilot ended at "
            "1.02, still on the way)"
        ),
    ),
    Claim(
        "svrg-converges",
        "SVRG converges at a constant step",
        paper="linearly",
        expect=at_most(1e-8),
        over_seeds="every",
        unit="gap",
        how=(
            "f − f* of a ridge logistic regression (breast cancer) after 30 passes, every gradient "
            "of a sample counted, n steps an epoch, float64; ridge 0.1 and step were chosen in a "
            "pilot (at ridge 0.01 the budget ends at gaps of 1e-6 to 1e-3)"
        ),
    ),
    Claim(
        "sgd-stalls",
        "SGD stalls at the constant step at which SVRG converges",
        paper="at a distance that the step sets",
        expect=at_least(1e-4),
        over_seeds="every",
        unit="gap",
        how="the same",
    ),
    Claim(
        "ntk-drift",
        "The tangent kernel moves less in wider nets, as width^(-1/2)",
        paper="O(1/√n)",
        expect=between(-0.7, -0.3),
        unit="exponent",
        how=(
            "slope of log(‖Θ_t − Θ_0‖/‖Θ_0‖) over log(width), widths 64 to 1,024: ReLU nets with "
            "two hidden layers, 64 digits, full-batch training at a fixed share of 1/λ_max(Θ_0)"
        ),
        discussion=(
            "The kernel moves less in wider nets, and its drift falls faster than as n^(-1/2): the "
            "exponent here is about −0.85. O(1/√n) is an upper bound on the drift. Lee et al. "
            "(2019) report trained nets nearer to 1/n (from memory, unverified)."
        ),
    ),
    Claim(
        "batchnorm-sharpness",
        "BatchNorm changes λ_max of the Hessian at the start",
        paper="lowers it",
        unit="ratio",
        how="λ_max without / with BatchNorm, MLP of 6 layers, torch's default weights, 300 images",
    ),
    Claim(
        "cnn-10000",
        "A convolutional net of 10,000 layers trains from delta-orthogonal weights",
        paper="99 % on MNIST (unverified)",
        expect=at_least(0.9),
        kind="paper",
        unit="accuracy",
        how="tanh, no normalisation, no shortcuts; test accuracy",
    ),
    Claim(
        "imagenet-fixup",
        "Initialised by Fixup, a residual net without normalisation does on ImageNet about as well "
        "as one with BatchNorm",
        paper="76.0 % and 76.7 % (the latter unverified)",
        expect=at_least(-0.015),
        kind="paper",
        unit="accuracy",
        how=(
            "ResNet-50, 90 epochs with mixup: top-1 accuracy on the validation images, Fixup − "
            "BatchNorm. The figures are those of Zhang, Dauphin and Ma (2019). Mixup is as strong "
            "as for these figures, α = 0.7 with Fixup, 0.2 with BatchNorm (the latter unverified)"
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Every knob.

    Args:
        data: name of the data set.
        train_size: training images, a stratified subset; 0 is all of them.
        test_size: test images, likewise.
        depth: layers of the deep nets.
        width: of their hidden layers.
        deep_epochs: of their training.
        stability_size: images of full-batch training.
        stability_steps: steps of full-batch training.
        stability_lr: its learning rate.
        svrg_ridge: r of the logistic regression.
        svrg_step: learning rate times the mean smoothness constant of a sample's loss.
        svrg_passes: budget, in passes over the data.
        ntk_widths: widths of the nets whose kernels are compared.
        ntk_size: digits that the kernels are of.
        ntk_steps: steps of full-batch training.
        ntk_share: learning rate times λ_max of the kernel at the start.
        bench_size: training images of the comparison of optimizers.
        bench_epochs: its epochs.
        bench_grid: learning rates that each optimizer is tuned over, relative to its usual one.
        bench_seeds: seeds of the tuned optimizers.
        cnn_depth: layers of the convolutional net.
        cnn_channels: its channels.
        cnn_epochs: of its training.
        cnn_lr: its learning rate.
        imagenet_epochs: of training on ImageNet, with Fixup and with BatchNorm; 0 leaves it out.
        imagenet_batch: images a step.
        imagenet_lr: learning rate at the start, then a cosine to 0; a tenth for Fixup's scalars.
        imagenet_mixup: α of mixup with BatchNorm; shares are drawn from Beta(α, α).
        imagenet_fixup_mixup: α of mixup with Fixup.
        imagenet_size: height and width of the images, in pixels.
        imagenet_width: maps of the first convolution.
        imagenet_workers: processes that read images.
    """

    data: str = "mnist5k"
    train_size: int = 0
    test_size: int = 0
    depth: int = 31
    width: int = 64
    deep_epochs: int = 3
    stability_size: int = 300
    stability_steps: int = 1600
    stability_lr: float = 0.05
    svrg_ridge: float = 0.1
    svrg_step: float = 0.25
    svrg_passes: int = 30
    ntk_widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    ntk_size: int = 64
    ntk_steps: int = 200
    ntk_share: float = 0.5
    bench_size: int = 2000
    bench_epochs: int = 4
    bench_grid: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    bench_seeds: int = 3
    cnn_depth: int = 32
    cnn_channels: int = 16
    cnn_epochs: int = 2
    cnn_lr: float = 0.005
    imagenet_epochs: int = 0
    imagenet_batch: int = 256
    imagenet_lr: float = 0.1
    imagenet_mixup: float = 0.2
    imagenet_fixup_mixup: float = 0.7
    imagenet_size: int = 224
    imagenet_width: int = 64
    imagenet_workers: int = 8


PRESETS = {
    "smoke": Config(
        train_size=300,
        test_size=200,
        depth=12,
        width=16,
        deep_epochs=1,
        stability_size=60,
        stability_steps=60,
        svrg_passes=4,
        ntk_widths=(16, 32),
        ntk_size=12,
        ntk_steps=10,
        bench_size=200,
        bench_epochs=1,
        bench_grid=(1.0,),
        bench_seeds=1,
        cnn_depth=4,
        cnn_channels=4,
        cnn_epochs=1,
    ),
    "small": Config(),
    "paper": Config(
        data="mnist",
        stability_size=5000,
        stability_steps=20000,
        stability_lr=0.02,
        ntk_widths=(64, 128, 256, 512, 1024, 2048, 4096),
        ntk_size=256,
        ntk_steps=2000,
        bench_size=50000,
        bench_epochs=20,
        bench_seeds=5,
        cnn_depth=10_000,
        cnn_channels=256,
        cnn_epochs=50,
        cnn_lr=3e-5,
        imagenet_epochs=90,
    ),
}
SEEDS = {"smoke": 1, "small": 5, "paper": 5}


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    imagenet = load_imagenet(lab, config)  # first: if it is missing, that is said at once
    train, test = standardised(
        lab.data(config.data, "train", limit=config.train_size or None),
        lab.data(config.data, "test", limit=config.test_size or None),
    )
    measure_edge_of_chaos(lab)
    measure_jacobians(lab)
    measure_deep_nets(lab, config, train, test)
    measure_stability_of_least_squares(lab)
    measure_edge_of_stability(lab, config, train)
    measure_svrg(lab, config)
    measure_kernels(lab, config)
    measure_batchnorm(lab, config, train)
    measure_deep_convolutions(lab, config, train, test)
    compare(lab, config, train, test)
    if imagenet is not None:
        measure_fixup(lab, config, *imagenet)


def standardised(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Both sets with the training set's mean and standard deviation at 0 and 1."""
    mean, std = train.x.mean(), train.x.std()
    return replace(train, x=(train.x - mean) / std), replace(test, x=(test.x - mean) / std)


# ------------------------------------------------------------------------------------ mean field


def measure_edge_of_chaos(lab: Lab) -> None:
    """Solve for the critical weights, and draw the line of tanh."""
    for claim, sigma_b2 in (("05", 0.05), ("01", 0.01), ("10", 0.1)):
        lab.measure(f"critical-tanh-{claim}", edge_of_chaos("tanh", sigma_b2).sigma_w2)
    lab.measure("critical-relu", edge_of_chaos("relu").sigma_w2)
    rows = []
    for activation in ("tanh", "relu", "gelu", "silu", "elu"):
        sigma_w2, q = edge_of_chaos(activation)
        rows.append({"activation": activation, "σ_b²": 0.0, "σ_w²": sigma_w2, "q*": q})
    for sigma_b2 in (0.01, 0.05, 0.1):
        sigma_w2, q = edge_of_chaos("tanh", sigma_b2)
        rows.append({"activation": "tanh", "σ_b²": sigma_b2, "σ_w²": sigma_w2, "q*": q})
    lab.table("edge of chaos", rows, caption="Weights at which gradients keep their size.")


def measure_jacobians(lab: Lab) -> None:
    """Isometry of orthogonal weights, and what Gaussian ones do to a signal."""
    for seed in lab.seeds:
        g = lab.generator("jacobians", seed)

        def linear(depth: int, orthogonal: bool, g: torch.Generator = g) -> Tensor:
            net = critical_(plain(depth, 64), "identity", orthogonal=orthogonal, generator=g)
            jacobian = JacobianOperator(net, torch.zeros(1, 64, dtype=torch.float64))
            return torch.linalg.svdvals(jacobian.to_dense())

        orthogonal, gaussian = linear(50, True), linear(10, False)
        lab.measure("orthogonal-isometry", orthogonal[[0, -1]], seed=seed)
        lab.measure("gaussian-linear", (gaussian[-1] / gaussian[0]).log10(), seed=seed)

        for claim, gain, expected in (("relu-gain-one", 1.0, 2.0**-50), ("relu-he", 2**0.5, 1.0)):
            net = plain(50, 256, nn.ReLU)
            for layer in linear_layers(net):
                nn.init.normal_(layer.weight, std=gain / 16, generator=g)
            x = torch.randn(1, 256, generator=g, dtype=torch.float64)
            found = mean_square_singular_value(JacobianOperator(net, x), probes=64, generator=g)
            lab.measure(claim, (found.mean / expected).log10(), seed=seed)


def plain(
    depth: int, width: int, activation: Callable[[], nn.Module] | None = None
) -> nn.Sequential:
    """Linear layers of one width without biases, float64."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(nn.Linear(width, width, bias=False))
        if activation is not None:
            layers.append(activation())
    return nn.Sequential(*layers).double()


def linear_layers(net: nn.Module) -> list[nn.Linear]:
    """All of them, in order."""
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear)]


# ------------------------------------------------------------------------------------- deep nets


def orthogonal_with_gain(net: nn.Module, gain: float) -> None:
    """Orthogonal weights of one gain, no biases."""
    for layer in linear_layers(net):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)


def gaussian_with_gain(net: nn.Module, gain: float) -> None:
    """Gaussian weights of variance gain²/fan_in, no biases."""
    for layer in linear_layers(net):
        nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
        nn.init.zeros_(layer.bias)


INITIALISATIONS: dict[str, dict[str, Callable[[nn.Module, Tensor], object]]] = {
    "tanh": {
        "torch's default": lambda net, x: None,
        "Gaussian, gain 1": lambda net, x: gaussian_with_gain(net, 1.0),
        "orthogonal, gain 1.05": lambda net, x: orthogonal_with_gain(net, 1.05),
        "LSUV": lambda net, x: lsuv_(net, x),
    },
    "relu": {
        "torch's default": lambda net, x: None,
        "Gaussian, gain 1": lambda net, x: gaussian_with_gain(net, 1.0),
        "He": lambda net, x: critical_(net, "relu", orthogonal=False),
        "orthogonal, gain √2": lambda net, x: critical_(net, "relu"),
        "LSUV": lambda net, x: lsuv_(net, x),
    },
}


def measure_deep_nets(lab: Lab, config: Config, train: Dataset, test: Dataset) -> None:
    """Train deep nets from every initialisation."""
    accuracy: dict[tuple[str, str], list[float]] = {}
    first_reports: dict[tuple[str, str], Any] = {}
    for seed in lab.seeds:
        for activation, initialisations in INITIALISATIONS.items():
            for name, initialise in initialisations.items():
                found, report = train_deep_net(
                    lab, config, train, test, activation, name, initialise, seed
                )
                accuracy.setdefault((activation, name), []).append(found)
                first_reports.setdefault((activation, name), report)
        last = {key: values[-1] for key, values in accuracy.items()}
        tanh, relu = (partial(_of, last, kind) for kind in ("tanh", "relu"))
        lab.measure("deep-tanh-default", tanh("torch"), seed=seed)
        lab.measure("deep-relu-default", relu("torch"), seed=seed)
        lab.measure("deep-tanh-orthogonal", tanh("orthogonal"), seed=seed)
        gain = tanh("orthogonal") - tanh("Gaussian")
        lab.measure("deep-tanh-orthogonal-gain", gain, seed=seed)
        lab.measure("deep-relu-orthogonal-gain", relu("orthogonal") - relu("He"), seed=seed)
        lab.measure("deep-relu-he-gain", relu("He") - relu("torch"), seed=seed)
    rows = []
    for (activation, name), values in accuracy.items():
        report = first_reports[activation, name]
        rows.append(
            {
                "activation": activation,
                "initialisation": name,
                "test accuracy": float(np.mean(values)),
                "lowest": min(values),
                "highest": max(values),
                "log q a layer": report["forward"],
                "log |gradient| a layer": report["backward"],
                "the report says": report["advice"],
            }
        )
    lab.table(
        "deep nets",
        rows,
        caption="Accuracy after training, and what the signal report says before it (first seed).",
    )
    draw_reports(lab, first_reports)


def _of(last: dict[tuple[str, str], float], activation: str, start: str) -> float:
    [value] = [v for (kind, name), v in last.items() if kind == activation and start in name]
    return value


def train_deep_net(
    lab: Lab,
    config: Config,
    train: Dataset,
    test: Dataset,
    activation: str,
    name: str,
    initialise: Callable[[nn.Module, Tensor], object],
    seed: int,
) -> tuple[float, dict[str, Any]]:
    """Test accuracy, and the signal report at the start."""
    hidden = [config.width] * (config.depth - 1)
    sizes = (train.x[0].numel(), *hidden, train.num_classes)
    with lab.seeded("deep", seed):
        net = MLP(sizes, activation=activation)
        initialise(net, train.x[:256])
    found = propagation_report(net, (train.x[:256], train.y[:256]), F.cross_entropy)
    report = {
        "forward": found.forward_growth,
        "backward": found.backward_growth,
        "advice": found.advice[0].text.partition(":")[0] if found.advice else "nothing",
        "gradients": [layer.gradient_norm for layer in found.layers],
        "moments": [layer.second_moment for layer in found.layers],
    }
    batches = Batches(train.x, train.y, 64, generator=lab.generator("deep", seed))
    sgd = SGD(net.parameters(), lr=0.01, momentum=0.9)
    lab.fit(f"{activation}-{slug(name)}-{seed}", net, sgd, batches, epochs=config.deep_epochs)
    return evaluate_classifier(net, test.x, test.y)["accuracy"], report


def slug(name: str) -> str:
    """A name for a file."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def draw_reports(lab: Lab, reports: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Second moments and gradients through the depth."""
    figure, axes = lab.subplots(2, 2, width=8.5, height=6, sharex=True)
    for row, (key, title) in enumerate((("moments", "second moment"), ("gradients", "|gradient|"))):
        for axis, activation in zip(axes[row], INITIALISATIONS, strict=True):
            for (kind, name), report in reports.items():
                if kind == activation:
                    axis.semilogy(range(1, len(report[key]) + 1), report[key], label=name)
            axis.set_title(f"{activation}: {title}")
    for axis in axes[1]:
        axis.set_xlabel("layer")
        axis.legend(fontsize=8)
    lab.figure("signals", figure, caption="Signals and gradients at the start, first seed.")


# ------------------------------------------------------------------------------------- stability


def measure_stability_of_least_squares(lab: Lab) -> None:
    """Gradient descent just below and just above 2/λ_max."""
    g = lab.generator("least squares")
    A = torch.randn(200, 20, generator=g, dtype=torch.float64)
    solution = torch.randn(20, generator=g, dtype=torch.float64)
    line = nn.Linear(20, 1, bias=False).double()
    data = A, (A @ solution)[:, None]
    found = sharpness(line, F.mse_loss, data, tol=1e-12, generator=g)
    for claim, share in (("gd-converges", 0.98), ("gd-diverges", 1.02)):
        nn.init.zeros_(line.weight)
        sgd = SGD(line.parameters(), lr=share * found.max_lr)
        fit(line, sgd, [data], epochs=2000, loss_fn=F.mse_loss)
        distance = (line.weight.detach()[0] - solution).norm() / solution.norm()
        lab.measure(claim, distance.clamp_min(1e-300).log10())


def measure_edge_of_stability(lab: Lab, config: Config, train: Dataset) -> None:
    """λ_max along full-batch gradient descent."""
    x, y = train.x[: config.stability_size].flatten(1), train.y[: config.stability_size]
    targets = F.one_hot(y, train.num_classes).to(x)
    every = max(1, config.stability_steps // 16)
    figure, axis = lab.subplots()
    for seed in lab.seeds:

        def follow(seed: int = seed) -> dict[str, list[float]]:
            with lab.seeded("stability", seed):
                net = MLP((x.shape[1], 64, 64, train.num_classes), activation="tanh")
            g = lab.generator("lanczos", seed)
            found: dict[str, list[float]] = {"step": [], "sharpness": [], "loss": []}

            def look(done: int) -> None:
                if done % every == 0:
                    top = sharpness(net, half_square, (x, targets), tol=1e-2, generator=g)
                    found["step"].append(done)
                    found["sharpness"].append(top.lambda_max)
                    with torch.no_grad():
                        found["loss"].append(float(half_square(net(x), targets)))

            look(0)
            sgd = SGD(net.parameters(), lr=config.stability_lr)
            fit(
                net, sgd, [(x, targets)], epochs=config.stability_steps, loss_fn=half_square,
                after_step=look,
            )  # fmt: skip
            return found

        found = lab.stage(f"stability-{seed}", follow)
        scaled = [config.stability_lr * value for value in found["sharpness"]]
        lab.measure("edge-of-stability", float(np.mean(scaled[-4:])), seed=seed)
        for step, value, loss in zip(found["step"], scaled, found["loss"], strict=True):
            lab.log(f"stability-{seed}", int(step), sharpness_times_lr=value, loss=loss)
        axis.plot(found["step"], scaled, label=f"seed {seed}")
    axis.axhline(2, color="black", lw=1, ls="--")
    axis.set(xlabel="step of gradient descent", ylabel="lr · λ_max")
    axis.legend()
    lab.figure(
        "edge-of-stability",
        figure,
        caption="Sharpness rises until gradient descent is barely stable (dashed: 2/lr).",
    )


def half_square(output: Tensor, targets: Tensor) -> Tensor:
    """½‖output − target‖², the mean over samples."""
    return (output - targets).square().sum(1).mean() / 2


# ------------------------------------------------------------------------------------------ SVRG


def measure_svrg(lab: Lab, config: Config) -> None:
    """Distance from the optimum against passes over the data, at one step for both."""
    f = breast_cancer_logistic(config.svrg_ridge)
    smoothness = f.A.square().sum(1).mean().item() / 4 + f.ridge
    lr = config.svrg_step / smoothness
    best = f(f.minimizer()).item()
    figure, axis = lab.subplots()
    for seed in lab.seeds[:1]:
        for name, colour in (("SVRG", "C0"), ("SGD", "C1")):

            def descend(name: str = name, seed: int = seed) -> list[list[float]]:
                return gaps(f, best, name, lr, config.svrg_passes, lab.generator("svrg", seed))

            passes, gap = lab.stage(f"{name.lower()}-{seed}", descend)
            lab.measure("svrg-converges" if name == "SVRG" else "sgd-stalls", gap[-1], seed=seed)
            axis.semilogy(passes, np.maximum(gap, 1e-17), colour, label=name)
    axis.set(xlabel="passes over the data", ylabel="f − f*")
    axis.legend()
    lab.figure("svrg", figure, caption=f"Ridge logistic regression, the same step {lr:.3g}.")


def gaps(
    f: LogisticRegression,
    best: float,
    name: str,
    lr: float,
    passes: int,
    generator: torch.Generator,
) -> list[list[float]]:
    """Passes spent and f − f* there, about once a pass, the end included."""
    n = len(f.A)
    w = torch.zeros(f.dim, dtype=torch.float64, requires_grad=True)

    def gradient_of_all() -> None:
        w.grad = f.gradient(w.detach())

    svrg = SVRG([w], lr, gradient_of_all, epoch_length=n)
    optimizer: Optimizer = svrg if name == "SVRG" else SGD([w], lr)
    spent, step, curve = 0, 0, [[0.0], [f(w.detach()).item() - best]]
    while spent < passes * n:
        row = f.A[torch.randint(n, (), generator=generator)]

        def gradient_of_one(row: Tensor = row) -> None:
            u = row @ w.detach()
            w.grad = f.phi_prime(u) * row + f.ridge * w.detach()

        if name == "SVRG":
            spent += 2 + (n if step % n == 0 else 0)
        else:
            spent += 1
        optimizer.step(gradient_of_one)
        step += 1
        if spent >= (len(curve[0])) * n or spent >= passes * n:
            curve[0].append(spent / n)
            curve[1].append(f(w.detach()).item() - best)
    return curve


# ---------------------------------------------------------------------------------------- kernel


def measure_kernels(lab: Lab, config: Config) -> None:
    """Drift of the tangent kernel against width."""
    digits = lab.data("digits", "train", limit=config.ntk_size)
    x = digits.x.flatten(1) - digits.x.flatten(1).mean(0)
    x = F.normalize(x, dim=1) * math.sqrt(x.shape[1])
    y = (2.0 * (digits.y % 2) - 1)[:, None]
    figure, axis = lab.subplots()
    widths = np.array(config.ntk_widths)
    for seed in lab.seeds:
        drifts = [
            lab.stage(f"kernel-{width}-{seed}", partial(drift, lab, config, x, y, width, seed))
            for width in config.ntk_widths
        ]
        slope = np.polyfit(np.log(widths), np.log(drifts), 1)[0]
        lab.measure("ntk-drift", float(slope), seed=seed)
        axis.loglog(widths, drifts, "o-", label=f"seed {seed}: slope {slope:.2f}")
    reference = drifts[0] * (widths / widths[0]) ** -0.5
    axis.loglog(widths, reference, "k--", lw=1, label="slope −1/2")
    axis.set(xlabel="width", ylabel="‖Θ_t − Θ_0‖ / ‖Θ_0‖")
    axis.legend()
    lab.figure("kernel-drift", figure, caption="How far training moves the tangent kernel.")


def drift(lab: Lab, config: Config, x: Tensor, y: Tensor, width: int, seed: int) -> float:
    """Train a net of this width and compare its kernel with that of the start."""
    with lab.seeded("kernel", width, seed):
        net = critical_(MLP((x.shape[1], width, width, 1)), "relu", orthogonal=False)
    start = ntk(net, x)
    top = torch.linalg.eigvalsh(start[:, :, 0, 0])[-1].item()
    sgd = SGD(net.parameters(), lr=config.ntk_share * len(x) / top)
    fit(net, sgd, [(x, y)], epochs=config.ntk_steps, loss_fn=half_square)
    return ntk_drift(ntk(net, x), start)


def measure_batchnorm(lab: Lab, config: Config, train: Dataset) -> None:
    """λ_max of the Hessian at the start, with and without normalisation."""
    batch = train.x[: config.stability_size], train.y[: config.stability_size]
    sizes = (train.x[0].numel(), 64, 64, 64, 64, 64, train.num_classes)
    rows = []
    for seed in lab.seeds:
        for start in ("torch's default", "He"):
            row: dict[str, Any] = {"seed": seed, "weights": start}
            for batch_norm in (False, True):
                with lab.seeded("batchnorm", seed):
                    net = MLP(sizes, batch_norm=batch_norm)
                    INITIALISATIONS["relu"][start](net, batch[0])
                operator = HessianOperator(net, F.cross_entropy, batch)
                g = lab.generator("lanczos", seed)
                top = top_eigenvalues(operator, which="largest", generator=g)[0].item()
                row["λ_max with BatchNorm" if batch_norm else "λ_max without"] = top
            rows.append(row)
            if start != "He":
                ratio = row["λ_max without"] / row["λ_max with BatchNorm"]
                lab.measure("batchnorm-sharpness", ratio, seed=seed)
    lab.table("batchnorm", rows, caption="Sharpness at the start, MLP of 6 layers.")


# ----------------------------------------------------------------------------- deep convolutions


class VanillaCNN(nn.Module):
    """Convolutions with tanh and nothing else; activations are recomputed in the backward pass."""

    def __init__(self, channels: int, depth: int, inputs: int, classes: int) -> None:
        super().__init__()
        stem = (
            nn.Conv2d(inputs, channels, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.Tanh(),
        )
        self.stem = nn.Sequential(*stem)
        body: list[nn.Module] = []
        for _ in range(depth):
            body += [nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh()]
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        segments = max(1, math.isqrt(len(self.body)))
        x = checkpoint_sequential(self.body, segments, self.stem(x), use_reentrant=False)
        return self.head(x.mean((2, 3)))


def measure_deep_convolutions(lab: Lab, config: Config, train: Dataset, test: Dataset) -> None:
    """A deep convolutional net from delta-orthogonal weights, and from torch's default."""
    rows = []
    for seed in lab.seeds[:1]:
        row: dict[str, Any] = {"layers": config.cnn_depth}
        for name in ("delta-orthogonal", "torch's default"):
            with lab.seeded("cnn", seed):
                net = VanillaCNN(
                    config.cnn_channels, config.cnn_depth, train.x.shape[1], train.num_classes
                )
                if name == "delta-orthogonal":
                    critical_(net, "tanh")
                    for layer in net.body:
                        if isinstance(layer, nn.Conv2d):
                            delta_orthogonal_(layer.weight, 1.02)
            sgd = SGD(net.parameters(), lr=config.cnn_lr, momentum=0.9)
            batches = Batches(train.x, train.y, 64, generator=lab.generator("cnn", seed))
            lab.fit(f"cnn-{slug(name)}-{seed}", net, sgd, batches, epochs=config.cnn_epochs)
            row[name] = evaluate_classifier(net, test.x, test.y)["accuracy"]
        rows.append(row)
        if config.cnn_depth >= 10_000:
            lab.measure("cnn-10000", row["delta-orthogonal"], seed=seed)
    lab.table("deep convolutions", rows, caption="Test accuracy after training, by initialisation.")


# -------------------------------------------------------------------------------------- ImageNet


class Mixup:
    """Makes a batch in which every image is mixed with another one, and so are their labels.

    Args:
        alpha: the share of an image is drawn from Beta(α, α), one for the batch.
        classes: how many there are.
    """

    def __init__(self, alpha: float, classes: int) -> None:
        self.alpha, self.classes = alpha, classes

    def __call__(self, examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Images, and the probabilities of their classes."""
        x, y = default_collate(examples)
        targets = F.one_hot(y, self.classes).to(x)
        share, other = Beta(self.alpha, self.alpha).sample(), torch.randperm(len(x))
        return torch.lerp(x[other], x, share), torch.lerp(targets[other], targets, share)


def load_imagenet(lab: Lab, config: Config) -> tuple[ImageNet, ImageNet] | None:
    """Both splits, noted in the result; None if they are not asked for."""
    if config.imagenet_epochs == 0:
        return None
    splits = [ImageNet(split, size=config.imagenet_size) for split in ("train", "test")]
    for data in splits:
        source = DataSource(
            name="imagenet", split=data.split, samples=len(data), source=data.source,
            checksum=data.checksum,
        )  # fmt: skip
        lab.datasets.append(source)
    return splits[0], splits[1]


def measure_fixup(lab: Lab, config: Config, train: ImageNet, test: ImageNet) -> None:
    """A residual net without normalisation and one with, trained on ImageNet."""
    rows = []
    for seed in lab.seeds:
        fixup, norm = (train_resnet(lab, config, train, test, kind, seed) for kind in (True, False))
        lab.measure("imagenet-fixup", fixup - norm, seed=seed)
        rows.append({"seed": seed, "Fixup": fixup, "BatchNorm": norm})
    lab.table("imagenet", rows, caption="ResNet-50 on ImageNet: top-1 accuracy.")


def train_resnet(
    lab: Lab, config: Config, train: ImageNet, test: ImageNet, fixup: bool, seed: int
) -> float:
    """Top-1 accuracy of a net with Fixup or with BatchNorm."""
    net = make_resnet(lab, config, train.num_classes, fixup, seed)
    alpha = config.imagenet_fixup_mixup if fixup else config.imagenet_mixup
    read = partial(
        DataLoader,
        batch_size=config.imagenet_batch,
        num_workers=config.imagenet_workers,
        pin_memory=lab.device.type == "cuda",
    )
    batches = read(
        train, shuffle=True, drop_last=True, collate_fn=Mixup(alpha, train.num_classes),
        generator=lab.generator("imagenet", seed),
    )  # fmt: skip
    sgd = resnet_optimizer(net, config.imagenet_lr)
    cosine = CosineAnnealingLR(sgd, config.imagenet_epochs * len(batches))
    history = lab.fit(
        f"imagenet-{'fixup' if fixup else 'batchnorm'}-{seed}", net, sgd, batches,
        epochs=config.imagenet_epochs, step_scheduler=cosine,
        evaluate=lambda: {"accuracy": streamed_accuracy(net, read(test))},
    )  # fmt: skip
    return history[-1]["accuracy"]


def make_resnet(lab: Lab, config: Config, classes: int, fixup: bool, seed: int) -> ResNet50:
    """ResNet-50 without normalisation, initialised by Fixup, or with BatchNorm."""
    with lab.seeded("imagenet", seed):
        net = ResNet50(classes, width=config.imagenet_width, norm=not fixup)
        if fixup:
            fixup_(net, net.branches, head=net[-1])
    return net


def resnet_optimizer(net: nn.Module, lr: float) -> SGD:
    """SGD with a tenth of the learning rate for scalars, of which only Fixup has any."""
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 0], "lr": lr},
        {"params": [p for p in net.parameters() if p.ndim == 0], "lr": lr / 10},
    ]
    return SGD(groups, momentum=0.9, weight_decay=1e-4)


def streamed_accuracy(net: nn.Module, batches: DataLoader) -> float:
    """Share of right predictions, batch after batch."""
    right = total = 0.0
    for x, y in batches:
        right += evaluate_classifier(net, x, y)["accuracy"] * len(y)
        total += len(y)
    return right / total


# ------------------------------------------------------------------------ comparison of optimizers

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "SGD": (SGD, 0.3),
    "momentum": (partial(SGD, momentum=0.9), 0.03),
    "Adam": (Adam, 0.003),
    "RMSprop": (RMSprop, 0.003),
    "AMSGrad": (partial(AMSGrad, lr_decay=None), 0.003),
    "AdamNC": (AdamNC, 0.03),
}
BENCH_INITIALISATIONS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "torch's default": lambda net, x: None,
    "orthogonal": lambda net, x: critical_(net, "relu"),
    "LSUV": lambda net, x: lsuv_(net, x),
}
SCHEDULES = ("constant", "cosine")


def compare(lab: Lab, config: Config, train: Dataset, test: Dataset) -> None:
    """Initialisation × schedule × optimizer, each optimizer tuned over as many rates."""
    held_out = min(len(train) // 4, 1000)
    validation = train.x[:held_out], train.y[:held_out]
    rest = slice(held_out, held_out + config.bench_size)
    x, y = train.x[rest], train.y[rest]
    contenders = [
        Contender(name, make, {"lr": tuple(scale * usual for scale in config.bench_grid)})
        for name, (make, usual) in OPTIMIZERS.items()
    ]

    def bench(initialisation: str, schedule: str) -> dict[str, Any]:
        def build() -> nn.Module:
            net = MLP((x[0].numel(), 64, 64, train.num_classes))
            BENCH_INITIALISATIONS[initialisation](net, x[:256])
            return net

        def learn(net: nn.Module, optimizer: Optimizer, seed: int) -> Sequence[dict[str, float]]:
            batches = Batches(x, y, 64, generator=lab.generator("bench", seed))
            total = config.bench_epochs * len(batches)
            cosine = CosineAnnealingLR(optimizer, total) if schedule == "cosine" else None

            def evaluate() -> dict[str, float]:
                found = evaluate_classifier(net, *validation)
                accuracy = evaluate_classifier(net, test.x, test.y)["accuracy"]
                return {"validation loss": found["loss"], "test accuracy": accuracy}

            return fit(
                net, optimizer, batches, epochs=config.bench_epochs, step_scheduler=cosine,
                evaluate=evaluate,
            )  # fmt: skip

        seeds = range(1, config.bench_seeds + 1)
        found = compare_optimizers(build, contenders, learn, metric="validation loss", seeds=seeds)
        accuracies = found.curves("test accuracy")
        rows = []
        for row in found.table():
            finals = [curve[-1] for curve in accuracies[row["optimizer"]] if curve]
            accuracy = float(np.mean(finals)) if finals else math.nan
            rows.append(
                {"initialisation": initialisation, "schedule": schedule} | row
                | {"test accuracy": accuracy}
            )  # fmt: skip
        return {"rows": rows, "grid": found.grid(), "curves": found.curves()}

    results = {
        (initialisation, schedule): lab.stage(
            f"bench-{slug(initialisation)}-{schedule}", partial(bench, initialisation, schedule)
        )
        for initialisation in BENCH_INITIALISATIONS
        for schedule in SCHEDULES
    }
    report_comparison(lab, config, results)


def report_comparison(
    lab: Lab, config: Config, results: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """One table, one plot, and the grid that every optimizer got."""
    rows = [row for result in results.values() for row in result["rows"]]
    rows.sort(key=lambda row: row["validation loss"])
    rates = ", ".join(
        f"{name} {'/'.join(f'{scale * usual:.2g}' for scale in config.bench_grid)}"
        for name, (_, usual) in OPTIMIZERS.items()
    )
    lab.table(
        "optimizers",
        rows,
        caption=(
            "Every optimizer tuned on one seed over its own grid of as many rates, then run on "
            f"other seeds. The grid: {rates}."
        ),
    )
    figure, axes = lab.subplots(1, len(results), width=3 * len(results), sharey=True)
    for axis, ((initialisation, schedule), result) in zip(axes, results.items(), strict=True):
        for name, curves in result["curves"].items():
            lengths = {len(curve) for curve in curves}
            if lengths == {config.bench_epochs}:
                epochs = range(1, config.bench_epochs + 1)
                axis.plot(epochs, np.mean(curves, axis=0), "o-", ms=3, label=name)
        axis.set(title=f"{initialisation}, {schedule}", xlabel="epoch", yscale="log")
    axes[0].set_ylabel("validation loss")
    axes[-1].legend(fontsize=8)
    lab.figure("optimizers", figure, caption="Tuned optimizers, mean over seeds.")
