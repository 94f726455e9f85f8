"""SGD on wide two-layer leaky-ReLU nets: how many updates it can need, and what that proves.

The net has 2k hidden units without biases and a second layer that stays fixed,

    N(x) = v Σ_{i≤k} σ(⟨w_i, x⟩) − v Σ_{i≤k} σ(⟨u_i, x⟩),   σ(z) = max(αz, z),

and is trained sample by sample on the hinge loss max(0, 1 − y N(x)). If ‖x‖ ≤ 1 and some w* has
y ⟨w*, x⟩ ≥ 1 on every sample, the number of non-zero updates is bounded whatever the width, and
the trained net is a function of its start and of the samples that updated it: a compression
scheme, hence a bound on the error that knows nothing of the width either.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.kernels.perceptron import gram_matrix, perceptron_epoch

BoundForm = Literal["published", "tight", "instance"]
Order = Literal["cyclic", "shuffle"]

_WORKING_SET = 2048  # constraints that the margin problem starts from, and adds at a time
_TOLERANCE = 1e-10  # how much of a margin of 1 a constraint outside the working set may lack


class TwoLayerLeakyNet(nn.Module):
    """The net N(x) = v Σ σ(⟨w_i, x⟩) − v Σ σ(⟨u_i, x⟩) with a fixed second layer and no biases.

    `weight` holds w_1 … w_k, then u_1 … u_k, drawn uniformly from the sphere of the given radius;
    the buffer `second_layer` holds +v and −v. At z = 0 the derivative σ'(0) is α, as torch has it.
    Inputs are (..., d) and outputs (...); the sign of an output is the predicted label.

    Args:
        in_features: d.
        k: hidden units of each sign; 2k in all.
        alpha: slope of σ for negative z, in [0, 1]; 0 is the ReLU, for which there is no
            guarantee, and 1 a linear net.
        v: magnitude of the second layer, positive; None for 1/√(2k).
        radius: norm of every row of `weight` at the start, at least 0.
        generator: for the start; None for torch's own.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> net = TwoLayerLeakyNet(3, k=5, alpha=0.2)
        >>> tuple(net.weight.shape), net(torch.ones(4, 3)).shape
        ((10, 3), torch.Size([4]))

    Reference:
        Brutzkus, Globerson, Malach, Shalev-Shwartz, "SGD Learns Over-parameterized Networks that
        Provably Generalize on Linearly Separable Data", ICLR 2018.
    """

    second_layer: Tensor

    def __init__(
        self,
        in_features: int,
        k: int,
        alpha: float = 0.5,
        *,
        v: float | None = None,
        radius: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_net(k, alpha, v)
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if not (math.isfinite(radius) and radius >= 0):
            raise ValueError(f"radius must be a finite number of at least 0, got {radius}")
        self.alpha = float(alpha)
        rows = torch.randn(2 * k, in_features, generator=generator)
        self.weight = nn.Parameter(radius * F.normalize(rows, dim=1))
        signs = torch.ones(2 * k)
        signs[k:] = -1
        self.register_buffer("second_layer", signs * _second_layer(k, v))

    @property
    def in_features(self) -> int:
        """d."""
        return self.weight.shape[1]

    @property
    def k(self) -> int:
        """Hidden units of each sign."""
        return len(self.weight) // 2

    @property
    def v(self) -> float:
        """Magnitude of the second layer."""
        return self.second_layer[0].item()

    @property
    def radius(self) -> float:
        """The largest norm of a row of `weight` as it is now: R of the bounds, at the start."""
        return self.weight.detach().double().norm(dim=1).max().item()

    @torch.no_grad()
    def alignment(self, w_star: Float[Tensor, " d"]) -> float:
        """F = Σ ⟨w_i, w*⟩ − Σ ⟨u_i, w*⟩, which every update raises by at least 2kηvα."""
        product = self.weight.double() @ w_star.to(self.weight.device, torch.float64)
        return (product * self.second_layer.sign()).sum().item()

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """N(x)."""
        return F.leaky_relu(F.linear(x, self.weight), self.alpha) @ self.second_layer

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.in_features}, k={self.k}, alpha={self.alpha:g}, v={self.v:.4g}"


def _second_layer(k: int, v: float | None) -> float:
    return 1 / math.sqrt(2 * k) if v is None else float(v)


def _check_net(k: int, alpha: float, v: float | None) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1 unit of each sign, got {k}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if v is not None and not (math.isfinite(v) and v > 0):
        raise ValueError(f"v must be a positive number or None for 1/√(2k), got {v}")


def _of_the_theorem(net: nn.Module) -> TwoLayerLeakyNet:
    if not isinstance(net, TwoLayerLeakyNet):
        raise TypeError(
            f"net must be a TwoLayerLeakyNet, got {type(net).__name__}: the theorem is about one "
            "hidden layer of leaky ReLUs without biases and with a fixed second layer"
        )
    return net


def _check_lr(lr: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a positive number, got {lr}")


def _samples(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return the samples as rows with norms of at most 1, labels ±1, and the factor applied."""
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(
            "x must be (n, ...) and y (n,) with one label a sample, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    rows = x.detach().flatten(1).to("cpu", dtype)
    labels = y.detach().to("cpu", dtype)
    if not bool((labels.abs() == 1).all()):
        raise ValueError(
            f"y must hold labels −1 and +1, got {labels.unique()[:5].tolist()} "
            "(for labels 0 and 1 pass 2 * y - 1)"
        )
    if len(rows) == 0:
        return rows, labels, 1.0
    largest = rows.double().norm(dim=1).max().item()
    if not (math.isfinite(largest) and largest > 0):
        raise ValueError(f"x must be finite and not all zero; the largest norm is {largest}")
    if abs(largest - 1) <= 4 * torch.finfo(dtype).eps:
        return rows, labels, 1.0
    return rows / largest, labels, 1 / largest


@torch.no_grad()
def perceptron_step(net: nn.Module, x: Float[Tensor, " d"], y: float | Tensor, lr: float) -> bool:
    """Make one SGD step on the hinge loss of one sample, in place; plain torch.

    `run_perceptron_sgd` makes the same steps, much faster. This one is for replaying a compression
    set, for looking at every step, and as the reference.

    Args:
        net: the net.
        x: one sample with ‖x‖ ≤ 1, (d,); on the net's device and of its dtype.
        y: its label, −1 or +1.
        lr: η, positive.

    Returns:
        Whether the sample asked for an update, y N(x) < 1.

    Raises:
        TypeError: If the net is no `TwoLayerLeakyNet`.
        ValueError: If `lr` is not positive.

    Example:
        >>> import torch
        >>> net = TwoLayerLeakyNet(2, k=1, radius=0.0)
        >>> perceptron_step(net, torch.tensor([1.0, 0.0]), 1, lr=8.0)
        True
        >>> perceptron_step(net, torch.tensor([1.0, 0.0]), 1, lr=8.0)  # N(x) is 3 now
        False
    """
    net = _of_the_theorem(net)
    _check_lr(lr)
    z = net.weight @ x
    if float(y) * float(F.leaky_relu(z, net.alpha) @ net.second_layer) >= 1:
        return False
    slope = torch.full_like(z, net.alpha).masked_fill_(z > 0, 1.0)
    net.weight.add_(torch.outer(lr * float(y) * net.second_layer * slope, x))
    return True


@dataclass(frozen=True, eq=False)
class PerceptronResult:
    """What `run_perceptron_sgd` did.

    Args:
        nonzero_updates: samples that asked for an update (y N(x) < 1), counted with repeats: c_n.
        epochs: passes over the data, the last one without an update included.
        compression_set: which samples they were, (c_n,), in order and with repeats; with the start
            they determine the trained net.
        converged: the last pass needed no update: y N(x) ≥ 1 on every sample.
        stuck: a pass had samples with y N(x) < 1, and none of them changed a weight: all units
            are dead on them (ReLU only).
        history: updates of each pass, (epochs,).
        scale: factor by which the samples were multiplied, so that the largest norm is 1.

    Example:
        >>> import torch
        >>> none = torch.empty(0, dtype=torch.int64)
        >>> PerceptronResult(0, 1, none, True, False, torch.zeros(1, dtype=torch.int64), 1.0).stuck
        False
    """

    nonzero_updates: int
    epochs: int
    compression_set: Int[Tensor, " updates"]
    converged: bool
    stuck: bool
    history: Int[Tensor, " epochs"]
    scale: float


def run_perceptron_sgd(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    lr: float = 1.0,
    *,
    order: Order = "cyclic",
    max_epochs: int | None = None,
    generator: torch.Generator | None = None,
) -> PerceptronResult:
    """Train the first layer in place by SGD with batches of one sample until no update is needed.

    The samples are first scaled so that the largest norm is 1, as the theorem wants it; the net is
    homogeneous, so its predictions do not depend on that factor. Larger batches, biases, another
    loss or a trained second layer are outside the theorem and hence not offered.

    Args:
        net: a `TwoLayerLeakyNet`; float32 or float64. Training runs on the CPU, wherever it is.
        x: samples, (n, ...); all but the first dimension are flattened.
        y: labels −1 and +1, (n,).
        lr: η, positive.
        order: `"cyclic"` (as given) or `"shuffle"` (a new permutation each pass).
        max_epochs: passes after which to give up. None trains to convergence, which needs α > 0
            and separable samples, and is checked before.
        generator: for `"shuffle"`; None for torch's own.

    Returns:
        Number of updates, the compression set, and whether it converged.

    Raises:
        TypeError: If the net is no `TwoLayerLeakyNet`.
        ValueError: If an argument is out of its range, shapes or labels do not fit, or
            `max_epochs` is None and the samples are not separable (the message names samples that
            contradict each other) or α is 0.

    Example:
        >>> import torch
        >>> net = TwoLayerLeakyNet(4, k=50)
        >>> x, y = torch.eye(4), torch.tensor([1.0, -1.0, 1.0, 1.0])
        >>> result = run_perceptron_sgd(net, x, y)
        >>> result.converged, bool((net(x).sign() == y).all()), result.nonzero_updates >= 4
        (True, True, True)

    Reference:
        Brutzkus, Globerson, Malach, Shalev-Shwartz, "SGD Learns Over-parameterized Networks that
        Provably Generalize on Linearly Separable Data", ICLR 2018.
    """
    net = _of_the_theorem(net)
    _check_lr(lr)
    if order not in ("cyclic", "shuffle"):
        raise ValueError(f"order must be 'cyclic' or 'shuffle', got {order!r}")
    if max_epochs is not None and max_epochs < 1:
        raise ValueError(f"max_epochs must be at least 1 or None, got {max_epochs}")
    dtype = net.weight.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"net must be float32 or float64, got {dtype}")
    rows, labels, scale = _samples(x, y, dtype)
    if rows.shape[1] != net.in_features and len(rows):
        raise ValueError(
            f"x must have {net.in_features} features a sample as the net, got {rows.shape[1]}"
        )
    if max_epochs is None:
        max_epochs = _sufficient_epochs(net, rows, labels, lr)
    weight = net.weight.detach().to("cpu", copy=True).contiguous()
    signs = net.second_layer.detach().cpu()
    gram = gram_matrix(rows, len(weight))
    visits = torch.arange(len(rows))
    sets: list[Tensor] = []
    converged = stuck = False
    while not (converged or stuck) and len(sets) < max_epochs:
        if order == "shuffle":
            visits = torch.randperm(len(rows), generator=generator)
        found, changed = perceptron_epoch(
            weight, signs, rows, labels, visits, lr=lr, slope=net.alpha, gram=gram
        )
        sets.append(found)
        converged = len(found) == 0
        stuck = not converged and not changed
    with torch.no_grad():
        net.weight.copy_(weight)
    compression_set = torch.cat(sets)
    return PerceptronResult(
        nonzero_updates=len(compression_set),
        epochs=len(sets),
        compression_set=compression_set,
        converged=converged,
        stuck=stuck,
        history=torch.tensor([len(found) for found in sets]),
        scale=scale,
    )


