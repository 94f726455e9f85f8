"""The examination that needs nothing: embedded data and a small network, trained on the spot."""

import torch
import torch.nn.functional as F
from torch import nn

from assay import data as named
from assay.data import Batches
from assay.examine.sources import Data
from assay.functional import fit

EPOCHS = 6


class DemoNet(nn.Sequential):
    """Two convolutions with BatchNorm and a linear layer for images of 28 × 28; 10 classes.

    Example:
        >>> import torch
        >>> from assay.examine.demo import DemoNet
        >>> DemoNet()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )


def demo(seed: int = 0, epochs: int = EPOCHS) -> tuple[nn.Module, Data]:
    """A network trained on the 4,000 embedded MNIST images, and the data.

    Args:
        seed: of weights and batches.
        epochs: of training; about a second each.

    Returns:
        Model and data, as `assay.examine.examine` takes them.
    """
    train, test = (named.load("mnist5k", split) for split in ("train", "test"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DemoNet()
        generator = torch.Generator().manual_seed(seed)
        batches = Batches(train.x, train.y, 64, shuffle=True, generator=generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        fit(model, optimizer, batches, epochs=epochs, loss_fn=F.cross_entropy)
    return model.eval(), Data(train, test, train.classes, "mnist5k")
