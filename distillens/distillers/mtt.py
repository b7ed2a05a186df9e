"""MTT, matching training trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Log, Problem, State
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import small
from distillens.distillers._trajectory import MTT_ROWS, Matching, quick, row
from distillens.nets.convnet import ConvNet


@dataclass(frozen=True)
class MTT(Matching):
    """A network trained on the distilled set is led along the way of networks trained on real data.

    From an expert's parameters after t < T+ passes a student takes N steps of SGD on the distilled set:
    loss = ||student_{t+N} - expert_{t+M}||^2 / ||expert_t - expert_{t+M}||^2. Images and step size are learned.

    The experts are trainings of the real data, kept after each of their first T+ - 1 + M passes only.
    The learned step size stays positive: a step of its SGD never takes off more than half of it.

    Source: Cazenavette et al. 2022, equation 2, algorithm 1; ``distill.py``, ``buffer.py``. Where we differ: the
    exact adjoint stands in for the full graph on large images (the same gradient in constant memory), experts stop
    where they are last used, the learned step size is kept with the set.
    """

    paper: ClassVar[str] = "Cazenavette et al. 2022"

    mode: Literal["graph", "adjoint"] = "adjoint"

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> MTT:
        """The authors' rows by data and images a class; on digits' scale a short version."""
        net = ConvNet.defaults(like)
        if small(like):
            return cls(mode="graph", net=net, **quick(ipc))
        return cls(net=net, **row(like, ipc, MTT_ROWS))

    @property
    def way(self) -> Literal["graph", "adjoint"]:
        """As set."""
        return self.mode

    @property
    def expert_recipe(self) -> Recipe:
        """Plain SGD."""
        return self.plain_experts

    def start(self, problem: Problem) -> State:
        """The initial images and step size."""
        return self.begun(problem)

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """One stretch of one expert is matched."""
        key = problem.key.fold("step", i)
        stretch = self.stretch(problem, key, 0, self.max_start_epoch)
        rate = float(state.values["rate"])
        return self.after(state, self.matched(problem, key, stretch, rate, [state.tensors["images"]]))

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The images, with the learned step size."""
        return self.set_of(problem, state.tensors["images"], state)
