"""What is found when the images of a class have exchanged their attributes: the null of all findings of a set."""

from __future__ import annotations

import torch

from distillens.analyses.pointwise._enrichment import Enrichment
from distillens.analyses.pointwise._most_helped import HALVES, OfClass
from distillens.core.rng import Key

CELLS = 1 << 19  # counts of shuffles held at once: 4 MiB


def shuffled(parts: tuple[OfClass, ...], tests: Enrichment, shuffles: int, key: Key) -> torch.Tensor:
    """What each of the shuffles finds [shuffles, 3]: findings, points with one, findings that repeat; int32.

    An image takes all words of another of its class, and all points look at the same shuffle: their lists, how these overlap,
    and the words that go together stay as they are.
    """
    orders = [key.fold("shuffle", part.c).uniform(shuffles, len(part.words)).argsort(1) for part in parts]
    found = torch.zeros(shuffles, 3, dtype=torch.int32)
    together = max(1, CELLS // (len(HALVES) * tests.tested.numel()))
    for chunk in torch.split(torch.arange(shuffles), together):
        counts = torch.zeros(len(HALVES), len(chunk), *tests.tested.shape, dtype=torch.long)
        for part, order in zip(parts, orders, strict=True):
            moved = part.words[order[chunk]]
            counts[:, :, part.points] = torch.einsum("hpn,snw->hspw", part.listed, moved).long()
        of_all, repeated = tests.found(counts)
        each = [of_all.sum((1, 2)), of_all.any(2).sum(1), repeated.sum((1, 2))]
        found[chunk] = torch.stack(each, 1).int()
    return found
