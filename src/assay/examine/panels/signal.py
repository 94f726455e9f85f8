"""Initialisation and signal: does a signal get through the layers, and a gradient back?"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from assay.analysis.signal import (
    MANY,
    ModuleSignal,
    PropagationReport,
    Trouble,
    propagation_report,
)
from assay.analysis.spectrum import JacobianOperator, singular_values
from assay.examine.budget import Budget
from assay.examine.differentiable import differentiable, fitting
from assay.examine.panel import Finding, Metric, NotApplicable, Panel, Picture, panel
from assay.examine.sample import Sample
from assay.lab.figures import subplots
from assay.lab.intervals import mean_interval
from assay.lab.result import Cell

MOST = 1024  # samples of the batch
NUMBERS = 2**22  # inputs of a batch, which bounds its memory
PARTS = 8  # smaller batches, for intervals
INPUTS = 24  # at which the Jacobian is taken
DENSE = 32  # outputs up to which all singular values are computed
LEADING = 5  # otherwise so many
ROWS = 60  # of the table
NAMED = 6  # layers in a finding
JUMP = 100.0  # a factor between two layers that is named

Batch = tuple[Tensor, Tensor]


@panel(
    "signal",
    title="Initialisation and signal",
    order=30,
    share=0.5,
    tasks=("classification", "regression", "sequence"),
)
def signal(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """Second moments and gradients layer by layer, dead and saturated units, the Jacobian."""
    with differentiable(model) as net:
        report, parts, samples = _propagation(net, data, budget)
        jacobian = _jacobian(net, data, budget)
    metrics = [*_growth_metrics(report, parts, samples), *_unit_metrics(report, samples)]
    figures = [_layer_figure(report, samples)] if report.layers else []
    if jacobian is not None:
        metrics += _jacobian_metrics(jacobian)
        figures.append(_jacobian_figure(jacobian))
    tables = {"Modules in the order in which they run": _rows(report, budget)}
    if report.advice:
        tables["Advice"] = [{"what was seen": _shown(advice.text)} for advice in report.advice]
    return Panel(
        metrics=metrics,
        reading=(
            "A network that keeps the size of its signal forward and of its gradient backward, "
            "layer by layer, can be trained however deep it is; a constant factor a layer other "
            "than 1 grows to the power of the depth. A unit that is zero for every sample learns "
            "nothing, nor does one on the flat end of a tanh or sigmoid. The singular values of "
            "the input-output Jacobian say how much a small change of the input is stretched."
        ),
        method=(
            f"One forward and one backward pass of {samples} train samples in evaluation mode, "
            "with listeners on every module and on activations called as functions. Growth is "
            "the slope of the logarithm over the layers with weights, in the order in which they "
            f"run; its interval comes from {len(parts)} smaller batches. A unit counts as dead "
            "if it is 0 for all these samples and positions, an output as saturated where the "
            "activation's slope is below 5 % of its steepest."
        ),
        reference={
            "Sun, Optimization for deep learning: theory and algorithms (2019)":
                "https://arxiv.org/abs/1912.08957",
            "Pennington, Schoenholz, Ganguli, Resurrecting the sigmoid in deep learning through "
            "dynamical isometry (2017)": "https://arxiv.org/abs/1711.04735",
        },
        figures=figures,
        tables=tables,
        findings=_findings(report),
    )  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Jacobian:
    """Singular values at some inputs, `(inputs, k)`, descending; mean squares where all are."""

    values: np.ndarray
    mean_square: np.ndarray | None
    shape: tuple[int, int]


def _propagation(
    net: nn.Module, data: Sample, budget: Budget
) -> tuple[PropagationReport, list[PropagationReport], int]:
    most = min(MOST, len(data.train), max(8, NUMBERS // max(1, data.train.x[0].numel())))
    few = min(8, most)
    _report(net, data, _batch(net, data, few, "first"))  # the first call compiles kernels
    _, cost = budget.timed(lambda: _report(net, data, _batch(net, data, few, "first")))
    samples = budget.count(cost / few, min(128, most), most, 0.25)
    if samples < len(data.train):
        budget.note(f"Signals are those of {samples} of {len(data.train)} train samples.")
    report = _report(net, data, _batch(net, data, samples, "signal"))
    size = max(2, min(samples // 2, 64))
    x, y = _batch(net, data, min(PARTS * size, len(data.train)), "parts")
    parts = []
    for part in zip(x.split(size), y.split(size), strict=True):
        if len(part[1]) == size and (len(parts) < 2 or budget.left > 0.5 * budget.seconds):
            parts.append(_report(net, data, part))
    return report, parts, samples


def _batch(net: nn.Module, data: Sample, n: int, key: str) -> Batch:
    chosen = data.draw("train", n, "signal", key)
    y = fitting(net, chosen.y) if chosen.y.is_floating_point() else chosen.y
    return fitting(net, chosen.x), y


def _report(net: nn.Module, data: Sample, batch: Batch) -> PropagationReport:
    try:
        return propagation_report(net, batch, data.loss_fn)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise NotApplicable(f"there is no backward pass through the model: {reason}") from error


def _jacobian(net: nn.Module, data: Sample, budget: Budget) -> _Jacobian | None:
    inputs, _ = _batch(net, data, INPUTS, "jacobian")
    if not inputs.is_floating_point():
        budget.note("The inputs are integers: there is no Jacobian in them.")
        return None
    values, squares = [], []
    shape, longest = (0, 0), 0.0
    for i, x in enumerate(inputs.split(1)):
        if i > 1 and budget.left < 1.5 * longest:
            break
        try:
            operator = JacobianOperator(net, x)
            shape = operator.shape
            found, seconds = budget.timed(lambda on=operator: _singular(on, data))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            budget.note(f"The Jacobian could not be computed: {reason}")
            return None
        if not bool(found.isfinite().all()):
            budget.note("The Jacobian is not finite.")
            return None
        longest = max(longest, seconds)
        values.append(found.cpu().numpy())
        squares.append(float(found.square().sum()) / shape[1])
        if i == 1 and budget.left < longest:
            break
    everything = min(shape) == len(values[0])
    return _Jacobian(np.stack(values), np.array(squares) if everything else None, shape)


def _singular(operator: JacobianOperator, data: Sample) -> Tensor:
    if operator.shape[0] <= DENSE:
        return torch.linalg.svdvals(operator.to_dense().double())
    k = min(LEADING, *operator.shape)
    return singular_values(operator, k, tol=1e-2, generator=data.generator("signal", "lanczos"))


# -- telling -----------------------------------------------------------------------------------


def _shown(text: str) -> str:
    """A name or a sentence of the report without the examination's own wrapper."""
    if text == "model":
        return "(the model itself)"
    return text.removeprefix("model.").replace("'model.", "'")


