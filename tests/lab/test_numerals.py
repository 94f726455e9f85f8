import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.lab import at_least, at_most, between, close_to
from assay.lab.numerals import (
    bound_text,
    duration,
    estimate_and_interval,
    number,
    number_beside,
)

_PLAIN = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789", "\N{NARROW NO-BREAK SPACE}")


def parse(text: str) -> float:
    text = re.sub(r"^(−?)10(?=[⁻⁰¹²³⁴⁵⁶⁷⁸⁹])", r"\g<1>1×10", text)
    mantissa, _, power = text.translate(_PLAIN).partition("×10")
    return float(f"{mantissa}e{power or 0}")


@given(st.floats(-1e308, 1e308), st.integers(1, 15))
def test_a_number_is_off_by_at_most_half_of_its_last_digit(value, digits):
    written = parse(number(value, digits))
    assert written == pytest.approx(value, rel=0.5001 * 10.0 ** (1 - digits), abs=5e-324)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1"),
        (123456.7, "123\u202f457"),
        (9.99996e-5, "0.0001"),
        (1e-9, "10⁻⁹"),
        (-2.5e7, "−2.5×10⁷"),
        (12, "12"),
        (-1234567, "−1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_are_written_as_a_reader_expects(value, text):
    assert number(value) == text


def test_an_interval_shows_two_digits_of_its_half_width():
    assert estimate_and_interval(0.95623, (0.95121, 0.96124)) == ("0.9562", "0.9512", "0.9612")
    assert estimate_and_interval(1234.5, (1100.0, 1369.0)) == ("1234", "1100", "1369")
    assert estimate_and_interval(3.1e-7, (2.9e-7, 3.3e-7)) == (
        "3.10×10⁻⁷", "2.90×10⁻⁷", "3.30×10⁻⁷",
    )  # fmt: skip


finite = st.floats(-1e12, 1e12)


@given(finite, finite, finite)
def test_rounding_never_moves_a_figure_across_its_bound(estimate, width, bound):
    ends = (estimate - abs(width), estimate + abs(width))
    expect = at_most(bound)
    texts = estimate_and_interval(estimate, ends, expect)
    for value, text in zip((estimate, *ends), texts, strict=True):
        assert expect.contains(parse(text)) == expect.contains(value)


@given(finite, finite)
def test_a_single_number_stays_on_its_side_too(value, bound):
    expect = at_least(bound)
    assert expect.contains(parse(number_beside(value, expect))) == expect.contains(value)


def test_an_interval_that_is_not_finite_is_written_out():
    assert estimate_and_interval(math.inf, (1.0, math.inf)) == ("∞", "1", "∞")
    assert estimate_and_interval(math.nan, (math.nan, math.nan))[0] == "NaN"


def test_bounds():
    assert bound_text(None) == ""
    assert bound_text(at_most(1.125)) == "≤ 1.125"
    assert bound_text(between(0.5, 0.5)) == "= 0.5"
    assert bound_text(close_to(1.125, tol=1e-9)) == "1.125 ± 10⁻⁹"
    assert bound_text(between(-0.01, 0.01)) == "−0.01 to 0.01"


def test_durations():
    assert duration(0.0314) == "0.031 s"
    assert duration(59) == "59 s"
    assert duration(3599.7) == "1 h 0 min"
