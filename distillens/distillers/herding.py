"""Herding: real images whose mean feature follows the class mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from distillens.core.rng import Key
from distillens.distillers._coreset import Embedded


@dataclass(frozen=True)
class Herding(Embedded):
    """Greedy choice, class by class: the next image minimises ||mu_c - mean(chosen and it)||.

    Features are the last hidden layer of one network trained on the real data, or pixels.

    Source: Welling 2009; Rebuffi et al. 2017. DeepCore's code takes the maximum where the rule needs the
    minimum; here it is the minimum.
    """

    paper: ClassVar[str] = "Welling 2009"

    def choose_in(self, features: torch.Tensor, count: int, key: Key) -> torch.Tensor:
        """The greedy choice; nothing is drawn."""
        return herd(features, count)


def herd(features: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [count] of the greedy choice from features [n, d]."""
    centre = features.mean(0)
    total = torch.zeros_like(centre)
    free = torch.ones(len(features), dtype=torch.bool)
    chosen = []
    for size in range(1, count + 1):
        distance = (centre - (total + features) / size).norm(dim=1)
        distance[~free] = torch.inf
        best = int(distance.argmin())
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return torch.tensor(chosen)
