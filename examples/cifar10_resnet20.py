"""ResNet-20 on CIFAR-10: train it here, then examine it.

    python examples/cifar10_resnet20.py --epochs 30 --weights resnet20.safetensors
    assay examine examples/cifar10_resnet20.py:build --weights resnet20.safetensors \
        --data examples/cifar10_resnet20.py:load --output report --budget 10m

`build` and `load` are all that `assay examine` needs of anybody's own files.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from assay import data
from assay.data import Batches, Dataset, random_crop_flip
from assay.examine import Data
from assay.functional import evaluate_classifier, fit
from assay.models import ResNet20

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def build() -> nn.Module:
    """The untrained network; `--weights` fills it."""
    torch.manual_seed(0)
    return ResNet20(num_classes=10)


def load() -> Data:
    """CIFAR-10 with standardised channels."""
    train, test = (data.load("cifar10", split) for split in ("train", "test"))
    pairs = [(standardised(part.x), part.y) for part in (train, test)]
    return Data(*pairs, classes=train.classes, name="cifar10")


def standardised(x: Tensor) -> Tensor:
    """Channels with the mean 0 and variance 1 of the train images."""
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def main() -> None:
    """Train with SGD, momentum and one cosine, as is usual for this network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--weights", type=Path, default=Path("resnet20.safetensors"))
    arguments = parser.parse_args()
    train: Dataset = data.load("cifar10", "train")
    test = data.load("cifar10", "test")
    model = build()
    batches = Batches(
        standardised(train.x), train.y, 128, drop_last=True,
        generator=torch.Generator().manual_seed(0), transform=random_crop_flip(),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = arguments.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images = standardised(test.x)
    fit(
        model, optimizer, batches, epochs=arguments.epochs, step_scheduler=schedule,
        after_epoch=lambda records: print(
            f"epoch {len(records)}: loss {records[-1]['loss']:.3f}, "
            f"test accuracy {evaluate_classifier(model, images, test.y)['accuracy']:.3f}",
            flush=True,
        ),
    )  # fmt: skip
    save_file(model.state_dict(), arguments.weights)


if __name__ == "__main__":
    main()