def _sufficient_epochs(net: TwoLayerLeakyNet, rows: Tensor, labels: Tensor, lr: float) -> int:
    """Passes that are enough by the theorem: every pass but the last makes an update."""
    if len(rows) == 0:
        return 1
    if net.alpha == 0:
        raise ValueError(
            "alpha is 0: ReLU nets may never fit separable samples; pass max_epochs, or α > 0"
        )
    found = hard_margin(rows, labels)
    if not found.separable:
        names = ", ".join(map(str, found.support[:10].tolist()))
        raise ValueError(
            "the samples are not linearly separable through the origin, so training need not "
            f"end: a convex combination of y·x over {len(found.support)} of them "
            f"(positions {names}{', …' if len(found.support) > 10 else ''}) has norm "
            f"{found.slack:.1e}; remove them, append a constant feature to x, or pass max_epochs"
        )
    assert found.w_star is not None
    bound = update_bound(
        found.norm,
        lr=lr,
        k=net.k,
        alpha=net.alpha,
        v=net.v,
        form="instance",
        alignment=net.alignment(found.w_star),
        weight_norm=net.weight.detach().double().norm().item(),
    )
    return math.floor(bound) + 2


@dataclass(frozen=True, eq=False)
class HardMargin:
    """The separator w* of least norm with y ⟨w*, x⟩ ≥ 1 on every sample.

    Args:
        w_star: w*, (d,) float64, for samples multiplied by `scale`; None if there is none.
        norm: ‖w*‖, the inverse of the margin; `inf` if there is no separator.
        lower: a lower bound on the least norm: `norm / lower − 1` is how far from least w* is.
        separable: whether there is a separator (through the origin).
        support: positions of the support vectors; of an inseparable set, of samples that
            contradict each other.
        slack: smallest norm of a convex combination of y x: the margin 1/‖w*‖, or 0 but for
            rounding if the set is not separable.
        scale: factor by which the samples were multiplied, so that the largest norm is 1.

    Example:
        >>> import math, torch
        >>> HardMargin(None, math.inf, math.inf, False, torch.tensor([0, 1]), 0.0, 1.0).separable
        False
    """

    w_star: Float[Tensor, " d"] | None
    norm: float
    lower: float
    separable: bool
    support: Int[Tensor, " s"]
    slack: float
    scale: float


