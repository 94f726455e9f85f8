"""MNIST and Fashion-MNIST: 70,000 grey images of 28x28 pixels, as IDX or Parquet files."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from assay.data.embedded import DIGITS
from assay.data.entry import Arrays, Description, Entry, Found, Remote
from assay.data.formats import read_idx
from assay.data.parquet import find_parquet

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
PREFIX = {"train": "train", "test": "t10k"}


def _read_idx_pair(files: tuple[Path, Path], progress: bool) -> Arrays:
    x, y = (read_idx(path) for path in files)
    return Arrays(x[:, None], y.astype(np.int64))


def find_idx(folder: Path, split: str) -> Found | None:
    """Look for the images and labels of `split` as IDX files, compressed or not."""
    files = []
    for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        stem = f"{PREFIX[split]}-{part}"
        present = [folder / name for name in (f"{stem}.gz", stem) if (folder / name).is_file()]
        if not present:
            return None
        files.append(present[0])
    images, labels = files
    read = partial(_read_idx_pair, (images, labels))
    return Found.at((images, labels), "IDX files", read)


def _find(folder: Path, split: str) -> Found | None:
    return find_idx(folder, split) or find_parquet(folder, split, channels=1)


def _debian_fashion(split: str) -> Found | None:
    found = find_idx(DEBIAN_FASHION, split)
    if found is None:
        return None
    return replace(found, place="IDX files of the Debian package dataset-fashion-mnist")


def _remotes(
    md5: dict[str, str], address: Callable[[str], tuple[str, ...]]
) -> dict[str, tuple[Remote, ...]]:
    return {
        split: tuple(
            Remote(name, digest, address(name))
            for name, digest in md5.items()
            if name.startswith(prefix)
        )
        for split, prefix in PREFIX.items()
    }


MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
FASHION_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}

ENTRIES = (
    Entry(
        Description(
            name="mnist",
            title="MNIST handwritten digits",
            shape=(1, 28, 28),
            classes=DIGITS,
            sizes={"train": 60000, "test": 10000},
            home="http://yann.lecun.com/exdb/mnist/",
            licence="CC BY-SA 3.0",
            reference="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-based learning applied "
            "to document recognition. Proceedings of the IEEE 86, 1998.",
        ),
        folders=("mnist", "MNIST/raw"),
        find=_find,
        remotes=_remotes(
            MNIST_MD5,
            lambda name: (
                f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}",
                f"https://storage.googleapis.com/cvdf-datasets/mnist/{name}",
            ),
        ),
    ),
    Entry(
        Description(
            name="fashion-mnist",
            title="Fashion-MNIST: Zalando's article images",
            shape=(1, 28, 28),
            classes=(
                "T-shirt/top",
                "trouser",
                "pullover",
                "dress",
                "coat",
                "sandal",
                "shirt",
                "sneaker",
                "bag",
                "ankle boot",
            ),
            sizes={"train": 60000, "test": 10000},
            home="https://github.com/zalandoresearch/fashion-mnist",
            licence="MIT",
            reference="H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST: a novel image dataset for "
            "benchmarking machine learning algorithms. 2017. https://arxiv.org/abs/1708.07747",
        ),
        folders=("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"),
        find=_find,
        packaged=_debian_fashion,
        remotes=_remotes(
            FASHION_MD5,
            lambda name: (
                f"https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/{name}",
                f"https://fashion-mnist.s3.eu-central-1.amazonaws.com/{name}",
            ),
        ),
        advice="the Debian package dataset-fashion-mnist",
    ),
)
