"""What a batch counts in a mean over batches."""

import functools
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

IGNORED = -100
"""The target that torch's cross-entropy leaves out."""


def batch_size(inputs: Any) -> int:
    """The number of samples of a batch.

    Args:
        inputs: a tensor, or a tuple or mapping that holds some.

    Raises:
        ValueError: if there is no tensor.
    """
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"the inputs of a batch hold no tensor: {type(inputs).__name__}")
    return len(tensors[0])


class BatchWeights:
    """What a batch counts in a mean over batches: as the loss itself averages over samples.

    Args:
        loss_fn: the loss; `torch.nn.functional`'s, a module of torch's, or a partial of one tells
            which targets it ignores, the weights of classes, and whether it is a sum.
    """

    def __init__(self, loss_fn: Any) -> None:
        base = loss_fn
        while isinstance(base, functools.partial):
            base = base.func
        self.of_classes = base in (F.cross_entropy, F.nll_loss) or isinstance(
            base, nn.CrossEntropyLoss | nn.NLLLoss
        )
        self.ignored: int = _setting(loss_fn, "ignore_index", IGNORED)
        self.is_sum = _setting(loss_fn, "reduction", "mean") == "sum"
        self.of_class: Tensor | None = (
            _setting(loss_fn, "weight", None) if self.of_classes else None
        )

    def counted(self, targets: Any) -> Tensor | None:
        """Which targets are not ignored; None where they are no integers."""
        if not isinstance(targets, Tensor) or not is_whole(targets):
            return None
        return targets.long() != self.ignored  # not as bytes, of which -100 is 156

    def __call__(self, inputs: Any, targets: Any) -> float:
        """The weight of a batch; 0 if none of its targets counts."""
        counted = self.counted(targets)
        if counted is None:
            return batch_size(inputs)
        if self.of_class is None:
            return int(counted.sum())
        return float(self.of_class.double()[targets[counted].long().to(self.of_class.device)].sum())

    def sums(self, losses: Tensor, weight: float) -> Tensor:
        """What the losses of a batch add to the sum over all of them."""
        return losses.double() if self.is_sum else losses.double() * weight

    def no_target_counts(self) -> ValueError:
        """The error for data of which no batch counts."""
        return ValueError(
            f"all targets are ignored (they are {self.ignored}) or of classes with weight 0: "
            "no loss is left"
        )


def _setting(loss_fn: Any, name: str, default: Any) -> Any:
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name, _setting(loss_fn.func, name, default))
    return getattr(loss_fn, name, default)


def is_whole(targets: Tensor) -> bool:
    """Whether targets are integers.

    Args:
        targets: of a batch.
    """
    return not (targets.is_floating_point() or targets.is_complex())