def hard_margin(x: Tensor, y: Tensor) -> HardMargin:
    """Find min ‖w‖ subject to y ⟨w, x⟩ ≥ 1 on every sample, or show that there is no such w.

    Solved exactly as a least-distance problem (non-negative least squares, an active-set method)
    on a growing working set of constraints; float64 on the CPU. The w* returned satisfies every
    constraint in floating point, so its norm is an upper bound whatever the solver did.

    Args:
        x: samples, (n, ...), n ≥ 1; flattened, and scaled so that the largest norm is 1.
        y: labels −1 and +1, (n,).

    Returns:
        w*, its norm, support vectors and the scaling factor. Margins below about 1e-7 count as
        not separable.

    Raises:
        ValueError: If shapes or labels do not fit, or there are no samples.

    Example:
        >>> import torch
        >>> found = hard_margin(torch.eye(4), torch.tensor([1.0, -1.0, 1.0, 1.0]))
        >>> round(found.norm, 6), found.w_star.round(decimals=6).tolist()
        (2.0, [1.0, -1.0, 1.0, 1.0])

    Reference:
        Lawson, Hanson, "Solving Least Squares Problems", 1974, chapter 23 (least-distance
        programming).
    """
    rows, labels, scale = _samples(x, y, torch.float64)
    if len(rows) == 0:
        raise ValueError("hard_margin needs at least one sample, got none")
    signed = (rows * labels.unsqueeze(1)).numpy()
    working = np.arange(min(len(signed), _WORKING_SET))
    while True:
        w, multipliers, slack = _least_distance(signed[working])
        support = torch.from_numpy(working[multipliers > 0])
        if w is None or (signed[working] @ w).min() <= 0:
            return HardMargin(None, math.inf, math.inf, False, support, slack, scale)
        margins = signed @ w
        violated = np.flatnonzero(margins < margins[working].min() - _TOLERANCE)
        if len(violated) == 0:
            break
        worst = violated[np.argsort(margins[violated])[:_WORKING_SET]]
        working = np.concatenate([working, worst])
    lower = _dual_bound(signed[working], multipliers)
    w /= margins.min()
    norm = float(np.linalg.norm(w))
    w_star = torch.from_numpy(w)
    return HardMargin(w_star, norm, min(lower, norm), True, support, slack, scale)


