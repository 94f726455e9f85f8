"""The pieces that rules are made of, against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.curvature.uses import OuterSum, patches

SMALL = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=100, deadline=None)
@given(kernel=SMALL, stride=SMALL, dilation=SMALL, padding=SMALL, transposed=st.booleans())
def test_patches_are_those_that_unfold_finds(kernel, stride, dilation, padding, transposed):
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    if transposed:
        images = images.transpose(2, 3)
    padding = tuple(p - 1 for p in padding)
    expected = F.unfold(images, kernel, dilation, padding, stride)
    assert torch.equal(patches(images, kernel, stride, padding, dilation), expected)


def test_patches_of_sequences():
    x = torch.arange(5.0).view(1, 1, 5)
    found = patches(x, (2,), (1,), (1,), (2,))  # of 0 0 1 2 3 4 0: pairs with one in between
    assert found.tolist() == [[[0.0, 0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 0.0]]]


@pytest.mark.parametrize("positions", [1, 7, 600])
@pytest.mark.parametrize("features", [5, 300])
@pytest.mark.parametrize("groups", [1, 2])
def test_sum_of_outer_products(features, positions, groups):
    torch.manual_seed(0)
    x = torch.randn(75, groups, features, positions, dtype=torch.float64)
    total = OuterSum(0.5)
    for some in x.split(40):
        total.add(some)
    expected = 0.5 * torch.einsum("ngit,ngjt->gij", x, x)
    torch.testing.assert_close(total.finish(), expected)
