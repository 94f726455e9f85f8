"""The data set container and stratified choices."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.data import Dataset, stratified
from assay.data.dataset import rank_in_class

labels = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(torch.tensor)


@settings(max_examples=150, deadline=None)
@given(y=labels, fraction=st.floats(0.01, 1), seed=st.integers(0, 5))
def test_stratified_shares_are_off_by_less_than_one(y, fraction, seed):
    n = max(1, int(fraction * len(y)))
    index = stratified(y, n, seed)
    assert len(index.unique()) == len(index) == n
    assert torch.equal(index, stratified(y, n, seed))
    counts, chosen = torch.bincount(y), torch.bincount(y[index], minlength=int(y.max()) + 1)
    # |chosen - n counts / N| < 1, in integers.
    assert ((chosen * len(y) - n * counts).abs() < len(y)).all()


@settings(max_examples=80, deadline=None)
@given(y=labels)
def test_rank_counts_equal_labels_before(y):
    expected = [(y[:i] == y[i]).sum().item() for i in range(len(y))]
    assert rank_in_class(y).tolist() == expected


def test_seeds_choose_differently_and_order_is_mixed():
    y = torch.arange(10).repeat_interleave(50)
    first, second = stratified(y, 100, 0), stratified(y, 100, 1)
    assert set(first.tolist()) != set(second.tolist())
    # A sorted result would make unshuffled batches of single classes.
    assert not torch.equal(y[first], y[first].sort().values)


@pytest.mark.parametrize("n", [0, -1, 6, True])
def test_impossible_sizes_are_refused(n):
    with pytest.raises(ValueError, match=f"n must be from 1 to .* 5, got {n}"):
        stratified(torch.zeros(5, dtype=torch.int64), n)


@pytest.fixture
def data():
    y = torch.arange(4).repeat(5)
    return Dataset(torch.rand(20, 3), y, tuple("abcd"), "toy", "train", "made here", "00")


def test_subset_says_what_it_is_and_owns_its_tensors(data):
    subset = data.subset(8, seed=3)
    assert torch.bincount(subset.y).tolist() == [2, 2, 2, 2]
    assert subset.source == "made here; 8 of 20 examples, stratified, seed 3"
    assert (subset.name, subset.classes, subset.checksum) == ("toy", data.classes, "00")
    before = data.x.clone()
    subset.x.zero_()
    assert torch.equal(data.x, before)


def test_it_is_a_map_style_dataset(data):
    loader = torch.utils.data.DataLoader(data, batch_size=20)
    x, y = next(iter(loader))
    assert torch.equal(x, data.x)
    assert torch.equal(y, data.y)
    assert repr(data) == "Dataset(toy train, 20x3, 4 classes)"


def test_copies_keep_everything(data):
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert torch.equal(twin.x, data.x)
        assert twin.source == data.source


def test_it_is_frozen(data):
    with pytest.raises(AttributeError):
        data.x = torch.zeros(20, 3)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), r"\(3, 2\) and \(2,\)"),
        (torch.zeros(2, 2), torch.zeros(2), "dtype torch.int64, got torch.float32"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"\[0, 1\] .* from 0 to 2"),
        (torch.zeros(2, 2), torch.tensor([-1, 1]), "from -1 to 1"),
    ],
)
def test_bad_tensors_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        Dataset(x, y, ("no", "yes"))
