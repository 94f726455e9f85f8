"""Communication: what the gradients would cost to send, and how much of that is needed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from assay.distributed import (
    Blockwise,
    Cast,
    Compressor,
    Identity,
    LinkModel,
    NaturalCompressor,
    NaturalDithering,
    RandomDithering,
    TopK,
)
from assay.examine.budget import Budget
from assay.examine.differentiable import differentiable, fitting
from assay.examine.panel import Finding, Metric, NotApplicable, Panel, Picture, panel
from assay.examine.sample import Sample
from assay.functional import repeatable, select_parameters
from assay.lab.figures import subplots
from assay.lab.intervals import mean_interval
from assay.lab.numerals import percent
from assay.lab.result import Cell

SIZES = (8, 32, 128, 512)  # samples of a minibatch
USUAL = 32
FEWEST, MOST = 4, 32  # minibatches of a size
WORKERS = 8
LATENCY = 50e-6  # seconds a message: data-centre Ethernet
LINKS = (1, 10, 100)  # Gbit/s
LEVELS = 7  # of dithering: three bits and a sign
DENSITY = 1e-3  # of deep gradient compression
SHARES = {"01pct": 0.001, "1pct": 0.01, "10pct": 0.1}
TIMED = ("fp32", "fp16", "natural", "dgc")
POINTS = 60  # of the energy curve
OVER_BATCHES = "t interval, 95 %, over the minibatches"


@panel(
    "communication",
    title="Communication",
    order=70,
    share=0.5,
    tasks=("classification", "regression", "sequence"),
)
def communication(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """Compressibility of minibatch gradients, and predicted times of a distributed step."""
    with differentiable(model) as net:
        found, compute = _measure(net, data, budget)
    main = next(result for result in found.values() if result.methods)
    size = main.samples
    sent = [_sent(method, main, compute) for method in main.methods.values()]
    return Panel(
        metrics=[*_energy_metrics(main), *_error_metrics(main), *_size_metrics(main, sent)],
        reading=(
            "In data-parallel training each worker sends its gradient at each step. Where few "
            "entries hold most of the energy ‖g‖², sending only those (with error feedback) "
            "loses little; rounding to powers of two costs at most an eighth of variance "
            "whatever the gradient. Compression pays where the link takes longer than the "
            "computation. The times are predictions from counted bytes, not measurements on a "
            "network."
        ),
        method=(
            f"Gradients of the mean loss over minibatches of train samples, in evaluation mode, "
            f"sizes {', '.join(map(str, found))}; figures are of size {size}. Each gradient is "
            "compressed for real and the bytes of the payload are counted; dithering tensor by "
            f"tensor with {LEVELS} levels and the largest magnitude as norm. Step time = "
            f"computation of a minibatch of {size} ({1e3 * compute[size]:.1f} ms) and compression, "
            "both measured on this machine, + the link's time by the α-β model: "
            f"{WORKERS} workers, {1e6 * LATENCY:.0f} µs a message, ring all-reduce of the payload "
            "(all-gather for the sparse one), nothing overlapped."
        ),
        reference={
            "Horváth et al., Natural compression for distributed deep learning (2019)":
                "https://arxiv.org/abs/1905.10988",
            "Lin, Han, Mao, Wang, Dally, Deep gradient compression (2018)":
                "https://arxiv.org/abs/1712.01887",
            "Alistarh, Grubic, Li, Tomioka, Vojnović, QSGD (2017)":
                "https://arxiv.org/abs/1610.02132",
        },
        figures=[_energy_figure(found, size), _time_figure(main, sent, compute[size])],
        tables={
            "Ways to send a gradient": [_row(s) for s in sent],
            f"Predicted time of a step of {WORKERS} workers (ms)": [_times(s) for s in sent],
        },
        findings=_findings(main, sent),
    )  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------


@dataclass
class _Method:
    """A way to send a gradient, and what it did to each minibatch's."""

    label: str
    compressor: Compressor
    gathered: bool = False
    errors: list[float] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class _Size:
    """What was measured at one size of minibatch."""

    samples: int
    numel: int
    methods: dict[str, _Method]
    energies: list[np.ndarray] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    total: Tensor | None = None

    def add(self, gradient: Tensor, generator: torch.Generator) -> None:
        square = float(gradient.double().square().sum())
        self.energies.append(_energy(gradient, self.numel))
        self.norms.append(square)
        self.total = gradient.double() + (0.0 if self.total is None else self.total)
        for method in self.methods.values():
            start = time.perf_counter()
            payload = method.compressor.compress(gradient, generator=generator)
            received = method.compressor.decompress(payload)
            method.seconds.append(time.perf_counter() - start)
            method.bits.append(method.compressor.bits(payload))
            method.errors.append(float((received - gradient).double().square().sum()) / square)


