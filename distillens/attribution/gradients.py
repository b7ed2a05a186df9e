"""Gradients of the loss on given data at given parameters: of all images together, and of each.

They are those of evaluation: what a network remembers between steps stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distillens.core.contracts import Buffers, Net
from distillens.core.dataset import Dataset
from distillens.core.vector import Shapes

TOGETHER = 1 << 20  # pixels that one pass takes
NUMBERS = 1 << 25  # gradients of single images held at a time, as numbers


def mean_gradient(
    net: Net, shapes: Shapes, flat: torch.Tensor, data: Dataset, buffers: Buffers | None = None
) -> torch.Tensor:
    """The gradient [P] of the mean loss on ``data`` at the parameters ``flat`` [P], in their precision."""
    leaf = flat.detach().requires_grad_()
    size = max(1, TOGETHER // data.images[0].numel())
    total = torch.zeros_like(flat)
    for index in torch.split(torch.arange(len(data), device=data.device), size):
        logits, _ = net.logits(shapes.unflatten(leaf), buffers or {}, data.images[index].to(flat))
        loss = data.labels.take(index).loss(logits).sum() / len(data)
        (gradient,) = torch.autograd.grad(loss, leaf)
        total += gradient
    return total


def example_gradients(
    net: Net, shapes: Shapes, flat: torch.Tensor, data: Dataset, buffers: Buffers | None = None
) -> Iterator[torch.Tensor]:
    """The gradient of each image's own loss at ``flat`` [P], some images at a time: [n', P], in order.

    A few at a time, because each is as large as the network.
    """

    def loss(parameters: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        logits, _ = net.logits(shapes.unflatten(parameters), buffers or {}, images[index[None]].to(flat))
        return data.labels.take(index[None]).loss(logits).sum()

    images = data.images
    order = torch.arange(len(data), device=data.device)
    one_by_one = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))
    for index in torch.split(order, max(1, NUMBERS // shapes.size)):
        yield one_by_one(flat.detach(), index)


def logit_jacobians(
    net: Net, shapes: Shapes, flat: torch.Tensor, data: Dataset, buffers: Buffers | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The derivatives of each image's logits at ``flat`` [P], [n', k, P], and the logits [n', k], some images at a time."""

    def one(parameters: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, _ = net.logits(shapes.unflatten(parameters), buffers or {}, image[None].to(flat))
        return logits[0], logits[0]

    each = torch.vmap(torch.func.jacrev(one, has_aux=True), in_dims=(None, 0))
    for images in torch.split(data.images, max(1, NUMBERS // (shapes.size * data.k))):
        yield each(flat.detach(), images)
