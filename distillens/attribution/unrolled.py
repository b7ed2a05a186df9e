"""The derivative of the trained network by each point's weight, through the training itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from distillens.attribution.trained import Trained
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset


@dataclass(frozen=True)
class Unrolled:
    """Forward differentiation of all steps: a tangent [P] a point goes along with the training.

    No optimum is assumed and nothing is damped: it is the slope of leave-one-out at the full weight. A step costs one
    product with the Hessian a point. Full batches, plain SGD or momentum, any schedule.

    Source: the unrolled influence of Bae et al. 2024 (SOURCE) without its approximations; Hara et al. 2019.
    """

    damped: ClassVar[bool] = False

    def __call__(self, model: Trained, targets: Dataset) -> torch.Tensor:
        """The rise of each image's loss when a point is left out, to first order, [1, points, m].

        Raises:
            UserError: the recipe is not one that can be followed, or the start was not kept.
        """
        recipe = model.recipe
        if recipe.optimiser != "sgd" or recipe.augment or recipe.cutmix or recipe.rho:
            raise UserError(
                "unrolled influence follows plain SGD on whole batches",
                got=f"{recipe.optimiser}, augmentation {recipe.augment or 'none'}",
                fix="use another estimator for this recipe",
            )
        if recipe.batch is not None and recipe.batch < len(model.data):
            raise UserError(
                "unrolled influence follows plain SGD on whole batches", got=f"batches of {recipe.batch}"
            )
        if not model.moments or model.moments[0] != 0:
            raise UserError("unrolled influence starts from the initial parameters", fix="keep moment 0")
        tangents = self._tangents(model)
        return torch.cat([-(tangents @ z.T) for z in model.gradients(targets)], -1)[None]

    def passes(self, model: Trained, targets: int) -> int:
        """Derivatives of one image that it takes, a product with a Hessian as two."""
        return model.recipe.steps * len(model.data) * (2 + 2 * model.points) + targets

    def _tangents(self, model: Trained) -> torch.Tensor:
        """The derivative of the final parameters by each point's weight, [points, P]."""
        recipe, flat = model.recipe, model.snapshots[0]

        def loss(parameters: torch.Tensor) -> torch.Tensor:
            logits, _ = model.net.logits(model.shapes.unflatten(parameters), model.buffers, model.data.images)
            return model.data.labels.loss(logits).mean()

        slope = torch.func.grad(loss)
        velocity = torch.zeros_like(flat)
        tangents = flat.new_zeros(model.points, len(flat))
        pushed = torch.zeros_like(tangents)
        for step in range(recipe.steps):
            gradient, back = torch.func.vjp(slope, flat)[:2]
            # The Hessian is its own transpose.
            bent = torch.vmap(back, chunk_size=16)(tangents)[0]
            if recipe.empties_momentum(step):
                velocity, pushed = torch.zeros_like(velocity), torch.zeros_like(pushed)
            decay = recipe.weight_decay
            velocity = recipe.momentum * velocity + gradient + decay * flat
            pushed = recipe.momentum * pushed + bent + decay * tangents + model.point_gradients(flat)
            rate = recipe.rate(step)
            flat = flat - rate * velocity
            tangents = tangents - rate * pushed
        return tangents