def _growth_metrics(
    report: PropagationReport, parts: list[PropagationReport], samples: int
) -> list[Metric]:
    metrics = []
    for name, label, value, draws, reading in (
        (
            "forward_growth",
            "Growth of the signal",
            report.forward_growth,
            [part.forward_growth for part in parts],
            "0 keeps the mean square of the activations from layer to layer; −1 divides it by "
            "2.7 at each layer, +1 multiplies it.",
        ),
        (
            "backward_growth",
            "Growth of the gradient towards the output",
            report.backward_growth,
            [part.backward_growth for part in parts],
            "0 keeps the gradient's norm on its way back; positive: it vanishes towards the "
            "input, negative: it explodes.",
        ),
    ):
        if not math.isfinite(value):
            continue
        finite = np.array([draw for draw in draws if math.isfinite(draw)])
        interval = mean_interval(finite)[1] if len(finite) > 1 else None
        if interval is not None:  # around the figure of the large batch
            half = (interval[1] - interval[0]) / 2
            interval = (value - half, value + half)
        what = "log mean square" if name == "forward_growth" else "log ‖δ‖"
        metrics.append(
            Metric(
                name,
                label,
                value,
                f"slope of {what} over {len(report.layers)} layers with weights, {samples} "
                f"samples; width of the t interval, 95 %, from {len(finite)} smaller batches",
                reading,
                interval,
                unit="a layer",
            )
        )
    return metrics


