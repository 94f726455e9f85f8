"""Residual networks for images of 32x32 pixels, and ResNet-50 for larger ones."""

from collections import OrderedDict
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from assay.models.chain import Chain


class CifarResNet(Chain):
    """The residual network of He et al. for CIFAR, depth 6n + 2, with parameter-free shortcuts.

    Maps `(N, in_channels, H, W)`, usually 32x32, to `(N, num_classes)`. One 3x3 convolution, three
    stages of n blocks with `width`, 2 `width` and 4 `width` maps, the second and third at stride
    2; global average; one linear layer. Depths 20, 32, 44, 56 and 110 are those of the paper.

    Args:
        depth: Number of weighted layers, 6n + 2.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Maps of the first stage.

    Raises:
        ValueError: If `depth` is not 6n + 2 with n at least 1.

    Example:
        >>> import torch
        >>> from assay.models import CifarResNet
        >>> model = CifarResNet(depth=32)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun. Deep residual learning for image recognition.
        CVPR 2016, section 4.2. https://arxiv.org/abs/1512.03385
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (20, 32, 44, ...), got {depth}")
        blocks = (depth - 2) // 6
        super().__init__(
            OrderedDict(
                conv1=_conv3x3(in_channels, width),
                norm1=nn.BatchNorm2d(width),
                relu1=nn.ReLU(),
                stage1=_stage(BasicBlock, blocks, width, width, 1),
                stage2=_stage(BasicBlock, blocks, width, 2 * width, 2),
                stage3=_stage(BasicBlock, blocks, 2 * width, 4 * width, 2),
                average=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(4 * width, num_classes),
            )
        )
        _he_initialisation(self)


class ResNet20(CifarResNet):
    """The residual network with 20 layers for CIFAR; 269,722 parameters for CIFAR-10.

    Maps `(N, in_channels, H, W)`, usually 32x32, to `(N, num_classes)`; see `CifarResNet`.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Maps of the first stage.

    Example:
        >>> import torch
        >>> from assay.models import ResNet20
        >>> model = ResNet20()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in model.parameters())
        269722

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun. Deep residual learning for image recognition.
        CVPR 2016, section 4.2. https://arxiv.org/abs/1512.03385
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__(20, num_classes, in_channels, width)


class ResNet50(Chain):
    """The residual network with 50 layers for ImageNet; 25,557,032 parameters for 1000 classes.

    Maps `(N, in_channels, H, W)`, usually 224x224, to `(N, num_classes)`. One 7x7 convolution and a
    maximum, each at stride 2; four stages of 3, 4, 6 and 3 bottlenecks that narrow to `width`, 2, 4
    and 8 `width` maps and put out four times as many, with the stride in the 3x3 convolution;
    global average; one linear layer.

    Without normalisation it is made for `assay.optim.fixup_`, which gives the `branches` their
    scalars: no convolution has a bias, but a scalar one follows the first.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Maps of the first convolution.
        norm: Whether each convolution is followed by BatchNorm.

    Example:
        >>> import torch
        >>> from assay.models import ResNet50
        >>> from assay.optim import fixup_
        >>> model = ResNet50(num_classes=10, width=4, norm=False)
        >>> _ = fixup_(model, model.branches, head=model.linear)
        >>> model(torch.ones(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun. Deep residual learning for image recognition.
        CVPR 2016, table 1. https://arxiv.org/abs/1512.03385. The place of the stride: P. Goyal et
        al. Accurate, large minibatch SGD. 2017, section 5.1. https://arxiv.org/abs/1706.02677
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        norm: bool = True,
    ) -> None:
        block = partial(Bottleneck, norm=norm)
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False),
                norm1=nn.BatchNorm2d(width) if norm else ScalarBias(),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(3, stride=2, padding=1),
                stage1=_stage(block, 3, width, 4 * width, 1),
                stage2=_stage(block, 4, 4 * width, 8 * width, 2),
                stage3=_stage(block, 6, 8 * width, 16 * width, 2),
                stage4=_stage(block, 3, 16 * width, 32 * width, 2),
                average=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(32 * width, num_classes),
            )
        )
        _he_initialisation(self)

    @property
    def branches(self) -> list[nn.Module]:
        """The residual branches, whose outputs are added to the shortcuts."""
        return [block.branch for block in self.modules() if isinstance(block, Bottleneck)]


class PreResNet(Chain):
    """The pre-activation residual network with bottlenecks for CIFAR, depth 9n + 2.

    Maps `(N, in_channels, H, W)`, usually 32x32, to `(N, num_classes)`. Three stages of n blocks
    that narrow to 16, 32 and 64 maps and put out four times as many; where the shape changes, the
    shortcut is a 1x1 convolution of the block's input. Depth 164 has 1,703,258 parameters.

    Args:
        depth: Number of weighted layers, 9n + 2.
        num_classes: Number of outputs.
        in_channels: Channels of the images.

    Raises:
        ValueError: If `depth` is not 9n + 2 with n at least 1.

    Example:
        >>> import torch
        >>> from assay.models import PreResNet
        >>> model = PreResNet(depth=11)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun. Identity mappings in deep residual networks.
        ECCV 2016. https://arxiv.org/abs/1603.05027
    """

    def __init__(self, depth: int = 164, num_classes: int = 10, in_channels: int = 3) -> None:
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(f"depth must be 9n + 2 with n >= 1 (110, 164, ...), got {depth}")
        blocks = (depth - 2) // 9
        super().__init__(
            OrderedDict(
                conv1=_conv3x3(in_channels, 16),
                stage1=_stage(PreActivationBottleneck, blocks, 16, 64, 1),
                stage2=_stage(PreActivationBottleneck, blocks, 64, 128, 2),
                stage3=_stage(PreActivationBottleneck, blocks, 128, 256, 2),
                norm=nn.BatchNorm2d(256),
                relu=nn.ReLU(),
                average=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(256, num_classes),
            )
        )
        _he_initialisation(self)


class WideResNet(Chain):
    """The wide residual network, depth 6n + 4; WRN-28-10 has 36,479,194 parameters.

    Maps `(N, in_channels, H, W)`, usually 32x32, to `(N, num_classes)`. Three stages of n
    pre-activation blocks with 16k, 32k and 64k maps, k = `width`; where the shape changes, the
    shortcut is a 1x1 convolution of the block's normalised input.

    Args:
        depth: Number of weighted layers, 6n + 4.
        width: Factor k by which it is wider than the network of He et al.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        dropout: Probability of dropping a map's pixel between the two convolutions of a block.

    Raises:
        ValueError: If `depth` is not 6n + 4 with n at least 1.

    Example:
        >>> import torch
        >>> from assay.models import WideResNet
        >>> model = WideResNet(depth=10, width=2)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Reference:
        S. Zagoruyko, N. Komodakis. Wide residual networks. BMVC 2016.
        https://arxiv.org/abs/1605.07146
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        dropout: float | int = 0.0,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (16, 22, 28, ...), got {depth}")
        blocks = (depth - 4) // 6
        block = partial(WideBlock, dropout=dropout)
        maps = 16 * width
        super().__init__(
            OrderedDict(
                conv1=_conv3x3(in_channels, 16),
                stage1=_stage(block, blocks, 16, maps, 1),
                stage2=_stage(block, blocks, maps, 2 * maps, 2),
                stage3=_stage(block, blocks, 2 * maps, 4 * maps, 2),
                norm=nn.BatchNorm2d(4 * maps),
                relu=nn.ReLU(),
                average=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(4 * maps, num_classes),
            )
        )
        _he_initialisation(self)


