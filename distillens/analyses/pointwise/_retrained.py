"""Retraining without some points, and what that moves: shared by all analyses of this question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import RANDOM, Net, Sets
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.train import Population, Training, on

REPLICATE = (
    0  # the replicate of each set whose points are looked at: points of two replicates have nothing in common
)


def chosen(sets: Sets, only: Sequence[str], asks: str) -> dict[str, DistilledDataset]:
    """The sets whose points are looked at, by name, with the random real subset; only those named where any is.

    Raises:
        UserError: a name is not there (``asks`` is the analysis that says so), or a set has a single point.
    """
    names = [*sets.distilled, *([RANDOM] if sets.random else [])]
    for name in only:
        if name not in names:
            raise UserError(f"{asks}: there is no set {name!r}", expected=", ".join(names))
    found = {name: sets.everything()[name][REPLICATE] for name in names if not only or name in only}
    if any(len(one) < 2 for one in found.values()):
        raise UserError(f"{asks}: a set of one point leaves nothing to train on")
    return found


def without(
    distilled: DistilledDataset,
    groups: Iterable[Sequence[int]],
    net: Net,
    recipe: Recipe,
    inits: int,
    key: Key,
) -> Training:
    """Networks trained without each group of points in turn, group after group, for each initialisation [inits, groups].

    An empty group leaves nothing out. Full batches; those of one initialisation start from the same parameters.
    """
    origin = distilled.decode.origin(distilled.stored)
    rows = []
    for group in groups:
        left_out = torch.isin(origin, torch.tensor(list(group), dtype=origin.dtype))
        rows.append((~left_out).float())
    keys = tuple(key.fold("init", s) for s in range(inits) for _ in rows)
    return on(distilled, net, recipe.but(batch=None), keys, weights=torch.stack(rows).repeat(inits, 1))


def without_each(distilled: DistilledDataset, net: Net, recipe: Recipe, inits: int, key: Key) -> Training:
    """Networks trained with all points, then without each in turn, for each initialisation [inits, 1 + points]."""
    groups = [(), *((j,) for j in range(len(distilled)))]
    return without(distilled, groups, net, recipe, inits, key)


def again(distilled: DistilledDataset, net: Net, recipe: Recipe, inits: int, key: Key) -> Training:
    """Networks trained with all points once more, [inits], each point counted three times: the same mean, other rounding.

    How far their losses are from those of the first training is what rounding alone does over a whole training.
    """
    images = len(distilled.decode.origin(distilled.stored))
    keys = tuple(key.fold("init", s) for s in range(inits))
    return on(distilled, net, recipe.but(batch=None), keys, weights=torch.full((inits, images), 3.0))


def moved_losses(population: Population, inits: int, data: Dataset) -> torch.Tensor:
    """By how much each image's loss is higher without a group than with all points, [inits, groups, n].

    Positive where the group helps. The first group is the empty one and is taken off.
    """
    losses = population.losses(data).view(inits, -1, len(data))
    return losses[:, 1:] - losses[:, :1]


def moved_hits(population: Population, inits: int, data: Dataset) -> torch.Tensor:
    """Whether each image is right with all points and wrong without a group (1), or the reverse (-1): [inits, groups, n], int8."""
    hits = (population.predictions(data) == data.labels.hard()).to(torch.int8).view(inits, -1, len(data))
    return hits[:, :1] - hits[:, 1:]


def first_copy(distilled: DistilledDataset) -> torch.Tensor:
    """For each point the first image that it decodes to."""
    origin = distilled.decode.origin(distilled.stored)
    return torch.stack([(origin == j).nonzero()[0, 0] for j in range(len(distilled))])
