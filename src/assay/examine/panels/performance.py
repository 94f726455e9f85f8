"""Performance: how often the network is right, how sure it is, and where it is neither."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.analysis.calibration import calibration_error, confidence_bins, fit_temperature
from assay.examine.budget import Budget
from assay.examine.images import as_images, show_image
from assay.examine.panel import Finding, Metric, Panel, Picture, panel
from assay.examine.sample import Sample
from assay.lab.figures import subplots
from assay.lab.intervals import share_interval
from assay.lab.numerals import number, percent
from assay.lab.result import Cell

BINS = 15
RESAMPLES = 500
CELLS = 4_000_000  # counts of resampled data held at once
CLASSES = 40  # in the table, and drawn with their names
WORST = 20  # samples in a table
FEWEST = 20  # samples of a slice
NOISE = 0.1  # of the inputs' standard deviation
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"

Rows = list[dict[str, Cell]]
Interval = tuple[float, float]


@panel("performance", title="Performance", order=10, share=0.5)
def performance(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """Accuracy, confidence and calibration, or errors of a regression."""
    if data.task == "regression":
        return _regression(data, budget)
    train, test = (_Answers.of(data, name) for name in ("train", "test"))
    return _classification(model, data, budget, train, test)


# -- classification: of samples, or of the tokens of sequences ---------------------------------


@dataclass
class _Answers:
    """What was answered to every sample, or to every token that counts.

    Args:
        logits: `(N, C)`, in double precision.
        y: `(N,)`.
        unit: which independent sample each answer belongs to, `(N,)`.
        units: how many of these.
        probabilities: whether the network gave probabilities instead of logits.
    """

    logits: Tensor
    y: Tensor
    unit: Tensor
    units: int
    probabilities: bool

    def __post_init__(self) -> None:
        p = self.logits.softmax(1)
        two = p.topk(2, dim=1)
        self.confidence, self.predicted = two.values[:, 0], two.indices[:, 0]
        self.second = two.indices[:, 1]
        self.margin = two.values[:, 0] - two.values[:, 1]
        self.correct = (self.predicted == self.y).double()
        self.nll = F.cross_entropy(self.logits, self.y, reduction="none")

    @classmethod
    def of(cls, data: Sample, name: str) -> "_Answers":
        outputs, y = data.outputs(name).cpu().double(), data.split(name).y.cpu()
        unit = torch.arange(len(y))
        if data.task == "sequence":
            unit = unit.unsqueeze(1).expand_as(y).flatten()
            outputs, y = outputs.movedim(1, -1).flatten(0, 1), y.flatten()
        counted = y != getattr(data.loss_fn, "ignore_index", -100)
        outputs, y, unit = outputs[counted], y[counted], unit[counted]
        sums = outputs.sum(1)
        probabilities = bool((outputs >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())
        if probabilities:
            outputs = outputs.clamp_min(1e-30).log()
        return cls(outputs, y, unit, len(data.split(name)), probabilities)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the answers of each unit, `(units,)`."""
        return torch.zeros(self.units, dtype=torch.float64).index_add_(
            0, self.unit, values.double()
        )

    def resampled(
        self, statistic: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Tensor:
        """A statistic of counts `(R, units)`, of samples drawn anew with replacement."""
        return _resampled(statistic, self.units, generator)

    def mean_interval(self, values: Tensor, generator: torch.Generator) -> Interval:
        """Bootstrap interval of a mean over answers; whole sequences are drawn."""
        sums, sizes = self.sums(values), self.sums(torch.ones_like(values))
        return _quantiles(self.resampled(lambda w: (w @ sums) / (w @ sizes), generator))


def _resampled(statistic: Callable[[Tensor], Tensor], n: int, generator: torch.Generator) -> Tensor:
    found = []
    rows = max(1, min(RESAMPLES, CELLS // max(1, n)))
    for start in range(0, RESAMPLES, rows):
        places = torch.randint(0, n, (min(rows, RESAMPLES - start), n), generator=generator)
        counts = torch.zeros(places.shape, dtype=torch.float64)
        counts.scatter_add_(1, places, torch.ones_like(counts))
        found.append(statistic(counts))
    found = torch.cat(found)
    return found[found.isfinite()]


def _quantiles(draws: Tensor) -> Interval:
    if not len(draws):
        return -math.inf, math.inf
    low, high = np.quantile(draws.numpy(), (0.025, 0.975))
    return float(low), float(high)


def _classification(
    model: nn.Module, data: Sample, budget: Budget, train: _Answers, test: _Answers
) -> Panel:
    calibration = _Calibration.measured(data, train, test)
    accuracy = _Accuracy.measured(data, train, test)
    classes = _class_rows(data, test)
    slices = _slices(model, data, budget, test) if data.task == "classification" else []
    tables: dict[str, Rows] = {"Classes": classes, "Most confused": _confused(data, test)}
    if slices:
        tables["Slices with least agreement"] = [s.row for s in slices[:12]]
    if data.task == "classification":
        tables["Least certain test samples"] = _sample_rows(data, test, test.margin.argsort())
        tables["Most confident mistakes"] = _sample_rows(data, test, _mistakes(test))
    else:
        tables["Positions"] = _position_rows(data, test)
    return Panel(
        metrics=[*accuracy.metrics(data), *calibration.metrics()],
        reading=(
            "Accuracy says how often the network is right, calibration whether it knows it: of "
            "answers given with 90 % confidence nine in ten should be right. Mean margins (the "
            "best class's probability less the second's) show where it wavers; classes and slices "
            "at the top of their tables are where more data or another look at the labels would "
            "help first."
        ),
        method=(
            f"All {len(test.y):,} test and {len(train.y):,} train "
            f"{'tokens' if data.task == 'sequence' else 'samples'} that were drawn. The expected "
            f"calibration error has {BINS} bins; its interval is from {RESAMPLES} bootstrap "
            "samples, moved by their own bias (an estimate from bins is too large, and more so in "
            "a resample). A slice is a class or a quarter of the samples by brightness (mean) or "
            "contrast (standard deviation) of the input."
        ),
        reference={
            "Guo et al., On calibration of modern neural networks (2017)":
                "https://arxiv.org/abs/1706.04599",
            "Nixon et al., Measuring calibration in deep learning (2019)":
                "https://arxiv.org/abs/1904.01685",
        },
        figures=[
            calibration.figure(test),
            *_confusion_figure(data, test),
            *_mistake_pictures(data, test),
        ],
        tables={name: rows for name, rows in tables.items() if rows},
        findings=[
            *accuracy.findings(data, train, test),
            *calibration.findings(test),
            *_class_findings(data, test),
            *_slice_findings(slices, accuracy),
        ],
    )  # fmt: skip


@dataclass
class _Accuracy:
    test: tuple[float, Interval]
    train: tuple[float, Interval]
    gap: tuple[float, Interval] | None
    nll: tuple[float, Interval]
    train_nll: tuple[float, Interval]
    chance: float
    shared: int

    @classmethod
    def measured(cls, data: Sample, train: _Answers, test: _Answers) -> "_Accuracy":
        generator = data.generator("performance")
        shares = {}
        for name, answers in (("train", train), ("test", test)):
            if data.task == "sequence":
                interval = answers.mean_interval(answers.correct, generator)
                shares[name] = (answers.accuracy, interval)
            else:
                shares[name] = share_interval(int(answers.correct.sum()), len(answers.y))
        gap = None if _same(data) else _difference(shares["train"], shares["test"])
        nll = [(float(a.nll.mean()), a.mean_interval(a.nll, generator)) for a in (test, train)]
        chance = float(test.y.bincount().max() / len(test.y))
        return cls(
            shares["test"], shares["train"], gap, nll[0], nll[1], chance, _shared_samples(data)
        )

    def metrics(self, data: Sample) -> list[Metric]:
        what = "tokens" if data.task == "sequence" else "samples"
        how = ("bootstrap over sequences, 95 %" if data.task == "sequence"
               else "Wilson interval, 95 %")  # fmt: skip
        boot = f"mean over {what}; bootstrap interval, 95 %"
        found = [
            Metric("accuracy", "Test accuracy", self.test[0], f"share of test {what}; {how}",
                   f"Share of right answers; always naming the commonest class gives "
                   f"{number(self.chance, 3)}.", self.test[1], better="high"),
            Metric("train_accuracy", "Train accuracy", self.train[0],
                   f"share of train {what}; {how}", "Far above the test accuracy: overfitting.",
                   self.train[1], better="high"),
        ]  # fmt: skip
        if self.gap is not None:
            found.append(
                Metric("gap", "Generalisation gap", self.gap[0],
                       "train less test accuracy; interval combined from both",
                       "What is lost on new data.", self.gap[1], better="low")
            )  # fmt: skip
        found += [
            Metric("nll", "Test cross-entropy", self.nll[0], boot,
                   "Mean of −log of the probability given to the right class.", self.nll[1],
                   unit="nats", better="low"),
            Metric("train_nll", "Train cross-entropy", self.train_nll[0], boot,
                   "The same on train data.", self.train_nll[1], unit="nats", better="low"),
        ]  # fmt: skip
        if data.task == "sequence":
            low, high = (_exp(v) for v in self.nll[1])
            found.append(
                Metric("perplexity", "Test perplexity", _exp(self.nll[0]), f"exp of the {boot}",
                       "Among so many equally likely tokens the network chooses, as it were.",
                       (low, high), better="low")
            )  # fmt: skip
        return found

    def findings(self, data: Sample, train: _Answers, test: _Answers) -> list[Finding]:
        found = []
        if test.probabilities:
            found.append(
                Finding(
                    "The network returns probabilities, not logits.",
                    "Cross-entropy applies softmax once more, so training on these outputs is slow "
                    "and never confident; drop the last softmax. Probabilities are used here as "
                    "they are.",
                    0.65,
                )
            )
        if self.test[1][0] <= self.chance:
            found.append(
                Finding(
                    f"A test accuracy of {percent(self.test[0])} is no better than naming the "
                    f"commonest class ({percent(self.chance)}).",
                    "The network has not learnt the task, or labels and outputs do not belong "
                    "together.",
                    0.9,
                )
            )
        if self.gap is not None and self.gap[1][0] > 0.03:
            found.append(
                Finding(
                    f"Accuracy falls by {100 * self.gap[0]:.3g} points from train "
                    f"({percent(self.train[0])}) to test data ({percent(self.test[0])}).",
                    "The network has fitted what does not carry over: more data, augmentation, "
                    "regularisation or an earlier stop.",
                    min(0.75, 0.25 + 2 * self.gap[0]),
                )
            )
        if self.shared:
            share = self.shared / len(data.test)
            found.append(
                Finding(
                    f"{self.shared} of {len(data.test):,} test samples are in the train samples "
                    "as well.",
                    "Exactly equal inputs: test figures are too good by what was memorised. Only "
                    "samples that were drawn are compared, so there may be more.",
                    min(0.8, 0.3 + 5 * share),
                )
            )
        answered = len(test.predicted.unique())
        known = len(test.y.unique())
        if answered < known and data.task == "classification":
            found.append(
                Finding(
                    f"Only {answered} of the {known} classes in the test data are ever predicted.",
                    "Classes that are never named are usually too rare in training, or the network "
                    "has collapsed.",
                    0.7 if answered <= known / 2 else 0.45,
                )
            )
        return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _same(data: Sample) -> bool:
    """Whether the test samples are the train samples, for want of others."""
    return data.train.x.shape == data.test.x.shape and torch.equal(data.train.x, data.test.x)


def _shared_samples(data: Sample) -> int:
    """Test samples whose input occurs in train; not where few values make that an accident."""
    x = data.test.x
    if _same(data) or not x.is_floating_point() or x[0].numel() < 8:
        return 0
    known = {row.tobytes() for row in data.train.x.cpu().float().flatten(1).numpy()}
    return sum(row.tobytes() in known for row in x.cpu().float().flatten(1).numpy())


def _difference(a: tuple[float, Interval], b: tuple[float, Interval]) -> tuple[float, Interval]:
    """a − b with Newcombe's interval from those of the two."""
    (p, (p_low, p_high)), (q, (q_low, q_high)) = a, b
    low = p - q - math.hypot(p - p_low, q_high - q)
    high = p - q + math.hypot(p_high - p, q - q_low)
    return p - q, (low, high)


# -- calibration -------------------------------------------------------------------------------


@dataclass
class _Calibration:
    ece: tuple[float, Interval]
    adaptive: tuple[float, Interval]
    if_calibrated: tuple[float, Interval]
    temperature: float
    held_out: tuple[float, Interval]
    sure: tuple[float, Interval]
    accuracy: float

    @property
    def confidence(self) -> float:
        return self.sure[0]

    # torchmetrics has the error with bins of equal width; its interval needs the sums by bin, and
    # bins of equal numbers it does not have.
    @classmethod
    def measured(cls, data: Sample, train: _Answers, test: _Answers) -> "_Calibration":
        generator = data.generator("calibration")
        found = []
        for adaptive in (False, True):
            bins = confidence_bins(test.confidence, BINS, adaptive=adaptive)
            value = float(calibration_error(test.confidence, test.correct, bins))
            # The share of a unit in each bin, so that whole sequences are drawn.
            parts = torch.zeros(test.units, BINS, dtype=torch.float64)
            parts.index_put_((test.unit, bins), test.correct - test.confidence, accumulate=True)
            sizes = test.sums(torch.ones_like(test.confidence))
            draws = test.resampled(
                lambda w, parts=parts, sizes=sizes: (w @ parts).abs().sum(1) / (w @ sizes),
                generator,
            )
            low, high = _quantiles(draws - (draws.mean() - value))
            found.append((value, (max(0.0, low), max(value, high))))
        bins = confidence_bins(test.confidence, BINS)
        right = torch.rand(100, len(test.y), generator=generator, dtype=torch.float64)
        ideal = torch.cat(
            [calibration_error(test.confidence, (row < test.confidence).double(), bins)
             for row in right]
        )  # fmt: skip
        return cls(
            found[0],
            found[1],
            (float(ideal.mean()), _quantiles(ideal)),
            fit_temperature(train.logits, train.y),
            _test_temperature(test, generator),
            (
                float(test.confidence.mean()),
                test.mean_interval(test.confidence, generator),
            ),
            test.accuracy,
        )

    def metrics(self) -> list[Metric]:
        boot = f"{BINS} bins; bootstrap interval, 95 %, moved by its bias"
        return [
            Metric("ece", "Expected calibration error", self.ece[0], f"equal width, {boot}",
                   "How far confidence and accuracy are apart on average; a calibrated network "
                   f"would show {number(self.if_calibrated[0], 2)} on so many samples.",
                   self.ece[1], better="low"),
            Metric("adaptive_ece", "Adaptive calibration error", self.adaptive[0],
                   f"equally many samples, {boot}",
                   "The same with bins that no outlier empties.", self.adaptive[1], better="low"),
            Metric("confidence", "Mean confidence", self.confidence,
                   "mean over the test samples; bootstrap interval, 95 %",
                   f"Above the accuracy ({number(self.accuracy, 3)}) the network is overconfident "
                   "on average.", self.sure[1]),
            Metric("temperature", "Best temperature on test data", self.held_out[0],
                   "minimises the test cross-entropy of logits / T; sandwich interval, 95 %",
                   "Above 1: answers are too confident. It is fitted to the data that it is "
                   "quoted for; to use it, fit it on validation data.", self.held_out[1]),
            Metric("train_temperature", "Best temperature on train data", self.temperature,
                   "minimises the train cross-entropy; bounded to [0.02, 50]; exact for these "
                   "samples",
                   "Not for use: of data that the network has fitted, it asks for more confidence "
                   "than new data justify."),
        ]  # fmt: skip

    def findings(self, test: _Answers) -> list[Finding]:
        if self.ece[0] <= self.if_calibrated[1][1] or self.ece[0] < 0.02:
            return []
        over = self.confidence > self.accuracy
        return [
            Finding(
                f"The network is {'over' if over else 'under'}confident: it is sure by "
                f"{percent(self.confidence)} and right in {percent(self.accuracy)} "
                f"(calibration error {percent(self.ece[0], 2)}).",
                f"Its probabilities cannot be taken at their word; dividing the logits by a "
                f"temperature near {self.held_out[0]:.2g}, fitted on validation data, helps.",
                min(0.7, 0.2 + 3 * self.ece[0]),
            )
        ]  # fmt: skip

    def figure(self, test: _Answers) -> Picture:
        figure, (top, bottom) = subplots(
            2, 1, width=5.2, height=5.2, sharex=True, gridspec_kw={"height_ratios": (3, 1)}
        )
        bins = confidence_bins(test.confidence, BINS)
        top.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="calibrated")
        marks = []
        for b in bins.unique().tolist():
            chosen = bins == b
            share, interval = share_interval(int(test.correct[chosen].sum()), int(chosen.sum()))
            marks.append((float(test.confidence[chosen].mean()), share, *interval))
        x, share, low, high = np.array(marks).T
        top.errorbar(x, share, np.maximum(0, [share - low, high - share]), fmt="o", color=BLUE,
                     capsize=2, label="network")  # fmt: skip
        top.set_ylabel("accuracy")
        top.set_ylim(-0.02, 1.02)
        top.legend()
        bottom.hist(test.confidence.numpy(), bins=BINS, range=(0, 1), color=BLUE)
        bottom.set_yscale("symlog", linthresh=1)
        bottom.set_xlabel("confidence")
        bottom.set_ylabel("samples")
        return Picture(
            "reliability", figure,
            "Accuracy against confidence on test data, with Wilson intervals; below the dashed "
            "line the network is overconfident. At the bottom, how many answers are that sure.",
        )  # fmt: skip


def _test_temperature(test: _Answers, generator: torch.Generator) -> tuple[float, Interval]:
    """The best temperature and its interval, from the curvature of the cross-entropy in log T."""
    temperature = fit_temperature(test.logits, test.y)
    scaled = test.logits / temperature
    p = scaled.softmax(1)
    mean = (p * scaled).sum(1)
    score = test.sums(mean - scaled.gather(1, test.y.unsqueeze(1)).squeeze(1))
    curvature = float(((p * scaled**2).sum(1) - mean**2).sum())
    if curvature <= 0:
        return temperature, (0.0, math.inf)
    half = min(20.0, 1.96 * float((score**2).sum().sqrt()) / curvature)
    return temperature, (temperature * math.exp(-half), temperature * math.exp(half))


# -- classes, slices, samples ------------------------------------------------------------------


def _label(data: Sample, i: int) -> str:
    return data.classes[i] if i < len(data.classes) else str(i)


def _class_rows(data: Sample, test: _Answers) -> Rows:
    rows: list[tuple[float, dict[str, Cell]]] = []
    for c in test.y.unique().tolist():
        true, said = test.y == c, test.predicted == c
        hits = int((true & said).sum())
        recall, (low, high) = share_interval(hits, int(true.sum()))
        precision = hits / int(said.sum()) if said.any() else None
        rows.append(
            (recall, {
                "class": _label(data, c), "samples": int(true.sum()), "recall": recall,
                "from": low, "to": high, "precision": precision,
                "confidence": float(test.confidence[true].mean()),
                "margin": float(test.margin[true].mean()),
            })
        )  # fmt: skip
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])][:CLASSES]


