"""What SGD's own trajectory tells of the loss around a solution (Feng and Tu, 2021)."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.functional import (
    ParameterLayout,
    bisect,
    bracket,
    evaluating,
    select_parameters,
)
from assay.functional.batches import BatchWeights, batch_size
from assay.functional.ensemble import plain_layers, run_chain
from assay.functional.products import Selection, as_batches, pair_of
from assay.landscape.evaluation import (
    Batches,
    call_with_tensors,
    fitting_chunk,
    losses_at_points,
)
from assay.landscape.span import answering, layers_at_the_input, outputs_of

# Weight vectors times samples that run at once: beyond, activations leave the cache.
SAMPLES_AT_ONCE = 16_384


class TrajectoryRecorder:
    """Records weights while the user's own loop trains.

    Snapshots are stored as differences from the first: fluctuations of 1e-6 around weights of 1
    would drown in float32 otherwise. Running statistics are not weights and are not recorded.

    Args:
        model: that is trained.
        params: names or a predicate; default all that require a gradient. One layer at a time is
            the rule: layers have fluctuations of different scale.
        max_snapshots: room for so many; further steps are ignored.
        every: record at every so many calls of `step`.
        dtype: of the stored differences.
        file: keep them in this memory-mapped file instead of memory.

    Raises:
        ValueError: if `every` or `max_snapshots` < 1, or the selection is empty.

    Example:
        >>> import torch
        >>> from assay.landscape import TrajectoryRecorder
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recorder = TrajectoryRecorder(model, max_snapshots=10)
        >>> handle = recorder.attach(sgd)
        >>> for _ in range(3):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     sgd.step()
        >>> handle.remove()
        >>> recorder.snapshots().shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        params: Selection = None,
        *,
        max_snapshots: int,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
        file: str | Path | None = None,
    ) -> None:
        if every < 1 or max_snapshots < 1:
            raise ValueError(
                f"every and max_snapshots must be at least 1, got {every} and {max_snapshots}"
            )
        self.params = select_parameters(model, params)
        self.layout = ParameterLayout.over(self.params)
        self.every = every
        self.reference: Tensor | None = None
        shape = (max_snapshots, self.layout.numel)
        if file is None:
            self._rows = torch.empty(shape, dtype=dtype)
        else:
            self._rows = torch.from_file(
                str(file), shared=True, size=shape[0] * shape[1], dtype=dtype
            ).view(shape)
        self._filled = 0
        self._calls = 0

    def __len__(self) -> int:
        return self._filled

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Record after each of an optimizer's steps; the handle's `remove()` ends it."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def step(self) -> None:
        """Record the weights as they are now; call after `optimizer.step()`."""
        due = self._calls % self.every == 0
        self._calls += 1
        if not due or self._filled == len(self._rows):
            return
        if self.reference is None:
            self.reference = self.layout.flatten(self.params).detach().double().cpu()
        row, start = self._rows[self._filled], 0
        for parameter in self.params.values():
            piece = slice(start, start + parameter.numel())
            difference = parameter.detach().reshape(-1).cpu() - self.reference[piece]
            row[piece].copy_(difference)
            start += parameter.numel()
        self._filled += 1

    def snapshots(self) -> Float[Tensor, "m p"]:
        """The recorded differences from `reference`, a view."""
        return self._rows[: self._filled]

    def state_dict(self) -> dict[str, Any]:
        """What has been recorded so far."""
        return {
            "reference": self.reference,
            "rows": self.snapshots().clone(),
            "calls": self._calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on recording behind what `state_dict` holds."""
        self.reference, self._calls = state["reference"], state["calls"]
        self._filled = len(state["rows"])
        self._rows[: self._filled] = state["rows"]


class TrajectoryPCA:
    """Principal directions of a trajectory.

    C = (1/M) Σ (w − ⟨w⟩)(w − ⟨w⟩)ᵀ with eigenpairs (p_i, σ_i²), largest first. From fewer snapshots
    than weights it is computed through their M × M Gram matrix in float64; then at most M − 1
    directions have variance, and the last ones are sampling noise.

    Args:
        k: number of directions; default all that have variance.
        detrend: subtract a straight line from each weight instead of its mean.

    Raises:
        ValueError: if `k` < 1; in `fit`, for fewer than 3 snapshots, or if one is not finite.

    Example:
        >>> import torch
        >>> from assay.landscape import TrajectoryPCA
        >>> walk = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
        >>> pca = TrajectoryPCA().fit(walk)
        >>> pca.variance
        tensor([0.5000, 0.1250], dtype=torch.float64)
    """

    components: Tensor
    variance: Tensor
    projections: Tensor
    mean: Tensor
    total_variance: float

    def __init__(self, k: int | None = None, *, detrend: bool = False) -> None:
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.detrend = detrend

    def fit(self, trajectory: "TrajectoryRecorder | Tensor") -> "TrajectoryPCA":
        """Find the directions.

        Args:
            trajectory: a recorder, or weights `(M, P)`.

        Returns:
            Itself, with `components` `(k, P)` (unit rows), `variance` `(k,)`, `projections`
            `(M, k)`, `mean` `(P,)` and `total_variance`.
        """
        if isinstance(trajectory, TrajectoryRecorder):
            rows, reference = trajectory.snapshots().double(), trajectory.reference
        else:
            rows, reference = trajectory.double(), None
        if rows.ndim != 2 or len(rows) < 3:
            raise ValueError(
                f"a trajectory needs at least 3 snapshots (M, P), got shape {tuple(rows.shape)}"
            )
        m, p = rows.shape
        mean = rows.mean(0)
        if not bool(mean.isfinite().all()):
            raise ValueError("the trajectory holds NaN or infinity: did the training diverge?")
        centred = rows - mean
        if self.detrend:
            time = torch.arange(m, dtype=torch.float64, device=rows.device) - (m - 1) / 2
            slope = time @ centred / time.square().sum()
            centred = centred - time.unsqueeze(1) * slope
        if m < p:
            values, vectors = torch.linalg.eigh(centred @ centred.T / m)
            projections = vectors * (values.clamp_min(0) * m).sqrt()
        else:
            values, vectors = torch.linalg.eigh(centred.T @ centred / m)
            projections = centred @ vectors
        order = values.argsort(descending=True)
        rank = int((values > values.max().clamp_min(0) * 1e-14 * max(m, p)).sum())
        order = order[: rank if self.k is None else min(self.k, rank)]
        self.variance = values[order]
        self.projections = projections[:, order]
        if m < p:
            self.components = (vectors[:, order].T @ centred) / (self.variance * m).sqrt()[:, None]
        else:
            self.components = vectors[:, order].T
        self.mean = mean if reference is None else reference + mean
        self.total_variance = float(values.clamp_min(0).sum())
        return self

    def autocorrelation_time(self) -> Float[Tensor, " k"]:
        """Snapshots after which each projection's autocorrelation first falls below 1/e."""
        series = self.projections - self.projections.mean(0)
        m = len(series)
        spectrum = torch.fft.rfft(series, n=2 * m, dim=0).abs().square()
        correlation = torch.fft.irfft(spectrum, dim=0)[:m]
        correlation = correlation / correlation[0]
        below = correlation < 1 / math.e
        first = below.double().argmax(0).double()
        return torch.where(below.any(0), first, math.inf)


@dataclass(frozen=True, eq=False)
class Flatness:
    """How far one can go along directions until the loss has risen to a level.

    Args:
        left: distance against each direction, `(K,)`, positive; inf if the level is not reached.
        right: distance along it.
        loss: the loss at the centre.

    Example:
        >>> import torch
        >>> from assay.landscape import Flatness
        >>> Flatness(torch.tensor([1.0]), torch.tensor([2.0]), 0.1).width
        tensor([3.])
    """

    left: Float[Tensor, " k"]
    right: Float[Tensor, " k"]
    loss: float

    @property
    def width(self) -> Float[Tensor, " k"]:
        """F = right + left, infinite for a direction that does not reach the level."""
        return self.left + self.right


def flatness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Batches,
    directions: Tensor,
    *,
    center: Tensor | None = None,
    params: Selection = None,
    level: float = math.e,
    step: float = 0.01,
    rtol: float = 1e-3,
    max_doublings: int = 40,
    chunk_size: int = 64,
) -> Flatness:
    """Widths of the loss along directions: where L(c + δp) = level · L(c), on both sides.

    Brackets by doubling, then bisects, all directions and both sides in lock-step; layers below
    the moving weights are computed once for all of them. Running statistics of norms stay as they
    are at every point. Batches count as in `assay.landscape.evaluate`: by samples, or by the
    targets that are not ignored.

    Args:
        model: evaluated in evaluation mode.
        loss_fn: `(output, target) -> scalar`, a mean over the batch.
        data: one pair `(inputs, targets)` or an iterable of such, all of it is used. Inputs are a
            tensor, a tuple of arguments or a mapping of keyword arguments.
        directions: `(K, P)`, normalised by the caller.
        center: `(P,)`; default the model's weights.
        params: the selection in whose order directions and center are.
        level: factor of the loss, > 1.
        step: first stride.
        rtol: relative tolerance of each distance.
        max_doublings: a direction whose level is not reached by then is infinitely flat.
        chunk_size: weight vectors held at once, at most, see `assay.landscape.evaluate`. With 1,
            `vmap` is not used: for models that it cannot run (recurrent ones are recognised).

    Returns:
        Distances to both sides and the loss at the centre.

    Raises:
        ValueError: if `level` ≤ 1, `chunk_size` < 1, shapes do not fit, `data` is empty (also when
            it is an iterator, which cannot be read again), holds no pairs or only ignored targets,
            or the loss at the centre is 0 (no level above it can be defined by a factor) or not
            finite.

    Example:
        >>> import torch
        >>> from assay.landscape import flatness
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.ones(1, 1), torch.zeros(1, 1)  # L(w) = w², L(1) = 1
        >>> F = flatness(line, torch.nn.functional.mse_loss, data, torch.ones(1, 1),
        ...              center=torch.ones(1), level=4.0)
        >>> round(F.right.item(), 2), round(F.left.item(), 2)  # w = 2 and w = -2
        (1.0, 3.0)

    Reference:
        Feng, Tu, "The inverse variance–flatness relation in stochastic gradient descent is
        critical for finding flat minima", PNAS 2021.
    """
    if not level > 1:
        raise ValueError(f"level must be greater than 1, got {level}")
    line = _Losses(model, loss_fn, data, params, chunk_size)
    center, directions = line.center_and_directions(center, directions)
    k = len(directions)
    start = float(line.at(center[None])[0])
    if not 0 < start < math.inf:
        raise ValueError(f"the loss at the centre must be positive and finite, it is {start}")

    def excess(t: Tensor, rows: Tensor) -> Tensor:
        losses = line.along(center, directions, torch.where(rows < k, t, -t), rows % max(k, 1))
        return (losses - level * start).nan_to_num(nan=math.inf, posinf=math.inf)

    strides = torch.full((2 * k,), step, dtype=torch.float64, device=center.device)
    found = bracket(excess, strides, max_iter=max_doublings)
    edges = bisect(excess, found.low, found.high, rtol=rtol)
    right, left = edges.point.chunk(2)
    return Flatness(left, right, start)


