"""Calibration of a classifier: bins of confidence, their error, and the best temperature."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.functional.labels import class_indices

LOW, HIGH = 0.02, 50.0  # temperatures
ROUNDING = 1e-6  # a sum of float32 probabilities may exceed 1 by that


def confidence_bins(
    confidence: Float[Tensor, " n"], bins: int = 15, *, adaptive: bool = False
) -> Int[Tensor, " n"]:
    """The bin of every confidence.

    Args:
        confidence: of the predicted class, `(N,)`, in [0, 1]; any numbers for `adaptive`.
        bins: how many.
        adaptive: bins of equal numbers of samples, instead of equal width.

    Returns:
        `(N,)`, from 0 to `bins` − 1.

    Raises:
        ValueError: if `bins` is below 1, or a confidence is NaN or outside [0, 1].

    Example:
        >>> import torch
        >>> from assay.analysis.calibration import confidence_bins
        >>> confidence_bins(torch.tensor([0.1, 0.5, 0.95, 1.0]), 2)
        tensor([0, 0, 1, 1])
        >>> confidence_bins(torch.tensor([0.8, 0.9, 0.95, 1.0]), 2, adaptive=True)
        tensor([0, 0, 1, 1])

    Reference:
        Nixon, Dusenberry, Zhang, Jerfel, Tran, "Measuring Calibration in Deep Learning", 2019.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if adaptive:
        if bool(confidence.isnan().any()):
            raise ValueError(f"confidence must not be NaN, got {int(confidence.isnan().sum())} NaN")
        rank = confidence.argsort(stable=True).argsort()
        return rank * bins // max(1, len(confidence))
    _check_shares("confidence", confidence)
    return ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)


def calibration_error(
    confidence: Float[Tensor, " n"],
    correct: Tensor,
    bin_of: Tensor,
    weights: Float[Tensor, "r n"] | None = None,
) -> Float[Tensor, " r"]:
    """Expected calibration error: mean over bins of |accuracy − confidence|, weighted by samples.

    With b the bin of sample i it is Σ_b |Σ_{i in b} (correct_i − confidence_i)| / N.

    Args:
        confidence: of the predicted class, `(N,)`.
        correct: where the prediction is right, `(N,)`, boolean or 1 and 0.
        bin_of: from `confidence_bins`, `(N,)`.
        weights: counts of the samples in resampled data, `(R, N)`; default each once.

    Returns:
        `(R,)`, or `(1,)` without weights.

    Raises:
        ValueError: if `confidence`, `correct` and `bin_of` are not of one length, or one of the
            first two is NaN or outside [0, 1].

    Example:
        >>> import torch
        >>> from assay.analysis.calibration import calibration_error, confidence_bins
        >>> confidence, correct = torch.tensor([0.9, 0.9]), torch.tensor([True, False])
        >>> calibration_error(confidence, correct, confidence_bins(confidence))
        tensor([0.4000])

    Reference:
        Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
    """
    shape = (len(confidence),)
    for name, value in (("correct", correct), ("bin_of", bin_of)):
        if value.shape != shape:
            raise ValueError(
                f"{name} must hold one value a confidence, {shape}, got {tuple(value.shape)}"
            )
    _check_shares("confidence", confidence)
    _check_shares("correct", correct)
    correct = correct.to(confidence)
    if weights is None:
        weights = torch.ones(1, len(confidence)).to(confidence)
    members = torch.nn.functional.one_hot(bin_of).to(confidence)
    sums = weights @ (members * (correct - confidence).unsqueeze(1))
    return sums.abs().sum(1) / weights.sum(1)


def fit_temperature(logits: Float[Tensor, "n c"], y: Tensor) -> float:
    """The temperature T that minimises the cross-entropy of logits / T.

    The cross-entropy is convex in 1 / T; its derivative is bisected. Where the best T lies
    outside [0.02, 50] (every sample is right by any margin), that end is returned.

    Args:
        logits: `(N, C)`.
        y: class indices, `(N,)`.

    Raises:
        ValueError: if there is no sample, a logit is not finite, or `y` does not hold one index of
            a class a sample.

    Example:
        >>> import torch
        >>> from assay.analysis.calibration import fit_temperature
        >>> logits = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
        >>> T = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))  # softmax must give 3 to 1
        >>> abs(2 / T - torch.tensor(3.0).log().item()) < 1e-6
        True

    Reference:
        Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
    """
    if len(logits) == 0:
        raise ValueError("logits must hold at least one sample")
    if not bool(logits.isfinite().all()):
        raise ValueError(
            f"logits must be finite, got {int((~logits.isfinite()).sum())} of {logits.numel()} "
            "values that are NaN or infinite"
        )
    right = class_indices(y, logits.shape[1], samples=len(logits)).unsqueeze(1)
    z = logits.double() - logits.double().gather(1, right)
    low, high = 1 / HIGH, 1 / LOW

    def slope(inverse: float) -> float:
        return float(((inverse * z).softmax(1) * z).sum(1).mean())

    if slope(high) <= 0:
        return LOW
    if slope(low) >= 0:
        return HIGH
    for _ in range(50):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def _check_shares(name: str, values: Tensor) -> None:
    wrong = ~((values >= -ROUNDING) & (values <= 1 + ROUNDING))  # also NaN
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must be in [0, 1], got {int(wrong.sum())} of {values.numel()} values that are "
            f"not, e.g. {values[wrong][0].item():g}"
        )