def _confused(data: Sample, test: _Answers) -> Rows:
    wrong = test.correct == 0
    pairs, counts = (test.y[wrong] * test.logits.shape[1] + test.predicted[wrong]).unique(
        return_counts=True
    )
    rows: Rows = []
    for place in counts.argsort(descending=True, stable=True)[:10].tolist():
        true, said = divmod(int(pairs[place]), test.logits.shape[1])
        size = int((test.y == true).sum())
        both = (test.y == true) & (test.predicted == said)
        rows.append({
            "class": _label(data, true), "taken for": _label(data, said),
            "samples": int(counts[place]), "of the class": int(counts[place]) / size,
            "mean confidence": float(test.confidence[both].mean()),
        })  # fmt: skip
    return rows


def _class_findings(data: Sample, test: _Answers) -> list[Finding]:
    classes = test.y.unique().tolist()
    z_level = 1 - 0.05 / max(1, len(classes))  # so many classes are compared at once
    found = []
    for c in classes:
        true = test.y == c
        hits, n = int(test.correct[true].sum()), int(true.sum())
        high = share_interval(hits, n, z_level)[1][1]
        if high < test.accuracy - 0.02:
            found.append((hits / n, n, c))
    if not found:
        return []
    (share, n, c), *others = sorted(found)
    more = (
        f"; also behind: {', '.join(_label(data, k) for _, _, k in others[:3])}" if others else ""
    )
    return [
        Finding(
            f"Class {_label(data, c)} is recognised in {percent(share)} of its {n} test "
            f"samples, all classes in {percent(test.accuracy)}{more}.",
            "See which class it is taken for in the table; look at its labels and its share of the "
            "train data.",
            min(0.6, 0.2 + (test.accuracy - share)),
        )
    ]