def _unit_metrics(report: PropagationReport, samples: int) -> list[Metric]:
    metrics = []
    dead = [m for m in report.modules if m.dead is not None]
    if dead:
        worst = max(dead, key=lambda m: m.dead or 0.0)
        metrics.append(
            Metric(
                "dead_share",
                "Dead units in the worst layer",
                worst.dead or 0.0,
                f"share of the units of {_shown(worst.name)} that are 0 on all {samples} samples, "
                "counted",
                "A unit that is zero for every input passes no gradient on. A sample too small "
                "to wake a unit counts it as dead: an upper bound.",
                unit="share",
                better="low",
            )
        )
    saturated = [m for m in report.modules if m.saturated is not None]
    if saturated:
        worst = max(saturated, key=lambda m: m.saturated or 0.0)
        metrics.append(
            Metric(
                "saturated_share",
                "Saturated outputs in the worst layer",
                worst.saturated or 0.0,
                f"share of the outputs of {_shown(worst.name)} where the slope is below 5 % of "
                f"the steepest, {samples} samples, counted",
                "Saturated activations hold the gradient back; gates of recurrent cells may well "
                "be.",
                unit="share",
                better="low",
            )
        )
    return metrics


def _jacobian_metrics(found: _Jacobian) -> list[Metric]:
    n = len(found.values)
    rows, columns = found.shape
    method = (
        f"Jacobian of {rows} outputs in {columns:,} inputs at {n} train samples; t interval, "
        "95 %, over the samples"
    )
    mean, interval = mean_interval(found.values[:, 0])
    metrics = [
        Metric(
            "jacobian_norm",
            "Largest singular value of the Jacobian",
            mean,
            method,
            "A change of the input moves the outputs by at most so many times its length, to "
            "first order.",
            interval,
        )
    ]
    if found.mean_square is not None:
        mean, interval = mean_interval(found.mean_square)
        metrics.append(
            Metric(
                "jacobian_mean_square",
                "Mean gain of a random change of the input",
                mean,
                f"‖J‖²_F by the number of inputs; {method}",
                "The factor by which the square of a random direction grows on its way through.",
                interval,
            )
        )
        smallest = found.values[:, -1]
        if found.values.shape[1] > 1 and bool((smallest > 0).all()):
            logs = np.log10(found.values[:, 0] / smallest)
            mean, interval = mean_interval(logs)
            metrics.append(
                Metric(
                    "jacobian_log_condition",
                    "Spread of the Jacobian's singular values",
                    mean,
                    f"log₁₀ of the largest over the smallest; {method}",
                    "0: all directions of the output are reached alike (dynamical isometry); "
                    "large: some are hardly reached.",
                    interval,
                )
            )
    return metrics


def _growth(report: PropagationReport) -> dict[str, float]:
    """By layer with weights: its output's root mean square over that of the layer before."""
    heard = [m for m in report.layers if 0 < m.second_moment < math.inf]
    return {
        m.name: math.sqrt(m.second_moment / before.second_moment)
        for before, m in itertools.pairwise(heard)
    }


def _rows(report: PropagationReport, budget: Budget) -> list[dict[str, Cell]]:
    growth = _growth(report)
    shown = report.modules
    if len(shown) > ROWS:
        # What can be at fault: layers with weights, and activations.
        telling = [m for m in shown if m.has_weights or (m.dead or m.saturated or 0) > 0]
        shown = tuple(telling[:ROWS])
        budget.note(f"The table shows {len(shown)} of {len(report.modules)} modules.")
    return [
        {
            "module": _shown(m.name),
            "kind": m.kind,
            "root mean square": _plain(math.sqrt(m.second_moment)),
            "growth": _plain(growth.get(m.name)),
            "gradient norm": _plain(m.gradient_norm),
            "dead": m.dead,
            "saturated": m.saturated,
        }
        for m in shown
    ]


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _layer_figure(report: PropagationReport, samples: int) -> Picture:
    layers = report.layers
    places = np.arange(len(layers))
    figure, (left, right) = subplots(
        1, 2, width=7.0, height=min(8.0, max(2.6, 1.2 + 0.2 * len(layers))), sharey=True
    )
    for axes, colour, label, values in (
        (left, "#0072B2", "root mean square of the output",
         [math.sqrt(m.second_moment) for m in layers]),
        (right, "#D55E00", "norm of the gradient there", [m.gradient_norm for m in layers]),
    ):  # fmt: skip
        kept = [(p, v) for p, v in zip(places, values, strict=True) if 0 < v < math.inf]
        axes.set_xscale("log")
        if kept:
            at, v = zip(*kept, strict=True)
            axes.plot(v, at, "o-", color=colour, markersize=4, linewidth=1.2)
            # At least two decades, so that small differences do not look like large ones.
            middle = math.sqrt(min(v) * max(v))
            axes.set_xlim(min(min(v) / 1.5, middle / 10), max(max(v) * 1.5, middle * 10))
        lost = [p for p, v in zip(places, values, strict=True) if not 0 < v < math.inf]
        if lost:
            edge = axes.get_xlim()[0]
            axes.plot([edge] * len(lost), lost, "x", color="#000000", label="none", clip_on=False)
            axes.legend()
        axes.set_xlabel(label)
    every = max(1, math.ceil(len(layers) / 34))
    left.set_yticks(places[::every], [_short(_shown(m.name)) for m in layers[::every]])
    left.set_ylim(len(layers) - 0.5, -0.5)
    return Picture(
        "layers",
        figure,
        f"Size of the signal and of the loss's gradient at each layer with weights, input on top, "
        f"{samples} train samples.",
    )


