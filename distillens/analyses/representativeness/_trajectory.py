"""Real training along which sets are looked at: one population, shared by all analyses of this question.

A trajectory belongs to a replicate: real trajectory j of replicate r starts from the very initialisation of network j that
is trained on replicate r of every set (``train.networks``). So replicates are independent, and a set's model and the real
one beside it are a pair.
"""

from __future__ import annotations

from typing import Any

import torch

from distillens.core.checks import UserError
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Probabilities, Teacher
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK, REPLICATE, Estimate
from distillens.core.rng import Key
from distillens.train import Population, Training, networks

EVERY = 1 << 20  # as ``moments``: after every update, as the paper looks
TRAJECTORIES = 5  # in all, spread over the replicates


def real_recipe(like: Dataset) -> Recipe:
    """How real models are trained: the paper's batches of 256, SGD 0.01 with momentum 0.9, for its 392 updates.

    On digits' scale for 300, where the models are done with the training images.
    """
    steps = 300 if like.shape[1] * like.shape[2] <= 256 else 392
    return Recipe(steps=steps, batch=256)


def replicates(sets: Sets) -> int:
    """The most replicates that any set has."""
    return max(map(len, sets.everything().values()))


def moments_of(steps: int, about: int) -> tuple[int, ...]:
    """About so many numbers of updates from 0 to ``steps``, dense early; all of them where there are no more than ``about``.

    Accuracy and curvature move with the logarithm of the update: the grid does too, from the eighth update on.
    """
    if about > steps:
        return tuple(range(steps + 1))
    if about < 2:
        return (0, steps) if about else (steps,)
    share = torch.arange(about, dtype=torch.float64) / (about - 1)
    grid = 8 * ((1 + steps / 8) ** share - 1)
    return tuple(sorted({*grid.round().long().tolist(), 0, steps}))


def looks_of(kept: tuple[int, ...], about: int) -> tuple[int, ...]:
    """About so many of the kept moments, dense early as ``moments_of``, the first and the last among them."""
    if about >= len(kept):
        return kept
    wanted = moments_of(kept[-1], about)
    return tuple(sorted({kept[0], *(min(kept, key=lambda t: abs(t - moment)) for moment in wanted)}))


def along(
    net: Any, recipe: Recipe, moments: int, trajectories: int, sets: Sets, real: Splits, key: Key
) -> Training:
    """The real trajectories of all replicates, replicate after replicate, with parameters kept at ``moments_of``.

    ``trajectories`` are those in all: each replicate has so many that they come to that or more. The same settings
    give the same training, whoever asks.

    Raises:
        UserError: the network remembers more than its parameters, which are all that is kept of a moment.
    """
    _check_net(net, real)
    count = replicates(sets)
    each = -(-trajectories // count)
    keys = tuple(one for r in range(count) for one in networks(key, r, each))
    return Training(real.train, net, recipe, keys, snapshots=moments_of(recipe.steps, moments))


def by_replicate(population: Population, sets: Sets) -> list[Population]:
    """The trajectories of each replicate, with their snapshots [trajectories, moments, P]."""
    count = replicates(sets)
    each = len(population) // count
    return [population.taken(torch.arange(r * each, (r + 1) * each)) for r in range(count)]


def _check_net(net: Net, real: Splits) -> None:
    """Refuse networks that remember anything beside their parameters: only these are kept along a trajectory.

    Raises:
        UserError: the network has buffers.
    """
    _, buffers = net.init(real.train, Key(0))
    if buffers:
        raise UserError(
            "this network cannot be followed through training",
            got=f"{type(net).__name__}, which remembers {', '.join(sorted(buffers))} beside its parameters",
            expected="a network whose parameters are all that it keeps",
            fix="take another norm than batch",
        )


def shown(data: Dataset) -> Dataset:
    """A set as it is looked at outside of training: a teacher's labels, one a view, as their mean over the views."""
    if not isinstance(data.labels, Teacher):
        return data
    mean = (data.labels.views / data.labels.temperature).softmax(-1).mean(0)
    return Dataset(data.images, Probabilities(mean), data.classes, data.space)


def mean_of_known(values: torch.Tensor) -> Estimate | None:
    """The mean over units of values [replicates, trajectories], those left out that are NaN; None where all are."""
    found = values[0] if len(values) == 1 else values.nanmean(1)
    found = found[~found.isnan()]
    unit = NETWORK if len(values) == 1 else REPLICATE
    return Estimate.mean(found.tolist(), unit) if len(found) else None
