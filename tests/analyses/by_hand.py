"""Sets made by hand in the place of distilled ones: nulls of real images, and the mean image of each class."""

from __future__ import annotations

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Problem, Sets
from distillens.core.dataset import Splits
from distillens.core.labels import Hard
from distillens.core.rng import Key
from distillens.distillers.random_subset import RandomSubset


def subset(real: Splits, key: Key, ipc: int = 1) -> DistilledDataset:
    """A random real subset."""
    problem = Problem(real.train, ipc, key)
    return RandomSubset().finish(problem, RandomSubset().start(problem))


def subsets_at(key: Key, real: Splits, count: int, ipc: int) -> tuple[DistilledDataset, ...]:
    """Random real subsets, each with a key of its own below ``key``."""
    return tuple(subset(real, key.fold(r), ipc) for r in range(count))


def subsets_by_number(key: Key, real: Splits, count: int, ipc: int) -> Sets:
    """Random real subsets side by side, each a set of its own, called by its number."""
    return Sets({str(s): (one,) for s, one in enumerate(subsets_at(key, real, count, ipc))})


def class_means(real: Splits) -> DistilledDataset:
    """The mean training image of each class."""
    images = torch.stack([real.train.images[members].mean(0) for members in real.train.by_class])
    return DistilledDataset({"images": images}, Hard(torch.arange(10)), real.train.classes, real.space)