class _Losses:
    """The loss over all data at K values of some of a model's weights at once."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Batches,
        params: Selection,
        chunk_size: int,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.params = select_parameters(model, params)
        self.layout = ParameterLayout.over(self.params)
        self.chunk_size = fitting_chunk(chunk_size, self.layout.numel)
        self._places = [
            (place, name)
            for place, name in ParameterLayout.of(model).aliases
            if name in self.params
        ]
        self._data = as_batches(data)
        self._counts = BatchWeights(loss_fn)
        self._resting: dict[int, dict[str, Tensor]] = {}
        self._inside: dict[int, Tensor] = {}
        self._batched = not any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._chain = plain_layers(model)

    def center_and_directions(
        self, center: Tensor | None, directions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both checked, in the model's precision; the centre is by default the model's weights."""
        own = self.layout.flatten(self.params).detach()
        if directions.ndim != 2 or directions.shape[1] != len(own):
            raise ValueError(
                f"directions must have shape (K, {len(own)}), got {tuple(directions.shape)}"
            )
        if center is not None and center.shape != own.shape:
            raise ValueError(f"center must have shape ({len(own)},), got {tuple(center.shape)}")
        return own if center is None else center.to(own), directions.to(own)

    def along(self, center: Tensor, directions: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """At center + t · direction, for distances `(R,)` along the directions `rows`."""
        parts = zip(t.to(center).split(self.chunk_size), rows.split(self.chunk_size), strict=True)
        losses = [self.at(center + far.unsqueeze(1) * directions[row]) for far, row in parts]
        return torch.cat(losses)

    @torch.no_grad()
    def at(self, vectors: Tensor) -> Tensor:
        """At weight vectors `(K, P)`."""
        with evaluating(self.model):
            return self._mean(vectors)

    def _mean(self, vectors: Tensor) -> Tensor:
        total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
        seen, count = False, 0.0
        for inputs, targets in map(pair_of, self._data):
            samples = batch_size(inputs)
            if samples == 0:
                continue
            seen, weight = True, self._counts(inputs, targets)
            if weight == 0:
                continue
            size = max(1, SAMPLES_AT_ONCE // samples)
            losses = [self._losses(part, inputs, targets) for part in vectors.split(size)]
            total += self._counts.sums(torch.cat(losses), weight)
            count += weight
        if not seen:
            raise ValueError(
                "data yields no samples: expected a pair (inputs, targets), or an iterable of such "
                "that can be read again for each distance, not an iterator"
            )
        if count == 0:
            raise self._counts.no_target_counts()
        return total / count

    def _losses(self, vectors: Tensor, inputs: Any, targets: Any) -> Tensor:
        if self._chain is not None and isinstance(inputs, Tensor) and inputs.ndim >= 2:
            outputs = self._outputs_of_chain(self._chain, vectors, inputs)
            return losses_at_points(self.loss_fn, outputs, targets)

        def loss(vector: Tensor) -> Tensor:
            weights = self.layout.unflatten(vector)
            weights |= {place: weights[name] for place, name in self._places}
            output = call_with_tensors(self.model, weights, inputs)
            return losses_at_points(self.loss_fn, [output], targets)[0]

        if not self._batched or len(vectors) == 1:
            return torch.stack([loss(vector) for vector in vectors])
        with contextlib.ExitStack() as stack:
            for name, answer in self._answers_at_rest(inputs).items():
                stack.enter_context(answering(self.model.get_submodule(name), answer))
            return torch.func.vmap(loss)(vectors)

    def _outputs_of_chain(
        self, layers: list[tuple[str, nn.Module]], vectors: Tensor, inputs: Tensor
    ) -> Tensor:
        """Outputs `(K, N, ...)` of linear and elementwise layers, by batched products."""
        moved = self.layout.unflatten(vectors)
        names = {id(p): name for name, p in self.params.items()}
        weights: dict[str, Tensor] = {}
        moving: set[str] = set()
        for place, p in self.model.named_parameters(remove_duplicate=False):
            if id(p) in names:
                weights[place] = moved[names[id(p)]]
                moving.add(place.rpartition(".")[0])
            else:
                weights[place] = p.expand(len(vectors), *p.shape)
        resting = list(itertools.takewhile(lambda layer: layer[0] not in moving, layers))
        x = self._after(resting, inputs)
        return run_chain(layers[len(resting) :], weights, x, len(vectors), shared=True)

    def _after(self, layers: list[tuple[str, nn.Module]], inputs: Tensor) -> Tensor:
        """What layers that do not move make of a batch, once if it stays the same."""
        if id(inputs) in self._inside:
            return self._inside[id(inputs)]
        x = inputs
        for _, layer in layers:
            x = layer(x)
        if isinstance(self._data, list):  # a loader may give other inputs each time
            self._inside[id(inputs)] = x
        return x

    def _answers_at_rest(self, inputs: Any) -> dict[str, Tensor]:
        """What layers that see the data themselves and do not move say, once for one batch."""
        if not isinstance(self._data, list):
            return {}  # a loader may give other inputs each time
        key = id(inputs)
        if key not in self._resting:
            moving = {name.rpartition(".")[0] for name in self.params}
            resting = [n for n in layers_at_the_input(self.model, inputs) if n not in moving]
            self._resting[key] = outputs_of(self.model, resting, inputs)
        return self._resting[key]


@dataclass(frozen=True)
class VarianceFlatnessFit:
    """The law log σ² = const − ψ log F over some principal directions.

    Args:
        exponent: ψ; positive for the inverse law, −2 for thermal equilibrium.
        standard_error: of the exponent.
        spearman: rank correlation of F and σ²; NaN where one of them is constant.
        used: ranks (from 1) of the directions in the fit.
        infinite: how many directions were left out because their level is never reached.

    Example:
        >>> from assay.landscape import VarianceFlatnessFit
        >>> VarianceFlatnessFit(4.0, 0.1, -0.98, (10, 11), 0).exponent
        4.0
    """

    exponent: float
    standard_error: float
    spearman: float
    used: tuple[int, ...]
    infinite: int


def variance_flatness_fit(
    width: Tensor, variance: Tensor, *, first: int = 3, last: int = 150, points: int | None = None
) -> VarianceFlatnessFit:
    """Fit the exponent that links variance to flatness over directions `first`…`last`.

    The leading directions of a run whose loss still falls carry drift, not fluctuation: a huge
    variance along a flat valley. They are to be left out, and said to be.

    Args:
        width: F_i, `(K,)`, by decreasing variance.
        variance: σ_i², `(K,)`.
        first: rank of the first direction used, from 1.
        last: rank of the last one.
        points: use so many directions, evenly spaced in log rank, instead of all.

    Returns:
        The fit.

    Raises:
        ValueError: if `first` < 1, the shapes do not fit, or fewer than 3 directions with finite
            width are left.

    Example:
        >>> import torch
        >>> from assay.landscape import variance_flatness_fit
        >>> F = torch.linspace(1, 5, 20)
        >>> round(variance_flatness_fit(F, 3 * F**-4, first=1).exponent, 6)
        4.0
    """
    if width.shape != variance.shape or width.ndim != 1:
        raise ValueError(
            f"width and variance must be vectors of one length, got {tuple(width.shape)} and "
            f"{tuple(variance.shape)}"
        )
    if first < 1:
        raise ValueError(f"first is a rank, from 1 on, got {first}")
    last = min(last, len(width))
    if points is None:
        ranks = np.arange(first, last + 1)
    else:
        ranks = np.unique(np.geomspace(first, max(first, last), points).round().astype(int))
    f, s = (t.detach().double().cpu().numpy()[ranks - 1] for t in (width, variance))
    usable = np.isfinite(f) & (f > 0) & (s > 0)
    if usable.sum() < 3:
        raise ValueError(
            f"a fit needs 3 directions with finite width, {usable.sum()} of ranks {first}…{last} "
            "are left"
        )
    line: Any = scipy.stats.linregress(np.log(f[usable]), np.log(s[usable]))
    constant = np.ptp(f[usable]) == 0 or np.ptp(s[usable]) == 0
    ranked: Any = (math.nan,) if constant else scipy.stats.spearmanr(f[usable], s[usable])
    return VarianceFlatnessFit(
        exponent=-float(line.slope),
        standard_error=float(line.stderr),
        spearman=float(ranked[0]),
        used=tuple(int(rank) for rank in ranks[usable]),
        infinite=int((~usable).sum()),
    )


def effective_temperature(
    variance: Float[Tensor, " k"], curvature: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """T_i = σ_i² h_i: equal in all directions for thermal noise, not for that of SGD.

    Args:
        variance: σ_i².
        curvature: h_i, the loss's second derivative along direction i.

    Returns:
        The temperatures, in units of the loss.

    Example:
        >>> import torch
        >>> from assay.landscape import effective_temperature
        >>> effective_temperature(torch.tensor([0.5, 0.1]), torch.tensor([1.0, 5.0]))
        tensor([0.5000, 0.5000])
    """
    return variance * curvature


@dataclass(frozen=True, eq=False)
class MinibatchStatistics:
    """How the mini-batches' own losses differ along directions.

    Along direction i each batch's loss is read as ½ h (δ − δ₀)².

    Args:
        slope_variance: variance over batches of ∂L/∂δ at the centre: the noise strength, `(K,)`.
        curvature: mean of h over the batches.
        curvature_variance: variance of h.
        shift_variance: variance of δ₀, over batches with h > 0.

    Example:
        >>> import torch
        >>> from assay.landscape import MinibatchStatistics
        >>> MinibatchStatistics(*torch.ones(4, 1)).curvature
        tensor([1.])
    """

    slope_variance: Float[Tensor, " k"]
    curvature: Float[Tensor, " k"]
    curvature_variance: Float[Tensor, " k"]
    shift_variance: Float[Tensor, " k"]


def minibatch_statistics(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Batches,
    directions: Tensor,
    *,
    center: Tensor | None = None,
    params: Selection = None,
    step: float = 0.05,
    chunk_size: int = 64,
) -> MinibatchStatistics:
    """Statistics of the ensemble of mini-batch losses along directions, by central differences.

    Differences lose digits: use a float64 model, or a `step` along which the loss changes visibly.

    Args:
        model: evaluated in evaluation mode.
        loss_fn: `(output, target) -> scalar`.
        batches: mini-batches `(inputs, targets)`, at least two.
        directions: `(K, P)`, unit vectors.
        center: `(P,)`; default the model's weights.
        params: the selection in whose order directions and center are.
        step: distance of the three points, in units of weight space.
        chunk_size: as of `flatness`.

    Returns:
        Variances and means over the batches.

    Raises:
        ValueError: if there are fewer than two batches, `step` is not positive, `chunk_size` < 1 or
            shapes do not fit.

    Example:
        >>> import torch
        >>> from assay.landscape import minibatch_statistics
        >>> line = torch.nn.Linear(1, 1, bias=False).double()
        >>> batches = [(torch.ones(1, 1).double(), torch.tensor([[y]]).double()) for y in (1, 3)]
        >>> mse = torch.nn.functional.mse_loss  # L = (w − y)²: h = 2, minima at 1 and 3
        >>> found = minibatch_statistics(line, mse, batches, torch.ones(1, 1))
        >>> round(found.curvature.item(), 3), round(found.shift_variance.item(), 3)
        (2.0, 1.0)
    """
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    slopes, curvatures = [], []
    for batch in as_batches(batches):
        line = _Losses(model, loss_fn, [batch], params, chunk_size)
        middle, along = line.center_and_directions(center, directions)
        rows = torch.arange(len(along), device=middle.device).repeat(2)
        far = torch.full((len(along),), step, dtype=torch.float64, device=middle.device)
        here = line.at(middle[None])
        up, down = line.along(middle, along, torch.cat([far, -far]), rows).chunk(2)
        slopes.append((up - down) / (2 * step))
        curvatures.append((up + down - 2 * here) / step**2)
    if len(slopes) < 2:
        raise ValueError(f"batches must hold at least two mini-batches, got {len(slopes)}")
    slope, h = torch.stack(slopes), torch.stack(curvatures)
    shift = torch.where(h > 0, -slope / h, torch.nan)
    deviation = shift - shift.nanmean(0)
    return MinibatchStatistics(
        slope.var(0, correction=0), h.mean(0), h.var(0, correction=0),
        deviation.square().nanmean(0),
    )  # fmt: skip


@torch.no_grad()
def langevin_step(
    parameters: Iterable[Tensor],
    lr: float,
    noise_std: float,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """One step of gradient descent with isotropic Gaussian noise, in place.

    The thermal counterpart of SGD: w ← w − lr · ∂L/∂w + noise_std · ξ.

    Args:
        parameters: with gradients.
        lr: step size.
        noise_std: standard deviation of the noise of each weight.
        generator: source of the noise.

    Raises:
        ValueError: if a parameter has no gradient.

    Example:
        >>> import torch
        >>> from assay.landscape import langevin_step
        >>> w = torch.ones(2, requires_grad=True)
        >>> w.sum().backward()
        >>> langevin_step([w], lr=0.5, noise_std=0.0)
        >>> w.detach()
        tensor([0.5000, 0.5000])
    """
    for parameter in parameters:
        if parameter.grad is None:
            raise ValueError("every parameter needs a gradient: call backward() first")
        noise = torch.randn(
            parameter.shape, generator=generator, dtype=parameter.dtype, device=parameter.device
        )
        parameter.add_(parameter.grad, alpha=-lr).add_(noise, alpha=noise_std)


class FlatSubspacePenalty:
    """Holds weights back along the sharp directions of an earlier task, and leaves them free else.

    λ Σ_i (⟨w − w⁰, p_i⟩ / F_i)², to be added to the loss of a later task against forgetting.

    Args:
        model: whose weights are held.
        directions: p_i, `(K, P)`, unit vectors.
        width: F_i, `(K,)`; infinite ones are free.
        strength: λ.
        center: w⁰, `(P,)`; default the model's weights now.
        params: the selection in whose order directions are.

    Raises:
        ValueError: if the shapes do not fit or a width is not positive.

    Example:
        >>> import torch
        >>> from assay.landscape import FlatSubspacePenalty
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> sharp = torch.tensor([[1.0, 0.0]])
        >>> penalty = FlatSubspacePenalty(model, sharp, torch.tensor([0.5]), strength=1.0)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(torch.tensor([[1.0, 9.0]]))
        >>> round(penalty().item(), 4)
        4.0
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Tensor,
        width: Tensor,
        *,
        strength: float,
        center: Tensor | None = None,
        params: Selection = None,
    ) -> None:
        self.params = select_parameters(model, params)
        self.layout = ParameterLayout.over(self.params)
        if directions.shape != (len(width), self.layout.numel):
            raise ValueError(
                f"directions must have shape ({len(width)}, {self.layout.numel}), got "
                f"{tuple(directions.shape)}"
            )
        if not bool((width > 0).all()):
            raise ValueError("every width must be positive")
        first = next(iter(self.params.values()))
        self._scaled = (directions / width.unsqueeze(1)).to(first)
        start = self.layout.flatten(self.params).detach() if center is None else center
        self._start = start.to(first)
        self.strength = strength

    def __call__(self) -> Tensor:
        """The penalty at the present weights, a scalar that autograd follows."""
        moved = self.layout.flatten(self.params) - self._start
        return self.strength * (self._scaled @ moved).square().sum()
