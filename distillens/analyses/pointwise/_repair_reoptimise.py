"""Repair by re-optimising: pixels that bring the gradient of the whole set nearer to that of real images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distillens.analyses.pointwise._gradients import mean_gradients, parts
from distillens.core.contracts import logits_of_many
from distillens.core.dataset import Dataset
from distillens.core.labels import Labels
from distillens.train import Population
from distillens.unroll import Adam


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
        for models in parts(len(self.flat), len(rows), data.images[0].numel()):
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
        for models in parts(len(self.flat), len(rows), leaf[0].numel()):
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
