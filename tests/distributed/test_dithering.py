import math

import pytest
import torch

from assay.distributed import NaturalCompressor, NaturalDithering, RandomDithering

KINDS = [NaturalDithering, RandomDithering]


def vectors(d):
    g = torch.Generator().manual_seed(0)
    one_hot = torch.zeros(d, dtype=torch.float64)
    one_hot[d // 2] = -3.0
    ranks = torch.arange(1, d + 1, dtype=torch.float64)
    return {
        "gaussian": torch.randn(d, generator=g, dtype=torch.float64),
        "one-hot": one_hot,
        "power law": ranks**-1.5,
    }


def through(dithering, x, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dithering.decompress(dithering.compress(x, generator=g))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("levels", [1, 4, 8])
def test_variance_stays_below_omega(kind, p, levels):
    dithering = kind(levels, p)
    for x in vectors(1000).values():
        assert dithering.variance(x) <= dithering.omega(1000)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_variance_is_the_measured_one(kind):
    x = vectors(200)["gaussian"]
    dithering, draws = kind(3), 400
    g = torch.Generator().manual_seed(1)
    errors = torch.stack(
        [
            (dithering.decompress(dithering.compress(x, generator=g)) - x).square().sum()
            for _ in range(draws)
        ]
    )
    measured = errors / x.square().sum()
    assert abs(measured.mean() - dithering.variance(x)) < 5 * measured.std() / math.sqrt(draws)


def test_natural_levels_with_the_worst_vector_are_exponentially_better():
    # All entries equal: |x_i| / norm = d^(-1/2) is in the lowest interval of both.
    d, s = 10_000, 7
    x = torch.ones(d, dtype=torch.float64)
    natural, same_count = NaturalDithering(s), RandomDithering(s)
    same_scale = RandomDithering(2 ** (s - 1))
    # Entries y in [0, step]: variance is d · y (step − y) = √d · step − 1.
    for dithering, step in (
        (natural, 2.0 ** (1 - s)),
        (same_count, 1 / s),
        (same_scale, 2.0 ** (1 - s)),
    ):
        assert dithering.variance(x) == pytest.approx(math.sqrt(d) * step - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_values_on_levels_are_exact(kind):
    dithering = kind(4, p=math.inf)
    grid = dithering.grid(torch.float64, torch.device("cpu"))
    x = 3.0 * torch.cat([grid, -grid])
    assert torch.equal(through(dithering, x), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_overflow_is_seen_at_the_receiver(kind, bad):
    assert not through(kind(4), torch.tensor([1.0, bad, 0.0])).isfinite().any()


@pytest.mark.parametrize("scale", [1e-40, 1e30])
def test_norm_neither_overflows_nor_vanishes(scale):
    x = torch.tensor([3.0, -4.0]) * scale
    y = through(NaturalDithering(8), x)
    # Adjacent levels differ by a factor of two.
    assert ((y / x >= 0.5) & (y / x <= 2)).all()


def test_message_holds_norm_signs_and_levels():
    d = 10_000
    for dithering, bits in ((NaturalDithering(7), 3), (RandomDithering(64), 7)):
        payload = dithering.compress(torch.randn(d))
        assert dithering.bits(payload) == 32 + d * (1 + bits)
    norm9 = NaturalDithering(7, norm_compressor=NaturalCompressor())
    assert norm9.bits(norm9.compress(torch.randn(d))) == 16 + d * 4
    assert norm9.omega(d) == pytest.approx(9 / 8 * (1 + NaturalDithering(7).omega(d)) - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_settings_are_refused(kind):
    for levels in (0, -1):
        with pytest.raises(ValueError, match="levels must be an integer of at least 1"):
            kind(levels)
    with pytest.raises(ValueError, match="p must be"):
        kind(2, p=0.5)
