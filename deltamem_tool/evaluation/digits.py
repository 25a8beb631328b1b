"""Numbers as texts."""

from __future__ import annotations

from deltamem_tool.evaluation.statistics import FEWEST

_SMALLEST_P = 0.001


def figure(value: float) -> str:
    """Two digits after the point, with a true minus."""
    text = f"{value:.2f}"
    return ("0.00" if text == "-0.00" else text).replace("-", "−")


def signed(value: float) -> str:
    text = f"{value:+.2f}"
    return ("0.00" if text in ("-0.00", "+0.00") else text).replace("-", "−")


def p_value(value: float | None, histories: int | None) -> str:
    """Of a difference; where too few histories were tested, or none were paired, a dash."""
    if value is None or histories is None or histories < FEWEST:
        return "–"
    return f"< {_SMALLEST_P}" if value < _SMALLEST_P else f"{value:.3f}"
