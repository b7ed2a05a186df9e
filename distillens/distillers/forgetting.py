"""Forgetting: real images by how often networks unlearn them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from distillens.core.checks import UserError
from distillens.core.contracts import Problem
from distillens.core.dataset import Dataset
from distillens.distillers._coreset import AUTHORS, Scored, lasting, short_log
from distillens.distillers._pixels import small
from distillens.nets.convnet import ConvNet
from distillens.train import Population


@dataclass(frozen=True)
class Forgetting(Scored):
    """The score of an image is how often a network that had it right has it wrong one pass later.

    What a network never has right counts as forgotten without end: it comes before all that are learned, and the more
    networks never learn it, the earlier. Counts are means over the networks.

    Source: Toneva et al. 2019, algorithm 1. Where we differ: all images are looked at after each pass; the
    authors look at an image whenever it is in a batch, before the step. Images of each class are ranked apart, so that
    classes stay balanced.
    """

    paper: ClassVar[str] = "Toneva et al. 2019"

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> Self:
        """One network over 200 passes; on digits' scale the short trainings of ``el2n``."""
        net = ConvNet.defaults(like)
        if small(like):
            return cls(net=net, **short_log(like))
        # The authors' rate falls to a fifth at three epochs; a cosine is the nearest schedule there is.
        return cls(nets=1, net=net, recipe=lasting(AUTHORS, 200, like).but(schedule="cosine"))

    def scores(self, problem: Problem) -> torch.Tensor:
        """The mean number [n] of times that an image is forgotten.

        Raises:
            UserError: the training is too short for anything to be forgotten.
        """
        log: Population = problem.inputs["log"]
        if len(log.seen_moments) < 2:
            raise UserError(
                f"{self.name}: nothing can be forgotten in less than two passes over the data",
                got=f"{self.recipe.steps} steps of {self.pass_steps(problem.real)} a pass",
                fix="set more --set recipe.steps",
            )
        return events(log.seen["train"], problem.real.labels.hard())

    def work(self, problem: Problem) -> float:
        """None: the training has looked at everything."""
        return 0.0

    def memory(self, problem: Problem) -> float:
        """What one network saw: a byte an image and pass, twice, as of two passes each is compared."""
        passes = self.recipe.steps // self.pass_steps(problem.real)
        return 3.0 * passes * len(problem.real)


def events(seen: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The score [n] from the classes [m, t, n] that m networks predicted at t moments, and the true ones [n].

    With one network: the transitions from right to wrong, t for what was never right: more than can be forgotten.
    Each further network that never learns an image adds so much that it outweighs all counts.
    """
    counts = torch.zeros(len(truth), dtype=torch.float64, device=truth.device)
    never = torch.zeros_like(counts)
    for own in seen:
        right = own.to(truth.device) == truth
        counts += (right[:-1] & ~right[1:]).sum(0)
        never += ~right.any(0)
    return counts / len(seen) + never * seen.shape[1]
