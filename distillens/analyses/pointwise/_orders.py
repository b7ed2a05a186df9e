"""Orders of a set's points of which the first k are to be the best k, and which class comes when."""

from __future__ import annotations

import torch

from distillens.analyses.pointwise._repair_relabel import as_table
from distillens.core.artefact import DistilledDataset
from distillens.core.dataset import Dataset
from distillens.core.labels import Targets
from distillens.train import Population

ORDERS = ("by ridge regression", "by influence")  # the orders that are tried; random ones follow


def in_rounds(values: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The points from the largest value to the least, every class once before any twice, and so on [P]."""
    order = values.argsort(descending=True, stable=True)
    seen: dict[int, int] = {}
    rounds = []
    for c in classes[order].tolist():
        rounds.append(seen.get(c, 0))
        seen[c] = rounds[-1] + 1
    return order[torch.tensor(rounds).argsort(stable=True)]


def by_ridge(
    points: torch.Tensor,
    targets: torch.Tensor,
    classes: torch.Tensor,
    val: torch.Tensor,
    truth: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    """The order [P] in which each point is the one that lowers a ridge regression's validation error most, in rounds.

    ``points`` [P, d] and ``val`` [n, d] are features, ``targets`` [P, k] and ``truth`` [n, k] what to predict from them,
    without an intercept; ``ridge`` is the penalty. Every class comes once before any twice. The regression is never fitted
    again: adding a point is one step of Gaussian conditioning, and its effect on the error is known for all at once.
    """
    kernel = points @ points.T  # covariances given the points so far: among points,
    cross = points @ val.T  # and with validation images
    left, error = targets.clone(), truth.clone()  # residuals of points [P, k], of validation images [n, k]
    waiting = torch.ones(len(points), dtype=torch.bool)
    count = torch.zeros(int(classes.max()) + 1, dtype=torch.int64)
    order = []
    for _ in range(len(points)):
        now = count[classes][waiting].min()
        allowed = waiting & (count[classes] == now)
        share = 1 / (kernel.diagonal() + ridge)
        gain = 2 * share * ((cross @ error) * left).sum(1)
        gain -= share.square() * cross.square().sum(1) * left.square().sum(1)
        j = int(torch.where(allowed, gain, -torch.inf).argmax())
        order.append(j)
        waiting[j] = False
        count[classes[j]] += 1
        with_j, with_val, own = kernel[j].clone(), cross[j].clone(), left[j].clone()
        error -= share[j] * with_val[:, None] * own
        left -= share[j] * with_j[:, None] * own
        kernel -= share[j] * with_j[:, None] * with_j
        cross -= share[j] * with_j[:, None] * with_val
    return torch.tensor(order)


def by_features(one: DistilledDataset, whole: Population, val: Dataset, ridge: float) -> torch.Tensor:
    """The order by ridge regression on the features of networks trained on all points of a set, [P]."""
    data, origin = one.dataset(), one.decode.origin(one.stored)
    parts = []
    for own, unseen in zip(whole.features(data), whole.features(val), strict=True):
        # Every network counts the same, and the penalty is a share of a mean squared length of 1.
        scale = (own.square().sum(1).mean() * len(whole)).clamp(min=1e-12).sqrt()
        by_point = own.new_zeros(len(one), own.shape[1]).index_add_(0, origin, own)
        parts.append((by_point / torch.bincount(origin)[:, None] / scale, unseen / scale))
    points, validation = (torch.cat(side, 1) for side in zip(*parts, strict=True))
    k = data.k
    targets, truth = (as_table(labels, k).cpu().double() for labels in (one.labels, val.labels))
    if not isinstance(one.labels, Targets):
        targets = targets - 1 / k
    return by_ridge(points, targets, one.labels.hard().cpu(), validation, truth - 1 / k, ridge)
