"""Characterizing the decision boundary of deep neural networks (Karimi, Derr, Tang, 2019)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.analysis import (
    BoundarySamples,
    DeepDIG,
    bisect_boundary,
    boundary_entropy,
    embedding_linearity,
    embedding_of,
    input_complexity,
    nearest_embedding_pairs,
    nearest_neighbour,
    random_pairs,
)
from assay.data import Batches, Dataset
from assay.functional import evaluate_classifier
from assay.lab import Claim, Lab, Paper, at_least, at_most
from assay.models import MLP, build

PAPER = Paper(
    slug="deepdig",
    title="Characterizing the Decision Boundary of Deep Neural Networks",
    authors=("H. Karimi", "T. Derr", "J. Tang"),
    year=2019,
    url="https://arxiv.org/abs/1912.11460",
    topic="analysis",
    summary=(
        "Realistic inputs that lie exactly on the boundary between two classes of any classifier, "
        "and figures that describe the boundary in input and in embedding space."
    ),
    components=(
        "assay.analysis.DeepDIG",
        "assay.analysis.bisect_boundary",
        "assay.analysis.random_pairs",
        "assay.analysis.nearest_embedding_pairs",
        "assay.analysis.input_complexity",
        "assay.analysis.embedding_linearity",
        "assay.functional.bisect",
    ),
)

_SETTINGS = "all networks and pairs of classes"

CLAIMS = (
    Claim(
        "on-the-boundary",
        "A successful sample is equally probable in both classes",
        paper="|p_s − p_t| < β = 1e-4",
        expect=at_most(1e-4),
        kind="exact",
        unit="|p_s − p_t|",
        how=f"largest gap of a successful sample of each method, {_SETTINGS}",
    ),
    Claim(
        "between-the-two",
        "No third class is more probable at a successful sample",
        paper="argmax ∈ {s, t}",
        expect=at_most(0),
        kind="exact",
        unit="samples",
        how="successful samples of which it is",
    ),
    Claim(
        "linear-distance",
        "On a linear model the samples are on the known hyperplane",
        paper="p_s − p_t = tanh(margin/2)",
        expect=at_most(2.001),
        kind="exact",
        unit="distance · ‖w_s − w_t‖ / β",
        how="float64, 256 pairs around a random hyperplane in 20 dimensions; at most 2 atanh(β)/β",
    ),
    Claim(
        "halving",
        "k halvings leave 2^(−k) of a segment",
        paper="2^(−k)",
        expect=at_most(1e-8),
        kind="exact",
        unit="relative error",
        how="distance of the remaining ends, float64, up to 20 halvings, three-class MLP",
    ),
    Claim(
        "batched-is-scalar",
        "Bisecting all pairs together gives what a loop over pairs gives",
        expect=at_most(1e-9),
        kind="exact",
        unit="largest difference",
        how="the published loop one pair at a time, float64; infinite if one outcome differs",
    ),
    Claim(
        "success",
        "DeepDIG finds a borderline sample for nearly every pair",
        paper="≈ 1",
        expect=at_least(0.95),
        over_seeds="every",
        unit="success rate",
        how=f"lowest rate of {_SETTINGS}",
        discussion=(
            "All settings reach 1.00 except trouser to pullover on the convolutional network. "
            "There the segments that fail run into a third class, nearly always dress (see the "
            "table), random pairs hardly ever succeed, and the entropy is far above ln 2. The "
            "weight of the classifier's term decides: with α = 3 instead of the paper's 0.8 the "
            "two lowest rates, 0.76 and 0.93, become 1.00. Three times as many steps give 0.79 "
            "and 0.92, the published form of the loss, in probabilities, 0.69 and 0.93."
        ),
    ),
    Claim(
        "never-below-baselines",
        "DeepDIG never succeeds less often than bisection of random or nearest pairs",
        expect=at_least(0.0),
        over_seeds="every",
        unit="difference of success rates",
        how=f"lowest difference to the better of RPBS and EPBS, {_SETTINGS}",
    ),
    Claim(
        "gain-over-random",
        "DeepDIG succeeds more often than bisection between random pairs",
        expect=at_least(0.05),
        unit="difference of success rates",
        how=f"DeepDIG − RPBS, mean over {_SETTINGS}",
    ),
    Claim(
        "closer-than-random",
        "DeepDIG's samples are nearer to real images than those between random pairs",
        expect=at_least(4 / 6 - 1e-9),
        over_seeds="every",
        unit="share of settings",
        how=(
            "mean Euclidean distance to the nearest test image (training images are the ends of "
            f"RPBS's segments), successful samples of DeepDIG and RPBS; share of {_SETTINGS}"
        ),
    ),
    Claim(
        "at-the-separator",
        "In embedding space DeepDIG's samples lie next to the linear separator of the two classes",
        expect=at_most(0.25),
        over_seeds="every",
        unit="ratio of mean distances",
        how=(
            "borderline / training embeddings of rightly classified samples, linear SVM fitted to "
            f"the latter; largest ratio of {_SETTINGS}"
        ),
        discussion=(
            "Only trouser to pullover exceeds the bound; for other pairs the ratio is below 0.1. "
            "The samples are on the network's own separator, where its two logits are equal, and "
            "not on the SVM's, whose normal is at 30 to 50 degrees to that one. Where there are "
            "training embeddings both planes divide them alike. But the samples between trousers "
            "and pullovers are far from them, more than three times as far as these are from each "
            "other (the column 'apart' of the table; other pairs: below two), and there the planes "
            "have parted: the samples of the largest ratio are outside the SVM's margin."
        ),
    ),
    Claim(
        "separable",
        "The two classes are linearly separable in embedding space",
        expect=at_least(0.98),
        over_seeds="every",
        unit="accuracy",
        how=(
            "of that SVM on the training embeddings of rightly classified samples, for which the "
            f"network's own last layer is a separator; lowest of {_SETTINGS}"
        ),
    ),
    Claim(
        "input-complexity",
        "Changes of the predicted class between two borderline samples (IDC, 0 is smoothest)",
        unit="changes a point",
        how=f"50 points on the segments to 50 random partners, mean over {_SETTINGS}",
    ),
    Claim(
        "simpler-is-smoother",
        "A simpler network has a smoother boundary (ratio below 1)",
        unit="ratio of IDC",
        how="fully connected / convolutional, means over the pairs of classes",
    ),
    Claim(
        "boundary-entropy",
        "Entropy of the probabilities at the boundary (ln 2 ≈ 0.693 if two classes compete)",
        unit="nats",
        how=f"mean entropy of DeepDIG's borderline samples, {_SETTINGS}",
    ),
    Claim(
        "deep-success",
        "DeepDIG finds a borderline sample for nearly every pair on a deep residual network, too",
        paper="≈ 1",
        expect=at_least(0.95),
        kind="paper",
        over_seeds="every",
        unit="success rate",
        how="ResNet-20 on CIFAR-10, lowest rate of all pairs of classes",
    ),
)


@dataclass(frozen=True)
class Config:
    """Settings; `tasks` are data set and network, `pairs` ordered pairs of class indices."""

    tasks: tuple[str, ...] = ("fashion-mnist/cnn", "fashion-mnist/fcn")
    pairs: tuple[str, ...] = ("1-2", "0-6", "5-9")
    train_size: int = 12_000  # images; 0 for all
    test_size: int = 0
    epochs: int = 6
    lr: float = 1e-3
    steps: int = 800  # of each auto-encoder
    autoencoder_lr: float = 1e-2
    classifier_batch: int = 64
    autoencoder_batch: int = 128
    alpha: float = 0.8
    beta: float = 1e-4
    complexity_samples: int = 20  # samples from which 50 segments of 50 points start


PRESETS = {
    "smoke": Config(
        tasks=("mnist5k/cnn", "mnist5k/fcn"),
        pairs=("4-9",),
        train_size=2000,
        test_size=1000,
        epochs=4,
        steps=120,
        complexity_samples=2,
    ),
    "small": Config(),
    "paper": Config(
        tasks=(
            "mnist/cnn", "mnist/fcn", "fashion-mnist/cnn", "fashion-mnist/fcn", "cifar10/resnet20",
        ),
        pairs=("1-2", "4-8", "0-6", "5-9"),
        train_size=0,
        epochs=30,
        steps=5000,
        complexity_samples=1000,
    ),
}  # fmt: skip
SEEDS = {"smoke": 1, "small": 3, "paper": 5}

METHODS = {"dig": "DeepDIG", "rpbs": "random pairs", "epbs": "nearest pairs"}
SHOWN = 8  # borderline images a setting in the figure
STRIP = 9  # images along a segment
POINTS = 61  # of the curves along a segment
SPREAD = 500  # training embeddings from which the distance to the next one is taken
# Of Okabe and Ito, to be told apart by everybody.
COLORS = ("#0072b2", "#e69f00", "#009e73")


def convolutional(channels: int, size: int, classes: int) -> nn.Sequential:
    """The paper's small CNN: two 3x3 convolutions of ten maps, pooled, and 50 hidden units."""
    side = ((size - 2) // 2 - 2) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 10, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 10, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(10 * side * side, 50), nn.ReLU(), nn.Linear(50, classes),
    )  # fmt: skip


