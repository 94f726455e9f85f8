"""Let's agree to agree: neural networks share classification order on real datasets (2020)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assay.analysis import (
    CorrectnessRecorder,
    accessibility,
    agreement_icc,
    agreement_table,
    bimodality,
    binomial_null,
    class_table,
    extent_at_accuracy,
    from_staged,
    log_spaced_steps,
    nested_learning,
    order_correlation,
    total_agreement,
    tp_agreement,
)
from assay.data import Dataset
from assay.functional import Ensemble, EnsembleBatches, EnsembleLoss, fit
from assay.lab import Claim, Lab, Paper, at_least, at_most, between
from assay.models import MLP, build, names

PAPER = Paper(
    slug="learning-order",
    title="Let's Agree to Agree: Neural Networks Share Classification Order on Real Datasets",
    authors=("G. Hacohen", "L. Choshen", "D. Weinshall"),
    year=2020,
    url="https://arxiv.org/abs/1905.10854",
    topic="analysis",
    summary=(
        "Which examples an architecture learns first, how far independently trained networks "
        "agree on it, and a difficulty score for every example."
    ),
    components=(
        "assay.analysis.CorrectnessRecorder",
        "assay.analysis.tp_agreement",
        "assay.analysis.total_agreement",
        "assay.analysis.accessibility",
        "assay.analysis.agreement_icc",
        "assay.analysis.bimodality",
        "assay.analysis.binomial_null",
        "assay.analysis.agreement_table",
        "assay.analysis.class_table",
        "assay.analysis.order_correlation",
        "assay.analysis.nested_learning",
        "assay.analysis.from_staged",
        "assay.functional.Ensemble",
        "assay.functional.train_many",
    ),
)

_ICC_HOW = "lowest ICC over the extents with mean accuracy in [0.5, 0.8]; one value a collection"

CLAIMS = (
    Claim(
        "independent-variance",
        "Models that err independently have Var TPa = p(1−p)/N",
        paper="N·TPa ~ Binomial(N, p)",
        expect=at_most(4.0),
        kind="exact",
        unit="standard errors",
        how="100,000 simulated examples, p from 0.1 to 0.9, N = 3, 12 and 50",
    ),
    Claim(
        "independent-icc",
        "Models that err independently have an intra-class correlation of 0",
        expect=at_most(0.02),
        kind="exact",
        unit="|ICC|",
        how="100,000 simulated examples, p from 0.1 to 0.9, N = 3, 12 and 50",
    ),
    Claim(
        "shared-icc",
        "Models that err on the same examples have an intra-class correlation of 1",
        expect=at_most(1e-12),
        kind="exact",
        unit="|ICC − 1|",
        how="copies of one random correctness",
    ),
    Claim(
        "shared-bimodality",
        "Models that err on the same examples have a bimodality coefficient of 1",
        expect=at_most(1e-9),
        kind="exact",
        unit="|B − 1|",
        how="copies of one random correctness",
    ),
    Claim(
        "icc-is-kappa",
        "The intra-class correlation is Fleiss' kappa of 'right or wrong'",
        expect=at_most(1e-12),
        kind="exact",
        unit="difference",
        how="kappa by its own formula on random correctness of unequal models",
    ),
    Claim(
        "trained-as-alone",
        "Models trained at once are those trained one after another",
        expect=at_most(1e-10),
        kind="exact",
        unit="largest difference of a weight",
        how="float64, own initialisations and orders; SGD with momentum, and Adam; with BatchNorm",
    ),
    Claim(
        "agreement-test",
        "Networks agree on which unseen examples they get right",
        paper="bimodal TP-agreement",
        expect=at_least(0.35),
        unit="ICC",
        how=_ICC_HOW + ", test images",
    ),
    Claim(
        "agreement-train",
        "Networks agree on which training examples they get right",
        paper="bimodal TP-agreement",
        expect=at_least(0.35),
        unit="ICC",
        how=_ICC_HOW + ", training images",
    ),
    Claim(
        "bimodal",
        "All models are right, or none: TP-agreement is bimodal",
        paper="bimodal",
        expect=at_least(5 / 9),
        unit="bimodality coefficient (uniform: 5/9)",
        how="lowest over the extents with mean accuracy in [0.5, 0.8], test images",
    ),
    Claim(
        "extreme-share",
        "Almost all or almost none of the models are right on most examples",
        unit="share of examples with TPa < 0.1 or > 0.9",
        how="at the end of training, test images; the table shows it beside independence",
    ),
    Claim(
        "order-seeds",
        "Two collections of one architecture learn in the same order",
        paper="≈ 0.99",
        expect=at_least(0.93),
        unit="Spearman's r",
        how="accessibility of the test images in two disjoint collections",
    ),
    Claim(
        "order-architectures",
        "Other architectures learn in the same order",
        paper="≈ 0.8–0.99",
        expect=at_least(0.90),
        unit="Spearman's r",
        how="the lowest of the other architectures against the first; the table shows each",
        discussion=(
            "Twelve models are few for it. Half of the log-spaced extents lie in the first 75 of "
            "564 steps. By their end the architectures have come to accuracies between 0.4 and "
            "0.7, and the order depends on the initialisations as well: there even two "
            "collections of one architecture agree with r ≈ 0.8 only. With all steps weighted "
            "evenly the orders are closer; the table shows both. With 48 models a collection "
            "(--set models=48) the lowest r of the first three seeds rises from 0.94, 0.88 and "
            "0.91 to 0.95, 0.94 and 0.93."
        ),
    ),
    Claim(
        "nested-end",
        "What the weakest architecture has learned at its end, the first one has learned too",
        paper="nested",
        unit="share of examples",
        how="of the test images with TPa ≥ 0.9 in the weaker, those with TPa ≥ 0.9 in the stronger",
    ),
    Claim(
        "nested-matched",
        "What the weakest architecture has learned at its end, the first one had learned when it "
        "was no more accurate",
        paper="nested",
        unit="share of examples",
        how=(
            "of the test images with TPa ≥ 0.9 in the weaker, those with TPa ≥ 0.9 in the stronger "
            "at the extent where it has the weaker's final accuracy"
        ),
    ),
    Claim(
        "synthetic-disagreement",
        "On synthetic data the agreement is weak at the same accuracy",
        paper="absent on Gabor patches",
        expect=at_most(0.5),
        unit="ratio of ICCs",
        how="Gaussian inputs, linear rule / images: means over test accuracies in [0.7, 0.8]",
    ),
    Claim(
        "random-labels",
        "With random labels networks agree less on training images at the same accuracy",
        paper="destroyed",
        expect=at_most(0.7),
        unit="ratio of ICCs",
        how="random / true labels, same images: means over training accuracies in [0.33, 0.64]",
        discussion=(
            "The two go opposite ways, as the table of ICCs at the same accuracy shows: with true "
            "labels agreement rises with accuracy, with random ones it peaks soon above chance and "
            "falls; only from an accuracy of about one half on is it lower. Two controls in that "
            "table say why. With true labels an accuracy of 0.4 is passed within some fifty steps, "
            "where each network still follows its own initialisation: if all start from the same "
            "weights, the ICC there is more than twice as high. With random labels agreement does "
            "not vanish, because the sample is finite and the same for all: much of it is left on "
            "inputs of pure noise, where no two are similar."
        ),
    ),
    Claim(
        "adaboost-order",
        "AdaBoost learns in a different order",
        paper="different order",
        expect=at_least(0.1),
        unit="difference of Spearman's r",
        how="r of two network collections − r of networks with boosted stumps (random features)",
    ),
    Claim(
        "convolutional-order",
        "Convolutional architectures on CIFAR-10 share the order",
        paper="≈ 0.8–0.99",
        expect=between(0.8, 1.0),
        kind="paper",
        unit="Spearman's r",
        how="the lowest of ResNet-20 and All-CNN-C against VGG-16, 20 models each",
    ),
)


@dataclass(frozen=True)
class Config:
    """Settings. An architecture is a name of `assay.models` or "activation-width-width-...".

    A collection is a number of models of one architecture. Numbers of images, models, epochs,
    extents and boosting rounds are counts.
    """

    data: str = "fashion-mnist"
    train: int = 3000
    test: int = 1000
    models: int = 12
    architecture: str = "relu-64-64"
    others: tuple[str, ...] = ("relu-256", "tanh-32-32-32", "linear")
    epochs: int = 12
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.0
    extents: int = 20
    first_step: int = 10
    contrast_images: int = 1000
    dimensions: int = 100
    random_epochs: int = 150
    rounds: int = 200


PRESETS = {
    "smoke": Config(
        data="mnist5k", train=600, test=300, models=4, others=("tanh-32-32-32", "linear"),
        epochs=20, extents=12, first_step=2,
        lr=0.2, contrast_images=200, random_epochs=60, rounds=20,
    ),
    "small": Config(),
    "paper": Config(
        data="cifar10", train=50_000, test=10_000, models=20, architecture="vgg16",
        others=("resnet20", "all-cnn-c"), epochs=60, momentum=0.9, extents=40,
        contrast_images=10_000, random_epochs=200, rounds=1000,
    ),
}  # fmt: skip
SEEDS = {"smoke": 1, "small": 5, "paper": 3}


def make_model(architecture: str, shape: Sequence[int], classes: int) -> nn.Module:
    """A freshly initialised model for inputs of one shape, from torch's global generator."""
    if architecture in names():
        return build(architecture, classes, in_channels=shape[0])
    activation, *widths = architecture.split("-")
    size = int(np.prod(shape))
    return MLP((size, *map(int, widths), classes), "relu" if activation == "linear" else activation)


