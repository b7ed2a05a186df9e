"""Models on subsets of the data, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


def train(
    fresh: Callable[[], nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    subsets: Sequence[torch.Tensor],
    *,
    steps: int = 300,
    batch: int = 256,
    lr: float = 0.01,
) -> list[nn.Module]:
    """A fresh network a subset, in shuffled batches whose last short one is kept."""
    nets = []
    for subset in subsets:
        own, own_labels = images[subset], labels[subset]
        net = fresh()
        optimiser = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
        done = 0
        while done < steps:
            for index in torch.randperm(len(own)).split(batch)[: steps - done]:
                optimiser.zero_grad()
                F.cross_entropy(net(own[index]), own_labels[index]).backward()
                optimiser.step()
                done += 1
        nets.append(net)
    return nets
