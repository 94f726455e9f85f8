"""A model whose loss can be differentiated in its weights, whatever state the user left it in."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from assay.examine.panel import NotApplicable


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[nn.Module]:
    """The model with parameters that require gradients, all of one precise dtype, inside the block.

    Parameters that the user froze stay frozen, unless all are: then the model was loaded for
    inference, and all floating-point ones count. A model in half precision, or of several dtypes,
    gives a copy in single precision: derivatives of rounded weights drown in rounding.

    Args:
        model: in any state; left as it was.

    Raises:
        NotApplicable: if it has no floating-point parameters.

    Example:
        >>> import torch
        >>> from assay.examine.differentiable import differentiable
        >>> model = torch.nn.Linear(2, 2).requires_grad_(False)
        >>> with differentiable(model) as net:
        ...     net.weight.requires_grad
        True
        >>> model.weight.requires_grad
        False
    """
    floating = [p for p in model.parameters() if p.is_floating_point()]
    if not floating:
        raise NotApplicable("the model has no floating-point parameters")
    dtypes = {p.dtype for p in floating}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        model = copy.deepcopy(model).float()
        floating = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [] if any(p.requires_grad for p in floating) else floating
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield model
    finally:
        for p in frozen:
            p.requires_grad_(False)


def fitting(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs in the dtype of the model's parameters; integers (tokens) stay.

    Args:
        model: from `differentiable`.
        x: inputs.
    """
    if not x.is_floating_point():
        return x
    return x.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))


def layer_of(parameter: str) -> str:
    """The name of the user's layer that owns a parameter of a `Subject`.

    Args:
        parameter: its name in the subject.

    Example:
        >>> from assay.examine.differentiable import layer_of
        >>> layer_of("model.encoder.fc.weight")
        'encoder.fc'
    """
    owner = parameter.rpartition(".")[0].removeprefix("model.")
    return owner if owner not in ("", "model") else "(the model itself)"
