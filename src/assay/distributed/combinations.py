"""Compressors made of others: compositions and error feedback."""

import math

import torch
from torch import Generator, Tensor

from assay.distributed.compressors import (
    BaseCompressor,
    Compressor,
    check_floating,
)
from assay.distributed.payload import Payload
from assay.distributed.sparsifiers import Sparsifier

__all__ = ["Compose", "ErrorFeedback"]


class Compose(BaseCompressor):
    """The composition C_outer ∘ C_inner.

    If both are unbiased with ω₁, ω₂ then so is the composition, with ω₁ω₂ + ω₁ + ω₂. When the
    inner compressor selects entries (`TopK`, `RandomK`) the outer one works on the selected values
    alone and the indices travel beside them.

    Args:
        outer: Applied to what the inner compressor keeps.
        inner: Applied first, to the tensor.

    Raises:
        TypeError: An argument is not a compressor.

    Example:
        >>> from assay.distributed import NaturalCompressor, TopK
        >>> x = torch.tensor([0.1, 3.0, -0.2, -8.0])
        >>> both = Compose(NaturalCompressor(), TopK(0.25))
        >>> both.decompress(both.compress(x))
        tensor([ 0.,  0.,  0., -8.])
    """

    def __init__(self, outer: Compressor, inner: Compressor) -> None:
        for name, compressor in (("outer", outer), ("inner", inner)):
            if not isinstance(compressor, Compressor):
                raise TypeError(f"{name} must be a compressor, got {type(compressor).__name__}")
        self.outer, self.inner = outer, inner

    def __repr__(self) -> str:
        return f"Compose({self.outer!r}, {self.inner!r})"

    @property
    def unbiased(self) -> bool:
        """Whether both are unbiased."""
        return self.outer.unbiased and self.inner.unbiased

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Compress with the inner compressor, and what it keeps with the outer one."""
        inner = self.inner.compress(x, generator=generator)
        if isinstance(self.inner, Sparsifier):
            indices, values = inner.tensors
            kept = self.outer.compress(values, generator=generator)
            return Payload((indices, *kept.tensors), inner.shape, inner.dtype)
        return self.outer.compress(self.inner.decompress(inner), generator=generator)

    def decompress(self, payload: Payload) -> Tensor:
        """Undo the outer compressor, then put selected values where they belong."""
        if not isinstance(self.inner, Sparsifier):
            return self.outer.decompress(payload)
        indices, *kept = payload.tensors
        values = self.outer.decompress(Payload(tuple(kept), (len(indices),), payload.dtype))
        return self.inner.decompress(Payload((indices, values), payload.shape, payload.dtype))

    def omega(self, d: int) -> float:
        """ω₁ω₂ + ω₁ + ω₂, or infinity if either is infinite."""
        inner = self.inner.omega(d)
        outer = self.outer.omega(self.inner.count(d) if isinstance(self.inner, Sparsifier) else d)
        if math.isinf(inner) or math.isinf(outer):
            return math.inf
        return inner * outer + inner + outer


class ErrorFeedback(BaseCompressor):
    """Adds what earlier messages left out to the next one before it is compressed.

    Keeps e, the error so far: sends C(x + e) and sets e ← x + e − C(x + e). It turns biased
    compressors such as `TopK` into ones that training survives. It remembers one tensor, so each
    worker needs its own instance (`copy.deepcopy`), and all its messages have one shape.

    Args:
        compressor: Any compressor.

    Raises:
        TypeError: `compressor` is not a compressor.
        ValueError: A tensor has another shape than the one before (call `reset` in between).

    Example:
        >>> from assay.distributed import TopK
        >>> feedback = ErrorFeedback(TopK(0.5))
        >>> x = torch.tensor([2.0, 3.0])
        >>> [feedback.decompress(feedback.compress(x)).tolist() for _ in range(2)]
        [[0.0, 3.0], [4.0, 0.0]]

    Reference:
        Stich, Cordonnier, Jaggi, Sparsified SGD with Memory, 2018,
        https://arxiv.org/abs/1809.07599.
    """

    unbiased = False

    def __init__(self, compressor: Compressor) -> None:
        if not isinstance(compressor, Compressor):
            raise TypeError(f"compressor must be a compressor, got {type(compressor).__name__}")
        self.compressor = compressor
        self.error: Tensor | None = None

    def __repr__(self) -> str:
        return f"ErrorFeedback({self.compressor!r})"

    def compress(self, x: Tensor, *, generator: Generator | None = None) -> Payload:
        """Compress `x` plus the error so far, and remember the new error.

        Where that sum is not finite nothing is remembered, so one overflow does not stay for ever.
        """
        check_floating(x)
        if self.error is not None and self.error.shape != x.shape:
            raise ValueError(
                f"x must have shape {tuple(self.error.shape)} as the tensors before it, got "
                f"{tuple(x.shape)}"
            )
        corrected = x.detach() if self.error is None else x.detach() + self.error
        payload = self.compressor.compress(corrected, generator=generator)
        error = corrected - self.compressor.decompress(payload)
        self.error = torch.where(error.isfinite(), error, torch.zeros_like(error))
        return payload

    def decompress(self, payload: Payload) -> Tensor:
        """What the compressor inside gives."""
        return self.compressor.decompress(payload)

    def omega(self, d: int) -> float:
        """Infinity: a single message is biased."""
        return math.inf

    def reset(self) -> None:
        """Forget the error."""
        self.error = None

    def state_dict(self) -> dict[str, Tensor]:
        """The error, if there is one."""
        return {} if self.error is None else {"error": self.error}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the error of `state_dict`."""
        error = state.get("error")
        self.error = None if error is None else error.clone()
