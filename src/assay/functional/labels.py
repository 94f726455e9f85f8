"""Labels, checked."""

import torch
from torch import Tensor


def class_indices(
    y: object, classes: int, *, samples: int | None = None, name: str = "y"
) -> Tensor:
    """Labels as int64, one index of a class a sample, `(N,)`.

    Args:
        y: what somebody gave as labels.
        classes: how many there are.
        samples: how many labels there must be; default any number, but one.
        name: what the argument is called, for the message.

    Raises:
        ValueError: if they are not.

    Example:
        >>> import torch
        >>> from assay.functional.labels import class_indices
        >>> class_indices(torch.tensor([0, 2], dtype=torch.uint8), 3)
        tensor([0, 2])
    """
    if not isinstance(y, Tensor):
        raise ValueError(f"{name} must be a tensor of class indices, got {type(y).__name__}")
    many = "at least one" if samples is None else f"{samples}"
    fits = y.ndim == 1 and (len(y) > 0 if samples is None else len(y) == samples)
    if not fits or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"{name} must hold one class index a sample, {many} integers in one dimension, got "
            f"shape {tuple(y.shape)} of {y.dtype}"
        )
    wrong = y[(y < 0) | (y >= classes)]
    if len(wrong):
        raise ValueError(
            f"{name} must hold class indices from 0 to {classes - 1}, got {len(wrong)} of {len(y)} "
            f"that are not, e.g. {int(wrong[0])}"
        )
    return y.long()
