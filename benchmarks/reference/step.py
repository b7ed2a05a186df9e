"""One training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def step(
    net: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimiser: torch.optim.Optimizer
) -> None:
    optimiser.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimiser.step()
