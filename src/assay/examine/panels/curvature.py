"""Curvature: how sharp the loss is around the weights, in which directions, and why."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from assay.curvature import directional_curvature
from assay.examine.budget import Budget
from assay.examine.differentiable import differentiable, fitting, layer_of
from assay.examine.panel import Finding, Metric, NotApplicable, Panel, Picture, panel
from assay.examine.sample import Sample
from assay.functional import (
    GGNOperator,
    HessianOperator,
    LossOperator,
    ScaledOperator,
    SpectralDensity,
    SymmetricOperator,
    hutchinson_block_draws,
    lanczos,
    spectral_density,
)
from assay.lab.figures import subplots
from assay.lab.intervals import jackknife_interval, mean_interval
from assay.lab.numerals import percent
from assay.lab.result import Cell

FEWEST, MOST = 2, 2048  # samples
PRODUCTS = 120  # that a fair measurement takes; the number of samples is chosen by it
NEEDED = 24  # without which there is nothing to say
PARTS = 8  # of the sample, for what varies between samples
SHOWN = 5  # eigenvalues in the table
LAYERS = 40  # in the table
PROBES = 8  # of each spectral density, at most
FEWEST_STEPS = 10  # of a probe
MEMORY = 1.5e9  # bytes of a Lanczos basis
NUMBERS = 2**22  # inputs of a batch, which bounds the memory of a product

Batch = tuple[Tensor, Tensor]
OVER_PARTS = "t interval, 95 %, over {} parts of the samples"


@panel(
    "curvature",
    title="Curvature",
    order=40,
    share=2.5,
    tasks=("classification", "regression", "sequence"),
)
def curvature(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """Spectrum, trace and directions of the Hessian of the loss on train samples."""
    with differentiable(model) as net:
        study = _Study.begun(net, data, budget)
        sharpest = study.extremes()
        relative = study.relative()
        gradient = study.along_gradient()
        layers = study.layers(sharpest)
        between = study.between_samples(sharpest)
        densities = study.densities()
    metrics = [
        *_sharpness_metrics(study, sharpest, between),
        *_relative_metrics(study, relative),
        *_gradient_metrics(study, gradient),
        *_trace_metrics(study, layers),
        *_density_metrics(study, densities),
    ]
    tables: dict[str, list[dict[str, Cell]]] = {"Outermost eigenvalues": sharpest.rows()}
    if directions := _direction_rows(gradient, between):
        tables["Curvature along two directions, and its two parts"] = directions
    tables["Layers"] = layers.rows()
    return Panel(
        metrics=metrics,
        reading=(
            "Eigenvalues of the Hessian say how fast the loss rises along its own directions: few "
            "large ones stand apart from a bulk at zero in most trained networks. The "
            "Gauss-Newton part comes from the loss's own curvature and is never negative for the "
            "usual losses; the residual comes from the network's second derivative and carries "
            "all negative curvature. Sharpness in this sense is not a property of the function: "
            "multiplying one layer of a ReLU network by a and dividing the next by a leaves every "
            "output alone and changes the eigenvalues. Compare networks by the invariant "
            "sharpness, which such rescalings leave as it is."
        ),
        method=(
            f"{study.kind} of the mean loss over {study.samples} train samples, in evaluation "
            "mode, through exact products with vectors; nothing is formed as a matrix. "
            "Outermost eigenvalues by Lanczos' method with full reorthogonalisation, their "
            "intervals from the residuals; the trace by Hutchinson's random signs; densities by "
            "stochastic Lanczos quadrature. The invariant sharpness is the largest eigenvalue of "
            "D∇²L D with D the weights' magnitudes."
        ),
        reference={
            "Ghorbani, Krishnan, Xiao, Neural net optimization via Hessian eigenvalue density "
            "(2019)": "https://arxiv.org/abs/1901.10159",
            "Littwin, Wolf, On the convex behavior of deep neural networks (2020)":
                "https://arxiv.org/abs/2001.04878",
            "Dinh, Pascanu, Bengio, Bengio, Sharp minima can generalize for deep nets (2017)":
                "https://arxiv.org/abs/1703.04933",
            "Kwon, Kim, Park, Choi, ASAM: adaptive sharpness (2021)":
                "https://arxiv.org/abs/2102.11600",
            "Cohen et al., Gradient descent typically occurs at the edge of stability (2021)":
                "https://arxiv.org/abs/2103.00065",
        },
        figures=_figures(study, densities, sharpest),
        tables={name: rows for name, rows in tables.items() if rows},
        findings=_findings(study, sharpest, relative, gradient, layers, densities),
    )  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Along:
    """Curvature along one direction on each part of the sample; parts None without a Hessian."""

    total: np.ndarray
    gauss_newton: np.ndarray
    residual: np.ndarray | None


@dataclass(frozen=True)
class _Extremes:
    """Ritz values, ascending, with their residuals, and the vector of the largest."""

    values: np.ndarray
    errors: np.ndarray
    steps: int
    vector: Tensor

    @property
    def top(self) -> float:
        return float(self.values[-1])

    @property
    def interval(self) -> tuple[float, float]:
        return self.top - float(self.errors[-1]), self.top + float(self.errors[-1])

    def rows(self) -> list[dict[str, Cell]]:
        # Only what has converged: inner Ritz values are no eigenvalues.
        good = self.errors <= 0.05 * np.abs(self.values).max()
        order = [i for i in range(len(self.values) - 1, -1, -1) if good[i]]
        shown = order[:SHOWN] + [i for i in order[SHOWN:] if i == 0]
        return [
            {"eigenvalue": float(self.values[i]), "residual bound ±": float(self.errors[i])}
            for i in shown
        ]


@dataclass(frozen=True)
class _Layers:
    """What each layer has of the parameters, the sharpest direction and the trace."""

    names: list[str]
    numel: np.ndarray
    share: np.ndarray
    draws: np.ndarray | None

    def rows(self) -> list[dict[str, Cell]]:
        rows = []
        for i in sorted(np.argsort(-self.share)[:LAYERS]):
            row: dict[str, Cell] = {
                "layer": self.names[i],
                "parameters": int(self.numel[i]),
                "share of the parameters": float(self.numel[i] / self.numel.sum()),
                "share of the sharpest direction": float(self.share[i]),
            }
            if self.draws is not None:
                trace, interval = mean_interval(self.draws[:, i])
                row["trace"] = trace
                if interval is not None:
                    row["± (95 %)"] = (interval[1] - interval[0]) / 2
            rows.append(row)
        return rows


@dataclass
class _Study:
    """The operators on the chosen samples, and what a product with them costs."""

    net: nn.Module
    data: Sample
    budget: Budget
    operator: LossOperator
    batches: list[Batch]
    samples: int
    cost: float

    @classmethod
    def begun(cls, net: nn.Module, data: Sample, budget: Budget) -> "_Study":
        """Find which products the model allows, and how many samples the time allows."""
        most = min(MOST, len(data.train))
        n = min(64, most)
        batches = _batches(net, data, n)
        kind = _working_operator(net, data, batches, budget)
        shrunk = False
        while True:
            operator = kind(net, data.loss_fn, batches)
            vector = _signs(operator, data)
            cost = budget.timed(lambda on=operator, v=vector: on @ v)[1]
            if n > FEWEST and NEEDED * cost > budget.left:
                n, shrunk = n // 2, True
            elif not shrunk and n < most and 2 * PRODUCTS * cost < 0.9 * budget.left:
                n = min(2 * n, most)
            else:
                break
            batches = _batches(net, data, n)
        if NEEDED * cost > 1.4 * budget.left + 2:
            raise NotApplicable(
                f"a product with the Hessian of {n} samples takes {cost:.1f} s, and at least "
                f"{NEEDED} are needed: give a budget in which this panel gets "
                f"{2 * NEEDED * cost:.0f} s"
            )
        if n < len(data.train):
            budget.note(f"Curvature is that of {n} of {len(data.train)} train samples.")
        return cls(net, data, budget, operator, batches, n, cost)

    @property
    def exact(self) -> bool:
        """Whether products are with the Hessian itself."""
        return isinstance(self.operator, HessianOperator)

    @property
    def kind(self) -> str:
        return "Hessian" if self.exact else "Gauss-Newton matrix"

    def affords(self, products: float, what: str, essential: bool = False) -> bool:
        """Whether there is time for so many products; a note if not."""
        # What the panel promises may go a little over: it is stopped only well beyond its time.
        over = 1 + 1.2 * self.budget.seconds - self.budget.spent
        if products * self.cost <= (over if essential else self.budget.left):
            return True
        self.budget.note(f"The time did not suffice for {what}.")
        return False

    def steps(self, share: float, most: int = 40) -> int:
        """Lanczos steps for a share of the time left, bounded by memory."""
        most = max(2, min(most, int(MEMORY / (8 * self.operator.numel))))
        return self.budget.count(self.cost, min(5, most), most, share)

    def spectrum(self, operator: SymmetricOperator, steps: int, key: str) -> _Extremes:
        found = lanczos(operator, steps, generator=self.data.generator("curvature", key))
        values, vectors = found.eigh()
        # Products are rounded to the model's precision: no interval is narrower than that.
        rounding = torch.finfo(operator.dtype).eps * float(values.abs().max())
        errors = found.residual * vectors[-1].abs() + rounding
        top = vectors[:, -1].to(found.basis) @ found.basis
        return _Extremes(values.numpy(), errors.numpy(), len(values), top.to(operator.dtype))

    def extremes(self) -> _Extremes:
        steps = self.steps(0.25)
        found, seconds = self.budget.timed(lambda: self.spectrum(self.operator, steps, "lanczos"))
        self.cost = max(self.cost, seconds / found.steps)  # with what orthogonality costs
        return found

    def between_samples(self, sharpest: _Extremes) -> _Along | None:
        """Curvature along the sharpest direction, on each part of the sample."""
        if not self.affords(4, "what varies of the largest eigenvalue between samples"):
            return None
        return self.along(sharpest.vector)

    def along_gradient(self) -> _Along | None:
        """Curvature along the gradient; None without time, or where the gradient is zero."""
        if not self.affords(5, "the curvature along the gradient", essential=True):
            return None
        gradient = self.operator.gradient()
        if not float(gradient.norm()) > 0:
            self.budget.note("The gradient is zero: there is no curvature along it.")
            return None
        return self.along(gradient / gradient.norm())

    def along(self, direction: Tensor) -> _Along:
        """Curvature along a unit vector on each part of the sample, at most a batch of it."""
        x, y = (torch.cat(tensors) for tensors in zip(*self.batches, strict=True))
        count, size = min(PARTS, self.samples), len(self.batches[0][0])
        parts = [
            (inputs[:size], targets[:size])
            for inputs, targets in zip(x.tensor_split(count), y.tensor_split(count), strict=True)
        ]
        net, loss_fn = self.net, self.data.loss_fn
        if not self.exact:
            forms = [direction @ (GGNOperator(net, loss_fn, part) @ direction) for part in parts]
            gauss_newton = np.array([float(form) for form in forms])
            return _Along(gauss_newton, gauss_newton, None)
        found = [directional_curvature(net, loss_fn, part, direction=direction) for part in parts]
        return _Along(
            np.array([f.total for f in found]),
            np.array([f.gauss_newton for f in found]),
            np.array([f.residual for f in found]),
        )

    def relative(self) -> _Extremes | None:
        """The spectrum in relative changes of the weights."""
        if not self.affords(5, "the invariant sharpness", essential=True):
            return None
        weights = self.operator.layout.flatten(self.operator.params)
        scaled = ScaledOperator(self.operator, weights.detach().abs())
        return self.spectrum(scaled, self.steps(0.25), "relative")

    def layers(self, sharpest: _Extremes) -> _Layers:
        layout = self.operator.layout
        owners: dict[str, list[int]] = {}
        for i, name in enumerate(layout.names):
            owners.setdefault(layer_of(name), []).append(i)
        sizes = [shape.numel() for shape in layout.shapes]
        squares = np.array([float(p.square().sum()) for p in sharpest.vector.split(sizes)])
        draws = None
        if self.affords(4, "the trace", essential=True):
            probes = self.budget.count(self.cost, 4, 64, 0.25)
            generator = self.data.generator("curvature", "trace")
            by_tensor = hutchinson_block_draws(
                self.operator, sizes, probes=probes, generator=generator
            ).double()
            draws = np.stack([by_tensor[:, i].sum(1).cpu().numpy() for i in owners.values()], 1)
        if len(owners) > LAYERS:
            self.budget.note(f"The table shows {LAYERS} of {len(owners)} layers.")
        return _Layers(
            list(owners),
            np.array([sum(sizes[i] for i in group) for group in owners.values()]),
            np.array([squares[group].sum() for group in owners.values()]) / squares.sum(),
            draws,
        )

    def densities(self) -> dict[str, SpectralDensity]:
        """Of the Hessian and its Gauss-Newton part, a probe at a time while there is time."""
        operators: dict[str, LossOperator] = {self.kind: self.operator}
        if self.exact:
            operators["Gauss-Newton part"] = GGNOperator(self.net, self.data.loss_fn, self.batches)
        fewest = 3 * len(operators)  # probes: less gives no interval
        if not self.affords(fewest * FEWEST_STEPS, "the spectral density"):
            return {}
        most = min(48, int(MEMORY / (8 * self.operator.numel)))
        most = max(FEWEST_STEPS, most)
        steps = self.budget.count(fewest * self.cost, FEWEST_STEPS, most, 0.85)
        generators = {name: self.data.generator("curvature", name) for name in operators}
        found: dict[str, list[SpectralDensity]] = {name: [] for name in operators}
        longest = 0.0
        for probe in range(PROBES):
            for name, operator in operators.items():
                if self.budget.left < (1.2 * longest if probe >= 3 else 1e-9) and probe > 0:
                    break
                one, seconds = self.budget.timed(
                    lambda on=operator, g=generators[name]:
                        spectral_density(on, probes=1, steps=steps, generator=g)
                )  # fmt: skip
                longest = max(longest, seconds)
                found[name].append(one)
        return {name: SpectralDensity.pooled(parts) for name, parts in found.items()}


def _batches(net: nn.Module, data: Sample, n: int) -> list[Batch]:
    chosen = data.draw("train", n, "curvature")
    size = _batch_size(chosen.x)
    y = chosen.y if not chosen.y.is_floating_point() else fitting(net, chosen.y)
    return list(zip(fitting(net, chosen.x).split(size), y.split(size), strict=True))


def _batch_size(x: Tensor) -> int:
    return min(256, max(4, NUMBERS // max(1, x[0].numel())))


def _signs(operator: LossOperator, data: Sample) -> Tensor:
    generator = data.generator("curvature", "timing")
    signs = 2 * torch.randint(2, (operator.numel,), generator=generator) - 1
    return signs.to(operator.dtype).to(operator.device)


def _working_operator(
    net: nn.Module, data: Sample, batches: list[Batch], budget: Budget
) -> Callable[..., LossOperator]:
    """The Hessian's class, or the Gauss-Newton matrix's where two derivatives cannot be had."""
    reasons = []
    few = [(batches[0][0][:2], batches[0][1][:2])]
    for kind in (HessianOperator, GGNOperator):
        try:
            operator = kind(net, data.loss_fn, few)
            product = operator @ _signs(operator, data)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reasons.append(str(error).strip().partition("\n")[0] or type(error).__name__)
            continue
        if bool(product.isfinite().all()):
            if reasons:
                budget.note(
                    "The model cannot be differentiated twice "
                    f"({reasons[0]}): everything is of the Gauss-Newton matrix, not the Hessian."
                )
            return kind
        reasons.append("its derivatives are not finite")
    raise NotApplicable(f"there are no products with the Hessian of this model: {reasons[0]}")


# -- telling -----------------------------------------------------------------------------------


def _sharpness_metrics(study: _Study, found: _Extremes, between: _Along | None) -> list[Metric]:
    method = f"Lanczos, {found.steps} products, {study.samples} samples"
    top, (low, high) = found.top, found.interval
    metrics = [
        Metric(
            "top_eigenvalue",
            f"Largest eigenvalue of the {study.kind}",
            top,
            f"{method}; the interval is the residual's bound on an eigenvalue of these samples",
            "How fast the loss rises along its sharpest direction. It changes when layers are "
            "rescaled, though the function does not: do not compare architectures by it.",
            (low, high),
        )
    ]
    if between is not None and len(between.total) > 1:
        n = len(between.total)
        mean, interval = mean_interval(between.total)
        metrics.append(
            Metric(
                "top_eigenvalue_between_samples",
                "Curvature along the sharpest direction, between samples",
                mean,
                f"the sharpest direction held fixed; {OVER_PARTS.format(n)}",
                "Its interval says how far the largest eigenvalue depends on which samples "
                "were taken.",
                interval,
            )
        )
    if low > 0:
        metrics.append(
            Metric(
                "max_lr",
                "Largest stable learning rate of plain gradient descent",
                2 / top,
                f"2/λ_max, {method}; interval from the residual",
                "Above it full-batch gradient descent without momentum leaves a minimum of this "
                "curvature. Read it with care: momentum β allows (1 + β) times as much, Adam and "
                "BatchNorm in training mode have limits of their own, and networks train at the "
                "edge of it.",
                (2 / high, 2 / low),
            )
        )
    if study.exact:
        metrics.append(
            Metric(
                "smallest_eigenvalue",
                "Smallest eigenvalue of the Hessian",
                float(found.values[0]),
                f"{method}; interval from the residual",
                "Negative: there is a direction in which the loss curves downwards, so this is "
                "no minimum of the loss on these samples.",
                (float(found.values[0] - found.errors[0]),
                 float(found.values[0] + found.errors[0])),
            )
        )  # fmt: skip
    return metrics


def _relative_metrics(study: _Study, found: _Extremes | None) -> list[Metric]:
    if found is None:
        return []
    return [
        Metric(
            "invariant_sharpness",
            "Sharpness that rescaling leaves alone",
            found.top,
            f"largest eigenvalue of D∇²L D, D the weights' magnitudes; Lanczos, {found.steps} "
            f"products, {study.samples} samples; interval from the residual",
            "If each weight changes by a share of itself, and the squares of the shares add up to "
            "ρ², the loss rises by at most half of this times ρ² to second order. No rescaling of "
            "layers or neurons that keeps the function changes it.",
            found.interval,
        )
    ]


def _gradient_metrics(study: _Study, along: _Along | None) -> list[Metric]:
    if along is None:
        return []
    n = len(along.total)
    method = f"curvature along the gradient over {study.samples} samples; {OVER_PARTS.format(n)}"
    ggn = Metric(
        "gradient_curvature_ggn",
        "Its Gauss-Newton part",
        *_mean(along.gauss_newton, method),
        "From the curvature of the loss in the outputs; never negative for the usual losses.",
        _interval(along.gauss_newton),
    )
    if along.residual is None:
        return [ggn]
    return [
        Metric(
            "gradient_curvature",
            "Curvature along the gradient",
            *_mean(along.total, method),
            "How fast the slope changes along the step that gradient descent takes. Negative: the "
            "loss falls faster and faster there.",
            _interval(along.total),
        ),
        ggn,
        Metric(
            "gradient_curvature_residual",
            "Its residual part",
            *_mean(along.residual, method),
            "From the network's own second derivative: what Gauss-Newton methods leave out. Near "
            "zero: along the gradient the network is as convex as its loss.",
            _interval(along.residual),
        ),
    ]


def _mean(draws: np.ndarray, method: str) -> tuple[float, str]:
    return float(draws.mean()), method


def _interval(draws: np.ndarray) -> tuple[float, float] | None:
    return mean_interval(draws)[1]


def _trace_metrics(study: _Study, layers: _Layers) -> list[Metric]:
    if layers.draws is None:
        return []
    trace, interval = mean_interval(layers.draws.sum(1))
    return [
        Metric(
            "trace",
            f"Trace of the {study.kind}",
            trace,
            f"Hutchinson, {len(layers.draws)} random sign vectors, {study.samples} samples; t "
            "interval, 95 %, over the vectors",
            "Sum of all eigenvalues: half of it times σ² is what noise of standard deviation σ "
            "on every weight adds to the loss. Not invariant under rescaling either.",
            interval,
        )
    ]


def _density_metrics(study: _Study, densities: dict[str, SpectralDensity]) -> list[Metric]:
    density = densities.get(study.kind)
    if density is None or not np.nanmax(np.abs(density.nodes)) > 0:
        return []
    probes, steps = density.nodes.shape
    method = (
        f"stochastic Lanczos quadrature, {probes} probes of {steps} steps, {study.samples} "
        "samples; jackknife interval, 95 %, over the probes"
    )
    magnitude = density.draws(np.abs)
    metrics = []
    negative = _negative(density) if study.exact else None
    if negative is not None:
        share, interval = negative
        metrics.append(
            Metric(
                "negative_share",
                "Share of negative curvature",
                share,
                f"Σ|λ| over the negative eigenvalues as a share of Σ|λ|; {method}",
                "0 at a minimum, ½ where as much curves down as up, as at random weights.",
                _clipped(interval, 0.0, 1.0),
                unit="share",
            )
        )
    moments = np.stack([magnitude, density.draws(np.square)], 1)
    rank, interval = jackknife_interval(
        lambda m: density.numel * m[:, 0].mean() ** 2 / m[:, 1].mean(), moments
    )
    metrics.append(
        Metric(
            "effective_rank",
            "Effective number of curved directions",
            rank,
            f"(Σ|λ|)²/Σλ²; {method}",
            f"As many equal eigenvalues would have the same two sums, out of "
            f"{density.numel:,} parameters; small where few directions carry the curvature.",
            _clipped(interval, 0.0, float(density.numel)),
        )
    )
    return metrics


def _negative(
    density: SpectralDensity | None,
) -> tuple[float, tuple[float, float] | None] | None:
    """Share of the curvature that is negative, with its interval over the probes."""
    if density is None:
        return None
    magnitude = density.draws(np.abs)
    if not magnitude.mean() > 0:
        return None
    pairs = np.stack([density.draws(lambda v: np.maximum(-v, 0)), magnitude], 1)
    return jackknife_interval(_ratio, pairs)


def _ratio(pairs: np.ndarray) -> float:
    return float(pairs[:, 0].mean() / pairs[:, 1].mean())


def _clipped(
    interval: tuple[float, float] | None, low: float, high: float
) -> tuple[float, float] | None:
    return None if interval is None else (max(low, interval[0]), min(high, interval[1]))


def _direction_rows(gradient: _Along | None, sharpest: _Along | None) -> list[dict[str, Cell]]:
    rows = []
    for name, along in (("gradient", gradient), ("sharpest direction", sharpest)):
        if along is None or along.residual is None:
            continue
        row: dict[str, Cell] = {"direction": name}
        for part, draws in (
            ("curvature", along.total),
            ("Gauss-Newton part", along.gauss_newton),
            ("residual part", along.residual),
        ):
            mean, interval = mean_interval(draws)
            row[part] = mean
            if interval is not None:
                row[f"± of the {part}"] = (interval[1] - interval[0]) / 2
        rows.append(row)
    return rows


def _figures(
    study: _Study, densities: dict[str, SpectralDensity], sharpest: _Extremes
) -> list[Picture]:
    if not densities:
        return []
    nodes = np.concatenate([density.nodes.ravel() for density in densities.values()])
    low, high = float(np.nanmin(nodes)), float(np.nanmax(nodes))
    sigma = 0.008 * ((high - low) or max(abs(high), 1.0))
    figure, axes = subplots()
    styles = (("#0072B2", "-"), ("#D55E00", "--"))
    for (name, density), (colour, line) in zip(densities.items(), styles, strict=False):
        x, y = density.grid(points=1200, sigma=sigma)
        axes.semilogy(x, y, line, color=colour, label=name, linewidth=1.5)
    # A tenth of what one eigenvalue of P makes: below that there is nothing.
    bell = 1 / (sigma * math.sqrt(2 * math.pi))
    axes.set_ylim(bottom=max(0.1 / study.operator.numel, 1e-9) * bell, top=2 * bell)
    marked = [row["eigenvalue"] for row in sharpest.rows()]
    axes.plot(marked, [1.2 * axes.get_ylim()[0]] * len(marked), "^", color="#333333", markersize=5,
              label="eigenvalues by Lanczos", clip_on=False)  # fmt: skip
    axes.set(xlabel="eigenvalue", ylabel="density (log scale)")
    axes.legend(loc="upper right")
    return [
        Picture(
            "spectrum",
            figure,
            f"Spectral density of the loss's curvature, {study.samples} train samples; bells of "
            f"width {sigma:.2g} around the quadrature's nodes. Where the two curves part, the "
            "residual is at work; beyond a bell's width it alone reaches below zero.",
        )
    ]


def _findings(
    study: _Study,
    sharpest: _Extremes,
    relative: _Extremes | None,
    gradient: _Along | None,
    layers: _Layers,
    densities: dict[str, SpectralDensity],
) -> list[Finding]:
    beside = "" if relative is None else f"; the invariant sharpness is {relative.top:.3g}"
    findings = [
        Finding(
            f"The largest eigenvalue, {sharpest.top:.3g}, is not invariant under rescaling"
            f"{beside}.",
            "Scaling one layer up and the next down keeps every output of a ReLU network and "
            "makes this eigenvalue as large as one likes: it says something of training, not of "
            "generalisation. Compare networks by the invariant sharpness.",
            0.1,
        )
    ]
    if sharpest.top > 200:
        findings.append(
            Finding(
                f"Plain gradient descent is stable only below a learning rate of "
                f"{2 / sharpest.top:.2g} here (λ_max = {sharpest.top:.3g}).",
                "Fine-tuning with a larger rate leaves this minimum. Lower the rate, warm up, or "
                "look at the layers' table for where the sharp direction lies.",
                0.3,
            )
        )
    widest = int(layers.share.argmax())
    of_parameters = layers.numel[widest] / layers.numel.sum()
    if len(layers.names) > 2 and layers.share[widest] > 0.8 and of_parameters < 0.3:
        findings.append(
            Finding(
                f"{percent(layers.share[widest], 2)} of the sharpest direction lies in the layer "
                f"{layers.names[widest]}, which has {percent(of_parameters)} of the parameters.",
                "This layer alone sets the limit on a common learning rate: a lower rate for it "
                "or a normalisation before it would free the others.",
                0.2,
            )
        )
    negative = _negative(densities.get("Hessian"))
    # Of few samples the residual is larger than of all: nothing is concluded from them.
    enough = study.samples >= min(128, len(study.data.train))
    if enough and negative is not None and negative[1] and negative[1][0] > 0.2:
        findings.append(
            Finding(
                f"{percent(negative[0], 2)} of the curvature of {study.samples} train samples is "
                "negative.",
                "The weights are at no minimum of the training loss: training was stopped early, "
                "or wanders on a plateau. More training or a smaller rate would lower the loss.",
                0.15,
            )
        )
    if gradient is not None and (interval := _interval(gradient.total)) and interval[1] < 0:
        findings.append(
            Finding(
                f"Along the gradient the loss curves downwards ({gradient.total.mean():.2g}).",
                "The slope grows as one follows it, as in the early phase of training: the "
                "Gauss-Newton part alone would mislead a second-order method here.",
                0.3,
            )
        )
    return findings[:4]