def run(lab: Lab, config: Config) -> None:
    """Measure every claim."""
    _exact(lab)
    train = lab.data(config.data, "train", limit=config.train)
    test = lab.data(config.data, "test", limit=config.test)
    runs = [_Run(lab, config, train, test, seed) for seed in lab.track(lab.seeds, "collections")]
    for one in runs:
        one.measure_agreement()
        one.measure_order()
        one.measure_contrasts()
    _tables(lab, runs)
    _plot_agreement(lab, runs)
    _plot_contrasts(lab, runs)
    _plot_order(lab, runs[0])
    _show_images(lab, runs)


# -- what is mathematics -------------------------------------------------------------------------


def _exact(lab: Lab) -> None:
    generator = lab.generator("simulation")
    examples = 100_000
    for num_models in (3, 12, 50):
        for p in (0.1, 0.5, 0.9):
            draws = torch.rand(num_models, examples, generator=generator)
            found, expected = tp_agreement(draws < p).var().item(), p * (1 - p) / num_models
            # Var(s²) = (μ4 − σ⁴) / X with the binomial's fourth central moment.
            fourth = expected**2 * 3 + expected * (1 - 6 * p * (1 - p)) / num_models**2
            error = ((fourth - expected**2) / examples) ** 0.5
            lab.measure("independent-variance", abs(found - expected) / error)
            lab.measure("independent-icc", agreement_icc(draws < p).abs())
        shared = (torch.rand(examples, generator=generator) < 0.3).expand(num_models, -1)
        lab.measure("shared-icc", abs(float(agreement_icc(shared)) - 1))
        lab.measure("shared-bimodality", abs(float(bimodality(tp_agreement(shared))) - 1))
        difficulty = torch.rand(500, generator=generator)
        skill = torch.linspace(0.2, 1, num_models).unsqueeze(1)
        correct = torch.rand(num_models, 500, generator=generator) < difficulty * skill
        difference = float(agreement_icc(correct)) - _fleiss_kappa(correct)
        lab.measure("icc-is-kappa", abs(difference))
    for batch_norm in (False, True):
        for make in (
            lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=1e-3),
            lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=1e-3),
        ):
            lab.measure("trained-as-alone", _difference_from_alone(lab, batch_norm, make))


