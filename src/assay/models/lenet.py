"""LeNet-5."""

from collections.abc import Callable

from torch import nn

from assay.models.chain import Chain, make_activation


class LeNet5(Chain):
    """Two 5x5 convolutions with pooling, then three fully connected layers (6-16-120-84-C).

    Maps `(N, in_channels, S, S)` with S = `image_size` to `(N, num_classes)`. As is usual today,
    pooling takes the maximum, every map sees all maps before it, and the activation is a ReLU;
    28x28 images are padded to 32x32 by the first convolution. 61,706 parameters for MNIST.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        image_size: 28 (MNIST) or 32 (CIFAR), pixels.
        activation: A name that `MLP` knows, or a callable that makes a module.

    Raises:
        ValueError: If `image_size` is neither 28 nor 32, or the activation is unknown.

    Example:
        >>> import torch
        >>> from assay.models import LeNet5
        >>> model = LeNet5()
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Reference:
        Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-based learning applied to document
        recognition. Proceedings of the IEEE 86, 1998.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        activation: str | Callable[[], nn.Module] = "relu",
    ) -> None:
        super().__init__()
        if image_size not in (28, 32):
            raise ValueError(f"image_size must be 28 or 32 pixels, got {image_size}")
        padding = (32 - image_size) // 2
        self.add_module("conv1", nn.Conv2d(in_channels, 6, 5, padding=padding))
        self.add_module("activation1", make_activation(activation))
        self.add_module("pool1", nn.MaxPool2d(2))
        self.add_module("conv2", nn.Conv2d(6, 16, 5))
        self.add_module("activation2", make_activation(activation))
        self.add_module("pool2", nn.MaxPool2d(2))
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear1", nn.Linear(16 * 5 * 5, 120))
        self.add_module("activation3", make_activation(activation))
        self.add_module("linear2", nn.Linear(120, 84))
        self.add_module("activation4", make_activation(activation))
        self.add_module("linear3", nn.Linear(84, num_classes))
