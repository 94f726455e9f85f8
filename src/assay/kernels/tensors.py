"""Which tensors compiled kernels take."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["NUMBERS", "is_plain"]

NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}
"""The kernels' number types, by dtype."""


def is_plain(x: Tensor) -> bool:
    """Whether it is contiguous numbers of a known type in memory of the CPU, of any shape.

    Args:
        x: any tensor; subclasses, fake ones among them, need not have memory.
    """
    return (
        type(x) in (Tensor, Parameter)
        and x.device.type == "cpu"
        and x.dtype in NUMBERS
        and x.is_contiguous()
        and x.data_ptr() % x.element_size() == 0
    )
