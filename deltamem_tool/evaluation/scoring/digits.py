"""Format numbers with two decimals, or with as many as their interval justifies."""

from __future__ import annotations

from math import floor, log10

DIGITS = 2  # after the point
_ROUNDING = 1e-6  # less than this between a mean and its ends is rounding, or nothing


def half_width(mean: float, low: float, high: float) -> float:
    """The longer side of an interval: the other may end where the scale does."""
    return max(mean - low, high - mean)


def decimals(mean: float, low: float, high: float) -> int:
    """After the point: the usual, unless the half width is below the last of them; then two digits of it are shown."""
    half = half_width(mean, low, high)
    return DIGITS if half >= 10**-DIGITS or half < _ROUNDING else 1 - floor(log10(half))


def plus_minus(mean: float, low: float, high: float, is_signed: bool = True) -> str:
    """`mean ± half width`; the mean with its sign, or its size alone."""
    after = decimals(mean, low, high)
    text = f"{mean:+.{after}f}" if is_signed else f"{abs(mean):.{after}f}"
    return f"{text} ± {half_width(mean, low, high):.{after}f}"


def number_text(value: float, after: int = DIGITS) -> str:
    """With a true minus, and none before zero."""
    return f"{value:z.{after}f}".replace("-", "−")


def signed_text(value: float, after: int = DIGITS) -> str:
    """The same with a plus; zero has no sign."""
    text = f"{value:+z.{after}f}"
    return (text if float(text) else text[1:]).replace("-", "−")


def mean_and_interval(mean: float, low: float, high: float) -> tuple[str, str]:
    """As tables in a terminal and in the model card have them: a dash in the interval, but not beside a minus."""
    after = decimals(mean, low, high)
    ends = f"{low:.{after}f}–{high:.{after}f}" if low >= 0 else f"{low:z.{after}f} to {high:z.{after}f}"
    return f"{mean:z.{after}f}", ends
