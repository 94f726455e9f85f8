"""How a decision boundary looks: complexity in input space, separability in embedding space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.analysis.classifier import batched_logits, check_inputs, frozen


@torch.no_grad()
def input_complexity(
    model: nn.Module,
    x: Tensor,
    *,
    partners: int = 50,
    points: int = 50,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> Float[Tensor, " n"]:
    """How often the predicted class changes between borderline samples (the paper's IDC).

    On the segment from each sample to each of its random partners, the number of changes of the
    predicted class over equidistant points, divided by the number of points: 0 where the whole
    segment is in one class. Samples found by bisection are a hair's breadth to one or the other
    side of the boundary: a plane gives the share of pairs on different sides, about one half,
    divided by the number of points.

    Args:
        model: a classifier, see `Classifier`.
        x: samples, normally `BoundarySamples.borderline`, `(N, ...)`, two or more.
        partners: segments a sample; the partners are drawn with replacement from the others.
        points: points a segment, both ends included.
        samples: look from the first so many samples only; the partners come from all.
        generator: source of randomness; default torch's global one.
        batch_size: inputs a forward pass.

    Returns:
        The complexity around each sample, in [0, 1); the mean over them is the paper's figure.

    Raises:
        ValueError: if there are fewer than two samples, a number is too small, the samples are
            integers or not finite, or a logit is NaN.

    Example:
        >>> import torch
        >>> from assay.analysis import input_complexity
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> input_complexity(model, torch.tensor([[-1.0], [1.0]]), points=50)  # one change
        tensor([0.0200, 0.0200])
    """
    check_inputs("x", x)
    if len(x) < 2:
        raise ValueError(f"x must hold two samples or more, got {len(x)}")
    count = len(x) if samples is None else min(samples, len(x))
    if partners < 1 or points < 2 or count < 1:
        raise ValueError(
            "partners and samples must be at least 1 and points at least 2, got "
            f"{partners}, {samples} and {points}"
        )
    offset = torch.randint(1, len(x), (count, partners), generator=generator).to(x.device)
    start = torch.arange(count, device=x.device).repeat_interleave(partners)
    end = (start + offset.flatten()) % len(x)
    tau = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device)
    changes = []
    with frozen(model):
        per_pass = max(1, batch_size // points)
        for i, j in zip(start.split(per_pass), end.split(per_pass), strict=True):
            a, b = (x[k].repeat_interleave(points, 0) for k in (i, j))
            path = between(a, b, tau.repeat(len(i)))
            predicted = batched_logits(model, path, batch_size).argmax(1).view(len(i), points)
            changes.append((predicted[:, 1:] != predicted[:, :-1]).sum(1))
    return torch.cat(changes).view(count, partners).to(x.dtype).mean(1) / points


@dataclass(frozen=True)
class Separation:
    """How a linear separator of two classes treats one set of embeddings.

    Args:
        accuracy: share of points on the right side, in [0, 1].
        distance: mean distance d of the points to the separator.
        squashed: mean of d/(1 + d) over all points, in [0, 1) (the paper's EDC1).
        squashed_misclassified: the same over the points on the wrong side (EDC2), None if there
            are none.
        count: number of points.

    Example:
        >>> from assay.analysis import Separation
        >>> Separation(1.0, 3.0, 0.75, None, 10).edc1
        0.75
    """

    accuracy: float
    distance: float
    squashed: float
    squashed_misclassified: float | None
    count: int

    @property
    def edc1(self) -> float:
        """The paper's name of `squashed`."""
        return self.squashed

    @property
    def edc2(self) -> float | None:
        """The paper's name of `squashed_misclassified`."""
        return self.squashed_misclassified


def embedding_linearity(
    embeddings: Tensor,
    positive: Tensor,
    others: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    *,
    C: float = 1.0,
) -> dict[str, Separation]:
    """How linearly separable two classes are in embedding space.

    A linear support vector machine w·e + b (scikit-learn's `LinearSVC`) is fitted to the training
    embeddings; then every set is measured with d = |w·e + b| / ‖w‖.

    Args:
        embeddings: of training samples of two classes, `(N, d)`.
        positive: which of them belong to the second class, `(N,)` bool.
        others: further sets `(embeddings, positive)` by name, e.g. test or borderline samples.
        C: inverse strength of the regularisation.

    Returns:
        One `Separation` a set, beginning with `"train"`.

    Raises:
        ValueError: if the training embeddings are of one class only or all alike, a set is empty,
            or the shapes do not fit.

    Example:
        >>> import torch
        >>> from assay.analysis import embedding_linearity
        >>> e = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> near = torch.tensor([[0.1], [-0.1]]), torch.tensor([True, True])
        >>> found = embedding_linearity(e, e[:, 0] > 0, {"near": near})
        >>> found["train"].accuracy, found["near"].accuracy, round(found["near"].distance, 3)
        (1.0, 0.5, 0.1)
    """
    from sklearn.svm import LinearSVC

    sets = {"train": (embeddings, positive), **(others or {})}
    for name, (e, label) in sets.items():
        if e.ndim != 2 or len(e) == 0 or e.shape[1] != embeddings.shape[1]:
            raise ValueError(f"{name}: embeddings must be (N, d), N ≥ 1, got {tuple(e.shape)}")
        if label.shape != (len(e),) or label.dtype != torch.bool:
            raise ValueError(
                f"{name}: positive must be ({len(e)},) bool, got {tuple(label.shape)} {label.dtype}"
            )
    if not 0 < int(positive.sum()) < len(positive):
        raise ValueError("the training embeddings must be of two classes, all are of one")
    arrays = {name: (e.double().cpu(), label.cpu()) for name, (e, label) in sets.items()}
    e, label = arrays["train"]
    # The primal problem: the dual solver's coordinate descent stalls on unscaled embeddings.
    machine: Any = LinearSVC(C=C, dual=False, max_iter=10_000).fit(e.numpy(), label.numpy())
    w, b = torch.from_numpy(machine.coef_[0]).double(), float(machine.intercept_[0])
    norm = w.norm().item()
    if not norm > 0:
        raise ValueError("the training embeddings are all alike: no direction separates them")
    return {name: _separation((e @ w + b) / norm, label) for name, (e, label) in arrays.items()}


def boundary_entropy(p: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Entropy of class probabilities, in nats.

    ln 2 where two classes compete on equal terms and no third takes part.

    Args:
        p: class probabilities, e.g. `BoundarySamples.p`.

    Returns:
        The entropy of each row.

    Raises:
        ValueError: if the values are no probabilities (as logits are).

    Example:
        >>> import torch
        >>> from assay.analysis import boundary_entropy
        >>> boundary_entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    if not bool(((p >= 0) & (p <= 1 + 1e-3)).all()):
        raise ValueError("p must hold probabilities in [0, 1]; of logits take logits.softmax(1)")
    return torch.special.entr(p).sum(1)


def margin(p: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Difference of the two largest class probabilities; 0 on a decision boundary.

    Args:
        p: class probabilities of two classes or more.

    Returns:
        The margin of each row, in [0, 1].

    Raises:
        ValueError: if there are fewer than two classes.

    Example:
        >>> import torch
        >>> from assay.analysis import margin
        >>> margin(torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]))
        tensor([0.2500, 0.0000])
    """
    if p.shape[1] < 2:
        raise ValueError(f"a margin needs two classes or more, got {p.shape[1]}")
    top = p.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


@torch.no_grad()
def nearest_neighbour(
    queries: Tensor, reference: Tensor, *, chunk_size: int = 1024
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Euclidean distance of each query to its nearest neighbour, and which that is.

    Args:
        queries: `(N, ...)`.
        reference: `(M, ...)`, of the same shape apart from the number.
        chunk_size: queries compared at once.

    Returns:
        Distances `(N,)` and positions in `reference` `(N,)`.

    Raises:
        ValueError: if the reference is empty or the shapes differ.

    Example:
        >>> import torch
        >>> from assay.analysis import nearest_neighbour
        >>> nearest_neighbour(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [9.0, 9.0]]))
        (tensor([5.]), tensor([0]))
    """
    if len(reference) == 0 or queries.shape[1:] != reference.shape[1:]:
        raise ValueError(
            "queries and a non-empty reference of one shape are needed, got "
            f"{tuple(queries.shape)} and {tuple(reference.shape)}"
        )
    flat = reference.flatten(1)
    indices = [torch.cdist(part, flat).argmin(1) for part in queries.flatten(1).split(chunk_size)]
    index = torch.cat(indices) if len(queries) else torch.zeros(0, dtype=torch.int64)
    # From the difference: the distances of cdist suffer from cancellation between near points.
    return (queries - reference[index]).flatten(1).norm(dim=1), index


def between(a: Tensor, b: Tensor, position: Tensor) -> Tensor:
    """a + position · (b − a), exact at both ends."""
    return torch.lerp(a, b, position.view(-1, *[1] * (a.ndim - 1)))


def _separation(signed: Tensor, positive: Tensor) -> Separation:
    distance = signed.abs()
    squashed = distance / (1 + distance)
    wrong = (signed > 0) != positive
    return Separation(
        accuracy=1 - wrong.double().mean().item(),
        distance=distance.mean().item(),
        squashed=squashed.mean().item(),
        squashed_misclassified=squashed[wrong].mean().item() if bool(wrong.any()) else None,
        count=len(signed),
    )
