"""A model on all points and one without each, from the same start, one after another."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn


def train(
    start: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, steps: int = 300, lr: float = 0.01
) -> list[nn.Module]:
    """Model 0 sees all points, model 1 + j all but j; full batches."""
    nets = []
    for left_out in range(-1, len(images)):
        kept = torch.arange(len(images)) != left_out
        own, own_labels = images[kept], labels[kept]
        net = copy.deepcopy(start)
        optimiser = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(net(own), own_labels).backward()
            optimiser.step()
        nets.append(net)
    return nets
