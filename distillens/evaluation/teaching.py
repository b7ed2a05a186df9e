"""A teacher that labels every set alike, so that no set owes its accuracy to labels that the others lack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from distillens import augment as augmenting
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, positive
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Labels, Probabilities, Teacher
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import fingerprint
from distillens.train import Population, Training


@dataclass(frozen=True)
class Teaching:
    """Who labels the sets, and how: one network, trained on the real training images.

    It is trained by ``recipe``, for ``passes`` over the real images where that is above 0, and is the network that is
    taught where ``net`` names no other. ``views=0`` gives each image one soft label,
    ``softmax(logits / temperature)`` of the image as it is. Above 0 each of so many augmented views has a label of its
    own: step i of a training shows view ``i % views`` to all networks and compares at ``temperature`` (``labels.Teacher``).

    Where we differ from SRe2L and RDED: the labels of an image that CutMix has mixed are the shares of both images'
    labels, where theirs come from the teacher's look at the mix.
    """

    recipe: Recipe
    passes: int = 0
    temperature: float = 1.0
    views: int = 0
    net: Net | None = None

    def __post_init__(self) -> None:
        at_least(0, "teaching", passes=self.passes, views=self.views)
        positive("teaching", temperature=self.temperature)

    @property
    def kind(self) -> str:
        """The kind of label that it gives."""
        return Teacher.kind if self.views else Probabilities.kind

    def training(self, real: Splits, student: Net, key: Key) -> Training:
        """The training of the teacher; its test images stay unseen."""
        recipe = self.recipe
        if self.passes:
            batches = math.ceil(len(real.train) / (recipe.batch or len(real.train)))
            recipe = recipe.but(steps=self.passes * batches)
        return Training(real.train, self.net or student, recipe, (key.fold("teacher"),))

    def relabel(self, sets: Sets, teacher: Population, augment: str, key: Key) -> Sets:
        """All sets with the teacher's labels: distilled ones, baselines, and what they started from.

        ``augment`` is the strategy that the views are drawn from, the same for all sets. A set of ordered steps is a training by
        itself and keeps its labels. One that decodes a point into several images gives it the mean of their logits.
        """

        def many(
            named: Mapping[str, tuple[DistilledDataset, ...]],
        ) -> dict[str, tuple[DistilledDataset, ...]]:
            return {
                name: tuple(
                    one
                    if one.order is not None
                    else replace(one, labels=self._labels(one, teacher, augment, key))
                    for one in replicates
                )
                for name, replicates in named.items()
            }

        return Sets(many(sets.distilled), many(sets.baselines), many(sets.initial))

    def _labels(self, one: DistilledDataset, teacher: Population, augment: str, key: Key) -> Labels:
        data = one.dataset()
        origin = one.decode.origin(one.stored).to(data.device)

        def logits(images: torch.Tensor) -> torch.Tensor:
            shown = Dataset(images, data.labels, data.classes, data.space)
            each = teacher.logits(shown)[0].float().to(data.device)
            total = torch.zeros(len(one), each.shape[1], device=each.device).index_add(0, origin, each)
            return total / origin.bincount(minlength=len(one))[:, None]

        if not self.views:
            return Probabilities((logits(data.images) / self.temperature).softmax(-1))
        seed = key.fold("views").number()
        seen = []
        for view in range(self.views):
            # As train shows the view: one draw for all images of the set.
            drawn = augmenting.draw(augment, Key(seed).fold("view", view), len(data))
            seen.append(logits(augmenting.apply(data.images, drawn)))
        size = teacher.shapes.size + sum(value[0].numel() for value in teacher.buffers.values())
        return Teacher(fingerprint(teacher.final), torch.stack(seen), seed, self.temperature, 4 * size)


def check_labels(teaching: Teaching | None, protocol: str, sets: Sets) -> None:
    """Refuse sets that a protocol's teacher has not labelled yet.

    Raises:
        UserError: a set's labels are of another kind than the teacher's.
    """
    if teaching is None:
        return
    for name, replicates in [*sets.everything().items(), *sets.initial.items()]:
        for one in replicates:
            if one.order is None and one.labels.kind != teaching.kind:
                raise UserError(
                    f"protocol {protocol!r} trains on a teacher's labels, which the set {name!r} does not have",
                    got=f"{one.labels.kind} labels",
                    expected=teaching.kind,
                    fix="label all sets first: evaluation.trials.taught(protocol, net, sets, real, runs, key)",
                )
