"""The decision boundary: how far test samples are from it, and how it looks between classes."""

import contextlib
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from assay.analysis import (
    BoundaryDistance,
    BoundarySamples,
    DeepDIG,
    bisect_boundary,
    boundary_distance,
    boundary_entropy,
    embedding_linearity,
    embedding_of,
    input_complexity,
    nearest_embedding_pairs,
    random_pairs,
)
from assay.analysis.classifier import predict
from assay.examine.budget import Budget
from assay.examine.images import as_images, show_image
from assay.examine.panel import Finding, Metric, NotApplicable, Panel, Picture, panel
from assay.examine.sample import Sample, Split
from assay.lab.figures import subplots
from assay.lab.intervals import mean_interval, median_interval, share_interval
from assay.lab.numerals import percent

PAIRS = 3  # of classes
CHUNK, FEWEST, MOST = 16, 32, 1024  # test samples whose distance is measured
MOST_SEGMENTS = 64  # between two classes
HALVINGS, POINTS = 20, 50  # of a segment until it ends; on a segment, for complexity
TRIED, TRIAL_STEPS = 128, 12  # samples in a step of an auto-encoder, and steps to time it
MEMORY = 16 * 2**20  # numbers of inputs in a batch of searches
PASSES = 100  # forward passes that a search for the boundary takes, about
FEWEST_STEPS, MOST_STEPS = 150, 3000  # of an auto-encoder of DeepDIG
CLOSE = 0.02  # of the distance between classes: a finding
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"

READING = (
    "The distance to the boundary is the smallest change of an input (Euclidean, over all its "
    "values) that was found to change the predicted class. Relative to the distance between "
    "samples of different classes it says how much of the way one has to go: a few per cent are "
    "usual for networks trained on images without adversarial examples, half would be ideal. The "
    "samples on the boundary between the two classes that are confused most show what the network "
    "takes for the difference."
)
KARIMI = (
    "Karimi, Derr, Tang, Characterizing the decision boundary of deep neural networks (2019)",
    "https://arxiv.org/abs/1912.11460",
)
MOOSAVI = (
    "Moosavi-Dezfooli, Fawzi, Frossard, DeepFool (2016)",
    "https://arxiv.org/abs/1511.04599",
)


@dataclass(frozen=True)
class Between:
    """What was found between two classes.

    Args:
        classes: the two.
        confusion: mean probability that test samples of one give the other.
        samples: on the boundary.
        way: how the segments were found.
        complexity: changes of class between samples on the boundary, for each of them; None if
            there are too few.
    """

    classes: tuple[int, int]
    confusion: float
    samples: BoundarySamples
    way: str
    complexity: np.ndarray | None


