"""What one distilled image does: retrain without it, and look at what moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.pointwise._retrained import chosen, first_copy, moved_losses, without_each
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LeaveOneOut:
    """Retraining without each stored point, from several initialisations.

    The influence of point j on a real image is the image's loss without j minus its loss with all points: positive
    where j helps. All retrainings of an initialisation start from the same parameters, so they are differences
    of like with like; initialisations are averaged, and how far they agree is reported first.

    Replicate 0 of each set is taken: 1 + P trainings an initialisation and set. The random real subset goes
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
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, "leave_one_out", inits=self.inits, top=self.top, train_images=self.train_images)

    @classmethod
    def defaults(cls, like: Dataset) -> LeaveOneOut:
        """The paper's training with the field's network for such images."""
        return cls(ConvNet.defaults(like))

    @classmethod
    def as_published(cls, like: Dataset) -> LeaveOneOut:
        """The paper's training, from two initialisations: with its single one nothing can be said of the error."""
        return cls(ConvNet.defaults(like), inits=2)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One population a set."""
        return [self._training(one, key) for one in self._chosen(sets).values()]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> LeaveOneOutResult:
        """The influences."""
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        on_test, labels, agreement, shared = {}, {}, {}, {}
        most_test, most_train, pictures = {}, {}, {}
        train = real.train.take(key.fold("train images").permutation(len(real.train))[: self.train_images])
        for name, one in self._chosen(sets).items():
            (population,) = runs.get(self._training(one, key))
            effect = moved_losses(population, self.inits, real.test)  # [inits, P, n]
            labels[name] = one.labels.hard()
            on_test[name] = effect
            agreement[name] = self_agreement(effect)
            shared[name] = own_class_share(effect.mean(0), labels[name], real.test)
            most_test[name] = _most_moved(effect.mean(0), real.test, self.top)
            most_train[name] = _most_moved(
                moved_losses(population, self.inits, train).mean(0), train, self.top
            )
            pictures[name] = one.dataset().pixels()[first_copy(one)]
        return LeaveOneOutResult(
            tuple(name for name in sets.distilled if name in labels),
            real.test.classes,
            labels,
            on_test,
            agreement,
            shared,
            pictures,
            most_test,
            most_train,
            real.test.labels.hard(),
        )

    def _chosen(self, sets: Sets) -> dict[str, DistilledDataset]:
        return chosen(sets, self.only, "leave_one_out")

    def _training(self, one: DistilledDataset, key: Key) -> Training:
        return without_each(one, self.net, self.recipe, self.inits, key)


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
    ranks = _ranks(effect)
    pairs = list(combinations(range(len(effect)), 2))
    if not pairs:
        return effect.new_empty(0)
    return torch.stack([_correlation(ranks[a], ranks[b]) for a, b in pairs]).mean(0)


def point_agreement(effect: torch.Tensor) -> float:
    """The rank correlation over *points*, averaged over images and pairs of initialisations.

    The measure under which leave-one-out on 100 real digits reached 0.05 to 0.10.
    """
    ranks = _ranks(effect.transpose(1, 2))
    pairs = list(combinations(range(len(effect)), 2))
    return float(torch.stack([_correlation(ranks[a], ranks[b]).mean() for a, b in pairs]).mean())


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort(-1).argsort(-1).double()


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a - a.mean(-1, keepdim=True)
    b = b - b.mean(-1, keepdim=True)
    return torch.div((a * b).sum(-1), (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12))


@dataclass(frozen=True, eq=False)
class LeaveOneOutResult(Result):
    """Influences on test images [inits, P, n] by set, what they agree on, and the images they move most."""

    analysis: ClassVar[str] = "pointwise/leave_one_out"
    title: ClassVar[str] = "Leave-one-out influence"
    question: ClassVar[str] = LeaveOneOut.question

    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Mapping[str, torch.Tensor]
    influence: Mapping[str, torch.Tensor]
    agreement: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor]
    points: Mapping[str, torch.Tensor]
    most_test: Mapping[str, torch.Tensor]
    most_train: Mapping[str, torch.Tensor]
    test_labels: torch.Tensor

    def mean_influence(self, name: str) -> torch.Tensor:
        """Influence [P, n] averaged over initialisations."""
        return self.influence[name].mean(0)

    def standard_error(self, name: str) -> torch.Tensor:
        """The standard error [P, n] of each mean influence over initialisations (infinite with one)."""
        effect = self.influence[name]
        if len(effect) < 2:
            return torch.full_like(effect[0], torch.inf)
        return torch.div(effect.std(0), len(effect) ** 0.5)

    def reliability(self, name: str) -> Estimate:
        """Rank correlation of influences between initialisations, over images, one value a point."""
        values = self.agreement[name].tolist()
        if not values:
            return Estimate(0.0, float("-inf"), float("inf"), 0, "distilled point")
        return Estimate.mean(values, "distilled point")

    def stays(self, name: str) -> Estimate:
        """Share of positive influence on the own class minus that class's share of the images."""
        return Estimate.mean(self.shared[name].tolist(), "distilled point")

    def headline(self) -> dict[str, Estimate]:
        """Reliability and own-class share of each set."""
        found = {
            f"{name}: agreement between initialisations": self.reliability(name) for name in self.influence
        }
        return found | {f"{name}: own-class share above chance": self.stays(name) for name in self.influence}

    def claims(self) -> tuple[Claim, ...]:
        """Influences repeat between initialisations, and stay in the point's class."""
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
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Reliability two ways, and the share of influences that are helpful."""
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name, effect in self.influence.items():
            over_points = f"{point_agreement(effect):.3f}" if len(effect) > 1 else "one initialisation"
            clear = (self.mean_influence(name).abs() > 2 * self.standard_error(name)).double().mean()
            rows.append(
                (
                    name,
                    effect.shape[1],
                    effect.shape[0],
                    self.reliability(name),
                    over_points,
                    self.stays(name),
                    f"{float(clear):.2f}",
                )
            )
        columns = (
            "set",
            "points",
            "initialisations",
            "agreement over images",
            "agreement over points",
            "own-class share above chance",
            "entries beyond 2 standard errors",
        )
        return (Table("How far influences can be trusted, and where they fall", columns, tuple(rows)),)

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
            "Agreement between initialisations and own-class share, a dot a point": self.plot
        }
        for name in self.distilled:
            panels[f"{name}: one point of each class and the test images that it helps most"] = _grid_of(
                self.points[name], self.most_test[name], self.labels[name]
            )
        for name in self.distilled:
            panels[f"{name}: the same points and the training images that they help most"] = _grid_of(
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


def _grid_of(points: torch.Tensor, moved: torch.Tensor, labels: torch.Tensor) -> Callable[[Axes], None]:
    """Draw one point of each class, a gap, and the images that it moves most."""

    def draw(ax: Axes) -> None:
        firsts = [int((labels == c).nonzero()[0, 0]) for c in sorted(set(labels.tolist()))]
        half = -(-len(firsts) // 2)
        c, h, w = points.shape[1:]
        columns = 1 + moved.shape[1]
        tile_h, tile_w = h + 1, w + 1
        block = columns * tile_w + w // 2
        canvas = torch.ones(half * tile_h, 2 * block + w, 3)
        for i, j in enumerate(firsts):
            left, top = (i // half) * (block + w), (i % half) * tile_h
            for column, image in enumerate([points[j], *moved[j]]):
                x = left + column * tile_w + (w // 2 if column else 0)
                shown = (image if c == 3 else image.mean(0, keepdim=True).expand(3, h, w)).clamp(0, 1)
                canvas[top : top + h, x : x + w] = shown.permute(1, 2, 0)
        ax.imshow(canvas.numpy(force=True), interpolation="nearest")
        ax.set_axis_off()

    return draw
