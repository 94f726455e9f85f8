"""File formats: what is written by their own rules is read back, damage is noticed."""

import bz2
import gzip
import sys

import numpy as np
import pytest

from assay.data import DataUnavailable
from assay.data.formats import (
    DAMAGED,
    read_cifar_binary,
    read_idx,
    read_image_parquet,
    read_tar_members,
    read_usps_hdf5,
    read_usps_libsvm,
)
from dataset_files import idx_bytes, make_tar, write_parquet

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (0, 28, 28)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_idx_round_trip(tmp_path, shape, pack):
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "array"
    path.write_bytes(pack(idx_bytes(array)))
    np.testing.assert_array_equal(read_idx(path), array)


good = idx_bytes(np.zeros((2, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"hello", good[:-1], good + b"!", gzip.compress(good, mtime=0)[:-9], good[:6]],
)
def test_damaged_idx_is_noticed(tmp_path, content):
    path = tmp_path / "array"
    path.write_bytes(content)
    with pytest.raises(DAMAGED):
        read_idx(path)


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar_records_are_labels_then_planes(labels):
    pixels = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    classes = RNG.integers(0, 10, (5, labels), dtype=np.uint8)
    records = [bytes(c) + p.tobytes() for c, p in zip(classes, pixels, strict=True)]
    arrays = read_cifar_binary([b"".join(records[:2]), b"".join(records[2:])], labels)
    np.testing.assert_array_equal(arrays.x, pixels)
    np.testing.assert_array_equal(arrays.y, classes[:, -1])


@pytest.mark.parametrize("content", [b"", bytes(3072)])
def test_incomplete_cifar_records_are_noticed(content):
    with pytest.raises(ValueError, match="records of 3073 bytes"):
        read_cifar_binary([content], 1)


def test_tar_members_come_in_the_order_asked_and_nothing_is_extracted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    make_tar(folder / "a.tar.gz", {"d/b.bin": b"B", "../../a.bin": b"A", "d/other": b"?"})
    assert read_tar_members(folder / "a.tar.gz", ["a.bin", "b.bin"]) == [b"A", b"B"]
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar.gz"]
    with pytest.raises(ValueError, match=r"lacks c\.bin"):
        read_tar_members(folder / "a.tar.gz", ["a.bin", "c.bin"])


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_parquet_is_lossless_over_shards(tmp_path, channels, columns):
    shape = (6, 8, 8) if channels == 1 else (6, 8, 8, 3)
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    write_parquet(paths[0], images[:4], [3, 1, 4, 1], columns)
    write_parquet(paths[1], images[4:], [5, 9], columns)
    arrays = read_image_parquet(paths, channels, False)
    planes = images[:, None] if channels == 1 else images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(arrays.x, planes)
    assert arrays.y.tolist() == [3, 1, 4, 1, 5, 9]
    assert arrays.note == ""


def test_jpeg_parquet_says_that_it_is_not_the_original(tmp_path):
    write_parquet(tmp_path / "a.parquet", np.full((2, 8, 8, 3), 90, np.uint8), [0, 1], kind="JPEG")
    arrays = read_image_parquet([tmp_path / "a.parquet"], 3, False)
    assert arrays.note == "images re-encoded as JPEG"
    assert abs(arrays.x.astype(int) - 90).max() <= 2


def test_damaged_parquet_is_noticed(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, np.zeros((2, 8, 8), np.uint8), [0, 1], columns=("picture", "label"))
    with pytest.raises(ValueError, match="no column image or img, only picture, label"):
        read_image_parquet([path], 1, False)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DAMAGED):
        read_image_parquet([path], 1, False)


def test_both_forms_of_usps_agree(tmp_path):
    import h5py

    x = RNG.random((4, 256), dtype=np.float32)
    x[1, 7] = 0.5  # zero in [-1, 1], which the sparse form leaves out
    y = np.array([0, 9, 3, 3])
    with h5py.File(tmp_path / "usps.h5", "w") as file:
        for split in ("train", "test"):
            file[f"{split}/data"], file[f"{split}/target"] = x, y
    lines = []
    for label, row in zip(y + 1, 2 * x.astype(np.float64) - 1, strict=True):
        cells = [f"{index}:{value!r}" for index, value in enumerate(row.tolist(), 1) if value]
        lines.append(f"{label} {' '.join(cells)}\n")
    (tmp_path / "usps.bz2").write_bytes(bz2.compress("".join(lines).encode()))
    hdf5, libsvm = (
        read_usps_hdf5(tmp_path / "usps.h5", "test"),
        read_usps_libsvm(tmp_path / "usps.bz2"),
    )
    assert hdf5.x.shape == libsvm.x.shape == (4, 1, 16, 16)
    np.testing.assert_array_equal(hdf5.y, libsvm.y)
    # Two roundings to float32 of numbers up to 2.
    np.testing.assert_allclose(libsvm.x, hdf5.x, rtol=0, atol=2 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("text", ["1 300:0.5\n", "x 1:0\n", "1 1\n"])
def test_damaged_libsvm_is_noticed(tmp_path, text):
    (tmp_path / "usps.bz2").write_bytes(bz2.compress(text.encode()))
    with pytest.raises(DAMAGED):
        read_usps_libsvm(tmp_path / "usps.bz2")


@pytest.mark.parametrize(
    ("module", "package", "read"),
    [
        ("pyarrow.parquet", "pyarrow", lambda path: read_image_parquet([path], 1, False)),
        ("h5py", "h5py", lambda path: read_usps_hdf5(path, "train")),
    ],
)
def test_missing_extra_gives_one_line(tmp_path, monkeypatch, module, package, read):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        DataUnavailable, match=rf'needs {package}.*pip install "assay\[data\]"'
    ) as e:
        read(tmp_path / "x")
    assert "\n" not in str(e.value)