@dataclass
class _Slice:
    name: str
    samples: int
    right: int
    margin: float
    confidence: float
    stays: float | None

    @property
    def row(self) -> dict[str, Cell]:
        share, (low, high) = share_interval(self.right, self.samples)
        row: dict[str, Cell] = {
            "slice": self.name, "samples": self.samples, "margin": self.margin,
            "accuracy": share, "from": low, "to": high, "confidence": self.confidence,
        }  # fmt: skip
        if self.stays is not None:
            row["same answer under noise"] = self.stays
        return row


def _slices(model: nn.Module, data: Sample, budget: Budget, test: _Answers) -> list[_Slice]:
    """Groups of test samples, the one with the smallest mean margin first."""
    masks: dict[str, Tensor] = {
        f"class {_label(data, c)}": test.y == c for c in test.y.unique().tolist()
    }
    masks |= {f"predicted {_label(data, c)}": test.predicted == c
              for c in test.predicted.unique().tolist()}  # fmt: skip
    stays = None
    if data.test.x.is_floating_point():
        flat = data.test.x.flatten(1).cpu().double()
        values = {"brightness": flat.mean(1), "contrast": flat.std(1, correction=0)}
        for name, value in values.items():
            if float(value.max() - value.min()) < 1e-6:
                continue
            quarter = confidence_bins(value, 4, adaptive=True)
            for q, where in enumerate(("lowest", "second", "third", "highest")):
                masks[f"{where} quarter of {name}"] = quarter == q
        stays = _stays(model, data, budget, test)
    found = [
        _Slice(
            name, int(mask.sum()), int(test.correct[mask].sum()), float(test.margin[mask].mean()),
            float(test.confidence[mask].mean()),
            None if stays is None else float(stays[mask].mean()),
        )
        for name, mask in masks.items()
        if int(mask.sum()) >= min(FEWEST, len(mask))
    ]  # fmt: skip
    return sorted(found, key=lambda s: s.margin)


