"""DD-Ranking's scores: what the images are worth beside labels, step size and augmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.behaviour._grid import on_grid
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import FULL, RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, units
from distillens.core.rng import Key
from distillens.evaluation.protocol import Protocol
from distillens.evaluation.published import DSA
from distillens.evaluation.trials import Judged, choose, labelled, of_full, of_sets
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEVEL = 0.95

Replicates = tuple[DistilledDataset, ...]


def score(x: float) -> float:
    """DD-Ranking's normalisation of a difference of accuracies: 0 at -1, 1 at 1, 0.269 at 0."""
    return (math.exp(x) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


@dataclass(frozen=True)
class Ranking:
    """DD-Ranking's HLR, IOR, LRS and ARS of each set, replicate by replicate.

    ``recipe`` is tried at each of ``rates`` for every set, the random subset and the full data, and the rate that is best
    on validation counts. A set's own protocol is that recipe with its own labels, at the step size that it learned where
    it did. The random subset under the protocol of a set with soft labels is the better, on validation, of two: with its
    hard labels, and with the set's labels, handed out in order within each class. ``augment`` is what the recipe gets on
    top for ARS. ``w`` weighs IOR against HLR, ``g`` training with augmentation against training without.

    Source: Li et al. 2025 (DD-Ranking), section 3. Where we differ: there rate and epoch are chosen on the test set,
    accuracies enter the released code as percentages (which leaves [0, 1]), and random images get a teacher's labels
    under a protocol of soft ones.
    """

    question: ClassVar[str] = "What are the images worth, beside labels, step size and augmentation?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps",)

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = DSA.recipe.but(augment="")
    rates: tuple[float, ...] = (1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
    augment: str = DSA.recipe.augment
    models: int = 1
    w: float = 0.5
    g: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, "ranking", models=self.models)
        for name, weight in (("w", self.w), ("g", self.g)):
            if not 0 <= weight <= 1:
                raise UserError(f"ranking: {name} is a weight", got=f"{weight!r}", expected="0 to 1")
        if not self.augment or self.recipe.augment:
            raise UserError(
                "ranking: training with augmentation is set against training without",
                got=f"augment={self.augment!r}, recipe.augment={self.recipe.augment!r}",
                fix="name the strategy in augment alone",
            )

    @classmethod
    def defaults(cls, like: Dataset) -> Ranking:
        """DSA's recipe; on digits' scale 60 full-batch steps, and no mirror: a digit in it is none."""
        net = ConvNet.defaults(like)
        if like.shape[1] * like.shape[2] <= 256:
            return cls(net, Recipe(steps=60), augment="color_crop_cutout_scale_rotate")
        return cls(net)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """Of every set its own protocol, hard labels, and augmentation; of the full data hard labels. At each rate."""
        asked = [t for many in self._asked(sets, key).values() for each in many for t in each]
        return asked + [t for each in self._full(sets, real, key) for t in each]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> RankingResult:
        """The accuracies that the scores are made of.

        Raises:
            UserError: there is no random subset beside the sets.
        """
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        grid = self._grid()
        found = {
            place: [choose(grid, runs.get(*each), real) for each in many]
            for place, many in self._asked(sets, key).items()
        }

        def accuracy(many: list[Judged]) -> torch.Tensor:
            return torch.stack([one.accuracy(real.test) for one in many])

        def beside(way: str, name: str) -> list[Judged]:
            """The random subset under a set's protocol."""
            plain, borrowed = found[way, RANDOM], found.get((f"{way}, random", name), [])
            both = [
                max((one, other), key=lambda judged: float(judged.accuracy(real.val).mean()))
                for one, other in zip(plain, borrowed, strict=False)
            ]
            return both or plain[: len(found[way, name])]

        names = tuple(sets.everything())
        return RankingResult(
            tuple(sets.distilled),
            names,
            {name: accuracy(found["own", name]) for name in names},
            {name: accuracy(found["hard", name]) for name in names},
            {name: accuracy(found["augmented", name]) for name in names},
            {name: accuracy(beside("own", name)) for name in names},
            {name: accuracy(beside("augmented", name)) for name in names},
            torch.stack(
                [
                    choose(grid, runs.get(*each), real).accuracy(real.test)
                    for each in self._full(sets, real, key)
                ]
            ).view(max(map(len, sets.everything().values())), -1),
            {name: tuple(one.candidate for one in found["own", name]) for name in names},
            tuple(name for name, many in sets.distilled.items() if many[0].labels.kind != "hard"),
            tuple(name for name, many in sets.distilled.items() if many[0].order is not None),
            self.w,
            self.g,
        )

    def _grid(self, *, learned: bool = False, augment: str = "") -> Protocol:
        return on_grid(self.recipe.but(augment=augment), self.rates, self.models, learned=learned)

    def _asked(self, sets: Sets, key: Key) -> dict[tuple[str, str], list[list[Training]]]:
        """The candidates of each replicate, by way of training and set."""
        if not sets.random:
            raise UserError("ranking needs a random subset beside the sets", fix="add one as random_subset")
        named = sets.everything()
        hard = {name: tuple(labelled(one, "hard") for one in many) for name, many in named.items()}
        borrowed = {
            name: lent for name, many in sets.distilled.items() if (lent := _borrowed(sets.random, many))
        }
        ways: tuple[tuple[str, Mapping[str, Replicates], bool, str], ...] = (
            ("own", named, True, ""),
            ("hard", hard, False, ""),
            ("augmented", named, True, self.augment),
            ("own, random", borrowed, False, ""),
            ("augmented, random", borrowed, False, self.augment),
        )
        return {
            (way, name): candidates
            for way, given, learned, augment in ways
            for name, candidates in of_sets(
                self._grid(learned=learned, augment=augment), self.net, given, key
            ).items()
        }

    def _full(self, sets: Sets, real: Splits, key: Key) -> list[list[Training]]:
        replicates = max(map(len, sets.everything().values()))
        return of_full(self._grid(), self.net, real, replicates, key)


