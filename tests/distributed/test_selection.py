import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.distributed import Cast, Compose, ErrorFeedback, SampledTopK, Threshold, TopK


def vector(kind, d, seed=0):
    x = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return {
        "Gaussian": x,
        "heavy tails": x**5,
        "equal": torch.ones(d),
        "few differ from zero": torch.where(x > 3.0, x, torch.zeros(d)),
        "one huge": torch.cat([x[:-1], torch.tensor([1e30])]),
        "sorted": x.sort().values,
        "two levels": torch.where(x > 3.1, 1e6, 1e-6),
        "periodic": torch.where(torch.arange(d) % 32 == 0, 10.0 + x, x),
    }[kind]


KINDS = ["Gaussian", "heavy tails", "equal", "one huge", "sorted", "two levels", "periodic"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.01])
def test_counts_stay_between_the_bounds_and_only_large_entries_are_sent(kind, density):
    d = 400_000
    x, g = vector(kind, d), torch.Generator().manual_seed(1)
    k = math.ceil(density * d)
    for _ in range(5):
        indices, values = SampledTopK(density, 0.001).compress(x, generator=g).tensors
        assert 0.8 * k <= len(indices) <= 1.3 * k
        assert len(indices.unique()) == len(indices)
        assert torch.equal(values, x[indices.long()])
        left = x.clone()
        left[indices.long()] = 0
        assert left.abs().max() <= values.abs().min()


def test_zeros_are_never_sent():
    few = vector("few differ from zero", 400_000)
    nonzero = int((few != 0).sum())
    for density, expected in ((0.01, nonzero), (0.0001, None)):
        indices, values = SampledTopK(density, 0.001).compress(few).tensors
        assert (values != 0).all()
        if expected is not None:
            assert len(indices) == expected
    for d in (0, 10, 400_000):
        assert SampledTopK(0.01).compress(torch.zeros(d)).nbytes == 0


@settings(deadline=None)
@given(st.integers(0, 3000), st.floats(0.001, 1.0), st.integers(0, 100))
def test_short_vectors_are_ranked_exactly(d, density, seed):
    x = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    sampled, exact = SampledTopK(density), TopK(density)
    left, right = (c.decompress(c.compress(x)) for c in (sampled, exact))
    assert torch.equal(left, right)


def test_nan_and_infinity_are_seen():
    x = vector("Gaussian", 400_000)
    x[7], x[9] = math.nan, -math.inf
    sampled = SampledTopK(0.001, 0.001)
    for seed in range(12):  # samples with and without these entries
        g = torch.Generator().manual_seed(seed)
        y = sampled.decompress(sampled.compress(x, generator=g))
        assert y[7].isnan()
        assert y[9] == -math.inf
    x[::3] = math.nan
    assert sampled.decompress(sampled.compress(x)).isnan().any()


def test_threshold_with_error_feedback_loses_nothing():
    g = torch.Generator().manual_seed(0)
    feedback = ErrorFeedback(Threshold(3.0))
    total, sent = torch.zeros(500, dtype=torch.float64), torch.zeros(500, dtype=torch.float64)
    counts = set()
    for _ in range(40):
        x = torch.randn(500, generator=g, dtype=torch.float64)
        payload = feedback.compress(x)
        counts.add(len(payload.tensors[0]))
        total, sent = total + x, sent + feedback.decompress(payload)
    assert len(counts) > 1
    torch.testing.assert_close(sent + feedback.error, total, rtol=0, atol=1e-12)
    assert feedback.error.abs().max() < 3.0


def test_cast_rounds_to_nearest_and_keeps_within_range():
    x = torch.tensor([1 / 3, 1e6, -1e6, math.inf, math.nan, 0.0])
    half = Cast(torch.float16)
    payload = half.compress(x)
    assert half.bits(payload) == 16 * 6
    y = half.decompress(payload)
    assert y.dtype == torch.float32
    assert y[:4].tolist() == [x[0].half().item(), 65504.0, -65504.0, math.inf]
    assert y[4].isnan()
    both = Compose(half, TopK(0.5))
    # Three indices of 32 bits and three values of 16.
    assert both.bits(both.compress(torch.randn(6))) == 3 * 48


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        SampledTopK(0.0)
    with pytest.raises(ValueError, match="sample_ratio must be"):
        SampledTopK(0.1, 2.0)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="threshold must be"):
            Threshold(bad)
    with pytest.raises(TypeError, match="dtype must be"):
        Cast(torch.int32)
