"""Influence functions: how the optimum moves when a point is left out, by the curvature at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from distillens.attribution.gradients import logit_jacobians
from distillens.attribution.trained import Trained
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard, Logits, Probabilities, Targets

LARGEST = 3000  # parameters of which a whole Hessian is taken: 72 MB
DAMPINGS = tuple(10.0**e for e in range(-6, 2))


@dataclass(frozen=True)
class ExactInfluence:
    """By the inverse of the whole damped Hessian, for networks of up to 3,000 parameters.

    Source: Koh and Liang 2017, equation 2.
    """

    damped: ClassVar[bool] = True
    dampings: tuple[float, ...] = DAMPINGS

    def __call__(self, model: Trained, targets: Dataset) -> torch.Tensor:
        """The rise of each image's loss when a point is left out, [dampings, points, m].

        Raises:
            UserError: the network is too large.
        """
        size = model.shapes.size
        if size > LARGEST:
            raise UserError(
                "the exact influence needs the whole Hessian",
                got=f"{size:,} parameters",
                expected=f"up to {LARGEST:,}",
                fix="use gauss_newton, which works on the points instead",
            )
        values, vectors = torch.linalg.eigh(hessian(model))
        moved = model.point_gradients() @ vectors
        scores = []
        for z in model.gradients(targets):
            along = z @ vectors
            scores.append(torch.stack([(moved / (values + damping)) @ along.T for damping in self.dampings]))
        return torch.cat(scores, -1)

    def passes(self, model: Trained, targets: int) -> int:
        """Derivatives of one image that it takes, a product with a Hessian as two."""
        return len(model.data) * (1 + 2 * model.shapes.size) + targets


@dataclass(frozen=True)
class GaussNewton:
    """By the damped generalised Gauss-Newton matrix, inverted among the images instead of the parameters.

    With B [n k, P] the images' logit derivatives times the root of the loss's curvature, the matrix is B'B / n, and

        (B'B / n + d)^-1 = (1 - B' (n d + B B')^-1 B) / d.

    A system of as many unknowns as images times classes: for a few distilled points and any number of parameters. Of a
    convex loss of linear logits it is exact. ``layers`` says whether all parameters are seen or the last layer's alone.

    Source: Koh and Liang 2017 for the influence; Martens 2020, section 8, for the matrix; the dual is Woodbury's identity.
    """

    damped: ClassVar[bool] = True
    dampings: tuple[float, ...] = DAMPINGS
    layers: Literal["all", "last"] = "all"

    def __call__(self, model: Trained, targets: Dataset) -> torch.Tensor:
        """The rise of each image's loss when a point is left out, [dampings, points, m]."""
        columns = model.last_layer if self.layers == "last" else slice(None)
        rows = torch.cat([piece[:, columns] for piece in curved_rows(model)])
        n = len(model.data)
        kernel = rows @ rows.T
        squares, left = torch.linalg.eigh(kernel)
        real = squares > squares[-1] * len(squares) * torch.finfo(squares.dtype).eps
        squares, left = squares[real], left[:, real]
        # The right singular vectors of B, one a column: what the matrix does not see is damped alone.
        right = rows.T @ (left / squares.sqrt())
        moved = model.point_gradients()[:, columns]
        inside = moved @ right
        scores = []
        for piece in model.gradients(targets):
            z = piece[:, columns]
            along, plain = z @ right, moved @ z.T
            scores.append(
                torch.stack(
                    [
                        (plain - (inside * (squares / (n * damping + squares))) @ along.T) / damping
                        for damping in self.dampings
                    ]
                )
            )
        return torch.cat(scores, -1)

    def passes(self, model: Trained, targets: int) -> int:
        """Derivatives of one image that it takes."""
        return len(model.data) * (1 + model.data.k) + targets


@dataclass(frozen=True)
class ConjugateGradient:
    """As ``GaussNewton``, by conjugate gradients on products with the matrix: nothing as large as B is held.

    ``tolerance`` is the residual's length, relative to the start, at which a system counts as solved.

    Source: Martens 2010; Koh and Liang 2017, section 3.
    """

    damped: ClassVar[bool] = True
    dampings: tuple[float, ...] = (1e-2,)
    steps: int = 200
    tolerance: float = 1e-8

    def __call__(self, model: Trained, targets: Dataset) -> torch.Tensor:
        """The rise of each image's loss when a point is left out, [dampings, points, m]."""
        moved = model.point_gradients()
        product = gauss_newton_product(model)
        solved = [_solve(product, damping, moved, self.steps, self.tolerance) for damping in self.dampings]
        pieces = [torch.stack([x @ z.T for x in solved]) for z in model.gradients(targets)]
        return torch.cat(pieces, -1)

    def passes(self, model: Trained, targets: int) -> int:
        """Derivatives of one image that it takes at most, a product with the matrix as two."""
        return len(model.data) * (1 + 2 * self.steps * len(self.dampings) * model.points) + targets


def _solve(
    product: Callable[[torch.Tensor], torch.Tensor],
    damping: float,
    right: torch.Tensor,
    steps: int,
    tolerance: float,
) -> torch.Tensor:
    """Solutions [points, P] of (matrix + damping) x = ``right``, all right-hand sides at once."""
    solution = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    length = residual.square().sum(1)
    goal = tolerance**2 * length
    for _ in range(steps):
        if bool((length <= goal).all()):
            break
        image = product(direction) + damping * direction
        step = length / (direction * image).sum(1).clamp(min=torch.finfo(length.dtype).tiny)
        solution += step[:, None] * direction
        residual -= step[:, None] * image
        new = residual.square().sum(1)
        direction = residual + (new / length.clamp(min=torch.finfo(length.dtype).tiny))[:, None] * direction
        length = new
    return solution


def hessian(model: Trained) -> torch.Tensor:
    """The Hessian [P, P] of the mean loss and of weight decay."""

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        logits, _ = model.net.logits(model.shapes.unflatten(parameters), model.buffers, model.data.images)
        return model.data.labels.loss(logits).mean()

    back = torch.func.vjp(torch.func.grad(loss), model.final)[1]
    eye = torch.eye(model.shapes.size, dtype=model.final.dtype, device=model.final.device)
    rows = torch.cat([torch.vmap(back)(piece)[0] for piece in torch.split(eye, 64)])
    return (rows + rows.T) / 2 + model.recipe.weight_decay * eye


def curved_rows(model: Trained) -> Iterator[torch.Tensor]:
    """The rows of B, some images at a time [n' k, P]: B'B is n times the Gauss-Newton matrix of the mean loss.

    Weight decay is not in it.
    """
    for jacobians, logits in logit_jacobians(model.net, model.shapes, model.final, model.data, model.buffers):
        yield torch.einsum("nkc,nkp->ncp", root(model.data, logits), jacobians).flatten(0, 1)


def root(data: Dataset, logits: torch.Tensor) -> torch.Tensor:
    """A root S [n, k, k] of the loss's curvature in the logits, S S' = diag(p) - p p'; the identity for squared error."""
    n, k = logits.shape
    if isinstance(data.labels, Targets):
        return torch.eye(k, dtype=logits.dtype, device=logits.device).expand(n, k, k)
    if not isinstance(data.labels, Hard | Probabilities | Logits):
        raise UserError(
            "the Gauss-Newton matrix of these labels is not known",
            got=data.labels.kind,
            expected="hard, probabilities, logits or targets",
        )
    p = logits.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]


def gauss_newton_product(model: Trained) -> Callable[[torch.Tensor], torch.Tensor]:
    """The products [points, P] of vectors with the Gauss-Newton matrix of the mean loss, by derivatives alone."""

    def logits_at(parameters: torch.Tensor) -> torch.Tensor:
        logits, _ = model.net.logits(model.shapes.unflatten(parameters), model.buffers, model.data.images)
        return logits

    logits, back = torch.func.vjp(logits_at, model.final)[:2]
    # Forward products by two backward ones: back is linear, and its own transpose is what is wanted.
    forward = torch.func.vjp(lambda u: back(u)[0], torch.zeros_like(logits))[1]
    half = root(model.data, logits)

    def one(vector: torch.Tensor) -> torch.Tensor:
        (moved,) = forward(vector)
        curved = torch.einsum("nkc,njc,nj->nk", half, half, moved)
        found: torch.Tensor = back(curved)[0]
        return found / len(logits)

    return torch.vmap(one, chunk_size=16)