def _fleiss_kappa(correct: Tensor) -> float:
    """Fleiss' kappa with the models as raters and the two categories "right" and "wrong"."""
    raters = len(correct)
    right = correct.double().sum(dim=0)
    counts = torch.stack([right, raters - right], dim=1)
    observed = (counts * (counts - 1)).sum(dim=1).mean() / (raters * (raters - 1))
    expected = (counts.mean(dim=0) / raters).square().sum()
    return float((observed - expected) / (1 - expected))


def _difference_from_alone(
    lab: Lab, batch_norm: bool, make_optimizer: Callable[..., Optimizer]
) -> float:
    with lab.seeded("alone", batch_norm):
        models = [MLP((20, 16, 12, 5), batch_norm=batch_norm).double() for _ in range(4)]
        x, y = torch.randn(90, 20).double(), torch.randint(5, (90,))
    batches = EnsembleBatches(x, y, 16, len(models), generator=lab.generator("alone order"))
    orders = [batches.member(i) for i in range(len(models))]
    ensemble = Ensemble(models)
    together = make_optimizer(ensemble.parameters())
    fit(ensemble, together, batches, epochs=4, loss_fn=EnsembleLoss())
    worst = 0.0
    for i, (model, order) in enumerate(zip(models, orders, strict=True)):
        fit(model, make_optimizer(model.parameters()), order, epochs=4)
        member = ensemble.member(i).state_dict()
        for name, value in model.state_dict().items():
            worst = max(worst, float((member[name] - value).abs().max()))
    return worst


