"""A random real subset: the baseline that every figure stands beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distillens.core.contracts import Problem
from distillens.core.dataset import Dataset
from distillens.distillers._coreset import Coreset
from distillens.distillers._pixels import choose


@dataclass(frozen=True)
class RandomSubset(Coreset):
    """``ipc`` real images of each class, uniform without replacement."""

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> RandomSubset:
        """There is nothing to set."""
        return cls()

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def choose(self, problem: Problem) -> torch.Tensor:
        """The first images of a random permutation of each class."""
        return choose(problem, problem.key.fold("init"))

    def work(self, problem: Problem) -> float:
        """None."""
        return 0.0

    def memory(self, problem: Problem) -> float:
        """None."""
        return 0.0
