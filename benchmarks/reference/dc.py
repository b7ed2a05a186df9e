"""One matching step of DC and its training on the distilled images, as ``main.py`` does them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def match(
    net: nn.Module,
    by_class: Sequence[torch.Tensor],
    images: torch.Tensor,
    optimiser: torch.optim.Optimizer,
    batch: int = 256,
) -> None:
    """``images`` [k * ipc, c, h, w] move; ``by_class`` are the real ones of each class."""
    real = [members[torch.randperm(len(members))[:batch]] for members in by_class]
    optimiser.zero_grad()
    loss(net, real, images).backward()
    optimiser.step()


def loss(net: nn.Module, real: Sequence[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The matching losses of all classes: every class's graph is alive until the way back, as in the authors' code."""
    parameters = list(net.parameters())
    ipc = len(images) // len(real)
    total = images.new_zeros(())
    for c, batch in enumerate(real):
        own = images[c * ipc : (c + 1) * ipc]
        labels, own_labels = (torch.full((len(x),), c, device=x.device) for x in (batch, own))
        target = [
            g.detach().clone() for g in torch.autograd.grad(F.cross_entropy(net(batch), labels), parameters)
        ]
        shown = torch.autograd.grad(F.cross_entropy(net(own), own_labels), parameters, create_graph=True)
        for a, b in zip(target, shown, strict=True):
            if a.ndim > 1:  # biases and norm weights take no part
                total = total + _distance(a.flatten(1), b.flatten(1))
    return total


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()


def train(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimiser: torch.optim.Optimizer,
    passes: int,
    batch: int = 256,
) -> None:
    """Passes of training on the distilled images."""
    images = images.detach()
    for _ in range(passes):
        for index in torch.randperm(len(images)).split(batch):
            optimiser.zero_grad()
            F.cross_entropy(net(images[index]), labels[index]).backward()
            optimiser.step()
