"""Recognition of distilled images by networks that were trained on real data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, paired
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNSEEN = "real, unseen"
WEAK = 0.5  # a judge below this share of its classes' best possible gain over chance is called weak


@dataclass(frozen=True)
class Recognition:
    """The accuracy of real-trained networks on the distilled images, several judges and seeds.

    Beside it: real images that no judge has seen, one random set of the distilled set's size for each replicate,
    cut from the validation split. Chance is what the same predictions would get if the labels were permuted.

    Source: Yang et al. 2024, section 3, figure 2 (four judges, one seed each). The default judges are the
    field's network for such images, a quarter of its width, and a multi-layer perceptron.
    """

    question: ClassVar[str] = "Do networks that were trained on real data recognise distilled images?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "seeds")

    judges: tuple[Net, ...] = (ConvNet(), ConvNet(width=32), MLP())
    recipe: Recipe = Recipe(steps=7840, batch=256)
    seeds: int = 3

    @classmethod
    def defaults(cls, like: Dataset) -> Recognition:
        """On digits' scale 300 steps (71 passes); else the paper's 40 passes over the training data."""
        net = ConvNet.defaults(like)
        tiny = ConvNet(net.depth, max(4, net.width // 4))
        small = like.shape[1] * like.shape[2] <= 256
        steps = 300 if small else 40 * -(-len(like) // 256)
        return cls((net, tiny, MLP.defaults(like)), Recipe(steps=steps, batch=256))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One population a judge, on all real training data."""
        return [
            Training(real.train, net, self.recipe, key.fold("judge", j).split(self.seeds))
            for j, net in enumerate(self.judges)
        ]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> RecognitionResult:
        """Recognition of every set by every judge."""
        sets.check_against(real)
        populations = runs.get(*self.trainings(sets, real, key=key))
        shown = {name: [one.dataset() for one in many] for name, many in sets.distilled.items()}
        replicates = max(map(len, shown.values()))
        per_class = max(1, round(next(iter(sets.distilled.values()))[0].ipc))
        shown[UNSEEN] = [_unseen(real.val, per_class, key.fold("unseen", r)) for r in range(replicates)]
        shares, chances = {}, {}
        for name, datasets in shown.items():
            predicted = [torch.stack([p.predictions(data) for p in populations]) for data in datasets]
            labels = [data.labels.hard() for data in datasets]
            pairs = list(zip(predicted, labels, strict=True))
            # [replicates, judges]: seeds are averaged, judges are told apart
            shares[name] = torch.stack([(p == y).double().mean((1, 2)) for p, y in pairs])
            chances[name] = torch.stack([_chance(p, y, real.train.k) for p, y in pairs])
        return RecognitionResult(
            tuple(_name(net) for net in self.judges),
            tuple(sets.distilled),
            shares,
            chances,
            torch.stack([p.accuracy(real.test) for p in populations]),
            {name: len(datasets[0]) for name, datasets in shown.items()},
            real.train.k,
        )


@dataclass(frozen=True, eq=False)
class RecognitionResult(Result):
    """Shares recognised and shares expected by chance, [replicates, judges] by set; judges' test accuracy."""

    analysis: ClassVar[str] = "behaviour/recognition"
    title: ClassVar[str] = "Recognition by real-trained networks"
    question: ClassVar[str] = Recognition.question

    judges: tuple[str, ...]
    distilled: tuple[str, ...]
    shares: Mapping[str, torch.Tensor]
    chances: Mapping[str, torch.Tensor]
    judge_accuracy: torch.Tensor
    images: Mapping[str, int]
    k: int

    def recognised(self, name: str) -> Estimate:
        """The share of a set's images that the judges recognise, averaged over judges."""
        values = self.shares[name].mean(1).tolist()
        return Estimate.share(values, self.images[name], "replicate")

    def above_chance(self, name: str) -> Estimate:
        """The recognised share minus what permuted labels would give."""
        values = (self.shares[name] - self.chances[name]).mean(1).tolist()
        gain = Estimate.mean(values, "replicate")
        if min(values) < max(values):
            return gain
        # A spread of nothing says nothing: the images' own interval stands in for it.
        found, chance = self.recognised(name), float(self.chances[name].mean())
        return Estimate(gain.value, found.low - chance, found.high - chance, found.n, found.unit)

    def above_real(self, name: str) -> Estimate:
        """The recognised share minus that of unseen real images."""
        pairs = min(len(self.shares[name]), len(self.shares[UNSEEN]))
        return paired(
            self.shares[name].mean(1).tolist()[:pairs],
            self.shares[UNSEEN].mean(1).tolist()[:pairs],
            "replicate",
        )

    def headline(self) -> dict[str, Estimate]:
        """Recognised share of each set and of unseen real images."""
        return {name: self.recognised(name) for name in [*self.distilled, UNSEEN]}

    def claims(self) -> tuple[Claim, ...]:
        """Recognised far above chance; recognised better than unseen real images."""
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
                    self.above_real(name),
                    "greater",
                    0.0,
                    "another random set of unseen real images",
                    "the mean training image of each class",
                    "paper T1, T7",
                ),
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Judge by judge."""
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in [*self.distilled, UNSEEN]:
            cells = [
                Estimate.share(self.shares[name][:, j].tolist(), self.images[name], "replicate")
                for j in range(len(self.judges))
            ]
            rows.append((name, *cells))
        tested = [Estimate.mean(row.tolist(), "network") for row in self.judge_accuracy]
        rows.append(("the whole test split", *tested))
        return (Table("Share recognised, by judge", ("images", *self.judges), tuple(rows)),)

    def notes(self) -> tuple[str, ...]:
        """Weak judges."""
        weak = [
            judge
            for judge, row in zip(self.judges, self.judge_accuracy, strict=True)
            if float(row.mean()) < 1 / self.k + WEAK * (1 - 1 / self.k)
        ]
        return (f"Weak judges, read with care: {', '.join(weak)}.",) if weak else ()

    def plot(self, ax: Axes) -> None:
        """A group a judge, a bar a set."""
        names = [*self.distilled, UNSEEN]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            for j in range(len(self.judges)):
                e = Estimate.share(self.shares[name][:, j].tolist(), self.images[name], "replicate")
                x = j + (i - (len(names) - 1) / 2) * width
                tint = colour("real") if name == UNSEEN else colour(name)
                ax.bar(x, e.value, width * 0.9, color=tint, label=name if j == 0 else None)
                ax.errorbar(x, e.value, [[e.value - e.low], [e.high - e.value]], color="#555555", lw=1)
        ax.axhline(1 / self.k, color="grey", lw=1, ls=":")
        ax.set_xticks(range(len(self.judges)), self.judges)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("share recognised (dotted: chance)")
        ax.legend(frameon=False, fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
        ax.spines[["top", "right"]].set_visible(False)


def _name(net: Net) -> str:
    settings = "-".join(f"{v}" for v in vars(net).values() if isinstance(v, int))
    return f"{type(net).__name__} {settings}"


def _unseen(data: Dataset, per_class: int, key: Key) -> Dataset:
    """Random images of data that no judge was trained on, ``per_class`` of each class or all there are."""
    picks = [m[key.fold(c).permutation(len(m))[:per_class]] for c, m in enumerate(data.by_class)]
    return data.take(torch.cat(picks))


def _chance(predicted: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """The exact mean share of hits [judges] over all permutations of the labels, for [judges, seeds, n]."""
    shown = torch.nn.functional.one_hot(predicted, k).double().mean(2)  # [judges, seeds, k]
    named = torch.nn.functional.one_hot(labels, k).double().mean(0)
    return (shown * named).sum(-1).mean(1)
