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
    random place, flip left-right with probability one half. The whole batch is gathered at once.

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
    n, _, height, width = x.shape

    def draw(values: int) -> Tensor:
        device = generator.device
        return torch.randint(values, (n,), generator=generator, device=device).to(x.device)

    top, left = draw(2 * padding + 1), draw(2 * padding + 1)
    padded = F.pad(x, (padding, padding, padding, padding))
    # (N, C, 2 padding + 1, 2 padding + 1, H, W): every crop, as a view.
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    out = crops[torch.arange(n, device=x.device), :, top, left]
    if not flip:
        return out
    return torch.where(draw(2).bool().view(n, 1, 1, 1), out.flip(-1), out)
