"""What methods that train a fresh network on the set and look at its loss on real data share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distillens import augment, cost
from distillens.core.contracts import Net, Params, Problem
from distillens.core.labels import Labels
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.distillers._pixels import real_batch
from distillens.unroll import Inner, Outer

# (learned tensors, which images: all where None) -> those images, decoded
Show = Callable[[Sequence[torch.Tensor], torch.Tensor | None], torch.Tensor]
LabelsOf = Callable[[Sequence[torch.Tensor]], Labels]


def pixels(learned: Sequence[torch.Tensor], index: torch.Tensor | None) -> torch.Tensor:
    """Images that are stored as they are, first of what is learned."""
    return learned[0] if index is None else learned[0][index]


@dataclass(frozen=True, eq=False)
class Student:
    """A fresh network about to be trained on the distilled set.

    Each inner step sees ``per_class`` images of every class, all of them up to ``stored`` images a class; its draws
    belong to ``key``.
    """

    net: Net
    params: Params
    problem: Problem
    key: Key
    stored: int
    per_class: int
    augment: str = ""

    @property
    def shapes(self) -> Shapes:
        """Names and shapes of its parameters."""
        return Shapes.of(self.params)

    @property
    def start(self) -> torch.Tensor:
        """Its fresh parameters [P]."""
        return self.shapes.flatten(self.params)

    def batch(self, t: int) -> torch.Tensor | None:
        """The images of inner step t; None for all."""
        if self.per_class >= self.stored:
            return None
        place = self.key.fold("batch", t)
        return torch.cat(
            [
                c * self.stored + place.fold(c).permutation(self.stored)[: self.per_class]
                for c in range(self.problem.real.k)
            ]
        )

    def inner(self, show: Show, labels_of: LabelsOf) -> Inner:
        """The loss of an inner step: its images, decoded and augmented, against their labels."""
        shapes = self.shapes

        def loss(flat: torch.Tensor, learned: Sequence[torch.Tensor], t: int) -> torch.Tensor:
            index = self.batch(t)
            shown, labels = show(learned, index), labels_of(learned)
            shown = augment.apply(shown, augment.draw(self.augment, self.key.fold("augment", t), len(shown)))
            logits = self.net.logits(shapes.unflatten(flat), {}, shown, "train")[0]
            return (labels if index is None else labels.take(index)).loss(logits).mean()

        return loss

    def outer(self, per_class: int, augmented: bool = False) -> Outer:
        """The mean loss on a batch of ``per_class`` real images of every class, as they are or augmented."""
        real = real_batch(self.problem, self.key.fold("real"), per_class)
        k, b = real.shape[:2]
        images, labels = real.flatten(0, 1), torch.arange(k, device=real.device).repeat_interleave(b)
        if augmented:
            images = augment.apply(
                images, augment.draw(self.augment, self.key.fold("augment real"), len(images))
            )
        shapes = self.shapes

        def loss(flat: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.net.logits(shapes.unflatten(flat), {}, images)[0], labels)

        return loss


def real_images(problem: Problem, per_class: int) -> int:
    """How many real images an outer loss looks at."""
    return problem.real.k * min(per_class, min(map(len, problem.by_class)))


def outer_bytes(net: Net, problem: Problem, per_class: int) -> float:
    """Bytes of the outer loss's graph."""
    return real_images(problem, per_class) * cost.cost(net, problem.real).first
