import pytest
import torch

from assay.kernels.variance import variance, variance_reference

SHARE = 1 / 64


@pytest.mark.parametrize("compute", [variance, variance_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 67)])
def test_it_is_the_difference_of_the_moments(compute, dtype, shape):
    torch.manual_seed(0)
    samples = torch.randn(9, *shape, dtype=torch.float64)
    second, mean = samples.square().mean(0).to(dtype), samples.mean(0).to(dtype)
    out = torch.empty_like(second)
    found, kept = compute(second, mean, SHARE, out)
    assert found is out
    assert kept
    wanted = samples.var(0, correction=0).to(dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=16 * torch.finfo(dtype).eps)
    again, _ = compute(second, mean, SHARE)
    assert torch.equal(again, found)


@pytest.mark.parametrize("compute", [variance, variance_reference])
def test_nothing_loses_nothing(compute):
    found, kept = compute(torch.empty(0, 3), torch.empty(0, 3), SHARE)
    assert found.shape == (0, 3)
    assert kept


@pytest.mark.parametrize("compute", [variance, variance_reference])
@pytest.mark.parametrize(
    ("second", "mean", "kept"),
    [
        (1.0, 0.5, True),
        (0.0, 0.0, True),  # all gradients are zero: nothing was lost
        (1.0, 1.0, False),
        (1.0, 0.999, False),
        (torch.inf, 1e30, False),  # overflow
        (torch.nan, 0.0, False),
    ],
)
def test_it_says_where_too_little_is_left(compute, second, mean, kept):
    moments = torch.ones(5), torch.zeros(5)
    moments[0][3], moments[1][3] = second, mean
    assert compute(*moments, SHARE)[1] is kept


def test_what_the_kernel_does_not_know_is_left_to_torch():
    second, mean = torch.rand(6, 4).mT + 1, torch.rand(4, 6)
    wanted = second - mean.square()
    torch.testing.assert_close(variance(second, mean, SHARE)[0], wanted)
    low, kept = variance(second.bfloat16(), mean.bfloat16(), SHARE)
    assert low.dtype == torch.bfloat16
    assert kept


def test_tensors_without_memory_are_left_to_torch():
    class Own(torch.Tensor):
        pass

    second, mean = torch.rand(5) + 1, torch.rand(5)
    found, kept = variance(second.as_subclass(Own), mean.as_subclass(Own), SHARE)
    assert type(found) is Own
    assert kept