def network(kind: str, data: Dataset) -> nn.Module:
    """A classifier for images, by its name in `Config.tasks`."""
    channels, height, width = data.x.shape[1:]
    if kind == "cnn":
        return convolutional(channels, height, data.num_classes)
    if kind == "fcn":
        return MLP((channels * height * width, 50, 50, data.num_classes))
    return build(kind, num_classes=data.num_classes)


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    _exact(lab, config)
    found: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}
    for seed in lab.seeds:
        found[seed] = {}
        for task in config.tasks:
            name, kind = task.split("/")
            train = lab.data(name, "train", limit=config.train_size or None)
            test = lab.data(name, "test", limit=config.test_size or None)
            model = _trained(lab, config, task, kind, train, seed)
            accuracy = evaluate_classifier(model, test.x, test.y)["accuracy"]
            for pair in lab.track(config.pairs, f"{task}, seed {seed}"):
                key = f"{task} {pair} {seed}"
                measured = partial(_boundary, lab, config, model, train, test, pair, key)
                found[seed][task, pair] = lab.stage(key, measured)
                found[seed][task, pair]["accuracy"] = accuracy
        _measure(lab, found[seed], seed)
    _tables(lab, found)
    first = found[lab.seeds[0]]
    _plot_success(lab, found)
    _plot_images(lab, config, first)
    _plot_segments(lab, first)
    _plot_embeddings(lab, config, first)


