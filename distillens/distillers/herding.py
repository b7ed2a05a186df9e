"""Herding: real images whose mean feature follows the class mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from distillens import cost
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Log, Net, Problem, State
from distillens.core.dataset import Dataset, check_per_class
from distillens.core.recipe import Recipe
from distillens.distillers._pixels import finished, small
from distillens.nets.convnet import ConvNet
from distillens.train import Population, Training


@dataclass(frozen=True)
class Herding:
    """Greedy choice, class by class: the next image minimises ||mu_c - mean(chosen and it)||.

    Features are the last hidden layer of one network trained on the real data.

    Source: Welling 2009; Rebuffi et al. 2017. DeepCore's code takes the maximum where the rule needs the
    minimum; here it is the minimum.
    """

    paper: ClassVar[str] = "Welling 2009"
    family: ClassVar[str] = "coreset"
    selects: ClassVar[bool] = True
    soft_labels: ClassVar[bool] = False
    learns_lr: ClassVar[bool] = False
    needs_experts: ClassVar[bool] = False
    steps: ClassVar[int] = 0

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=2000, batch=256)

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> Herding:
        """An embedding that is trained for about ten passes."""
        steps = 100 if small(like) else 2000
        return cls(ConvNet.defaults(like), Recipe(steps=steps, batch=256))

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """One network trained on the real data."""
        return {
            "embedding": Training(problem.real, self.net, self.recipe, (problem.shared.fold("embedding"),))
        }

    def start(self, problem: Problem) -> State:
        """The chosen indices.

        Raises:
            UserError: a class has fewer images than were asked for.
        """
        check_per_class(problem.real, problem.ipc)
        embedding: Population = problem.inputs["embedding"]
        params = embedding.shapes.unflatten(embedding.final[0])
        buffers = {name: value[0] for name, value in embedding.buffers.items()}
        chosen = []
        for members in problem.by_class:
            with torch.no_grad():
                features = self.net.features(params, buffers, problem.real.images[members])[0].double()
            chosen.append(members[herd(features, problem.ipc)])
        return State({"index": torch.cat(chosen)})

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """Nothing is left to do."""
        return state, {}

    def work(self, problem: Problem) -> float:
        """One look at every image."""
        return float(len(problem.real))

    def memory(self, problem: Problem) -> float:
        """A class passing through the network without a graph."""
        largest = max(map(len, problem.by_class))
        return largest * cost.cost(self.net, problem.real).first / 3

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The chosen images."""
        return finished(problem, problem.real.images[state.tensors["index"]])


def herd(features: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [count] of the greedy choice from features [n, d]."""
    centre = features.mean(0)
    total = torch.zeros_like(centre)
    free = torch.ones(len(features), dtype=torch.bool)
    chosen = []
    for size in range(1, count + 1):
        distance = (centre - (total + features) / size).norm(dim=1)
        distance[~free] = torch.inf
        best = int(distance.argmin())
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return torch.tensor(chosen)
