"""Batches cover the data once a pass, and their generator decides everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.data import Batches


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n):
    return torch.arange(3.0 * n).view(n, 3), torch.arange(n)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 40), size=st.integers(1, 12), shuffle=st.booleans())
def test_a_pass_visits_every_example_once_and_keeps_pairs(n, size, shuffle):
    x, y = data(n)
    batches = Batches(x, y, size, shuffle=shuffle, generator=seeded())
    passed = list(batches)
    assert len(passed) == len(batches) == -(-n // size)
    assert batches.num_samples == n
    assert all(len(a) == len(b) == size for a, b in passed[:-1])
    targets = torch.cat([b for _, b in passed]) if passed else y
    assert torch.equal(targets.sort().values, y)
    assert all(torch.equal(a, x[b]) for a, b in passed)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 12))
def test_drop_last_leaves_only_full_batches(n, size):
    if n < size:
        with pytest.raises(ValueError, match=f"batch_size is {size} .* {n} examples"):
            Batches(*data(n), size, drop_last=True)
        return
    batches = Batches(*data(n), size, drop_last=True)
    assert [len(b) for _, b in batches] == [size] * (n // size)
    assert (len(batches), batches.num_samples) == (n // size, n // size * size)


def test_without_shuffle_the_order_is_kept_and_the_generator_untouched():
    generator = seeded()
    before = generator.get_state()
    batches = Batches(*data(10), 4, shuffle=False, generator=generator)
    for _ in range(2):
        assert torch.cat([b for _, b in batches]).tolist() == list(range(10))
    assert torch.equal(generator.get_state(), before)


def orders(batches, passes):
    return [torch.cat([b for _, b in batches]).tolist() for _ in range(passes)]


def test_each_pass_has_a_new_order_that_the_seed_decides():
    first = orders(Batches(*data(50), 8, generator=seeded(1)), 3)
    assert first == orders(Batches(*data(50), 8, generator=seeded(1)), 3)
    assert first != orders(Batches(*data(50), 8, generator=seeded(2)), 3)
    assert len({tuple(order) for order in first}) == 3


def test_saved_generator_state_resumes_with_the_same_batches():
    def noise(x, generator):
        return x + torch.rand(x.shape, generator=generator)

    batches = Batches(*data(20), 6, generator=seeded(3), transform=noise)
    list(batches)
    state = batches.generator.get_state()
    rest = [x for _ in range(2) for x, _ in batches]
    resumed = Batches(*data(20), 6, generator=seeded(99), transform=noise)
    resumed.generator.set_state(state)
    again = [x for _ in range(2) for x, _ in resumed]
    assert all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))


def test_own_generator_follows_the_global_seed():
    torch.manual_seed(5)
    first = orders(Batches(*data(30), 7), 2)
    torch.manual_seed(5)
    assert orders(Batches(*data(30), 7), 2) == first


@pytest.mark.parametrize("shuffle", [False, True])
def test_changing_a_batch_does_not_change_the_data(shuffle):
    x, y = data(9)
    for a, b in Batches(x, y, 4, shuffle=shuffle, generator=seeded()):
        a.zero_()
        b.zero_()
    assert torch.equal(x, data(9)[0])
    assert torch.equal(y, data(9)[1])


def test_batches_go_to_the_device():
    for x, y in Batches(*data(4), 2, device="meta"):
        assert x.device.type == y.device.type == "meta"


def test_non_contiguous_inputs_and_other_targets():
    x = torch.randn(4, 6).T
    y = torch.randn(6, 2)
    for a, b in Batches(x, y, 4, generator=seeded()):
        rows = [(x == row).all(1).nonzero().item() for row in a]
        assert torch.equal(b, y[rows])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(torch.zeros(3, 2), torch.zeros(4), 2), r"\(3, 2\) and \(4,\)"),
        (lambda: Batches(torch.zeros(3, 2), torch.tensor(1.0), 2), "first dimension"),
        (lambda: Batches(*data(3), 0), "batch_size .* 0"),
        (lambda: Batches(*data(3), True), "batch_size .* True"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