class PaddedShortcut(nn.Module):
    """He et al.'s option A: take every `stride`-th pixel and add maps of zeros; no parameters.

    Maps `(N, C, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`; half of the new
    maps come before the old ones, half after.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k i j"]:
        """Return the shortcut."""
        thinned = x[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """relu(f(x) + shortcut(x)) with two 3x3 convolutions in f, each followed by BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        same = stride == 1 and in_channels == out_channels
        padded = PaddedShortcut(in_channels, out_channels, stride)
        self.shortcut = nn.Identity() if same else padded

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k i j"]:
        """Return the maps of the block."""
        out = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """relu(f(x) + shortcut(x)) with convolutions 1x1, 3x3 and 1x1 in the branch f."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: bool) -> None:
        super().__init__()
        narrow = out_channels // 4
        layers: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(in_channels, narrow, 1, bias=False),
            "norm1": nn.BatchNorm2d(narrow),
            "relu1": nn.ReLU(),
            "conv2": _conv3x3(narrow, narrow, stride),
            "norm2": nn.BatchNorm2d(narrow),
            "relu2": nn.ReLU(),
            "conv3": nn.Conv2d(narrow, out_channels, 1, bias=False),
            "norm3": nn.BatchNorm2d(out_channels),
        }
        kept = {name: layer for name, layer in layers.items() if norm or "norm" not in name}
        self.branch = nn.Sequential(OrderedDict(kept))
        self.shortcut = _projection(in_channels, out_channels, stride)
        if norm and not isinstance(self.shortcut, nn.Identity):
            self.shortcut = nn.Sequential(self.shortcut, nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k i j"]:
        """Return the maps of the block."""
        return self.relu(self.branch(x) + self.shortcut(x))


class ScalarBias(nn.Module):
    """x + b with one number b."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.bias


class PreActivationBottleneck(nn.Module):
    """f(x) + shortcut(x) with BatchNorm, ReLU and convolution 1x1, 3x3, 1x1 in turn in f."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        narrow = out_channels // 4
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, narrow, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(narrow)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv3x3(narrow, narrow, stride)
        self.norm3 = nn.BatchNorm2d(narrow)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(narrow, out_channels, 1, bias=False)
        self.shortcut = _projection(in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k i j"]:
        """Return the maps of the block."""
        out = self.conv1(self.relu1(self.norm1(x)))
        out = self.conv2(self.relu2(self.norm2(out)))
        return self.conv3(self.relu3(self.norm3(out))) + self.shortcut(x)


class WideBlock(nn.Module):
    """f(x) + shortcut with BatchNorm, ReLU and 3x3 convolution twice in f, dropout in between."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, dropout: float | int
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.shortcut = _projection(in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k i j"]:
        """Return the maps of the block."""
        activated = self.relu1(self.norm1(x))
        out = self.relu2(self.norm2(self.conv1(activated)))
        out = self.conv2(self.dropout(out))
        same = isinstance(self.shortcut, nn.Identity)
        return out + (x if same else self.shortcut(activated))


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def _stage(block, count: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


def _he_initialisation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