# ---------------------------------------------------------------------------------- exact claims


def _exact(lab: Lab, config: Config) -> None:
    with lab.seeded("exact"):
        linear = nn.Linear(20, 2).double()
        net = MLP((20, 32, 32, 3), activation="tanh").double()
        x = 2 * torch.randn(4096, 20, dtype=torch.float64)
    a, b = _ends(linear, x, 256)
    samples = bisect_boundary(linear, a, b, 0, 1, tol=config.beta)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    signed = samples.borderline @ (weight[0] - weight[1]) + (bias[0] - bias[1])
    lab.measure("linear-distance", (signed.abs() / config.beta).max())

    a, b = _ends(net, x, 256)
    samples = bisect_boundary(net, a, b, 0, 1, tol=config.beta, max_iter=20)
    closed = samples.status != samples.THIRD_CLASS
    low, high = samples.ends()
    share = (high - low).norm(dim=1) / (b - a).norm(dim=1)
    error = (share * 2.0**samples.iterations - 1).abs()[closed]
    lab.measure("halving", error.max())
    lab.measure("batched-is-scalar", _difference_from_loop(net, samples, config.beta, 20))


@torch.no_grad()
def _ends(model: nn.Module, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    predicted = model(x).argmax(1)
    classes = [x[predicted == label] for label in (0, 1)]
    count = min(count, *map(len, classes))
    return classes[0][:count], classes[1][:count]


@torch.no_grad()
def _difference_from_loop(
    model: nn.Module, samples: BoundarySamples, beta: float, max_iter: int
) -> float:
    """Largest distance from what the published loop gives, one pair after the other."""
    worst = 0.0
    for i, (x1, x2) in enumerate(zip(*samples.pairs, strict=True)):
        status, middle = samples.NOT_CONVERGED, x2
        for _ in range(max_iter):
            middle = (x1 + x2) / 2
            p = model(middle.unsqueeze(0)).softmax(1)[0]
            if int(p.argmax()) not in (0, 1):
                status = samples.THIRD_CLASS
                break
            if abs(p[0] - p[1]) < beta:
                status = samples.SUCCESS
                break
            if p[0] > p[1]:
                x1 = middle
            else:
                x2 = middle
        if status != samples.status[i]:
            return math.inf
        worst = max(worst, float((middle - samples.x[i]).abs().max()))
    return worst


# ------------------------------------------------------------------------------ the measurements


def _trained(
    lab: Lab, config: Config, task: str, kind: str, train: Dataset, seed: int
) -> nn.Module:
    with lab.seeded("init", task, seed):
        # Channels last: convolutions of few maps run twice as fast on a CPU.
        model = network(kind, train).to(lab.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    order = lab.generator("batches", task, seed)
    batches = Batches(train.x, train.y, config.classifier_batch, generator=order)
    lab.fit(f"classifier {task} seed {seed}", model, optimizer, batches, epochs=config.epochs)
    return model


def _boundary(
    lab: Lab, config: Config, model: nn.Module, train: Dataset, test: Dataset, pair: str, key: str
) -> dict[str, Any]:
    """All that is measured, and shown, of one network and one pair of classes."""
    s, t = map(int, pair.split("-"))
    x, y = train.x.to(lab.device), train.y.to(lab.device)
    dig = DeepDIG(
        model, s, t, alpha=config.alpha, beta=config.beta, steps=config.steps,
        lr=config.autoencoder_lr, batch_size=config.autoencoder_batch,
    ).fit(x, y, generator=lab.generator("autoencoders", key))  # fmt: skip
    i, j = random_pairs(
        model, x, y, s, t, count=len(dig.index), generator=lab.generator("pairs", key)
    )
    k, m = nearest_embedding_pairs(model, x, y, s, t)
    samples = {
        "dig": dig.generate(),
        "rpbs": bisect_boundary(model, x[i], x[j], s, t, tol=config.beta),
        "epbs": bisect_boundary(model, x[k], x[m], s, t, tol=config.beta),
    }
    unseen = test.x.to(lab.device)
    found: dict[str, Any] = {"classes": [train.classes[s], train.classes[t]]}
    found["survivors"] = [n / dig.survivors["samples"] for n in dig.survivors.values()]
    for method, of in samples.items():
        found[method] = {"rate": of.success_rate, **of.counts, **_on_the_boundary(of, unseen)}
    borderline = samples["dig"].borderline
    p = samples["dig"].p[samples["dig"].success]
    idc = input_complexity(
        model, borderline, samples=config.complexity_samples,
        generator=lab.generator("partners", key),
    )  # fmt: skip
    found |= {
        "third": _third_class(samples["dig"], train.classes),
        "entropy": boundary_entropy(p).mean().item(),
        "complexity": idc.mean().item(),
        "embedding": _in_embedding_space(model, train, test, borderline, p, s, t),
        "images": _pictures(dig, samples["dig"], x, unseen),
        "segments": {
            "rpbs": _segment(model, samples["rpbs"], BoundarySamples.THIRD_CLASS),
            "dig": _segment(model, samples["dig"], BoundarySamples.SUCCESS),
        },
    }
    return found


def _on_the_boundary(samples: BoundarySamples, images: Tensor) -> dict[str, float | None]:
    """What of the successful samples can be said without a look at the others."""
    if not bool(samples.success.any()):
        return {"gap": 0.0, "third": 0, "distance": None}
    s, t = samples.classes
    winner = samples.p[samples.success].argmax(1)
    distance, _ = nearest_neighbour(samples.borderline, images)
    return {
        "gap": samples.gap[samples.success].max().item(),
        "third": int(((winner != s) & (winner != t)).sum()),
        "distance": distance.mean().item(),
    }


def _third_class(samples: BoundarySamples, classes: Sequence[str]) -> str:
    """The class that most segments without success run into."""
    winner = samples.p[samples.status == samples.THIRD_CLASS].argmax(1)
    return classes[int(winner.mode().values)] if len(winner) else ""


def _in_embedding_space(
    model: nn.Module, train: Dataset, test: Dataset, borderline: Tensor, p: Tensor, s: int, t: int
) -> dict[str, Any]:
    embed = embedding_of(model)

    def of(data: Dataset) -> tuple[Tensor, Tensor, Tensor]:
        chosen = (data.y == s) | (data.y == t)
        x, y = (v[chosen].to(borderline.device) for v in (data.x, data.y))
        with torch.no_grad():
            right = model(x).argmax(1) == y
        return embed(x), y == t, right

    e, positive, right = of(train)
    e, positive = e[right], positive[right]
    near = embed(borderline)
    separation = embedding_linearity(
        e, positive, {"test": of(test)[:2], "borderline": (near, p[:, t] > p[:, s])}
    )
    centre = e.mean(0)
    axes = torch.linalg.svd(e - centre, full_matrices=False).Vh[:2].T
    sets = {"s": e[~positive], "t": e[positive], "borderline": near}
    plane = {name: ((points[:200] - centre) @ axes).cpu() for name, points in sets.items()}
    to_data, _ = nearest_neighbour(near, e)
    among_data = torch.cdist(e[:SPREAD], e).kthvalue(2, dim=1).values  # the first is itself
    return {
        "sets": {name: vars(of) for name, of in separation.items()},
        "apart": (to_data.mean() / among_data.mean()).item(),
        "plane": plane,
    }


def _pictures(dig: DeepDIG, samples: BoundarySamples, x: Tensor, unseen: Tensor) -> Tensor:
    """Rows of images: sample, x′ in class t, x″ back in class s, borderline, nearest test image."""
    rows = samples.success.nonzero().squeeze(1)[:SHOWN]
    back, across = samples.pairs
    _, nearest = nearest_neighbour(samples.x[rows], unseen)
    shown = (x[dig.index[rows]], across[rows], back[rows], samples.x[rows], unseen[nearest])
    return torch.stack(shown).cpu()


@torch.no_grad()
def _segment(model: nn.Module, samples: BoundarySamples, status: int) -> dict[str, Tensor]:
    """Probabilities and images along one segment, the first with that outcome if there is one."""
    s, t = samples.classes
    i = int((samples.status == status).byte().argmax())
    a, b = samples.pairs[:, i]
    tau = torch.linspace(0, 1, POINTS, dtype=a.dtype, device=a.device)
    path = torch.lerp(a.unsqueeze(0), b.unsqueeze(0), tau.view(-1, *[1] * a.ndim))
    p = model(path).softmax(1)
    others = p.clone()
    others[:, [s, t]] = 0
    return {
        "p": torch.stack([p[:, s], p[:, t], others.max(1).values]).cpu(),
        "strip": path[:: (POINTS - 1) // (STRIP - 1)].cpu(),
    }


def _measure(lab: Lab, found: dict[tuple[str, str], dict[str, Any]], seed: int) -> None:
    settings = list(found.values())
    for setting in settings:
        for method in METHODS:
            lab.measure("on-the-boundary", setting[method]["gap"])
            lab.measure("between-the-two", setting[method]["third"])
    rate = {m: np.array([setting[m]["rate"] for setting in settings]) for m in METHODS}
    lab.measure("success", rate["dig"].min(), seed=seed)
    better = np.maximum(rate["rpbs"], rate["epbs"])
    lab.measure("never-below-baselines", (rate["dig"] - better).min(), seed=seed)
    lab.measure("gain-over-random", (rate["dig"] - rate["rpbs"]).mean(), seed=seed)
    # Where random pairs led to nothing at all, there is no image to compare with.
    distances = [(f["dig"]["distance"], f["rpbs"]["distance"]) for f in settings]
    closer = [mine < other for mine, other in distances if other is not None]
    lab.measure("closer-than-random", float(np.mean(closer)), seed=seed)
    sets = [setting["embedding"]["sets"] for setting in settings]
    ratios = [of["borderline"]["distance"] / of["train"]["distance"] for of in sets]
    lab.measure("at-the-separator", max(ratios), seed=seed)
    lab.measure("separable", min(of["train"]["accuracy"] for of in sets), seed=seed)
    lab.measure("boundary-entropy", _mean(settings, "entropy"), seed=seed)
    lab.measure("input-complexity", _mean(settings, "complexity"), seed=seed)
    by_kind = {
        kind: [f for (task, _), f in found.items() if task.endswith(f"/{kind}")]
        for kind in ("cnn", "fcn", "resnet20")
    }
    if by_kind["cnn"] and by_kind["fcn"]:
        fcn, cnn = (_mean(by_kind[kind], "complexity") for kind in ("fcn", "cnn"))
        lab.measure("simpler-is-smoother", fcn / cnn, seed=seed)
    if by_kind["resnet20"]:
        lowest = min(setting["dig"]["rate"] for setting in by_kind["resnet20"])
        lab.measure("deep-success", lowest, seed=seed)


def _mean(settings: list[dict[str, Any]], field: str) -> float:
    return float(np.mean([setting[field] for setting in settings]))


# --------------------------------------------------------------------------- tables and pictures


def _tables(lab: Lab, found: dict[int, dict[tuple[str, str], dict[str, Any]]]) -> None:
    rates, shapes = [], []
    for seed, settings in found.items():
        for (task, pair), f in settings.items():
            key = {"network": task, "pair": pair, "seed": seed}
            _, agreed, first, second = f["survivors"]
            rates.append(
                {
                    **key,
                    "accuracy": f["accuracy"],
                    "I": first / agreed,
                    "II": second / first,
                    **{name: f[method]["rate"] for method, name in METHODS.items()},
                    "third class": f["third"],
                    **{f"distance, {n}": f[m]["distance"] for m, n in METHODS.items()},
                }
            )
            sets = f["embedding"]["sets"]
            shapes.append(
                {
                    **key,
                    "IDC": f["complexity"],
                    "entropy": f["entropy"],
                    **{f"SVM, {name}": of["accuracy"] for name, of in sets.items()},
                    **{f"d, {name}": of["distance"] for name, of in sets.items()},
                    "apart": f["embedding"]["apart"],
                    "EDC1, test": sets["test"]["squashed"],
                    "EDC2, test": sets["test"]["squashed_misclassified"],
                }
            )
    lab.table(
        "success rates",
        rates,
        "Test accuracy, share of samples that survive components I and II, success rates of the "
        "three methods, the class that most of DeepDIG's segments without success run into, and "
        "mean distance of the borderline samples to the nearest test image.",
    )
    lab.table(
        "shape of the boundary",
        shapes,
        "Input complexity (IDC), entropy in nats, and a linear SVM on the embeddings of rightly "
        "classified training samples: its accuracy and the mean distance d to it there, for all "
        "test samples of the two classes, and for borderline samples by predicted class; apart: "
        "distance of a borderline embedding to the nearest training embedding, relative to that "
        "among training embeddings; EDC1 and EDC2 are means of d/(1 + d) over all test points and "
        "over the misclassified ones.",
    )


def _plot_success(lab: Lab, found: dict[int, dict[tuple[str, str], dict[str, Any]]]) -> None:
    keys = list(found[lab.seeds[0]])
    figure, ax = lab.subplots(width=8)
    for offset, ((method, label), color) in enumerate(zip(METHODS.items(), COLORS, strict=True)):
        rates = np.array([[found[seed][key][method]["rate"] for key in keys] for seed in found])
        at = np.arange(len(keys)) + (offset - 1) * 0.27
        ax.bar(at, rates.mean(0), width=0.25, label=label, color=color, alpha=0.7)
        for row in rates:
            ax.plot(at, row, ".", color=color, markeredgecolor="black", clip_on=False)
    settings = found[lab.seeds[0]]
    names = [f"{task}\n" + " →\n".join(settings[task, pair]["classes"]) for task, pair in keys]
    ax.set_xticks(range(len(keys)), names, fontsize=8)
    ax.set(ylabel="success rate", ylim=(0, 1.18), yticks=np.linspace(0, 1, 6))
    ax.legend(ncols=3, loc="upper center")
    lab.figure("success", figure, "Mean over the seeds (bars) and each seed (points).")


def _plot_images(lab: Lab, config: Config, found: dict[tuple[str, str], dict[str, Any]]) -> None:
    rows = ("sample of s", "A₁: in t", "A₂: back in s", "borderline", "nearest in test")
    shown = {key: f for key, f in found.items() if key[0] == config.tasks[0]}
    figure, axes = lab.subplots(1, len(shown), width=9, height=2.6, squeeze=False)
    for ax, ((_, pair), f) in zip(axes[0], shown.items(), strict=True):
        _image(ax, _montage(f["images"]))
        ax.set_title(f"{pair}: {' → '.join(f['classes'])}", fontsize=9)
    height = found[config.tasks[0], config.pairs[0]]["images"].shape[-2]
    axes[0, 0].set_yticks([(i + 0.5) * height for i in range(len(rows))], rows, fontsize=8)
    lab.figure(
        "borderline-images",
        figure,
        f"What DeepDIG makes of samples, {config.tasks[0]}: the sample, A₁'s version that is taken "
        "for the other class, A₂'s version that is not, the borderline image between these two, "
        "and the test image nearest to it.",
    )


def _plot_segments(lab: Lab, found: dict[tuple[str, str], dict[str, Any]]) -> None:
    (task, pair), f = min(found.items(), key=lambda item: item[1]["rpbs"]["rate"])
    figure, axes = lab.subplots(2, 2, width=9, height=4, height_ratios=[1, 2.6], sharex=False)
    for column, (method, segment) in enumerate(f["segments"].items()):
        strip, curves = axes[:, column]
        _image(strip, _montage(segment["strip"].unsqueeze(0)))
        strip.set_title(f"{METHODS[method]}, {task}, pair {pair}", fontsize=9)
        labels = (*f["classes"], "most probable other class")
        for p, label, color, style in zip(
            segment["p"], labels, COLORS, ("-", "--", ":"), strict=True
        ):
            curves.plot(np.linspace(0, 1, POINTS), p, style, color=color, label=label)
        curves.set(xlabel="position on the segment", ylabel="probability", ylim=(-0.03, 1.03))
    handles = axes[1, 0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=3)
    lab.figure(
        "along-a-segment",
        figure,
        "Images and class probabilities between the two ends: a random pair (one that meets a "
        "third class, if any does) and a pair of DeepDIG.",
    )


def _plot_embeddings(
    lab: Lab, config: Config, found: dict[tuple[str, str], dict[str, Any]]
) -> None:
    rows, columns = len(config.tasks), len(config.pairs)
    figure, axes = lab.subplots(rows, columns, width=3 * columns, height=2.6 * rows, squeeze=False)
    for ax, ((task, pair), f) in zip(axes.flat, found.items(), strict=True):
        labels = dict(zip(("s", "t"), f["classes"], strict=True)) | {"borderline": "borderline"}
        sets = f["embedding"]["plane"].items()
        for (name, points), color, marker in zip(sets, COLORS, "o^x", strict=True):
            ax.scatter(
                *points.T, s=8, marker=marker, color=color, linewidths=0.6, label=labels[name],
                rasterized=True,
            )  # fmt: skip
        ax.set_title(f"{task} {pair}", fontsize=9)
        ax.legend(fontsize=7, markerscale=1.5, framealpha=0.6)
    for ax in axes[-1]:
        ax.set_xlabel("first principal component")
    for ax in axes[:, 0]:
        ax.set_ylabel("second principal component")
    lab.figure(
        "embeddings",
        figure,
        "Training and borderline samples in the plane of the two largest principal components of "
        "the training embeddings of both classes.",
    )


def _montage(images: Tensor) -> np.ndarray:
    """Rows of images `(R, K, C, H, W)` as one picture `(R·H, K·W[, 3])`."""
    picture = images.permute(0, 3, 1, 4, 2).flatten(3)
    rows, height, columns, rest = picture.shape
    channels = images.shape[2]
    whole = picture.reshape(rows * height, columns * rest // channels, channels)
    return (whole if channels == 3 else whole[..., 0]).clamp(0, 1).numpy()


def _image(ax: Any, picture: np.ndarray) -> None:
    height, width = picture.shape[:2]
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
