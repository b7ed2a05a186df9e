"""Intervals of a share of independent units, and of the difference of two."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal


@lru_cache(maxsize=10_000)
def interval(
    count: int, n: int, level: float = 0.95, method: Literal["exact", "wilson"] = "exact"
) -> tuple[float, float]:
    """The interval of count/n: Clopper and Pearson's, or Wilson's."""
    from scipy.stats import binomtest

    found = binomtest(count, n).proportion_ci(level, method=method)
    return float(found.low), float(found.high)


def difference_of_shares(first: int, n: int, second: int, m: int) -> tuple[float, float]:
    """The interval of first/n - second/m: Newcombe 1998, method 10, from Wilson's intervals."""
    p, q = first / n, second / m
    p_low, p_high = interval(first, n, method="wilson")
    q_low, q_high = interval(second, m, method="wilson")
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)
