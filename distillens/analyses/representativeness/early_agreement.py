"""Predictions of models trained on distilled data beside those of real models stopped early."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.representativeness._pools import KINDS, Pools, compact, crossed, mean
from distillens.analyses.representativeness._trajectory import EVERY, moments_of
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

# The moments in the paper's notebook, as numbers of updates: its indices 130, 40, 35 and 90 count from zero.
TYPED_IN = (("bptt", 131), ("dm", 41), ("dc", 36), ("mtt", 91))


@dataclass(frozen=True)
class EarlyAgreement:
    """The share of test images on which two models name the same class, at matched accuracy.

    A model trained on the set is compared with two pools of real models: trained on all real data and stopped
    early, and trained to the end on little real data. Both are matched to it model by model on *validation*
    accuracy: each early-stopped model at its moment nearest to it, each subset model as it is; who is further
    than ``tolerance`` away is left out, and where fewer than two are left in a pool no comparison is made: the
    notes say with numbers why.

    The gap is early-stopped minus subset agreement. It is above zero for real data too: subset models err each in
    their own way, so a subset model itself agrees more with early-stopped ones. The claim is therefore about the
    gap beyond that of the matched subset models, each put in the set's place against the others. Its interval adds
    the variances over replicates, over early-stopped models and over subset models (each within replicates),
    because all pairs share models.

    Agreement is counted in three ways: on all images, beyond chance (Cohen's kappa), and on the images that both get
    wrong. The claim is about the first, chosen beforehand: it is what the paper speaks of, every image counts, and at equal
    accuracy chance takes about the same from both pools. The other two stand beside it.

    ``moments`` is about how many numbers of updates early-stopped models are looked at after. ``fixed`` names updates
    for sets after which all of them are looked at as well, in a table of its own that no claim uses.

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
    moments: int = 64
    fixed: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        at_least(2, "early_agreement", early=self.early, subset=self.subset, moments=self.moments)
        at_least(1, "early_agreement", nets=self.nets, least_per_class=self.least_per_class)
        if self.most_per_class < self.least_per_class:
            raise UserError("early_agreement: most_per_class is below least_per_class")
        for name, moment in self.fixed:
            at_least(1, "early_agreement", **{f"the fixed moment of {name}": moment})

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
        """The paper's pools: 30 models looked at after each of 196 updates, 520 of 25 to 250 images a class.

        Its own matching (typed-in moments, whole percents of *test* accuracy) stands in a table of its own. Where we
        differ: claims rest on models matched one by one on validation accuracy, within a point; subset models
        all train for 600 updates, the mean of the paper's 100 passes over subsets of its sizes, which are
        spread evenly on a log scale. On digits' scale a pass has five updates, so early-stopped models train for 150.
        """
        smallest = min(map(len, like.by_class))
        small = like.shape[1] * like.shape[2] <= 256
        return cls(
            ConvNet.defaults(like),
            early_recipe=Recipe(steps=150 if small else 196, batch=256),
            least_per_class=min(25, smallest),
            most_per_class=min(250, smallest),
            moments=EVERY,
            fixed=TYPED_IN,
        )

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The sets' own models, then the two pools."""
        return [*(t for many in self._own(sets, key).values() for t in many), *self._pools(real, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> EarlyAgreementResult:
        """The agreements."""
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        early, subset = runs.get(*self._pools(real, key))
        k = real.test.k
        pools = Pools(
            compact(early.seen["test"], k),
            (early.seen["val"] == real.val.labels.hard()).double().mean(2),
            early.seen_moments,
            compact(subset.predictions(real.test), k),
            subset.accuracy(real.val),
            compact(real.test.labels.hard(), k),
            k,
        )
        accuracies, with_early, with_subset, moments, typed = {}, {}, {}, {}, {}
        fixed = {name: moment for name, moment in self.fixed if moment in pools.moments}
        for name, trainings in self._own(sets, key).items():
            populations = runs.get(*trainings)
            predicted = [compact(own.predictions(real.test), k) for own in populations]
            accuracies[name] = torch.stack([own.accuracy(real.val).mean() for own in populations])
            rows = [
                pools.compare(classes, own.accuracy(real.val), self.tolerance)
                for classes, own in zip(predicted, populations, strict=True)
            ]
            early_rows, subset_rows, moment_rows = zip(*rows, strict=True)
            with_early[name], with_subset[name] = torch.stack(early_rows, 1), torch.stack(subset_rows, 1)
            moments[name] = torch.stack(moment_rows)
            if name in fixed:
                typed[name] = pools.typed_in(predicted, fixed[name])
        own_early, own_subset = pools.own(self.tolerance)
        return EarlyAgreementResult(
            tuple(sets.distilled),
            k,
            accuracies,
            with_early,
            with_subset,
            moments,
            own_early,
            own_subset,
            self.tolerance,
            pools.ranges,
            self.fixed,
            typed,
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
        watched = Observe(self.looks, {"val": real.val, "test": real.test})
        early = Training(
            real.train, self.net, self.early_recipe, key.fold("early").split(self.early), observe=watched
        )
        place = key.fold("subset")
        # Sizes spread evenly on a log scale: accuracy is roughly linear in the log of the size.
        share = place.fold("size").uniform(self.subset)
        low, high = math.log(self.least_per_class), math.log(self.most_per_class)
        sizes = (low + (high - low) * share).exp().round().long().tolist()
        subsets = tuple(real.train.drawn(size, place.fold("draw", j)) for j, size in enumerate(sizes))
        keys = place.fold("net").split(self.subset)
        return [early, Training(real.train, self.net, self.subset_recipe, keys, subsets=subsets)]

    @property
    def looks(self) -> tuple[int, ...]:
        """The updates after which the early-stopped models are looked at: from the first on, and the fixed ones."""
        steps = self.early_recipe.steps
        fixed = {moment for _, moment in self.fixed if moment <= steps}
        return tuple(sorted({t for t in moments_of(steps, self.moments) if t} | fixed))


@dataclass(frozen=True, eq=False)
class EarlyAgreementResult(Result):
    """By set: validation accuracy [replicates], agreement [kinds, replicates, models] with each pool (NaN: unmatched).

    ``own_early`` [kinds, subset models, early models] and ``own_subset`` [kinds, subset models, subset models] are the
    same for the subset models themselves, each in a set's place. ``ranges`` are the lowest and highest validation
    accuracies of the early-stopped and the subset models. ``typed`` holds what belongs to the moments ``fixed``, by test accuracy.
    """

    analysis: ClassVar[str] = "representativeness/early_agreement"
    title: ClassVar[str] = "Agreement with early-stopped and with subset-trained models"
    question: ClassVar[str] = EarlyAgreement.question

    distilled: tuple[str, ...]
    k: int
    accuracy: Mapping[str, torch.Tensor]
    with_early: Mapping[str, torch.Tensor]
    with_subset: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    own_early: torch.Tensor
    own_subset: torch.Tensor
    tolerance: float
    ranges: tuple[tuple[float, float], tuple[float, float]]
    fixed: tuple[tuple[str, int], ...] = ()
    typed: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def agreement(self, name: str, pool: str, kind: int = 0) -> Estimate | None:
        """Mean agreement with the matched models of a pool; None where fewer than two are matched."""
        return mean((self.with_early if pool == "early" else self.with_subset)[name][kind])

    def gap(self, name: str, kind: int = 0) -> Estimate | None:
        """Early-stopped minus subset agreement, the paper's contrast; None where too few models are matched."""
        early, subset = self.with_early[name][kind], self.with_subset[name][kind]
        return crossed(early.nanmean(1) - subset.nanmean(1), early, subset)

    def excess(self, name: str, kind: int = 0) -> Estimate | None:
        """The gap minus that of the subset models it was matched with; None where too few are matched."""
        early, subset = self.with_early[name][kind], self.with_subset[name][kind]
        all_early, all_subset = self.own_early[kind], self.own_subset[kind]
        own_early, own_subset = all_early.nanmean(1), all_subset.nanmean(1)
        gaps = early.nanmean(1) - (subset + own_early - own_subset).nanmean(1)
        # What one model adds to the whole. A subset model is in two places of the agreement of subset
        # models with each other; a model that agrees with everybody cancels out.
        matched = torch.where(subset.isnan()[:, :, None], torch.nan, all_early[None])
        return crossed(gaps, early - matched.nanmean(1), subset + own_early - 2 * own_subset)

    def chance(self, name: str) -> Estimate:
        """The agreement of two models of the set's accuracy a with independent, evenly spread errors.

        It is a^2 + (1 - a)^2 / (k - 1): what equal accuracy alone gives. Kappa's chance is smaller: it knows how often
        a model names each class and nothing of how often it is right.
        """
        a = self.accuracy[name]
        return Estimate.mean((a**2 + (1 - a) ** 2 / (self.k - 1)).tolist(), "replicate")

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
        """Accuracies and matched models; agreement, gap and excess in each way; the authors' own matching."""
        found = [self._matching(), *(self._table(kind) for kind in range(len(KINDS)))]
        return (*found, self._as_typed_in()) if self.fixed else tuple(found)

    def _matching(self) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in self.with_early:
            matched = self.moments[name][~self.moments[name].isnan()]
            span = f"{int(matched.min())} to {int(matched.max())}" if len(matched) else "none"
            counts = [
                int((~table[name][0].isnan()).any(0).sum()) for table in (self.with_early, self.with_subset)
            ]
            accuracy = Estimate.mean(self.accuracy[name].tolist(), "replicate")
            rows.append((name, accuracy, self.chance(name), span, f"{counts[0]} and {counts[1]}"))
        columns = (
            "set",
            "validation accuracy",
            "agreement of independent models that are as accurate",
            "matched after updates",
            "models matched",
        )
        return Table("Models matched on validation accuracy", columns, tuple(rows))

    def _table(self, kind: int) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = [
            (
                name,
                self.agreement(name, "early", kind) or "not matched",
                self.agreement(name, "subset", kind) or "not matched",
                self.gap(name, kind) or "",
                self.excess(name, kind) or "",
            )
            for name in self.with_early
        ]
        titles = (
            "Share of test images with the same predicted class",
            "The same beyond chance: Cohen's kappa from both models' shares of each class",
            "Share of the test images that both get wrong with the same wrong class",
        )
        columns = ("set", "with early-stopped", "with subset-trained", "gap", "gap beyond subset models'")
        return Table(titles[kind], columns, tuple(rows))

    def _as_typed_in(self) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name, moment in self.fixed:
            if name not in self.typed:
                continue
            typed = self.typed[name]
            own, early = typed["accuracy"].tolist(), typed["early accuracy"].tolist()
            parts = {"early": early, **({"replicates": own} if len(own) > 1 else {})}
            apart = Estimate.components(sum(early) / len(early) - sum(own) / len(own), parts, "model")
            rows.append(
                (
                    name,
                    moment,
                    Estimate.mean(own, "replicate"),
                    Estimate.mean(early, "model"),
                    apart,
                    mean(typed["early"]) or "",
                    mean(typed["subset"]) or "none in its percents",
                    crossed(
                        typed["early"].nanmean(1) - typed["subset"].nanmean(1),
                        typed["early"],
                        typed["subset"],
                    )
                    or "",
                    int((~typed["subset"].isnan()).any(0).sum()),
                )
            )
        columns = (
            "set",
            "after updates",
            "test accuracy",
            "early-stopped models' test accuracy",
            "their lead",
            "with early-stopped",
            "with subset-trained of its whole percents",
            "gap",
            "subset models",
        )
        return Table(
            "As published: at the moments typed in by the authors (no claim uses it)", columns, tuple(rows)
        )

    def notes(self) -> tuple[str, ...]:
        """What the contrast is for real data, and who could not be compared."""
        own = self.own_early[0].nanmean(1) - self.own_subset[0].nanmean(1)
        own = own[~own.isnan()]
        notes = []
        if len(own):
            notes.append(
                f"The paper's contrast is not zero for real data: {len(own)} subset-trained models, put in a set's "
                f"place, show a gap of {float(own.mean()):+.3f} on average. The claim is about the gap beyond theirs."
            )
        lost = [name for name, moment in self.fixed if name in self.with_early and name not in self.typed]
        if lost:
            late = ", ".join(f"{name} after {moment}" for name, moment in self.fixed if name in lost)
            notes.append(f"The early-stopped models end before a moment typed in by the authors: {late}.")
        return (*notes, *(self._refusal(name) for name in self.with_early if self.excess(name) is None))

    def _refusal(self, name: str) -> str:
        """Why a set was not compared, and what to change."""
        accuracy = [float(a) for a in self.accuracy[name]]
        low, high = min(accuracy), max(accuracy)
        reached = f"{low:.3f}" if len(accuracy) == 1 else f"{low:.3f} to {high:.3f}"
        (early_low, early_high), (subset_low, subset_high) = self.ranges
        changes = []
        if low > early_high:
            changes.append("raise early_recipe.steps")
        if high < early_low:
            changes.append("raise moments")
        if low > subset_high:
            changes.append("raise most_per_class")
        if high < subset_low:
            changes.append("lower least_per_class")
        fix = " and ".join(changes) or "raise early and subset (more models) or tolerance"
        return (
            f"No comparison for {name}: its models reach {reached} on the validation split, and fewer than two models of a pool "
            f"come within {self.tolerance:g} of that. Early-stopped models span {early_low:.3f} to {early_high:.3f}, "
            f"subset-trained ones {subset_low:.3f} to {subset_high:.3f}; {fix}."
        )

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Agreement model by model, and the gap beyond subset models' in each way."""
        return {
            self.title: self.plot,
            "Gap beyond that of subset-trained models, by what counts as agreement": self.plot_excess,
        }

    def plot(self, ax: Axes) -> None:
        """A dot a model of each pool, averaged over replicates, and the means; sets that could be compared."""
        names = list(self.headline())
        for x, name in enumerate(names):
            for shift, table, marker in ((-0.16, self.with_early, "o"), (0.16, self.with_subset, "^")):
                values = table[name][0].nanmean(0)
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

    def plot_excess(self, ax: Axes) -> None:
        """For each set and each way to count, the excess with its interval."""
        names = list(self.headline())
        ax.axhline(0, color="#999999", lw=0.8)
        for kind, (way, marker) in enumerate(zip(KINDS, "os^", strict=True)):
            for x, name in enumerate(names):
                found = self.excess(name, kind)
                if found is None:
                    continue
                place, tint = x + 0.2 * (kind - 1), colour(name)
                if math.isfinite(found.low):
                    ax.plot([place, place], [found.low, found.high], color=tint, lw=1.4)
                ax.plot([place], [found.value], marker=marker, color=tint, ms=6)
            ax.plot([], [], marker=marker, color="#555555", lw=0, label=way)
        ax.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        ax.set_ylabel("gap beyond subset models'")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
