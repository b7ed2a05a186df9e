"""What stands beside sets along real training, what is asked there of a network, and when something has happened.

A set may hold training images, or images made from them: networks trained on all of these know them better than any that
they have not seen. So what a set has beyond real images is held against both kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.result import Estimate, units
from distillens.core.rng import Key
from distillens.train import Population

TEST = "real, test split"
UNSEEN = "real, unseen"
SEEN = "real, seen"  # random training images
TOGETHER = 1 << 24  # logits held at a time, as numbers


def unseen(sets: Sets, real: Splits, key: Key) -> tuple[Dataset, ...]:
    """Random real images that no trajectory was trained on, as many a class as a set holds, for each replicate.

    Cut from the validation split; all there are of a class that has fewer.
    """
    return _drawn(sets, real.val, key.fold("unseen"))


def seen(sets: Sets, real: Splits, key: Key) -> tuple[Dataset, ...]:
    """Random training images, as many a class as a set holds, for each replicate."""
    return _drawn(sets, real.train, key.fold("seen"))


def _drawn(sets: Sets, data: Dataset, key: Key) -> tuple[Dataset, ...]:
    replicates = sets.everything().values()
    per_class = max(1, round(next(iter(replicates))[0].ipc))
    return tuple(data.take(data.drawn(per_class, key.fold(r))) for r in range(max(map(len, replicates))))


def of_test(real: Splits, count: int, key: Key) -> Dataset:
    """So many random test images, or all there are."""
    if count >= len(real.test):
        return real.test
    return real.test.take(key.fold("tested").permutation(len(real.test))[:count].sort().values)


def answers(
    population: Population, data: Dataset, moments: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the networks answer at each moment: their classes and their log probability of the label, [m, t, n].

    The label is the likeliest class, so that sets with soft labels are asked the same as others.
    """
    labels = data.labels.hard()
    places = [population.moments.index(moment) for moment in moments]
    together = max(1, TOGETHER // (len(data) * data.k))
    predicted, sure = [], []
    for j in range(len(population)):
        one = population.taken(torch.tensor([j]))
        for part in torch.split(torch.tensor(places), together):
            logits = one.logits(data, one.snapshots[0, part])
            predicted.append(logits.argmax(-1).cpu())
            wanted = labels.expand(logits.shape[:-1])[..., None]
            sure.append(F.log_softmax(logits.double(), -1).gather(-1, wanted)[..., 0].cpu())
    shape = (len(population), len(places), len(data))
    return torch.cat(predicted).view(shape), torch.cat(sure).view(shape)


def first_at(values: torch.Tensor, level: torch.Tensor | float, moments: Sequence[int]) -> torch.Tensor:
    """When values [..., t] first are at ``level`` [...] or above, as log(1 + updates); infinite where never.

    Between two moments in proportion, along the logarithm.
    """
    logs = torch.tensor(moments, dtype=torch.float64).log1p()
    level = torch.as_tensor(level, dtype=torch.float64).expand(values.shape[:-1])
    at = values >= level[..., None]
    here = at.int().argmax(-1)
    before = (here - 1).clamp(min=0)
    low, high = (values.gather(-1, i[..., None])[..., 0] for i in (before, here))
    part = torch.where(here > 0, (level - low) / (high - low), 0.0)
    age = logs[before] + part * (logs[here] - logs[before])
    return torch.where(at.any(-1), age, math.inf)


def updates(logs: torch.Tensor, last: int) -> Estimate:
    """The geometric mean moment, in updates, of logs [replicates, trajectories] of 1 + updates (infinite: never).

    What never came counts as the last moment, and the interval is then open above.
    """
    values, unit = units(logs.clamp(max=math.log1p(last)))
    mean = Estimate.mean(values, unit)
    low, high = (math.expm1(x) if x < 700 else math.inf for x in (mean.low, mean.high))
    if bool(logs.isinf().any()):
        high = math.inf
    return Estimate(math.expm1(mean.value), max(0.0, low), high, mean.n, unit)


def sooner(first: torch.Tensor, second: torch.Tensor, last: int) -> Estimate:
    """The mean of one log moment minus another, [replicates, trajectories] each, paired; never counts as the last.

    So it speaks of moments up to the last one, as a restricted mean of survival times does, and nothing is dropped.
    """
    pairs = min(len(first), len(second))
    most = math.log1p(last)
    values, unit = units(first[:pairs].clamp(max=most) - second[:pairs].clamp(max=most))
    return Estimate.mean(values, unit)
