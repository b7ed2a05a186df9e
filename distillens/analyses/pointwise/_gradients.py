"""Mean gradients of many models at once, and products with the gradients of single images."""

from __future__ import annotations

import torch

from distillens.core.contracts import logits_of_many
from distillens.core.dataset import Dataset
from distillens.train import Population

TOGETHER = 1 << 19  # pixels of all images and models that one derivative takes: each is held with its graph


def parts(models: int, images: int, pixels: int) -> list[torch.Tensor]:
    """Which models a derivative over so many images takes together."""
    return list(torch.split(torch.arange(models), max(1, TOGETHER // (images * pixels))))


def mean_gradients(population: Population, flat: torch.Tensor, data: Dataset) -> torch.Tensor:
    """The gradients [m, P] of the mean loss on ``data`` at parameters ``flat`` [m, P]."""
    pixels = data.images[0].numel()
    size = max(1, TOGETHER // pixels)
    found = []
    for models in parts(len(flat), min(len(data), size), pixels):
        leaf = flat[models.to(flat.device)].detach().requires_grad_()
        total = torch.zeros_like(leaf)
        for index in torch.split(torch.arange(len(data), device=data.device), size):
            part = data.take(index)
            logits, _ = logits_of_many(population.net, population.shapes.unflatten(leaf), {}, part.images)
            total += torch.autograd.grad(part.labels.loss(logits).sum() / len(data), leaf)[0]
        found.append(total)
    return torch.cat(found)


def along(
    population: Population, flat: torch.Tensor, directions: torch.Tensor, data: Dataset
) -> torch.Tensor:
    """The products [m, n] of each image's gradient at parameters ``flat`` [m, P] with the model's direction [m, P].

    No gradient of a single image is held: the product with the gradient of a weighted sum is differentiated by the weights.
    """
    pixels = data.images[0].numel()
    size = max(1, TOGETHER // pixels)
    rows = []
    for models in parts(len(flat), min(len(data), size), pixels):
        leaf = flat[models.to(flat.device)].detach().requires_grad_()
        direction = directions[models.to(flat.device)]
        pieces = []
        for index in torch.split(torch.arange(len(data), device=data.device), size):
            part = data.take(index)
            logits, _ = logits_of_many(population.net, population.shapes.unflatten(leaf), {}, part.images)
            losses = part.labels.loss(logits)
            weights = torch.ones_like(losses, requires_grad=True)
            (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf, create_graph=True)
            pieces.append(torch.autograd.grad((gradient * direction).sum(), weights)[0])
        rows.append(torch.cat(pieces, 1))
    return torch.cat(rows)
