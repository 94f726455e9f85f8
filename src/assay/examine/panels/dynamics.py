"""Learning dynamics: in which order copies of the network learn the samples, and if they agree."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from assay.analysis import (
    CorrectnessRecorder,
    accessibility,
    agreement_icc,
    agreement_table,
    bimodality,
    binomial_null,
    class_table,
    extent_at_accuracy,
    log_spaced_steps,
    order_correlation,
    tp_agreement,
)
from assay.data import stratified
from assay.examine.budget import Budget
from assay.examine.images import as_images, show_image
from assay.examine.panel import Finding, Metric, NotApplicable, Panel, Picture, panel
from assay.examine.retraining import BATCH_SIZE, RULE, Trainee, choose_learning_rate
from assay.examine.sample import Sample
from assay.lab.figures import subplots
from assay.lab.intervals import mean_interval, share_interval
from assay.lab.numerals import percent

FEWEST_NETWORKS, MOST_NETWORKS = 3, 12
FEWEST_TRAINED = 256  # samples; or all, if there are fewer
FEWEST_WATCHED, MOST_WATCHED = 96, 1000  # of each split
EPOCHS_FIRST, MOST_EPOCHS = 8, 60  # aimed at before more networks; and the end of it
EXTENTS = 16
BYTES = 2**30  # of weights, gradients and the optimizer's moments of all networks
HARD = 0.1  # share of networks: a sample that fewer get right is hard
AGAINST = 0.7  # share of looks at all networks, from half way on, that name one other class
RESAMPLES = 200
SHOWN = 12  # samples that are learned last
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000", "#999933",
    "#882255", "#44aa99",
)  # fmt: skip

READING = (
    "Copies of the network with fresh weights learn the same samples early and the same samples "
    "late. Agreement is the intra-class correlation of being right, half way through learning: 0 "
    "if the networks err independently, 1 if they are right on the very same samples. What is "
    "learned last or never by all copies is hard for the architecture, not by chance of one "
    "training: look at these samples for wrong labels, rare kinds and what the inputs do not show. "
    "Short trainings see the beginning of learning only: a sample that is hard here may be learned "
    "later."
)
HACOHEN = (
    "Hacohen, Choshen, Weinshall, Let's agree to agree (2020)",
    "https://arxiv.org/abs/1905.10854",
)


@dataclass(frozen=True)
class Plan:
    """What fits into the time.

    Args:
        train: positions of the samples to train on.
        test_watched: positions of the test samples to look at.
        train_watched: positions of the train samples to look at.
        networks: how many.
        steps: of each, at most.
        lr: learning rate.
        epoch: seconds of an epoch of one network.
    """

    train: Tensor
    test_watched: Tensor
    train_watched: Tensor
    networks: int
    steps: int
    lr: float
    epoch: float


@dataclass(frozen=True)
class Learned:
    """What the networks got right, and when.

    Args:
        plan: of the trainings.
        steps: at which it was looked.
        test: extents × networks × watched test samples.
        train: extents × networks × watched train samples.
        test_says: predicted classes, extents × networks × watched test samples.
        train_says: extents × networks × watched train samples.
        loss: mean training loss of the last tenth of the steps.
    """

    plan: Plan
    steps: tuple[int, ...]
    test: Tensor
    train: Tensor
    test_says: Tensor
    train_says: Tensor
    loss: float

    @property
    def middle(self) -> int:
        """The extent half way through learning."""
        accuracy = self.test.double().mean(dim=(1, 2))
        return extent_at_accuracy(self.test, float(accuracy[0] + accuracy[-1]) / 2)

    def votes(self, name: str) -> tuple[Tensor, Tensor]:
        """What most networks say of each watched sample from half way on, and by which share.

        Not at the end alone: by then they may have learned wrong labels by heart.
        """
        says = self.test_says if name == "test" else self.train_says
        flat = says[self.middle :].flatten(0, 1)
        most = flat.mode(dim=0).values
        return most, (flat == most).double().mean(0)

    @property
    def epochs(self) -> float:
        """Passes over the samples trained on."""
        return self.steps[-1] * min(BATCH_SIZE, len(self.plan.train)) / len(self.plan.train)


@panel(
    "dynamics",
    title="Learning dynamics",
    order=80,
    share=4.0,
    tasks=("classification",),
    trains=True,
)
def dynamics(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """Train a few copies anew and look at the order in which samples are learned."""
    plan = _plan(model, data, budget)
    return _report(_train(model, data, budget, plan), data, budget)


# -- what fits into the time -------------------------------------------------------------------


def _make(model: nn.Module, data: Sample, train: Tensor, lr: float, *key: object) -> Trainee:
    split = data.train.select(train)
    return Trainee(model, split, data.loss_fn, lr=lr, generator=data.generator("dynamics", *key))


def _plan(model: nn.Module, data: Sample, budget: Budget) -> Plan:
    everything = torch.arange(len(data.train))
    trial = _make(model, data, everything, 1e-3, "trial")
    trial.step()
    _, cost = budget.timed(lambda: [trial.step() for _ in range(2)])
    cost /= 2
    probe = data.test.x[:FEWEST_WATCHED]
    _, look = budget.timed(lambda: trial.outputs(probe))
    look /= len(probe)

    time = 0.8 * budget.left
    batch = min(BATCH_SIZE, len(data.train))
    passes = 0.7 * time / (cost / batch)  # samples that can be trained on, all networks together
    fewest = min(FEWEST_TRAINED, len(data.train))
    if passes < FEWEST_NETWORKS * fewest:
        raise NotApplicable(
            f"an epoch of {fewest:,} samples takes {cost / batch * fewest:.2g} s, which does not "
            f"fit into {budget.seconds:.2g} s for {FEWEST_NETWORKS} networks: give a larger budget"
        )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    held = BYTES // max(1, 4 * size)
    if held < FEWEST_NETWORKS:
        raise NotApplicable(
            f"{FEWEST_NETWORKS} copies of {size / 2**20:,.0f} MB in training do not fit into memory"
        )
    n = max(fewest, min(len(data.train), int(passes / (FEWEST_NETWORKS * EPOCHS_FIRST / 2))))
    networks = int(passes / (n * EPOCHS_FIRST))
    networks = min(max(networks, FEWEST_NETWORKS), MOST_NETWORKS, held)
    epochs = min(MOST_EPOCHS, passes / (n * networks))
    watched = int(0.3 * time / (networks * EXTENTS * max(look, 1e-9)) / 2)
    watched = max(FEWEST_WATCHED, min(MOST_WATCHED, watched))

    def choose(name: str, count: int) -> Tensor:
        y = data.split(name).y.cpu()
        seed = data.generator("dynamics", name, count).initial_seed() % 2**63
        return stratified(y, min(count, len(y)), seed).sort().values

    train = choose("train", n)
    if n < len(data.train):
        budget.note(f"The copies are trained on {n:,} of the {len(data.train):,} train samples.")
    steps = max(2, min(30, int(0.05 * time / (3 * cost))))
    lr = choose_learning_rate(lambda lr: _make(model, data, train, lr, "rate"), steps)
    return Plan(
        train,
        choose("test", watched),
        choose("train", watched),
        networks,
        max(2, math.ceil(1.25 * epochs * n / batch)),
        lr,
        cost / batch * n,
    )


# -- training ----------------------------------------------------------------------------------


def _train(model: nn.Module, data: Sample, budget: Budget, plan: Plan) -> Learned:
    """All networks in lock-step, so that they are equally far whenever time is up."""
    trainees = [_make(model, data, plan.train, plan.lr, k) for k in range(plan.networks)]
    x = torch.cat([data.test.x[plan.test_watched], data.train.x[plan.train_watched]])
    y = torch.cat([data.test.y[plan.test_watched], data.train.y[plan.train_watched]])
    recorder = CorrectnessRecorder(len(y), plan.networks)
    extents = set(log_spaced_steps(plan.steps, EXTENTS))
    reserve = 0.12 * budget.seconds
    losses, says, slowest = [], [], 0.0
    for step in range(1, plan.steps + 1):
        _, seconds = budget.timed(lambda: losses.append([t.step() for t in trainees]))
        last = step == plan.steps or budget.left < reserve + slowest + 2 * seconds
        if step in extents or last:

            def look(step: int = step) -> None:
                found = torch.stack([t.outputs(x).argmax(1) for t in trainees])
                recorder.record(step, found == y)
                says.append(found.cpu())

            _, seconds = budget.timed(look)
            slowest = max(slowest, seconds)
            of_train = recorder.correct[-1, :, len(plan.test_watched) :]
            last = last or (bool(of_train.all()) and step * BATCH_SIZE > 3 * len(plan.train))
        if last:
            break
    if len(recorder.extents) < 2:
        raise NotApplicable(
            f"there was time for a single step of {plan.networks} networks; an epoch of one takes "
            f"{plan.epoch:.2g} s: give a larger budget"
        )
    split = len(plan.test_watched)
    said = torch.stack(says)
    tail = losses[-max(1, len(losses) // 10) :]
    return Learned(
        plan,
        tuple(map(int, recorder.extents)),
        recorder.correct[:, :, :split],
        recorder.correct[:, :, split:],
        said[:, :, :split],
        said[:, :, split:],
        float(torch.tensor([[float(v) for v in row] for row in tail]).mean()),
    )


# -- figures -----------------------------------------------------------------------------------


def _report(learned: Learned, data: Sample, budget: Budget) -> Panel:
    plan = learned.plan
    middle = learned.test[learned.middle]
    metrics = [
        *_agreement(middle, data, budget),
        *_bimodality(middle, data),
        _hard(learned),
        *_overlap(learned, data, budget),
    ]
    last = learned.test[-1].double().mean(1).numpy()
    pictures = [_curves(learned), _histogram(middle), _class_curves(learned, data)]
    pictures += _last_pictures(learned, data)
    return Panel(
        metrics,
        reading=READING,
        method=(
            f"{plan.networks} copies with fresh weights, trained for {learned.steps[-1]:,} steps "
            f"({learned.epochs:.1f} epochs) on {len(plan.train):,} train samples, each in an order "
            f"of its own, without augmentation: {RULE}, here {plan.lr:g}. They end at a training "
            f"loss of {learned.loss:.3g} and a test accuracy of {last.mean():.3f} "
            f"(from {last.min():.3f} to {last.max():.3f}). Whether each is right on "
            f"{learned.test.shape[2]:,} test and {learned.train.shape[2]:,} train samples was "
            f"recorded at {len(learned.steps)} steps, evenly spaced on a logarithmic scale; a "
            "sample's accessibility is the share of networks that are right, averaged over these."
        ),
        reference=dict([HACOHEN]),
        figures=pictures,
        tables=_tables(learned, data),
        findings=_findings(learned, data),
    )


def _quantiles(draws: Tensor) -> tuple[float, float] | None:
    finite = draws[draws.isfinite()].numpy()
    if len(finite) < len(draws) / 2:
        return None
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def _agreement(middle: Tensor, data: Sample, budget: Budget) -> list[Metric]:
    icc = float(agreement_icc(middle))
    if math.isnan(icc):
        budget.note("Agreement is not defined: all networks are right everywhere, or nowhere.")
        return []
    networks, samples = middle.shape
    generator = data.generator("dynamics", "agreement")
    index = torch.randint(samples, (RESAMPLES, samples), generator=generator)
    draws = agreement_icc(middle[:, index].transpose(0, 1))
    order = torch.rand(RESAMPLES, networks, samples, generator=generator).argsort(2)
    null = agreement_icc(middle.expand(RESAMPLES, -1, -1).gather(2, order))
    within = _quantiles(draws)
    return [
        Metric(
            "agreement",
            "Agreement of the networks on what is learned",
            icc,
            f"intra-class correlation of being right, {networks} networks, {samples:,} test "
            "samples, at the step where accuracy is half way between its first and last; "
            "percentile bootstrap over samples",
            "0 if the networks learn in independent orders, 1 if they are right on the same "
            "samples.",
            interval=None if within is None else (min(within[0], icc), max(within[1], icc)),
        ),
        Metric(
            "agreement_null",
            "The same for independent networks",
            float(null.nanmean()),
            f"mean over {RESAMPLES} permutations of the samples of each network, which keep its "
            "accuracy (binomial agreement); interval: 95 % of the permutations",
            "Agreement is more than chance if it is above this interval.",
            interval=_quantiles(null),
        ),
    ]


def _bimodality(middle: Tensor, data: Sample) -> list[Metric]:
    tpa = tp_agreement(middle)
    value = float(bimodality(tpa))
    if math.isnan(value):
        return []
    generator = data.generator("dynamics", "bimodality")
    index = torch.randint(len(tpa), (RESAMPLES, len(tpa)), generator=generator)
    within = _quantiles(bimodality(tpa[index]))
    null = agreement_table(middle.unsqueeze(0))[0]["bimodality if independent"]
    return [
        Metric(
            "bimodality",
            "Bimodality of the share of networks that are right",
            value,
            f"Pearson's coefficient over {len(tpa):,} test samples half way through learning; "
            f"independent networks of this accuracy would have {null:.3f}; percentile bootstrap "
            "over samples",
            "1 if every sample is known by all networks or by none; 5/9 if shares are spread "
            "evenly.",
            interval=None if within is None else (min(within[0], value), max(within[1], value)),
        )
    ]


def _hard(learned: Learned) -> Metric:
    tpa = tp_agreement(learned.test[-1])
    value, interval = share_interval(int((tpa < HARD).sum()), len(tpa))
    return Metric(
        "hard_share",
        "Test samples that hardly any network gets right",
        value,
        f"share of {len(tpa):,} test samples that fewer than {percent(HARD, 2)} of "
        f"{learned.plan.networks} "
        f"networks classify rightly after {learned.epochs:.1f} epochs; Wilson interval over "
        "samples",
        "Errors that another training would not repair.",
        interval=interval,
        better="low",
    )


def _overlap(learned: Learned, data: Sample, budget: Budget) -> list[Metric]:
    hardness = 1 - accessibility(learned.test)
    loss = data.losses("test").detach().cpu().double()[learned.plan.test_watched]
    try:
        found = order_correlation(hardness, loss, resamples=RESAMPLES)
    except ValueError as error:
        budget.note(f"Hardness and the network's losses cannot be correlated: {error}.")
        return []
    return [
        Metric(
            "error_overlap",
            "Hard samples and the examined network's losses",
            found.estimate,
            f"Spearman's correlation of 1 − accessibility and the examined network's loss over "
            f"{len(loss):,} test samples; percentile bootstrap over samples",
            "Near 1: the network errs where any copy of it does; near 0: its errors are its own, "
            "and another training or an ensemble would correct many.",
            interval=(min(found.low, found.estimate), max(found.high, found.estimate)),
        )
    ]


# -- pictures and tables -----------------------------------------------------------------------


def _curves(learned: Learned) -> Picture:
    figure, (left, right) = subplots(1, 2, width=7.6, height=3.2)
    accuracy = learned.test.double().mean(2).numpy()
    left.plot(learned.steps, accuracy, color=GREY, linewidth=0.7, alpha=0.7)
    left.plot(learned.steps, accuracy.mean(1), color=BLUE, label="test, mean")
    of_train = learned.train.double().mean(dim=(1, 2)).numpy()
    left.plot(learned.steps, of_train, color=ORANGE, linestyle="--", label="train, mean")
    left.set(xscale="log", xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    left.legend()
    rows = agreement_table(learned.test, learned.steps)
    right.plot(learned.steps, [row["icc"] for row in rows], color=BLUE, marker="o", markersize=3)
    right.axhline(0, color="black", linestyle=":", linewidth=0.8, label="independent networks")
    right.axvline(learned.steps[learned.middle], color=GREY, linestyle="--", linewidth=0.8,
                  label="half way")  # fmt: skip
    right.set(xscale="log", xlabel="step", ylabel="agreement (ICC)", ylim=(None, 1.02))
    right.legend(loc="lower right")
    return Picture(
        "curves",
        figure,
        f"Left: accuracy of {learned.plan.networks} fresh copies (grey: each on test samples). "
        "Right: how far they are right on the same test samples, beyond chance.",
    )


def _histogram(middle: Tensor) -> Picture:
    figure, axis = subplots()
    networks = len(middle)
    tpa = tp_agreement(middle)
    counts = torch.bincount((tpa * networks).round().long(), minlength=networks + 1)
    null = binomial_null(float(tpa.mean()), networks)
    places = np.arange(networks + 1)
    axis.bar(places - 0.2, (counts / counts.sum()).numpy(), 0.4, color=BLUE, label="measured")
    axis.bar(places + 0.2, null.numpy(), 0.4, color="#cccccc", label="independent networks")
    axis.set(xlabel=f"networks of {networks} that are right", ylabel="share of test samples")
    axis.set_xticks(places)
    axis.legend()
    return Picture(
        "agreement",
        figure,
        "Test samples by the number of networks that classify them rightly half way through "
        "learning, beside what independent networks of the same accuracy would show.",
    )


def _class_curves(learned: Learned, data: Sample) -> Picture:
    figure, axis = subplots(width=6.8)
    y = data.test.y[learned.plan.test_watched].cpu()
    order = [str(row["class"]) for row in class_table(learned.test, y, data.classes)]
    if len(order) > len(COLOURS):
        order = order[:5] + order[-5:]
    for name, colour in zip(order, COLOURS, strict=False):
        mine = y == data.classes.index(name)
        accuracy = learned.test[:, :, mine].double().mean(dim=(1, 2)).numpy()
        axis.plot(learned.steps, accuracy, color=colour, label=name)
    axis.set(xscale="log", xlabel="step", ylabel="accuracy, mean of networks", ylim=(0, 1.02))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return Picture(
        "classes",
        figure,
        "Accuracy on test samples of each class while the copies learn, the most accessible class "
        "first in the legend; of many classes the five first and the five last.",
    )


def _last_learned(learned: Learned, name: str) -> Tensor:
    """Positions among the watched samples of a split, the least accessible first."""
    correct = learned.test if name == "test" else learned.train
    return accessibility(correct).argsort(stable=True)[:SHOWN]


def _rows(learned: Learned, data: Sample, name: str) -> list[dict]:
    split = data.split(name)
    watched = learned.plan.test_watched if name == "test" else learned.plan.train_watched
    correct = learned.test if name == "test" else learned.train
    most, _ = learned.votes(name)
    own = data.outputs(name).argmax(1).cpu()[watched]
    y = split.y.cpu()[watched]
    reach, end = accessibility(correct), tp_agreement(correct[-1])
    return [
        {
            "index": int(split.index[watched[i]]),
            "label": data.classes[int(y[i])],
            "copies say": data.classes[int(most[i])],
            "right at the end": f"{round(float(end[i]) * correct.shape[1])} of {correct.shape[1]}",
            "accessibility": round(float(reach[i]), 4),
            "examined network says": data.classes[int(own[i])],
        }
        for i in _last_learned(learned, name).tolist()
    ]


def _tables(learned: Learned, data: Sample) -> dict[str, list[dict]]:
    y = data.test.y[learned.plan.test_watched].cpu()
    classes = [
        {key: value if isinstance(value, str | int) else _rounded(value)
         for key, value in row.items()}
        for row in class_table(learned.test, y, data.classes)
    ]  # fmt: skip
    return {
        "Train samples learned last": _rows(learned, data, "train"),
        "Test samples learned last": _rows(learned, data, "test"),
        "Order of the classes (test)": classes,
    }


def _rounded(value: float) -> float | str:
    return float(f"{value:.4g}") if math.isfinite(value) else "–"


def _last_pictures(learned: Learned, data: Sample) -> list[Picture]:
    chosen = _last_learned(learned, "train")
    images = as_images(data.train.x[learned.plan.train_watched[chosen]])
    if images is None:
        return []
    rows = _rows(learned, data, "train")
    columns = 6
    figure, axes = subplots(
        math.ceil(len(rows) / columns), columns, width=7.6,
        height=1.55 * math.ceil(len(rows) / columns), squeeze=False,
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, row in zip(axes.flat, images, rows, strict=False):
        show_image(axis, image, f"{row['label']} (said: {row['copies say']})")
    return [
        Picture(
            "last",
            figure,
            "Train samples that are learned last, with their label and what the copies mostly said "
            "in the second half of learning. Wrong labels gather here.",
        )
    ]


def _findings(learned: Learned, data: Sample) -> list[Finding]:
    findings = []
    own = data.outputs("test").argmax(1).cpu()[learned.plan.test_watched]
    y = data.test.y.cpu()[learned.plan.test_watched]
    wrong, networks = own != y, learned.plan.networks
    accuracy, ends = mean_interval(learned.test[-1].double().mean(1).numpy())
    mine = float((~wrong).double().mean())
    if ends is not None and ends[0] > mine + 0.01:
        findings.append(
            Finding(
                f"Copies trained for {learned.epochs:.0f} epochs reach a test accuracy of "
                f"{accuracy:.3f}, the network itself has {mine:.3f} on the same samples.",
                "A plain short training does better than the one that made this network: look for "
                "a wrong preprocessing, labels in another order, or a training that went astray.",
                0.7,
            )
        )
    easy = tp_agreement(learned.test[-1]) == 1
    rescued = int((wrong & easy).sum())
    if wrong.sum() >= 5 and rescued >= 0.25 * wrong.sum():
        findings.append(
            Finding(
                f"{rescued} of {int(wrong.sum())} test errors of the network are on samples that "
                f"all {networks} fresh copies get right.",
                "These errors are chance of one training: an ensemble or a longer training would "
                "correct them.",
                0.3,
            )
        )
    most, agreed = learned.votes("train")
    against = (most != data.train.y.cpu()[learned.plan.train_watched]) & (agreed >= AGAINST)
    if bool(against.any()):
        share = float(against.double().mean())
        findings.append(
            Finding(
                f"The {networks} copies agree on another class than the label of "
                f"{int(against.sum())} of {len(against):,} train samples, in {percent(AGAINST, 2)} "
                "or more of all looks.",
                "Though trained on them, they agree against the label: the table lists the first; "
                "check for wrong labels and for classes that the inputs do not tell apart.",
                min(0.6, 0.2 + 5 * share),
            )
        )
    rows = class_table(learned.test, y, data.classes)
    last = rows[-1]
    if len(rows) > 2 and float(last["accuracy"]) < accuracy - 0.15:
        findings.append(
            Finding(
                f"The class {last['class']} is learned last: its accuracy is "
                f"{float(last['accuracy']):.2f} at the end, that of all {accuracy:.2f}.",
                "A class that every copy learns late needs more or cleaner samples.",
                0.25,
            )
        )
    return findings
