"""Two pools of real models, early-stopped and subset-trained, and how far another model agrees with each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distillens.core.result import Estimate

# Ways to count agreement, in the order of every table of agreements.
KINDS = ("all images", "beyond chance", "common errors")


def compact(predicted: torch.Tensor, k: int) -> torch.Tensor:
    """Predicted classes in as few bytes as k classes need: pools of hundreds of models are held at once."""
    return predicted.to(torch.uint8 if k <= 256 else torch.int16).cpu()


def agreements(mine: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """How far one model's classes [n] agree with those of m others [m, n], in each of ``KINDS`` [kinds, m].

    *All images*: the share of images with the same class. *Beyond chance*: Cohen's kappa, (share - chance) / (1 - chance), where
    chance is what two models would share that answer at random, each with its own share of each class. *Common
    errors*: of the images that both get wrong, the share on which both name the same wrong class; NaN where both
    get none wrong. Kappa is NaN where both name one and the same class throughout.
    """
    same = (theirs == mine).double().mean(1)
    rows = torch.cat([mine[None], theirs]).long() + k * torch.arange(1 + len(theirs))[:, None]
    shares = torch.bincount(rows.flatten(), minlength=rows.shape[0] * k).view(-1, k).double() / len(mine)
    chance = shares[1:] @ shares[0]
    wrong = (mine != labels).nonzero().flatten()
    others, own = theirs[:, wrong], mine[wrong]
    both = (others != labels[wrong]).sum(1)
    alike = (others == own).sum(1)  # an error of both
    # 0 / 0 is NaN, as said.
    return torch.stack([same, (same - chance) / (1 - chance), alike.double() / both.double()])


@dataclass(frozen=True, eq=False)
class Pools:
    """Real models to compare with: e stopped early after each of t updates, s trained on subsets.

    Predicted classes on the test split, its labels [n], and accuracy on the validation split.
    """

    early: torch.Tensor  # [e, t, n]
    early_accuracy: torch.Tensor  # [e, t]
    moments: tuple[int, ...]  # [t] updates
    subset: torch.Tensor  # [s, n]
    subset_accuracy: torch.Tensor  # [s]
    labels: torch.Tensor  # [n]
    k: int

    @property
    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The lowest and highest validation accuracy of the early-stopped and of the subset models."""
        early, subset = self.early_accuracy, self.subset_accuracy
        return (float(early.min()), float(early.max())), (float(subset.min()), float(subset.max()))

    def compare(
        self, predicted: torch.Tensor, accuracy: torch.Tensor, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Agreement with each early-stopped model [kinds, e], with each subset model [kinds, s], and the moments [e].

        NaN where a model's validation accuracy is further than ``tolerance`` away. ``predicted`` [m, n] and
        ``accuracy`` [m] are one set's networks, each matched for itself, then averaged.
        """
        early, moments = self.with_early(predicted, accuracy, tolerance)
        subset = self.with_subset(predicted, accuracy, tolerance)
        return early.nanmean(1), subset.nanmean(1), moments.nanmean(0)

    def own(self, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``among_themselves`` of all subset models."""
        with_early, _ = self.with_early(self.subset, self.subset_accuracy, tolerance)
        return among_themselves(with_early, self.with_subset(self.subset, self.subset_accuracy, tolerance))

    def typed_in(self, predicted: Sequence[torch.Tensor], moment: int) -> dict[str, torch.Tensor]:
        """The paper's comparison: every early-stopped model after one and the same update, by *test* accuracy.

        ``predicted`` [m, n] are the networks of each replicate, averaged. Given are their ``accuracy`` [replicates];
        the early-stopped models' ``early accuracy`` [e] and agreement ``early`` [replicates, e]; and
        the agreement ``subset`` [replicates, s] with subset models whose accuracy, in whole percents, is a network's
        own rounded down or one more, NaN for the others.
        """
        early = self.early[:, self.moments.index(moment)]
        n = len(self.labels)
        # Percents in whole numbers: 100 * 0.57 is a hair below 57.
        theirs = (200 * (self.subset == self.labels).sum(1) + n) // (2 * n)

        def in_percents(mine: torch.Tensor) -> torch.Tensor:
            own = 100 * int((mine == self.labels).sum()) // n
            out = (theirs != own) & (theirs != own + 1)
            return (self.subset == mine).double().mean(1).masked_fill(out, torch.nan)

        def over(networks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shared = [(early == mine).double().mean(1) for mine in networks]
            return torch.stack(shared).mean(0), torch.stack([in_percents(m) for m in networks]).nanmean(0)

        with_early, with_subsets = zip(*(over(networks) for networks in predicted), strict=True)
        return {
            "accuracy": torch.stack([(own == self.labels).double().mean() for own in predicted]),
            "early accuracy": (early == self.labels).double().mean(1),
            "early": torch.stack(with_early),
            "subset": torch.stack(with_subsets),
        }

    def with_early(
        self, predicted: torch.Tensor, accuracy: torch.Tensor, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Agreement [kinds, m, e] with each early-stopped model at its moment nearest in accuracy, and the moment [m, e]."""
        distance, nearest = (self.early_accuracy - accuracy[:, None, None]).abs().min(2)
        near = distance <= tolerance
        found = torch.full((len(KINDS), *near.shape), torch.nan, dtype=torch.float64)
        for j, mine in enumerate(predicted):
            e = near[j].nonzero().flatten()
            if len(e):
                found[:, j, e] = agreements(mine, self.early[e, nearest[j, e]], self.labels, self.k)
        moments = torch.tensor(self.moments).double()[nearest]
        return found, moments.masked_fill(~near, torch.nan)

    def with_subset(self, predicted: torch.Tensor, accuracy: torch.Tensor, tolerance: float) -> torch.Tensor:
        """Agreement [kinds, m, s] with each subset model."""
        near = (self.subset_accuracy - accuracy[:, None]).abs() <= tolerance
        found = torch.full((len(KINDS), *near.shape), torch.nan, dtype=torch.float64)
        for j, mine in enumerate(predicted):
            s = near[j].nonzero().flatten()
            if len(s):
                found[:, j, s] = agreements(mine, self.subset[s], self.labels, self.k)
        return found


def among_themselves(
    with_early: torch.Tensor, with_subset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each subset model in a set's place, from its agreement with early-stopped ones [kinds, s, e] and with all subset ones [kinds, s, s].

    NaN on the diagonal of the second, and throughout for a model that matches fewer than two of a pool.
    """
    others = with_subset.clone()
    others.diagonal(dim1=1, dim2=2).fill_(torch.nan)
    few = ((~with_early[0].isnan()).sum(1) < 2) | ((~others[0].isnan()).sum(1) < 2)
    return with_early.masked_fill(few[:, None], torch.nan), others.masked_fill(few[:, None], torch.nan)


def mean(table: torch.Tensor) -> Estimate | None:
    """The mean of [replicates, models] with NaN where unmatched; None with fewer than two models."""
    table = table[~table.isnan().all(1)]
    models = table[:, ~table.isnan().all(0)]
    if min(models.shape, default=0) < 1 or models.shape[1] < 2:
        return None
    by_replicate = models.nanmean(1).tolist()
    parts = {"models": _model_effects(models)}
    if len(by_replicate) > 1:
        parts["replicates"] = by_replicate
    return Estimate.components(float(models.nanmean(1).mean()), parts, "model")


def crossed(gaps: torch.Tensor, early: torch.Tensor, subset: torch.Tensor) -> Estimate | None:
    """The mean of ``gaps`` [replicates], with what each model of the pools adds to it [replicates, models].

    None with fewer than two models of a pool.
    """
    both = ~gaps.isnan()
    gaps, early, subset = gaps[both], early[both], subset[both]
    early = early[:, ~early.isnan().all(0)]
    subset = subset[:, ~subset.isnan().all(0)]
    if not len(gaps) or early.shape[1] < 2 or subset.shape[1] < 2:
        return None
    parts = {"early": _model_effects(early), "subset": _model_effects(subset)}
    if len(gaps) > 1:
        parts["replicates"] = gaps.tolist()
    return Estimate.components(float(gaps.mean()), parts, "replicate or pool model")


def _model_effects(table: torch.Tensor) -> list[float]:
    """What each model adds to a replicate's agreement, from [replicates, models] with NaN where unmatched.

    Replicates of different accuracy match different models, and agreement rises with accuracy: each
    replicate's mean is taken off first, or that rise would pass for a spread between models.
    """
    return (table - table.nanmean(1, keepdim=True)).nanmean(0).tolist()
