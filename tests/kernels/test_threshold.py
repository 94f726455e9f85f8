import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.kernels import threshold as kernels

LENGTHS = [0, 1, 255, 256, 257, 1000]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_compensation_is_the_plain_one_bit_for_bit(n, dtype, nesterov):
    g = torch.Generator().manual_seed(n)
    vectors = [torch.randn(n, generator=g, dtype=dtype) for _ in range(3)]
    ours, theirs = [v.clone() for v in vectors], [v.clone() for v in vectors]
    for _ in range(3):
        kernels.compensate_(*ours, momentum=0.9, nesterov=nesterov)
        kernels.compensate_reference_(*theirs, momentum=0.9, nesterov=nesterov)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@given(
    st.lists(st.floats(width=32), max_size=600),
    st.floats(min_value=0, max_value=2.0**100, width=32),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_selection_is_brute_force(values, threshold, dtype):
    x = torch.tensor(values, dtype=dtype)
    expected = [i for i, v in enumerate(values) if not abs(v) < threshold]
    assert kernels.select_at_least(x, threshold).tolist() == expected
    assert kernels.select_at_least_reference(x, threshold).tolist() == expected


def test_two_threads_find_the_same_in_the_same_order():
    x = torch.randn(3 * kernels._CHUNK + 7, generator=torch.Generator().manual_seed(0))
    u, v = torch.zeros_like(x), torch.zeros_like(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = kernels.select_at_least(x, 3.0)
        kernels.compensate_(u, v, x, 0.9)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, kernels.select_at_least_reference(x, 3.0))
    assert torch.equal(u, x)
    assert torch.equal(v, x)


def test_strided_and_half_precision_vectors_take_the_reference():
    x = torch.tensor([[1.0, -3.0], [5.0, 0.0], [-7.0, 2.0]])
    assert kernels.select_at_least(x[:, 0], 5.0).tolist() == [1, 2]
    assert kernels.select_at_least(x.view(-1).half(), 5.0).tolist() == [2, 4]


def test_autograd_notices_what_is_written():
    u, v = torch.ones(3), torch.ones(3)
    versions = u._version, v._version
    kernels.compensate_(u, v, torch.ones(3), 0.5)
    assert (u._version, v._version) > versions