def _borrowed(random: Replicates, lenders: Replicates) -> Replicates:
    """Random subsets with the soft labels of a set, in order within each class; none where its labels are hard.

    A class that no label of the set favours has none to lend: then there are none at all.
    """
    lent = []
    for own, lender in zip(random, lenders, strict=False):
        if lender.labels.kind == "hard":
            return ()
        own_class, theirs = own.labels.hard(), lender.labels.hard()
        index = torch.empty_like(own_class)
        for c in sorted(set(own_class.tolist())):
            places, offered = (own_class == c).nonzero().flatten(), (theirs == c).nonzero().flatten()
            if not len(offered):
                return ()
            index[places] = offered[torch.arange(len(places), device=offered.device) % len(offered)]
        lent.append(replace(own, labels=lender.labels.take(index)))
    return tuple(lent)


@dataclass(frozen=True, eq=False)
class RankingResult(Result):
    """Test accuracies in [0, 1], [replicates, networks] by set: own protocol, hard labels, with augmentation.

    ``random`` and ``random_augmented`` are those of the random subset under the protocol of each set.
    """

    analysis: ClassVar[str] = "behaviour/ranking"
    title: ClassVar[str] = "DD-Ranking's scores"
    question: ClassVar[str] = Ranking.question

    distilled: tuple[str, ...]
    names: tuple[str, ...]
    own: Mapping[str, torch.Tensor]
    hard: Mapping[str, torch.Tensor]
    augmented: Mapping[str, torch.Tensor]
    random: Mapping[str, torch.Tensor]
    random_augmented: Mapping[str, torch.Tensor]
    full: torch.Tensor
    chosen: Mapping[str, tuple[str, ...]]
    soft: tuple[str, ...]
    ordered: tuple[str, ...]
    w: float
    g: float

    def hlr(self, name: str) -> Estimate:
        """Hard label recovery: accuracy of the full data minus that of the set, both with hard labels."""
        return Estimate.mean(*units(_minus(self.full, self.hard[name])))

    def ior(self, name: str) -> Estimate:
        """Improvement over random: accuracy under the set's own protocol minus that of the random subset under it."""
        return Estimate.mean(*units(_minus(self.own[name], self.random[name])))

    def gain_augmented(self, name: str) -> Estimate:
        """The same difference where both are trained with augmentation."""
        return Estimate.mean(*units(_minus(self.augmented[name], self.random_augmented[name])))

    def worth_of_labels(self, name: str) -> Estimate:
        """Accuracy under the set's own protocol minus that with hard labels."""
        return Estimate.mean(*units(_minus(self.own[name], self.hard[name])))

    def lrs(self, name: str, w: float | None = None) -> Estimate:
        """Label-robust score: the mean over replicates of the score of ``w IOR - (1 - w) HLR``."""
        return Estimate.mean(*self._lrs(name, self.w if w is None else w))

    def ars(self, name: str, g: float | None = None) -> Estimate:
        """Augmentation-robust score, of ``g`` times the gain with augmentation plus ``1 - g`` times that without."""
        g = self.g if g is None else g
        plain = _minus(self.own[name], self.random[name])
        both = g * _minus(self.augmented[name], self.random_augmented[name]) + (1 - g) * plain
        values, unit = units(both)
        return Estimate.mean([score(x) for x in values], unit)

    def _lrs(self, name: str, w: float) -> tuple[list[float], str]:
        """The score of each replicate. The random subset's own IOR is 0."""
        gain = _minus(self.own[name], self.random[name])
        values, unit = units(w * gain - (1 - w) * _minus(self.full[: len(gain)], self.hard[name]))
        return [score(x) for x in values], unit

    def order(self, w: float) -> list[str]:
        """The distilled sets by LRS, the best first."""
        return sorted(self.distilled, key=lambda name: -self.lrs(name, w).value)

    def separated(self) -> dict[tuple[str, str], bool]:
        """For each pair of distilled sets, the better first, whether their LRS differ.

        Paired by replicate; Bonferroni's intervals, which hold for all pairs together.
        """
        pairs = list(combinations(self.order(self.w), 2))
        level = 1 - (1 - LEVEL) / max(len(pairs), 1)
        apart = {}
        for better, other in pairs:
            (first, unit), (second, _) = self._lrs(better, self.w), self._lrs(other, self.w)
            differences = [a - b for a, b in zip(first, second, strict=False)]
            apart[better, other] = Estimate.mean(differences, unit, level).low > 0
        return apart

    def headline(self) -> dict[str, Estimate]:
        """LRS and ARS of each distilled set."""
        scores = {f"{name}, LRS": self.lrs(name) for name in self.distilled}
        return scores | {f"{name}, ARS": self.ars(name) for name in self.distilled}

    def claims(self) -> tuple[Claim, ...]:
        """Each set beats random under its own labels, and with augmentation."""
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    "beats random under its own labels",
                    name,
                    "trains better networks than a random real subset of its size, also where that has its labels and "
                    "each its best step size",
                    self.ior(name),
                    "greater",
                    0.0,
                    "a second random subset in the set's place",
                    "the mean training image of each class, in the set's place",
                ),
                Claim(
                    "beats random with augmentation",
                    name,
                    "trains better networks than a random real subset of its size, where both are augmented",
                    self.gain_augmented(name),
                    "greater",
                    0.0,
                    "a second random subset in the set's place",
                    "the mean training image of each class, in the set's place",
                ),
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Scores, accuracies, the order with what is separated, and the scores at other weights."""
        apart = self.separated()
        ranked = self.order(self.w)
        scores: list[tuple[str | int | Estimate, ...]] = []
        accuracies: list[tuple[str | int | Estimate, ...]] = []
        for name in self.names:
            is_random = name == RANDOM
            scores.append(
                (
                    name,
                    self.hlr(name),
                    "" if is_random else self.ior(name),
                    "" if is_random else self.gain_augmented(name),
                    self.lrs(name),
                    "" if is_random else self.ars(name),
                )
            )
            many = (self.own, self.hard, self.augmented, self.random, self.random_augmented)
            accuracies.append((name, *(Estimate.mean(*units(each[name])) for each in many)))
        accuracies.append((FULL, "", Estimate.mean(*units(self.full)), "", "", ""))
        order = tuple(
            (
                place,
                name,
                self.lrs(name),
                ", ".join(other for other in ranked[place:] if apart[name, other]) or "none",
            )
            for place, name in enumerate(ranked, 1)
        )
        named = [name for name in self.names if name != RANDOM]
        return (
            Table(
                f"DD-Ranking's scores, w = {self.w:g}, g = {self.g:g}",
                ("set", "HLR (less is better)", "IOR", "gain over random, augmented", "LRS", "ARS"),
                tuple(scores),
            ),
            Table(
                "The test accuracies that they are made of",
                (
                    "set",
                    "own labels and step size",
                    "hard labels",
                    "own, augmented",
                    "random under its protocol",
                    "random, augmented",
                ),
                tuple(accuracies),
            ),
            Table("Order by LRS", ("place", "set", "LRS", "clearly better than"), order),
            Table(
                "LRS at other weights w of IOR against HLR",
                ("set", *(f"w = {w:g}" for w in WEIGHTS)),
                tuple((name, *(self.lrs(name, w) for w in WEIGHTS)) for name in named),
            ),
            Table(
                "ARS at other weights g of training with augmentation",
                ("set", *(f"g = {g:g}" for g in WEIGHTS)),
                tuple((name, *(self.ars(name, g) for g in WEIGHTS)) for name in named),
            ),
            Table(
                "Chosen on validation under the own protocol, replicate by replicate",
                ("set", "candidate"),
                tuple(
                    (name, "; ".join(one or "its own step size" for one in self.chosen[name]))
                    for name in self.names
                ),
            ),
        )

    def notes(self) -> tuple[str, ...]:
        """What the scores are of, how far they order the sets, and whose protocol is a special one."""
        apart = self.separated()
        orders = {tuple(self.order(w)) for w in WEIGHTS}
        found = [
            "Accuracies are fractions. Rates are chosen on validation, from one grid for all (DD-Ranking: on test). A "
            f"score is the mean of the replicates' scores, not the score of their mean. No gain at all is {score(0):.3f}."
        ]
        if apart:
            found.append(
                f"Of {len(apart)} pairs of sets {sum(apart.values())} are separated in LRS (95 % for all pairs together)."
            )
            found.append(
                "The order is the same at all five weights w."
                if len(orders) == 1
                else f"The order depends on w: {len(orders)} different ones at five weights."
            )
        if self.soft:
            found.append(
                f"{', '.join(self.soft)}: soft labels. The random subset beside them has its hard labels or theirs, what is "
                "better on validation; a teacher's labels for it, as DD-Ranking has them, are not made."
            )
        if self.ordered:
            found.append(
                f"{', '.join(self.ordered)}: ordered steps, which are replayed as they are. No rate is chosen and nothing is "
                "augmented, so the augmented gain sets them against augmented random images."
            )
        return tuple(found)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """The scores, and LRS against its weight."""
        return {self.title: self.plot, "LRS against the weight w of IOR": self.plot_weights}

    def plot(self, ax: Axes) -> None:
        """LRS (filled) and ARS (hollow) of each set with intervals; dotted: no gain at all."""
        names = [*self.order(self.w), *(n for n in self.names if n not in self.distilled)]
        for x, name in enumerate(names):
            both = [(self.lrs(name), -0.12, colour(name))]
            if name != RANDOM:
                both.append((self.ars(name), 0.12, "white"))
            for e, shift, face in both:
                bars = [[e.value - e.low], [e.high - e.value]] if e.n > 1 else None
                ax.errorbar(
                    x + shift, e.value, bars, fmt="o", color=colour(name), markerfacecolor=face, capsize=4
                )
        ax.axhline(score(0), color="grey", lw=1, ls=":")
        ax.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.set_ylabel("score (filled: LRS, hollow: ARS)")
        ax.spines[["top", "right"]].set_visible(False)

    def plot_weights(self, ax: Axes) -> None:
        """LRS of each set at five weights: lines that cross are an order that the weight makes."""
        for name in self.names:
            values = [self.lrs(name, w) for w in WEIGHTS]
            ax.plot(WEIGHTS, [e.value for e in values], marker="o", ms=4, color=colour(name), label=name)
            if values[0].n > 1:
                lows, highs = [e.low for e in values], [e.high for e in values]
                ax.fill_between(WEIGHTS, lows, highs, color=colour(name), alpha=0.12, linewidth=0)
        ax.axvline(self.w, color="grey", lw=1, ls=":")
        ax.set_xlabel("w (0: HLR alone, 1: IOR alone)")
        ax.set_ylabel("LRS")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)


def _minus(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Differences [replicates, networks] over the replicates that both have."""
    pairs = min(len(first), len(second))
    return first[:pairs] - second[:pairs]
