"""What methods that train a fresh network on the set and look at its loss on real data share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from distillens import augment, cost
from distillens.core.checks import at_least, one_of, positive
from distillens.core.contracts import Net, Params, Problem
from distillens.core.labels import Labels
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.distillers._donors import UNROLLS
from distillens.distillers._pixels import Init, real_batch
from distillens.nets.convnet import ConvNet
from distillens.unroll import Inner, Outer, States

# (learned tensors, which images: all where None) -> those images, decoded
Show = Callable[[Sequence[torch.Tensor], torch.Tensor | None], torch.Tensor]
LabelsOf = Callable[[Sequence[torch.Tensor]], Labels]


def pixels(learned: Sequence[torch.Tensor], index: torch.Tensor | None) -> torch.Tensor:
    """Images that are stored as they are, first of what is learned."""
    return learned[0] if index is None else learned[0][index]


@dataclass(frozen=True)
class Unrolling(ABC):
    """Settings that all of them have, and what an unroll costs.

    ``batch_real`` is real images a class in the outer loss; ``mode`` and ``states`` are ``unroll``'s.
    """

    paper: ClassVar[str] = ""
    family: ClassVar[str] = "unrolled"
    selects: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = UNROLLS

    steps: int = 50_000
    batch_real: int = 64
    lr_img: float = 0.1
    init: Init = "noise"
    mode: Literal["graph", "adjoint"] = "adjoint"
    states: States = "stored"
    net: Net = field(default_factory=ConvNet)

    def __post_init__(self) -> None:
        name = self.name
        at_least(0, name, steps=self.steps)
        at_least(1, name, batch_real=self.batch_real)
        positive(name, lr_img=self.lr_img)
        one_of("init", self.init, ("real", "noise"))
        one_of("mode", self.mode, ("graph", "adjoint"))
        one_of("states", self.states, ("stored", "recomputed"))

    @property
    def name(self) -> str:
        """The method's name in messages: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def shown(self, problem: Problem) -> int:
        """Images of an inner step."""

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def passes(self, problem: Problem, image_steps: float) -> float:
        """Forward passes of so many images and inner steps differentiated, and of the real batch.

        8.8 an image and step with the full graph, 11.7 with the adjoint, 14.6 where its states are recomputed.
        """
        each = 8.8 if self.mode == "graph" else 11.7 if self.states == "stored" else 14.6
        return image_steps * each + 2.9 * self._real_images(problem)

    def bytes(self, problem: Problem, steps: int, vectors: int = 2) -> float:
        """Bytes of an unroll over so many steps, and of the real batch."""
        one = cost.cost(self.net, problem.real)
        inner = one.unrolled(self.shown(problem), steps, self.mode, vectors=vectors, states=self.states)
        return inner + self._real_images(problem) * one.first

    def _real_images(self, problem: Problem) -> int:
        return problem.real.k * min(self.batch_real, min(map(len, problem.by_class)))


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
