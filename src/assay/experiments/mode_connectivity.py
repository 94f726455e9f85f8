"""Loss surfaces, mode connectivity, and fast ensembling of DNNs (Garipov et al., 2018)."""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.data import Batches, Dataset, random_crop_flip
from assay.functional import parameters_to_vector, update_bn
from assay.lab import Claim, Lab, Paper, at_least, at_most, close_to
from assay.landscape import (
    FGE,
    BezierCurve,
    CurveEvaluation,
    Evaluation,
    PolyChain,
    evaluate_curve,
)
from assay.models import MLP, build
from assay.optim import FGECyclicLR, HoldDecayLR

PAPER = Paper(
    slug="mode-connectivity",
    title="Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs",
    authors=("T. Garipov", "P. Izmailov", "D. Podoprikhin", "D. Vetrov", "A. G. Wilson"),
    year=2018,
    url="https://arxiv.org/abs/1802.10026",
    topic="landscape",
    summary=(
        "A low-loss curve between two trained copies of any model, BatchNorm included, and an "
        "ensemble for the price of one training run."
    ),
    components=(
        "assay.landscape.BezierCurve",
        "assay.landscape.PolyChain",
        "assay.landscape.fit_curve",
        "assay.landscape.evaluate_curve",
        "assay.landscape.linear_barrier",
        "assay.landscape.FGE",
        "assay.optim.FGECyclicLR",
        "assay.optim.HoldDecayLR",
        "assay.functional.update_bn",
    ),
)

CLAIMS = (
    Claim(
        "ends-bitwise",
        "The curves start and end exactly at the two networks",
        paper="φ(0) = ŵ₁, φ(1) = ŵ₂",
        expect=at_most(0),
        kind="exact",
        unit="differing numbers",
        how="Bezier curve and chain of 3 to 6 bends between random networks, compared bit by bit",
    ),
    Claim(
        "partition-of-unity",
        "The coefficients of the control points sum to 1",
        paper="1",
        expect=at_most(1e-12),
        kind="exact",
        how="max |Σ c_j(t) − 1| over 1,001 values of t, 3 to 6 bends, both curves",
    ),
    Claim(
        "chain-knots",
        "A chain of n bends passes through w_j at t = j/(n−1)",
        paper="w_j",
        expect=at_most(1e-12),
        kind="exact",
        how="max |φ(j/(n−1)) − w_j|, float64, 3 to 6 bends, standard normal w_j",
    ),
    Claim(
        "bn-moments",
        "update_bn gives the mean and variance of all the training data",
        paper="one pass over the data",
        expect=at_most(1e-5),
        kind="exact",
        how=(
            "first BatchNorm of a convolutional net in float32 against a float64 pass: largest "
            "relative error of variance and of mean / standard deviation; equal and unequal batches"
        ),
    ),
    Claim(
        "fge-schedule",
        "The learning rate of FGE has period c and is lowest in the middle of each cycle",
        paper="α(c/2) = α₂, α(i + c) = α(i)",
        expect=at_most(1e-15),
        kind="exact",
        how="largest deviation over 3 cycles of c = 2, 4, 10, 94 steps, snapshots included",
    ),
    Claim(
        "barrier-ratio",
        "A Bezier curve avoids the barrier on the straight line between two networks",
        paper="CIFAR-100, PreResNet-164: 0.49 on the curve, as at its ends",
        expect=at_most(0.3),
        how="largest training loss on the Bezier curve / on the line, 61 points",
    ),
    Claim(
        "barrier-ratio-chain",
        "So does a chain with one bend",
        expect=at_most(0.3),
        how="the same for a chain of two segments",
    ),
    Claim(
        "curve-loss-excess",
        "The training loss on the Bezier curve stays at the level of its ends",
        paper="0.49 against 0.49",
        expect=at_most(0.08),
        unit="nats",
        how="largest training loss on the curve − that of the worse end",
    ),
    Claim(
        "curve-error-excess",
        "So does the test error on the Bezier curve",
        paper="CIFAR-100: 23.4 % against 21.7 %; CIFAR-10: 4.97 % against 4.76 %",
        expect=at_most(0.015),
        unit="error rate",
        how="largest test error on the curve − that of the worse end",
    ),
    Claim(
        "chain-error-excess",
        "And the test error on the chain",
        paper="CIFAR-100: 23.6 % against 21.7 %",
        expect=at_most(0.015),
        unit="error rate",
        how="largest test error on the chain − that of the worse end",
    ),
    Claim(
        "bn-recomputation",
        "Networks on the curve need their BatchNorm statistics recomputed",
        paper="recomputed at every point",
        expect=at_least(0.05),
        unit="error rate",
        how=(
            "test error of the middle of a trained Bezier curve with the running statistics that "
            "the training of the curve left − with recomputed ones"
        ),
    ),
    Claim(
        "fge-nll",
        "At equal budget, FGE predicts better than one network: negative log-likelihood",
        expect=at_most(0),
        unit="nats",
        over_seeds="every",
        how="test NLL of FGE − of one network trained for as many epochs from the same checkpoint",
    ),
    Claim(
        "fge-accuracy",
        "At equal budget, FGE predicts better than one network: accuracy",
        paper="CIFAR-100: VGG-16 72.5 → 74.6 %, PreResNet-164 78.4 → 80.3 %",
        expect=at_least(0),
        unit="accuracy",
        how="test accuracy of FGE − of one network",
        discussion=(
            "In this small setting the snapshots, taken after one epoch of annealing, are a few "
            "tenths of a point less accurate than a network that has gone through the whole usual "
            "schedule, and averaging three of them wins about as much back: the difference is "
            "within 0.1 points either way. The gain at equal budget is in the probabilities "
            "(negative log-likelihood), in every seed. The paper's gains in accuracy are those of "
            "deep convolutional networks on CIFAR, with longer cycles and more members: the "
            "`paper` preset."
        ),
    ),
    Claim(
        "fge-diversity",
        "The ensemble is better than its members",
        expect=at_least(0.001),
        unit="accuracy",
        how="test accuracy of FGE − mean test accuracy of its members",
    ),
    Claim(
        "cifar100-curve-error",
        "CIFAR-100, PreResNet-164: test error along the Bezier curve",
        paper="≤ 23.4 %",
        expect=at_most(0.244),
        kind="paper",
        unit="error rate",
        how="largest test error on the curve, one point above the paper's figure allowed",
    ),
    Claim(
        "cifar100-fge",
        "CIFAR-100, PreResNet-164: FGE at the budget of one network",
        paper="80.3 % (one network: 78.4 %)",
        expect=close_to(0.803, tol=0.01),
        kind="paper",
        unit="accuracy",
        how="test accuracy of FGE",
    ),
)