@dataclass(frozen=True)
class _Sent:
    """A method's figures and its predicted times."""

    label: str
    bits: float
    megabytes: float
    error: float
    compression: float
    links: dict[int, float]
    steps: dict[int, float]


def _measure(
    net: nn.Module, data: Sample, budget: Budget
) -> tuple[dict[int, _Size], dict[int, float]]:
    """Gradients of as many minibatches of as many sizes as the time allows."""
    params = select_parameters(net)
    layout = [p.numel() for p in params.values()]
    sizes = [s for s in SIZES if FEWEST * s <= len(data.train)]
    sizes = sizes or [max(1, len(data.train) // FEWEST)]
    usual = max((s for s in sizes if s <= USUAL), default=sizes[0])
    found: dict[int, _Size] = {}
    compute: dict[int, float] = {}
    # The usual size first: the figures are of it, and it alone is compressed.
    for size in [usual, *(s for s in sizes if s != usual)]:
        first = size == usual
        result = _Size(size, sum(layout), _methods(layout) if first else {})
        kept = budget.left * (0.4 if first else 0.5)  # for the other sizes
        seconds = _gradients(net, data, params, result, budget, kept, needed=first)
        if len(seconds) < FEWEST and not first:
            budget.note(f"There was no time for minibatches of {size}.")
            continue
        found[size], compute[size] = result, float(np.median(seconds))
    return dict(sorted(found.items())), compute


def _gradients(
    net: nn.Module,
    data: Sample,
    params: dict[str, nn.Parameter],
    result: _Size,
    budget: Budget,
    kept: float,
    needed: bool,
) -> list[float]:
    """Add gradients of minibatches until `kept` seconds are left; seconds of each."""
    spent: list[float] = []
    longest = 0.0
    for number, (x, y) in enumerate(_minibatches(net, data, result.samples)):
        reserved = kept if number >= FEWEST else 0.0
        if budget.left - reserved < longest and not (needed and number < 2):
            break
        began = budget.spent
        gradient, seconds = budget.timed(lambda x=x, y=y: _gradient(net, data, params, x, y))
        if not bool(gradient.isfinite().all()):
            raise NotApplicable("the gradient of a minibatch is not finite")
        if not float(gradient.norm()) > 0:
            raise NotApplicable("the gradient of a minibatch is zero: there is nothing to send")
        result.add(gradient, data.generator("communication", result.samples, number))
        spent.append(seconds)
        if number > 0:  # the first call compiles kernels
            longest = max(longest, budget.spent - began)
    return spent


def _methods(layout: list[int]) -> dict[str, _Method]:
    def blocks(make: Callable[[], Compressor]) -> Compressor:
        return Blockwise([make() for _ in layout], layout)

    return {
        "fp32": _Method("float32", Identity()),
        "fp16": _Method("float16", Cast(torch.float16)),
        "natural": _Method("natural compression", NaturalCompressor()),
        "natural_dithering": _Method(
            "natural dithering", blocks(lambda: NaturalDithering(LEVELS, math.inf))
        ),
        "random_dithering": _Method(
            "random dithering (QSGD)", blocks(lambda: RandomDithering(LEVELS, math.inf))
        ),
        "dgc": _Method(f"top {percent(DENSITY)} (DGC)", TopK(DENSITY), gathered=True),
    }


def _minibatches(net: nn.Module, data: Sample, size: int) -> list[tuple[Tensor, Tensor]]:
    """Disjoint ones, of samples in random order."""
    generator = data.generator("communication", "minibatches")
    order = torch.randperm(len(data.train), generator=generator)
    found = []
    for index in order.split(size)[: min(MOST, len(order) // size)]:
        part = data.train.select(index)
        y = fitting(net, part.y) if part.y.is_floating_point() else part.y
        found.append((fitting(net, part.x), y))
    return found


def _gradient(
    net: nn.Module, data: Sample, params: dict[str, nn.Parameter], x: Tensor, y: Tensor
) -> Tensor:
    with repeatable(net), torch.enable_grad():
        loss = data.loss_fn(net(x), y)
        try:
            parts = torch.autograd.grad(
                loss, list(params.values()), allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise NotApplicable(f"the loss has no gradient: {reason}") from error
    dense = [part.to_dense() if part.layout != torch.strided else part for part in parts]
    return torch.cat([part.detach().float().reshape(-1) for part in dense]).cpu()


def _energy(gradient: Tensor, numel: int) -> np.ndarray:
    """Share of ‖g‖² in the largest entries, at `_counts`."""
    ordered = gradient.double().square().sort(descending=True).values.cumsum(0)
    return (ordered[_counts(numel) - 1] / ordered[-1]).numpy()


def _counts(numel: int) -> np.ndarray:
    """Numbers of entries on the energy curve; those of the metrics first."""
    named = [math.ceil(share * numel) for share in SHARES.values()]
    curve = np.geomspace(1, numel, POINTS).round().astype(int)
    return np.array([*named, *curve])


def _variance(main: _Size) -> float:
    """The variance tr Σ that the choice of samples makes; 0 for a single minibatch."""
    n = len(main.norms)
    if main.total is None or n < 2:
        return 0.0
    mean_square = float((main.total / n).square().sum())
    return n / (n - 1) * (float(np.mean(main.norms)) - mean_square)


def _sent(method: _Method, main: _Size, compute: dict[int, float]) -> _Sent:
    bits = float(np.mean(method.bits))
    compression = 0.0 if method.label == "float32" else float(np.median(method.seconds))
    links = {}
    for gigabits in LINKS:
        link = LinkModel(1e9 * gigabits, LATENCY)
        # Sparse messages cannot be added on the way: every worker gets every other's.
        links[gigabits] = (
            link.seconds((WORKERS - 1) * bits, WORKERS - 1)
            if method.gathered
            else link.all_reduce(bits, WORKERS)
        )
    steps = {g: compute[main.samples] + compression + seconds for g, seconds in links.items()}
    return _Sent(
        method.label,
        bits / main.numel,
        bits / 8e6,
        float(np.mean(method.errors)),
        compression,
        links,
        steps,
    )


# -- telling -----------------------------------------------------------------------------------


def _batches_of(main: _Size) -> str:
    return f"{len(main.norms)} minibatches of {main.samples}"


def _energy_metrics(main: _Size) -> list[Metric]:
    metrics = []
    energies = np.stack(main.energies)
    for i, (name, share) in enumerate(SHARES.items()):
        mean, interval = mean_interval(energies[:, i])
        metrics.append(
            Metric(
                f"topk_energy_{name}",
                f"Energy in the largest {percent(share)} of the entries",
                mean,
                f"share of ‖g‖², {_batches_of(main)}; {OVER_BATCHES}",
                f"Entries that were all alike would hold {percent(share)}; near 1 means that the "
                "rest "
                "need hardly be sent.",
                _unit(interval),
                unit="share",
            )
        )
    return metrics


def _error_metrics(main: _Size) -> list[Metric]:
    metrics = []
    for name in ("natural", "natural_dithering", "random_dithering"):
        method = main.methods[name]
        mean, interval = mean_interval(np.array(method.errors))
        bits = float(np.mean(method.bits)) / main.numel
        bound = ", at most 1/8 in expectation" if name == "natural" else ""
        metrics += [
            Metric(
                f"{name}_error",
                f"Error of {method.label}",
                mean,
                f"‖C(g) − g‖²/‖g‖², {_batches_of(main)}; {OVER_BATCHES}",
                f"Variance that the compression adds, relative to the gradient's square{bound}; "
                "averaging over workers divides it by their number.",
                interval,
                better="low",
            ),
            Metric(
                f"{name}_bits",
                f"Bits an entry of {method.label}",
                bits,
                f"bytes of real payloads, {_batches_of(main)}",
                "float32 takes 32.",
            ),
        ]
    variance = _variance(main)
    if variance > 0:
        added = np.array(main.methods["natural"].errors) * np.array(main.norms)
        ratio, interval = mean_interval(added / variance)
        metrics.append(
            Metric(
                "natural_added_variance",
                "Variance added by natural compression, in units of the minibatch's own",
                ratio,
                f"E‖C(g) − g‖² over the variance between {_batches_of(main)}; interval of the "
                "numerator",
                "Well below 1: the noise of sampling hides the compression.",
                interval,
                better="low",
            )
        )
    return metrics


def _size_metrics(main: _Size, sent: list[_Sent]) -> list[Metric]:
    by_label = {s.label: s for s in sent}
    metrics = [
        Metric(
            "fp32_megabytes",
            "Gradient in float32",
            4 * main.numel / 1e6,
            f"4 bytes for each of {main.numel:,} trainable parameters",
            "What each worker sends and receives about twice a step without compression.",
            unit="MB",
        )
    ]
    for name in TIMED:
        found = by_label[main.methods[name].label]
        for gigabits, seconds in found.steps.items():
            metrics.append(
                Metric(
                    f"step_{name}_{gigabits}gbit",
                    f"Predicted step, {found.label}, {gigabits} Gbit/s",
                    1e3 * seconds,
                    f"predicted from counted bytes: {WORKERS} workers, {1e6 * LATENCY:.0f} µs a "
                    "message, no overlap; computation and compression as measured here",
                    "Compare the ways to send, not the machines: computation is this machine's.",
                    unit="ms",
                )
            )
    return metrics


def _unit(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (max(0.0, interval[0]), min(1.0, interval[1]))


def _row(sent: _Sent) -> dict[str, Cell]:
    return {
        "method": sent.label,
        "bits an entry": sent.bits,
        "megabytes": sent.megabytes,
        "relative squared error": sent.error,
        "compression here (ms)": 1e3 * sent.compression,
    }


def _times(sent: _Sent) -> dict[str, Cell]:
    row: dict[str, Cell] = {"method": sent.label}
    for gigabits in LINKS:
        row[f"{gigabits} Gbit/s: link"] = 1e3 * sent.links[gigabits]
        row[f"{gigabits} Gbit/s: step"] = 1e3 * sent.steps[gigabits]
    return row


def _energy_figure(found: dict[int, _Size], main: int) -> Picture:
    figure, axes = subplots()
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
    for (size, result), colour in zip(found.items(), colours, strict=False):
        share = _counts(result.numel)[len(SHARES):] / result.numel  # fmt: skip
        curves = np.stack(result.energies)[:, len(SHARES):]  # fmt: skip
        axes.plot(share, curves.mean(0), color=colour, label=f"minibatch of {size}")
        if size == main:
            axes.fill_between(share, curves.min(0), curves.max(0), color=colour, alpha=0.25, lw=0)
    axes.plot(share, share, ":", color="#666666", label="entries all alike")
    axes.set_xscale("log")
    axes.set(xlabel="share of the entries, largest first", ylabel="share of ‖g‖²", ylim=(0, 1.02))
    axes.legend(loc="upper left")
    return Picture(
        "energy",
        figure,
        f"Energy of the gradient in its largest entries: mean over minibatches, and the range for "
        f"minibatches of {main}.",
    )


def _time_figure(main: _Size, sent: list[_Sent], compute: float) -> Picture:
    shown = [main.methods[name].label for name in TIMED]
    sent = [s for s in sent if s.label in shown]
    figure, grid = subplots(1, len(LINKS), width=7.2, height=2.8, sharey=True)
    places = np.arange(len(sent))
    for axes, gigabits in zip(grid, LINKS, strict=True):
        left = np.zeros(len(sent))
        for label, colour, values in (
            ("computation (measured)", "#999999", [compute] * len(sent)),
            ("compression (measured)", "#E69F00", [s.compression for s in sent]),
            ("link (predicted)", "#0072B2", [s.links[gigabits] for s in sent]),
        ):
            widths = 1e3 * np.array(values)
            axes.barh(places, widths, left=left, color=colour, label=label)
            left += widths
        axes.set(xlabel="ms a step", title=f"{gigabits} Gbit/s")
        axes.set_yticks(places, [s.label for s in sent])
        axes.grid(axis="y", visible=False)
    grid[0].invert_yaxis()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return Picture(
        "step-time",
        figure,
        f"Predicted time of a step of {WORKERS} workers, {1e6 * LATENCY:.0f} µs a message, "
        "nothing overlapped.",
    )


def _findings(main: _Size, sent: list[_Sent]) -> list[Finding]:
    by_label = {s.label: s for s in sent}
    plain, natural = (by_label[main.methods[name].label] for name in ("fp32", "natural"))
    findings = []
    before, after = plain.steps[1], natural.steps[1]
    if plain.links[1] > 0.5 * (before - plain.links[1]) and after < 0.9 * before:
        findings.append(
            Finding(
                f"On 1 Gbit/s, {WORKERS} workers would spend "
                f"{percent(plain.links[1] / before, 2)} of a "
                f"step on the link; natural compression is predicted to cut the step from "
                f"{1e3 * before:.3g} to {1e3 * after:.3g} ms.",
                "It adds at most 1/8 of relative variance. A prediction from counted bytes: the "
                "table has the other links.",
                0.2,
            )
        )
    energy = float(np.mean([e[1] for e in main.energies]))
    if energy > 0.5:
        findings.append(
            Finding(
                f"The largest 1 % of the gradient's entries hold {percent(energy, 2)} of its "
                "energy.",
                "Sending only these, with error feedback, would lose little: deep gradient "
                "compression suits this network.",
                0.1,
            )
        )
    return findings
