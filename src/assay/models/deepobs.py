"""The convolutional test problems of DeepOBS: 2C2D, 3C3D and All-CNN-C."""

from torch import Tensor, nn

from assay.models.chain import Chain, initialise


class TwoConvTwoDense(Chain):
    """2C2D: two convolutions with pooling, two fully connected layers.

    Maps `(N, in_channels, 28, 28)` to `(N, num_classes)`. Convolutions 5x5x32 and 5x5x64, padded
    to keep their size, after each a ReLU and a 2x2 maximum; dense layers of 1,024 and
    `num_classes`. Weights from a normal distribution of standard deviation 0.05 cut off at two of
    them, biases 0.05, as in DeepOBS. 3,274,634 parameters for Fashion-MNIST.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.

    Example:
        >>> import torch
        >>> from assay.models import TwoConvTwoDense
        >>> model = TwoConvTwoDense()
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in model.parameters())
        3274634

    Reference:
        F. Schneider, L. Balles, P. Hennig. DeepOBS: a deep learning optimizer benchmark suite.
        ICLR 2019. https://arxiv.org/abs/1903.05499
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        for number, maps in enumerate((32, 64), start=1):
            self.add_module(f"conv{number}", nn.Conv2d(in_channels, maps, 5, padding=2))
            self.add_module(f"relu{number}", nn.ReLU())
            self.add_module(f"pool{number}", nn.MaxPool2d(2))
            in_channels = maps
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear1", nn.Linear(64 * 7 * 7, 1024))
        self.add_module("relu3", nn.ReLU())
        self.add_module("linear2", nn.Linear(1024, num_classes))
        for module in self:
            if isinstance(module, nn.Conv2d | nn.Linear):
                initialise(module, _cut_normal, bias=0.05)


def _cut_normal(weight: Tensor) -> Tensor:
    return nn.init.trunc_normal_(weight, std=0.05, a=-0.1, b=0.1)


class ThreeConvThreeDense(Chain):
    """3C3D: three convolutions with pooling, three fully connected layers.

    Maps `(N, in_channels, 32, 32)` to `(N, num_classes)`. Convolutions 5x5x64 and 3x3x96 without
    padding and 3x3x128 with; after each a ReLU and a 3x3 maximum at stride 2, padded at the right
    and bottom only ("same" padding of TensorFlow); dense layers of 512, 256 and `num_classes`.
    Xavier initialisation (normal for convolutions, uniform for dense layers), zero biases.
    895,210 parameters for CIFAR-10.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.

    Example:
        >>> import torch
        >>> from assay.models import ThreeConvThreeDense
        >>> model = ThreeConvThreeDense()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in model.parameters())
        895210

    Reference:
        F. Schneider, L. Balles, P. Hennig. DeepOBS: a deep learning optimizer benchmark suite.
        ICLR 2019. https://arxiv.org/abs/1903.05499
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        convolutions = (
            nn.Conv2d(in_channels, 64, 5),
            nn.Conv2d(64, 96, 3),
            nn.Conv2d(96, 128, 3, padding=1),
        )
        for number, convolution in enumerate(convolutions, start=1):
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"relu{number}", nn.ReLU())
            # The ragged last window of ceil_mode is the one that "same" padding completes.
            self.add_module(f"pool{number}", nn.MaxPool2d(3, stride=2, ceil_mode=True))
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear1", nn.Linear(128 * 3 * 3, 512))
        self.add_module("relu4", nn.ReLU())
        self.add_module("linear2", nn.Linear(512, 256))
        self.add_module("relu5", nn.ReLU())
        self.add_module("linear3", nn.Linear(256, num_classes))
        for module in self:
            if isinstance(module, nn.Conv2d):
                initialise(module, nn.init.xavier_normal_, bias=0)
            elif isinstance(module, nn.Linear):
                initialise(module, nn.init.xavier_uniform_, bias=0)


class AllCNNC(Chain):
    """All-CNN-C: nine convolutions and nothing else but ReLUs and a global average.

    Maps `(N, in_channels, H, W)`, usually 32x32, to `(N, num_classes)`. Widths 96, 96, 96 (stride
    2), 192, 192, 192 (stride 2), 192 (no padding), 192 (1x1), `num_classes` (1x1); the others are
    3x3 and padded by one pixel on every side (TensorFlow's "same" padding puts both pixels of a
    strided layer at the right and bottom: equal sizes, maps shifted by one pixel). Xavier-normal
    weights and biases of 0.1, as in DeepOBS. 1,387,108 parameters for CIFAR-100.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        dropout: Whether to drop inputs (0.2) and the maps after strided layers (0.5), as in the
            paper; without it the model is deterministic in training too.

    Example:
        >>> import torch
        >>> from assay.models import AllCNNC
        >>> model = AllCNNC(num_classes=100)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(p.numel() for p in model.parameters())
        1387108

    Reference:
        J. T. Springenberg, A. Dosovitskiy, T. Brox, M. Riedmiller. Striving for simplicity: the
        all convolutional net. ICLR workshop 2015. https://arxiv.org/abs/1412.6806
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3, dropout: bool = True) -> None:
        super().__init__()
        if dropout:
            self.add_module("dropout1", nn.Dropout(0.2))
        # (output maps, kernel, stride, padding)
        layers = (
            (96, 3, 1, 1),
            (96, 3, 1, 1),
            (96, 3, 2, 1),
            (192, 3, 1, 1),
            (192, 3, 1, 1),
            (192, 3, 2, 1),
            (192, 3, 1, 0),
            (192, 1, 1, 0),
            (num_classes, 1, 1, 0),
        )
        for number, (maps, kernel, stride, padding) in enumerate(layers, start=1):
            convolution = nn.Conv2d(in_channels, maps, kernel, stride=stride, padding=padding)
            initialise(convolution, nn.init.xavier_normal_, bias=0.1)
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"relu{number}", nn.ReLU())
            if dropout and stride == 2:
                self.add_module(f"dropout{1 + number // 3}", nn.Dropout(0.5))
            in_channels = maps
        self.add_module("average", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