def _stays(model: nn.Module, data: Sample, budget: Budget, test: _Answers) -> Tensor | None:
    """Share of noisy copies to which the network answers as to the sample itself, `(N,)`."""
    x, generator = data.test.x, data.generator("noise")
    size = NOISE * float(x.std())
    same = torch.zeros(len(x), dtype=torch.float64)
    rounds = 0
    while rounds < 8:

        def once() -> None:
            parts = []
            for part in x.split(256):
                noise = torch.randn(part.shape, generator=generator).to(part)
                parts.append(model(part + size * noise).argmax(1).cpu())
            same.add_(torch.cat(parts) == test.predicted)

        if rounds == 0:  # one batch tells what all cost
            with torch.no_grad():
                _, cost = budget.timed(lambda: model(x[:256]))
            if cost * math.ceil(len(x) / 256) > 0.5 * budget.left:
                budget.note("Agreement under noise was left out for want of time.")
                return None
        with torch.no_grad():
            _, cost = budget.timed(once)
        rounds += 1
        if 1.5 * cost > 0.5 * budget.left:
            break
    return same / rounds


def _slice_findings(slices: list[_Slice], accuracy: _Accuracy) -> list[Finding]:
    inputs = [s for s in slices if "quarter" in s.name]
    for s in sorted(inputs, key=lambda s: s.right / s.samples):
        level = 1 - 0.05 / len(inputs)
        high = share_interval(s.right, s.samples, level)[1][1]
        if high < accuracy.test[0] - 0.01:
            return [
                Finding(
                    f"On the {s.name} of the test inputs accuracy is "
                    f"{percent(s.right / s.samples)}, overall {percent(accuracy.test[0])}.",
                    "The network depends on it; normalise the inputs, or augment by it.",
                    min(0.5, 0.2 + accuracy.test[0] - s.right / s.samples),
                )
            ]
    return []


