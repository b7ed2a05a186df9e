"""Numbers as a reader wants them: three significant digits, one precision for a value and its interval."""

from __future__ import annotations

import math

from distillens.core.result import Estimate
from distillens.report.summary import TestedClaim

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """A lone number: ``0.02``, ``1,234``, ``−0.5``."""
    return _fixed(value, *_precision(abs(value)), trim=True)


def signed(value: float) -> str:
    """A difference of shares: ``+0.021``, ``−0.500``."""
    return f"{value:+.3f}".replace("-", "−")


def value_text(estimate: Estimate) -> str:
    """The value alone: ``0.883``."""
    return _fixed(estimate.value, *_precision(_scale(estimate)))


def interval_text(estimate: Estimate) -> str:
    """The interval: ``[0.861, 0.905]``, or that there is none."""
    if math.isinf(estimate.low) and math.isinf(estimate.high):
        return f"no interval (n = {estimate.n})"
    decimals, exponent = _precision(_scale(estimate))
    low, high = (_fixed(end, decimals, exponent, power=False) for end in (estimate.low, estimate.high))
    return f"[{low}, {high}]{_power(exponent)}{level_text(estimate)}"


def estimate_text(estimate: Estimate) -> str:
    """Value and interval: ``0.883 [0.861, 0.905]``."""
    return f"{value_text(estimate)} {interval_text(estimate)}"


def level_text(estimate: Estimate) -> str:
    """The level where it is not the usual 95 %."""
    return "" if math.isclose(estimate.level, 0.95) else f" at {100 * estimate.level:g} %"


def ipc_text(ipc: float | None) -> str:
    """``ipc 10``; sets of unknown size are called so."""
    return "size unknown" if ipc is None else f"ipc {ipc:g}"


def duration(seconds: float) -> str:
    """``5 min 21 s``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def bar(claim: TestedClaim) -> str:
    """What an interval must do for the claim to be supported: ``above 0.02``."""
    bound = claim.smallest_effect
    if claim.direction == "same":
        return f"within ±{number(bound)}"
    return f"above {number(bound)}" if claim.direction == "greater" else f"below {number(0.0 - bound)}"


def _scale(estimate: Estimate) -> float:
    """The size that decides the digits: the value's, or its interval's half width where that is larger."""
    half = (estimate.high - estimate.low) / 2
    return max(abs(estimate.value), half if math.isfinite(half) else 0.0)


def _precision(scale: float) -> tuple[int, int]:
    """Decimals and power of ten for numbers of that size."""
    if scale == 0 or not math.isfinite(scale):
        return 3, 0
    exponent = math.floor(math.log10(scale))
    if exponent < -4 or exponent >= 6:
        return 2, exponent
    if scale > 1:
        return max(0, 2 - exponent), 0
    # Fractions keep three decimals, so that 0.998 and 1.000 stand under each other; small ones two digits.
    return max(3, 1 - exponent), 0


def _fixed(value: float, decimals: int, exponent: int, *, trim: bool = False, power: bool = True) -> str:
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value / 10.0**exponent:,.{decimals}f}"
    if trim and "." in text:
        text = text.rstrip("0").rstrip(".")
    if not text.strip("-0.,"):
        text = text.lstrip("-")  # a rounded zero has no sign
    return text.replace("-", "−") + (_power(exponent) if power else "")


def _power(exponent: int) -> str:
    return f" × 10{str(exponent).translate(_SUPERSCRIPTS)}" if exponent else ""
