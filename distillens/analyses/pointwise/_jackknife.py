"""The error of a figure that is no mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def pseudo_values(figure: Callable[[torch.Tensor], float], parts: Sequence[torch.Tensor]) -> list[float]:
    """What each part adds to a figure of all: values whose mean has the figure's error (the jackknife).

    ``figure`` is given the items that it may use; ``parts`` are disjoint and hold all items.

    Source: Tukey 1958.
    """
    whole = figure(torch.cat(list(parts)))
    n = len(parts)
    found = []
    for i in range(n):
        rest = torch.cat([part for j, part in enumerate(parts) if j != i])
        found.append(n * whole - (n - 1) * figure(rest))
    return found
