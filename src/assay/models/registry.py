"""Convolutional networks by name, for configurations that choose one by a string."""

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from assay.models.deepobs import AllCNNC, ThreeConvThreeDense
from assay.models.lenet import LeNet5
from assay.models.resnet import CifarResNet, PreResNet, ResNet20, ResNet50, WideResNet
from assay.models.vgg import VGGSmall

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "3c3d": ThreeConvThreeDense,
    "all-cnn-c": AllCNNC,
    "resnet20": ResNet20,
    "resnet32": partial(CifarResNet, 32),
    "resnet44": partial(CifarResNet, 44),
    "resnet56": partial(CifarResNet, 56),
    "resnet110": partial(CifarResNet, 110),
    "resnet50": ResNet50,
    "preresnet164": partial(PreResNet, 164),
    "wrn-28-10": partial(WideResNet, 28, 10),
    "vgg-small": VGGSmall,
    "vgg16": partial(VGGSmall, width=64),
}


def names() -> tuple[str, ...]:
    """Return the names that `build` knows.

    Example:
        >>> from assay.models import names
        >>> "resnet20" in names()
        True
    """
    return tuple(_MODELS)


def build(name: str, num_classes: int = 10, in_channels: int = 3, **options: object) -> nn.Module:
    """Return a new model by name.

    Args:
        name: One of `names()`.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        **options: Further arguments of that model's constructor, e.g. `width=8`.

    Returns:
        The model, `(N, in_channels, H, W)` to `(N, num_classes)`.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> from assay.models import build
        >>> sum(p.numel() for p in build("lenet5", in_channels=1).parameters())
        61706
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name).lower(), _MODELS, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"unknown model {name!r}: {hint}The names are {', '.join(_MODELS)}")
    return _MODELS[name](num_classes=num_classes, in_channels=in_channels, **options)
