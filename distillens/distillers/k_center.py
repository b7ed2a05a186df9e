"""k-center: real images that leave no image of their class far from all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from distillens.core.rng import Key
from distillens.distillers._coreset import Embedded


@dataclass(frozen=True)
class KCenter(Embedded):
    """Greedy choice, class by class: the next image is the one farthest from its nearest chosen image.

    The largest distance of an image to its nearest chosen one (the covering radius) is at most twice the best
    that so many images can reach (Gonzalez 1985). What lies apart is taken early: outliers of a class, that is.

    Features are the last hidden layer of one network trained on the real data, or pixels.

    Source: Sener & Savarese 2018, algorithm 1. Where we differ: the first image is the one nearest to the class mean,
    so that nothing is left to chance; DeepCore's code draws it.
    """

    paper: ClassVar[str] = "Sener & Savarese 2018"

    def choose_in(self, features: torch.Tensor, count: int, key: Key) -> torch.Tensor:
        """The greedy choice; nothing is drawn."""
        return farthest(features, count)


def farthest(features: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [count] of the greedy choice from features [n, d]."""
    chosen = [int((features - features.mean(0)).norm(dim=1).argmin())]
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).norm(dim=1))
        nearest[chosen[-1]] = -1  # below the 0 of an equal image, which is still free
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)
