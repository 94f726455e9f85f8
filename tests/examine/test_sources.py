"""Data of any form: the right pairs, stratified exactly, and no more of it read than is used."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from assay import data as named
from assay.data import Batches
from assay.examine import Data
from assay.examine.sources import MAX_BYTES, MAX_STREAMED, as_data, as_pair, draw
from assay.lab import UsageError

X = torch.arange(1000, dtype=torch.float32)[:, None].expand(1000, 3).clone()
Y = torch.cat([torch.full((600,), 0), torch.full((300,), 1), torch.full((100,), 7)])
Y = Y[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]


class Pairs(Dataset):
    """Samples `(x, y)` that are counted when they are read."""

    def __init__(self, size=1000):
        self.size = size
        self.read = []

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        self.read.append(i)
        return X[i], int(Y[i])


class Labelled(Pairs):
    """The same with its labels in sight."""

    def __init__(self, size=1000):
        super().__init__(size)
        self.targets = Y[:size].tolist()


class Mappings(Pairs):
    """Samples as mappings, with the names that Hugging Face uses."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return {"pixel_values": x, "labels": y}


class Stream(IterableDataset):
    """Samples one after another; some of these have a length."""

    def __iter__(self):
        return iter((X[i], int(Y[i])) for i in range(len(X)))

    def __len__(self):
        return len(X)


def batches(size=50):
    return ((X[i : i + size], Y[i : i + size]) for i in range(0, 1000, size))


def listed(samples):
    return [torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])]


SOURCES = {
    "dataset": Pairs,
    "dataset with targets": Labelled,
    "tensor dataset": lambda: TensorDataset(X, Y),
    "our own": lambda: named.Dataset(X[:, :, None, None], Y, tuple("abcdefgh")),
    "tensors": lambda: (X, Y),
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "mappings": Mappings,
    "list": lambda: [(x, y) for x, y in zip(X, Y, strict=True)],
    "loader": lambda: DataLoader(Labelled(), 32, shuffle=True),
    "loader with collate": lambda: DataLoader(Pairs(), 32, collate_fn=listed),
    "loader of mappings": lambda: DataLoader(Mappings(), 32),
    "loader without batches": lambda: DataLoader(
        [(X[i : i + 50], Y[i : i + 50]) for i in range(0, 1000, 50)], batch_size=None
    ),
    "loader of a stream": lambda: DataLoader(Stream(), 32),
    "stream": Stream,
    "generator": batches,
    "batches": lambda: Batches(X, Y, 64, generator=torch.Generator().manual_seed(1)),
}
STREAMED = {"loader without batches", "loader of a stream", "stream", "generator", "batches"}
STRATIFIED = {"dataset with targets", "tensor dataset", "our own", "tensors", "arrays", "loader"}


@pytest.mark.parametrize("name", SOURCES)
def test_draws_pairs_that_belong_together(name):
    drawn = draw(SOURCES[name](), 40, seed=0)
    assert len(drawn.x) == len(drawn.y) == len(drawn.index) == 40
    places = drawn.x.flatten(1)[:, 0].long()  # X says which sample it is
    assert len(places.unique()) == 40
    assert torch.equal(drawn.y, Y[places])
    assert drawn.size == 1000
    if name not in STREAMED:
        assert torch.equal(drawn.index, places)
    if name in STRATIFIED:
        assert torch.bincount(drawn.y)[[0, 1, 7]].tolist() == [24, 12, 4]
        assert drawn.note == "40 of 1,000, stratified by class"
    else:
        assert drawn.note == f"40 of {'the ' if name in STREAMED else ''}1,000, at random"


@pytest.mark.parametrize("name", SOURCES)
def test_a_seed_gives_the_same_samples_and_another_others(name):
    torch.manual_seed(0)
    first, again, other = (draw(SOURCES[name](), 40, seed).x for seed in (3, 3, 4))
    if name != "batches":  # which shuffles by a generator of its own
        assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", SOURCES)
def test_takes_all_where_there_are_no_more(name):
    drawn = draw(SOURCES[name](), 5000, seed=0)
    places = drawn.x.flatten(1)[:, 0].long()
    assert torch.equal(places.sort().values, torch.arange(1000))
    assert torch.equal(drawn.y, Y[places])


def test_a_subset_keeps_labels_and_places_in_step():
    chosen = torch.arange(999, 199, -2).tolist()
    for dataset in (Labelled(), TensorDataset(X, Y), Pairs()):
        drawn = draw(Subset(Subset(dataset, chosen), range(100)), 20, seed=0)
        assert torch.equal(drawn.x[:, 0].long(), torch.tensor(chosen)[drawn.index])
        assert torch.equal(drawn.y, Y[drawn.x[:, 0].long()])
        assert drawn.size == 100
    counts = torch.bincount(Y[torch.tensor(chosen[:100])]) * 20 / 100
    drawn = draw(Subset(Subset(Labelled(), chosen), range(100)), 20, seed=0)
    assert (torch.bincount(drawn.y) - counts).abs().max() < 1


def test_a_loader_of_a_part_does_not_show_the_rest():
    train = range(0, 1000, 5)
    loader = DataLoader(Labelled(), 32, sampler=SubsetRandomSampler(train))
    drawn = draw(loader, 5000, seed=0)
    assert drawn.size == 200
    assert drawn.x[:, 0].long().tolist() == list(train)


@pytest.mark.parametrize("kind", [Pairs, Labelled])
def test_only_the_chosen_are_read(kind):
    dataset = kind()
    drawn = draw(dataset, 40, seed=0)
    assert set(dataset.read) <= {0, *drawn.index.tolist()}  # the first tells the size
    assert len(dataset.read) == 41