# -- collections of models -----------------------------------------------------------------------


class _Run:
    """All collections of one seed, and what they show."""

    def __init__(self, lab: Lab, config: Config, train: Dataset, test: Dataset, seed: int) -> None:
        self.lab, self.config, self.seed = lab, config, seed
        self.train, self.test = train, test
        self.extents: dict[str, tuple[float, ...]] = {}
        self.correct: dict[str, Tensor] = {}  # (E, N, X) by collection and split
        self._train_on_images()
        self._train_contrasts()
        rounds = log_spaced_steps(config.rounds, config.extents)
        self.correct["adaboost test"] = lab.stage(f"adaboost {seed}", lambda: self._boost(rounds))
        self.extents["adaboost test"] = tuple(map(float, rounds))

    def _train_on_images(self) -> None:
        config = self.config
        sets = {"test": self.test, "train": self.train}
        self.predictions = self._collection("a", config.architecture, self.train, sets)
        self._collection("b", config.architecture, self.train, {"test": self.test})
        for other in config.others:
            self._collection(other, other, self.train, {"test": self.test})

    def _train_contrasts(self) -> None:
        config = self.config
        few = self.train.subset(config.contrast_images, seed=self.seed)
        labels = torch.randint(
            few.num_classes, (len(few),), generator=self.lab.generator("labels", self.seed)
        )
        random = Dataset(few.x, labels, few.classes)
        self._collection("true", config.architecture, few, {"train": few})
        self._collection(
            "random", config.architecture, random, {"train": random}, config.random_epochs
        )
        self._collection("one start", config.architecture, few, {"train": few}, one_start=True)
        g = self.lab.generator("noise", self.seed)
        pixels = few.x.mean() + few.x.std() * torch.randn(few.x.shape, generator=g)
        noise = Dataset(pixels, labels, few.classes)
        self._collection(
            "noise", config.architecture, noise, {"train": noise}, config.random_epochs
        )
        g = self.lab.generator("gaussian", self.seed)
        rule = torch.randn(config.dimensions, generator=g)
        points = torch.randn(2 * config.contrast_images, config.dimensions, generator=g)
        sides = (points @ rule > 0).long()
        half = config.contrast_images
        gaussian = Dataset(points[:half], sides[:half], ("below", "above"))
        unseen = Dataset(points[half:], sides[half:], ("below", "above"))
        # A convolution has nothing to say on vectors.
        architecture = "relu-64-64" if config.architecture in names() else config.architecture
        self._collection("gaussian", architecture, gaussian, {"test": unseen})

    def _collection(
        self,
        name: str,
        architecture: str,
        data: Dataset,
        observed: dict[str, Dataset],
        epochs: int | None = None,
        *,
        one_start: bool = False,
    ) -> Tensor:
        """Train a collection; its predictions on the first observed set at the end, `(N, X)`.

        `one_start` gives all its models the same initial weights, and still orders of their own.
        """
        lab, config, key = self.lab, self.config, (name, self.seed)
        epochs = epochs or config.epochs
        with lab.seeded("init", *key):
            models = [
                make_model(architecture, data.x.shape[1:], data.num_classes)
                for _ in range(1 if one_start else config.models)
            ]
        ensemble = Ensemble(models * (config.models // len(models))).to(lab.device)
        order = lab.generator("order", *key)
        batches = EnsembleBatches(data.x, data.y, config.batch_size, config.models, generator=order)
        optimizer = torch.optim.SGD(ensemble.parameters(), lr=config.lr, momentum=config.momentum)
        steps = epochs * len(batches)
        extents = log_spaced_steps(steps, config.extents, first=min(config.first_step, steps))
        recorders = {
            split: CorrectnessRecorder(len(seen), config.models) for split, seen in observed.items()
        }

        def predict(seen: Dataset) -> Tensor:
            return ensemble.predict(seen.x).argmax(dim=-1).cpu()

        callbacks = [
            recorders[split].callback(lambda seen=seen: predict(seen), seen.y, extents)
            for split, seen in observed.items()
        ]

        def observe(step: int) -> None:
            for callback in callbacks:
                callback(step)

        lab.fit(
            f"{name} {self.seed}", ensemble, optimizer, batches, epochs=epochs,
            loss_fn=EnsembleLoss(), after_step=observe, keep=recorders,
        )  # fmt: skip
        for split, recorder in recorders.items():
            self.correct[f"{name} {split}"] = recorder.correct
            self.extents[f"{name} {split}"] = recorder.extents
        return predict(next(iter(observed.values())))

    def _boost(self, rounds: Sequence[int]) -> Tensor:
        from sklearn.ensemble import AdaBoostClassifier
        from sklearn.tree import DecisionTreeClassifier

        x, y = self.train.x.flatten(1).numpy(), self.train.y.numpy()
        estimators = []
        for number in range(self.config.models):
            # Stumps on all features are deterministic; a random choice makes models differ.
            stump = DecisionTreeClassifier(max_depth=1, max_features="sqrt")
            boosted = AdaBoostClassifier(
                stump,
                n_estimators=self.config.rounds,
                random_state=self.lab.seed("adaboost", self.seed, number),
            )
            estimators.append(boosted.fit(x, y))
        inputs, labels = self.test.x.flatten(1).numpy(), self.test.y.numpy()
        return from_staged(estimators, inputs, labels, stages=rounds)

    # -- measurements ----------------------------------------------------------------------------

    def measure_agreement(self) -> None:
        lab, seed = self.lab, self.seed
        for split in ("test", "train"):
            middle = _between(self.correct[f"a {split}"], 0.5, 0.8)
            lab.measure(f"agreement-{split}", agreement_icc(middle).min(), seed=seed)
        middle = _between(self.correct["a test"], 0.5, 0.8)
        lab.measure("bimodal", bimodality(tp_agreement(middle)).min(), seed=seed)
        last = agreement_table(self.correct["a test"][-1:])[0]
        lab.measure("extreme-share", last["extreme share"], seed=seed)
        for split in ("test", "train"):
            rows = agreement_table(self.correct[f"a {split}"], self.extents[f"a {split}"])
            for row in rows:
                lab.log(f"agreement {split} {seed}", int(row["extent"]),
                        **{k: v for k, v in row.items() if k != "extent" and v == v})  # fmt: skip

    def order(self, one: str, other: str) -> float:
        """Correlation of the accessibility of the test images in two collections."""
        a, b = (accessibility(self.correct[f"{name} test"]) for name in (one, other))
        return order_correlation(a, b, ci=None).estimate

    def order_early_and_even(self, one: str, other: str) -> tuple[float, float]:
        """The same over the first half of the extents, and with all steps weighted evenly."""
        early, even = [], []
        for name in (f"{one} test", f"{other} test"):
            correct, steps = self.correct[name], np.array(self.extents[name])
            early.append(accessibility(correct, range(len(steps) // 2)))
            weights = torch.from_numpy(np.diff(steps, prepend=0) / steps[-1])
            even.append(weights @ tp_agreement(correct))
        first, all_steps = (order_correlation(a, b, ci=None) for a, b in (early, even))
        return first.estimate, all_steps.estimate

    def measure_order(self) -> None:
        lab, config, seed = self.lab, self.config, self.seed
        same = self.order("a", "b")
        lab.measure("order-seeds", same, seed=seed)
        worst = min(self.order("a", other) for other in config.others)
        lab.measure("order-architectures", worst, seed=seed)
        if lab.preset == "paper":
            lab.measure("convolutional-order", worst, seed=seed)
        lab.measure("adaboost-order", same - self.order("a", "adaboost"), seed=seed)
        strong = self.correct["a test"]
        finals = [self.correct[f"{other} test"][-1] for other in config.others]
        weak = min(finals, key=lambda correct: float(correct.double().mean()))
        lab.measure("nested-end", nested_learning(weak, strong[-1]).share, seed=seed)
        matched = extent_at_accuracy(strong, float(weak.double().mean()))
        lab.measure("nested-matched", nested_learning(weak, strong[matched]).share, seed=seed)

    def measure_contrasts(self) -> None:
        for claim, one, other, low, high in (
            ("synthetic-disagreement", "gaussian test", "a test", 0.7, 0.8),
            ("random-labels", "random train", "true train", 0.33, 0.64),
        ):
            ratio = _icc_ratio(self.correct[one], self.correct[other], low, high)
            self.lab.measure(claim, ratio, seed=self.seed)


def _icc_at(correct: Tensor, accuracies: np.ndarray) -> np.ndarray:
    """ICC in the course of training as a function of accuracy; NaN outside what was passed."""
    accuracy = correct.double().mean(dim=(1, 2)).numpy()
    order = accuracy.argsort()
    icc = agreement_icc(correct).numpy()
    return np.interp(accuracies, accuracy[order], icc[order], left=np.nan, right=np.nan)


def _icc_ratio(one: Tensor, other: Tensor, low: float, high: float) -> float:
    """Ratio of mean ICCs at the same accuracies, those in a range that both trainings pass."""
    grid = np.linspace(low, high, 50)
    first, second = _icc_at(one, grid), _icc_at(other, grid)
    both = ~np.isnan(first) & ~np.isnan(second)
    if not both.any():  # then at the nearest extents
        middle = (low + high) / 2
        nearest = [correct[extent_at_accuracy(correct, middle)] for correct in (one, other)]
        return float(agreement_icc(nearest[0]) / agreement_icc(nearest[1]))
    return float(first[both].mean() / second[both].mean())


def _between(correct: Tensor, low: float, high: float) -> Tensor:
    """The extents with a mean accuracy in a range; the nearest one if there is none."""
    accuracy = correct.double().mean(dim=(1, 2))
    chosen = (accuracy >= low) & (accuracy <= high)
    if not chosen.any():
        chosen[extent_at_accuracy(correct, (low + high) / 2)] = True
    return correct[chosen]


# -- tables and figures --------------------------------------------------------------------------


SERIES = {
    "a test": "images, test",
    "a train": "images, training",
    "gaussian test": "Gaussian inputs, test",
    "true train": "fewer images, true labels, training",
    "one start train": "fewer images, true labels, one initialisation, training",
    "random train": "fewer images, random labels, training",
    "noise train": "noise instead of images, random labels, training",
}
# Of Okabe and Ito, to be told apart by everybody.
COLORS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#000000", "#cc79a7")


def _tables(lab: Lab, runs: list[_Run]) -> None:
    first = runs[0]
    rows = agreement_table(first.correct["a test"], first.extents["a test"])
    lab.table(
        "agreement on test images", [_rounded(row) for row in rows],
        "First collection. Variance ratio: of TP-agreement to that of independent models, at most "
        f"N = {first.config.models}.",
    )  # fmt: skip
    lab.table(
        "classes",
        [_rounded(row) for row in class_table(
            first.correct["a test"], first.test.y, first.test.classes)],
        "Test images of the first collection, the most accessible class first.",
    )  # fmt: skip
    accuracies = np.arange(0.2, 0.9, 0.1)
    rows = []
    for name, label in SERIES.items():
        curves = np.array([_icc_at(run.correct[name], accuracies) for run in runs])
        row: dict[str, float | str | None] = {"collection": label}
        for accuracy, values in zip(accuracies, curves.T, strict=True):
            passed = values[~np.isnan(values)]
            row[f"at {accuracy:.1f}"] = round(float(passed.mean()), 3) if len(passed) else None
        rows.append(row)
    lab.table("ICC at the same accuracy", rows, "Mean over the seeds that pass the accuracy.")
    rows = []
    for other in ("b", *first.config.others, "adaboost"):
        finals = [run.correct[f"{other} test"][-1].double().mean().item() for run in runs]
        orders = [run.order("a", other) for run in runs]
        early, even = zip(*(run.order_early_and_even("a", other) for run in runs), strict=True)
        mine, theirs = (accessibility(first.correct[f"{name} test"]) for name in ("a", other))
        one = order_correlation(mine, theirs)
        rows.append(
            {
                "collection": first.config.architecture if other == "b" else other,
                "test accuracy": float(np.mean(finals)),
                "mean r": float(np.mean(orders)),
                "lowest r": min(orders),
                "mean r, first half": float(np.mean(early)),
                "mean r, steps evenly": float(np.mean(even)),
                "first r, low": one.low,
                "first r, high": one.high,
            }
        )
    lab.table(
        "order against the first architecture", [_rounded(row) for row in rows],
        "Spearman's r of accessibility over the seeds: over all extents, over the first half of "
        "them, with all steps weighted evenly; for the first seed the 95 % bootstrap interval over "
        "test images.",
    )  # fmt: skip
    ceiling = np.mean([_agreement_of_halves(run.correct["adaboost test"]) for run in runs])
    agreement = np.mean([float(total_agreement(run.predictions).mean()) for run in runs])
    lab.note(
        f"At the end {agreement:.1%} of the models predict the most frequent class of a test "
        "image, right or wrong (total agreement, mean over images). Two halves of the AdaBoost "
        f"collection agree with r = {ceiling:.3f}: its order is not noise, it is another one."
    )


def _agreement_of_halves(correct: Tensor) -> float:
    """Spearman's r of accessibility between two halves of a collection."""
    one, other = (half.double().mean(dim=(0, 1)) for half in correct.tensor_split(2, dim=1))
    return order_correlation(one, other, ci=None).estimate


def _rounded(row: dict) -> dict:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def _plot_agreement(lab: Lab, runs: list[_Run]) -> None:
    # Of two classes one half is right by chance. The last extent is the end.
    sets = {
        runs[0].test.name or "images": ("a test", (0.3, 0.55, 0.7, 1.0)),
        "Gaussian inputs": ("gaussian test", (0.55, 0.65, 0.75, 1.0)),
    }
    figure, axes = lab.subplots(len(sets), 4, width=10, height=4.6, sharex=True, sharey=True)
    num_models = runs[0].config.models
    shares = np.arange(num_models + 1) / num_models
    for row, (label, (name, accuracies)) in zip(axes, sets.items(), strict=True):
        for ax, accuracy in zip(row, accuracies, strict=True):
            position = extent_at_accuracy(runs[0].correct[name], accuracy)
            found, means = np.zeros(num_models + 1), []
            for run in runs:
                right = run.correct[name][position].sum(dim=0)
                counts = torch.bincount(right, minlength=num_models + 1)
                found += counts.numpy() / counts.sum().item() / len(runs)
                means.append(run.correct[name][position].double().mean().item())
            null = binomial_null(float(np.mean(means)), num_models).numpy()
            ax.bar(shares, found, width=0.8 / num_models, color=COLORS[0], label="networks")
            ax.plot(shares, null, "o-", color=COLORS[3], markersize=3, label="independent")
            step = int(runs[0].extents[name][position])
            ax.set_title(f"step {step}, accuracy {np.mean(means):.2f}", fontsize=9)
        row[0].set_ylabel(f"{label}\nshare of test examples")
    for ax in axes[-1]:
        ax.set_xlabel("TP-agreement")
    axes[0, 0].legend(fontsize=8)
    lab.figure(
        "tp-agreement",
        figure,
        "TP-agreement on test examples at four steps of training, mean over the seeds, beside the "
        "binomial distribution of independent models with the same accuracy.",
    )


def _plot_contrasts(lab: Lab, runs: list[_Run]) -> None:
    figure, ax = lab.subplots(width=6.4, height=5.4)
    for (name, label), color, marker in zip(SERIES.items(), COLORS, "o^sDvxP", strict=True):
        for run in runs:
            accuracy = run.correct[name].double().mean(dim=(1, 2)).numpy()
            icc = agreement_icc(run.correct[name]).numpy()
            label_once = label if run is runs[0] else None
            ax.plot(
                accuracy, icc, marker=marker, color=color,
                linewidth=0.6, markersize=3, label=label_once,
            )  # fmt: skip
    ax.set(xlabel="mean accuracy", ylabel="ICC of correctness", ylim=(None, 1.0), xlim=(0, 1))
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    lab.figure(
        "icc-by-accuracy",
        figure,
        "Agreement in the course of training, free of the number of models and of accuracy: 0 is "
        "independence, 1 is the same examples right in all models. One line a seed.",
    )


def _plot_order(lab: Lab, run: _Run) -> None:
    others = ("b", *run.config.others, "adaboost")
    figure, axes = lab.subplots(
        1, len(others), width=2.6 * len(others), height=3.3, sharex=True, sharey=True
    )
    mine = accessibility(run.correct["a test"]).numpy()
    for ax, other in zip(axes, others, strict=True):
        theirs = accessibility(run.correct[f"{other} test"]).numpy()
        ax.scatter(mine, theirs, s=6, alpha=0.3, linewidths=0, rasterized=True)
        name = f"{run.config.architecture}, other seeds" if other == "b" else other
        ax.set_title(f"{name}\nr = {run.order('a', other):.3f}", fontsize=9)
        ax.set(xlabel=f"in {run.config.architecture}", aspect="equal", xlim=(-0.03, 1.03))
    axes[0].set_ylabel("accessibility in the other collection")
    lab.figure(
        "order-architectures",
        figure,
        "Accessibility of each test image in two collections of the first seed, "
        f"{run.config.architecture} and the one above each panel; Spearman's r.",
    )


def _show_images(lab: Lab, runs: list[_Run], columns: int = 10) -> None:
    test = runs[0].test
    scores = torch.stack([accessibility(run.correct["a test"]) for run in runs]).mean(dim=0)
    predictions = torch.cat([run.predictions for run in runs])
    order = scores.argsort(stable=True)
    kinds = {"easiest": order.flip(0)[:columns], "hardest": order[:columns]}
    figure, axes = lab.subplots(2, columns, width=10, height=3)
    for row, (kind, chosen) in zip(axes, kinds.items(), strict=True):
        for ax, index in zip(row, chosen.tolist(), strict=True):
            ax.imshow(test.x[index].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r")
            usual = int(predictions[:, index].mode().values)
            text = test.classes[int(test.y[index])]
            if usual != test.y[index]:
                text += f"\nseen as\n{test.classes[usual]}"
            ax.set_title(text, fontsize=7)
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
        row[0].set_ylabel(kind)
    lab.figure(
        "easiest-and-hardest",
        figure,
        "Test images of highest and lowest accessibility over all seeds, with their label and what "
        "most models take them for.",
    )
