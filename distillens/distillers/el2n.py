"""EL2N: real images by the error that networks make on them early in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from distillens.core.contracts import Buffers, Params, Problem
from distillens.distillers._coreset import Scored, passing, together


@dataclass(frozen=True)
class EL2N(Scored):
    """The score of an image is E ||softmax(f(x)) - y||_2 over networks after a short training.

    As published the largest are kept, which prunes large sets with little loss. At a few images a class these teach
    less than random ones; the smallest teach more at one image a class, but are too much alike at ten.

    Source: Paul et al. 2021, definition 2.3; ten networks after 20 passes. Where we differ: images of each class are
    ranked apart, so that classes stay balanced; the network is the field's ConvNet.
    """

    paper: ClassVar[str] = "Paul et al. 2021"

    def scores(self, problem: Problem) -> torch.Tensor:
        """The mean length [n] of the error."""

        def error(params: Params, buffers: Buffers, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return lengths(self.net.logits(params, buffers, x)[0], y)

        return self.averaged(problem, error, together(problem.real))

    def work(self, problem: Problem) -> float:
        """One look of each network at every image."""
        return float(self.nets * len(problem.real))

    def memory(self, problem: Problem) -> float:
        """Images that pass through a network without a graph."""
        return passing(self.net, problem.real, len(problem.real))


def lengths(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """||softmax - y|| [n] for logits [n, k] and classes [n]."""
    error: torch.Tensor = logits.softmax(1) - F.one_hot(y, logits.shape[1]).to(logits)
    length: torch.Tensor = error.norm(dim=1)
    return length
