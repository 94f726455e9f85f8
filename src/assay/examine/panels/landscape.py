"""The loss around the network: a slice, how fast it rises, the way to a second minimum."""

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LogNorm
from torch import Tensor, nn

from assay.examine.budget import Budget
from assay.examine.differentiable import differentiable, fitting
from assay.examine.panel import Finding, Metric, NotApplicable, Panel, Picture, panel
from assay.examine.retraining import BATCH_SIZE, RULE, Trainee, choose_learning_rate
from assay.examine.sample import Sample, Split
from assay.functional import (
    HessianOperator,
    ParameterLayout,
    bisect,
    bracket,
    filter_normalize,
    lanczos,
    parameters_to_vector,
    random_direction,
    running_norms,
)
from assay.lab.figures import subplots
from assay.lab.intervals import jackknife_interval, mean_interval, median_interval
from assay.lab.numerals import percent
from assay.landscape import CurveEvaluation, PolyChain, evaluate, evaluate_curve, evaluate_span

RADIUS = 0.25  # of a perturbation, relative to the weights
FEWEST_DIRECTIONS, MOST_DIRECTIONS = 4, 40
FEWEST_SAMPLES, MOST_SAMPLES = 64, 2048
POINTS = 300  # weight vectors that a thin examination looks at; decides on the number of samples
PARTS = 8  # of the samples, for intervals of what is measured along one direction
FIRST_STRIDE, STRIDES, GROWTH = 0.02, 16, 1.4  # how a width is looked for: up to a radius of 3
BASIS_BYTES = 512 * 2**20  # of Lanczos' vectors
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"
LOWER, LEAST_DROP = 0.1, 0.01  # relative and absolute: a lower loss nearby is a finding
COMPARABLE = 1.2  # times the network's loss: then the second network is trained

READING = (
    "Around a trained network the loss rises in all directions, but not alike. Sharpness is the "
    "rise where every filter is moved by a quarter of its own norm: in random directions it says "
    "how much noise in the weights (quantisation, pruning, averaging) the network bears, along the "
    "direction of largest curvature how bad the worst case is. Random directions of a million-"
    "dimensional space show a typical slice, not the valleys in it. Sharpness compares networks of "
    "one architecture and one loss; it is no verdict on generalisation by itself."
)
LI = (
    "Li, Xu, Taylor, Studer, Goldstein, Visualizing the loss landscape of neural nets (2018)",
    "https://arxiv.org/abs/1712.09913",
)
GARIPOV = (
    "Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss surfaces and mode connectivity (2018)",
    "https://arxiv.org/abs/1802.10026",
)
FRANKLE = (
    "Frankle, Dziugaite, Roy, Carbin, Linear mode connectivity (2020)",
    "https://arxiv.org/abs/1912.05671",
)


@panel("landscape", title="Loss landscape", order=50, share=2.5)
def landscape(model: nn.Module, data: Sample, budget: Budget) -> Panel:
    """A slice of the loss, its sharpness and widths, and the barrier to a second training."""
    with differentiable(model) as network:
        try:
            weights = parameters_to_vector(network)
        except ValueError as error:
            raise NotApplicable(f"its parameters do not form one vector: {error}") from error
        around = Surroundings.of(network, weights, data, budget)
        rays = _random_rays(around, data, budget)
        top = _top_ray(around, data, budget, rays.reach)
        plane = _slice(around, data, budget)
        second = _second(model, around, data, budget)
    return _report(around, rays, top, plane, second, data)


# -- losses at other weights -------------------------------------------------------------------