@dataclass(frozen=True)
class Config:
    """Every knob.

    Args:
        data: name of the data set.
        train_size: training images, a stratified subset; 0 is all of them.
        test_size: test images, likewise.
        augment: random crops and flips in training.
        batch_size: images a step.
        weight_decay: of the networks; on the curve a penalty on φ(t).
        model: `"mlp"`, `"conv-bn"` or a name of `assay.models.build`: curves and FGE.
        hidden: widths of the MLP.
        epochs: of a network at an end.
        lr: its learning rate, constant for half of the epochs.
        curve_epochs: of a curve.
        curve_lr: its learning rate.
        bn_model: the model with BatchNorm; if it is `model`, its curve is used.
        bn_epochs: epochs of its ends and of its curve.
        num_points: points on a curve where it is evaluated.
        fge_pretrain: epochs before the first cycle.
        fge_cycles: number of cycles.
        fge_cycle_epochs: epochs a cycle.
        fge_max_lr: α₁.
        fge_min_lr: α₂.
    """

    data: str = "fashion-mnist"
    train_size: int = 6000
    test_size: int = 0
    augment: bool = False
    batch_size: int = 100
    weight_decay: float = 5e-4
    model: str = "mlp"
    hidden: tuple[int, ...] = (128, 128)
    epochs: int = 15
    lr: float = 0.05
    curve_epochs: int = 20
    curve_lr: float = 0.05
    bn_model: str = "conv-bn"
    bn_epochs: int = 8
    num_points: int = 61
    fge_pretrain: int = 10
    fge_cycles: int = 3
    fge_cycle_epochs: int = 2
    fge_max_lr: float = 0.05
    fge_min_lr: float = 0.0005


PRESETS = {
    "smoke": Config(
        data="mnist5k",
        train_size=400,
        test_size=200,
        hidden=(32,),
        epochs=4,
        curve_epochs=4,
        bn_epochs=2,
        num_points=7,
        fge_pretrain=2,
        fge_cycles=2,
    ),
    "small": Config(),
    "paper": Config(
        data="cifar100",
        train_size=0,
        augment=True,
        batch_size=128,
        weight_decay=3e-4,
        model="preresnet164",
        epochs=150,
        lr=0.1,
        curve_epochs=200,
        curve_lr=0.03,
        bn_model="preresnet164",
        fge_pretrain=122,
        fge_cycles=7,
        fge_cycle_epochs=4,
    ),
}
SEEDS = {"smoke": 1, "small": 6, "paper": 3}

