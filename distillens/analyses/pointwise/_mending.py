"""A set with some of its points mended, by each policy that changes its images or labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from distillens.analyses.pointwise._repair_relabel import foretold, relabelled
from distillens.analyses.pointwise._repair_reoptimise import Way
from distillens.analyses.pointwise._repair_replace import assigned, donor_scores
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset, Splits
from distillens.core.rng import Key
from distillens.runs import Runs
from distillens.train import Population, Training

if TYPE_CHECKING:
    from distillens.analyses.pointwise.repair import Repair


def members(origin: torch.Tensor, points: Sequence[int]) -> torch.Tensor:
    """The images that some points decode to, point after point."""
    return torch.cat([(origin == j).nonzero().flatten() for j in points])


class Mending:
    """The repairs of groups of one set's points that change its images or labels."""

    def __init__(
        self, settings: Repair, one: DistilledDataset, real: Splits, each: Population, key: Key
    ) -> None:
        self.settings, self.one, self.real, self.each, self.key = settings, one, real, each, key
        self.data = one.dataset()
        self.origin = one.decode.origin(one.stored)
        self.said = foretold(each, settings.inits, self.data, self.origin.to(self.data.device))

    def __call__(
        self, policy: str, groups: Sequence[tuple[int, ...]], runs: Runs, way: Training
    ) -> list[Dataset]:
        """The mended set for each group (all of one size); ``way`` is what pixels are re-optimised along."""
        if policy == "relabel":
            return [self._relabelled(group) for group in groups]
        if policy == "replace":
            scores = self._scores(sorted({j for group in groups for j in group}), len(groups[0]))
            return [self._replaced(group, scores) for group in groups]
        (population,) = runs.get(way)
        along = Way.of(population, self.data, self._some(self.real.train, "train images"))
        return [self._better(group, along) for group in groups]

    def _some(self, data: Dataset, name: str) -> Dataset:
        """Up to ``images`` random ones."""
        index = self.key.fold("repair", name).permutation(len(data))[: self.settings.images]
        return data.take(index.to(data.device))

    def _with(self, rows: torch.Tensor, images: torch.Tensor) -> Dataset:
        changed = self.data.images.clone()
        changed[rows] = images.to(changed)
        return replace(self.data, images=changed)

    def _relabelled(self, group: tuple[int, ...]) -> Dataset:
        rows = members(self.origin, group)
        return replace(self.data, labels=relabelled(self.data.labels, rows, self.said[self.origin[rows]]))

    def _scores(self, points: Sequence[int], together: int) -> dict[int, torch.Tensor]:
        """For each point how good each training image is in its place, -inf of other classes and those the set has already.

        There have to be enough for ``together`` points of one class.
        """
        train, val = self.real.train, self._some(self.real.val, "validation images")
        hard = self.one.labels.hard().cpu()
        possible = train.drawn(self.settings.donors, self.key.fold("repair", "donors"))
        if self.one.chosen is not None:
            possible = possible[~torch.isin(possible, self.one.chosen.to(possible))]
        found = {}
        for c in sorted({int(hard[j]) for j in points}):
            own = [j for j in points if int(hard[j]) == c]
            index = possible[train.labels.hard()[possible] == c]
            need = together * int(torch.bincount(self.origin).max())
            if len(index) < need:
                raise UserError(
                    f"repair: class {train.classes[c]!r} has too few training images to replace points by",
                    got=f"{len(index)} beside the set's own",
                    expected=f"at least {need}",
                    fix="leave replace out of policies, or lower share",
                )
            scores = donor_scores(self.each, self.settings.inits, own, train.take(index), val).cpu()
            for j, row in zip(own, scores, strict=True):
                found[j] = torch.full((len(train),), -torch.inf).index_put_((index.cpu(),), row.float())
        return found

    def _replaced(self, group: tuple[int, ...], scores: Mapping[int, torch.Tensor]) -> Dataset:
        counts = torch.bincount(self.origin)
        donors = assigned([scores[j] for j in group], [int(counts[j]) for j in group])
        index = torch.tensor([i for own in donors for i in own], device=self.data.device)
        return self._with(members(self.origin, group), self.real.train.images[index])

    def _better(self, group: tuple[int, ...], way: Way) -> Dataset:
        rows = members(self.origin, group)
        size = self.settings.pixel_step * float(self.real.train.images.std())
        return self._with(rows, way.better(self.data, rows, self.settings.pixel_steps, size))
