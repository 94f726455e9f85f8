import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.distributed import integer_aggregation as integers
from assay.kernels import natural


def powers(exponents, seed=0):
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, exponents.shape, generator=g) * 2.0 - 1
    return torch.ldexp(signs.double(), exponents)


@given(st.integers(1, 9), st.integers(0, 2**31), st.integers(-900, 900))
def test_same_as_the_float_path_bit_for_bit_when_exponents_are_near(workers, seed, top):
    g = torch.Generator().manual_seed(seed)
    bits = integers.fraction_bits(workers)
    exponents = top - torch.randint(0, bits + 1, (workers, 50), generator=g)
    exponents[0, 0] = top
    rows = powers(exponents, seed)
    rows[:, 3] = 0.0
    assert int(integers.largest_exponent(rows)) == top
    total = sum(integers.to_integers(row, top, workers) for row in rows)
    exact = integers.from_integers(total, top, workers, torch.float64)
    assert torch.equal(exact, rows.sum(0))
    rounded = integers.from_integers(total, top, workers, torch.float64, seed)
    assert torch.equal(rounded, natural.natural_round(rows.sum(0), seed))


def test_values_below_one_unit_stay_unbiased():
    workers, draws = 3, 100_000
    exponent = integers.fraction_bits(workers) - 3  # 1/8 of a unit when the largest is 2^0
    x = torch.full((draws,), -(2.0**-exponent) / 64, dtype=torch.float64)
    coded = integers.to_integers(x, 0, workers, torch.Generator().manual_seed(0))
    assert set(coded.unique().tolist()) == {-1, 0}
    chance = 2.0 ** (integers.fraction_bits(workers) - exponent) / 64
    assert chance == 1 / 8
    # Bernoulli mean within 5 standard errors.
    assert abs(-coded.double().mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / draws)


@given(st.integers(-(2**30), 2**30), st.integers(0, 2**52 - 1))
def test_integer_rounding_takes_one_of_the_two_neighbours(total, random):
    result = int(integers.integer_natural_round(torch.tensor([total]), torch.tensor([random])))
    if total == 0 or abs(total) & (abs(total) - 1) == 0:
        assert result == total
        return
    lower = 1 << (abs(total).bit_length() - 1)
    up = (abs(total) - lower) * 2**52 // lower + random >= 2**52
    # The remainder over `lower` has at most 30 bits, so the division above is exact.
    assert result == math.copysign(lower << up, total)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 1000])
def test_sum_of_the_largest_fits_32_bits(workers):
    unit = 2 ** integers.fraction_bits(workers)
    assert workers * unit <= 2**30
    if workers > 1:
        assert workers * unit > 2**29


def test_what_is_not_finite_and_all_zero_survive_the_maximum():
    assert integers.largest_exponent(torch.tensor([1.0, math.nan])) == integers.NOT_FINITE
    assert integers.largest_exponent(torch.tensor([-math.inf, 4.0])) == integers.NOT_FINITE
    zero = int(integers.largest_exponent(torch.zeros(3)))
    assert zero < -1074
    coded = integers.to_integers(torch.zeros(3), zero, 2)
    assert torch.equal(integers.from_integers(coded, zero, 2, torch.float32, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="workers must be at least 1"):
        integers.fraction_bits(0)
