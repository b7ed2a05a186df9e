"""A random real subset: the baseline that every figure stands beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.distillers._pixels import choose, finished


@dataclass(frozen=True)
class RandomSubset:
    """``ipc`` real images of each class, uniform without replacement."""

    paper: ClassVar[str] = ""
    family: ClassVar[str] = "coreset"
    selects: ClassVar[bool] = True
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False
    steps: ClassVar[int] = 0

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> RandomSubset:
        """There is nothing to set."""
        return cls()

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def start(self, problem: Problem) -> State:
        """The chosen indices."""
        return State({"index": choose(problem, problem.key.fold("init"))})

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """Nothing is left to do."""
        return state, {}

    def work(self, problem: Problem) -> float:
        """None."""
        return 0.0

    def memory(self, problem: Problem) -> float:
        """None."""
        return 0.0

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The chosen images."""
        return finished(problem, problem.real.images[state.tensors["index"]])
