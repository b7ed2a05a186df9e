from __future__ import annotations

import math
from typing import Literal

import pytest

from distillens.core.result import Claim, Estimate
from distillens.report.glyph import Axis, draw
from distillens.report.summary import Finding
from distillens.report.summary import TestedClaim as Shown

Direction = Literal["greater", "less", "same"]


def shown(direction: Direction, *estimates: Estimate, effect: float = 0.1) -> Shown:
    findings = tuple(Finding("run", 1.0, e, "inconclusive") for e in estimates)
    return Shown("dm", "a/b", "A", "name", "s", direction, effect, "", "", "", findings)


@pytest.mark.parametrize("direction", ["greater", "less", "same"])
@pytest.mark.parametrize("value", [-0.5, -0.3, -0.12, -0.1, -0.02, 0.0, 0.05, 0.1, 0.12, 0.3, 0.5])
@pytest.mark.parametrize("half", [0.01, 0.05, 0.15])
def test_a_whisker_lies_in_the_shaded_part_exactly_when_the_claim_is_supported(
    direction: Direction, value: float, half: float
) -> None:
    estimate = Estimate(value, value - half, value + half, 5, "replicate")
    claim = shown(direction, estimate)
    glyph = draw(claim, estimate, Axis.over([claim]))
    inside = glyph.zone[0] < glyph.low and glyph.high < glyph.zone[1]
    verdict = Claim("name", "dm", "s", estimate, direction, 0.1, "", "").verdict
    assert inside == (verdict == "supported")


def test_claims_share_an_axis_that_holds_every_value_and_line() -> None:
    near, far = Estimate(0.2, 0.1, 0.3, 5, "u"), Estimate(0.9, 0.8, 1.0, 5, "u")
    axis = Axis.over([shown("greater", near), shown("greater", far)])
    assert axis.low < 0.1 < 1.0 < axis.high
    assert 0 < axis.at(0.1) < axis.at(0.2) < axis.at(0.9) < 100


def test_a_very_wide_interval_is_cut_and_marked_so() -> None:
    wide, narrow = Estimate(0.2, -60.0, 60.4, 2, "u"), Estimate(0.3, 0.25, 0.35, 5, "u")
    claim = shown("greater", wide, narrow)
    axis = Axis.over([claim])
    glyph = draw(claim, wide, axis)
    assert (glyph.low, glyph.high, glyph.more_left, glyph.more_right) == (0, 100, True, True)
    assert axis.at(0.35) - axis.at(0.25) > 10


def test_an_infinite_interval_spans_the_axis() -> None:
    estimate = Estimate(0.2, -math.inf, math.inf, 1, "u")
    claim = shown("same", estimate)
    glyph = draw(claim, estimate, Axis.over([claim]))
    assert (glyph.low, glyph.high, glyph.more_left, glyph.more_right) == (0, 100, True, True)
    assert glyph.value is not None and len(glyph.bounds) == 2


def test_numbers_that_are_all_equal_have_an_axis_too() -> None:
    estimate = Estimate(0.0, 0.0, 0.0, 2, "u")
    claim = shown("greater", estimate, effect=0.0)
    assert draw(claim, estimate, Axis.over([claim])).value == 50


def test_an_undefined_value_has_no_dot() -> None:
    estimate = Estimate(math.nan, -math.inf, math.inf, 1, "u")
    claim = shown("greater", estimate)
    assert draw(claim, estimate, Axis.over([claim])).value is None