def _short(name: str, length: int = 26) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def _jacobian_figure(found: _Jacobian) -> Picture:
    figure, axes = subplots(height=3.0)
    rank = np.arange(1, found.values.shape[1] + 1)
    for row in found.values:
        axes.semilogy(rank, np.where(row > 0, row, np.nan), color="#0072B2", alpha=0.3, lw=1)
    median = np.median(found.values, axis=0)
    axes.semilogy(rank, np.where(median > 0, median, np.nan), "o-", color="#000000",
                  markersize=4, label="median")  # fmt: skip
    axes.axhline(1, color="#D55E00", linestyle="--", linewidth=1, label="isometry")
    axes.set(xlabel="number of the singular value", ylabel="singular value")
    if len(rank) <= 20:
        axes.set_xticks(rank)
    axes.legend()
    return Picture(
        "jacobian",
        figure,
        f"Singular values of the input-output Jacobian at {len(found.values)} train samples, a "
        "line each.",
    )


_SEVERITY: dict[Trouble, float] = {
    "overflow": 0.95,
    "no gradient": 0.85,
    "vanishing gradient": 0.7,
    "silent": 0.7,
    "exploding gradient": 0.6,
    "vanishing signal": 0.6,
    "exploding signal": 0.6,
    "dead": 0.5,
    "saturated": 0.5,
}


def _findings(report: PropagationReport) -> list[Finding]:
    findings = []
    for advice in report.advice:
        text, _, why = _shown(advice.text).partition(". ")
        if advice.kind == "dead":
            text += _others([m for m in report.modules if (m.dead or 0) >= MANY])
        if advice.kind == "saturated":
            text += _others([m for m in report.modules if (m.saturated or 0) >= MANY])
        findings.append(Finding(text.rstrip(".") + ".", why or _LOST, _SEVERITY[advice.kind]))
    findings += _jumps(report)
    return sorted(findings, key=lambda finding: -finding.severity)[:4]


_LOST = "What comes behind learns nothing of the input."


def _others(modules: list[ModuleSignal]) -> str:
    if len(modules) < 2:
        return ""
    names = ", ".join(_shown(m.name) for m in modules[:NAMED])
    return f" (in all: {names}{', …' if len(modules) > NAMED else ''})"


def _jumps(report: PropagationReport) -> list[Finding]:
    """Single layers behind which the signal is very much smaller or larger, and stays so."""
    heard = [m for m in report.layers if 0 < m.second_moment < math.inf]
    sizes = [math.sqrt(m.second_moment) for m in heard]
    findings = []
    for i in range(1, len(heard)):
        before, after = sizes[i - 1], sizes[i:]
        if max(after) < before / JUMP * 10 and after[0] < before / JUMP:
            happens = "vanishes"
        elif min(after) > before * JUMP / 10 and after[0] > before * JUMP:
            happens = "explodes"
        else:
            continue
        name = f"{_shown(heard[i].name)!r} ({heard[i].kind})"
        findings.append(
            Finding(
                f"The signal {happens} at {name}: the root mean square goes from {before:.2g} to "
                f"{after[0]:.2g}.",
                "The weights of this single layer are out of proportion: look at its "
                "initialisation, its learning rate, or a scale that the input needs.",
                0.5,
            )
        )
    return findings
