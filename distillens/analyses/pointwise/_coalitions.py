"""Training on some of a set's points only: shared by the analyses that decide on the way which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Net
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.train import Training, on


def with_only(
    distilled: DistilledDataset,
    coalitions: Sequence[torch.Tensor],
    net: Net,
    recipe: Recipe,
    keys: Sequence[Key],
) -> Training:
    """One network for each coalition (some points' numbers, one at least) and its key, on full batches.

    By subsets: a small coalition costs little. A set of ordered steps takes example weights, which skip what is left out.
    """
    origin = distilled.decode.origin(distilled.stored)
    inside = [torch.isin(origin, coalition.to(origin.device)) for coalition in coalitions]
    whole = on(distilled, net, recipe.but(batch=None), tuple(keys))
    if distilled.order is not None:
        return replace(whole, weights=torch.stack(inside).float())
    return replace(whole, subsets=tuple(one.nonzero().flatten() for one in inside))
