"""Numbers as people read them. Small values keep two significant digits instead of becoming 0."""

import math


def rate(value: float) -> str:
    """A rate such as samples per second: 12,345 or 0.0042; "-" where there is none (NaN)."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 9.5 or value == 0 else f"{value:.2g}"


def percent(share: float) -> str:
    """A share of 1 as a percentage: 12.9% or 0.0042%."""
    return f"{share:.1%}" if share >= 0.00995 or share == 0 else f"{100 * share:.2g}%"
