"""USPS: 9,298 digits from envelopes, 16x16 grey pixels, as HDF5 or libsvm files."""

from functools import partial
from pathlib import Path

from assay.data.embedded import DIGITS
from assay.data.entry import Arrays, Description, Entry, Found, Remote
from assay.data.formats import read_usps_hdf5, read_usps_libsvm

LIBSVM = {"train": "usps.bz2", "test": "usps.t.bz2"}
MD5 = {
    "train": "ec16c51db3855ca6c91edd34d0e9b197",
    "test": "8ea070ee2aca1ac39742fdd1ef5ed118",
}
HOME = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets"


def _read_hdf5(path: Path, split: str, progress: bool) -> Arrays:
    return read_usps_hdf5(path, split)


def _read_libsvm(path: Path, progress: bool) -> Arrays:
    return read_usps_libsvm(path)


def _find(folder: Path, split: str) -> Found | None:
    hdf5, libsvm = folder / "usps.h5", folder / LIBSVM[split]
    if hdf5.is_file():
        return Found.at((hdf5,), "HDF5 file", partial(_read_hdf5, hdf5, split))
    if libsvm.is_file():
        return Found.at((libsvm,), "libsvm file", partial(_read_libsvm, libsvm))
    return None


ENTRIES = (
    Entry(
        Description(
            name="usps",
            title="USPS handwritten digits from envelopes",
            shape=(1, 16, 16),
            classes=DIGITS,
            sizes={"train": 7291, "test": 2007},
            home=f"{HOME}/multiclass.html#usps",
            licence="not stated",
            reference="J. J. Hull. A database for handwritten text recognition research. "
            "IEEE Transactions on Pattern Analysis and Machine Intelligence 16, 1994.",
        ),
        folders=("usps",),
        find=_find,
        remotes={
            split: (Remote(file, MD5[split], (f"{HOME}/multiclass/{file}",)),)
            for split, file in LIBSVM.items()
        },
        scale=1.0,
    ),
)
