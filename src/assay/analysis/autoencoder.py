"""The two small auto-encoders of DeepDIG."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Bounds = tuple[float, float] | None


class DenseAutoencoder(nn.Module):
    """Fully connected auto-encoder d-100-50-d for inputs of any shape.

    Args:
        shape: of one input; d is its number of values.
        widths: of the hidden layers.
        bounds: range of the outputs (a scaled sigmoid), or None for no bounds.

    Raises:
        ValueError: if a width is not positive or the bounds are not increasing.

    Example:
        >>> import torch
        >>> from assay.analysis import DenseAutoencoder
        >>> autoencoder = DenseAutoencoder((1, 28, 28))
        >>> autoencoder(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        shape: Sequence[int],
        widths: Sequence[int] = (100, 50),
        bounds: Bounds = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be one or more positive numbers, got {tuple(widths)}")
        self.shape = tuple(shape)
        layers: list[nn.Module] = [nn.Flatten()]
        previous = math.prod(shape)
        for width in widths:
            layers += [nn.Linear(previous, width), nn.ReLU()]
            previous = width
        self.layers = nn.Sequential(*layers, nn.Linear(previous, math.prod(shape)))
        self.range = Scaled(bounds)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions of the same shape."""
        return self.range(self.layers(x)).reshape(-1, *self.shape)


class ConvAutoencoder(nn.Module):
    """Convolutional auto-encoder: three 4x4 convolutions and their mirror images.

    Args:
        channels: of the images.
        widths: output maps of the convolutions.
        bounds: range of the outputs (a scaled sigmoid), or None for no bounds.

    Raises:
        ValueError: if a width is not positive or the bounds are not increasing.

    Example:
        >>> import torch
        >>> from assay.analysis import ConvAutoencoder
        >>> autoencoder = ConvAutoencoder()
        >>> autoencoder(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (12, 24, 48),
        bounds: Bounds = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be one or more positive numbers, got {tuple(widths)}")
        maps = [channels, *widths]
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for inner, outer in zip(maps[1:], maps[:-1], strict=True):
            encoder += [nn.Conv2d(outer, inner, 4, padding=1), nn.ReLU()]
            decoder = [nn.ConvTranspose2d(inner, outer, 4, padding=1), nn.ReLU(), *decoder]
        self.layers = nn.Sequential(*encoder, *decoder[:-1])
        self.range = Scaled(bounds)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions of the same shape; images are at least 4 pixels wide and high."""
        return self.range(self.layers(x))


def default_autoencoder(shape: torch.Size, bounds: Bounds) -> nn.Module:
    """The paper's choice: convolutional for colour images, else fully connected."""
    if len(shape) == 3 and shape[0] == 3 and min(shape[1:]) >= 4:
        return ConvAutoencoder(bounds=bounds)
    return DenseAutoencoder(shape, bounds=bounds)


class Scaled(nn.Module):
    """A sigmoid scaled to bounds, or nothing.

    Args:
        bounds: smallest and largest output, or None.
    """

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        check_bounds(bounds)
        self.bounds = bounds

    def forward(self, x: Tensor) -> Tensor:
        """Values between the bounds."""
        if self.bounds is None:
            return x
        low, high = self.bounds
        # Rounding may carry a scaled sigmoid out of its bounds by one unit in the last place.
        return (low + (high - low) * x.sigmoid()).clamp(low, high)


def check_bounds(bounds: Bounds) -> None:
    """Refuse bounds that are not two increasing numbers."""
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be two increasing numbers or None, got {bounds}")
