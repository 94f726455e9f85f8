"""Standard networks that experiments share, each written once."""

from assay.models.deepobs import AllCNNC, ThreeConvThreeDense, TwoConvTwoDense
from assay.models.lenet import LeNet5
from assay.models.mlp import MLP
from assay.models.registry import build, names
from assay.models.resnet import CifarResNet, PreResNet, ResNet20, ResNet50, WideResNet
from assay.models.vgg import VGGSmall

__all__ = [
    "MLP",
    "LeNet5",
    "TwoConvTwoDense",
    "ThreeConvThreeDense",
    "AllCNNC",
    "CifarResNet",
    "ResNet20",
    "ResNet50",
    "PreResNet",
    "WideResNet",
    "VGGSmall",
    "build",
    "names",
]
