"""Predictions of models trained on distilled data beside those of real models stopped early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.core.checks import UserError, at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Observe, Training, networks, on

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class EarlyAgreement:
    """The share of test images on which two models name the same class, at matched accuracy.

    A model trained on the set is compared with two pools of real models: trained on all real data and stopped
    early, and trained to the end on little real data. Both are matched to it model by model on *validation*
    accuracy: each early-stopped model at its moment nearest to it, each subset model as it is; who is further
    than ``tolerance`` away is left out, and where fewer than two are left in a pool no comparison is made.

    The gap is early-stopped minus subset agreement. It is above zero for real data too: subset models err each in
    their own way, so a subset model itself agrees more with early-stopped ones. The claim is therefore about the
    gap beyond that of the matched subset models, each put in the set's place against the others. Its interval adds the variances over replicates, over
    early-stopped models and over subset models (each within replicates), because all pairs share models.

    Source: Yang et al. 2024, section 4.1, figure 4 (30 and 520 models; indices typed in by hand; one model a set).
    """

    question: ClassVar[str] = "Do models trained on distilled data predict like real models stopped early?"
    scales: ClassVar[tuple[str, ...]] = (
        "recipe.steps",
        "early",
        "early_recipe.steps",
        "subset",
        "subset_recipe.steps",
    )

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=300)
    nets: int = 1
    early: int = 30
    early_recipe: Recipe = Recipe(steps=196, batch=256)
    subset: int = 520
    subset_recipe: Recipe = Recipe(steps=600, batch=256)
    least_per_class: int = 25
    most_per_class: int = 250
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        at_least(2, "early_agreement", early=self.early, subset=self.subset)
        at_least(1, "early_agreement", nets=self.nets, least_per_class=self.least_per_class)
        if self.most_per_class < self.least_per_class:
            raise UserError("early_agreement: most_per_class is below least_per_class")

    @classmethod
    def defaults(cls, like: Dataset) -> EarlyAgreement:
        """Pools that span the accuracies of distilled sets; small ones on digits' scale."""
        net = ConvNet.defaults(like)
        if like.shape[1] * like.shape[2] <= 256:
            smallest = min(map(len, like.by_class))
            return cls(
                net,
                early=16,
                early_recipe=Recipe(steps=150, batch=256),
                subset=64,
                subset_recipe=Recipe(steps=300, batch=256),
                least_per_class=1,
                most_per_class=max(2, min(40, smallest)),
                tolerance=0.02,
            )
        return cls(net)

    @classmethod
    def as_published(cls, like: Dataset) -> EarlyAgreement:
        """The paper's pools: 30 models of one pass, 520 of 25 to 250 images a class, within a point of accuracy.

        Where we differ: matched model by model on validation accuracy, not at indices typed in for all 30 together.
        """
        smallest = min(map(len, like.by_class))
        return cls(
            ConvNet.defaults(like),
            early_recipe=Recipe(steps=-(-len(like) // 256), batch=256),
            least_per_class=min(25, smallest),
            most_per_class=min(250, smallest),
        )

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The sets' own models, then the two pools."""
        return [*(t for many in self._own(sets, key).values() for t in many), *self._pools(real, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> EarlyAgreementResult:
        """The agreements."""
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        early, subset = runs.get(*self._pools(real, key))
        pools = Pools(
            early.seen["test"],
            (early.seen["val"] == real.val.labels.hard()).double().mean(2),
            early.seen_moments,
            subset.predictions(real.test),
            subset.accuracy(real.val),
        )
        accuracies, with_early, with_subset, moments = {}, {}, {}, {}
        for name, trainings in self._own(sets, key).items():
            populations = runs.get(*trainings)
            accuracies[name] = torch.stack([own.accuracy(real.val).mean() for own in populations])
            rows = [
                pools.compare(own.predictions(real.test), own.accuracy(real.val), self.tolerance)
                for own in populations
            ]
            with_early[name], with_subset[name], moments[name] = map(torch.stack, zip(*rows, strict=True))
        return EarlyAgreementResult(
            tuple(sets.distilled),
            accuracies,
            with_early,
            with_subset,
            moments,
            *pools.own(self.tolerance),
            self.tolerance,
        )

    def _own(self, sets: Sets, key: Key) -> dict[str, list[Training]]:
        named = dict(sets.distilled)
        if sets.random:
            named["random_subset"] = sets.random
        return {
            name: [on(one, self.net, self.recipe, networks(key, r, self.nets)) for r, one in enumerate(many)]
            for name, many in named.items()
        }

    def _pools(self, real: Splits, key: Key) -> list[Training]:
        watched = Observe(self.moments, {"val": real.val, "test": real.test})
        early = Training(
            real.train, self.net, self.early_recipe, key.fold("early").split(self.early), observe=watched
        )
        place = key.fold("subset")
        # Sizes spread evenly on a log scale: accuracy is roughly linear in the log of the size.
        share = place.fold("size").uniform(self.subset)
        low, high = math.log(self.least_per_class), math.log(self.most_per_class)
        sizes = (low + (high - low) * share).exp().round().long().tolist()
        subsets = tuple(
            torch.cat(
                [
                    members[place.fold("draw", j, c).permutation(len(members))[:size]]
                    for c, members in enumerate(real.train.by_class)
                ]
            )
            for j, size in enumerate(sizes)
        )
        keys = place.fold("net").split(self.subset)
        return [early, Training(real.train, self.net, self.subset_recipe, keys, subsets=subsets)]

    @property
    def moments(self) -> tuple[int, ...]:
        """The updates after which the early-stopped models are looked at: each of the first 16, then sparser."""
        steps = self.early_recipe.steps
        grid = {round(16 * 1.06**i) for i in range(1, 200)}
        return tuple(sorted({t for t in {*range(1, 17), *grid} if t <= steps}))


@dataclass(frozen=True, eq=False)
class Pools:
    """Real models to compare with: e stopped early after each of t updates, s trained on subsets.

    Predicted classes on the test split and accuracy on the validation split.
    """

    early: torch.Tensor  # [e, t, n]
    early_accuracy: torch.Tensor  # [e, t]
    moments: tuple[int, ...]  # [t] updates
    subset: torch.Tensor  # [s, n]
    subset_accuracy: torch.Tensor  # [s]

    def compare(
        self, predicted: torch.Tensor, accuracy: torch.Tensor, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Agreement with each early-stopped model [e], with each subset model [s], and the moments [e].

        NaN where a model's validation accuracy is further than ``tolerance`` away. ``predicted`` [m, n] and
        ``accuracy`` [m] are one set's networks, each matched for itself, then averaged.
        """
        with_early, moments = self._with_early(predicted, accuracy, tolerance)
        with_subset = self._with_subset(predicted, accuracy, tolerance)
        return with_early.nanmean(0), with_subset.nanmean(0), moments.nanmean(0)

    def own(self, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Agreement of each subset model with each early-stopped model [s, e] and each other one [s, s].

        Each subset model stands in a set's place against all others; NaN where unmatched, on the diagonal,
        and for a model that matches fewer than two of a pool.
        """
        with_early, _ = self._with_early(self.subset, self.subset_accuracy, tolerance)
        with_subset = self._with_subset(self.subset, self.subset_accuracy, tolerance)
        with_subset.fill_diagonal_(torch.nan)
        few = ((~with_early.isnan()).sum(1) < 2) | ((~with_subset.isnan()).sum(1) < 2)
        return with_early.masked_fill(few[:, None], torch.nan), with_subset.masked_fill(
            few[:, None], torch.nan
        )

    def _with_early(
        self, predicted: torch.Tensor, accuracy: torch.Tensor, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Agreement and moment [m, e] with each early-stopped model at its moment nearest in accuracy."""
        distance, nearest = (self.early_accuracy - accuracy[:, None, None]).abs().min(2)
        theirs = self.early[torch.arange(len(self.early)), nearest]  # [m, e, n]
        out = distance > tolerance
        agreement = (theirs == predicted[:, None]).double().mean(2)
        moments = torch.tensor(self.moments).double()[nearest]
        return agreement.masked_fill(out, torch.nan), moments.masked_fill(out, torch.nan)

    def _with_subset(self, predicted: torch.Tensor, accuracy: torch.Tensor, tolerance: float) -> torch.Tensor:
        """Agreement [m, s] with each subset model."""
        agreement = torch.stack([(self.subset == mine).double().mean(1) for mine in predicted])
        return agreement.masked_fill((self.subset_accuracy - accuracy[:, None]).abs() > tolerance, torch.nan)


@dataclass(frozen=True, eq=False)
class EarlyAgreementResult(Result):
    """By set: validation accuracy [replicates], agreement [replicates, models] with each pool (NaN: unmatched).

    ``own_early`` [subset models, early models] and ``own_subset`` [subset models, subset models] are the same for
    the subset models themselves, each in a set's place.
    """

    analysis: ClassVar[str] = "representativeness/early_agreement"
    title: ClassVar[str] = "Agreement with early-stopped and with subset-trained models"
    question: ClassVar[str] = EarlyAgreement.question

    distilled: tuple[str, ...]
    accuracy: Mapping[str, torch.Tensor]
    with_early: Mapping[str, torch.Tensor]
    with_subset: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    own_early: torch.Tensor
    own_subset: torch.Tensor
    tolerance: float

    def agreement(self, name: str, pool: str) -> Estimate | None:
        """Mean agreement with the matched models of a pool; None where fewer than two are matched."""
        table = (self.with_early if pool == "early" else self.with_subset)[name]
        table = table[~table.isnan().all(1)]
        models = table[:, ~table.isnan().all(0)]
        if min(models.shape, default=0) < 1 or models.shape[1] < 2:
            return None
        by_replicate = models.nanmean(1).tolist()
        parts = {"models": _model_effects(models)}
        if len(by_replicate) > 1:
            parts["replicates"] = by_replicate
        return Estimate.components(float(models.nanmean(1).mean()), parts, "model")

    def gap(self, name: str) -> Estimate | None:
        """Early-stopped minus subset agreement, the paper's contrast; None where too few models are matched."""
        early, subset = self.with_early[name], self.with_subset[name]
        return _crossed(early.nanmean(1) - subset.nanmean(1), early, subset)

    def excess(self, name: str) -> Estimate | None:
        """The gap minus that of the subset models it was matched with; None where too few are matched."""
        early, subset = self.with_early[name], self.with_subset[name]
        own_early, own_subset = self.own_early.nanmean(1), self.own_subset.nanmean(1)
        gaps = early.nanmean(1) - (subset + own_early - own_subset).nanmean(1)
        # What one model adds to the whole. A subset model is in two places of the agreement of subset
        # models with each other; a model that agrees with everybody cancels out.
        matched = torch.where(subset.isnan()[:, :, None], torch.nan, self.own_early[None])
        return _crossed(gaps, early - matched.nanmean(1), subset + own_early - 2 * own_subset)

    def headline(self) -> dict[str, Estimate]:
        """For each set that could be compared the gap beyond that of subset models."""
        found = {name: self.excess(name) for name in self.with_early}
        return {name: excess for name, excess in found.items() if excess is not None}

    def claims(self) -> tuple[Claim, ...]:
        """The gap exceeds what subset-trained models show themselves."""
        claims = []
        for name in self.distilled:
            excess = self.excess(name)
            if excess is None:
                continue
            claims.append(
                Claim(
                    "early-stopped",
                    name,
                    "its models lean to early-stopped models more than subset-trained ones of equal accuracy do",
                    excess,
                    "greater",
                    0.0,
                    "models trained on other real subsets in the set's place",
                    "other early-stopped models in the set's place",
                    "paper T6",
                )
            )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Accuracies, agreements, gap and matched moments."""
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in self.with_early:
            matched = self.moments[name][~self.moments[name].isnan()]
            span = f"{int(matched.min())} to {int(matched.max())}" if len(matched) else "none"
            counts = tuple(
                int((~table[name].isnan()).any(0).sum()) for table in (self.with_early, self.with_subset)
            )
            rows.append(
                (
                    name,
                    Estimate.mean(self.accuracy[name].tolist(), "replicate"),
                    self.agreement(name, "early") or "not matched",
                    self.agreement(name, "subset") or "not matched",
                    self.gap(name) or "",
                    self.excess(name) or "",
                    span,
                    f"{counts[0]} and {counts[1]}",
                )
            )
        columns = (
            "set",
            "validation accuracy",
            "with early-stopped",
            "with subset-trained",
            "gap",
            "gap beyond subset models'",
            "matched after updates",
            "models matched",
        )
        return (Table("Share of test images with the same predicted class", columns, tuple(rows)),)

    def notes(self) -> tuple[str, ...]:
        """What the contrast is for real data, and who could not be compared."""
        own = self.own_early.nanmean(1) - self.own_subset.nanmean(1)
        own = own[~own.isnan()]
        notes = []
        if len(own):
            notes.append(
                f"The paper's contrast is not zero for real data: {len(own)} subset-trained models, put in a set's "
                f"place, show a gap of {float(own.mean()):+.3f} on average. The claim is about the gap beyond theirs."
            )
        lost = [name for name in self.with_early if self.excess(name) is None]
        if lost:
            notes.append(
                f"No comparison for {', '.join(lost)}: fewer than two models of a pool come within "
                f"{self.tolerance:g} of their validation accuracy."
            )
        return tuple(notes)

    def plot(self, ax: Axes) -> None:
        """A dot a model of each pool, averaged over replicates, and the means; sets that could be compared."""
        names = list(self.headline())
        for x, name in enumerate(names):
            for shift, table, marker in ((-0.16, self.with_early, "o"), (0.16, self.with_subset, "^")):
                values = table[name].nanmean(0)
                values = values[~values.isnan()]
                if not len(values):
                    continue
                offsets = torch.linspace(-0.07, 0.07, len(values)) if len(values) > 1 else torch.zeros(1)
                tint = colour(name)
                ax.scatter(x + shift + offsets, values, s=12, marker=marker, color=tint, alpha=0.45, lw=0)
                ax.plot([x + shift - 0.12, x + shift + 0.12], [float(values.mean())] * 2, color=tint, lw=2.2)
        ax.scatter([], [], marker="o", color="#555555", s=16, label="early-stopped")
        ax.scatter([], [], marker="^", color="#555555", s=16, label="subset-trained")
        ax.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        ax.set_ylabel("agreement on test images")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)


def _crossed(gaps: torch.Tensor, early: torch.Tensor, subset: torch.Tensor) -> Estimate | None:
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