@panel("boundary", title="Decision boundary", order=60, share=2.0, tasks=("classification",))
def boundary(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """Distances of test samples to the boundary, and the boundary between confused classes."""
    if not data.test.x.is_floating_point():
        raise NotApplicable("inputs are token ids, between which there is no way to go")
    pairs = _confused_pairs(data)
    if not pairs:
        raise NotApplicable("the test samples are of one class only")
    look = _cost_of_a_look(model, data, budget)
    distances, split = _distances(model, data, budget, look)
    typical = _between_classes(data)
    found: list[Between] = []
    linear: dict[tuple[int, int], tuple[int, int]] = {}
    for place, (s, t, confusion) in enumerate(pairs):
        share = 0.5 / (len(pairs) - place)
        sides = {name: _of_two(data, name, s, t, budget, look) for name in ("train", "test")}
        if result := _between(model, data, budget, sides["test"], (s, t), confusion, look, share):
            found.append(result)
        if counted := _linearity(model, sides, t):
            linear[s, t] = counted
    if found:
        found = _with_deepdig(model, data, budget, found, look)
    return _report(data, split, distances, typical, found, linear)


# -- which classes, which samples --------------------------------------------------------------


def _confused_pairs(data: Sample) -> list[tuple[int, int, float]]:
    """Pairs of classes by how much probability test samples of one give the other."""
    p, y = data.outputs("test").softmax(1), data.test.y
    present = y.unique().tolist()
    mean = {c: p[y == c].mean(0) for c in present}
    pairs = [
        (s, t, float(mean[s][t] + mean[t][s]) / 2) for s, t in itertools.combinations(present, 2)
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:PAIRS]


def _cost_of_a_look(model: nn.Module, data: Sample, budget: Budget) -> float:
    """Seconds of a forward pass, for each input."""
    x = data.test.x[:CHUNK]
    _, cost = budget.timed(lambda: predict(model, x))
    return cost / len(x)


def _of_two(data: Sample, name: str, s: int, t: int, budget: Budget, look: float) -> Split:
    """Samples of two classes, as many as can be looked at."""
    split = data.split(name)
    places = ((split.y == s) | (split.y == t)).nonzero().flatten()
    order = torch.randperm(len(places), generator=data.generator("boundary", name, s, t))
    n = budget.count(look, 40, 600, 0.05)
    return split.select(places[order[:n].to(places.device)])


def _distances(
    model: nn.Module, data: Sample, budget: Budget, look: float
) -> tuple[BoundaryDistance, Split]:
    """Distances of as many test samples as half of the time allows."""
    split = data.draw("test", MOST, "boundary")
    largest = max(1, min(128, MEMORY // split.x[0].numel()))
    size = min(budget.count(PASSES * look, 1, CHUNK, 0.2), largest)
    if PASSES * look > 2 * budget.seconds + 1:
        raise NotApplicable(
            f"a forward pass takes {look:.2g} s for each input, and a search for the boundary "
            f"about {PASSES} of them: give a larger budget"
        )
    end = 0.5 * budget.left
    parts, done, slowest = [], 0, 0.0
    while done < len(split):
        if done >= min(FEWEST, len(split)) and budget.left - slowest < end:
            break
        if parts and budget.left - slowest < 0.1 * budget.seconds:
            break
        part = split.x[done : done + size]
        result, seconds = budget.timed(lambda part=part: boundary_distance(model, part, rtol=1e-4))
        parts.append(result)
        done += len(part)
        slowest = max(slowest, seconds * min(2, (len(split) - done) / size))
        size = min(2 * size, largest)
    if done < len(data.test):
        budget.note(f"Distances to the boundary are those of {done:,} of the test samples.")
    found = BoundaryDistance(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("distance", "point", "predicted", "other")
        )
    )
    return found, split.select(torch.arange(done))


def _between_classes(data: Sample) -> float:
    """Median distance of random test samples of different classes."""
    split = data.draw("test", MOST, "boundary-pairs")
    generator = data.generator("boundary", "pairs")
    a = torch.randint(len(split), (2000,), generator=generator).to(split.y.device)
    b = torch.randint(len(split), (2000,), generator=generator).to(split.y.device)
    apart = split.y[a] != split.y[b]
    flat = split.x.flatten(1)
    gaps = [
        (flat[i] - flat[j]).norm(dim=1)
        for i, j in zip(a[apart].split(200), b[apart].split(200), strict=True)
    ]
    return float(torch.cat(gaps).median())


# -- between two classes -----------------------------------------------------------------------


def _between(
    model: nn.Module,
    data: Sample,
    budget: Budget,
    split: Split,
    classes: tuple[int, int],
    confusion: float,
    look: float,
    share: float,
) -> Between | None:
    """Segments between the nearest samples of two classes, bisected."""
    s, t = classes
    count = budget.count(HALVINGS * look, 4, MOST_SEGMENTS, share / 2)
    way = "nearest in the embedding"
    try:
        a, b = nearest_embedding_pairs(model, split.x, split.y, s, t)
    except (ValueError, RuntimeError):  # no linear layer, or a class that is never right
        generator = data.generator("boundary", s, t)
        try:
            a, b = random_pairs(model, split.x, split.y, s, t, count=count, generator=generator)
        except ValueError as error:
            budget.note(f"Between {data.classes[s]} and {data.classes[t]}: {error}.")
            return None
        way = "random"
    samples = bisect_boundary(model, split.x[a[:count]], split.x[b[:count]], s, t)
    complexity = _complexity(model, data, budget, samples, look, share / 2)
    return Between(classes, confusion, samples, way, complexity)


def _complexity(
    model: nn.Module,
    data: Sample,
    budget: Budget,
    samples: BoundarySamples,
    look: float,
    share: float,
) -> np.ndarray | None:
    border = samples.borderline
    segments = int(share * budget.left / (POINTS * look))
    if len(border) < 2 or segments < 8:
        return None
    count = min(len(border), segments // 2)
    found = input_complexity(
        model,
        border,
        points=POINTS,
        samples=count,
        partners=min(20, segments // count),
        generator=data.generator("boundary", "complexity", *samples.classes),
    )
    return found.double().cpu().numpy()


def _linearity(model: nn.Module, sides: dict[str, Split], t: int) -> tuple[int, int] | None:
    """Test samples on their side of a linear separator of the embeddings, and of how many."""
    try:
        embed = embedding_of(model)
        sets = {name: (embed(side.x).float(), side.y == t) for name, side in sides.items()}
        found = embedding_linearity(*sets["train"], {"test": sets["test"]})["test"]
    except (ValueError, RuntimeError):  # no linear layer; one class in the sample; no spread
        return None
    return round(found.accuracy * found.count), found.count


def _with_deepdig(
    model: nn.Module, data: Sample, budget: Budget, found: list[Between], look: float
) -> list[Between]:
    """The first pair again by DeepDIG, if its auto-encoders can be trained in the time left."""
    first = found[0]
    s, t = first.classes
    own = data.train.x[data.train.y == s]
    if len(own) < 2 * CHUNK:
        return found
    image = as_images(own[:1]) is not None
    bounds = (float(own.min()), float(own.max())) if image else None
    if bounds is not None and not bounds[0] < bounds[1]:
        return found

    if 4 * TRIAL_STEPS * TRIED * look > 0.2 * budget.left:
        budget.note("DeepDIG was not used: the network is too slow to train auto-encoders on it.")
        return found

    def dig(steps: int, least: int) -> DeepDIG:
        return DeepDIG(model, s, t, steps=steps, bounds=bounds, min_survivors=least, alpha=0.8)

    def trial() -> None:
        with contextlib.suppress(RuntimeError):  # too few survive so few steps
            dig(TRIAL_STEPS, 1).fit(own[:TRIED], generator=data.generator("boundary", "trial"))

    _, cost = budget.timed(trial)
    steps = int(0.75 * budget.left / (2 * cost / TRIAL_STEPS))
    names = f"{data.classes[s]} and {data.classes[t]}"
    if steps < FEWEST_STEPS:
        budget.note(
            f"DeepDIG was not used: there was time for {steps:,} steps of its auto-encoders; "
            "samples on the boundary come from segments between test samples."
        )
        return found
    steps = min(steps, MOST_STEPS)
    try:
        generator = data.generator("boundary", "deepdig")
        samples = dig(steps, 5).fit(own, generator=generator).generate()
    except (RuntimeError, ValueError) as error:
        budget.note(f"DeepDIG found no samples between {names} in {steps:,} steps: {error}.")
        return found
    dug = Between(
        first.classes,
        first.confusion,
        samples,
        f"DeepDIG, {steps:,} steps",
        _complexity(model, data, budget, samples, look, 0.5),
    )
    return [dug, *found] if len(samples.borderline) >= 2 else found


# -- the report --------------------------------------------------------------------------------


def _report(
    data: Sample,
    split: Split,
    distances: BoundaryDistance,
    typical: float,
    found: list[Between],
    linear: dict[tuple[int, int], tuple[int, int]],
) -> Panel:
    length = distances.distance.double().cpu().numpy()
    right = (distances.predicted == split.y).cpu().numpy()
    lost = int(np.isinf(length).sum())
    median, interval = median_interval(length)
    metrics = []
    if np.isfinite(median):
        metrics = _distance_metrics(median, interval, typical, len(length), lost)
    metrics += _pair_metrics(data, found, linear)
    pictures = [_distance_picture(length, right, typical)] if np.isfinite(median) else []
    pictures += _border_pictures(data, found)
    return Panel(
        metrics,
        reading=READING,
        method=(
            f"{len(length):,} test samples: DeepFool steps to the nearest linearised boundary of "
            "the ten most probable classes, bisection back to the boundary, then along its normal; "
            "an upper bound of the distance, exact for linear classifiers. Inputs may leave the "
            f"range of the data. {lost} samples reached no other class in 50 steps. Two samples of "
            f"different classes are {typical:.3g} apart (median). Between classes: segments "
            "between test samples that are classified rightly, bisected to equal probability."
        ),
        reference=dict((MOOSAVI, KARIMI)),
        figures=pictures,
        tables=_tables(data, split, length, found, linear),
        findings=_findings(data, median, typical, length, right, found, linear),
    )


def _distance_metrics(
    median: float, interval: tuple[float, float], typical: float, n: int, lost: int
) -> list[Metric]:
    # Where the upper end is a sample without a boundary, no number bounds it.
    ends = interval if np.isfinite(interval[1]) else None
    how = (
        f"median over {n:,} test samples of an upper bound (DeepFool, bisection, normal)"
        + (f", {lost} without a boundary count as farthest" if lost else "")
        + "; interval of order statistics over samples"
    )
    scale = max(typical, 1e-30)
    return [
        Metric(
            "median_distance",
            "Distance to the decision boundary",
            median,
            how,
            "Half of the test samples change their class within this Euclidean distance.",
            interval=ends,
            better="high",
        ),
        Metric(
            "relative_distance",
            "The same, relative to the distance between classes",
            median / scale,
            f"{how}; divided by {typical:.4g}, the median distance of random test samples of "
            "different classes, taken as known",
            "Share of the way to a sample of another class at which the prediction changes.",
            interval=None if ends is None else (ends[0] / scale, ends[1] / scale),
            better="high",
        ),
    ]


def _pair_metrics(
    data: Sample, found: list[Between], linear: dict[tuple[int, int], tuple[int, int]]
) -> list[Metric]:
    metrics = []
    looked = [between for between in found if between.complexity is not None]
    if looked:
        first = looked[0]
        assert first.complexity is not None
        value, interval = mean_interval(first.complexity)
        names = " and ".join(data.classes[c] for c in first.classes)
        metrics.append(
            Metric(
                "complexity",
                f"Changes of class along the boundary ({names})",
                value,
                f"mean over {len(first.complexity)} samples on the boundary ({first.way}) of the "
                f"changes of the predicted class on segments of {POINTS} points to other samples "
                "on it, divided by their number; t interval over samples",
                "0.02 is one change a segment, as between two half spaces; larger: a boundary that "
                "winds, or third classes in between.",
                interval=interval,
                better="low",
            )
        )
    if linear:
        (s, t), (count, n) = next(iter(linear.items()))
        value, interval = share_interval(count, n)
        metrics.append(
            Metric(
                "linearity",
                f"Linear separability of the embedding ({data.classes[s]} and {data.classes[t]})",
                value,
                f"share of {n} test samples of the two classes on their side of a linear support "
                "vector machine fitted to the train samples' embeddings (what enters the last "
                "linear layer); Wilson interval over test samples",
                "1: the features put the two classes on two sides of a plane.",
                interval=interval,
                better="high",
            )
        )
    return metrics


def _tables(
    data: Sample,
    split: Split,
    length: np.ndarray,
    found: list[Between],
    linear: dict[tuple[int, int], tuple[int, int]],
) -> dict[str, list[dict]]:
    y = split.y.cpu().numpy()
    classes = [
        {
            "class": data.classes[c],
            "samples": int((y == c).sum()),
            "median distance": _rounded(float(np.median(length[y == c]))),
        }
        for c in np.unique(y)
    ]
    rows = []
    for between in found:
        samples, (count, n) = between.samples, linear.get(between.classes, (0, 0))
        border = samples.p[samples.success]
        ways = (samples.ends()[0] - samples.pairs[0]).flatten(1).norm(dim=1)[samples.success]
        rows.append(
            {
                "classes": " / ".join(data.classes[c] for c in between.classes),
                "probability of the other": round(between.confusion, 4),
                "samples on the boundary": f"{len(border)} of {len(samples)} ({between.way})",
                "third class on the way": samples.counts["third class"],
                "distance along the segment": _rounded(
                    float(ways.median()) if len(ways) else float("nan")
                ),
                "entropy there (nats)": _rounded(
                    float(boundary_entropy(border).mean()) if len(border) else float("nan")
                ),
                "complexity": _rounded(
                    float("nan") if between.complexity is None else float(between.complexity.mean())
                ),
                "linear in the embedding": round(count / n, 4) if n else "–",
            }
        )
    tables: dict[str, list[dict]] = {}
    if rows:
        tables["Between the classes that are confused most"] = rows
    tables["Distance to the boundary by class"] = sorted(
        classes, key=lambda row: (isinstance(row["median distance"], str), row["median distance"])
    )
    return tables


def _rounded(value: float) -> float | str:
    return float(f"{value:.4g}") if np.isfinite(value) else "–"


def _distance_picture(length: np.ndarray, right: np.ndarray, typical: float) -> Picture:
    figure, axis = subplots()
    finite = np.isfinite(length)
    relative = length / max(typical, 1e-30)
    edges = np.linspace(0, float(np.quantile(relative[finite], 0.99)) * 1.02 + 1e-12, 31)
    parts = [relative[finite & right], relative[finite & ~right]]
    axis.hist(parts, bins=edges, stacked=True, color=[BLUE, ORANGE],
              label=["classified rightly", "wrongly"])  # fmt: skip
    axis.axvline(float(np.median(relative)), color="black", linestyle="--", label="median")
    axis.set(xlabel="distance to the boundary / distance between classes", ylabel="test samples")
    axis.legend()
    return Picture(
        "distances",
        figure,
        "Distance of test samples to the nearest other class, relative to the median distance of "
        "two samples of different classes.",
    )


def _border_pictures(data: Sample, found: list[Between]) -> list[Picture]:
    shown = [between for between in found if bool(between.samples.success.any())]
    if not shown or as_images(data.test.x[:1]) is None:
        return []
    columns = 4
    figure, axes = subplots(
        len(shown), 3 * columns, width=9.6, height=0.35 + 1.05 * len(shown), squeeze=False
    )
    for row, between in zip(axes, shown, strict=True):
        samples = between.samples
        chosen = samples.success.nonzero().flatten()[:columns]
        sources = torch.stack([samples.pairs[0], samples.x, samples.pairs[1]], 1)[chosen]
        images = as_images(sources.flatten(0, 1))
        names = [data.classes[c] for c in between.classes]
        for axis in row:
            axis.set_axis_off()
        assert images is not None
        for place, image in enumerate(images):
            title = (names[0], "boundary", names[1])[place % 3]
            show_image(row[place], image, title)
    ways = "; ".join(f"{number}: {b.way}" for number, b in enumerate(shown, 1))
    return [
        Picture(
            "border",
            figure,
            "Triples of an input of one class, the point of equal probability on the way, and an "
            f"input of the other class. Rows by how the two were found: {ways}.",
        )
    ]


def _findings(
    data: Sample,
    median: float,
    typical: float,
    length: np.ndarray,
    right: np.ndarray,
    found: list[Between],
    linear: dict[tuple[int, int], tuple[int, int]],
) -> list[Finding]:
    findings = []
    relative = median / max(typical, 1e-30)
    if relative < CLOSE:
        findings.append(
            Finding(
                f"Half of the test samples change their class within {percent(relative)} of the "
                "distance between classes.",
                "Changes too small to see alter the prediction. Where inputs can be chosen by "
                "others or are noisy, train with adversarial examples or noise.",
                0.5,
            )
        )
    elif np.isfinite(relative):
        findings.append(
            Finding(
                f"Half of the test samples are within {percent(relative)} of the distance between "
                "classes of the decision boundary.",
                "That is how much a deliberate change of an input needs; random changes need to be "
                "much larger.",
                0.15,
            )
        )
    finite = np.isfinite(length)
    if (finite & right).sum() >= 20 and (finite & ~right).sum() >= 10:
        near, far = np.median(length[~right]), np.median(length[right])
        if near > 0.8 * far:
            findings.append(
                Finding(
                    f"Wrongly classified test samples are as far from the boundary ({near:.3g}) as "
                    f"right ones ({far:.3g}).",
                    "The errors are not borderline cases: the network is confidently wrong, so "
                    "that a threshold on its confidence will not find them.",
                    0.5,
                )
            )
    if linear:
        (s, t), (count, n) = next(iter(linear.items()))
        if share_interval(count, n)[1][1] < 0.9:
            findings.append(
                Finding(
                    f"The features separate {data.classes[s]} and {data.classes[t]} linearly for "
                    f"{percent(count / n, 2)} of test samples only.",
                    "The last layer cannot repair this: the features need more capacity, data or "
                    "training for these two classes.",
                    0.4,
                )
            )
    return findings
