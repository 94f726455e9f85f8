"""Random augmentation of whole batches of images."""

from functools import partial

import torch
from jaxtyping import Num
from torch import Tensor
from torch.nn import functional as F

from assay.data.batches import Transform


def random_crop_flip(padding: int = 4, flip: bool = True) -> Transform:
    """Shift each image by up to `padding` pixels and mirror it half of the time.

    The standard augmentation for CIFAR: pad with zeros, crop a window of the old size at a
    random place, flip left-right with probability one half. The whole batch is one gather.

    Args:
        padding: Zeros added on each side, in pixels; shifts are from -padding to +padding.
        flip: Whether to mirror (digits and letters should not be).

    Returns:
        `transform(x, generator)` for `assay.data.Batches`: an augmented copy of `x`,
        `(N, C, H, W)`, decided by `generator` alone.

    Raises:
        ValueError: If `padding` is negative; by the transform, if `x` is not `(N, C, H, W)`.

    Example:
        >>> import torch
        >>> from assay.data import random_crop_flip
        >>> transform = random_crop_flip(padding=1)
        >>> x = torch.rand(8, 3, 32, 32)
        >>> transform(x, torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun. Deep residual learning for image recognition.
        CVPR 2016, section 4.2. https://arxiv.org/abs/1512.03385
    """
    if padding < 0:
        raise ValueError(f"padding must be zero or more pixels, got {padding}")
    return partial(_crop_flip, padding=padding, flip=flip)


def _crop_flip(
    x: Tensor, generator: torch.Generator, *, padding: int, flip: bool
) -> Num[Tensor, "n c h w"]:
    if x.ndim != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    n, c, height, width = x.shape

    def draw(values: int) -> Tensor:
        device = generator.device
        return torch.randint(values, (n, 1), generator=generator, device=device).to(x.device)

    rows = draw(2 * padding + 1) + torch.arange(height, device=x.device)
    left = draw(2 * padding + 1)
    columns = torch.arange(width, device=x.device).expand(n, width)
    if flip:
        columns = torch.where(draw(2).bool(), width - 1 - columns, columns)
    columns = columns + left
    padded = F.pad(x, (padding, padding, padding, padding)).flatten(2)
    index = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    index = index.view(n, 1, height * width).expand(n, c, height * width)
    return padded.gather(2, index).view(n, c, height, width)
