"""One trained network as an estimator of influence sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from distillens.attribution.gradients import example_gradients
from distillens.core.contracts import Buffers, Net
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.core.vector import Shapes
from distillens.train import Population


@dataclass(frozen=True, eq=False)
class Trained:
    """A network, what it was trained on, and where it came from.

    ``final`` [P] are its parameters at the end, ``snapshots`` [t, P] those after ``moments`` steps. ``origin`` [n] says
    which point each of the n images belongs to: a point is what is left out, with all its images.
    """

    net: Net
    shapes: Shapes
    final: torch.Tensor
    data: Dataset
    origin: torch.Tensor
    recipe: Recipe
    moments: tuple[int, ...] = ()
    snapshots: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    buffers: Buffers = field(default_factory=dict)

    @staticmethod
    def of(population: Population, j: int, data: Dataset, origin: torch.Tensor, recipe: Recipe) -> Trained:
        """Model j of a population, in float64: influences are small differences."""
        return Trained(
            population.net,
            population.shapes,
            population.final[j].double(),
            Dataset(data.images.double(), data.labels, data.classes, data.space),
            origin,
            recipe,
            population.moments,
            population.snapshots[j].double(),
            {name: value[j].double() for name, value in population.buffers.items()},
        )

    @property
    def points(self) -> int:
        """How many points there are."""
        return int(self.origin.max()) + 1

    @property
    def last_layer(self) -> slice:
        """The places in [P] of the last layer's parameters: those that share the last name before its dot."""
        layer = self.shapes.names[-1].rpartition(".")[0]
        sizes = [
            math.prod(shape)
            for name, shape in zip(self.shapes.names, self.shapes.shapes, strict=True)
            if name.rpartition(".")[0] == layer
        ]
        return slice(self.shapes.size - sum(sizes), self.shapes.size)

    def point_gradients(self, flat: torch.Tensor | None = None) -> torch.Tensor:
        """By how much a point's weight in the mean loss moves its gradient, [points, P].

        The loss is the weighted mean, so leaving a point out lifts the weight of all others: the derivative by the weight of
        image i is (gradient of i - mean gradient) / n.
        """
        each = torch.cat(list(self.gradients(self.data, flat)))
        moved = (each - each.mean(0)) / len(each)
        return moved.new_zeros(self.points, moved.shape[1]).index_add_(0, self.origin, moved)

    def gradients(self, data: Dataset, flat: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The gradient of each image's loss, some images at a time: [n', P]."""
        at = self.final if flat is None else flat
        return example_gradients(self.net, self.shapes, at, data, self.buffers)
