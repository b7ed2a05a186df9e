"""Orders of a set's points of which the first k are to be the best k, and which class comes when."""

from __future__ import annotations

import torch


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
