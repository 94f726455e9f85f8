"""Inputs on the decision boundary of a classifier: bisection, DeepDIG and its baselines."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from assay.analysis.autoencoder import Bounds, check_bounds, default_autoencoder
from assay.analysis.boundary_geometry import between, nearest_neighbour
from assay.analysis.classifier import (
    batched_logits,
    check_inputs,
    embedding_of,
    frozen,
    logits_of,
    predict,
)
from assay.functional.bisection import bisect
from assay.functional.training import Record, fit

# An epoch of `fit` makes one record of the learning curve.
STEPS_A_RECORD = 100


@dataclass(frozen=True, eq=False, repr=False)
class BoundarySamples:
    """Inputs between two classes, as `bisect_boundary` left them.

    Args:
        x: the point evaluated last on each segment, `(N, ...)`.
        p: the class probabilities there, `(N, C)`.
        status: `SUCCESS` (|p_s − p_t| < β), `THIRD_CLASS` (neither s nor t is predicted) or
            `NOT_CONVERGED` (`max_iter`, or the two ends have become neighbouring floating-point
            numbers before β was reached), an integer `(N,)`.
        iterations: forward passes spent on each pair, `(N,)`.
        pairs: the two ends of each segment, `(2, N, ...)`: in class s, in class t.
        bracket: what is left of each segment, `(2, N)`, as positions in [0, 1] from the first end
            to the second.
        classes: s and t.

    Example:
        >>> import torch
        >>> from assay.analysis import bisect_boundary
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> samples = bisect_boundary(model, torch.eye(2)[:1], torch.eye(2)[1:], s=0, t=1)
        >>> samples.counts, samples.x
        ({'success': 1, 'third class': 0, 'not converged': 0}, tensor([[0.5000, 0.5000]]))
    """

    SUCCESS: ClassVar[int] = 0
    THIRD_CLASS: ClassVar[int] = 1
    NOT_CONVERGED: ClassVar[int] = 2

    x: Float[Tensor, "n ..."]
    p: Float[Tensor, "n c"]
    status: Int[Tensor, " n"]
    iterations: Int[Tensor, " n"]
    pairs: Float[Tensor, "2 n ..."]
    bracket: Float[Tensor, "2 n"]
    classes: tuple[int, int]

    @property
    def success(self) -> Bool[Tensor, " n"]:
        """Which of the samples are on the boundary."""
        return self.status == self.SUCCESS

    @property
    def success_rate(self) -> float:
        """Share of pairs that led to a sample on the boundary, in [0, 1].

        Raises:
            ValueError: if there are no pairs.
        """
        if len(self.x) == 0:
            raise ValueError("there are no pairs, so there is no success rate")
        return self.success.double().mean().item()

    @property
    def borderline(self) -> Float[Tensor, "m ..."]:
        """The samples that are on the boundary, `(M, ...)`."""
        return self.x[self.success]

    @property
    def gap(self) -> Float[Tensor, " n"]:
        """|p_s − p_t| of each sample."""
        s, t = self.classes
        return (self.p[:, s] - self.p[:, t]).abs()

    @property
    def counts(self) -> dict[str, int]:
        """Number of pairs by outcome."""
        names = ("success", "third class", "not converged")
        return {name: int((self.status == code).sum()) for code, name in enumerate(names)}

    def ends(self) -> tuple[Tensor, Tensor]:
        """The two ends of what is left of each segment, `(N, ...)` each."""
        a, b = self.pairs
        low, high = (between(a, b, position) for position in self.bracket)
        return low, high

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        s, t = self.classes
        outcome = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"BoundarySamples({s} to {t}: {outcome})"


@torch.no_grad()
def bisect_boundary(
    model: nn.Module,
    a: Tensor,
    b: Tensor,
    s: int,
    t: int,
    *,
    tol: float = 1e-4,
    max_iter: int = 60,
    batch_size: int = 256,
) -> BoundarySamples:
    """Bisect segments from class s to class t until both are equally probable.

    All pairs are halved in lock-step, with one forward pass of the middles that are still open:

        m = (x₁ + x₂)/2, then  argmax f(m) ∉ {s, t}: third class;  |p_s(m) − p_t(m)| < tol: success;
        otherwise m replaces the end on its own side.

    The model is evaluated in evaluation mode and left as it was.

    Args:
        model: a classifier, see `Classifier`.
        a: inputs that the model assigns to s, `(N, ...)`.
        b: inputs that it assigns to t, of the same shape.
        s: a class.
        t: another class.
        tol: β, the gap in probability below which a sample is on the boundary.
        max_iter: halvings after which a pair has not converged.
        batch_size: inputs a forward pass.

    Returns:
        One sample a pair, with a status.

    Raises:
        ValueError: if `s` equals `t` or one is no class of the model, the shapes differ, an end is
            not in its class, the inputs are integers, a logit is NaN, or an option is out of range.

    Example:
        >>> import torch
        >>> from assay.analysis import bisect_boundary
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.eye_(model.weight), torch.nn.init.zeros_(model.bias)
        >>> a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> samples = bisect_boundary(model, a, b, s=0, t=1, tol=1e-6)
        >>> samples.x
        tensor([[0.6667, 0.6667]])

    Reference:
        H. Karimi, T. Derr, J. Tang. Characterizing the decision boundary of deep neural networks.
        2019. https://arxiv.org/abs/1912.11460
    """
    check_inputs("a", a)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"a and b must be of one shape and dtype, got {tuple(a.shape)} {a.dtype} and "
            f"{tuple(b.shape)} {b.dtype}"
        )
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    with frozen(model):
        first, second = (batched_logits(model, ends, batch_size).softmax(1) for ends in (a, b))
        _check_classes(s, t, first.shape[1])
        for name, found, label in (("a", first, s), ("b", second, t)):
            # Up to tol: rounding differs from batch to batch, and may decide between classes.
            wrong = (found.amax(1) - found[:, label] > tol).nonzero().squeeze(1)
            if len(wrong):
                raise ValueError(
                    f"every input of {name} must be predicted as class {label}; {len(wrong)} of "
                    f"{len(found)} are not, e.g. number {int(wrong[0])}"
                )
        x, p = b.clone(), second

        def gap(position: Tensor, rows: Tensor) -> Tensor:
            middle = between(a.index_select(0, rows), b.index_select(0, rows), position)
            found = torch.softmax(batched_logits(model, middle, batch_size), 1)
            x.index_copy_(0, rows, middle)
            p.index_copy_(0, rows, found)
            winner = found.argmax(1)
            # NaN tells the bisection that there is nothing to look for between s and t.
            return (found[:, t] - found[:, s]).masked_fill((winner != s) & (winner != t), math.nan)

        # Positions in the precision of the inputs: where they cannot be told apart any more, the
        # inputs cannot either, and the search ends.
        low = torch.zeros(len(a), dtype=a.dtype, device=a.device)
        result = bisect(gap, low, low + 1, ftol=tol, max_iter=max_iter)
    bracket = torch.stack([result.low, result.high])
    pairs = torch.stack([a, b])
    # The codes of Bisection and of BoundarySamples agree: reached, stopped, exhausted.
    return BoundarySamples(x, p, result.status, result.iterations, pairs, bracket, (s, t))


class DeepDIG:
    """Inputs on the boundary between two classes that look like data (DeepDIG).

    1. An auto-encoder A₁ learns to change samples x of class s a little, into what the classifier
       takes for t: it minimises  rec(A₁(x), x) + α · BCE(p(A₁(x)), onehot(t)).
       Kept are x' = A₁(x) where f(x) = s and f(x') = t.
    2. A₂ learns in the same way to lead the x' back: x'' = A₂(x') with f(x'') = s. Now x' and x''
       are close to each other and on two sides of the boundary.
    3. `bisect_boundary` between x'' and x'.

    rec is the binary cross-entropy of inputs scaled to [0, 1], or for unbounded inputs the squared
    error. The classifier's term is computed from logits, so that it also has a gradient where the
    softmax is saturated. The classifier is in evaluation mode, frozen while a method runs, and left
    as it was.

    Args:
        model: a classifier, see `Classifier`.
        s: the class of the samples.
        t: the class on the other side.
        autoencoder: a module that maps inputs to inputs of the same shape, within `bounds`; both
            stages train a copy of it. Default: `ConvAutoencoder` for images with three channels,
            otherwise `DenseAutoencoder`.
        alpha: α, weight of the classifier's term.
        beta: β, the gap in probability below which a sample is on the boundary.
        steps: optimizer steps of each auto-encoder.
        lr: learning rate of Adam; times 0.95 every 1,000 steps.
        batch_size: samples a step.
        bounds: smallest and largest value of the inputs, or None if they have no bounds.
        min_survivors: fewest samples that have to pass each of the first two stages.

    Raises:
        ValueError: if `s` equals `t` or a setting is out of range; in `fit`, if an index is no
            class of the model, the labels are not as many as the inputs, or the inputs are empty or
            not within the bounds.
        RuntimeError: in `fit`, if the model puts too few samples in class s, or too few survive a
            stage; `generate` before `fit`.

    Example:
        >>> import torch
        >>> from assay.analysis import DeepDIG
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]))
        >>> x = torch.rand(200, 3) * torch.tensor([1.0, 0.2, 1.0])  # class 0
        >>> dig = DeepDIG(model, 0, 1, alpha=2.0, steps=200).fit(x)
        >>> samples = dig.generate()
        >>> (samples.gap[samples.success] < 1e-4).all()
        tensor(True)

    Reference:
        H. Karimi, T. Derr, J. Tang. Characterizing the decision boundary of deep neural networks.
        2019. https://arxiv.org/abs/1912.11460
    """

    def __init__(
        self,
        model: nn.Module,
        s: int,
        t: int,
        autoencoder: nn.Module | None = None,
        *,
        alpha: float = 0.8,
        beta: float = 1e-4,
        steps: int = 5000,
        lr: float = 1e-2,
        batch_size: int = 128,
        bounds: Bounds = (0.0, 1.0),
        min_survivors: int = 10,
    ) -> None:
        _check_classes(s, t, None)
        for name, value in (("beta", beta), ("lr", lr)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {alpha}")
        for name, count in (
            ("steps", steps),
            ("batch_size", batch_size),
            ("min_survivors", min_survivors),
        ):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        check_bounds(bounds)
        self.model = model
        self.s, self.t = s, t
        self.autoencoder = autoencoder
        self.alpha, self.beta = alpha, beta
        self.steps, self.lr, self.batch_size = steps, lr, batch_size
        self.bounds = bounds
        self.min_survivors = min_survivors
        self.history: dict[str, list[Record]] = {}
        self.survivors: dict[str, int] = {}
        self.first: nn.Module | None = None
        self.second: nn.Module | None = None
        self.index = torch.zeros(0, dtype=torch.int64)
        self._pairs: tuple[Tensor, Tensor] | None = None

    def fit(
        self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> "DeepDIG":
        """Train both auto-encoders.

        Afterwards `first` and `second` are A₁ and A₂, `history` holds their learning curves,
        `survivors` the number of samples after each stage, and `index` the positions in `x` of
        those that reached the end.

        Args:
            x: samples of class s, `(N, ...)`, floating point.
            y: labels `(N,)`; if given, only the samples labelled s are used.
            generator: source of the auto-encoders' initialisation and of the batches; default
                torch's global one.

        Returns:
            Itself.
        """
        if y is not None:
            _check_labels(y, x)
        index = torch.arange(len(x)) if y is None else (y == self.s).nonzero().squeeze(1)
        samples = x[index]
        self._check_samples(samples)
        seeds = torch.randint(2**62, (2,), generator=generator).tolist()
        with frozen(self.model), torch.random.fork_rng(devices=_cuda_devices(samples)):
            predicted = predict(self.model, samples)
            self.survivors = {
                "samples": len(samples),
                f"predicted {self.s}": int((predicted == self.s).sum()),
            }
            if self.survivors[f"predicted {self.s}"] < self.min_survivors:
                raise RuntimeError(
                    f"the model puts too few samples in class {self.s} ({self._counts()}): give "
                    "more samples of it, or a model that recognises them"
                )
            torch.manual_seed(seeds[0])
            self.first, across = self._stage("I", samples, self.t)
            # Trained on all samples of the class; the pairs begin where the model agrees.
            there = (predicted == self.s) & (predict(self.model, across) == self.t)
            self._survived("I", there)
            torch.manual_seed(seeds[1])
            self.second, back = self._stage("II", across[there], self.s)
            here = predict(self.model, back) == self.s
            self._survived("II", here)
        self._pairs = back[here], across[there][here]
        kept = there.nonzero().squeeze(1)[here]
        self.index = index.to(kept.device)[kept]
        return self

    def generate(self, *, max_iter: int = 60) -> BoundarySamples:
        """Bisect between the pairs that `fit` found.

        Args:
            max_iter: see `bisect_boundary`.

        Returns:
            One sample a pair; `samples.pairs` are x'' and x'.
        """
        if self._pairs is None:
            raise RuntimeError("call fit(x) before generate()")
        a, b = self._pairs
        return bisect_boundary(self.model, a, b, self.s, self.t, tol=self.beta, max_iter=max_iter)

    def _check_samples(self, x: Tensor) -> None:
        check_inputs("x", x)
        if len(x) == 0:
            raise ValueError(f"x holds no samples of class {self.s}")
        if self.bounds is not None:
            low, high = x.min().item(), x.max().item()
            if low < self.bounds[0] or high > self.bounds[1]:
                raise ValueError(
                    f"x must lie within bounds={self.bounds}, got values from {low:g} to {high:g}; "
                    "give other bounds, or None for inputs without bounds"
                )
        with frozen(self.model), torch.no_grad():
            _check_classes(self.s, self.t, batched_logits(self.model, x[:1]).shape[1])

    def _stage(self, stage: str, x: Tensor, target: int) -> tuple[nn.Module, Tensor]:
        """A trained auto-encoder that leads `x` to class `target`, and where it leads them."""
        prototype = self.autoencoder or default_autoencoder(x.shape[1:], self.bounds)
        autoencoder = copy.deepcopy(prototype).to(x.device, x.dtype).train()
        autoencoder.requires_grad_(True)
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=self.lr)

        def loss_fn(output: Tensor, x: Tensor) -> Tensor:
            if output.shape != x.shape:
                raise ValueError(
                    f"the auto-encoder must keep the shape {tuple(x.shape)}, got "
                    f"{tuple(output.shape)}"
                )
            towards = _one_hot_cross_entropy(logits_of(self.model, output), target)
            return _reconstruction(output, x, self.bounds) + self.alpha * towards

        with torch.enable_grad():
            self.history[stage] = fit(
                autoencoder,
                optimizer,
                _Draws(x, self.batch_size, self.steps),
                epochs=math.ceil(self.steps / STEPS_A_RECORD),
                loss_fn=loss_fn,
                step_scheduler=StepLR(optimizer, 1000, gamma=0.95),
            )
        with torch.no_grad():
            return autoencoder, torch.cat([autoencoder(part) for part in x.split(1024)])

    def _survived(self, stage: str, kept: Tensor) -> None:
        self.survivors[f"component {stage}"] = int(kept.sum())
        if int(kept.sum()) < self.min_survivors:
            raise RuntimeError(
                f"component {stage} left too few samples between classes {self.s} and {self.t} "
                f"({self._counts()}): train longer (steps={self.steps}) or weigh the classifier "
                f"more (alpha={self.alpha})"
            )

    def _counts(self) -> str:
        counts = [f"{name}: {count}" for name, count in self.survivors.items()]
        return f"{', '.join(counts)}; min_survivors={self.min_survivors}"


def random_pairs(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    s: int,
    t: int,
    *,
    count: int,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Random pairs of rightly classified samples of two classes (the paper's baseline RPBS).

    Args:
        model: a classifier, see `Classifier`.
        x: samples `(N, ...)`.
        y: labels `(N,)`.
        s: a class.
        t: another class.
        count: number of pairs, drawn with replacement.
        generator: source of randomness; default torch's global one.

    Returns:
        Positions in `x` of the samples of s, and of those of t, `(count,)` each.

    Raises:
        ValueError: if `s` equals `t`, an index is no class of the model, or one of the two has no
            sample that is classified rightly.

    Example:
        >>> import torch
        >>> from assay.analysis import random_pairs
        >>> x, y = torch.eye(3), torch.arange(3)
        >>> random_pairs(torch.nn.Identity(), x, y, 0, 2, count=2)
        (tensor([0, 0]), tensor([2, 2]))
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    of_s, of_t = _rightly_classified(model, x, y, s, t)

    def draw(index: Tensor) -> Tensor:
        return index[torch.randint(len(index), (count,), generator=generator).to(index.device)]

    return draw(of_s), draw(of_t)


def nearest_embedding_pairs(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    s: int,
    t: int,
    *,
    layer: str = "auto",
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Each sample of s with the sample of t nearest in embedding space (the paper's EPBS).

    Only samples that are classified rightly take part.

    Args:
        model: a classifier, see `Classifier`.
        x: samples `(N, ...)`.
        y: labels `(N,)`.
        s: a class.
        t: another class.
        layer: see `embedding_of`.

    Returns:
        Positions in `x` of the samples of s, and of the neighbour of each.

    Raises:
        ValueError: if `s` equals `t`, an index is no class of the model, or one of the two has no
            sample that is classified rightly.

    Example:
        >>> import torch
        >>> from assay.analysis import nearest_embedding_pairs
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> nearest_embedding_pairs(model, x, torch.tensor([0, 1, 1]), 0, 1)
        (tensor([0]), tensor([1]))
    """
    of_s, of_t = _rightly_classified(model, x, y, s, t)
    embed = embedding_of(model, layer)
    _, neighbour = nearest_neighbour(embed(x[of_s]), embed(x[of_t]))
    return of_s, of_t[neighbour]


