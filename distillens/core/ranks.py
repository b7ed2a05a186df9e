"""Rank correlation of tensors."""

from __future__ import annotations

import torch


def ranks(values: torch.Tensor) -> torch.Tensor:
    """The ranks along the last axis, from 1, float64 on the CPU; equals share the mean of theirs."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.detach().cpu().numpy(), axis=-1)).double()


def correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation along the last axis, [...]; 0 where one does not vary."""
    a = first - first.mean(-1, keepdim=True)
    b = second - second.mean(-1, keepdim=True)
    return torch.div((a * b).sum(-1), (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12))


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation along the last axis, [...]; 0 where one does not vary."""
    return correlation(ranks(first), ranks(second))
