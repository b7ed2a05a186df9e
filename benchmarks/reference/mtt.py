"""One step of MTT as ``distill.py`` does it, without augmentation: the whole unroll is one graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


def step(
    net: nn.Module,
    theta: torch.Tensor,
    target: torch.Tensor,
    images: torch.Tensor,
    labels: torch.Tensor,
    rate: torch.Tensor,
    optimisers: tuple[torch.optim.Optimizer, ...],
    steps: int,
) -> None:
    """``images`` and ``rate`` move, each by its optimiser; ``theta`` [P] leads to ``target`` [P] in ``steps`` steps."""
    found = loss(net, theta, target, images, labels, rate, steps)
    for optimiser in optimisers:
        optimiser.zero_grad()
    found.backward()
    for optimiser in optimisers:
        optimiser.step()


def loss(
    net: nn.Module,
    theta: torch.Tensor,
    target: torch.Tensor,
    images: torch.Tensor,
    labels: torch.Tensor,
    rate: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    named = {name: p.shape for name, p in net.named_parameters()}
    sizes = [shape.numel() for shape in named.values()]
    student = theta.detach().requires_grad_()
    for _ in range(steps):
        pieces = zip(named.items(), student.split(sizes), strict=True)
        params = {name: piece.view(shape) for (name, shape), piece in pieces}
        error = F.cross_entropy(functional_call(net, params, (images,)), labels)
        (gradient,) = torch.autograd.grad(error, student, create_graph=True)
        student = student - rate * gradient
    return (student - target).square().sum() / (theta - target).square().sum()
