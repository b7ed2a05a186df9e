"""Intervals as small drawings: where the dot, the whisker and the smallest effect lie on a common axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from distillens.core.result import Estimate
from distillens.report.summary import TestedClaim


@dataclass(frozen=True)
class Axis:
    """A stretch of the number line, drawn from 0 to 100."""

    low: float
    high: float

    @staticmethod
    def over(claims: Iterable[TestedClaim]) -> Axis:
        """The axis that claims of one name share.

        All values and smallest effects lie on it. One wide interval would press the others flat, so
        intervals stretch it by at most one span a side; a whisker that goes on ends in an arrow.
        """
        claims = list(claims)
        estimates = [finding.estimate for claim in claims for finding in claim.findings]
        core = [e.value for e in estimates] + [bound for claim in claims for bound in _bounds(claim)]
        core = [x for x in core if math.isfinite(x)]
        low, high = min(core), max(core)
        span = high - low or abs(high) or 1.0
        ends = [x for e in estimates for x in (e.low, e.high) if math.isfinite(x)]
        low = max(min([low, *ends]), low - span)
        high = min(max([high, *ends]), high + span)
        margin = 0.08 * (high - low or span)
        return Axis(low - margin, high + margin)

    def at(self, x: float) -> float:
        """The place of ``x`` in per cent, cut to the axis."""
        share = (x - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)


@dataclass(frozen=True)
class Glyph:
    """An interval on its axis, in per cent of the width.

    ``bounds`` are the lines of the smallest effect, ``zone`` is where an interval must lie for the
    claim to be supported. ``more_left`` and ``more_right`` say that the whisker goes on.
    """

    value: float | None
    low: float
    high: float
    more_left: bool
    more_right: bool
    bounds: tuple[float, ...]
    zone: tuple[float, float]


def draw(claim: TestedClaim, estimate: Estimate, axis: Axis) -> Glyph:
    """The glyph of one finding."""
    bounds = tuple(axis.at(x) for x in _bounds(claim))
    zone = {"greater": (bounds[0], 100.0), "less": (0.0, bounds[0]), "same": (bounds[0], bounds[-1])}
    return Glyph(
        value=axis.at(estimate.value) if math.isfinite(estimate.value) else None,
        low=axis.at(estimate.low),
        high=axis.at(estimate.high),
        more_left=estimate.low < axis.low,
        more_right=estimate.high > axis.high,
        bounds=bounds,
        zone=zone[claim.direction],
    )


def _bounds(claim: TestedClaim) -> tuple[float, ...]:
    bound = claim.smallest_effect
    if claim.direction == "same":
        return (-bound, bound)
    return (bound,) if claim.direction == "greater" else (-bound,)
