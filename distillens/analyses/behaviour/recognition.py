"""Recognition of distilled images by networks that were trained on real data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.behaviour._judges import (
    SEEN,
    TEST,
    UNSEEN,
    above_chance,
    chance,
    difference,
    of_class,
    published,
    recipe,
    shown,
    training,
)
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import REPLICATE, Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets import default_net, distance, labels_of, made_with
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.nets.resnet18 import ResNet18
from distillens.nets.resnet34 import ResNet34
from distillens.nets.vit import ViT
from distillens.paper import PAIRS
from distillens.runs import Runs
from distillens.train import Population, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Noise that makes unseen real images as hard as a set, in standard deviations of the training images; 0 comes before.
NOISE = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
WEAK = 0.5  # a judge below this share of its classes' best possible gain over chance is called weak
KINDS = ("the same\nnetwork", "the same kind,\nother settings", "both\nconvolutional", "another\nfamily")

# The paper's judges from left to right, and its residual networks' stem and norm.
PAPER: tuple[Net, ...] = (ConvNet(width=16), ConvNet(), ResNet18(norm="batch"), ResNet34(norm="batch"))
# Its published notebook keeps its results in the order ResNet-18, ConvNet, ConvNet-Tiny, ResNet-34 and draws them under
# these names: the place in PAPER of what stands under each.
NOTEBOOK = (("ConvNet-Tiny", 2), ("ConvNet", 1), ("ResNet-18", 0), ("ResNet-32", 3))


@dataclass(frozen=True)
class Recognition:
    """The share of each set's images that real-trained networks recognise: several judges, several seeds each.

    Beside the sets: the test split, real images that no judge has seen (one random set of the distilled set's size for
    each replicate, cut from the validation split), and the random subset, which all judges have seen. Chance is what
    the same predictions would get if the labels were permuted.

    A judge is near to a set or ``far`` from it (that ``nets.distance`` or more) by the network that the set was
    distilled on; where a set does not say, the field's ConvNet is assumed. Some judges are better than others, and some
    bear hard images better: what near judges have over far ones on a set is compared with what they have over them on
    unseen real images under as much noise as makes these as hard for all judges together. ``lengths`` are the shares of the
    recipe's steps that the judges train for, where not all of them. ``pairs`` are pairs of sets (better, worse) whose
    order is asked about, fixed beforehand.

    Source: Yang et al. 2024, section 3, figure 2 (four judges, one seed each), and section 6 for the order of the sets.
    """

    question: ClassVar[str] = "Do networks that were trained on real data recognise distilled images?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "seeds")

    judges: tuple[Net, ...] = (*PAPER, MLP(), ViT())
    recipe: Recipe = Recipe(steps=7840, batch=256, optimiser="adam", lr=0.001, schedule="cosine")
    lengths: tuple[float, ...] = ()
    seeds: int = 3
    far: int = 2
    pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        at_least(1, "recognition", judges=len(self.judges), seeds=self.seeds, far=self.far)
        if self.lengths and len(self.lengths) != len(self.judges):
            raise UserError(
                "recognition: every judge needs a length",
                got=f"{len(self.lengths)} lengths for {len(self.judges)} judges",
                fix="leave lengths empty: all train for all of the recipe's steps",
            )
        if not all(0 < length <= 1 for length in self.lengths):
            raise UserError(
                "recognition: lengths are shares of the recipe's steps",
                got=repr(self.lengths),
                expected="0 to 1",
            )
        for pair in self.pairs:
            if len(pair) != 2 or pair[0] == pair[1]:
                raise UserError("recognition: a pair names two different sets", got=repr(pair))

    @classmethod
    def defaults(cls, like: Dataset) -> Recognition:
        """The field's network, a narrow one, the two residual networks, and two of other families.

        The narrow one has an eighth of the width, as in the paper. On digits' scale it has at least 8 channels, and the
        other deep networks are cut down to what judges well on the validation split in seconds.
        """
        net = ConvNet.defaults(like)
        h, w = like.shape[1:]
        if h * w <= 256:
            judges: tuple[Net, ...] = (
                ConvNet(net.depth, max(8, net.width // 8)),
                net,
                ResNet18(width=4, norm="batch"),
                ResNet34(width=4, norm="batch"),
                MLP.defaults(like),
                # Four patches: on smaller ones a transformer needs far more than these 1,078 images.
                ViT(_patch(h, w), depth=2, width=48),
            )
        else:
            narrow = ConvNet(net.depth, net.width // 8)
            judges = (narrow, net, *PAPER[2:], MLP.defaults(like), ViT.defaults(like))
        return cls(judges, recipe(like))

    @classmethod
    def as_published(cls, like: Dataset) -> Recognition:
        """The paper's four judges, one seed: ConvNet-Tiny 20 passes, ConvNet 40, batches of 256, SGD 0.01/0.9.

        Its residual networks were downloaded and nothing is known of their training: here they are trained as its
        ConvNet is. Its judges saw all training images; here the validation split is left out.
        """
        return cls(_at_scale(like), published(like), (0.5, 1.0, 1.0, 1.0), seeds=1, pairs=PAIRS)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One population a judge, on all real training data."""
        lengths = self.lengths or (1.0,) * len(self.judges)
        steps = [max(1, round(length * self.recipe.steps)) if self.recipe.steps else 0 for length in lengths]
        return [
            training(real, net, self.recipe.but(steps=count), self.seeds, key)
            for net, count in zip(self.judges, steps, strict=True)
        ]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> RecognitionResult:
        """Recognition of every set by every judge."""
        sets.check_against(real)
        judges = runs.get(*self.trainings(sets, real, key=key))
        asked = {**shown(sets, real, key), TEST: [real.test]}
        hits, chances, labels = {}, {}, {}
        for name, datasets in asked.items():
            predicted = [torch.stack([p.predictions(data) for p in judges]) for data in datasets]
            labels[name] = tuple(data.labels.hard() for data in datasets)
            pairs = list(zip(predicted, labels[name], strict=True))
            hits[name] = tuple((p == y).double().mean(1) for p, y in pairs)
            chances[name] = torch.stack([chance(p, y, real.train.k) for p, y in pairs])
        harder = tuple(
            torch.stack([hits[UNSEEN][r], *_harder(judges, data, real.train, key.fold("harder", r))])
            for r, data in enumerate(asked[UNSEEN])
        )
        known = {name: made_with(many[0]) for name, many in sets.distilled.items()}
        assumed = default_net(real.train)
        return RecognitionResult(
            labels_of(self.judges),
            tuple(sets.distilled),
            real.train.classes,
            hits,
            labels,
            chances,
            torch.stack([p.accuracy(real.test) for p in judges]),
            {name: tuple(distance(net or assumed, j) for j in self.judges) for name, net in known.items()},
            tuple(name for name, net in known.items() if net is None),
            self.far,
            self.pairs,
            tuple(map(type, self.judges)) == tuple(map(type, PAPER)),
            harder,
        )


