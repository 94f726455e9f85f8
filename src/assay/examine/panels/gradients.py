"""Gradients: how much the samples agree on where to go, and which ones pull alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from assay.curvature import compute
from assay.examine.budget import Budget
from assay.examine.differentiable import differentiable, fitting, layer_of
from assay.examine.images import as_images, show_image
from assay.examine.panel import Finding, Metric, NotApplicable, Panel, Picture, panel
from assay.examine.sample import Sample, Split
from assay.functional import repeatable
from assay.lab.figures import subplots
from assay.lab.intervals import share_interval
from assay.lab.numerals import number, percent
from assay.lab.result import Cell

FEWEST = 8  # samples
BLOCKS = 32  # of samples, which the bootstrap draws
FEWEST_BLOCKS = 6
NUMBERS = 2**27  # of block gradients held at once
ROWS = 2**25  # numbers of individual gradients held at once
RESAMPLES = 1000
OUTLIERS = 24  # in the table
PICTURES = 18
LAYERS = 16  # in the figure
TOP = 0.01  # share of the samples that count as the top
SURE = 0.9  # confidence with which a label is contradicted
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"

Rows = list[dict[str, Cell]]
Interval = tuple[float, float]


@panel("gradients", title="Gradients", order=20, share=1.0)
def gradients(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """Norms, variance and noise scale of individual gradients; samples that stand out."""
    if len(data.train) < FEWEST:
        raise NotApplicable(f"{len(data.train)} train samples are too few")
    with differentiable(model) as net, repeatable(net):
        measured = _measure(net, data, budget)
    noise = _Noise.of(measured, data)
    outliers = _Outliers.of(measured, data)
    tables: dict[str, Rows] = {
        "Layers": measured.layer_rows(),
        "Samples that stand out": outliers.rows,
    }
    n, size = len(measured.norms), data.sizes.get("train")
    return Panel(
        metrics=[*_norm_metrics(measured, data), *noise.metrics(n), *outliers.metrics()],
        reading=(
            "Every sample pulls the weights in a direction of its own; a step follows the mean of "
            "a batch. The noise scale is the batch size at which noise and signal of that mean are "
            "alike: below it larger batches save steps almost in proportion, far above it they "
            "only cost. It grows as a network fits its data. Samples whose gradients stand out are "
            "hard, rare or wrongly labelled: look at them."
        ),
        method=(
            f"Gradients of the loss of {n:,} train samples one by one, in evaluation mode, "
            f"{measured.engine}. tr Σ is their variance summed over parameters, |G|² the squared "
            "norm of the gradient over "
            + (f"all {size:,} train samples" if size else "all train data")
            + f", without the part that sampling adds. Intervals are from {RESAMPLES} bootstrap "
            f"samples of {len(measured.sizes)} blocks. Samples are ranked by gradient norm times "
            "loss."
        ),
        reference={
            "McCandlish et al., An empirical model of large-batch training (2018)":
                "https://arxiv.org/abs/1812.06162",
            "Dangel, Kunstner, Hennig, BackPACK (2020)": "https://arxiv.org/abs/1912.10985",
        },
        figures=[
            _norm_figure(measured, outliers),
            _layer_figure(measured),
            *noise.figures(),
            *outliers.pictures(),
        ],
        tables=tables,
        findings=[*_norm_findings(measured), *noise.findings(n), *outliers.findings()],
    )  # fmt: skip


# -- individual gradients ----------------------------------------------------------------------


@dataclass
class _Measured:
    """Of every sample the squared norm by layer; of every block of samples the mean gradient."""

    split: Split
    squares: dict[str, Tensor]  # layer -> (N,)
    sizes: list[int]  # samples of the blocks, in order
    means: list[dict[str, Tensor]]  # of the blocks: parameter -> gradient
    population: float  # samples of the train data, infinite if unknown
    engine: str = "without forming them"
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.square = torch.stack(list(self.squares.values())).sum(0)
        self.norms = self.square.sqrt()
        self.block = torch.repeat_interleave(
            torch.arange(len(self.sizes)), torch.tensor(self.sizes)
        )
        layers = {name: layer_of(name) for name in self.means[0]}
        self.gram = {layer: torch.zeros(len(self.sizes), len(self.sizes), dtype=torch.float64)
                     for layer in self.squares}  # fmt: skip
        for name, layer in layers.items():
            rows = torch.stack([mean[name].flatten() for mean in self.means])
            self.gram[layer] += (rows @ rows.T).double().cpu()
        self.means = []  # large, and no longer needed

    def moments(self, weights: Tensor, layer: str | None = None) -> tuple[Tensor, Tensor]:
        """Unbiased |G|² and tr Σ for counts of the blocks, `(R, blocks)`.

        The mean of g_n · g_m over pairs of different samples is |G|² of the distribution; pairs
        of a block with its own copies are left out, so that a resample is unbiased as well. Over
        the train data as a finite population, tr Σ / M has to be added.
        """
        square = self.square if layer is None else self.squares[layer]
        gram = sum(self.gram.values()) if layer is None else self.gram[layer]
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        totals = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, self.block, square)
        second = (weights @ totals) / (weights @ sizes)
        products = torch.as_tensor(gram) * sizes[:, None] * sizes  # of sums, not of means
        own = products.diagonal() - totals
        across = products - torch.diag(products.diagonal())
        pairs = sizes[:, None] * sizes - torch.diag(sizes**2)
        dots = ((weights @ across) * weights).sum(1) + weights @ own
        count = ((weights @ pairs) * weights).sum(1) + weights @ (sizes * (sizes - 1))
        signal = dots / count
        variance = second - signal
        return signal + variance / self.population, variance

    def layer_rows(self) -> Rows:
        one = torch.ones(1, len(self.sizes), dtype=torch.float64)
        total = float(self.moments(one)[1])
        rows: Rows = []
        for layer, square in self.squares.items():
            signal, variance = (float(v) for v in self.moments(one, layer))
            rows.append({
                "layer": layer,
                "mean norm": float(square.sqrt().mean()),
                "share of the variance": variance / total if total > 0 else None,
                "signal |G|²": signal,
                "noise tr Σ": variance,
                "noise scale": variance / signal if signal > 0 else None,
            })  # fmt: skip
        return rows


def _measure(net: nn.Module, data: Sample, budget: Budget) -> _Measured:
    params: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in params.values())
    every = data.draw("train", len(data.train), "gradients")
    x, y = fitting(net, every.x), every.y
    if y.is_floating_point():
        y = y.to(next(iter(params.values())).dtype)
    piece = max(1, min(256, ROWS // max(1, count)))
    individual, engine = _engine(net, data, params, piece, x[:2], y[:2])
    few = min(len(x), 16)
    _, cost = budget.timed(lambda: individual(x[:few], y[:few]))
    n = budget.count(cost / few, min(len(x), FEWEST), len(x), share=0.7)
    if n < len(x):
        budget.note(f"Gradients of {n:,} of {len(x):,} train samples were taken.")
    blocks = max(2, min(BLOCKS, n // 4, max(FEWEST_BLOCKS, NUMBERS // max(1, count))))
    squares: dict[str, list[Tensor]] = {}
    sizes, means = [], []
    for part in torch.arange(n).tensor_split(blocks):
        chosen = part.to(x.device)
        square, mean = individual(x[chosen], y[chosen])
        for layer, values in square.items():
            squares.setdefault(layer, []).append(values.double().cpu())
        means.append(mean)
        sizes.append(len(part))
        if budget.left < 0.1 * budget.seconds and len(sizes) >= 2 and len(sizes) < blocks:
            budget.note(f"Stopped after {sum(sizes):,} of {n:,} samples for want of time.")
            break
    size = data.sizes.get("train")
    split = every.select(torch.arange(sum(sizes)))
    return _Measured(
        split, {layer: torch.cat(parts) for layer, parts in squares.items()}, sizes, means,
        math.inf if size is None else max(size, sum(sizes)), engine, *_answers(data, split),
    )  # fmt: skip


Individual = Callable[[Tensor, Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]]


def _engine(
    net: nn.Module, data: Sample, params: dict[str, Tensor], piece: int, x: Tensor, y: Tensor
) -> tuple[Individual, str]:
    """Squared norms by layer and the mean gradient of samples, in the cheapest way that works."""

    def together(x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        q = compute(net, data.loss_fn, x, y, ["grad", "batch_l2"], chunk_size=piece,
                    params=list(params))  # fmt: skip
        scale = 1.0 if q.reduction == "mean" else 1.0 / len(x)
        mean = {name: scale * g for name, g in q["grad"].items()}
        return _by_layer(q["batch_l2"]), mean

    def one_by_one(x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        squares: dict[str, list[Tensor]] = {name: [] for name in params}
        mean = {name: torch.zeros_like(p) for name, p in params.items()}
        for a, b in zip(x.split(1), y.split(1), strict=True):
            with torch.enable_grad():
                loss = data.loss_fn(net(a), b)
                found = torch.autograd.grad(
                    loss, list(params.values()), allow_unused=True, materialize_grads=True
                )
            for name, g in zip(params, found, strict=True):
                squares[name].append(g.square().sum())
                mean[name] += g / len(x)
        return _by_layer({name: torch.stack(v) for name, v in squares.items()}), mean

    try:
        together(x, y)
        return together, "without forming them (assay.curvature)"
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        pass  # one backward pass a sample works for any loss that is a mean over samples
    try:
        one_by_one(x, y)
    except RuntimeError as error:
        raise NotApplicable(
            f"the loss cannot be differentiated: {str(error).splitlines()[0]}"
        ) from error
    return one_by_one, "with one backward pass each"


def _by_layer(squares: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, values in squares.items():
        layer = layer_of(name)
        found[layer] = found[layer] + values if layer in found else values
    return found


def _answers(data: Sample, split: Split) -> tuple[Tensor, Tensor]:
    """Losses and outputs of the samples, from those of the whole train split."""
    place = {int(i): k for k, i in enumerate(data.train.index.tolist())}
    at = torch.tensor([place[int(i)] for i in split.index.tolist()])
    losses = data.losses("train").cpu().double()[at]
    return losses, data.outputs("train").cpu().double()[at]


# -- norms -------------------------------------------------------------------------------------


def _bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], data: Sample,
               key: str) -> Interval:  # fmt: skip
    """Percentile bootstrap over samples of a statistic along the last dimension."""
    generator = np.random.default_rng(int(torch.randint(2**31, (), generator=data.generator(key))))
    draws = [statistic(values[generator.integers(0, len(values), (50, len(values)))])
             for _ in range(RESAMPLES // 50)]  # fmt: skip
    low, high = np.quantile(np.concatenate(draws), (0.025, 0.975))
    return float(low), float(high)


def _top_share(squares: np.ndarray) -> np.ndarray:
    k = math.ceil(TOP * squares.shape[-1])
    top = np.partition(squares, -k, axis=-1)[..., -k:].sum(-1)
    return np.asarray(top / np.maximum(squares.sum(-1), 1e-300))


def _norm_metrics(measured: _Measured, data: Sample) -> list[Metric]:
    norms, squares = measured.norms.numpy(), measured.square.numpy()
    n = len(norms)
    how = f"{n:,} train samples; bootstrap interval, 95 %"
    return [
        Metric("mean_norm", "Mean norm of a sample's gradient", float(norms.mean()), how,
               "How hard a single sample pulls.",
               _bootstrap(norms, lambda v: v.mean(-1), data, "mean norm")),
        Metric("median_norm", "Median norm", float(np.median(norms)), how,
               "Far below the mean: most samples are fitted, a few pull.",
               _bootstrap(norms, lambda v: np.median(v, -1), data, "median norm")),
        Metric("outlier_share", "Share of the top 1 %", float(_top_share(squares)),
               f"of the sum of squared norms, held by the {math.ceil(TOP * n)} largest of {how}",
               "Near 1 % samples count alike; near 1 a few samples make nearly all gradient noise.",
               _bootstrap(squares, _top_share, data, "top share"), better="low"),
    ]  # fmt: skip


def _norm_findings(measured: _Measured) -> list[Finding]:
    share = float(_top_share(measured.square.numpy()))
    if float(measured.norms.max()) == 0:
        return [
            Finding(
                "Every gradient is exactly zero.",
                "The loss is saturated or the path to the weights is cut: training cannot go on.",
                0.8,
            )
        ]
    if share < 0.3 or len(measured.norms) < 200:
        return []
    return [
        Finding(
            f"1 % of the samples hold {percent(share)} of the squared gradient norms.",
            "Steps follow a few samples: check these first, and consider clipping.",
            min(0.45, 0.1 + share / 3),
        )
    ]


# -- noise -------------------------------------------------------------------------------------


@dataclass
class _Noise:
    """Signal |G|², noise tr Σ and their ratios, each with its interval."""

    signal: tuple[float, Interval | None]
    variance: tuple[float, Interval | None]
    ratio: tuple[float, Interval | None]  # |G|² / tr Σ
    scale: tuple[float, Interval | None] | None  # None where nothing is left of the noise
    resolved: bool

    @classmethod
    def of(cls, measured: _Measured, data: Sample) -> "_Noise":
        blocks = len(measured.sizes)
        one = torch.ones(1, blocks, dtype=torch.float64)
        signal, variance = (float(v) for v in measured.moments(one))
        used = sum(measured.sizes)
        if variance <= 0:
            return cls((signal, None), (variance, None), (0.0, None), None, False)
        if used >= measured.population:  # all of the train data: nothing is estimated
            scale = (variance / signal, None) if signal > 0 else None
            return cls((signal, None), (variance, None), (signal / variance, None), scale, True)
        generator = data.generator("noise scale")
        counts = torch.zeros(RESAMPLES, blocks, dtype=torch.float64)
        places = torch.randint(0, blocks, (RESAMPLES, blocks), generator=generator)
        counts.scatter_add_(1, places, torch.ones_like(counts))
        counts = counts[(counts > 0).sum(1) > 1]  # a single block has no other to be paired with
        signals, variances = (v.numpy() for v in measured.moments(counts))
        # Of a finite population, and with few blocks, the spread of a resample is off by these.
        factor = math.sqrt((1 - used / measured.population) * blocks / (blocks - 1))
        ratios = signals / variances

        def interval(draws: np.ndarray, value: float) -> Interval:
            low, high = np.quantile(value + factor * (draws - value), (0.025, 0.975))
            return min(float(low), value), max(float(high), value)

        ratio = signal / variance
        low, high = interval(ratios, ratio)
        resolved = low > 0
        least = 1 / high if high > 0 else math.inf
        scale = (1 / ratio, (least, 1 / low)) if resolved else (least, (least, math.inf))
        return cls(
            (signal, interval(signals, signal)), (variance, interval(variances, variance)),
            (ratio, (low, high)), scale if math.isfinite(least) else None, resolved,
        )  # fmt: skip

    def metrics(self, n: int) -> list[Metric]:
        how = f"{n:,} train samples; unbiased; bootstrap interval over blocks, 95 %"
        if self.ratio[1] is None:
            how = f"all {n:,} train samples: exact"
        found = [
            Metric("variance", "Variance of the gradients", self.variance[0], f"tr Σ; {how}",
                   "Noise of a step with a single sample; a batch divides it by its size.",
                   self.variance[1]),
            Metric("signal", "Squared norm of the mean gradient", self.signal[0], f"|G|²; {how}",
                   "What is left to learn at this point; near 0 the network is at a stationary "
                   "point. Below 0 it cannot be told from 0.", self.signal[1]),
            Metric("signal_to_noise", "Signal-to-noise ratio", self.ratio[0], f"|G|² / tr Σ; {how}",
                   "Share of a single sample's pull that all have in common, to the rest.",
                   self.ratio[1]),
        ]  # fmt: skip
        if self.scale is not None:
            at_least = "" if self.resolved else " (at least)"
            found.append(
                Metric("noise_scale", f"Simple noise scale{at_least}", self.scale[0],
                       f"tr Σ / |G|²; {how}" + ("" if self.resolved else "; the mean gradient "
                       "cannot be told from zero, so this is the lower end"),
                       "The critical batch size: a batch of so many samples has as much signal as "
                       "noise.", self.scale[1], unit="samples")
            )  # fmt: skip
        return found

    def findings(self, n: int) -> list[Finding]:
        if self.scale is None:
            return []
        if not self.resolved:
            return [
                Finding(
                    f"The mean gradient of {n:,} samples cannot be told from zero: the critical "
                    f"batch size is at least {number(self.scale[0], 2)}.",
                    "The network is near a stationary point of its loss; a smaller step size does "
                    "more now than a larger batch.",
                    0.15,
                )
            ]
        return [
            Finding(
                f"The critical batch size is about {number(self.scale[0], 2)} samples.",
                "Larger batches are worth their cost up to about this size, as far as this point "
                "of training goes.",
                0.1,
            )
        ]

    def figures(self) -> list[Picture]:
        if self.scale is None:
            return []
        figure, axis = subplots(width=5.6, height=3.0)
        middle = self.scale[0]
        batch = np.logspace(-2, 2, 100) * max(middle, 1e-3)
        axis.plot(batch, batch / (batch + middle), color=BLUE)
        if self.scale[1] is not None:
            low, high = self.scale[1]
            least = batch / (batch + high) if math.isfinite(high) else np.zeros_like(batch)
            axis.fill_between(batch, least, batch / (batch + low), color=BLUE, alpha=0.2, lw=0)
        axis.axvline(middle, color=GREY, linestyle="--")
        axis.set_xscale("log")
        axis.set_ylim(0, 1)
        axis.set_xlabel("batch size")
        axis.set_ylabel("progress of a step")
        return [
            Picture(
                "batch-size", figure,
                "Progress of the best step with a batch, as a share of that with the whole "
                "gradient, 1 / (1 + noise scale / batch size); dashed: the critical batch size.",
            )
        ]  # fmt: skip


# -- samples that stand out --------------------------------------------------------------------


@dataclass
class _Outliers:
    """Samples ranked by gradient norm times loss."""

    order: Tensor
    rows: Rows
    suspect: Tensor | None  # labels contradicted with confidence, (N,) bool; classification
    wrong: Tensor | None
    split: Split

    @classmethod
    def of(cls, measured: _Measured, data: Sample) -> "_Outliers":
        score = measured.norms * measured.losses.clamp_min(0)
        order = score.argsort(descending=True, stable=True)
        y, outputs = measured.split.y.cpu(), measured.outputs
        suspect = wrong = None
        describe: Callable[[int], dict[str, Cell]] = partial(_values, y, outputs)
        if data.task == "classification":
            confidence, predicted = outputs.softmax(1).max(1)
            wrong = predicted != y
            suspect = wrong & (confidence > SURE)
            describe = partial(_label, data, y, predicted, confidence)
        elif data.task == "sequence":
            counted = y != getattr(data.loss_fn, "ignore_index", -100)
            misses = (outputs.argmax(1) != y) & counted
            describe = partial(_tokens, counted.sum(1), misses.sum(1))
        middle = float(measured.norms.median())
        rows: Rows = [
            {"index": int(measured.split.index[i]), **describe(i),
             "loss": float(measured.losses[i]), "gradient norm": float(measured.norms[i]),
             "times the median": float(measured.norms[i]) / middle if middle > 0 else None}
            for i in order[:OUTLIERS].tolist()
        ]  # fmt: skip
        return cls(order, rows, suspect, wrong, measured.split)

    def metrics(self) -> list[Metric]:
        if self.suspect is None:
            return []
        share, interval = share_interval(int(self.suspect.sum()), len(self.suspect))
        return [
            Metric("contradicted", "Labels contradicted", share,
                   f"train samples whose label the network contradicts with a confidence above "
                   f"{SURE}; Wilson interval, 95 %",
                   "Candidates for wrong labels; a network that has memorised its labels shows "
                   "none.", interval, better="low")
        ]  # fmt: skip

    def findings(self) -> list[Finding]:
        if self.suspect is None or not self.suspect.any():
            return []
        n, share = int(self.suspect.sum()), float(self.suspect.double().mean())
        return [
            Finding(
                f"{n} of {len(self.suspect):,} train labels are contradicted with a confidence "
                f"above {percent(SURE, 2)}.",
                "Wrong labels are found first among these; the most extreme ones are listed with "
                "their index.",
                min(0.6, 0.2 + 8 * share),
            )
        ]

    def pictures(self) -> list[Picture]:
        top = self.order[:PICTURES]
        images = as_images(self.split.x[top.to(self.split.x.device)])
        if images is None:
            return []
        rows = math.ceil(len(top) / 6)
        figure, axes = subplots(rows, 6, width=7.2, height=1.55 * rows, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, image, row in zip(axes.flat, images, self.rows, strict=False):
            said = (f"{str(row['label'])[:9]} → {str(row['prediction'])[:9]}"
                    if "label" in row else f"loss {row['loss']:.3g}")  # fmt: skip
            show_image(axis, image, f"{said}\nno. {row['index']}")
        return [
            Picture(
                "outliers", figure,
                "The train samples that stand out most: label → prediction, and the place in the "
                "data. Wrong labels gather here, beside rare and hard samples.",
            )
        ]  # fmt: skip


def _label(
    data: Sample, y: Tensor, predicted: Tensor, confidence: Tensor, i: int
) -> dict[str, Cell]:
    return {
        "label": data.classes[int(y[i])],
        "prediction": data.classes[int(predicted[i])],
        "confidence": float(confidence[i]),
    }


def _tokens(counted: Tensor, misses: Tensor, i: int) -> dict[str, Cell]:
    return {"tokens": int(counted[i]), "wrong": int(misses[i])}


def _values(y: Tensor, outputs: Tensor, i: int) -> dict[str, Cell]:
    if y[i].numel() > 1:
        return {"outputs": y[i].numel()}
    return {"target": float(y[i]), "prediction": float(outputs[i])}


# -- figures -----------------------------------------------------------------------------------


def _norm_figure(measured: _Measured, outliers: _Outliers) -> Picture:
    figure, axis = subplots(width=5.6, height=3.0)
    norms = measured.norms.numpy()
    positive = norms[norms > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    low = max(low, high * 1e-12)
    bins = np.logspace(math.log10(low), math.log10(max(high, low * 1.01)) + 1e-9, 40)
    clipped = norms.clip(low, high)
    if outliers.wrong is None:
        axis.hist(clipped, bins=bins, color=BLUE)
    else:
        wrong = outliers.wrong.numpy()
        axis.hist([clipped[~wrong], clipped[wrong]], bins=bins, stacked=True,
                  color=[BLUE, ORANGE], label=["right", "wrong"])  # fmt: skip
        axis.legend(title="prediction")
    axis.set_xscale("log")
    axis.set_xlabel("norm of a sample's gradient")
    axis.set_ylabel("samples")
    return Picture("norms", figure, "Norms of the individual gradients of train samples.")


def _layer_figure(measured: _Measured) -> Picture:
    one = torch.ones(1, len(measured.sizes), dtype=torch.float64)
    total_signal, total = (float(v) for v in measured.moments(one))
    parts = {layer: tuple(float(v) for v in measured.moments(one, layer))
             for layer in measured.squares}  # fmt: skip
    chosen = sorted(parts, key=lambda layer: parts[layer][1])[-LAYERS:]
    shown = [layer for layer in parts if layer in chosen]
    figure, axis = subplots(width=6.4, height=1.1 + 0.3 * len(shown))
    y = np.arange(len(shown))
    noise = [100 * parts[layer][1] / max(total, 1e-300) for layer in shown]
    axis.barh(y - 0.2, noise, 0.4, color=ORANGE, label="noise (tr Σ)")
    if total_signal > 0:
        signal = [100 * max(0.0, parts[layer][0]) / total_signal for layer in shown]
        axis.barh(y + 0.2, signal, 0.4, color=BLUE, label="signal (|G|²)")
    axis.set_yticks(y, [layer if len(layer) <= 28 else f"…{layer[-27:]}" for layer in shown])
    axis.invert_yaxis()
    axis.set_xlabel("% of the network")
    axis.legend()
    return Picture(
        "layers", figure, "Which layers the noise and the signal of the gradient are in."
    )