def _least_distance(constraints: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, float]:
    """Solve min ‖w‖ s.t. constraints · w ≥ 1; also its multipliers, and the margin."""
    n, features = constraints.shape
    matrix = np.vstack([constraints.T, np.ones(n)])
    target = np.zeros(features + 1)
    target[-1] = 1
    multipliers, _ = scipy.optimize.nnls(matrix, target)
    residual = matrix @ multipliers - target
    total = multipliers.sum()
    slack = float(np.linalg.norm(residual[:-1]) / total) if total > 0 else math.inf
    solvable = slack > 1e-7 and residual[-1] < 0
    return (-residual[:-1] / residual[-1] if solvable else None), multipliers, slack


def _dual_bound(constraints: np.ndarray, multipliers: np.ndarray) -> float:
    """Σa / ‖Σ a y x‖ for any a ≥ 0: a lower bound on ‖w*‖ by Cauchy and Schwarz."""
    combination = np.linalg.norm(multipliers @ constraints)
    return float(multipliers.sum() / combination)


def update_bound(
    norm: float,
    *,
    lr: float,
    k: int,
    alpha: float,
    v: float | None = None,
    radius: float | None = None,
    form: BoundForm = "published",
    alignment: float | None = None,
    weight_norm: float | None = None,
) -> float:
    """Bound the number of non-zero updates of SGD on separable samples with ‖x‖ ≤ 1.

    Every update raises F = Σ ⟨w_i, w*⟩ − Σ ⟨u_i, w*⟩ by a = 2kηvα at least and ‖W‖² by
    g = 2η + 2kη²v² at most, while F ≤ √(2k) ‖w*‖ ‖W‖. With b = ‖w*‖ √(2kg) and c = 4kR‖w*‖ that
    gives, from the sharpest to the loosest,

    * `"instance"`: the larger root t of (F_0 + a t)² = 2k‖w*‖² (‖W_0‖² + g t);
    * `"tight"`: the square of the larger root s of a s² = b s + c;
    * `"published"`: (b/a)² + (b/a)√(c/a) + c/a, which is the paper's
      ‖w*‖²/α² + ‖w*‖²/(kηv²α²) + √(R(8k²η²v² + 8ηk)) ‖w*‖^{3/2} / (2k(ηvα)^{3/2}) + 2R‖w*‖/(ηvα).

    With v = 1/√(2k) the first two terms are (1 + 2/η) ‖w*‖²/α², free of the width.

    Args:
        norm: ‖w*‖ for samples with ‖x‖ ≤ 1, at least 1; from `hard_margin`.
        lr: η, positive.
        k: hidden units of each sign.
        alpha: α in (0, 1].
        v: magnitude of the second layer; None for 1/√(2k).
        radius: R, the largest row norm at the start; for `"published"` and `"tight"`.
        form: which of the three.
        alignment: F_0, `net.alignment(w_star)` at the start; for `"instance"`.
        weight_norm: ‖W_0‖, the Frobenius norm at the start; for `"instance"`.

    Returns:
        The bound, a number of updates (not of epochs).

    Raises:
        ValueError: If an argument is out of its range, what the form needs is missing, or `norm`
            is infinite (the samples are not separable).

    Example:
        >>> round(update_bound(3.0, lr=2.0, k=100, alpha=0.5, radius=0.0), 6)
        72.0

    Reference:
        Brutzkus, Globerson, Malach, Shalev-Shwartz, "SGD Learns Over-parameterized Networks that
        Provably Generalize on Linearly Separable Data", ICLR 2018, Theorem 2.
    """
    _check_lr(lr)
    _check_net(k, alpha, v)
    if alpha == 0:
        raise ValueError("alpha must be positive: for the ReLU there is no bound")
    if not (math.isfinite(norm) and norm >= 1 - 1e-9):
        raise ValueError(
            f"norm must be a finite ‖w*‖ ≥ 1 (it is the inverse of a margin ≤ 1), got {norm}; "
            "an infinite one means that the samples are not separable"
        )
    v = _second_layer(k, v)
    advance = 2 * k * lr * v * alpha
    growth = 2 * lr + 2 * k * (lr * v) ** 2
    reach = 2 * k * norm**2
    if form == "instance":
        if alignment is None or weight_norm is None:
            raise ValueError("form 'instance' needs alignment (F_0) and weight_norm (‖W_0‖)")
        half = advance * alignment - reach * growth / 2
        # F_0 ≤ √(2k) ‖w*‖ ‖W_0‖ makes this constant negative; rounding must not undo that.
        constant = min(alignment**2 - reach * weight_norm**2, 0.0)
        root = math.sqrt(half**2 - advance**2 * constant)
        # The larger root, written so that nothing cancels.
        return (root - half) / advance**2 if half <= 0 else -constant / (root + half)
    if radius is None or not radius >= 0:
        raise ValueError(f"form {form!r} needs radius (R ≥ 0), got {radius}")
    b, c = math.sqrt(reach * growth), 4 * k * radius * norm
    if form == "tight":
        return ((b + math.sqrt(b**2 + 4 * advance * c)) / (2 * advance)) ** 2
    if form == "published":
        return (b / advance) ** 2 + b / advance * math.sqrt(c / advance) + c / advance
    raise ValueError(f"form must be 'published', 'tight' or 'instance', got {form!r}")


