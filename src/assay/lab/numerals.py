"""How measured figures are written for a reader: as many digits as they mean, and no more."""

import math
from decimal import Decimal

from assay.lab.paper import Expectation

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MINUS = "\N{MINUS SIGN}"
_GROUP = "\N{NARROW NO-BREAK SPACE}"
_MAX_DIGITS = 17  # what tells any two doubles apart
_MORE_DECIMALS = 6  # that tell a figure from its bound, before each is written by itself
_PLAIN_FROM, _PLAIN_BELOW = -4, 6  # powers of ten between which no exponent is written


def number(value: float | int, digits: int = 4) -> str:
    """A number with at most `digits` significant digits; digits before the point are kept.

    Args:
        value: any number, also infinite or NaN.
        digits: significant digits.

    Example:
        >>> number(0.123456), number(-3), number(3.2e-9), number(float("inf"))
        ('0.1235', '−3', '3.2×10⁻⁹', '∞')
    """
    if isinstance(value, int):
        return _signed(_grouped(f"{value}"))
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else f"{_MINUS}∞")
    exponent = _exponent(value, digits)
    shift = _shift(exponent)
    decimals = max(0, digits - 1 - exponent + shift)
    text = _fixed(value, shift, decimals)
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    if text in ("1", "-1") and shift:
        return _signed(text[:-1]) + _power(shift)[1:]
    return _signed(_grouped(text)) + _power(shift)


def percent(share: float, digits: int = 3) -> str:
    """A share in per cent, with at most `digits` significant digits.

    Args:
        share: 1 is the whole.
        digits: significant digits.

    Example:
        >>> percent(0.0447), percent(1.0), percent(0.98765, 2)
        ('4.47 %', '100 %', '99 %')
    """
    return f"{number(100.0 * share, digits)} %"


def estimate_and_interval(
    estimate: float, interval: tuple[float, float], expect: Expectation | None = None
) -> tuple[str, str, str]:
    """An estimate with its confidence interval, all to the interval's second digit.

    More digits are written where fewer would put a figure on the wrong side of its bound.

    Args:
        estimate: the figure.
        interval: its two ends.
        expect: the bound they are compared with.

    Returns:
        The estimate, the lower and the upper end as text.

    Example:
        >>> estimate_and_interval(0.0021234, (-0.00123, 0.00543))
        ('0.0021', '−0.0012', '0.0054')
    """
    values = (estimate, *interval)
    half = (interval[1] - interval[0]) / 2
    if all(map(math.isfinite, (*values, half))) and half > 0:
        shift = _shift(_exponent(max(values, key=abs)))
        enough = max(0, 1 - _exponent(half) + shift)
        for decimals in range(enough, enough + _MORE_DECIMALS):
            texts = [_fixed(v, shift, decimals) for v in values]
            pairs = zip(values, texts, strict=True)
            if all(_same_side(v, f"{text}e{shift}", expect) for v, text in pairs):
                middle, low, high = (_signed(text) + _power(shift) for text in texts)
                return middle, low, high
    middle, low, high = (number_beside(v, expect, digits=6) for v in values)
    return middle, low, high


def number_beside(value: float, expect: Expectation | None, digits: int = 4) -> str:
    """A number with enough digits to see on which side of its bound it lies.

    Args:
        value: the number.
        expect: the bound, or None.
        digits: significant digits to begin with.

    Example:
        >>> from assay.lab import at_most
        >>> number_beside(1.12500001, at_most(1.125)), number_beside(1.1234567, at_most(2))
        ('1.12500001', '1.123')
    """
    while digits < _MAX_DIGITS and not _same_side(value, f"{value:.{digits}g}", expect):
        digits += 1
    return number(value, digits)


def bound_text(expect: Expectation | None) -> str:
    """A claim's bound: `≤ a`, `≥ a`, `a ± b` for a narrow interval, `a to b`; `""` for none.

    Args:
        expect: the bound, or None.

    Example:
        >>> from assay.lab import at_least, between, close_to
        >>> bound_text(at_least(0.9)), bound_text(between(-1, 2)), bound_text(close_to(2, tol=1e-9))
        ('≥ 0.9', '−1 to 2', '2 ± 10⁻⁹')
    """
    if expect is None:
        return ""
    if expect.low == -math.inf:
        return f"≤ {number(expect.high, 12)}"
    if expect.high == math.inf:
        return f"≥ {number(expect.low, 12)}"
    centre, half = (expect.low + expect.high) / 2, (expect.high - expect.low) / 2
    if half == 0:
        return f"= {number(centre, 12)}"
    if half < 0.1 * abs(centre):
        return f"{number(centre, 9)} ± {number(half, 3)}"
    return f"{number(expect.low, 12)} to {number(expect.high, 12)}"


def duration(seconds: float | int) -> str:
    """A time span as a reader says it.

    Args:
        seconds: not negative.

    Example:
        >>> duration(4.23), duration(192), duration(7322)
        ('4.2 s', '3 min 12 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{number(float(seconds), 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _exponent(value: float, digits: int = _MAX_DIGITS) -> int:
    """The power of ten of the first digit, after rounding to `digits`."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _shift(exponent: int) -> int:
    """The power of ten to take out of a number of this order of magnitude."""
    return 0 if _PLAIN_FROM <= exponent < _PLAIN_BELOW else exponent


def _fixed(value: float, shift: int, decimals: int) -> str:
    """`value / 10**shift`, without the error and overflow of that division; zero has no sign."""
    text = f"{Decimal(value).scaleb(-shift):.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text


def _power(shift: int) -> str:
    return f"×10{str(shift).translate(_SUPERSCRIPTS)}" if shift else ""


def _grouped(text: str) -> str:
    """Five digits and more before the point in threes, with thin spaces."""
    whole, point, rest = text.partition(".")
    return (f"{int(whole):,}".replace(",", _GROUP) if len(whole) > 4 else whole) + point + rest


def _signed(text: str) -> str:
    return text.replace("-", _MINUS)


def _same_side(value: float, text: str, expect: Expectation | None) -> bool:
    return (
        expect is None
        or not math.isfinite(value)
        or expect.contains(float(text)) == expect.contains(value)
    )
