"""The common ground of models that are a plain chain of layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


class Chain(nn.Sequential):
    """A sequential model with a constructor of its own; a slice of it is a plain Sequential."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            # nn.Sequential would call our constructor with layers.
            chain = nn.Sequential()
            for name, module in list(self.named_children())[index]:
                chain.add_module(name, module)
            return chain
        return super().__getitem__(index)


def initialise(
    layer: nn.Conv2d | nn.Linear, weight: Callable[[Tensor], object], bias: float | int
) -> None:
    """Fill the weight of a layer by an in-place initialiser and its bias by a constant."""
    weight(layer.weight)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)


def make_activation(activation: str | Callable[[], nn.Module]) -> nn.Module:
    """Return a new activation module from its name or from a factory."""
    if callable(activation):
        return activation()
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)} or a callable that makes a "
            f"module, got {activation!r}"
        )
    return ACTIVATIONS[activation]()