PATHS = ("straight line", "Bezier curve", "chain")


@dataclass(frozen=True)
class Task:
    """Standardised data, and how networks for it are made and trained."""

    lab: Lab
    config: Config
    train: Dataset
    test: Dataset

    def network(self, name: str) -> nn.Module:
        """A new network, initialised from torch's global generator."""
        channels, height, width = self.train.x.shape[1:]
        if name == "mlp":
            features = channels * height * width
            return MLP((features, *self.config.hidden, self.train.num_classes))
        if name == "conv-bn":
            return convolutions_with_batchnorm(channels, self.train.num_classes)
        return build(name, num_classes=self.train.num_classes, in_channels=channels)

    def batches(self, *key: object) -> Batches:
        """Training batches whose order depends on `key`."""
        return Batches(
            self.train.x,
            self.train.y,
            self.config.batch_size,
            generator=self.lab.generator("batches", *key),
            transform=random_crop_flip() if self.config.augment else None,
        )

    def sets(self) -> dict[str, Batches]:
        """Both sets in order, for evaluation."""
        return {
            "train": Batches(self.train.x, self.train.y, 1000, shuffle=False),
            "test": Batches(self.test.x, self.test.y, 1000, shuffle=False),
        }

    def fit_end(self, name: str, model: str, epochs: int) -> nn.Module:
        """A trained network; `name` determines its initialisation and batches."""
        with self.lab.seeded("init", name):
            network = self.network(model)
        sgd = self.sgd(network, self.config.lr)
        scheduler = HoldDecayLR(sgd, total_steps=epochs)
        self.lab.fit(name, network, sgd, self.batches(name), epochs=epochs, scheduler=scheduler)
        return network

    def fit_curve(self, name: str, curve: BezierCurve | PolyChain, epochs: int) -> None:
        """Train a curve as `assay.landscape.fit_curve` does, resumable."""
        sgd = torch.optim.SGD(curve.parameters(), lr=self.config.curve_lr, momentum=0.9)
        decay = self.config.weight_decay
        self.lab.fit(
            name,
            curve,
            sgd,
            self.batches(name),
            epochs=epochs,
            scheduler=HoldDecayLR(sgd, total_steps=epochs),
            penalty=lambda: 0.5 * decay * curve.l2(),
        )

    def sgd(self, network: nn.Module, lr: float) -> torch.optim.SGD:
        """The optimizer of a network."""
        decay = self.config.weight_decay
        return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=decay)


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    train = lab.data(config.data, "train", limit=config.train_size or None)
    test = lab.data(config.data, "test", limit=config.test_size or None)
    task = Task(lab, config, *standardised(train, test))
    check_exact_claims(task)
    paths, errors, ensembles = {}, {}, {}
    for seed in lab.seeds:
        curve, paths[seed] = measure_curves(task, seed)
        if config.bn_model != config.model:
            curve = batchnorm_curve(task, seed)
        errors[seed] = measure_batchnorm(task, seed, curve)
        ensembles[seed] = measure_ensemble(task, seed)
    report_paths(lab, paths)
    report_batchnorm(lab, errors)
    report_ensembles(lab, ensembles)