def test_an_endless_stream_is_left():
    passed = 0

    def endless():
        nonlocal passed
        while True:
            passed += 1
            yield X[:50], Y[:50]

    drawn = draw(endless(), 40, seed=0)
    assert passed == MAX_STREAMED + 1
    assert drawn.size is None
    assert drawn.note == f"40 of the first {50 * MAX_STREAMED:,}, at random"


def test_a_stream_is_chosen_from_evenly():
    """Every one of 100 is kept with probability 0.2: within 4.5 sigma over 400 draws."""
    stream = [(torch.arange(i, i + 10), torch.zeros(10)) for i in range(0, 100, 10)]
    kept = torch.zeros(100)
    for seed in range(400):
        kept[draw(iter(stream), 20, seed).x] += 1
    assert (kept - 80).abs().max() < 4.5 * (400 * 0.2 * 0.8) ** 0.5


def test_arrays_may_be_files(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    drawn = draw((x, Y.numpy()), 40, seed=0)
    assert torch.equal(drawn.x, X[drawn.index])


def test_big_inputs_are_fewer(monkeypatch):
    monkeypatch.setattr("assay.examine.sources.MAX_BYTES", 10 * X[0].nbytes)
    for name, source in SOURCES.items():
        assert len(draw(source(), 4096, seed=0).x) == 10, name


def test_a_hundred_thousand_images_are_not_loaded():
    """In a process with 10 GB of addresses; all of the images would be 60 GB."""
    script = """
        import resource
        import torch
        from torch import nn
        from assay.examine import Data
        from assay.examine.subject import prepare

        class Images(torch.utils.data.Dataset):
            targets = torch.arange(100_000) % 10
            read = 0
            def __len__(self):
                return 100_000
            def __getitem__(self, i):
                self.read += 1
                return torch.full((3, 224, 224), i / 1e5), int(self.targets[i])

        resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30, 10 * 2**30))
        model = nn.Sequential(nn.AvgPool2d(224), nn.Flatten(), nn.Linear(3, 10))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        train, test = Images(), Images()
        sample = prepare(model, Data(train, test))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        print(train.read, test.read, len(sample.train), sample.sizes["train"], grown)
        counts = sample.train.y.bincount()
        assert counts.max() - counts.min() <= 1
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train, test, kept, size, grown = map(float, done.stdout.split())
    affordable = MAX_BYTES // (3 * 224 * 224 * 4)
    assert (kept, size) == (affordable, 100_000)
    assert train == test == affordable + 1
    assert grown < 1.5  # GiB


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((X, Y[:5]), "x and y differ in length: 1000 and 5"),
        ((X[:0], Y[:0]), "the data is empty"),
        ([], "the data is empty"),
        (iter([]), "the data is empty"),
        (5, "a int is neither a dataset nor a loader"),
        ([X[0], X[1], X[2]], "must be a pair"),
        ([(X[0], 1, 2)] * 3, "must be a pair .* got 3 parts"),
        ([{"pixels": X[0], "label": 1}] * 3, "has the keys pixels, label; .* one of x, input"),
        ([(X[0], "cat")] * 3, "the target of a sample must be a tensor, got (tuple|list)"),
        ([(X[0], 0), (X[0, :2], 0), (X[0], 1)], "cannot be made into a batch: .* equal size"),
        (iter([(X[:2], Y[:2]), (X[:2, :2], Y[:2])]), "the samples differ in shape"),
        (iter([(X[:2], Y[:3])]), "a batch has 2 inputs and 3 targets"),
        ((np.array([["a", "b"]] * 3), np.zeros(3)), "the input of a sample must be a tensor"),
    ],
)
def test_what_is_no_data_is_told_in_one_line(source, message):
    with pytest.raises(UsageError, match=message) as error:
        draw(source, 4, seed=0)
    assert "\n" not in str(error.value)


def test_pictures_without_a_transform():
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
    with pytest.raises(UsageError, match="a dataset with a transform to tensors"):
        draw([(image, 0)] * 3, 4, seed=0)


def test_an_error_of_the_dataset_is_its_own():
    class Broken(Pairs):
        def __getitem__(self, i):
            raise OSError("no such picture")

    with pytest.raises(OSError, match="no such picture"):
        draw(Broken(), 4, seed=0)


# -- forms of train and test -------------------------------------------------------------------


def test_forms_of_train_and_test():
    one, other = TensorDataset(X, Y), TensorDataset(X[:5], Y[:5])
    given = Data(one, other, ["a"])
    assert as_data(given) is given
    assert as_data((one, other)) == as_data([one, other]) == Data(one, other)
    assert as_data({"train": one, "classes": ["a"]}) == Data(one, classes=["a"])
    assert as_data(one) == Data(one)
    pair = as_data((X, Y))  # two tensors are inputs and targets, not train and test
    assert pair.test is None
    assert pair.train[0] is X
    stream = batches()
    assert as_data(stream).train is stream
    train = as_data("digits").train
    assert (len(train), len(as_data("digits").classes)) == (len(train.y), 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nonsense", "no data set 'nonsense'; there are: .*digits"),
        ({"test": 1}, "has the keys train, and perhaps test.* got test"),
        ({"train": 1, "valid": 2}, "got train, valid"),
        ((1, 2, 3), "is \\(train, test\\), got 3 parts"),
        (5, "got int"),
    ],
)
def test_other_forms_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        as_data(given)


@pytest.mark.parametrize("x", ["x", "inputs", "pixel_values", "image", "img", "input_ids"])
@pytest.mark.parametrize("y", ["y", "label", "labels", "target"])
def test_names_of_inputs_and_targets(x, y):
    batch = default_collate([{x: X[i], y: int(Y[i]), "other": 1} for i in range(4)])
    found = as_pair(batch)
    assert torch.equal(found[0], X[:4])
    assert torch.equal(found[1], Y[:4])
