"""VGG-16 in the form that is usual for images of 32x32 pixels."""

from functools import partial

from torch import nn

from assay.models.chain import Chain, initialise

# Convolutions of each stage; a maximum over 2x2 pixels follows each stage.
STAGES = (2, 2, 3, 3, 3)


class VGGSmall(Chain):
    """Thirteen 3x3 convolutions in five stages, and one linear layer.

    Maps `(N, in_channels, H, W)`, 32x32 or larger, to `(N, num_classes)`. The stages have w, 2w,
    4w, 8w and 8w maps, w = `width`; after the last, a global average. With `width=64` it is the
    VGG-16 usual for CIFAR-10 (14,728,266 parameters with batch normalisation); the default is a
    quarter as wide, so that it trains on a CPU. (The "VGG-small" of the quantisation literature
    is another network, with six convolutions.)

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Maps of the first stage.
        batch_norm: Whether to normalise after each convolution.

    Raises:
        ValueError: If `width` is not positive.

    Example:
        >>> import torch
        >>> from assay.models import VGGSmall
        >>> model = VGGSmall()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Reference:
        K. Simonyan, A. Zisserman. Very deep convolutional networks for large-scale image
        recognition. ICLR 2015. https://arxiv.org/abs/1409.1556
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be a positive number of maps, got {width}")
        # Without normalisation thirteen layers train only from He's initialisation.
        he_normal = partial(nn.init.kaiming_normal_, nonlinearity="relu")
        for stage, convolutions in enumerate(STAGES, start=1):
            maps = width * min(2 ** (stage - 1), 8)
            for number in range(1, convolutions + 1):
                place = f"{stage}_{number}"
                convolution = nn.Conv2d(in_channels, maps, 3, padding=1)
                initialise(convolution, he_normal, bias=0)
                self.add_module(f"conv{place}", convolution)
                if batch_norm:
                    self.add_module(f"norm{place}", nn.BatchNorm2d(maps))
                self.add_module(f"relu{place}", nn.ReLU())
                in_channels = maps
            self.add_module(f"pool{stage}", nn.MaxPool2d(2))
        self.add_module("average", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", nn.Linear(in_channels, num_classes))