def _rightly_classified(
    model: nn.Module, x: Tensor, y: Tensor, s: int, t: int
) -> tuple[Tensor, Tensor]:
    check_inputs("x", x)
    _check_labels(y, x)
    candidates = ((y == s) | (y == t)).nonzero().squeeze(1)
    with frozen(model), torch.no_grad():
        logits = batched_logits(model, x[candidates])
    _check_classes(s, t, logits.shape[1])
    right = candidates[logits.argmax(1) == y[candidates]]
    found = right[y[right] == s], right[y[right] == t]
    for label, index in zip((s, t), found, strict=True):
        if len(index) == 0:
            raise ValueError(f"no sample of class {label} is classified rightly")
    return found


def _reconstruction(output: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
    if bounds is None:
        return F.mse_loss(output, x)
    low, high = bounds
    scaled = (output - low) / (high - low)
    if bool((scaled.detach() < -1e-6).any() | (scaled.detach() > 1 + 1e-6).any()):
        raise ValueError(
            f"the auto-encoder's output leaves bounds={bounds}: let it end in a sigmoid, or give "
            "bounds=None"
        )
    return F.binary_cross_entropy(scaled.clamp(0, 1), ((x - low) / (high - low)).clamp(0, 1))


def _one_hot_cross_entropy(logits: Tensor, target: int) -> Tensor:
    """Mean over samples and classes of BCE(softmax(logits), onehot(target)), from the logits.

    log(1 − p_c) is log(1 + (−p_c)) for all classes but the most probable, whose complement is the
    sum over the others: exact however saturated the softmax is.
    """
    log_p = torch.log_softmax(logits, 1)
    top = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    others = logits.masked_fill(top, -math.inf).logsumexp(1) - logits.logsumexp(1)
    log_not = torch.where(top, others.unsqueeze(1), torch.log1p(-log_p.exp().masked_fill(top, 0)))
    right = F.one_hot(torch.tensor(target, device=logits.device), logits.shape[1]).bool()
    return -torch.where(right, log_p, log_not).mean()


class _Draws:
    """Batches `(x, x)` from ever new permutations, a given number of steps in several passes."""

    def __init__(self, x: Tensor, batch_size: int, steps: int) -> None:
        self.x = x
        self.batch_size = min(batch_size, len(x))
        self.remaining = steps
        self.order = torch.zeros(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(min(self.remaining, STEPS_A_RECORD)):
            if len(self.order) < self.batch_size:
                self.order = torch.randperm(len(self.x))
            index, self.order = self.order.split(
                [self.batch_size, len(self.order) - self.batch_size]
            )
            batch = self.x[index.to(self.x.device)]
            self.remaining -= 1
            yield batch, batch


def _cuda_devices(x: Tensor) -> list[torch.device]:
    return [x.device] if x.device.type == "cuda" else []


def _check_labels(y: Tensor, x: Tensor) -> None:
    if y.shape != (len(x),):
        raise ValueError(f"y must hold one label a sample, ({len(x)},), got {tuple(y.shape)}")


def _check_classes(s: int, t: int, classes: int | None) -> None:
    if s == t:
        raise ValueError(f"s and t must be two classes, both are {s}")
    for name, label in (("s", s), ("t", t)):
        if label < 0 or (classes is not None and label >= classes):
            of = "" if classes is None else f" from 0 to {classes - 1}"
            raise ValueError(f"{name} must be the index of a class{of}, got {label}")
