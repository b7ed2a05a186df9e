"""Influence by the likeness of gradients: at the end, or along the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from distillens.attribution.trained import Trained
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset


@dataclass(frozen=True)
class GradientDot:
    """The product of the two gradients at the trained network.

    Source: Charpiat et al. 2019; the last checkpoint of TracIn (Pruthi et al. 2020).
    """

    damped: ClassVar[bool] = False

    def __call__(self, model: Trained, targets: Dataset) -> torch.Tensor:
        """How much a step along a point's gradient lowers each image's loss, [1, points, m]."""
        moved = model.point_gradients()
        return torch.cat([moved @ z.T for z in model.gradients(targets)], -1)[None]

    def passes(self, model: Trained, targets: int) -> int:
        """Derivatives of one image that it takes."""
        return len(model.data) + targets


@dataclass(frozen=True)
class GradientCosine:
    """The cosine of the two gradients at the trained network: large gradients count no more than small ones.

    Source: Charpiat et al. 2019.
    """

    damped: ClassVar[bool] = False

    def __call__(self, model: Trained, targets: Dataset) -> torch.Tensor:
        """Cosines, [1, points, m]."""
        moved = F.normalize(model.point_gradients(), dim=1)
        return torch.cat([moved @ F.normalize(z, dim=1).T for z in model.gradients(targets)], -1)[None]

    def passes(self, model: Trained, targets: int) -> int:
        """Derivatives of one image that it takes."""
        return len(model.data) + targets


@dataclass(frozen=True)
class TracIn:
    """The products of the two gradients along the way, each times the rate and the steps until the next moment.

    Source: Pruthi et al. 2020, equation 1 in its checkpoint form.
    """

    damped: ClassVar[bool] = False

    def __call__(self, model: Trained, targets: Dataset) -> torch.Tensor:
        """How much the steps along a point's gradient lowered each image's loss, [1, points, m].

        Raises:
            UserError: nothing was kept of the way.
        """
        if len(model.moments) < 2:
            raise UserError(
                "TracIn needs the parameters along the way",
                got=f"{len(model.moments)} moments",
                fix="train with snapshots",
            )
        total = torch.zeros(())
        recipe = model.recipe
        # Momentum m lets a gradient act 1 / (1 - m) times.
        lasting = 1 / (1 - recipe.momentum) if recipe.optimiser == "sgd" else 1.0
        for t, until, flat in zip(model.moments, model.moments[1:], model.snapshots, strict=False):
            moved = model.point_gradients(flat)
            piece = torch.cat([moved @ z.T for z in model.gradients(targets, flat)], -1)
            total = total.to(piece) + lasting * sum(map(recipe.rate, range(t, until))) * piece
        return total[None]

    def passes(self, model: Trained, targets: int) -> int:
        """Derivatives of one image that it takes."""
        return (len(model.moments) - 1) * (len(model.data) + targets)
