"""Where the samples of a mini-batch sit in an intermediate tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The axis that counts samples, and what else is folded into it.

    Models transpose (time first) and fold (`x.view(N * T, d)`); the gradient of one sample's loss
    shows which rows of a tensor belong to the sample.

    Args:
        samples: N.
        axis: of the tensor.
        fold: positions that share the axis with the samples; its length is N · fold.
        sample_major: whether a sample's positions are neighbours.
    """

    samples: int
    axis: int = 0
    fold: int = 1
    sample_major: bool = True

    def split(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Samples in front: `(*lead, N, ...)`, or `(*lead, N, fold, ...)` if they were folded."""
        if self.axis:
            tensor = tensor.movedim(lead + self.axis, lead)
        if self.fold == 1:
            return tensor
        if self.sample_major:
            return tensor.unflatten(lead, (self.samples, self.fold))
        return tensor.unflatten(lead, (self.fold, self.samples)).transpose(lead, lead + 1)

    def holds_only(self, tensor: Tensor, sample: int) -> bool:
        """Whether `tensor`, a gradient of one sample's loss, is zero at all other samples."""
        rows = self.split(tensor).reshape(self.samples, -1).ne(0).any(1)
        rows[sample] = False
        return not bool(rows.any())


def candidates(shape: torch.Size, samples: int, feature_dims: int) -> Iterator[Layout]:
    """All layouts that a shape allows, the likeliest first.

    Args:
        shape: of a tensor.
        samples: N.
        feature_dims: number of trailing dimensions that hold features, not samples.
    """
    lead = len(shape) - feature_dims
    for axis in range(lead):
        if shape[axis] == samples:
            yield Layout(samples, axis)
    for axis in range(lead):
        if shape[axis] != samples and shape[axis] % samples == 0:
            fold = shape[axis] // samples
            yield Layout(samples, axis, fold)
            if samples > 1:
                yield Layout(samples, axis, fold, sample_major=False)
