from __future__ import annotations

import math

import pytest

from distillens.core.result import Estimate
from distillens.report.numerals import bar, duration, estimate_text, ipc_text, number
from distillens.report.summary import TestedClaim as Claim


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.8834, 0.8612, 0.9051, "0.883 [0.861, 0.905]"),
        (1.0, 0.99, 1.0, "1.000 [0.990, 1.000]"),
        (0.0, 0.0, 0.0, "0.000 [0.000, 0.000]"),
        (-0.0123, -0.03, 0.0054, "−0.012 [−0.030, 0.005]"),
        (-0.00508, -0.01159, 0.00143, "−0.0051 [−0.0116, 0.0014]"),
        (-0.0001, -0.2, 0.2, "0.000 [−0.200, 0.200]"),
        (3.14159, 3.0, 3.3, "3.14 [3.00, 3.30]"),
        (42.25, 40.0, 44.5, "42.2 [40.0, 44.5]"),
        (1234.5, 1200.0, 1270.0, "1,234 [1,200, 1,270]"),
        (1.234e-5, 1.0e-5, 1.5e-5, "1.23 × 10⁻⁵ [1.00, 1.50] × 10⁻⁵"),
        (2.5e7, 2.0e7, 3.0e7, "2.50 × 10⁷ [2.00, 3.00] × 10⁷"),
        (0.5, -math.inf, math.inf, "0.500 no interval (n = 4)"),
        (0.5, 0.4, math.inf, "0.500 [0.400, ∞]"),
        (math.nan, math.nan, math.nan, "undefined [undefined, undefined]"),
    ],
)
def test_an_estimate_reads_as(value: float, low: float, high: float, text: str) -> None:
    assert estimate_text(Estimate(value, low, high, 4, "replicate")) == text


def test_another_level_is_said() -> None:
    assert estimate_text(Estimate(0.5, 0.4, 0.6, 4, "replicate", 0.9)) == "0.500 [0.400, 0.600] at 90 %"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.02, "0.02"), (-0.5, "−0.5"), (0.0, "0"), (1200.0, "1,200"), (1e-6, "1 × 10⁻⁶"), (1.75, "1.75")],
)
def test_a_lone_number_reads_as(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("direction", "effect", "text"),
    [
        ("greater", 0.02, "above 0.02"),
        ("less", 0.02, "below −0.02"),
        ("less", 0.0, "below 0"),
        ("same", 0.05, "within ±0.05"),
    ],
)
def test_the_bar_of_a_claim_reads_as(direction: str, effect: float, text: str) -> None:
    claim = Claim("dm", "a/b", "A", "c", "s", direction, effect, "", "", "", ())  # type: ignore[arg-type]
    assert bar(claim) == text


@pytest.mark.parametrize(("seconds", "text"), [(9.4, "9 s"), (321.0, "5 min 21 s"), (7260.0, "2 h 1 min")])
def test_a_duration_reads_as(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_size_reads_as() -> None:
    assert [ipc_text(ipc) for ipc in (1.0, 10.0, 0.5, None)] == ["ipc 1", "ipc 10", "ipc 0.5", "size unknown"]
