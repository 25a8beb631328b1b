"""Format numbers with two decimals, or with as many as their interval justifies."""

from __future__ import annotations

from math import floor, log10

DIGITS = 2  # decimals
_ROUNDING = 1e-6  # smaller distances between a mean and its ends are rounding


def half_width(mean: float, low: float, high: float) -> float:
    """Return the longer side of an interval, because the other side may end at the bound of the scale."""
    return max(mean - low, high - mean)


def decimals(mean: float, low: float, high: float) -> int:
    """Return the number of decimals: the usual one, or as many as show two digits of a small half width."""
    half = half_width(mean, low, high)
    return DIGITS if half >= 10**-DIGITS or half < _ROUNDING else 1 - floor(log10(half))


def plus_minus(mean: float, low: float, high: float, is_signed: bool = True) -> str:
    """Return `mean ± half width`, with the signed mean or its absolute value."""
    after = decimals(mean, low, high)
    text = f"{mean:+.{after}f}" if is_signed else f"{abs(mean):.{after}f}"
    return f"{text} ± {half_width(mean, low, high):.{after}f}"


def number_text(value: float, after: int = DIGITS) -> str:
    """Format a number with a true minus sign, and none before zero."""
    return f"{value:z.{after}f}".replace("-", "−")


def signed_text(value: float, after: int = DIGITS) -> str:
    """Format a number with a plus or minus sign; zero has no sign."""
    text = f"{value:+z.{after}f}"
    return (text if float(text) else text[1:]).replace("-", "−")


def mean_and_interval(mean: float, low: float, high: float) -> tuple[str, str]:
    """Format a mean and its interval for tables: with a dash between the ends, unless one of them has a minus sign."""
    after = decimals(mean, low, high)
    ends = f"{low:.{after}f}–{high:.{after}f}" if low >= 0 else f"{low:z.{after}f} to {high:z.{after}f}"
    return f"{mean:z.{after}f}", ends
