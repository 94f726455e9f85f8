"""Data sets by name, each from its real source, and fast batches of them.

`load("mnist5k")` works on every machine without a network. Larger sets are looked for in the
folder `ASSAY_DATA`, the platform's cache, installed packages, and last at their own home.
"""

from assay.data.augment import random_crop_flip
from assay.data.batches import Batches
from assay.data.catalogue import available, describe, load, names
from assay.data.dataset import Dataset, stratified
from assay.data.entry import DataUnavailable, Description
from assay.data.image_folder import ImageFolder, ImageNet

__all__ = [
    "load",
    "names",
    "describe",
    "available",
    "Dataset",
    "Description",
    "DataUnavailable",
    "Batches",
    "ImageFolder",
    "ImageNet",
    "random_crop_flip",
    "stratified",
]