def _harder(judges: Sequence[Population], data: Dataset, train: Dataset, key: Key) -> list[torch.Tensor]:
    """The hits [judges, n] on images under each amount of noise; one draw for all, so that more is harder."""
    drawn = (train.images.std() * key.normal(*data.images.shape).to(data.device)).to(data.images)
    y = data.labels.hard()
    found = []
    for amount in NOISE:
        noisy = Dataset(data.images + amount * drawn, data.labels, data.classes, data.space)
        found.append(torch.stack([(p.predictions(noisy) == y).double().mean(0) for p in judges]))
    return found


def _at_scale(like: Dataset) -> tuple[Net, ...]:
    """The paper's judges; on images of another size than CIFAR-10's the field's settings for such images."""
    net = ConvNet.defaults(like)
    residual = (replace(kind.defaults(like), norm="batch") for kind in (ResNet18, ResNet34))
    return (ConvNet(net.depth, max(1, net.width // 8)), net, *residual)


def _patch(h: int, w: int) -> int:
    """The largest patch that fits both sides at least twice; 1 where none does."""
    return max(size for size in range(1, max(2, min(h, w) // 2 + 1)) if h % size == w % size == 0)


@dataclass(frozen=True, eq=False)
class RecognitionResult(Result):
    """Images recognised (the share of a judge's seeds) [judges, n] for each replicate of each set.

    Shares expected by chance are [replicates, judges], the judges' test accuracies [judges, seeds]. ``harder`` are the unseen
    real images recognised without and with growing noise [amounts, judges, n], for each replicate.
    """

    analysis: ClassVar[str] = "behaviour/recognition"
    title: ClassVar[str] = "Recognition by real-trained networks"
    question: ClassVar[str] = Recognition.question

    judges: tuple[str, ...]
    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    hits: Mapping[str, tuple[torch.Tensor, ...]]
    labels: Mapping[str, tuple[torch.Tensor, ...]]
    chances: Mapping[str, torch.Tensor]
    judge_accuracy: torch.Tensor
    distances: Mapping[str, tuple[int, ...]]
    assumed: tuple[str, ...]
    far: int
    pairs: tuple[tuple[str, str], ...]
    papers: bool
    harder: tuple[torch.Tensor, ...]

    @property
    def k(self) -> int:
        """Classes."""
        return len(self.classes)

    def by_judge(self, name: str, j: int) -> Estimate:
        """The share of a set's images that one judge recognises."""
        return _share([one[j] for one in self.hits[name]])

    def recognised(self, name: str) -> Estimate:
        """The share of a set's images that the judges recognise, averaged over judges."""
        return _share(self._mean(name))

    def above_chance(self, name: str) -> Estimate:
        """The recognised share minus what permuted labels would give."""
        return above_chance(self._mean(name), self.chances[name].mean(1).tolist())

    def above(self, name: str, other: str) -> Estimate:
        """The recognised share of a set minus that of another, paired."""
        return difference(self._mean(name), self._mean(other))

    def near_minus_far(self, hits: Sequence[torch.Tensor], distances: Sequence[int]) -> list[torch.Tensor]:
        """How much more of the near judges than of the far ones recognise each image, [n] for each replicate."""
        near = [j for j, d in enumerate(distances) if d < self.far]
        far = [j for j, d in enumerate(distances) if d >= self.far]
        return [one[near].mean(0) - one[far].mean(0) for one in hits]

    def as_hard_as(self, name: str) -> list[torch.Tensor]:
        """Unseen real images under the noise that brings all judges to their share on a set, [judges, n] a replicate.

        Between two amounts of noise in proportion. Sets that are recognised better than real images have these without
        noise beside them.
        """
        wanted = self.recognised(name).value
        means = [
            sum(float(one[a].mean()) for one in self.harder) / len(self.harder)
            for a in range(len(self.harder[0]))
        ]
        after = next((a for a, mean in enumerate(means) if mean <= wanted), len(means) - 1)
        if not after:
            return [one[0] for one in self.harder]
        before = after - 1
        part = min(1.0, (means[before] - wanted) / (means[before] - means[after]))
        return [(1 - part) * one[before] + part * one[after] for one in self.harder]

    def falls(self, name: str) -> Estimate | None:
        """How much better near judges are than far ones on a set, beyond what they are on real images that are as hard.

        None where all judges are near or all are far.
        """
        distances = self.distances[name]
        if not min(distances) < self.far <= max(distances):
            return None
        own, real = self.hits[name], self.as_hard_as(name)
        return difference(self.near_minus_far(own, distances), self.near_minus_far(real, distances))

    def _mean(self, name: str) -> list[torch.Tensor]:
        return [one.mean(0) for one in self.hits[name]]

    def _names(self) -> list[str]:
        return [*self.distilled, *(name for name in (SEEN, UNSEEN) if name in self.hits)]

    def _weak(self) -> tuple[bool, ...]:
        least = 1 / self.k + WEAK * (1 - 1 / self.k)
        return tuple(float(row.mean()) < least for row in self.judge_accuracy)

    def headline(self) -> dict[str, Estimate]:
        """Recognised share of each set and of unseen real images."""
        return {name: self.recognised(name) for name in [*self.distilled, UNSEEN]}

    def claims(self) -> tuple[Claim, ...]:
        """Recognised far above chance; better than unseen real images; better by near judges; in the order asked about."""
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    "recognised",
                    name,
                    "real-trained networks recognise it far above what permuted labels would give",
                    self.above_chance(name),
                    "greater",
                    0.1,
                    "the same images with permuted labels",
                    "unseen real images (the positive control)",
                    "paper T1",
                ),
                Claim(
                    "clearer than real",
                    name,
                    "real-trained networks recognise it better than real images they have not seen",
                    self.above(name, UNSEEN),
                    "greater",
                    0.0,
                    "another random set of unseen real images",
                    "the mean training image of each class",
                    "paper T1, T7",
                ),
            ]
            falls = self.falls(name)
            if falls is not None:
                claims.append(
                    Claim(
                        "recognition falls with distance",
                        name,
                        "judges near to the network that distilled it are better on it than far ones, by more than on "
                        "unseen real images that noise has made as hard",
                        falls,
                        "greater",
                        0.0,
                        "another random set of unseen real images, plain or under noise",
                        "noise that was fitted to the near judges alone",
                        "paper T2",
                    )
                )
            claims += [
                Claim(
                    f"recognised better than {worse}",
                    better,
                    f"real-trained networks recognise it better than {worse}",
                    self.above(better, worse),
                    "greater",
                    0.0,
                    "two random sets of unseen real images",
                    "the mean training image of each class beside unseen real images",
                    "paper T1",
                )
                for better, worse in self.pairs
                if better == name and worse in self.distilled
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Judge by judge, class by class, and by the judges' distance."""
        by_judge: list[tuple[str | int | Estimate, ...]] = [
            (name, *(self.by_judge(name, j) for j in range(len(self.judges))), self.recognised(name))
            for name in self._names()
        ]
        # Many images and few seeds: the seeds are what is uncertain of a judge's accuracy.
        tested = [Estimate.mean(row.tolist(), "network") for row in self.judge_accuracy]
        by_judge.append((TEST, *tested, self.recognised(TEST)))
        names = [*self._names(), TEST]
        by_class = tuple(
            (c, *(self._of_class(name, i) for name in names)) for i, c in enumerate(self.classes)
        )
        columns = tuple(
            f"{j} (weak)" if weak else j for j, weak in zip(self.judges, self._weak(), strict=True)
        )
        tables = [
            Table("Share recognised, by judge", ("images", *columns, "all judges"), tuple(by_judge)),
            Table("Share recognised, by class, all judges", ("class", *names), by_class),
        ]
        fallen = tuple(self._by_distance(name) for name in self.distilled if self.falls(name) is not None)
        if fallen:
            title = "Share recognised, by near judges and by far ones"
            columns = (
                "set",
                "near",
                "far",
                "near - far",
                "near - far, real",
                "near - far, real as hard",
                "fall",
            )
            tables.append(Table(title, columns, fallen))
        return tuple(tables)

    def _of_class(self, name: str, c: int) -> str | Estimate:
        found = of_class(self._mean(name), self.labels[name], c)
        return _share(found) if found else ""

    def _by_distance(self, name: str) -> tuple[str | int | Estimate, ...]:
        distances = self.distances[name]
        both = [
            _share(
                [
                    one[[j for j, d in enumerate(distances) if (d >= self.far) == far]].mean(0)
                    for one in self.hits[name]
                ]
            )
            for far in (False, True)
        ]
        beside = (self.hits[name], self.hits[UNSEEN], self.as_hard_as(name))
        fall = self.falls(name)
        assert fall is not None
        return (name, *both, *(_mean(self.near_minus_far(hits, distances)) for hits in beside), fall)

    def notes(self) -> tuple[str, ...]:
        """Weak judges, assumed networks, and what an interval covers."""
        notes = []
        weak = [judge for judge, is_weak in zip(self.judges, self._weak(), strict=True) if is_weak]
        if weak:
            notes.append(f"Weak judges, read with care: {', '.join(weak)}.")
        if self.assumed:
            notes.append(
                f"Not known on which network: {', '.join(self.assumed)}. The distance is that from the field's ConvNet."
            )
        clearer = [
            name
            for name in self.distilled
            if self.falls(name) is not None and self.recognised(name).value > self.recognised(UNSEEN).value
        ]
        if clearer:
            notes.append(
                f"Recognised better than real images are: {', '.join(clearer)}. Near judges have little room to be better "
                "there, so that recognition does not fall with distance says little."
            )
        single = [name for name in self.distilled if len(self.hits[name]) == 1]
        if single:
            notes.append(f"{', '.join(single)}: one set, the interval is that over its images.")
        notes.append(
            f"The judges are these {len(self.judges)}; an interval covers the sets, not other judges. {SEEN}: the "
            "random subset, on which all of them were trained."
        )
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """The share by judge and by distance; with the paper's judges also as its notebook labels them."""
        panels: dict[str, Callable[[Axes], None]] = {self.title: self.plot}
        if self.papers:
            panels["The same figures as the published notebook labels them (labels swapped)"] = (
                self.plot_as_labelled
            )
        panels["Share recognised against the judges' distance from the distilling network"] = (
            self.plot_distance
        )
        return panels

    def plot(self, ax: Axes) -> None:
        """A group a judge, a bar a set."""
        broken = [judge.replace(" w", "\nw") for judge in self.judges]
        marked = [f"{j} (weak)" if weak else j for j, weak in zip(broken, self._weak(), strict=True)]
        self._bars(ax, list(zip(marked, range(len(self.judges)), strict=True)))

    def plot_as_labelled(self, ax: Axes) -> None:
        """The same bars under the names that the published notebook gives them."""
        self._bars(ax, NOTEBOOK)

    def _bars(self, ax: Axes, groups: Sequence[tuple[str, int]]) -> None:
        names = self._names()
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            for place, (_, j) in enumerate(groups):
                e = self.by_judge(name, j)
                x = place + (i - (len(names) - 1) / 2) * width
                ax.bar(x, e.value, width * 0.9, color=_tint(name), label=name if place == 0 else None)
                ax.errorbar(x, e.value, _whiskers(e), color="#555555", lw=1)
        ax.axhline(1 / self.k, color="grey", lw=1, ls=":")
        ax.set_xticks(range(len(groups)), [label for label, _ in groups])
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("share recognised (dotted: chance)")
        _legend(ax, len(names))

    def plot_distance(self, ax: Axes) -> None:
        """A point a set and distance, averaged over the judges at that distance; dashed: unseen real images."""
        drawn: dict[tuple[str, tuple[int, ...]], None] = {
            (n, self.distances[n]): None for n in self.distilled
        }
        # Real images have no network of their own: they stand at the distances of the sets.
        drawn |= {(UNSEEN, self.distances[n]): None for n in self.distilled}
        for i, (name, distances) in enumerate(drawn):
            places = sorted(set(distances))
            at = [[j for j, d in enumerate(distances) if d == place] for place in places]
            points = [_share([one[js].mean(0) for one in self.hits[name]]) for js in at]
            x = [place + 0.05 * (i - (len(drawn) - 1) / 2) for place in places]
            first = name not in [other for other, _ in list(drawn)[:i]]
            ax.errorbar(
                x,
                [p.value for p in points],
                [[_whiskers(p)[side][0] for p in points] for side in (0, 1)],
                color=_tint(name),
                ls="--" if name == UNSEEN else "-",
                lw=1.2,
                elinewidth=1,
                marker="o",
                ms=4,
                label=name if first else None,
            )
        ax.axhline(1 / self.k, color="grey", lw=1, ls=":")
        ax.set_xticks(range(len(KINDS)), KINDS)
        ax.set_xlim(-0.5, len(KINDS) - 0.5)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("judge and distilling network")
        ax.set_ylabel("share recognised (dotted: chance)")
        _legend(ax, len(self.distilled) + 1)


def _share(values: Sequence[torch.Tensor]) -> Estimate:
    """The mean of shares, image by image [n] for each replicate."""
    return Estimate.share([float(one.mean()) for one in values], len(values[0]), REPLICATE)


def _mean(values: Sequence[torch.Tensor]) -> Estimate:
    """The mean over replicates of values [n], or over the images of a single one."""
    return difference(values, [torch.zeros_like(one) for one in values])


def _whiskers(e: Estimate) -> list[list[float]]:
    return [[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]]


def _tint(name: str) -> str:
    return colour({UNSEEN: "real", SEEN: "random_subset"}.get(name, name))


def _legend(ax: Axes, entries: int) -> None:
    columns = min(entries, 4)
    ax.legend(frameon=False, fontsize=8, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.spines[["top", "right"]].set_visible(False)
