"""What one distilled image does: retrain without it, and look at what moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from distillens.analyses.pointwise._grid import grid_of
from distillens.analyses.pointwise._retrained import (
    again,
    chosen,
    first_copy,
    moved_hits,
    moved_losses,
    without,
    without_each,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.ranks import correlation, ranks
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ENDS = 5  # points shown from each end of the order
POINT, INIT = "distilled point", "initialisation"
RELIABLE = 0.8  # of a mean over initialisations: the correlation with the same from others that a stable answer needs


@dataclass(frozen=True)
class LeaveOneOut:
    """Retraining without each stored point, from several initialisations; and without whole groups of them.

    The influence of point j on a real image is the image's loss without j minus its loss with all points: positive
    where j helps. All retrainings of an initialisation start from the same parameters, so they are differences
    of like with like; initialisations are averaged, and how far they agree is reported first. Influence on correctness is
    1 where the image is right with all points and wrong without, -1 where the reverse.

    Each class of more than one point is left out as a whole too, and each of ``groups`` (the points' numbers).
    A last network of each initialisation is trained with all points under other rounding: what moves it is no influence.

    Replicate 0 of each set is taken: 2 + P trainings an initialisation and set. The random real subset goes
    through the same pipeline. ``only`` keeps the named sets (all where empty). Influence is measured on the whole
    test split and on ``train_images`` random training images.

    Source: Yang et al. 2024, section 5, figure 10 (one initialisation; test images; exact retraining).
    """

    question: ClassVar[str] = "Which real images does one distilled image move, and can that be trusted?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "inits")

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=300)
    inits: int = 3
    top: int = 9
    train_images: int = 2000
    groups: tuple[tuple[int, ...], ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, "leave_one_out", inits=self.inits, top=self.top, train_images=self.train_images)
        for group in self.groups:
            if len(set(group)) < 2 or min(group) < 0:
                raise UserError(
                    "leave_one_out: a group names two points or more by their numbers, from 0",
                    got=repr(group),
                    fix="single points are left out anyway",
                )

    @classmethod
    def defaults(cls, like: Dataset) -> LeaveOneOut:
        """The paper's training with the field's network for such images."""
        return cls(ConvNet.defaults(like))

    @classmethod
    def as_published(cls, like: Dataset) -> LeaveOneOut:
        """The paper's training, from two initialisations: with its single one nothing can be said of the error."""
        return cls(ConvNet.defaults(like), inits=2)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The populations of each set."""
        return [t for one in self._chosen(sets).values() for t in self._training(one, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> LeaveOneOutResult:
        """The influences."""
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        train = real.train.take(key.fold("train images").permutation(len(real.train))[: self.train_images])
        found: dict[str, dict[str, Any]] = {}
        for name, one in self._chosen(sets).items():
            single, once_more, *grouped = runs.get(*self._training(one, key))
            effect = moved_losses(single, self.inits, real.test)  # [inits, P, n]
            first = single.losses(real.test).view(self.inits, -1, len(real.test))[:, 0]
            labels = one.labels.hard()
            groups = self._groups(one)
            found[name] = {
                "labels": labels,
                "influence": effect,
                "correctness": moved_hits(single, self.inits, real.test),
                "rounding": once_more.losses(real.test) - first,
                "group_names": tuple(groups),
                "grouped": torch.cat(
                    [
                        p.losses(real.test).view(self.inits, -1, len(real.test)) - first[:, None]
                        for p in grouped
                    ]
                    or [effect[:, :0]],
                    1,
                ),
                "members": tuple(groups.values()),
                "agreement": self_agreement(effect),
                "shared": own_class_share(effect.mean(0), labels, real.test),
                "points": one.dataset().pixels()[first_copy(one)],
                "most_test": _most_moved(effect.mean(0), real.test, self.top),
                "most_train": _most_moved(moved_losses(single, self.inits, train).mean(0), train, self.top),
            }
        return LeaveOneOutResult(
            distilled=tuple(name for name in sets.distilled if name in found),
            classes=real.test.classes,
            test_labels=real.test.labels.hard(),
            top=self.top,
            **{part: {name: one[part] for name, one in found.items()} for part in next(iter(found.values()))},
        )

    def _chosen(self, sets: Sets) -> dict[str, DistilledDataset]:
        return chosen(sets, self.only, "leave_one_out")

    def _groups(self, one: DistilledDataset) -> dict[str, tuple[int, ...]]:
        """The groups of a set that are left out as a whole, by name."""
        labels = one.labels.hard()
        members = [(labels == c).nonzero().flatten().tolist() for c in range(len(one.classes))]
        groups = {one.classes[c]: tuple(own) for c, own in enumerate(members) if 1 < len(own) < len(one)}
        for group in self.groups:
            if max(group) >= len(one) or len(set(group)) >= len(one):
                raise UserError(
                    "leave_one_out: a group does not fit the set",
                    got=repr(group),
                    expected=f"some of the points 0 to {len(one) - 1}, not all",
                )
            if set(group) not in map(set, groups.values()):
                groups["points " + " ".join(map(str, group))] = group
        return groups

    def _training(self, one: DistilledDataset, key: Key) -> list[Training]:
        asked = one, self.net, self.recipe, self.inits, key
        found = [without_each(*asked), again(*asked)]
        groups = self._groups(one)
        if groups:
            found.append(without(one, groups.values(), self.net, self.recipe, self.inits, key))
        return found


def _most_moved(effect: torch.Tensor, data: Dataset, top: int) -> torch.Tensor:
    """The images [P, top, c, h, w] with the largest influence of each point, as pixels."""
    index = effect.topk(min(top, len(data)), dim=1).indices
    return data.space.to_pixels(data.images[index.flatten()]).view(*index.shape, *data.shape)


def own_class_share(effect: torch.Tensor, labels: torch.Tensor, data: Dataset) -> torch.Tensor:
    """For each point the share of its positive influence [P] that falls on its class, minus that class's share."""
    own = labels[:, None] == data.labels.hard()[None]
    positive = effect.clamp(min=0)
    total = positive.sum(1)
    share = (positive * own).sum(1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return share - own.double().mean(1)


def self_agreement(effect: torch.Tensor) -> torch.Tensor:
    """For each point the rank correlation [P] of its influences over images, averaged over pairs of initialisations.

    Empty with a single initialisation: nothing is known.
    """
    places = ranks(effect)
    pairs = list(combinations(range(len(effect)), 2))
    if not pairs:
        return effect.new_empty(0)
    return torch.stack([correlation(places[a], places[b]) for a, b in pairs]).mean(0)


def point_agreement(effect: torch.Tensor) -> torch.Tensor:
    """For each image the rank correlation [n] of its influences over *points*, averaged over pairs of initialisations.

    The measure under which leave-one-out on 100 real digits reached 0.05 to 0.10. Empty with a single initialisation.
    """
    return self_agreement(effect.transpose(1, 2))


def needed(agreement: float) -> float:
    """Initialisations whose mean agrees to ``RELIABLE`` with that of as many others, from the agreement of single ones.

    Spearman and Brown's formula; infinite where single ones do not agree at all.
    """
    if agreement <= 0:
        return math.inf
    return max(1.0, RELIABLE * (1 - agreement) / (agreement * (1 - RELIABLE)))


@dataclass(frozen=True, eq=False)
class LeaveOneOutResult(Result):
    """Influences on test images [inits, P, n] by set, what they agree on, and the images they move most.

    ``top`` images count as those that a point moves most; ``rounding`` [inits, n] is how far rounding alone moves the loss of each image, ``grouped`` [inits, groups, n] how far
    leaving out each of ``members`` does.
    """

    analysis: ClassVar[str] = "pointwise/leave_one_out"
    title: ClassVar[str] = "Leave-one-out influence"
    question: ClassVar[str] = LeaveOneOut.question

    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    test_labels: torch.Tensor
    top: int
    labels: Mapping[str, torch.Tensor]
    influence: Mapping[str, torch.Tensor]
    correctness: Mapping[str, torch.Tensor]
    rounding: Mapping[str, torch.Tensor]
    group_names: Mapping[str, tuple[str, ...]]
    grouped: Mapping[str, torch.Tensor]
    members: Mapping[str, tuple[tuple[int, ...], ...]]
    agreement: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor]
    points: Mapping[str, torch.Tensor]
    most_test: Mapping[str, torch.Tensor]
    most_train: Mapping[str, torch.Tensor]

    def mean_influence(self, name: str) -> torch.Tensor:
        """Influence [P, n] averaged over initialisations."""
        return self.influence[name].mean(0)

    def standard_error(self, name: str) -> torch.Tensor:
        """The standard error [P, n] of each mean influence over initialisations (infinite with one)."""
        effect = self.influence[name]
        if len(effect) < 2:
            return torch.full_like(effect[0], torch.inf)
        return torch.div(effect.std(0), len(effect) ** 0.5)

    def floor(self, name: str) -> torch.Tensor:
        """What rounding alone does to each image's mean influence [n]: its root mean square, over the root of the initialisations."""
        moved = self.rounding[name]
        return torch.div(moved.square().mean(0).sqrt(), len(moved) ** 0.5)

    def reliability(self, name: str) -> Estimate:
        """Rank correlation of influences between initialisations, over images, one value a point."""
        return _mean_or_nothing(self.agreement[name], POINT)

    def over_points(self, name: str) -> Estimate:
        """Rank correlation of influences between initialisations, over points, one value a test image."""
        return _mean_or_nothing(point_agreement(self.influence[name]), "test image")

    def beyond_real(self, name: str) -> Estimate | None:
        """The agreement of a set's points minus that of real images in their place; Welch's interval over points.

        None where there is no random subset, or a single initialisation.
        """
        if RANDOM not in self.agreement or not len(self.agreement[name]):
            return None
        own, real = self.agreement[name], self.agreement[RANDOM]
        parts = {"points": own.tolist(), "real": real.tolist()}
        return Estimate.components(float(own.mean() - real.mean()), parts, POINT)

    def stays(self, name: str) -> Estimate:
        """Share of positive influence on the own class minus that class's share of the images."""
        return Estimate.mean(self.shared[name].tolist(), POINT)

    def most_moved(self, name: str) -> Estimate:
        """The share of the ``top`` test images that each point helps most which are of its class."""
        effect = self.mean_influence(name)
        most = effect.topk(min(self.top, effect.shape[1]), dim=1).indices
        own = self.test_labels.cpu()[most.cpu()] == self.labels[name].cpu()[:, None]
        return Estimate.share(own.double().mean(1).tolist(), most.shape[1], POINT)

    def total(self, name: str, point: int) -> Estimate:
        """By how much a point lowers the mean test loss, over initialisations."""
        return Estimate.mean(self.influence[name][:, point].mean(1).tolist(), INIT)

    def headline(self) -> dict[str, Estimate]:
        """Reliability and own-class share of each set."""
        found = {
            f"{name}: agreement between initialisations": self.reliability(name) for name in self.influence
        }
        return found | {f"{name}: own-class share above chance": self.stays(name) for name in self.influence}

    def claims(self) -> tuple[Claim, ...]:
        """Influences repeat between initialisations, more than those of real images; stay in class; the most moved images are of it."""
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    "influence repeats",
                    name,
                    "what one point moves agrees between initialisations (rank correlation above 0.3)",
                    self.reliability(name),
                    "greater",
                    0.3,
                    "influences of initialisations that share nothing",
                    "one influence with little noise at each initialisation",
                ),
                Claim(
                    "influence stays in class",
                    name,
                    "a point's helpful influence falls on its own class beyond that class's share",
                    self.stays(name),
                    "greater",
                    0.05,
                    "influences shuffled over the images",
                    "a random real subset (the positive control)",
                    "paper T9",
                ),
                Claim(
                    "the most moved are of its class",
                    name,
                    f"more than half of the {self.top} test images that a point helps most are of its class",
                    self.most_moved(name),
                    "greater",
                    0.5,
                    "influences shuffled over the images",
                    "a random real subset (the positive control)",
                    "paper T9",
                ),
            ]
            beyond = self.beyond_real(name)
            if beyond is not None:
                claims.append(
                    Claim(
                        "repeats more than real",
                        name,
                        "its points' influence agrees between initialisations more than that of real images",
                        beyond,
                        "greater",
                        0.0,
                        "another random real subset in the set's place",
                        "influence with half of the noise of that in the subset's place",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Reliability two ways, the errors of single entries, the strongest points, whole classes left out."""
        return (
            self._trust(),
            self._entries(),
            *(self._strongest(name) for name in self.distilled),
            *(self._groups(name) for name in self.distilled if self.members[name]),
        )

    def _trust(self) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name, effect in self.influence.items():
            over_images, over_points = self.reliability(name), self.over_points(name)
            rows.append(
                (
                    name,
                    effect.shape[1],
                    effect.shape[0],
                    over_images,
                    _count(over_images),
                    over_points,
                    _count(over_points),
                    self.stays(name),
                    self.most_moved(name),
                )
            )
        columns = (
            "set",
            "points",
            "initialisations",
            "agreement over images",
            f"initialisations for {RELIABLE:g}",
            "agreement over points",
            f"initialisations for {RELIABLE:g} of these",
            "own-class share above chance",
            f"of the {self.top} most moved, of its class",
        )
        return Table("How far influences can be trusted, and where they fall", columns, tuple(rows))

    def _entries(self) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in self.influence:
            mean, error = self.mean_influence(name), self.standard_error(name)
            clear = (mean.abs() > 2 * error).double().mean(1)
            flipped = self.correctness[name].double()
            rows.append(
                (
                    name,
                    Estimate.mean(mean.abs().mean(1).tolist(), POINT),
                    Estimate.mean(error.mean(1).tolist(), POINT)
                    if len(self.influence[name]) > 1
                    else "unknown",
                    Estimate.mean(self.floor(name).tolist(), "test image"),
                    Estimate.mean(clear.tolist(), POINT),
                    Estimate.mean(flipped.clamp(min=0).mean((0, 2)).tolist(), POINT),
                    Estimate.mean((-flipped).clamp(min=0).mean((0, 2)).tolist(), POINT),
                )
            )
        columns = (
            "set",
            "size of an influence on a loss",
            "its standard error",
            "what rounding alone does",
            "share beyond 2 standard errors",
            "share of images lost without a point",
            "share of images gained",
        )
        return Table("Single influences beside their errors", columns, tuple(rows))

    def _strongest(self, name: str) -> Table:
        totals = self.mean_influence(name).mean(1)
        order = totals.argsort(descending=True).tolist()
        ends = order if len(order) <= 2 * ENDS else [*order[:ENDS], *order[-ENDS:]]
        rows = tuple((j, self.classes[int(self.labels[name][j])], self.total(name, j)) for j in ends)
        return Table(
            f"{name}: the most helpful points, and the least helpful or most harmful",
            ("point", "class", "lowers the mean test loss by"),
            rows,
        )

    def _groups(self, name: str) -> Table:
        single = self.influence[name]
        rows: list[tuple[str | int | Estimate, ...]] = []
        for g, (label, members) in enumerate(zip(self.group_names[name], self.members[name], strict=True)):
            together = self.grouped[name][:, g]
            own = torch.isin(self.test_labels, self.labels[name][list(members)])
            apart = single[:, list(members)].sum(1)
            rows.append(
                (
                    label,
                    len(members),
                    *(
                        Estimate.mean(values.mean(1).tolist(), INIT)
                        for values in (together, together[:, own])
                    ),
                    Estimate.mean((together - apart)[:, own].mean(1).tolist(), INIT),
                )
            )
        columns = (
            "left out",
            "points",
            "raises the mean test loss by",
            "that of their own classes by",
            "there beyond the sum of single points",
        )
        return Table(f"{name}: points left out together", columns, tuple(rows))

    def notes(self) -> tuple[str, ...]:
        """What the intervals cover."""
        inits = next(iter(self.influence.values())).shape[0]
        return (
            f"Influences are averaged over {inits} initialisation{'s' if inits > 1 else ''} of one replicate a set; "
            "the intervals cover that set's points, not other distillations.",
        )

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Agreement and share, then for each distilled set the images that its points move most."""
        panels: dict[str, Callable[[Axes], None]] = {
            "Agreement between initialisations and own-class share, a dot a point": self.plot,
            "How much each point lowers the mean test loss, in order, with its standard error": self._plot_totals,
        }
        for name in self.distilled:
            panels[f"{name}: one point of each class and the test images that it helps most"] = grid_of(
                self.points[name], self.most_test[name], self.labels[name]
            )
        for name in self.distilled:
            panels[f"{name}: the same points and the training images that they help most"] = grid_of(
                self.points[name], self.most_train[name], self.labels[name]
            )
        return panels

    def plot(self, ax: Axes) -> None:
        """Own-class share against reliability."""
        for name in self.influence:
            if len(self.agreement[name]):
                ax.scatter(
                    self.agreement[name],
                    self.shared[name],
                    s=22,
                    alpha=0.7,
                    lw=0,
                    color=colour(name),
                    label=name,
                )
        ax.axhline(0, color="grey", lw=1, ls=":")
        ax.axvline(0, color="grey", lw=1, ls=":")
        ax.set_xlabel("agreement between initialisations (rank correlation over test images)")
        ax.set_ylabel("own-class share above chance")
        if ax.get_legend_handles_labels()[0]:  # with one initialisation nothing can agree
            ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)

    def _plot_totals(self, ax: Axes) -> None:
        for name, effect in self.influence.items():
            totals = effect.mean(2)
            order = totals.mean(0).argsort(descending=True)
            means = totals.mean(0)[order]
            place = torch.linspace(0, 1, len(order))
            ax.plot(place, means, color=colour(name), label=name, lw=1.6)
            if len(totals) > 1:
                error = totals.std(0)[order] / len(totals) ** 0.5
                ax.fill_between(place, means - error, means + error, color=colour(name), alpha=0.15, lw=0)
        ax.axhline(0, color="grey", lw=1, ls=":")
        ax.set_xlabel("points of the set, from the most helpful to the most harmful")
        ax.set_xticks([0, 0.5, 1], ["first", "middle", "last"])
        ax.set_ylabel("rise of the mean test loss without it")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)


def _mean_or_nothing(values: torch.Tensor, unit: str) -> Estimate:
    """The mean of values that may not be there: with a single initialisation nothing is known."""
    if not len(values):
        return Estimate(0.0, -math.inf, math.inf, 0, unit)
    return Estimate.mean(values.tolist(), unit)


def _count(agreement: Estimate) -> str:
    """How many initialisations a stable answer needs, from low to high end of an agreement's interval."""
    if not agreement.n:
        return "one is not enough to know"
    best, likely, worst = (needed(x) for x in (agreement.high, agreement.value, agreement.low))
    if math.isinf(likely):
        return "no number"
    return (
        f"{math.ceil(likely)} [{math.ceil(best)}, {'no number' if math.isinf(worst) else math.ceil(worst)}]"
    )