@dataclass
class Surroundings:
    """The loss as a function of the weights.

    Args:
        network: at the weights that are examined.
        weights: as a vector.
        batches: of the samples that the loss is measured on.
        loss_fn: mean loss.
        samples: how many.
        cost: seconds a weight vector.
        vectorised: whether several weight vectors run at once.
    """

    network: nn.Module
    weights: Tensor
    batches: list[tuple[Tensor, Tensor]]
    loss_fn: Any
    samples: int
    cost: float = 0.0
    vectorised: bool = True
    loss: float = field(init=False, default=math.nan)

    @classmethod
    def of(
        cls, network: nn.Module, weights: Tensor, data: Sample, budget: Budget
    ) -> "Surroundings":
        """With as many samples as the time allows."""
        probe = data.draw("train", FEWEST_SAMPLES, "landscape")
        around = cls._over(network, weights, probe, data)
        here = weights.unsqueeze(0)
        same = torch.ones(4, 1)
        try:
            # A warning is that of an operation that vmap runs one by one, which is slower.
            with warnings.catch_warnings(action="error"):
                around.losses(here, same)
        except Exception:  # whatever vmap does not bear, from in-place operations to data flow
            around.vectorised = False
        _, cost = budget.timed(lambda: around.losses(here, same))
        passes = POINTS * cost / 4 / len(probe)
        n = int(budget.left * 0.6 / max(passes, 1e-12))
        split = data.draw("train", min(MOST_SAMPLES, max(FEWEST_SAMPLES, n)), "landscape")
        if len(split) < len(data.train):
            budget.note(
                f"The loss around the network is that of {len(split):,} train samples, not of all."
            )
        vectorised = around.vectorised
        around = cls._over(network, weights, split, data)
        around.vectorised = vectorised
        losses, seconds = budget.timed(lambda: around.losses(here, same))
        around.cost = seconds / len(same)
        around.loss = float(losses[0])
        if not math.isfinite(around.loss):
            raise NotApplicable(f"its loss on train samples is {around.loss}")
        return around

    @classmethod
    def _over(
        cls, network: nn.Module, weights: Tensor, split: Split, data: Sample
    ) -> "Surroundings":
        x = fitting(network, split.x)
        return cls(network, weights, _split(x, split.y, math.ceil(len(split) / 256)),
                   data.loss_fn, len(split))  # fmt: skip

    @property
    def parts(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """The samples in a few disjoint sets."""
        x, y = (torch.cat(tensors) for tensors in zip(*self.batches, strict=True))
        return {str(i): [batch] for i, batch in enumerate(_split(x, y, PARTS))}

    def losses(self, basis: Tensor, coefficients: Tensor) -> Tensor:
        """At combinations `coefficients @ basis` of weight vectors, float64."""
        return self._evaluate(basis, coefficients, {"all": self.batches})["all"].loss

    def losses_of_parts(self, basis: Tensor, coefficients: Tensor) -> np.ndarray:
        """The same for each of a few disjoint parts of the samples, `(points, parts)`."""
        found = self._evaluate(basis, coefficients, self.parts)
        return torch.stack([evaluation.loss for evaluation in found.values()], 1).numpy()

    def _evaluate(self, basis: Tensor, coefficients: Tensor, sets: dict[str, Any]) -> dict:
        coefficients = coefficients.to(basis)
        if self.vectorised:
            return evaluate_span(
                self.network, basis, coefficients, sets,
                loss_fn=self.loss_fn, bn_batches=self.batches,
            )  # fmt: skip
        points = (row @ basis for row in coefficients)
        return evaluate(
            self.network, points, sets,
            loss_fn=self.loss_fn, chunk_size=1, bn_batches=self.batches,
        )  # fmt: skip

    def along(self, direction: Tensor, radii: Tensor) -> Tensor:
        """Losses at the weights + radius × direction."""
        basis = torch.stack([self.weights, direction])
        return self.losses(basis, torch.stack([torch.ones_like(radii), radii], 1))


def _split(x: Tensor, y: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Equal parts of two samples or more: BatchNorm cannot take the statistics of one."""
    count = min(count, max(1, len(y) // 2))
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


# -- random directions -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rays:
    """Losses along random directions.

    Args:
        radii: relative, from −1 to 1.
        losses: `(directions, radii)`.
        rises: at `RADIUS`, mean of both sides, for each direction.
        widths: radius at which the loss has doubled, for each direction; infinite if beyond reach.
        reach: norm of a direction.
    """

    radii: np.ndarray
    losses: np.ndarray
    rises: np.ndarray
    widths: np.ndarray
    reach: float


def _directions(around: Surroundings, data: Sample) -> Iterator[Tensor]:
    place = around.weights.device
    for k in range(MOST_DIRECTIONS):
        draw = torch.Generator(place).manual_seed(data.generator("landscape", k).initial_seed())
        yield filter_normalize(random_direction(around.network, generator=draw), around.network)


def _random_rays(around: Surroundings, data: Sample, budget: Budget) -> Rays:
    fine = around.cost * (17 + 12) * 12 < 0.35 * budget.left
    radii = torch.linspace(-1, 1, 17 if fine else 9, dtype=torch.float64)
    end = budget.left * 0.6
    losses, widths, reach = [], [], 0.0
    for k, direction in enumerate(_directions(around, data)):
        if k >= FEWEST_DIRECTIONS and budget.left < end:
            break
        reach = float(direction.norm())
        if reach == 0:
            raise NotApplicable("it has no matrices or filters, along which directions are scaled")
        losses.append(around.along(direction, radii).numpy())
        widths.append(_width(around, direction))
    found = np.stack(losses)
    at = [int((radii - r).abs().argmin()) for r in (-RADIUS, RADIUS)]
    rises = found[:, at].mean(1) - around.loss
    return Rays(radii.numpy(), found, rises, np.array(widths), reach)


def _width(around: Surroundings, direction: Tensor) -> float:
    """The radius at which the loss is twice that of the network."""
    if around.loss <= 0:
        return math.nan

    def excess(radius: Tensor, _: Tensor) -> Tensor:
        loss = around.along(direction, radius)
        return torch.where(loss.isfinite(), loss - 2 * around.loss, around.loss)

    stride = torch.full((1,), FIRST_STRIDE, dtype=torch.float64)
    ends = bracket(excess, stride, factor=GROWTH, max_iter=STRIDES)
    if not bool(ends.found.all()):
        return math.inf
    return bisect(excess, ends.low, ends.high, rtol=0.05, max_iter=10).point.item()


# -- the direction of largest curvature --------------------------------------------------------


@dataclass(frozen=True)
class TopRay:
    """Losses along the top eigenvector of the Hessian.

    Args:
        losses: at the radii of the random directions.
        rises: at `RADIUS`, mean of both sides, for each part of the samples.
        eigenvalue: its Ritz value.
        products: with the Hessian that were spent.
    """

    losses: np.ndarray
    rises: np.ndarray
    eigenvalue: float
    products: int


def _top_ray(around: Surroundings, data: Sample, budget: Budget, reach: float) -> TopRay | None:
    share = 0.35
    operator = HessianOperator(around.network, around.loss_fn, around.batches)
    start = torch.randn(operator.numel, generator=data.generator("landscape", "lanczos"))
    try:
        _, cost = budget.timed(lambda: operator @ start.to(operator.device, operator.dtype))
        if 4 * cost > share * budget.left:  # fewer samples: the direction needs no precision
            operator = HessianOperator(around.network, around.loss_fn, around.batches[:1])
            cost /= len(around.batches)
        fits = BASIS_BYTES // (8 * operator.numel)  # in double precision
        if 4 * cost > max(budget.left, 0.25 * budget.seconds) or fits < 4:
            budget.note(
                "The direction of largest curvature was not looked for: a product with the "
                f"Hessian of {operator.numel:,} parameters takes {cost:.1f} s."
            )
            return None
        steps = min(budget.count(cost, 4, 40, share), fits, operator.numel)
        found = lanczos(operator, steps, start=start.double())
    except (RuntimeError, FloatingPointError) as error:
        budget.note(
            "The direction of largest curvature was not found: the network cannot be "
            f"differentiated twice here ({str(error).splitlines()[0]:.100})."
        )
        return None
    values, vectors = found.eigh()
    best = int(values.argmax())
    ritz = vectors[:, best].to(found.basis) @ found.basis
    direction = _over_all(around.network, operator, ritz.to(operator.dtype))
    direction = direction / direction.norm() * reach
    radii = torch.linspace(-1, 1, 17, dtype=torch.float64)
    basis = torch.stack([around.weights, direction])
    points = torch.tensor([[1, -RADIUS], [1, 0.0], [1, RADIUS]], dtype=torch.float64)
    parts = around.losses_of_parts(basis, points)
    return TopRay(
        around.along(direction, radii).numpy(),
        (parts[0] + parts[2]) / 2 - parts[1],
        float(values[best]),
        len(found.diagonal),
    )


def _over_all(network: nn.Module, operator: HessianOperator, vector: Tensor) -> Tensor:
    """A vector over the operator's parameters as one over all, zero at the frozen ones."""
    moving = operator.layout.unflatten(vector)
    everything = {
        name: moving.get(name, torch.zeros_like(p)) for name, p in network.named_parameters()
    }
    return ParameterLayout.of(network).flatten(everything).detach()


# -- a plane -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """Losses on the plane of two random directions.

    Args:
        radii: relative, from −1 to 1.
        losses: `(radii, radii)`.
    """

    radii: np.ndarray
    losses: np.ndarray


def _slice(around: Surroundings, data: Sample, budget: Budget) -> Plane:
    points = budget.count(around.cost, 49, 41**2, 0.4 if budget.training else 0.75)
    side = math.isqrt(points)
    side -= 1 - side % 2  # odd: the network itself is a point of the plane
    first, second = itertools.islice(_directions(around, data), 2)
    radii = torch.linspace(-1, 1, side, dtype=torch.float64)
    grid = torch.cartesian_prod(torch.ones(1, dtype=torch.float64), radii, radii)
    basis = torch.stack([around.weights, first, second])
    rows = [around.losses(basis, part) for part in grid.split(side)]
    return Plane(radii.numpy(), torch.stack(rows).numpy())


# -- a second training -------------------------------------------------------------------------


@dataclass(frozen=True)
class Second:
    """The way to a second network.

    Args:
        along: losses on the straight line.
        parts: the same for each part of the samples, `(parts, points)`.
        loss: of the second network.
        epochs: that it was trained for.
        lr: learning rate.
    """

    along: CurveEvaluation
    parts: np.ndarray
    loss: float
    epochs: float
    lr: float


def _second(model: nn.Module, around: Surroundings, data: Sample, budget: Budget) -> Second | None:
    if not budget.training:
        budget.note("The barrier to a second training was not measured: training was not allowed.")
        return None

    def make(lr: float) -> Trainee:
        generator = data.generator("landscape", "second")
        return Trainee(model, data.train, around.loss_fn, lr=lr, generator=generator)

    points = 11
    reserve = 2.5 * points * around.cost + 0.1 * budget.seconds
    try:
        trial = make(1e-3)
        trial.step()
        _, cost = budget.timed(trial.step)
    except NotApplicable as reason:
        budget.note(f"The barrier to a second training was not measured: {reason}.")
        return None
    an_epoch = cost * math.ceil(len(data.train) / BATCH_SIZE)
    left = budget.left - reserve
    if left < 2 * an_epoch:
        budget.note(
            f"The barrier to a second training was not measured: an epoch takes {an_epoch:.2g} s, "
            f"and {max(left, 0):.2g} s were left for training."
        )
        return None
    lr = choose_learning_rate(make, max(2, min(30, int(0.1 * left / cost))))
    trainee = make(lr)
    loss = math.inf
    check = max(1, int(an_epoch / cost))
    while budget.left > reserve + cost:
        trainee.step()
        if trainee.steps % check == 0:
            loss = _loss_of(trainee, around)
            if loss <= COMPARABLE * around.loss:
                break
    loss = _loss_of(trainee, around)
    if not math.isfinite(loss):
        budget.note("The barrier was not measured: the second training diverged.")
        return None
    points = min(21, max(points, int(0.8 * budget.left / (2.5 * around.cost))))
    sets = around.parts
    along = evaluate_curve(
        PolyChain([around.network, trainee.model]),
        {**sets, "all": around.batches},
        num_points=points - 1 + points % 2,
        loss_fn=around.loss_fn,
        chunk_size=8 if around.vectorised else 1,
        bn_batches=around.batches,
    )
    parts = np.stack([along.sets[name].loss.numpy() for name in sets])
    epochs = trainee.steps * BATCH_SIZE / len(data.train)
    return Second(along, parts, loss, epochs, lr)


def _loss_of(trainee: Trainee, around: Surroundings) -> float:
    sums = [around.loss_fn(trainee.outputs(x), y).double() * len(y) for x, y in around.batches]
    return float(torch.stack(sums).sum() / around.samples)


# -- the report --------------------------------------------------------------------------------


def _report(
    around: Surroundings,
    rays: Rays,
    top: TopRay | None,
    plane: Plane,
    second: Second | None,
    data: Sample,
) -> Panel:
    metrics = [_sharpness(around, rays), *_width_metric(around, rays)]
    if top is not None:
        metrics.append(_top_sharpness(around, top))
    if second is not None:
        metrics.append(_barrier(around, second))
    pictures = [_slice_picture(around, plane), _rays_picture(around, rays, top)]
    if second is not None:
        pictures.append(_line_picture(second))
    again = (
        " At every point the statistics of BatchNorm are taken anew from the same samples: the "
        "stored ones fit the trained weights alone."
        if running_norms(around.network)
        else ""
    )
    return Panel(
        metrics,
        reading=READING,
        method=(
            f"Loss on {around.samples:,} train samples in evaluation mode, "
            f"{around.loss:.4g} at the network itself. Random directions are normal vectors scaled "
            "filter by filter to the norms of the weights, biases and scales of norms left alone. "
            f"The slice has {plane.losses.size} points.{again}"
        ),
        reference=dict((LI, GARIPOV, FRANKLE)),
        figures=pictures,
        findings=_findings(around, rays, plane, second, data),
    )


def _sharpness(around: Surroundings, rays: Rays) -> Metric:
    value, interval = mean_interval(rays.rises)
    return Metric(
        "sharpness",
        f"Rise of the loss at radius {RADIUS:g}, random directions",
        value,
        f"mean over {len(rays.rises)} filter-normalised random directions and both their senses; "
        f"t interval over directions; {around.samples:,} train samples",
        f"How much the loss rises when each filter is moved by {percent(RADIUS, 2)} of its norm "
        "at random.",
        interval=interval,
    )


def _width_metric(around: Surroundings, rays: Rays) -> list[Metric]:
    if around.loss <= 0:
        return []
    reach = FIRST_STRIDE * GROWTH ** (STRIDES - 1)
    widths = np.minimum(rays.widths, reach)
    value, interval = median_interval(widths)
    beyond = int((rays.widths > reach).sum())
    capped = f"; {beyond} never doubled up to {reach:.1f}, which counts as that" if beyond else ""
    return [
        Metric(
            "width",
            "Radius at which the loss has doubled",
            value,
            f"median over {len(widths)} filter-normalised random directions, one sense each, by "
            f"bisection to 5 %; interval of order statistics over directions{capped}",
            "How far, relative to the weights, one can go before the loss doubles; small where the "
            "loss is nearly 0.",
            interval=interval,
        )
    ]


def _top_sharpness(around: Surroundings, top: TopRay) -> Metric:
    value, interval = mean_interval(top.rises)
    return Metric(
        "top_direction_sharpness",
        f"Rise of the loss at radius {RADIUS:g}, direction of largest curvature",
        value,
        f"both senses of the top Ritz vector of the Hessian ({top.products} products; its value is "
        f"{top.eigenvalue:.3g}), scaled to the norm of a random direction; t interval over "
        f"{len(top.rises)} parts of the {around.samples:,} samples",
        "The same step along the steepest valley wall; compare with the rise in random directions.",
        interval=interval,
    )


def _barrier_of(parts: np.ndarray) -> float:
    loss = parts.mean(0)
    return float((loss - np.linspace(loss[0], loss[-1], len(loss))).max())


def _barrier(around: Surroundings, second: Second) -> Metric:
    _, interval = jackknife_interval(_barrier_of, second.parts)
    value = second.along.barrier("all")
    if interval is not None:
        interval = (min(max(interval[0], 0.0), value), max(interval[1], value))
    return Metric(
        "barrier",
        "Barrier to a second training",
        value,
        f"highest excess over the ends' interpolation at {len(second.along.t)} points of the "
        f"straight line; jackknife interval over {len(second.parts)} parts of the samples. The "
        f"second network: fresh weights, {second.epochs:.1f} epochs, {RULE}, here {second.lr:g}; "
        f"it reached a loss of {second.loss:.3g} ({_how_far(around, second)}). Units are not "
        "permuted",
        "0: the two lie in one basin and could be averaged; usual for independent trainings is a "
        "barrier of the order of the loss of an untrained network.",
        interval=interval,
    )


def _how_far(around: Surroundings, second: Second) -> str:
    if second.loss <= COMPARABLE * around.loss:
        return f"comparable to the {around.loss:.3g} of the network examined"
    return f"not as low as the {around.loss:.3g} of the network examined: time was up"


def _slice_picture(around: Surroundings, plane: Plane) -> Picture:
    figure, axis = subplots(width=5.6, height=4.4)
    losses = np.where(np.isfinite(plane.losses), plane.losses, np.nan)
    if np.nanmin(losses) > 0:
        levels = np.geomspace(np.nanmin(losses), np.nanmax(losses) * 1.0001 + 1e-12, 15)
        norm: Any = LogNorm()
    else:
        levels, norm = np.linspace(np.nanmin(losses), np.nanmax(losses) + 1e-12, 15), None
    drawn = axis.contourf(
        plane.radii, plane.radii, losses.T, levels=levels, cmap="cividis", norm=norm
    )
    axis.contour(plane.radii, plane.radii, losses.T, levels=levels, colors="white", linewidths=0.4)
    axis.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=6)
    axis.set(
        xlabel="first random direction (relative)", ylabel="second random direction (relative)"
    )
    axis.set(xticks=(-1, -0.5, 0, 0.5, 1), yticks=(-1, -0.5, 0, 0.5, 1))
    axis.set_aspect("equal")
    ticks = levels[:: max(1, len(levels) // 5)]
    bar = figure.colorbar(drawn, ax=axis, label="train loss")
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.minorticks_off()
    return Picture(
        "slice",
        figure,
        "Train loss on the plane of two filter-normalised random directions; the dot is the "
        "network. At 1 every filter has been changed by as much as it is long.",
    )


def _rays_picture(around: Surroundings, rays: Rays, top: TopRay | None) -> Picture:
    figure, axis = subplots()
    finite = np.where(np.isfinite(rays.losses), rays.losses, np.nan)
    for losses in finite:
        axis.plot(rays.radii, losses, color=GREY, linewidth=0.7, alpha=0.6)
    axis.plot(rays.radii, np.nanmean(finite, axis=0), color=BLUE, label="random, mean")
    if top is not None:
        along = np.where(np.isfinite(top.losses), top.losses, np.nan)
        axis.plot(np.linspace(-1, 1, len(along)), along, color=ORANGE, linestyle="--",
                  label="largest curvature")  # fmt: skip
    axis.axhline(around.loss, color="black", linewidth=0.7, linestyle=":", label="the network")
    for side in (-RADIUS, RADIUS):
        axis.axvline(side, color=GREY, linewidth=0.7, linestyle=":")
    if around.loss > 0:
        axis.set_yscale("log")
    axis.set(xlabel="radius, relative to the weights", ylabel="train loss")
    axis.legend()
    return Picture(
        "rays",
        figure,
        f"Train loss along {len(finite)} random directions (grey, each a line) and along the "
        f"direction of largest curvature. Sharpness is the rise at ±{RADIUS:g}, the dotted lines.",
    )


def _line_picture(second: Second) -> Picture:
    figure, axis = subplots()
    loss, t = second.along.sets["all"].loss.numpy(), second.along.t.numpy()
    axis.plot(t, loss, color=BLUE, marker="o", markersize=3)
    axis.plot([0, 1], [loss[0], loss[-1]], color="black", linewidth=0.7, linestyle=":")
    axis.set_xticks([0, 0.5, 1], ["the network", "half way", "second training"])
    axis.set(ylabel="train loss")
    return Picture(
        "line",
        figure,
        "Train loss on the straight line to a network of the same architecture trained from other "
        "weights; the barrier is the largest height above the dotted line.",
    )


def _findings(
    around: Surroundings, rays: Rays, plane: Plane, second: Second | None, data: Sample
) -> list[Finding]:
    found = []
    lowest = min(np.nanmin(plane.losses), np.nanmin(rays.losses))
    if around.loss - lowest > max(LOWER * abs(around.loss), LEAST_DROP):
        found.append(
            Finding(
                f"The loss is {lowest:.3g} at a point of a random direction, below the "
                f"{around.loss:.3g} at the network itself.",
                "A trained network sits lower than its random surroundings: training was stopped "
                "early, regularised strongly, or has not converged.",
                0.3,
            )
        )
    rise = mean_interval(rays.rises)[0]
    chance = math.log(len(data.classes)) if data.classes else math.inf
    if around.loss < chance < around.loss + rise:
        found.append(
            Finding(
                f"Noise of {percent(RADIUS, 2)} in each filter lifts the loss from "
                f"{around.loss:.2g} to "
                f"{around.loss + rise:.2g}, beyond that of guessing ({chance:.2g}).",
                "The network tolerates little noise in its weights: check the accuracy after "
                "quantisation or pruning; averaging weights late in training widens the basin.",
                0.35,
            )
        )
    if second is not None and second.loss <= COMPARABLE * around.loss:
        value = second.along.barrier("all")
        if value > max(0.1, around.loss):
            text = f"A second training ends behind a barrier of {value:.2g} in the loss."
            why = (
                "Weights of independent trainings cannot be averaged; average their predictions, "
                "or branches of one training."
            )
        else:
            text = f"A straight line of low loss (barrier {value:.2g}) joins a second training."
            why = "Weights of the two can be averaged, which is rare for independent trainings."
        found.append(Finding(text, why, 0.1))
    return found
