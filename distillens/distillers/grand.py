"""GraNd: real images by the length of the gradient that they give networks early in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from distillens import cost
from distillens.core.checks import one_of
from distillens.core.contracts import Buffers, Net, Params, Problem
from distillens.core.dataset import Dataset
from distillens.distillers._coreset import Scored, passing, short_log, together
from distillens.distillers._pixels import small
from distillens.nets.convnet import ConvNet

GRADIENTS = 256 << 20  # bytes of single images' gradients and graphs that are held together


@dataclass(frozen=True)
class GraNd(Scored):
    """The score of an image is E ||gradient of its loss||_2 over networks at or near the start of training.

    ``parameters`` are those that the gradient is taken in: all of them (exact, one gradient an image), or those of
    the last layer, where its length is ||softmax(f(x)) - y|| sqrt(||h||^2 + 1) for a last hidden layer h.
    ``recipe.steps=0`` takes networks at initialisation.

    Source: Paul et al. 2021, definition 2.1. DeepCore's code takes the last layer. Where we differ: by default the
    networks are those of ``el2n``, after a short training: Kirsch 2023 could not confirm what the paper found at
    initialisation. Images of each class are ranked apart, so that classes stay balanced.
    """

    paper: ClassVar[str] = "Paul et al. 2021"

    parameters: Literal["all", "last_layer"] = "all"

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> GraNd:
        """As ``el2n``; all parameters on digits' scale, the last layer's above: one gradient an image takes hours there."""
        parameters: Literal["all", "last_layer"] = "all" if small(like) else "last_layer"
        return cls(net=ConvNet.defaults(like), parameters=parameters, **short_log(like))

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("parameters", self.parameters, ("all", "last_layer"))

    def scores(self, problem: Problem) -> torch.Tensor:
        """The mean length [n] of the gradient."""

        def whole(params: Params, buffers: Buffers, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return gradient_lengths(self.net, params, buffers, x, y)

        def last(params: Params, buffers: Buffers, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                features = self.net.features(params, buffers, x)[0]
                return last_layer_lengths(features, self.net.logits(params, buffers, x)[0], y)

        if self.parameters == "last_layer":
            return self.averaged(problem, last, together(problem.real))
        return self.averaged(problem, whole, max(1, int(GRADIENTS / self._each(problem))))

    def _each(self, problem: Problem) -> float:
        """Bytes of one image's graph and gradient, which is there twice while its length is taken."""
        one = cost.cost(self.net, problem.real)
        return one.first + 2 * cost.FLOAT * one.parameters

    def work(self, problem: Problem) -> float:
        """Forward and backward of every image under each network, or two looks where the last layer does."""
        each = 2.0 if self.parameters == "last_layer" else 3.0
        return each * self.nets * len(problem.real)

    def memory(self, problem: Problem) -> float:
        """Gradients of a few images, or images that pass through without a graph."""
        n = len(problem.real)
        if self.parameters == "last_layer":
            return passing(self.net, problem.real, n)
        each = self._each(problem)
        return min(n, max(1.0, GRADIENTS // each)) * each


def gradient_lengths(
    net: Net, params: Params, buffers: Buffers, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """The length [n] of the gradient in all parameters of each image's own loss, by one backward of all.

    In evaluation mode: an image's gradient is its own, whatever stands beside it.
    """

    def loss(p: Params, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(net.logits(p, buffers, image[None])[0], label[None])

    gradients: Params = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def last_layer_lengths(features: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The length [n] of the gradient in weight and bias of a last linear layer, from features [n, d], logits [n, k]."""
    error = logits.softmax(1) - F.one_hot(y, logits.shape[1]).to(logits)
    found: torch.Tensor = error.norm(dim=1) * (features.square().sum(1) + 1).sqrt()
    return found
