"""Training and evaluation mode, module by module."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own mode back after the block.

    `model.train(was_training)` would not: it wakes the norms that somebody has put into evaluation
    mode inside a model in training mode.

    Args:
        model: whose modules these are.

    Example:
        >>> from torch import nn
        >>> from assay.functional import keeping_modes
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
        >>> with keeping_modes(model): _ = model.train()
        >>> model.training, model[1].training
        (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module has its own mode again.

    Args:
        model: whose modules these are.

    Example:
        >>> from torch import nn
        >>> from assay.functional import evaluating
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with evaluating(model): model.training
        False
        >>> model.training
        True
    """
    with keeping_modes(model):
        model.eval()
        yield
