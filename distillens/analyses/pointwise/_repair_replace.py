"""Repair by replacement: how good each real image is in a point's place, and which point gets which."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distillens.analyses.pointwise._gradients import along, mean_gradients
from distillens.core.dataset import Dataset
from distillens.train import Population


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