def compression_bound(n: int, c: float, delta: float = 0.05, val_loss: float = 0.0) -> float:
    """Bound the error of a net that is determined by its start and c of its n samples.

    With probability at least 1 − δ over the samples, and L_V the error on those not used,

        L_D ≤ L_V + √(4 L_V c log(n/δ) / n) + 8 c log(n/δ) / n.

    For a net with y N(x) ≥ 1 on all samples L_V = 0. The theorem wants n ≥ 2c; below that its
    value is above 1 by itself. It fixes c before the samples are seen: `update_bound` is such a
    c. For a count observed afterwards it holds for each c by itself, not for all at once.

    Args:
        n: samples.
        c: updates, counted with repeats, at least 1.
        delta: δ in (0, 1).
        val_loss: L_V in [0, 1], share of errors on the samples outside the compression set.

    Returns:
        The bound on the probability of an error; vacuous from 1 on.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(compression_bound(100_000, 46), 4)
        0.0534
        >>> compression_bound(700, 4300) > 1  # vacuous
        True

    Reference:
        Brutzkus, Globerson, Malach, Shalev-Shwartz, "SGD Learns Over-parameterized Networks that
        Provably Generalize on Linearly Separable Data", ICLR 2018, Theorem 3. The theorem on
        compression schemes: Shalev-Shwartz, Ben-David, "Understanding Machine Learning", 2014,
        Theorem 30.2.
    """
    if n < 1 or not c >= 1:
        raise ValueError(f"n and c must be at least 1, got n={n} and c={c}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if not 0 <= val_loss <= 1:
        raise ValueError(f"val_loss must be in [0, 1], got {val_loss}")
    rate = c * math.log(n / delta) / n
    return val_loss + math.sqrt(4 * val_loss * rate) + 8 * rate


@dataclass(frozen=True)
class UpdateCertificate:
    """What is guaranteed of a net before it is trained.

    Args:
        norm: ‖w*‖ of the samples scaled to norm 1 at most.
        scale: that scaling factor.
        instance: bound on the updates from the start itself.
        tight: bound on the updates from the largest row norm.
        published: the same as the paper writes it.
        error: bound on the error of the trained net, from `instance`.
        delta: the probability with which that bound may fail.
        vacuous: whether `error` is 1 or more, and says nothing.

    Example:
        >>> UpdateCertificate(2.0, 1.0, 30.0, 31.0, 32.0, 0.4, 0.05, False).vacuous
        False
    """

    norm: float
    scale: float
    instance: float
    tight: float
    published: float
    error: float
    delta: float
    vacuous: bool


def update_certificate(
    net: nn.Module, x: Tensor, y: Tensor, lr: float = 1.0, *, delta: float = 0.05
) -> UpdateCertificate:
    """Say, before training, how many updates a net can need on samples, and what error follows.

    The error bound uses ‖w*‖ of the samples themselves in place of that of their distribution,
    which the theorem assumes to be known: a plug-in figure.

    Args:
        net: the `TwoLayerLeakyNet` as it will be trained, α > 0.
        x: samples, (n, ...).
        y: labels −1 and +1, (n,).
        lr: η, positive.
        delta: δ in (0, 1).

    Returns:
        The three bounds on the updates and the bound on the error.

    Raises:
        TypeError: If the net is no `TwoLayerLeakyNet`.
        ValueError: If the samples are not separable, or an argument is out of its range.

    Example:
        >>> import torch
        >>> net = TwoLayerLeakyNet(4, k=50)
        >>> x, y = torch.eye(4), torch.tensor([1.0, -1.0, 1.0, 1.0])
        >>> promised = update_certificate(net, x, y)
        >>> run_perceptron_sgd(net, x, y).nonzero_updates <= promised.instance
        True
        >>> promised.vacuous  # four samples prove nothing
        True

    Reference:
        Brutzkus, Globerson, Malach, Shalev-Shwartz, "SGD Learns Over-parameterized Networks that
        Provably Generalize on Linearly Separable Data", ICLR 2018.
    """
    net = _of_the_theorem(net)
    found = hard_margin(x, y)
    if not found.separable or found.w_star is None:
        raise ValueError(
            "the samples are not linearly separable through the origin: those at positions "
            f"{found.support[:10].tolist()} contradict each other; there is no bound"
        )
    start = {
        "alignment": net.alignment(found.w_star),
        "weight_norm": net.weight.detach().double().norm().item(),
        "radius": net.radius,
    }
    instance, tight, published = (
        update_bound(found.norm, lr=lr, k=net.k, alpha=net.alpha, v=net.v, form=form, **start)
        for form in ("instance", "tight", "published")
    )
    error = compression_bound(len(x), max(instance, 1.0), delta)
    return UpdateCertificate(
        found.norm, found.scale, instance, tight, published, error, delta, error >= 1
    )
