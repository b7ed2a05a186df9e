"""One step of DM as ``main_DM.py`` does it, without augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


def step(
    fresh: Callable[[], nn.Sequential],
    by_class: Sequence[torch.Tensor],
    images: torch.Tensor,
    optimiser: torch.optim.Optimizer,
    batch: int = 256,
) -> None:
    """``images`` [k * ipc, c, h, w] move; ``by_class`` are the real ones of each class."""
    net = fresh()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    real = [members[torch.randperm(len(members))[:batch]] for members in by_class]
    optimiser.zero_grad()
    loss(net, real, images).backward()
    optimiser.step()


def loss(net: nn.Sequential, real: Sequence[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    embed = net[:-1]
    ipc = len(images) // len(real)
    total = images.new_zeros(())
    for c, batch in enumerate(real):
        theirs = embed(batch).detach()
        ours = embed(images[c * ipc : (c + 1) * ipc])
        total = total + (theirs.mean(0) - ours.mean(0)).square().sum()
    return total
