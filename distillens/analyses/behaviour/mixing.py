"""Real images added to distilled data: help or harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Labels, Probabilities, Targets
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, units
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training, networks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Mixing:
    """Accuracy after training on a set with k real images of each class added, for several k.

    Replicate r of every set gets the same real images and the same initialisations. The real images are nested
    (those of a smaller k are among those of a larger) and none of them is in the random baseline's own set.

    The claim is read where as many real images a class are added as the set holds (the paper's +10 at 10), fixed
    beforehand: the lowest point of a curve would be chosen by its noise.

    Source: Yang et al. 2024, section 3, figure 3 (k = 0, 2, 10, 50, 250 of 5,000; one run a cell; draws that may
    overlap the baseline's). The number of steps is fixed, as there, so more data is also fewer passes.
    """

    question: ClassVar[str] = "Does adding real images to distilled data help or hurt?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps",)

    real_per_class: tuple[int, ...] = (0, 2, 10, 50, 250)
    recipe: Recipe = Recipe(steps=300)
    net: Net = field(default_factory=ConvNet)
    nets: int = 1

    def __post_init__(self) -> None:
        at_least(1, "mixing", nets=self.nets)
        if 0 not in self.real_per_class or len(set(self.real_per_class)) != len(self.real_per_class):
            raise UserError(
                "mixing: real_per_class must hold 0 and no number twice", got=repr(self.real_per_class)
            )
        at_least(0, "mixing", real_per_class=min(self.real_per_class))

    @classmethod
    def defaults(cls, like: Dataset) -> Mixing:
        """The paper's amounts; on small data fewer."""
        smallest = min(map(len, like.by_class))
        amounts = (0, 2, 10, 50, 250) if smallest >= 1000 else (0, 1, 3, 10)
        return cls(amounts, net=ConvNet.defaults(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One training a set, replicate and amount."""
        return [t for many in self._grid(sets, real, key).values() for row in many for t in row]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> MixingResult:
        """The curves."""
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        curves = {
            name: torch.stack(
                [torch.stack([p.accuracy(real.test) for p in runs.get(*row)], 1) for row in replicates]
            )
            for name, replicates in self._grid(sets, real, key).items()
        }
        ipc = round(next(iter(sets.distilled.values()))[0].ipc)
        positive = [k for k in self.real_per_class if k]
        at = min(positive, key=lambda k: (abs(k - ipc), k)) if positive else 0
        return MixingResult(tuple(sets.distilled), self.real_per_class, at, curves)

    def _grid(self, sets: Sets, real: Splits, key: Key) -> dict[str, list[list[Training]]]:
        named = dict(sets.distilled)
        if sets.random:
            named["random_subset"] = sets.random
        return {
            name: [
                [
                    Training(
                        self._mixed(one, real, sets, key, r, k),
                        self.net,
                        self.recipe,
                        networks(key, r, self.nets),
                    )
                    for k in self.real_per_class
                ]
                for r, one in enumerate(many)
            ]
            for name, many in named.items()
        }

    def _mixed(
        self, distilled: DistilledDataset, real: Splits, sets: Sets, key: Key, r: int, k: int
    ) -> Dataset:
        data = distilled.dataset()
        if not k:
            return data
        added = self._added(
            real.train, sets.random[r] if r < len(sets.random) else None, key.fold("added", r), k
        )
        own, theirs = _of_one_kind(data.labels, added.labels.hard(), data.k)
        ours = Dataset(data.images, own, data.classes, data.space)
        return ours.joined(Dataset(added.images, theirs, added.classes, added.space))

    def _added(self, train: Dataset, baseline: DistilledDataset | None, key: Key, k: int) -> Dataset:
        taken = set() if baseline is None else set(map(_bytes, baseline.dataset().images))
        index = []
        for c, members in enumerate(train.by_class):
            free = members[key.fold(c).permutation(len(members))].tolist()
            chosen: list[int] = []
            for i in free:
                if len(chosen) == k:
                    break
                if _bytes(train.images[i]) not in taken:
                    chosen.append(i)
            if len(chosen) < k:
                raise UserError(
                    f"mixing: class {train.classes[c]!r} has {len(chosen)} images beside the baseline's, "
                    f"{k} were asked for",
                    fix=f"set real_per_class to at most {len(chosen)}",
                )
            index += chosen
        return train.take(torch.tensor(index))


def _of_one_kind(labels: Labels, real: torch.Tensor, k: int) -> tuple[Labels, Labels]:
    """Distilled labels, and the real classes [n], as labels of one kind.

    Beside regression targets a class is centred one-hot, as kernel methods code it, as long as theirs are on average.

    Raises:
        UserError: a teacher's labels belong to views of their own images.
    """
    if labels.kind == "hard":
        return labels, Hard(real)
    if labels.kind not in ("probabilities", "logits", "targets"):
        raise UserError(f"mixing: {labels.kind} labels cannot stand beside real hard labels")
    (values,) = labels.tensors().values()
    one_hot = F.one_hot(real, k).to(values)
    if labels.kind != "targets":
        soft = values.softmax(-1) if labels.kind == "logits" else values
        return Probabilities(soft), Probabilities(one_hot)
    coded = F.one_hot(labels.hard(), k).to(values) - 1 / k
    length = (values * coded).sum() / coded.square().sum()
    return labels, Targets(length * (one_hot - 1 / k))


@dataclass(frozen=True, eq=False)
class MixingResult(Result):
    """Test accuracy [replicates, networks, amounts] by set."""

    analysis: ClassVar[str] = "behaviour/mixing"
    title: ClassVar[str] = "Real images mixed in"
    question: ClassVar[str] = Mixing.question

    distilled: tuple[str, ...]
    real_per_class: tuple[int, ...]
    at: int
    curves: Mapping[str, torch.Tensor]

    def change(self, name: str, k: int) -> Estimate:
        """Accuracy with k real images a class minus accuracy without, paired."""
        pairs = self._at(name, k) - self._at(name, 0)
        return Estimate.mean(*units(pairs))

    def accuracy(self, name: str, k: int) -> Estimate:
        """Accuracy with k real images a class added."""
        return Estimate.mean(*units(self._at(name, k)))

    def _at(self, name: str, k: int) -> torch.Tensor:
        """Accuracies [replicates, networks] at one amount."""
        return self.curves[name][..., self.real_per_class.index(k)]

    def headline(self) -> dict[str, Estimate]:
        """The change at the amount that was fixed beforehand."""
        return {name: self.change(name, self.at) for name in self.curves}

    def claims(self) -> tuple[Claim, ...]:
        """Adding real images hurts."""
        return tuple(
            Claim(
                "real data hurts",
                name,
                "adding about as many real images as it holds lowers its accuracy",
                self.change(name, self.at),
                "less",
                0.0,
                "a random real subset in the set's place",
                "mislabelled real images as what is added",
                "paper T4",
            )
            for name in self.distilled
        )

    def tables(self) -> tuple[Table, ...]:
        """All curves."""
        amounts = sorted(self.real_per_class)
        rows: list[tuple[str | int | Estimate, ...]] = [
            (name, *(self.accuracy(name, k) for k in amounts)) for name in self.curves
        ]
        columns = ("set", *(f"+{k}" for k in amounts))
        return (Table("Test accuracy with k real images a class added", columns, tuple(rows)),)

    def notes(self) -> tuple[str, ...]:
        """What is confounded."""
        return (
            f"The claim is read at {self.at} real images a class. The number of steps is fixed: with more data "
            "each image is seen less often.",
        )

    def plot(self, ax: Axes) -> None:
        """Accuracy against the amount added."""
        amounts = sorted(self.real_per_class)
        for name in self.curves:
            points = [self.accuracy(name, k) for k in amounts]
            values = [p.value for p in points]
            ax.plot(range(len(amounts)), values, marker="o", ms=4, color=colour(name), label=name)
            if points[0].n > 1:
                ax.fill_between(
                    range(len(amounts)),
                    [p.low for p in points],
                    [p.high for p in points],
                    color=colour(name),
                    alpha=0.12,
                    linewidth=0,
                )
        ax.set_xticks(range(len(amounts)), [f"+{k}" for k in amounts])
        ax.set_xlabel("real images a class added")
        ax.set_ylabel("test accuracy")
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)


def _bytes(image: torch.Tensor) -> bytes:
    return image.contiguous().numpy(force=True).tobytes()
