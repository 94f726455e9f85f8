"""A preconditioner learned from gradients of the user's own convex objective."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from assay.functional import bisect, fit

Gradient = Callable[[Tensor], Tensor]
Sampler = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]

# Tempering stops where the weights are worth this share of the sample.
TEMPERED_SHARE = 0.1


@dataclass(frozen=True)
class GaussianSampler:
    """Points from the normal distribution N(mean, scale² I).

    Args:
        dim: d.
        scale: Standard deviation of each coordinate.
        mean: Of each coordinate.

    Raises:
        ValueError: If `dim` < 1 or `scale` ≤ 0.

    Example:
        >>> import torch
        >>> x, log_density = GaussianSampler(2, scale=3.0)(5, torch.Generator().manual_seed(0))
        >>> x.shape, log_density.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    dim: int
    scale: float = 1.0
    mean: float = 0.0

    def __post_init__(self) -> None:
        _check_at_least_one("dim", self.dim)
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def __call__(
        self, n: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Draw n points, float64, and their log-densities."""
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        constant = self.dim * (math.log(self.scale) + math.log(2 * math.pi) / 2)
        return self.mean + self.scale * z, -z.square().sum(1) / 2 - constant


@dataclass(frozen=True)
class RadialSampler:
    """Points at all scales of distance from a centre: uniform direction, log-uniform radius.

    A Gaussian in d dimensions has all its points at distance √d σ, and a network trained on them
    has seen no gradient of the size that matters near the minimiser. Here every decade of the
    radius gets its share. The density is 1 / (log(high/low) S r^d), S the unit sphere's area.

    Args:
        dim: d.
        low: Smallest radius.
        high: Largest radius; beyond the distance from which optimisation starts.
        center: Of each coordinate.

    Raises:
        ValueError: If `dim` < 1 or not 0 < `low` < `high`.

    Example:
        >>> import torch
        >>> sampler = RadialSampler(50, low=0.1, high=1000.0)
        >>> x, log_density = sampler(4000, torch.Generator().manual_seed(0))
        >>> radii = x.norm(dim=1)
        >>> round((radii < 10).double().mean().item(), 1)  # half of the decades
        0.5
    """

    dim: int
    low: float
    high: float
    center: float = 0.0

    def __post_init__(self) -> None:
        _check_at_least_one("dim", self.dim)
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"expected 0 < low < high, got low={self.low}, high={self.high}")

    def __call__(
        self, n: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Draw n points, float64, and their log-densities."""
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        span = math.log(self.high / self.low)
        log_r = math.log(self.low) + span * torch.rand(n, generator=generator, dtype=torch.float64)
        area = math.log(2) + self.dim / 2 * math.log(math.pi) - math.lgamma(self.dim / 2)
        x = self.center + log_r.exp()[:, None] * nn.functional.normalize(z, dim=1)
        return x, -self.dim * log_r - area - math.log(span)


@dataclass(frozen=True)
class FitReport:
    """How the training of a `LearnedPreconditioner` went.

    Args:
        loss: Weighted mean of ½‖Net(y) − x‖² over the training sample at the end, x standardised.
        ess: Effective sample size (Σw)²/Σw² of the weights; near 1, one point rules all.
        exponent: τ, the power to which the Jacobian weights were taken; 0 for uniform weights.
        coverage: Smallest and largest gradient norm seen. Smaller gradients, nearer to the
            minimiser, are extrapolated to.
        samples: Gradients computed.

    Example:
        >>> report = FitReport(loss=0.1, ess=40.0, exponent=1.0, coverage=(1.0, 9.0), samples=50)
        >>> report.ess / report.samples
        0.8
    """

    loss: float
    ess: float
    exponent: float
    coverage: tuple[float, float]
    samples: int


def effective_sample_size(log_weights: Float[Tensor, " n"]) -> float:
    """Effective sample size (Σw)²/Σw² of importance weights.

    Args:
        log_weights: log w, `(n,)`, up to a constant; −∞ for weight 0.

    Returns:
        Between 1 and n; 0 if all weights are.

    Example:
        >>> import torch
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf]))
        2.0
    """
    if len(log_weights) == 0 or not bool((log_weights > -math.inf).any()):
        return 0.0
    weights = (log_weights - log_weights.max()).exp()
    return (weights.sum().square() / weights.square().sum()).item()


class LearnedPreconditioner(nn.Module):
    r"""∇p as a network from gradients y = ∇f(x) to points x, an approximation of ∇f* = (∇f)⁻¹.

    `fit` draws points xᵢ, computes their gradients yᵢ and minimises Σ wᵢ ½‖Net(yᵢ) − xᵢ‖², both
    standardised. The weights wᵢ ∝ |det J_{G∘∇f}(xᵢ)| / π(xᵢ), G the scaling of the features, make
    the gradients of the sample count as if they were uniformly distributed.

    The network is no gradient of a convex function and may be wrong where it has seen no gradients;
    `DualPreconditionedGD(..., line_search="backtracking")` guards against both.

    Args:
        dim: d.
        hidden: Widths of the hidden layers (leaky ReLU).
        feature_map: None, or `"signed_log"`: s(y) = sign(y) log(1 + |y|), for gradients of very
            different sizes.
        skip: Add to the network, whose last layer then starts at zero, the best linear map.
        slope: Of the leaky ReLU for negative arguments.
        dtype: Of parameters and statistics.

    Raises:
        ValueError: If a width is less than 1 or the feature map unknown.

    Example:
        >>> import torch
        >>> from assay.optim import GaussianSampler, LearnedPreconditioner
        >>> H = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double()
        >>> center = torch.tensor([1.0, -1.0]).double()
        >>> learned = LearnedPreconditioner(2, hidden=(8,))
        >>> report = learned.fit(
        ...     lambda x: (x - center) @ H, GaussianSampler(2), n=100, epochs=1,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> x = torch.tensor([7.0, 7.0]).double()
        >>> step = learned((x - center) @ H) - learned(torch.zeros(2).double())
        >>> (x - step - center).norm() < 0.5  # the linear part alone inverts a linear gradient
        tensor(True)

    Reference:
        "Learning to Optimize via Dual Space Preconditioning", submitted to ICLR 2020.
    """

    vanishes_at_zero = False
    feature_mean: Tensor
    feature_scale: Tensor
    label_mean: Tensor
    label_scale: Tensor
    skip_weight: Tensor
    skip_bias: Tensor

    def __init__(
        self,
        dim: int,
        hidden: tuple[int, ...] = (256, 128),
        feature_map: str | None = None,
        skip: bool = True,
        *,
        slope: float = 0.01,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        for width in (dim, *hidden):
            _check_at_least_one("dim and hidden widths", width)
        if feature_map not in (None, "signed_log"):
            raise ValueError(f"feature_map must be None or 'signed_log', got {feature_map!r}")
        self.dim = dim
        self.feature_map = feature_map
        self.skip = skip
        self.network = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise((dim, *hidden)), 1):
            self.network.add_module(f"linear{i}", nn.Linear(inputs, outputs, dtype=dtype))
            self.network.add_module(f"activation{i}", nn.LeakyReLU(slope))
        last = nn.Linear((dim, *hidden)[-1], dim, dtype=dtype)
        if skip:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.network.add_module(f"linear{len(hidden) + 1}", last)
        zeros, ones = torch.zeros(dim, dtype=dtype), torch.ones(dim, dtype=dtype)
        for name in ("feature_mean", "label_mean", "skip_bias"):
            self.register_buffer(name, zeros.clone())
        for name in ("feature_scale", "label_scale"):
            self.register_buffer(name, ones.clone())
        self.register_buffer("skip_weight", torch.zeros(dim, dim, dtype=dtype))

    def forward(self, g: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the point whose gradient `g` is, as far as the network knows."""
        if g.shape[-1] != self.dim:
            raise ValueError(f"expected gradients of {self.dim} entries, got {tuple(g.shape)}")
        return self._standard(self._features(g)) * self.label_scale + self.label_mean

    def _features(self, g: Tensor) -> Tensor:
        g = g.to(self.feature_mean.dtype)
        mapped = g if self.feature_map is None else g.sign() * torch.log1p(g.abs())
        return (mapped - self.feature_mean) / self.feature_scale

    def _standard(self, z: Tensor) -> Tensor:
        """The standardised label for standardised features."""
        out = self.network(z)
        return out + z @ self.skip_weight.T + self.skip_bias if self.skip else out

    def fit(
        self,
        gradient: Gradient,
        sampler: Sampler,
        *,
        hessian_logdet: Gradient | None = None,
        n: int = 1000,
        epochs: int = 100,
        batch_size: int = 100,
        weights: str = "jacobian",
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        generator: torch.Generator | None = None,
    ) -> FitReport:
        """Sample, weigh, standardise and train; replaces what was learned before.

        Args:
            gradient: ∇f of a batch of points, `(n, d)` to `(n, d)`.
            sampler: `(n, generator) -> (x, log π(x))`, e.g. `GaussianSampler` or `RadialSampler`.
            hessian_logdet: log det ∇²f, `(n, d)` to `(n,)`; None differentiates `gradient`, which
                takes memory for n d² numbers.
            n: Points.
            epochs: Passes over them, with a cosine schedule to zero.
            batch_size: Points a step.
            weights: `"jacobian"`, the paper's; `"uniform"`; or `"tempered"`, the largest power of
                the Jacobian weights, up to 1, whose effective sample size is at least n/10.
            optimizer: Makes the optimizer of the parameters; default Adam with `lr=1e-3`.
            generator: Of sample and batches; default seeded from torch's global generator.

        Returns:
            A `FitReport`; its effective sample size tells whether the weights can be trusted.

        Raises:
            ValueError: If an option is out of its range, the sampler's or a gradient's shape is
                wrong, a gradient is not finite, or every weight is zero.

        Warns:
            UserWarning: If the sampled gradients show that f is not convex.
        """
        for name, value in (("n", n), ("epochs", epochs), ("batch_size", batch_size)):
            _check_at_least_one(name, value)
        if weights not in ("jacobian", "uniform", "tempered"):
            raise ValueError(
                f"weights must be 'jacobian', 'uniform' or 'tempered', got {weights!r}"
            )
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        x, y, log_density = self._sample(gradient, sampler, n, generator)
        _warn_if_not_convex(x, y)
        log_weights, exponent = torch.zeros_like(log_density), 0.0
        if weights != "uniform":
            logdet = (hessian_logdet or _autograd_logdet(gradient))(x).detach()
            log_weights = logdet - log_density.to(logdet)
            if self.feature_map == "signed_log":
                log_weights = log_weights - torch.log1p(y.abs()).sum(1)
            if not bool((log_weights < math.inf).all() and (log_weights > -math.inf).any()):
                raise ValueError(
                    "the weights |det ∇²f(x)| / π(x) are not finite, or all zero: f has to be "
                    "strictly convex on the sample"
                )
            exponent = 1.0 if weights == "jacobian" else _tempering_exponent(log_weights)
            log_weights = torch.nan_to_num(exponent * log_weights, nan=0.0, neginf=-math.inf)
        w = (torch.softmax(log_weights, 0) * n).to(self.label_mean)
        self._standardize(x, y)
        z, labels = self._features(y), (x.to(w) - self.label_mean) / self.label_scale
        if self.skip:
            self._fit_skip(z, labels, w)
        loss = self._train(z, labels, w, epochs, batch_size, optimizer, generator)
        smallest, largest = y.norm(dim=1).aminmax()
        return FitReport(
            loss=loss,
            ess=effective_sample_size(log_weights),
            exponent=exponent,
            coverage=(float(smallest), float(largest)),
            samples=n,
        )

    def _sample(
        self, gradient: Gradient, sampler: Sampler, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_density = sampler(n, generator)
        if x.shape != (n, self.dim) or log_density.shape != (n,):
            raise ValueError(
                f"sampler must return points ({n}, {self.dim}) and log-densities ({n},), got "
                f"{tuple(x.shape)} and {tuple(log_density.shape)}"
            )
        x = x.to(self.label_mean.device)
        y = gradient(x).detach()
        if y.shape != x.shape:
            raise ValueError(
                f"gradient must return {tuple(x.shape)} for points of that shape, "
                f"got {tuple(y.shape)}"
            )
        if not bool(y.isfinite().all()):
            bad = int((~y.isfinite().all(1)).sum())
            raise ValueError(
                f"gradient is not finite at {bad} of {n} points: sample nearer, or use float64"
            )
        return x, y, log_density.to(x.device)

    def _standardize(self, x: Tensor, y: Tensor) -> None:
        self.feature_mean.zero_()
        self.feature_scale.fill_(1.0)
        features = self._features(y)
        for values, mean, scale in (
            (features, self.feature_mean, self.feature_scale),
            (x, self.label_mean, self.label_scale),
        ):
            mean.copy_(values.mean(0))
            deviation = values.std(0, correction=0)
            scale.copy_(deviation.where(deviation > 0, 1.0))

    def _fit_skip(self, z: Tensor, labels: Tensor, w: Tensor) -> None:
        """Weighted least squares from features and a constant to labels."""
        root = w.sqrt()[:, None]
        design = torch.cat([z, torch.ones_like(root)], 1)
        driver = "gelsd" if z.device.type == "cpu" else None  # the one that allows any rank
        solution = torch.linalg.lstsq(root * design, root * labels, driver=driver).solution
        self.skip_weight.copy_(solution[:-1].T)
        self.skip_bias.copy_(solution[-1])

    def _train(
        self,
        z: Tensor,
        labels: Tensor,
        w: Tensor,
        epochs: int,
        batch_size: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None,
        generator: torch.Generator,
    ) -> float:
        linear = z @ self.skip_weight.T + self.skip_bias if self.skip else torch.zeros_like(labels)
        # What the network has to add to the linear part, and its weight as a last column.
        targets = torch.cat([labels - linear, w[:, None]], 1)
        make = optimizer or (lambda params: torch.optim.Adam(params, lr=1e-3))
        steps = make(self.network.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, epochs)
        batches = _Shuffled(z, targets, batch_size, generator)
        with torch.enable_grad():
            fit(self.network, steps, batches, epochs=epochs, loss_fn=_weighted, scheduler=schedule)
        with torch.no_grad():
            return float(_weighted(self.network(z), targets))

    def extra_repr(self) -> str:
        """Return the options."""
        return f"dim={self.dim}, feature_map={self.feature_map!r}, skip={self.skip}"


class _Shuffled:
    """Mini-batches in a new order every epoch."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, generator: torch.Generator) -> None:
        self.x, self.y, self.batch_size, self.generator = x, y, batch_size, generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=self.generator).to(self.x.device)
        for rows in order.split(self.batch_size):
            yield self.x[rows], self.y[rows]


def _weighted(output: Tensor, target: Tensor) -> Tensor:
    """Mean of w ½‖output − label‖²; the last column of `target` is w."""
    return (target[:, -1] * (output - target[:, :-1]).square().sum(1)).mean() / 2


def _tempering_exponent(log_weights: Tensor) -> float:
    """Find the largest power of the weights, up to 1, that is worth a tenth of the sample."""
    needed = TEMPERED_SHARE * len(log_weights)
    # A point of weight 0 keeps it at every positive power.
    finite = log_weights[log_weights > -math.inf]
    if effective_sample_size(finite) >= needed:
        return 1.0

    def missing(exponents: Tensor, rows: Tensor) -> Tensor:
        sizes = [effective_sample_size(float(t) * finite) for t in exponents]
        return needed - torch.tensor(sizes, dtype=exponents.dtype)

    ends = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return bisect(missing, *ends, xtol=1e-9).low.item()


def _autograd_logdet(gradient: Gradient) -> Gradient:
    """Log-determinants of the Jacobians of a batched gradient, by forward-mode derivatives."""

    def logdet(x: Tensor) -> Tensor:
        columns = [
            torch.func.jvp(gradient, (x,), (e.expand_as(x).contiguous(),))[1]
            for e in torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        ]
        return torch.linalg.slogdet(torch.stack(columns, -1)).logabsdet

    return logdet


def _warn_if_not_convex(x: Tensor, y: Tensor) -> None:
    """Gradients of a convex function are monotone: ⟨Δx, Δy⟩ ≥ 0 for every pair of points."""
    dx, dy = x.diff(dim=0), y.diff(dim=0)
    # Directions only: products of gradients of 10^80 with distances need not be finite.
    dx, dy = nn.functional.normalize(dx, dim=1), nn.functional.normalize(dy, dim=1)
    falling = (dx * dy).sum(1) < -1e-6
    if bool(falling.any()):
        warnings.warn(
            f"the gradient is not monotone on {falling.double().mean():.1%} of the sampled pairs: "
            "f is not convex, and its gradient may have no inverse to learn",
            stacklevel=3,
        )


def _check_at_least_one(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
