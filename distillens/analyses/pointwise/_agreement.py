"""Rank correlations, and the error of a figure that is no mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation along the last axis, [...]; 0 where one does not vary. Ties go by place."""
    return correlation(ranks(a), ranks(b))


def ranks(values: torch.Tensor) -> torch.Tensor:
    """The place of each value along the last axis, from 0."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1).double()


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation along the last axis, [...]; 0 where one does not vary."""
    a = a - a.mean(-1, keepdim=True)
    b = b - b.mean(-1, keepdim=True)
    return torch.div((a * b).sum(-1), (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12))


def pseudo_values(figure: Callable[[torch.Tensor], float], parts: Sequence[torch.Tensor]) -> list[float]:
    """What each part adds to a figure of all: values whose mean has the figure's error (the jackknife).

    ``figure`` is given the items that it may use; ``parts`` are disjoint and hold all items.

    Source: Tukey 1958.
    """
    whole = figure(torch.cat(list(parts)))
    n = len(parts)
    found = []
    for i in range(n):
        rest = torch.cat([part for j, part in enumerate(parts) if j != i])
        found.append(n * whole - (n - 1) * figure(rest))
    return found
