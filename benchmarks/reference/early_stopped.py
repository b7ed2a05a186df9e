"""A pool of early-stopped models: what each predicts for the test images after every update."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def predictions(
    fresh: Callable[[], nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    test: torch.Tensor,
    *,
    models: int = 16,
    steps: int = 150,
    batch: int = 256,
    lr: float = 0.01,
) -> torch.Tensor:
    """Classes [models, steps, n]."""
    seen = []
    for _ in range(models):
        net = fresh()
        optimiser = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
        own: list[torch.Tensor] = []
        while len(own) < steps:
            for index in torch.randperm(len(images)).split(batch)[: steps - len(own)]:
                optimiser.zero_grad()
                F.cross_entropy(net(images[index]), labels[index]).backward()
                optimiser.step()
                with torch.no_grad():
                    own.append(net(test).argmax(1))
        seen.append(torch.stack(own))
    return torch.stack(seen)
