"""What a repair or an order brings beyond random ones, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distillens.core.result import Estimate, t_quantile

INIT, DRAW = "fresh initialisation", "random draw"  # the units of replication


def beyond(value: float, draws: Sequence[float]) -> Estimate:
    """How far a value lies above those of random draws, with an interval for one that is a draw like them.

    Student's t of a further draw: its own spread counts beside that of the mean.
    """
    n = len(draws)
    centre = math.fsum(draws) / n
    if n < 2:
        return Estimate(value - centre, -math.inf, math.inf, n, DRAW)
    spread = math.sqrt(math.fsum((x - centre) ** 2 for x in draws) / (n - 1))
    half = t_quantile(0.95, n - 1) * spread * math.sqrt(1 + 1 / n)
    return Estimate(value - centre, value - centre - half, value - centre + half, n, DRAW)


def area(curve: torch.Tensor, sizes: Sequence[int], points: int, whole: torch.Tensor) -> torch.Tensor:
    """The mean height [...] of accuracies [..., sizes] from the smallest size to all points, where it is ``whole`` [...]."""
    at = torch.tensor([*sizes, points], dtype=torch.float64)
    heights = torch.cat([curve, whole[..., None]], -1)
    return torch.div(torch.trapezoid(heights, at, dim=-1), points - sizes[0])