def _mistakes(test: _Answers) -> Tensor:
    order = test.nll.argsort(descending=True, stable=True)
    return order[test.correct[order] == 0]


def _sample_rows(data: Sample, test: _Answers, order: Tensor) -> Rows:
    # Classification alone: answers and samples are the same, unless labels are ignored.
    index = data.test.index[test.unit]
    return [
        {"index": int(index[i]), "label": _label(data, int(test.y[i])),
         "prediction": _label(data, int(test.predicted[i])),
         "confidence": float(test.confidence[i]),
         "second": _label(data, int(test.second[i])), "margin": float(test.margin[i])}
        for i in order[:WORST].tolist()
    ]  # fmt: skip


def _position_rows(data: Sample, test: _Answers) -> Rows:
    y = data.test.y.cpu()
    places = torch.arange(y.shape[1]).expand_as(y).flatten()
    places = places[y.flatten() != getattr(data.loss_fn, "ignore_index", -100)]
    return [
        {"position": p, "tokens": int((places == p).sum()),
         "accuracy": float(test.correct[places == p].mean()),
         "cross-entropy": float(test.nll[places == p].mean())}
        for p in places.unique().tolist()[:CLASSES]
    ]  # fmt: skip


def _confusion_figure(data: Sample, test: _Answers) -> list[Picture]:
    c = test.logits.shape[1]
    if c > 200:
        return []
    counts = torch.zeros(c, c).index_put_(
        (test.y, test.predicted), torch.ones(len(test.y)), accumulate=True
    )
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    side = 4.2 if c <= CLASSES else 5.2
    figure, axis = subplots(width=side + 0.9, height=side)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.grid(visible=False)
    if c <= CLASSES:
        names = [_label(data, i)[:12] for i in range(c)]
        axis.set_xticks(range(c), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(c), names)
    if c <= 12:
        for i in range(c):
            for j in range(c):
                if counts[i, j]:
                    axis.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=8,
                              color="white" if shares[i, j] > 0.5 else "black")  # fmt: skip
    axis.set_xlabel("prediction")
    axis.set_ylabel("label")
    figure.colorbar(image, ax=axis, label="share of the label")
    return [Picture("confusion", figure, "Test answers by label; a row sums to one.")]


