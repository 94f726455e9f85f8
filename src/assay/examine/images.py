"""Inputs as pictures, where they are pictures."""

from typing import Any

import numpy as np
from torch import Tensor

SMALLEST = 4  # pixels a side


def as_images(x: Tensor) -> np.ndarray | None:
    """Grey or colour images as matplotlib shows them, in [0, 1]; None if these are none.

    Args:
        x: inputs `(N, C, H, W)` with one or three channels, or anything else.

    Returns:
        `(N, H, W)` or `(N, H, W, 3)`; the range of all values becomes [0, 1].

    Example:
        >>> import torch
        >>> from assay.examine.images import as_images
        >>> as_images(torch.zeros(2, 3, 8, 8)).shape, as_images(torch.zeros(2, 8)) is None
        ((2, 8, 8, 3), True)
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < SMALLEST:
        return None
    if not x.is_floating_point() or x.numel() == 0:
        return None
    images = x.detach().float().cpu().numpy()
    low, high = float(images.min()), float(images.max())
    images = (images - low) / max(high - low, 1e-12)
    return images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)


def show_image(axis: Any, image: np.ndarray, title: str = "") -> None:
    """Draw an image without a frame.

    Args:
        axis: matplotlib's.
        image: of `as_images`.
        title: above it.
    """
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    axis.set_title(title, fontsize=8)
