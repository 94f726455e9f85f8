"""Which examples networks learn first, and how much independently trained networks agree on it."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# With one or two models "all or none are right" says nothing.
FEWEST_MODELS = 3
# Numbers held at once while bootstrap samples are ranked.
BOOTSTRAP_CHUNK = 2_000_000


class CorrectnessRecorder:
    """Which of N models are right on which of X examples, at every recorded extent of training.

    Keeps one bit a decision, in memory and on disk: a hundred models on 10,000 examples at fifty
    extents take 6 MB. An extent is any number that says how far training has come, usually the
    step. Recording an extent again replaces it, so a resumed training may repeat its last steps.
    Evaluate the models in evaluation mode: dropout would make agreement look smaller.

    Args:
        num_examples: X.
        num_models: N, at least 3.

    Raises:
        ValueError: if there are fewer than 3 models or no examples.

    Example:
        >>> import torch
        >>> from assay.analysis import CorrectnessRecorder
        >>> recorder = CorrectnessRecorder(num_examples=2, num_models=3)
        >>> recorder.record(10, torch.tensor([[True, False], [True, True], [True, False]]))
        >>> recorder.extents, recorder.correct.shape
        ((10.0,), torch.Size([1, 3, 2]))
        >>> recorder.correct.float().mean(dim=1)  # TP-agreement
        tensor([[1.0000, 0.3333]])

    Reference:
        Hacohen, Choshen, Weinshall, "Let's Agree to Agree: Neural Networks Share Classification
        Order on Real Datasets", ICML 2020.
    """

    def __init__(self, num_examples: int, num_models: int) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        if num_models < FEWEST_MODELS:
            raise ValueError(f"num_models must be at least {FEWEST_MODELS}, got {num_models}")
        self.num_examples = num_examples
        self.num_models = num_models
        self._packed: dict[float, np.ndarray] = {}
        self._seen: dict[float, np.ndarray] = {}

    def record(self, extent: float, correct: Tensor, *, model: int | None = None) -> None:
        """Note which examples are classified correctly.

        Args:
            extent: how far training has come, e.g. the number of steps.
            correct: `(N, X)`, or `(X,)` of one model; boolean, or 1 for right and 0 for wrong.
            model: which model, if `correct` is of one; for models that are trained one by one.

        Raises:
            ValueError: if the shape is another, values are neither right nor wrong (as class
                predictions are), or there is no such model.
        """
        expected = (self.num_examples,)
        if model is None:
            expected = (self.num_models, self.num_examples)
        elif not 0 <= model < self.num_models:
            raise ValueError(f"model must be from 0 to {self.num_models - 1}, got {model}")
        if tuple(correct.shape) != expected:
            raise ValueError(f"correct must have shape {expected}, got {tuple(correct.shape)}")
        correct = _right_or_wrong(correct)
        key = float(extent)
        if key not in self._packed:
            size = (self.num_models, -(-self.num_examples // 8))
            self._packed[key] = np.zeros(size, dtype=np.uint8)
            self._seen[key] = np.zeros(self.num_models, dtype=bool)
        rows = slice(None) if model is None else model
        self._packed[key][rows] = np.packbits(correct.detach().cpu().numpy(), axis=-1)
        self._seen[key][rows] = True

    def callback(
        self,
        predict: Callable[[], Tensor],
        labels: Int[Tensor, " x"],
        extents: Collection[float],
        *,
        model: int | None = None,
    ) -> Callable[[int], None]:
        """A function of the number of steps that records at the given ones.

        It fits `after_step` of `assay.functional.fit` and any loop that counts its steps.

        Args:
            predict: returns predicted classes `(N, X)`, or `(X,)` of one model.
            labels: true classes.
            extents: steps at which to record, see `log_spaced_steps`.
            model: which model, if `predict` is of one.
        """
        wanted = {float(extent) for extent in extents}

        def observe(step: int) -> None:
            if step in wanted:
                predictions = predict()
                self.record(step, predictions == labels.to(predictions.device), model=model)

        return observe

    @property
    def extents(self) -> tuple[float, ...]:
        """The recorded extents, in increasing order."""
        return tuple(sorted(self._packed))

    @property
    def correct(self) -> Bool[Tensor, "e n x"]:
        """All records, in increasing order of extent.

        Raises:
            ValueError: if some model is missing at some extent.
        """
        records = []
        for extent in self.extents:
            if not self._seen[extent].all():
                missing = np.flatnonzero(~self._seen[extent]).tolist()
                raise ValueError(f"extent {extent:g} has no record of the models {missing}")
            bits = np.unpackbits(self._packed[extent], axis=-1, count=self.num_examples)
            records.append(torch.from_numpy(bits).bool())
        if not records:
            return torch.zeros(0, self.num_models, self.num_examples, dtype=torch.bool)
        return torch.stack(records)

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, one bit a decision, as tensors and numbers."""
        size = (self.num_models, -(-self.num_examples // 8))
        packed = [torch.from_numpy(self._packed[extent]) for extent in self.extents]
        seen = [torch.from_numpy(self._seen[extent]) for extent in self.extents]
        return {
            "num_examples": self.num_examples,
            "num_models": self.num_models,
            "extents": list(self.extents),
            "packed": torch.stack(packed) if packed else torch.zeros(0, *size, dtype=torch.uint8),
            "seen": torch.stack(seen) if seen else torch.zeros(0, size[0], dtype=torch.bool),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything recorded by what `state_dict` gave.

        Raises:
            ValueError: if it comes from other numbers of models or examples.
        """
        for name in ("num_examples", "num_models"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the state has {name} {state[name]}, not {getattr(self, name)}")
        arrays = zip(state["extents"], state["packed"], state["seen"], strict=True)
        self._packed, self._seen = {}, {}
        for extent, packed, seen in arrays:
            self._packed[extent] = packed.cpu().numpy().copy()
            self._seen[extent] = seen.cpu().numpy().copy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the records to a file, at once: who is killed meanwhile keeps the old one.

        Args:
            path: of the file; replaced if it exists.
        """
        unfinished = f"{os.fspath(path)}.unfinished"
        torch.save(self.state_dict(), unfinished)
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CorrectnessRecorder":
        """Read a recorder that `save` wrote.

        Args:
            path: of the file.
        """
        state = torch.load(path, weights_only=True)
        recorder = cls(state["num_examples"], state["num_models"])
        recorder.load_state_dict(state)
        return recorder


def log_spaced_steps(total: int, num: int, *, first: int = 1) -> tuple[int, ...]:
    """Steps of a training at which to look, close together at its beginning.

    Networks learn most of their easy examples within a fraction of the first epoch: at evenly
    spaced extents these would all look alike.

    Args:
        total: number of steps of the training; the last step to look at.
        num: how many steps to look at, at most (early ones may coincide).
        first: the first of them.

    Returns:
        Different step numbers in increasing order, from `first` to `total`.

    Raises:
        ValueError: if not 1 ≤ `first` ≤ `total`, or `num` is not positive.

    Example:
        >>> from assay.analysis import log_spaced_steps
        >>> log_spaced_steps(1000, 4)
        (1, 10, 100, 1000)
    """
    if not 1 <= first <= total or num < 1:
        raise ValueError(
            f"expected 1 <= first <= total and num >= 1, got first={first}, total={total}, "
            f"num={num}"
        )
    if num == 1:
        return (total,)
    return tuple(np.unique(np.geomspace(first, total, num).round().astype(int)).tolist())


def tp_agreement(correct: Shaped[Tensor, "*e n x"]) -> Float[Tensor, "*e x"]:
    """True-positive agreement: the share of models that are right, for each example.

        TPa(x, y) = 1/N Σ_i 1[f_i(x) = y]

    Args:
        correct: whether model n is right on example x, boolean or 1 and 0; leading dimensions
            (extents) are kept.

    Returns:
        Shares in [0, 1], float64.

    Raises:
        ValueError: if there are fewer than three models, or values are neither right nor wrong (as
            class predictions are).

    Example:
        >>> import torch
        >>> from assay.analysis import tp_agreement
        >>> tp_agreement(torch.tensor([[True, False], [True, False], [True, True]]))
        tensor([1.0000, 0.3333], dtype=torch.float64)

    Reference:
        Hacohen, Choshen, Weinshall, ICML 2020, Section 2.
    """
    _check_models(correct, "correct")
    return _right_or_wrong(correct).double().mean(dim=-2)


def total_agreement(predictions: Shaped[Tensor, "*e n x"]) -> Float[Tensor, "*e x"]:
    """The largest share of models that predict one class, right or wrong, for each example.

    Args:
        predictions: predicted classes of N models; leading dimensions are kept.

    Returns:
        Shares in [1/N, 1], float64. At least the TP-agreement.

    Raises:
        ValueError: if there are fewer than three models, or the predictions are no class indices.

    Example:
        >>> import torch
        >>> from assay.analysis import total_agreement
        >>> total_agreement(torch.tensor([[0, 5], [0, 5], [1, 5]]))
        tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    _check_models(predictions, "predictions")
    if predictions.is_floating_point():
        raise ValueError(
            f"predictions must be class indices, got {predictions.dtype}; of logits take "
            "logits.argmax(-1)"
        )
    votes = torch.zeros_like(predictions[..., 0, :])
    for one in predictions.unbind(dim=-2):
        votes = torch.maximum(votes, (predictions == one.unsqueeze(-2)).sum(dim=-2))
    return votes.double() / predictions.shape[-2]


def accessibility(
    correct: Shaped[Tensor, "e n x"], extents: Sequence[int] | None = None
) -> Float[Tensor, " x"]:
    """How early an example is learned: its TP-agreement averaged over training.

    1 for an example that all models get right at all extents, 0 for one that none ever does. It
    depends on the extents that are averaged over: compare only accessibilities of the same ones.

    Args:
        correct: extents × models × examples, boolean or 1 and 0.
        extents: positions along the first dimension to average over; None for all.

    Returns:
        One value an example in [0, 1], float64.

    Raises:
        ValueError: if there are fewer than three models or no extents, or values are neither right
            nor wrong (as class predictions are).

    Example:
        >>> import torch
        >>> from assay.analysis import accessibility
        >>> never, late, soon = [False, False], [False, True], [True, True]
        >>> correct = torch.tensor([never, late, soon]).T.unsqueeze(1).expand(2, 3, 3)
        >>> accessibility(correct)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)

    Reference:
        Hacohen, Choshen, Weinshall, ICML 2020, Section 2.
    """
    chosen = correct if extents is None else correct[list(extents)]
    if len(chosen) == 0:
        raise ValueError("accessibility needs at least one extent, got none")
    return tp_agreement(chosen).mean(dim=0)


def bimodality(tpa: Float[Tensor, "*e x"]) -> Float[Tensor, "*e"]:
    """Pearson's bimodality coefficient, (skewness² + 1) / kurtosis, of a distribution.

    1 if the values are two points, 5/9 for a uniform distribution, 1/3 for a normal one.

    Args:
        tpa: values over the last dimension, e.g. the TP-agreement of each example.

    Returns:
        Coefficients in (0, 1]; NaN where all values are the same, as there is nothing to measure.

    Example:
        >>> import torch
        >>> from assay.analysis import bimodality
        >>> round(bimodality(torch.tensor([0.0, 0.0, 0.0, 1.0]).double()).item(), 9)
        1.0

    Reference:
        K. Pearson, "Mathematical contributions to the theory of evolution, XIX", 1916.
    """
    values = tpa.double()
    weights = torch.full_like(values, 1 / max(values.shape[-1], 1))
    return _bimodality(values, weights)


def _bimodality(values: Tensor, weights: Tensor) -> Tensor:
    deviation = values - (weights * values).sum(dim=-1, keepdim=True)
    m2, m3, m4 = ((weights * deviation**power).sum(dim=-1) for power in (2, 3, 4))
    # Equal values differ from their computed mean by rounding only.
    constant = values.amax(dim=-1) == values.amin(dim=-1)
    coefficient = (m3**2 / m2**3 + 1) * m2**2 / m4
    return torch.where(constant, torch.nan, coefficient)


def extreme_share(tpa: Float[Tensor, "*e x"], margin: float = 0.1) -> Float[Tensor, "*e"]:
    """Share of examples on which almost all models are right, or almost none.

    Args:
        tpa: TP-agreement of each example.
        margin: "almost": closer than this to 0 or 1.

    Returns:
        Shares in [0, 1], float64.

    Raises:
        ValueError: if `margin` is not in (0, 0.5].

    Example:
        >>> import torch
        >>> from assay.analysis import extreme_share
        >>> extreme_share(torch.tensor([0.0, 0.5, 0.95, 1.0]).double())
        tensor(0.7500, dtype=torch.float64)
    """
    return _is_extreme(tpa, margin).double().mean(dim=-1)


def _is_extreme(tpa: Tensor, margin: float) -> Tensor:
    if not 0 < margin <= 0.5:
        raise ValueError(f"margin must be in (0, 0.5], got {margin}")
    slack = 1e-9  # one of ten models is a tenth, whatever its last bit
    return (tpa < margin - slack) | (tpa > 1 - margin + slack)


def agreement_icc(correct: Shaped[Tensor, "*e n x"]) -> Float[Tensor, "*e"]:
    """Intra-class correlation of correctness: agreement that does not depend on N or accuracy.

    With p the mean accuracy,

        ICC = (Var_x TPa − p(1−p)/N) / (p(1−p)(1−1/N)):

    0 (up to sampling) if the models err independently of each other, 1 if they are all right and
    wrong on the same examples. Raw TP-agreement is large at any extent where accuracy is near 0 or
    1; this is not. It equals Fleiss' kappa of the N models' "right or wrong".

    Args:
        correct: models × examples; leading dimensions (extents) are kept.

    Returns:
        Values up to 1, float64; NaN where every model is right on every example, or none on any, as
        there is nothing to agree about.

    Raises:
        ValueError: if there are fewer than three models, or values are neither right nor wrong.

    Example:
        >>> import torch
        >>> from assay.analysis import agreement_icc
        >>> round(agreement_icc(torch.tensor([[True, False, True]]).expand(5, 3)).item(), 9)
        1.0
    """
    _check_models(correct, "correct")
    correct = _right_or_wrong(correct)
    num_models, num_examples = correct.shape[-2:]
    right = correct.sum(dim=-2)
    # The same as above by pairs of models: 1 − (share of pairs that differ) / (2 p (1 − p)). The
    # sums are of integers, so that nothing is lost to rounding.
    differing = (right * (num_models - right)).sum(dim=-1).double()
    pairs = num_examples * num_models * (num_models - 1)
    p = right.sum(dim=-1).double() / (num_examples * num_models)
    alone = p * (1 - p)
    return torch.where(alone > 0, 1 - differing / pairs / alone, torch.nan)


def binomial_null(accuracy: float, num_models: int) -> Float[Tensor, " n_plus_1"]:
    """Distribution of TP-agreement if the models erred independently: N · TPa ~ Binomial(N, p).

    Args:
        accuracy: p, the mean accuracy of the models.
        num_models: N, at least 3.

    Returns:
        The probabilities of TPa = 0, 1/N, ..., 1, float64.

    Raises:
        ValueError: if `accuracy` is not in [0, 1] or there are fewer than three models.

    Example:
        >>> from assay.analysis import binomial_null
        >>> binomial_null(0.5, 3)
        tensor([0.1250, 0.3750, 0.3750, 0.1250], dtype=torch.float64)
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy must be in [0, 1], got {accuracy}")
    if num_models < FEWEST_MODELS:
        raise ValueError(f"num_models must be at least {FEWEST_MODELS}, got {num_models}")
    counts = np.arange(num_models + 1)
    return torch.from_numpy(scipy.stats.binom.pmf(counts, num_models, accuracy))


def agreement_table(
    correct: Shaped[Tensor, "e n x"], extents: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """Agreement at each extent beside what independent models of that accuracy would show.

    Args:
        correct: extents × models × examples.
        extents: what to call the extents; None numbers them from 0.

    Returns:
        One row an extent: `extent`, `accuracy`, `icc`, `variance ratio` (of TPa to independence;
        N at most), `extreme share` (TPa < 0.1 or > 0.9) and `bimodality`, the last two also as
        `... if independent`.

    Raises:
        ValueError: if there are fewer than three models, `extents` has another length, or values
            are neither right nor wrong.

    Example:
        >>> import torch
        >>> from assay.analysis import agreement_table
        >>> shared = torch.tensor([True, False]).expand(1, 4, 2)
        >>> row = agreement_table(shared)[0]
        >>> row["variance ratio"], row["extreme share"], row["extreme share if independent"]
        (4.0, 1.0, 0.125)
    """
    names = list(range(len(correct))) if extents is None else list(extents)
    if len(names) != len(correct):
        raise ValueError(f"extents must name {len(correct)} extents, got {len(names)} names")
    num_models = correct.shape[-2]
    support = torch.arange(num_models + 1).double() / num_models
    rows = []
    for name, record in zip(names, correct, strict=True):
        tpa = tp_agreement(record)
        p = float(tpa.mean())
        null = binomial_null(min(p, 1.0), num_models)
        icc = float(agreement_icc(record))
        rows.append(
            {
                "extent": name,
                "accuracy": p,
                "icc": icc,
                "variance ratio": 1 + (num_models - 1) * icc,
                "extreme share": float(extreme_share(tpa)),
                "extreme share if independent": float(null[_is_extreme(support, 0.1)].sum()),
                "bimodality": float(bimodality(tpa)),
                "bimodality if independent": float(_bimodality(support, null)),
            }
        )
    return rows


def class_table(
    correct: Shaped[Tensor, "e n x"],
    labels: Int[Tensor, " _"],
    classes: Sequence[str] | None = None,
) -> list[dict[str, float | str]]:
    """Learning order class by class; agreement over all classes can hide that one is never learned.

    Args:
        correct: extents × models × examples.
        labels: true classes.
        classes: names of the classes; None for their numbers.

    Returns:
        One row a class that occurs, the most accessible first: `class`, `examples`,
        `accessibility`, and at the last extent `accuracy` and `icc` within the class.

    Raises:
        ValueError: if there are fewer than three models or no extents, the labels are not as many
            as the examples, `classes` does not name one of them, or values are neither right nor
            wrong.

    Example:
        >>> import torch
        >>> from assay.analysis import class_table
        >>> correct = torch.tensor([True, True, False]).expand(2, 4, 3)
        >>> rows = class_table(correct, torch.tensor([0, 0, 1]), ["cat", "dog"])
        >>> [(row["class"], row["accessibility"]) for row in rows]
        [('cat', 1.0), ('dog', 0.0)]
    """
    if len(labels) != correct.shape[-1]:
        raise ValueError(
            f"labels must be as many as the {correct.shape[-1]} examples, got {len(labels)}"
        )
    labels = labels.to(correct.device)
    found = labels.unique().tolist()
    if classes is not None and found and not 0 <= found[0] <= found[-1] < len(classes):
        raise ValueError(
            f"classes names {len(classes)} classes, the labels are from {found[0]} to {found[-1]}"
        )
    rows: list[dict[str, float | str]] = []
    for label in map(int, found):
        mine = correct[..., labels == label]
        rows.append(
            {
                "class": str(label) if classes is None else classes[label],
                "examples": mine.shape[-1],
                "accessibility": float(accessibility(mine).mean()),
                "accuracy": float(mine[-1].double().mean()),
                "icc": float(agreement_icc(mine[-1])),
            }
        )
    return sorted(rows, key=lambda row: -float(row["accessibility"]))


@dataclass(frozen=True)
class OrderCorrelation:
    """A correlation of two orders with its interval.

    Args:
        estimate: the correlation.
        low: lower end of the interval; NaN if none was asked for.
        high: upper end.

    Example:
        >>> OrderCorrelation(0.9, 0.8, 0.95).estimate
        0.9
    """

    estimate: float
    low: float
    high: float


def order_correlation(
    a: Float[Tensor, " x"],
    b: Float[Tensor, " _"],
    method: str = "spearman",
    *,
    ci: str | None = "bootstrap",
    resamples: int = 1000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> OrderCorrelation:
    """How far two collections of models find the same examples easy.

    The interval is over examples (percentile bootstrap): it says what another test set would give.
    What other *models* would give, another collection tells. The correlation of two disjoint
    collections of one architecture is the ceiling for any other comparison.

    Args:
        a: accessibility of each example in one collection.
        b: accessibility of the same examples in the other.
        method: "spearman" (ranks, ties averaged) or "pearson".
        ci: "bootstrap", or None for no interval.
        resamples: bootstrap samples.
        confidence: coverage of the interval.
        generator: source of the resamples; None takes one with seed 0, so that an answer repeats.

    Returns:
        The correlation and its interval.

    Raises:
        ValueError: if the two differ in length, there are fewer than three examples, one of them is
            the same for all examples, `method` or `ci` is unknown, or `resamples` or `confidence`
            is out of range.

    Example:
        >>> import torch
        >>> from assay.analysis import order_correlation
        >>> a = torch.linspace(0, 1, 50).double()
        >>> order_correlation(a, a**3).estimate
        1.0
    """
    if a.shape != b.shape or len(a) < 3:
        raise ValueError(
            f"a and b must have one value for each of three or more examples, got {len(a)} "
            f"and {len(b)}"
        )
    if method not in ("spearman", "pearson") or ci not in ("bootstrap", None):
        raise ValueError(
            "method must be 'spearman' or 'pearson' and ci 'bootstrap' or None, "
            f"got {method!r} and {ci!r}"
        )
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"expected resamples >= 1 and confidence in (0, 1), got {resamples} and {confidence}"
        )
    x, y = a.double().cpu().numpy(), b.double().cpu().numpy()
    for name, values in (("a", x), ("b", y)):
        if not (np.isfinite(values).all() and values.min() < values.max()):
            raise ValueError(
                f"{name} must be finite and differ between examples, got values from "
                f"{values.min():g} to {values.max():g}"
            )
    estimate = float(_correlation(x, y, method))
    if ci is None:
        return OrderCorrelation(estimate, float("nan"), float("nan"))
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(x), (resamples, len(x)), generator=generator).numpy()
    rows = max(1, BOOTSTRAP_CHUNK // len(x))
    draws = [
        _correlation(x[index[i : i + rows]], y[index[i : i + rows]], method)
        for i in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    # A resample may hold the same value throughout; it has no correlation.
    low, high = np.nanquantile(np.concatenate(draws), [tail, 1 - tail])
    return OrderCorrelation(estimate, float(low), float(high))


def _correlation(x: np.ndarray, y: np.ndarray, method: str) -> np.ndarray | np.floating:
    """Correlation along the last axis."""
    if method == "spearman":
        x, y = scipy.stats.rankdata(x, axis=-1), scipy.stats.rankdata(y, axis=-1)
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((x * y).sum(axis=-1) / scale, -1, 1)


@dataclass(frozen=True)
class NestedLearning:
    """Whether what weak models have learned is part of what strong ones have.

    Args:
        share: of the examples that the weak collection has learned, those that the strong one has
            learned too; 1 is nested.
        base_rate: share of all examples that the strong collection has learned, which `share` would
            be if the two had nothing to do with each other.
        weak: number of examples that the weak collection has learned.
        strong: number that the strong one has learned.

    Example:
        >>> NestedLearning(1.0, 0.5, 10, 50).share
        1.0
    """

    share: float
    base_rate: float
    weak: int
    strong: int


def nested_learning(
    c_weak: Shaped[Tensor, "n x"], c_strong: Shaped[Tensor, "m _"], *, threshold: float = 0.9
) -> NestedLearning:
    """Compare what two collections of models have learned.

    An example is learned by a collection if its TP-agreement is at least `threshold`. To see order
    rather than size, compare at extents of matched accuracy (`extent_at_accuracy`).

    Args:
        c_weak: correctness of the weaker collection, models × examples.
        c_strong: of the stronger one, on the same examples.
        threshold: in (0, 1].

    Returns:
        The share, with the base rate to hold it against.

    Raises:
        ValueError: if a collection has fewer than three models, the examples differ in number, the
            threshold is out of range, values are neither right nor wrong, or the weak collection
            has learned nothing.

    Example:
        >>> import torch
        >>> from assay.analysis import nested_learning
        >>> weak = torch.tensor([True, True, False, False]).expand(3, 4)
        >>> strong = torch.tensor([True, True, True, False]).expand(5, 4)
        >>> nested_learning(weak, strong).share, nested_learning(strong, weak).share
        (1.0, 0.6666666666666666)

    Reference:
        Hacohen, Choshen, Weinshall, ICML 2020, Section 3.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    if c_weak.shape[-1] != c_strong.shape[-1]:
        raise ValueError(
            "c_weak and c_strong must be on the same examples, got "
            f"{c_weak.shape[-1]} and {c_strong.shape[-1]}"
        )
    slack = 1e-9  # nine of ten models are nine tenths
    weak = tp_agreement(c_weak) >= threshold - slack
    strong = tp_agreement(c_strong) >= threshold - slack
    if not weak.any():
        raise ValueError(f"the weak collection has no example with a TP-agreement >= {threshold}")
    return NestedLearning(
        share=float(strong[weak].double().mean()),
        base_rate=float(strong.double().mean()),
        weak=int(weak.sum()),
        strong=int(strong.sum()),
    )


def extent_at_accuracy(correct: Shaped[Tensor, "e n x"], accuracy: float) -> int:
    """Position of the extent whose mean accuracy is nearest to a given one.

    Args:
        correct: extents × models × examples.
        accuracy: in [0, 1].

    Returns:
        Position along the first dimension; the earliest of equally near ones.

    Raises:
        ValueError: if there are no extents, `accuracy` is not in [0, 1], or values are neither
            right nor wrong.

    Example:
        >>> import torch
        >>> from assay.analysis import extent_at_accuracy
        >>> learned = torch.arange(4) < torch.arange(5).unsqueeze(1)  # 0, 1, 2, 3, 4 of 4
        >>> extent_at_accuracy(learned.unsqueeze(1).expand(5, 3, 4), 0.7)
        3
    """
    if len(correct) == 0 or not 0 <= accuracy <= 1:
        raise ValueError(
            f"expected at least one extent and an accuracy in [0, 1], got {len(correct)} "
            f"extents and accuracy {accuracy}"
        )
    correct = _right_or_wrong(correct)
    return int((correct.double().mean(dim=(1, 2)) - accuracy).abs().argmin())


def from_staged(
    estimators: Any, x: Any, y: Any, *, stages: Sequence[int] | None = None
) -> Bool[Tensor, "e n x"]:
    """Correctness of fitted scikit-learn ensembles after each of their stages.

    For estimators with `staged_predict`, e.g. `AdaBoostClassifier` and
    `GradientBoostingClassifier`; the number of rounds is the extent.

    Args:
        estimators: one fitted estimator or a sequence of them.
        x: inputs as the estimators take them, `(X, features)`: array, data frame, sparse matrix.
        y: true classes `(X,)`.
        stages: the numbers of rounds to keep, from 1; None for all. An estimator that stopped
            earlier stays as it was at its end.

    Returns:
        Correctness, stages × estimators × examples.

    Raises:
        TypeError: if an estimator has no `staged_predict`, or is no fitted classifier.
        ValueError: if there are no estimators or no stages, a stage is not positive, or `y` has
            another shape or none of an estimator's classes.

    Example:
        >>> from sklearn.ensemble import AdaBoostClassifier
        >>> from assay.analysis import from_staged
        >>> x, y = [[0.0], [1.0], [2.0], [3.0]], [0, 1, 1, 0]
        >>> from_staged(AdaBoostClassifier(n_estimators=5).fit(x, y), x, y).shape
        torch.Size([5, 1, 4])
    """
    collection = list(estimators) if isinstance(estimators, list | tuple) else [estimators]
    if not collection:
        raise ValueError("estimators is empty: expected at least one fitted estimator")
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise ValueError(f"y must hold one class an example, (X,), got shape {labels.shape}")
    records = []
    for estimator in collection:
        name = type(estimator).__name__
        if not hasattr(estimator, "staged_predict"):
            raise TypeError(f"estimators must have staged_predict, {name} has not")
        if not hasattr(estimator, "classes_"):
            raise TypeError(f"estimators must be fitted classifiers, {name} has no classes_")
        if not np.isin(labels, estimator.classes_).any():
            raise ValueError(
                f"y holds none of the classes of {name}: {labels[:3]} against "
                f"{estimator.classes_[:3]}"
            )
        records.append(np.stack([p == labels for p in estimator.staged_predict(x)]))
    chosen = range(1, max(map(len, records)) + 1) if stages is None else stages
    if len(chosen) == 0 or any(stage < 1 for stage in chosen):
        raise ValueError(f"stages must be one or more numbers from 1, got {list(chosen)}")
    rows = [[record[min(stage, len(record)) - 1] for record in records] for stage in chosen]
    return torch.from_numpy(np.array(rows, dtype=bool))


def _check_models(values: Tensor, name: str) -> None:
    if values.ndim < 2 or values.shape[-2] < FEWEST_MODELS:
        raise ValueError(
            f"{name} must be of at least {FEWEST_MODELS} models (second to last dimension), "
            f"got shape {tuple(values.shape)}"
        )


def _right_or_wrong(correct: Tensor) -> Bool[Tensor, "..."]:
    if correct.dtype == torch.bool:
        return correct
    wrong = correct[(correct != 0) & (correct != 1)]
    if len(wrong):
        raise ValueError(
            "correct must say right or wrong, boolean or 1 and 0, got values such as "
            f"{wrong[0].item():g}; of class predictions take predictions == labels"
        )
    return correct.bool()
