"""TRAK: the network taken as linear in its parameters around the trained ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from distillens.attribution.gradients import logit_jacobians
from distillens.attribution.influence import DAMPINGS
from distillens.attribution.trained import Trained
from distillens.core.dataset import Dataset


@dataclass(frozen=True)
class Trak:
    """Ridge regression on the gradients of each image's margin, by the points' own kernel.

    The margin is log p / (1 - p) of the label. The authors project the gradients at random because they have millions of
    images; of a few distilled points the kernel [points, points] is small, and nothing is projected. Each prediction is
    brought to the scale of the loss, -(1 - p) times that of the margin.

    Source: Park et al. 2023, equation 15; the ridge is ours (without it the kernel of few images is hardly invertible).
    """

    damped: ClassVar[bool] = True
    dampings: tuple[float, ...] = DAMPINGS

    def __call__(self, model: Trained, targets: Dataset) -> torch.Tensor:
        """The rise of each image's loss when a point is left out, [dampings, points, m]."""
        own, doubt = (torch.cat(parts) for parts in zip(*margins(model, model.data), strict=True))
        kernel = own @ own.T
        values, vectors = torch.linalg.eigh(kernel)
        n = len(own)
        scores = []
        for theirs, unsure in margins(model, targets):
            cross = vectors.T @ (own @ theirs.T)  # [n, m]
            by_image = torch.stack(
                [
                    (vectors / (values.clamp(min=0) + n * damping)) @ cross * doubt[:, None] * unsure
                    for damping in self.dampings
                ]
            )
            moved = by_image.new_zeros(len(self.dampings), model.points, len(theirs))
            scores.append(moved.index_add_(1, model.origin, by_image))
        return torch.cat(scores, -1)

    def passes(self, model: Trained, targets: int) -> int:
        """Derivatives of one image that it takes: one a class."""
        return model.data.k * (len(model.data) + targets)


def margins(model: Trained, data: Dataset) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients [n', P] of the margins of the images' labels, and 1 - p [n'], some at a time."""
    start = 0
    hard = data.labels.hard()
    for jacobians, logits in logit_jacobians(model.net, model.shapes, model.final, data, model.buffers):
        rows = torch.arange(len(logits))
        label = hard[start : start + len(logits)]
        start += len(logits)
        p = logits.softmax(-1)
        others = p.clone()
        others[rows, label] = 0
        # d log(p / (1 - p)) by the logits: 1 at the label, minus the others' shares among themselves.
        slope = -others / others.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        slope[rows, label] = 1.0
        yield torch.einsum("nk,nkp->np", slope, jacobians), 1 - p[rows, label]
