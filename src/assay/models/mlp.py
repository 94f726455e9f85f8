"""The multi-layer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from assay.models.chain import Chain, make_activation


class MLP(Chain):
    """Fully connected layers with an activation between them.

    Maps `(N, *)` with `prod(*) = sizes[0]` (images are flattened) to `(N, sizes[-1])`.
    Its children are `flatten`, then for each hidden layer i = 1, 2, ... `linear{i}`,
    `norm{i}` (if `batch_norm`), `activation{i}`, `dropout{i}` (if `dropout` > 0), then the last
    `linear{L}`.

    Args:
        sizes: Width of the input, of each hidden layer, and of the output; two or more.
        activation: `"relu"`, `"leaky_relu"`, `"elu"`, `"gelu"`, `"silu"`, `"softplus"`,
            `"sigmoid"`, `"tanh"`, `"identity"`, or a callable that makes a module.
        dropout: Probability of dropping a hidden unit, in [0, 1).
        batch_norm: Whether to normalise before each activation.

    Raises:
        ValueError: If there are fewer than two sizes, one is not positive, `dropout` is outside
            [0, 1), or the activation is unknown.

    Example:
        >>> import torch
        >>> from assay.models import MLP
        >>> model = MLP((784, 128, 10))
        >>> model(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
        >>> sum(p.numel() for p in model.parameters())
        101770

    Reference:
        D. E. Rumelhart, G. E. Hinton, R. J. Williams. Learning representations by
        back-propagating errors. Nature 323, 1986.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Callable[[], nn.Module] = "relu",
        dropout: float | int = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be two or more positive widths, got {tuple(sizes)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.add_module("flatten", nn.Flatten())
        last = len(sizes) - 1
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"linear{layer}", nn.Linear(fan_in, fan_out))
            if layer == last:
                break
            if batch_norm:
                self.add_module(f"norm{layer}", nn.BatchNorm1d(fan_out))
            self.add_module(f"activation{layer}", make_activation(activation))
            if dropout:
                self.add_module(f"dropout{layer}", nn.Dropout(dropout))