def standardised(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Both sets with the training set's mean and standard deviation a channel at 0 and 1."""
    mean = train.x.mean(dim=(0, 2, 3), keepdim=True)
    std = train.x.std(dim=(0, 2, 3), keepdim=True)
    return replace(train, x=(train.x - mean) / std), replace(test, x=(test.x - mean) / std)


def convolutions_with_batchnorm(channels: int, classes: int) -> nn.Sequential:
    """Three strided convolutions, each with BatchNorm: small enough for a CPU."""
    layers: list[nn.Module] = []
    for maps in (8, 16, 32):
        layers += [
            nn.Conv2d(channels, maps, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(maps),
            nn.ReLU(),
        ]
        channels = maps
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


# ---------------------------------------------------------------------------------- exact claims


def check_exact_claims(task: Task) -> None:
    """Ends, coefficients, knots, moments of BatchNorm and the schedule of FGE."""
    lab = task.lab
    with lab.seeded("exact"):
        ends = [task.network("conv-bn") for _ in range(2)]
        curves = [kind(ends, bends) for bends in (3, 4, 5, 6) for kind in (BezierCurve, PolyChain)]
        for curve in curves:
            for bend in curve.inner:
                nn.init.normal_(bend)
        lab.measure("ends-bitwise", sum(differing_ends(curve, ends) for curve in curves))

        t = torch.linspace(0, 1, 1001, dtype=torch.float64)
        sums = torch.stack([curve.coefficients(t).sum(-1) for curve in curves])
        lab.measure("partition-of-unity", (sums - 1).abs().max())

        chains = [curve.double() for curve in curves if isinstance(curve, PolyChain)]
        lab.measure("chain-knots", max(knot_error(chain) for chain in chains))

        network = convolutions_with_batchnorm(task.train.x.shape[1], task.train.num_classes)
        images = task.train.x[:6000]
        lab.measure("bn-moments", [moments_error(network, images, size) for size in (100, 37)])
    lab.measure("fge-schedule", max(schedule_error(c) for c in (2, 4, 10, 94)))


def differing_ends(curve: BezierCurve | PolyChain, ends: list[nn.Module]) -> int:
    """How many float32 numbers of φ(0) and φ(1) differ from the networks' in any bit."""
    return sum(
        int((curve.point(t).view(torch.int32) != parameters_to_vector(end).view(torch.int32)).sum())
        for t, end in enumerate(ends)
    )


def knot_error(chain: PolyChain) -> float:
    """Largest distance of an entry of φ(j/(n−1)) from that of w_j."""
    knots = [chain.point(j / (chain.num_bends - 1)) for j in range(1, chain.num_bends - 1)]
    return (torch.stack(knots) - torch.stack(list(chain.inner))).abs().max().item()


def moments_error(network: nn.Sequential, x: Tensor, batch_size: int) -> float:
    """How far the first BatchNorm is from the moments of all the data, computed in float64."""
    convolution, norm = network[0], network[1]
    update_bn(network, x.split(batch_size))
    with torch.no_grad():
        maps = copy.deepcopy(convolution).double()(x.double()).transpose(0, 1).flatten(1)
    mean, variance = maps.mean(1), maps.var(1)
    mean_error = (norm.running_mean - mean).abs() / variance.sqrt()
    variance_error = (norm.running_var - variance).abs() / variance
    return max(mean_error.max().item(), variance_error.max().item())


def schedule_error(cycle: int) -> float:
    """Largest deviation of the learning rates and snapshots of three cycles from the definition."""
    high, low = 0.05, 0.0005
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = FGECyclicLR(sgd, high, low, cycle)
    lrs, snapshots = [], []
    for iteration in range(1, 3 * cycle + 1):
        lrs.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
        if scheduler.is_snapshot_step:
            snapshots.append(iteration)
    period = max(abs(a - b) for a, b in zip(lrs, lrs[cycle:], strict=False))
    middle = max(abs(lrs[i - 1] - low) for i in snapshots)
    lowest = low - min(lrs)
    late = 0 if snapshots == [cycle // 2 + k * cycle for k in range(3)] else 1
    return float(max(period, middle, lowest, late))


# ------------------------------------------------------------------------- curves between networks


def measure_curves(task: Task, seed: int) -> tuple[BezierCurve, dict[str, CurveEvaluation]]:
    """Train two networks and two curves between them; loss and error along three paths."""
    config = task.config
    ends = [task.fit_end(f"end-{seed}-{k}", config.model, config.epochs) for k in "ab"]
    # A chain that has not been trained yet is the straight line.
    line, bezier, chain = PolyChain(ends), BezierCurve(ends), PolyChain(ends)
    task.fit_curve(f"bezier-{seed}", bezier, config.curve_epochs)
    task.fit_curve(f"chain-{seed}", chain, config.curve_epochs)
    along = {
        name: evaluate(task, f"{name}-{seed}", curve)
        for name, curve in zip(PATHS, (line, bezier, chain), strict=True)
    }
    judge_curves(task, seed, *along.values())
    return bezier, along


def judge_curves(
    task: Task, seed: int, line: CurveEvaluation, bezier: CurveEvaluation, chain: CurveEvaluation
) -> None:
    """Measure the claims about one pair of networks."""
    lab, config = task.lab, task.config
    loss, error = bezier.sets["train"].loss, bezier.sets["test"].error
    worst = line.sets["train"].loss.max()
    lab.measure("barrier-ratio", loss.max() / worst, seed=seed)
    lab.measure("barrier-ratio-chain", chain.sets["train"].loss.max() / worst, seed=seed)
    lab.measure("curve-loss-excess", loss.max() - torch.max(loss[0], loss[-1]), seed=seed)
    lab.measure("curve-error-excess", excess(error), seed=seed)
    lab.measure("chain-error-excess", excess(chain.sets["test"].error), seed=seed)
    if (config.data, config.model) == ("cifar100", "preresnet164"):
        lab.measure("cifar100-curve-error", error.max(), seed=seed)


def evaluate(task: Task, name: str, curve: BezierCurve | PolyChain) -> CurveEvaluation:
    """`evaluate_curve`, kept on disk."""

    def measure() -> dict[str, Tensor]:
        along = evaluate_curve(curve, task.sets(), num_points=task.config.num_points)
        stored = {"t": along.t, "norms": along.squared_norm, "distances": along.distances}
        for which, evaluation in along.sets.items():
            stored |= {f"{which} loss": evaluation.loss, f"{which} error": evaluation.error}
        return stored

    stored = task.lab.stage(name, measure)
    sets = {
        which: Evaluation(stored[f"{which} loss"], 1 - stored[f"{which} error"])
        for which in ("train", "test")
    }
    return CurveEvaluation(stored["t"], stored["norms"], stored["distances"], sets)


def excess(values: Tensor) -> Tensor:
    """Largest value on the curve minus that of the worse end."""
    return values.max() - torch.max(values[0], values[-1])


def report_paths(lab: Lab, paths: dict[int, dict[str, CurveEvaluation]]) -> None:
    """The paper's table of minima, maxima and integrals, and the picture of the curves."""
    rows = []
    for name in PATHS:
        row: dict[str, str | float] = {"path": name}
        for label, which, kind in (
            ("train loss", "train", "loss"),
            ("train error", "train", "error"),
            ("test error", "test", "error"),
        ):
            summaries = [
                along[name].summary(getattr(along[name].sets[which], kind))
                for along in paths.values()
            ]
            for key in ("min", "integral", "max"):
                row[f"{label}, {key}"] = sum(s[key] for s in summaries) / len(summaries)
        row["length"] = sum(along[name].length for along in paths.values()) / len(paths)
        rows.append(row)
    lab.table(
        "along the paths",
        rows,
        caption=f"Means over {len(paths)} pairs of networks; the integral is over the arc length.",
    )
    figure, axes = lab.subplots(1, 2, width=8.5)
    for axis, (which, kind) in zip(axes, (("train", "loss"), ("test", "error")), strict=True):
        for color, name in enumerate(PATHS):
            for number, along in enumerate(paths.values()):
                values = getattr(along[name].sets[which], kind)
                label = name if number == 0 else None
                axis.plot(along[name].t, values, color=f"C{color}", lw=1, alpha=0.8, label=label)
        axis.set_xlabel("t")
        axis.set_ylabel(f"{which} {kind}")
    axes[0].legend()
    lab.figure("paths", figure, caption="Along the paths between two networks, every pair.")


# ------------------------------------------------------------------------------------- BatchNorm


def batchnorm_curve(task: Task, seed: int) -> BezierCurve:
    """A trained Bezier curve between two networks with BatchNorm."""
    epochs = task.config.bn_epochs
    ends = [task.fit_end(f"bn-end-{seed}-{k}", task.config.bn_model, epochs) for k in "ab"]
    curve = BezierCurve(ends)
    task.fit_curve(f"bn-bezier-{seed}", curve, epochs)
    return curve


def measure_batchnorm(task: Task, seed: int, curve: BezierCurve) -> dict[str, Tensor]:
    """Test error along a curve with its running statistics as they are, and recomputed."""
    sets, points = task.sets(), min(task.config.num_points, 11)

    def measure() -> dict[str, Tensor]:
        test = {"test": sets["test"]}
        stale = evaluate_curve(curve, test, num_points=points, update_bn=False)
        fresh = evaluate_curve(curve, test, num_points=points, bn_batches=sets["train"])
        return {
            "t": fresh.t,
            "stale": stale.sets["test"].error,
            "recomputed": fresh.sets["test"].error,
        }

    errors = task.lab.stage(f"batchnorm-{seed}", measure)
    middle = len(errors["t"]) // 2
    saved = errors["stale"][middle] - errors["recomputed"][middle]
    task.lab.measure("bn-recomputation", saved, seed=seed)
    return errors


def report_batchnorm(lab: Lab, errors: dict[int, dict[str, Tensor]]) -> None:
    """The test error along the curve with both kinds of running statistics."""
    figure, axis = lab.subplots()
    for number, curve in enumerate(errors.values()):
        for color, kind in enumerate(("stale", "recomputed")):
            label = f"{kind} statistics" if number == 0 else None
            axis.plot(curve["t"], curve[kind], color=f"C{color}", lw=1, label=label)
    axis.set_xlabel("t")
    axis.set_ylabel("test error")
    axis.legend()
    lab.figure(
        "batchnorm",
        figure,
        caption="Bezier curves between networks with BatchNorm, running statistics as the training "
        "of the curve left them, and recomputed at each point.",
    )


# --------------------------------------------------------------------------------------- ensemble


def measure_ensemble(task: Task, seed: int) -> dict[str, float]:
    """One network and a fast geometric ensemble from the same checkpoint, for the same epochs."""
    lab, config = task.lab, task.config
    rest = config.fge_cycles * config.fge_cycle_epochs
    with lab.seeded("init", f"fge-{seed}"):
        single = task.network(config.model)
    sgd = task.sgd(single, config.lr)
    usual = HoldDecayLR(sgd, total_steps=config.fge_pretrain + rest)
    lab.fit(
        f"pretrain-{seed}",
        single,
        sgd,
        task.batches("pretrain", seed),
        epochs=config.fge_pretrain,
        scheduler=usual,
    )
    network = copy.deepcopy(single)
    single_batches = task.batches("single", seed)
    lab.fit(f"single-{seed}", single, sgd, single_batches, epochs=rest, scheduler=usual)

    batches = task.batches("fge", seed)
    sgd = task.sgd(network, config.fge_max_lr)
    cycle = config.fge_cycle_epochs * len(batches)
    cyclic = FGECyclicLR(sgd, config.fge_max_lr, config.fge_min_lr, cycle)
    ensemble = FGE(network)

    def collect(_: int) -> None:
        if cyclic.is_snapshot_step:
            ensemble.collect()

    lab.fit(
        f"fge-{seed}",
        network,
        sgd,
        batches,
        epochs=rest,
        step_scheduler=cyclic,
        after_step=collect,
        keep={"ensemble": ensemble},
    )
    scores = lab.stage(f"ensemble-{seed}", lambda: score(task, single, ensemble))
    judge_ensemble(task, seed, scores)
    return scores


def score(task: Task, single: nn.Module, ensemble: FGE) -> dict[str, float]:
    """Accuracy and negative log-likelihood on the test set."""
    alone, members, y = [], [], task.test.y
    with torch.no_grad():
        for x, _ in task.sets()["test"]:
            alone.append(single(x.to(task.lab.device)).softmax(1).cpu())
            members.append(ensemble.member_probabilities(x.to(task.lab.device)).cpu())
    each = torch.cat(members, dim=1)
    single_accuracy, single_nll = quality(torch.cat(alone), y)
    accuracy, nll = quality(each.mean(0), y)
    qualities = [quality(member, y) for member in each]
    return {
        "members": float(len(ensemble)),
        "single accuracy": single_accuracy,
        "single NLL": single_nll,
        "FGE accuracy": accuracy,
        "FGE NLL": nll,
        "member accuracy": sum(a for a, _ in qualities) / len(qualities),
        "member NLL": sum(n for _, n in qualities) / len(qualities),
    }


def quality(probabilities: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood."""
    right = probabilities.argmax(1) == y
    nll = F.nll_loss(probabilities.double().clamp(min=1e-45).log(), y)
    return right.double().mean().item(), nll.item()


def judge_ensemble(task: Task, seed: int, scores: dict[str, float]) -> None:
    """Measure the claims about one ensemble."""
    lab, config = task.lab, task.config
    lab.measure("fge-nll", scores["FGE NLL"] - scores["single NLL"], seed=seed)
    lab.measure("fge-accuracy", scores["FGE accuracy"] - scores["single accuracy"], seed=seed)
    lab.measure("fge-diversity", scores["FGE accuracy"] - scores["member accuracy"], seed=seed)
    if (config.data, config.model) == ("cifar100", "preresnet164"):
        lab.measure("cifar100-fge", scores["FGE accuracy"], seed=seed)


def report_ensembles(lab: Lab, ensembles: dict[int, dict[str, float]]) -> None:
    """One row a seed."""
    rows = [{"seed": seed, **scores} for seed, scores in ensembles.items()]
    lab.table(
        "fast geometric ensembling",
        rows,
        caption="On the test set; one network and the ensemble have had the same number of epochs "
        "from the same checkpoint, a member is a snapshot.",
    )