def _mistake_pictures(data: Sample, test: _Answers) -> list[Picture]:
    worst = _mistakes(test)[:12]
    if data.task != "classification" or len(worst) == 0:
        return []
    images = as_images(data.test.x[test.unit[worst].to(data.test.x.device)])
    if images is None:
        return []
    rows = math.ceil(len(worst) / 6)
    figure, axes = subplots(rows, 6, width=7.2, height=1.55 * rows, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, i in zip(axes.flat, images, worst.tolist(), strict=False):
        said = f"{_label(data, int(test.y[i]))[:9]} → {_label(data, int(test.predicted[i]))[:9]}"
        show_image(axis, image, f"{said}\n{percent(float(test.confidence[i]), 2)}")
    return [
        Picture(
            "mistakes", figure,
            "The test samples of largest loss: label → prediction, and its confidence. Wrong "
            "labels gather here.",
        )
    ]  # fmt: skip


# -- regression --------------------------------------------------------------------------------


@dataclass
class _Errors:
    """Predictions and targets of a split, `(N, d)`."""

    predicted: Tensor
    y: Tensor

    @classmethod
    def of(cls, data: Sample, name: str) -> "_Errors":
        predicted, y = data.outputs(name).cpu().double(), data.split(name).y.cpu().double()
        return cls(predicted.reshape(len(y), -1), y.reshape(len(y), -1))

    @property
    def residual(self) -> Tensor:
        return self.predicted - self.y

    @property
    def square(self) -> Tensor:
        return self.residual.square().mean(1)

    def rmse(self, w: Tensor) -> Tensor:
        return ((w @ self.square) / w.sum(1)).sqrt()

    def mae(self, w: Tensor) -> Tensor:
        return (w @ self.residual.abs().mean(1)) / w.sum(1)

    def r2(self, w: Tensor) -> Tensor:
        n = w.sum(1, keepdim=True)
        y = self.y - self.y.mean(0)  # shifted: small differences of large squares round
        spread = (w @ y.square() / n - (w @ y / n).square()).mean(1)
        return 1 - (w @ self.square) / n[:, 0] / spread

    def measured(
        self, statistic: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> tuple[float, Interval]:
        value = float(statistic(torch.ones(1, len(self.y), dtype=torch.float64)))
        low, high = _quantiles(_resampled(statistic, len(self.y), generator))
        return value, (low, high)


def _regression(data: Sample, budget: Budget) -> Panel:
    train, test = _Errors.of(data, "train"), _Errors.of(data, "test")
    generator = data.generator("performance")
    how = f"all {len(test.y):,} test samples; bootstrap interval, 95 %"
    rmse = test.measured(test.rmse, generator)
    on_train = train.measured(train.rmse, generator)
    mae = test.measured(test.mae, generator)
    metrics = [
        Metric("rmse", "Test RMSE", rmse[0], how, "Typical error, in the units of the target.",
               rmse[1], better="low"),
        Metric("train_rmse", "Train RMSE", on_train[0], how.replace(
                   f"{len(test.y):,} test", f"{len(train.y):,} train"),
               "Far below the test RMSE: overfitting.", on_train[1], better="low"),
        Metric("mae", "Test mean absolute error", mae[0], how,
               "Far below the RMSE: a few large errors make most of it.", mae[1], better="low"),
    ]  # fmt: skip
    if not _same(data):
        gap = _difference(rmse, on_train)
        metrics.append(
            Metric("gap", "Generalisation gap", gap[0], "test less train RMSE; interval combined",
                   "What is lost on new data.", gap[1], better="low")
        )  # fmt: skip
    r2 = None
    if len(test.y) > 1 and float(test.y.var(0).mean()) > 0:
        r2 = test.measured(test.r2, generator)
        metrics.append(
            Metric("r2", "Test R²", r2[0], f"of the variance of all outputs together; {how}",
                   "Share of the targets' variance that is explained; 0 is the mean as an answer.",
                   r2[1], better="high")
        )  # fmt: skip
    tables: dict[str, Rows] = {"Worst test samples": _worst_rows(data, test)}
    if 1 < test.y.shape[1] <= CLASSES:
        tables["Outputs"] = _output_rows(test)
    return Panel(
        metrics=metrics,
        reading=(
            "The RMSE weighs large errors most, R² compares it with answering the mean. Residuals "
            "should scatter about zero alike everywhere: a slope is a bias, a funnel an error that "
            "grows with the value."
        ),
        method="Targets and predictions as they are given; several outputs are pooled.",
        figures=[_residual_figure(test)],
        tables=tables,
        findings=_regression_findings(data, test, rmse, on_train, r2),
    )


def _output_rows(test: _Errors) -> Rows:
    rmse = test.residual.square().mean(0).sqrt()
    spread = test.y.std(0, correction=0)
    return [
        {"output": i, "RMSE": float(rmse[i]), "bias": float(test.residual[:, i].mean()),
         "R²": float(1 - (rmse[i] / spread[i]) ** 2) if spread[i] else None}
        for i in range(test.y.shape[1])
    ]  # fmt: skip


def _worst_rows(data: Sample, test: _Errors) -> Rows:
    order = test.square.argsort(descending=True, stable=True)[:WORST]
    single = test.y.shape[1] == 1
    return [
        {"index": int(data.test.index[i]),
         **({"target": float(test.y[i, 0]), "prediction": float(test.predicted[i, 0])}
            if single else {}),
         "error (RMS)": float(test.square[i].sqrt())}
        for i in order.tolist()
    ]  # fmt: skip


def _residual_figure(test: _Errors) -> Picture:
    figure, (left, right) = subplots(1, 2, width=7.6, height=3.4)
    y, predicted = test.y.flatten().numpy(), test.predicted.flatten().numpy()
    chosen = np.linspace(0, len(y) - 1, min(len(y), 4000)).astype(int)
    ends = [float(min(y.min(), predicted.min())), float(max(y.max(), predicted.max()))]
    left.plot(ends, ends, color=GREY, linestyle="--")
    left.scatter(y[chosen], predicted[chosen], s=6, alpha=0.4, color=BLUE, rasterized=True)
    left.set_xlabel("target")
    left.set_ylabel("prediction")
    right.axhline(0, color=GREY, linestyle="--")
    right.scatter(predicted[chosen], (predicted - y)[chosen], s=6, alpha=0.4, color=ORANGE,
                  rasterized=True)  # fmt: skip
    right.set_xlabel("prediction")
    right.set_ylabel("residual (prediction − target)")
    return Picture("residuals", figure, "Test predictions against targets, and what is left over.")


def _regression_findings(
    data: Sample,
    test: _Errors,
    rmse: tuple[float, Interval],
    train: tuple[float, Interval],
    r2: tuple[float, Interval] | None,
) -> list[Finding]:
    found = []
    if r2 is not None and r2[1][0] <= 0:
        found.append(
            Finding(
                f"R² is {r2[0]:.2g}: the network is hardly better than answering the mean.",
                "It has not learnt the task, or the targets are scaled otherwise than in training.",
                0.9,
            )
        )  # fmt: skip
    if not _same(data) and train[0] > 0 and rmse[1][0] > 1.2 * train[1][1]:
        found.append(
            Finding(
                f"The test RMSE is {rmse[0] / train[0]:.2g} times the train RMSE.",
                "The network has fitted noise: more data, regularisation or an earlier stop.",
                min(0.7, 0.2 + 0.15 * rmse[0] / train[0]),
            )
        )
    varied = float(test.predicted.std()) > 0 and float(test.residual.abs().std()) > 0
    if len(test.y) >= FEWEST and varied:
        rank = scipy.stats.spearmanr(
            test.predicted.flatten().numpy(), test.residual.abs().flatten().numpy()
        )
        slope, chance = np.asarray(rank, dtype=float)
        if chance < 1e-3 and abs(slope) > 0.3:
            found.append(
                Finding(
                    f"Errors {'grow' if slope > 0 else 'shrink'} with the prediction (rank "
                    f"correlation {slope:.2g}).",
                    "One error bar does not fit all answers; model the variance, or the logarithm.",
                    0.3,
                )
            )
        bias, error = float(test.residual.mean()), float(test.residual.std())
        if abs(bias) > 4 * error / math.sqrt(test.y.numel()) and abs(bias) > 0.1 * rmse[0]:
            found.append(
                Finding(
                    f"Predictions are {'too high' if bias > 0 else 'too low'} by "
                    f"{abs(bias):.3g} on average.",
                    "A constant would repair it; test and train data may differ.",
                    min(0.6, 0.2 + abs(bias) / rmse[0] / 2),
                )
            )
    return found
