"""How some points of a set are mended: other labels, real images in their place, or better pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distillens.core.contracts import logits_of_many
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets, restore_labels
from distillens.train import Population
from distillens.unroll import Adam

TOGETHER = 1 << 19  # pixels of all images and models that one derivative takes: each is held with its graph
LEAST = 1e-6  # a probability whose logarithm a label keeps


def members(origin: torch.Tensor, points: Sequence[int]) -> torch.Tensor:
    """The images that some points decode to, point after point."""
    return torch.cat([(origin == j).nonzero().flatten() for j in points])


# Relabelling


def as_table(labels: Labels, classes: int) -> torch.Tensor:
    """What each label asks for, [n, classes]: probabilities, or the targets of a regression."""
    if isinstance(labels, Targets | Probabilities):
        return labels.values
    if isinstance(labels, Logits):
        return labels.values.softmax(-1)
    return F.one_hot(labels.hard(), classes).float()


def foretold(population: Population, inits: int, data: Dataset, origin: torch.Tensor) -> torch.Tensor:
    """What networks trained without a point say of it, [points, k], of a population without each [inits, 1 + points].

    The mean probability over initialisations and the point's images; of regression targets the mean output.
    """
    outputs = population.logits(data).view(inits, -1, len(data), data.k)
    said = outputs[:, 1 + origin, torch.arange(len(data))]  # [inits, n, k]
    if not isinstance(data.labels, Targets):
        said = said.softmax(-1)
    by_point = said.new_zeros(int(origin.max()) + 1, data.k).index_add_(0, origin, said.mean(0))
    return torch.div(by_point, torch.bincount(origin)[:, None])


def relabelled(labels: Labels, rows: torch.Tensor, said: torch.Tensor) -> Labels:
    """The labels with those of ``rows`` as they are said to be [len(rows), k], in their kind; hard ones become probabilities."""
    said = said / said.sum(-1, keepdim=True) if not isinstance(labels, Targets) else said
    if isinstance(labels, Logits):
        values, said = labels.values.clone(), said.clamp(min=LEAST).log()
    else:
        values = as_table(labels, said.shape[1]).clone()
    values[rows] = said.to(values)
    if isinstance(labels, Hard):
        return Probabilities(values)
    return restore_labels(labels.kind, {"values": values}, {})


# Real images in the place of points


def _parts(models: int, images: int, pixels: int) -> list[torch.Tensor]:
    """Which models a derivative over so many images takes together."""
    return list(torch.split(torch.arange(models), max(1, TOGETHER // (images * pixels))))


def mean_gradients(population: Population, flat: torch.Tensor, data: Dataset) -> torch.Tensor:
    """The gradients [m, P] of the mean loss on ``data`` at parameters ``flat`` [m, P]."""
    pixels = data.images[0].numel()
    size = max(1, TOGETHER // pixels)
    found = []
    for models in _parts(len(flat), min(len(data), size), pixels):
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
    for models in _parts(len(flat), min(len(data), size), pixels):
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


def donor_scores(
    population: Population, inits: int, points: Sequence[int], candidates: Dataset, val: Dataset
) -> torch.Tensor:
    """By how much a little of each candidate lowers the mean validation loss of networks without a point, [points, n].

    To first order, in the mean over initialisations of a population without each [inits, 1 + all points].
    """
    by_init = population.final.view(inits, -1, population.final.shape[1])
    flat = by_init[:, [1 + j for j in points]].flatten(0, 1)
    found = along(population, flat, mean_gradients(population, flat, val), candidates)
    return found.view(inits, len(points), -1).mean(0)


def assigned(scores: Sequence[torch.Tensor], wanted: Sequence[int]) -> list[list[int]]:
    """For each point in turn its best candidates, as many as it wants, none that an earlier one has.

    Each point has scores of its own candidates; a candidate is known by its place among all, -inf where it is none.
    """
    taken: set[int] = set()
    found = []
    for own, count in zip(scores, wanted, strict=True):
        order = own.argsort(descending=True, stable=True).tolist()
        best = [i for i in order if i not in taken and own[i] > -torch.inf][:count]
        taken.update(best)
        found.append(best)
    return found


# Better pixels


@dataclass(frozen=True, eq=False)
class Way:
    """Networks along the training on a set: parameters [N, P], the set's mean gradients there and those of real images."""

    population: Population
    flat: torch.Tensor
    own: torch.Tensor
    real: torch.Tensor

    @staticmethod
    def of(population: Population, data: Dataset, real: Dataset) -> Way:
        """The way of a population with snapshots on ``data``, beside gradients on ``real``."""
        flat = population.snapshots.flatten(0, 1)
        return Way(
            population,
            flat,
            mean_gradients(population, flat, data),
            mean_gradients(population, flat, real),
        )

    def others(self, data: Dataset, rows: torch.Tensor) -> torch.Tensor:
        """What all images but ``rows`` add to the set's mean gradients, [N, P]."""
        found = torch.empty_like(self.own)
        for models in _parts(len(self.flat), len(rows), data.images[0].numel()):
            models = models.to(self.flat.device)
            at = self.flat[models].detach().requires_grad_()
            images, labels = data.images[rows], data.labels.take(rows)
            found[models] = self.own[models] - self._gradients(at, labels, images) / len(data)
        return found

    def gap(
        self, data: Dataset, rows: torch.Tensor, images: torch.Tensor, others: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        """How far the set's gradients are from real ones when ``rows`` show ``images``, and its slope in these.

        The squared distance beside the real gradient's squared length, in the mean over the way: where the set's own gradient has
        gone, its slope is minus the influence on the real loss that TracIn would see.
        """
        labels = data.labels.take(rows)
        leaf = images.detach().requires_grad_()
        scale = self.real.square().sum(1).clamp(min=torch.finfo(self.real.dtype).tiny)
        slope, value = torch.zeros_like(images), 0.0
        for models in _parts(len(self.flat), len(rows), leaf[0].numel()):
            models = models.to(self.flat.device)
            at = self.flat[models].detach().requires_grad_()
            own = others[models] + self._gradients(at, labels, leaf, True) / len(data)
            apart = (own - self.real[models]).square().sum(1) / scale[models]
            distance = apart.sum() / len(self.flat)
            slope += torch.autograd.grad(distance, leaf)[0]
            value += float(distance.detach())
        return value, slope

    def _gradients(
        self, at: torch.Tensor, labels: Labels, images: torch.Tensor, onward: bool = False
    ) -> torch.Tensor:
        """The gradients [m, P] of the summed loss on some images; ``onward`` to be differentiated again."""
        population = self.population
        logits, _ = logits_of_many(population.net, population.shapes.unflatten(at), {}, images)
        (gradient,) = torch.autograd.grad(labels.loss(logits).sum(), at, create_graph=onward)
        return gradient

    def better(self, data: Dataset, rows: torch.Tensor, steps: int, size: float) -> torch.Tensor:
        """The images of ``rows`` after some steps of Adam down the gap; ``size`` is Adam's rate."""
        others, rule = self.others(data, rows), Adam()
        state = rule.begin(data.images[rows])
        rate = torch.tensor(size, dtype=data.images.dtype, device=data.device)
        for step in range(steps):
            state = rule.step(state, self.gap(data, rows, state[0], others)[1], rate, step)
        return state[0]
