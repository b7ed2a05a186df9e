"""Which words stand more often among a point's most helped images than in its class: the tails, and which are findings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


def tails(size: int, base: torch.Tensor, top: int) -> torch.Tensor:
    """For each word [words, 1 + top]: how likely ``top`` of ``size`` images have 0, 1, ... or more of the ``base`` [words] that have it."""
    return torch.tensor([_tail(size, having, top) for having in base.tolist()], dtype=torch.float64)


@lru_cache(maxsize=10_000)
def _tail(size: int, having: int, top: int) -> tuple[float, ...]:
    from scipy.stats import hypergeom

    one_less = np.arange(-1, top)  # more than that: as many, or more
    return tuple(np.minimum(1.0, hypergeom.sf(one_less, size, having, top)).tolist())


def findings(tail: torch.Tensor, tested: torch.Tensor, rate: float) -> torch.Tensor:
    """Which tails [..., P, words] are findings: Benjamini and Hochberg 1995 over the ``tested`` [P, words] ones."""
    ordered = torch.from_numpy(
        np.sort(tail[..., tested].numpy(), axis=-1)
    )  # several times as fast as torch's
    m = ordered.shape[-1]
    within = ordered * (m / torch.arange(1, m + 1, dtype=tail.dtype)) <= rate
    # The rule steps up: all tails up to the largest one that is within are findings, whether each is or not.
    bound = torch.where(within, ordered, -1.0).amax(-1) if m else tail.new_full(tail.shape[:-2], -1.0)
    return tested & (tail <= bound[..., None, None])


@dataclass(frozen=True)
class Enrichment:
    """The tails of all points and words by their counts, and which of them can be found at all."""

    table: torch.Tensor  # [P, words, 1 + top]
    tested: torch.Tensor  # [P, words]
    rate: float

    @staticmethod
    def of(
        sizes: torch.Tensor, base: torch.Tensor, labels: torch.Tensor, top: int, rate: float
    ) -> Enrichment:
        """The tests of points with ``labels`` [P], of classes of ``sizes`` [k] images of which ``base`` [k, words] have a word.

        A word is tested where the fullest list would have a tail of at most ``rate``: Tarone 1990; the margins alone decide.
        """
        by_class = {c: tails(int(sizes[c]), base[c], top) for c in sorted(set(labels.tolist()))}
        table = torch.stack([by_class[c] for c in labels.tolist()])
        most = base[labels].clamp(max=top)
        fullest = table.gather(2, most[..., None])[..., 0]
        return Enrichment(table, (fullest <= rate) & (most > 0), rate)

    def tail(self, counts: torch.Tensor) -> torch.Tensor:
        """The tails [..., P, words] of counts."""
        return self.table.expand(*counts.shape, -1).gather(-1, counts[..., None])[..., 0]

    def found(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For counts [HALVES, ..., P, words]: the findings of all initialisations, and those that both halves have too."""
        of_all, first, second = (self.tail(part) for part in counts)
        found = findings(of_all, self.tested, self.rate)
        return found, found & (first <= self.rate) & (second <= self.rate)

    def strongest(self, counts: torch.Tensor) -> torch.Tensor:
        """The points [P] in the order of their smallest tails, for counts [P, words]; findings or not."""
        smallest = self.tail(counts).masked_fill(~self.tested, 1.0).min(1).values
        return smallest.argsort(stable=True)
