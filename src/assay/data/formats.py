"""Readers of the file formats data sets come in; nothing here is ever unpickled."""

import bz2
import gzip
import importlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from assay.data.entry import Arrays, DataUnavailable

# What reading a damaged file of these formats may raise.
DAMAGED = (OSError, EOFError, ValueError, KeyError, IndexError, zlib.error, tarfile.TarError)


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in LeCun's IDX format, plain or gzip-compressed."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError("it does not start as an IDX file of bytes does")
    end = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:end], dtype=">u4").astype(int).tolist())
    if len(content) - end != int(np.prod(shape)):
        raise ValueError(f"shape {shape} does not fit its {len(content) - end} bytes")
    return np.frombuffer(content, dtype=np.uint8, offset=end).reshape(shape)


def read_cifar_binary(chunks: Sequence[bytes], labels: int) -> Arrays:
    """Read CIFAR's binary version: records of `labels` label bytes and 3x32x32 pixel bytes.

    The last label byte is the class (CIFAR-100 puts the super-class before it).
    """
    size = labels + 3 * 32 * 32
    content = b"".join(chunks)
    if not content or len(content) % size:
        raise ValueError(f"{len(content)} bytes are not a whole number of records of {size} bytes")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    x = np.ascontiguousarray(records[:, labels:]).reshape(-1, 3, 32, 32)
    return Arrays(x, records[:, labels - 1].astype(np.int64))


def read_tar_members(path: Path, names: Sequence[str]) -> list[bytes]:
    """Read files of a tar archive into memory by their base names; nothing is extracted."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            base = member.name.rsplit("/", 1)[-1]
            if base in names and member.isfile():
                stream = archive.extractfile(member)
                found[base] = stream.read() if stream is not None else b""
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"the archive lacks {', '.join(missing)}")
    return [found[name] for name in names]


def read_image_parquet(paths: Sequence[Path], channels: int, progress: bool) -> Arrays:
    """Read Hugging Face image Parquet: a struct column of encoded bytes, and a label column."""
    parquet = require("pyarrow.parquet", "reading Parquet files")
    images: list[bytes] = []
    labels: list[int] = []
    for path in paths:
        columns = parquet.ParquetFile(path).schema_arrow.names
        image = _first(columns, ("image", "img"), path)
        label = _first(columns, ("label", "fine_label"), path)
        table = parquet.read_table(path, columns=[image, label])
        images += [cell["bytes"] for cell in table[image].to_pylist()]
        labels += table[label].to_pylist()
    x = decode_images(images, channels, progress)
    note = "images re-encoded as JPEG" if images[0][:2] == b"\xff\xd8" else ""
    return Arrays(x, np.asarray(labels, dtype=np.int64), note)


def decode_images(images: Sequence[bytes], channels: int, progress: bool) -> np.ndarray:
    """Decode PNG or JPEG images of one size to uint8, `(N, C, H, W)`."""
    from assay.data.progress import track

    pillow = require("PIL.Image", "decoding images")
    mode = "L" if channels == 1 else "RGB"
    decoded = [
        np.asarray(pillow.open(io.BytesIO(image)).convert(mode))
        for image in track(images, "decoding images (once on this machine)", progress)
    ]
    stacked = np.stack(decoded)
    return stacked[:, None] if channels == 1 else stacked.transpose(0, 3, 1, 2)


def read_usps_hdf5(path: Path, split: str) -> Arrays:
    """Read the HDF5 form of USPS: groups `train`/`test` with `data` in [0, 1] and `target`."""
    h5py = require("h5py", "reading HDF5 files")
    with h5py.File(path, "r") as file:
        x = np.asarray(file[split]["data"], dtype=np.float32)
        y = np.asarray(file[split]["target"], dtype=np.int64)
    return Arrays(x.reshape(-1, 1, 16, 16), y)


def read_usps_libsvm(path: Path) -> Arrays:
    """Read the libsvm form of USPS: `label index:value ...`, labels 1-10, values in [-1, 1]."""
    lines = bz2.decompress(path.read_bytes()).decode("ascii").splitlines()
    rows = [line.split() for line in lines if line.strip()]
    y = np.asarray([int(float(row[0])) - 1 for row in rows], dtype=np.int64)
    x = np.zeros((len(rows), 256), dtype=np.float32)
    for target, row in zip(x, rows, strict=True):
        pairs = [cell.split(":") for cell in row[1:]]
        target[[int(index) - 1 for index, _ in pairs]] = [float(value) for _, value in pairs]
    return Arrays(((x + 1) / 2).reshape(-1, 1, 16, 16), y)


def require(module: str, purpose: str) -> ModuleType | Any:
    """Import an optional dependency, or say in one line how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module.split(".")[0], module.split(".")[0])
        raise DataUnavailable(
            f'{purpose} needs {package}, which is not installed: pip install "assay[data]"'
        ) from error


def _first(columns: Sequence[str], wanted: Sequence[str], path: Path) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise ValueError(f"{path.name} has no column {' or '.join(wanted)}, only {', '.join(columns)}")
