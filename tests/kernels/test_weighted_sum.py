import pytest
import torch

from assay.kernels.weighted_sum import weighted_sum, weighted_sum_reference


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 1001])
def test_it_is_the_sum(count, dtype, n):
    generator = torch.Generator().manual_seed(count)
    vectors = [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(count)]
    weights = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    vectors = [x.to(dtype) for x in vectors]
    kept = [x.clone() for x in vectors]
    wanted = torch.zeros(n, dtype=torch.float64)
    for x, weight in zip(vectors, weights, strict=True):
        wanted += weight * x.double()
    # Each product and each sum rounds once: count + 1 roundings of numbers below Σ |w x| ≤ 4 count.
    tolerance = 4 * count * (count + 1) * torch.finfo(dtype).eps
    for ours in (weighted_sum(vectors, weights), weighted_sum_reference(vectors, weights)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=tolerance)
    assert all(torch.equal(x, y) for x, y in zip(vectors, kept, strict=True))


def test_what_is_not_contiguous_and_what_is_not_finite():
    x = torch.arange(12.0).view(4, 3)[:, 1]
    assert not x.is_contiguous()
    assert torch.equal(weighted_sum([x, x, x], [0.5, 0.25, 0.25]), x)
    odd = torch.tensor([torch.inf, torch.nan, 1.0])
    total = weighted_sum([odd, torch.zeros(3)], [1.0, 1.0])
    assert total.isinf().tolist() == [True, False, False]
    assert total.isnan().tolist() == [False, True, False]
