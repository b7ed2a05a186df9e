"""How much of the real data a set covers, how hard the real images are that it stands among, and how much it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F

from distillens.analyses.representativeness._beside import SEEN, UNSEEN
from distillens.analyses.representativeness._drawing import legend_above
from distillens.analyses.representativeness._trajectory import (
    TRAJECTORIES,
    along,
    by_replicate,
    real_recipe,
)
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, units, weaker
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is measured of each class, in the order of every tensor here.
FIGURES = ("coverage", "density", "radius", "spacing", "effective images", "difficulty", "CMI")


@dataclass(frozen=True)
class Coverage:
    """Coverage, difficulty and redundancy of a set, class by class, as real-trained networks see it.

    All is measured in the last hidden layer of the shared real trajectories' final networks, each replicate of a set with
    its own. The real data is the test split, which no network has seen. Within a class:

    *Coverage*: the share of real images that have an image of the set nearer than their k-th nearest real one
    (k = ``neighbours``). *Density*: how many such balls an image of the set lies in, over k. *Radius*: the
    distance from the farthest real image to its nearest of the set. *Spacing*: the mean distance of the set's images to
    their nearest in it. Both are in units of the mean distance between nearest real images. *Effective images*: the Vendi
    score, the exponential of the entropy of the eigenvalues of K / n; K is Gaussian, as wide as the median distance
    between real images. *Difficulty*: the mean EL2N score of the k real images nearest to each of the set's; EL2N is the
    length of the error of the predicted probabilities early in training (``early``, as a share of the steps), averaged
    over all trajectories. *CMI*: the mean divergence of the softmax of an image's features from their class mean; zero at
    one image a class.

    Each figure is compared in pairs with that of as many real images of each class, drawn anew for each replicate: of the
    validation split, which no network has seen, and of the training split, which all have. Training images lie nearer to one
    another and among easier images, since the networks learned them: a set that holds such images, or is made from
    them, is no exception among real ones unless it is one beside both. So a claim's estimate is the contrast of the
    two that says less for it, and it is supported where both are (an intersection-union test: no correction is due).
    Of a class with more images than either split has, as many as there are stand for it, drawn at random. Sets are
    taken as they train: decoded, with the likeliest class of soft labels.

    Source: Naeem et al. 2020 (coverage and density), Sener and Savarese 2018 (radius), Friedman and Dieng 2023 (Vendi
    score), Paul et al. 2021 (EL2N), Zhong et al. 2025 (CMI), Berger 1982 (the test). Not in the paper. Where we differ:
    coverage and density class by class; EL2N of test images; the CMI is a mean over classes.
    """

    question: ClassVar[str] = (
        "How much of the real data does a set cover, and how much does it repeat itself?"
    )
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "trajectories")

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=392, batch=256)
    moments: int = 48
    trajectories: int = TRAJECTORIES
    neighbours: int = 5
    early: float = 0.3

    def __post_init__(self) -> None:
        at_least(1, "coverage", trajectories=self.trajectories, neighbours=self.neighbours)
        if not 0 < self.early <= 1:
            raise UserError(
                "coverage: early is a share of the recipe's steps", got=f"{self.early!r}", expected="0 to 1"
            )

    @classmethod
    def defaults(cls, like: Dataset) -> Coverage:
        """The trajectories that all analyses of this question follow."""
        return cls(ConvNet.defaults(like), real_recipe(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The shared real trajectories."""
        return [along(self.net, self.recipe, self.moments, self.trajectories, sets, real, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> CoverageResult:
        """All figures of all sets, and of real images beside them.

        Raises:
            UserError: a class has too few test images for so many neighbours, or no validation images; the
                network remembers more than its parameters.
        """
        sets.check_against(real)
        self._check(real)
        (networks,) = runs.get(*self.trainings(sets, real, key=key))
        early = min(networks.moments, key=lambda t: abs(t - self.early * self.recipe.steps))
        scores = _el2n(networks, networks.at(early), real.test)
        values: dict[str, list[torch.Tensor]] = {name: [] for name in sets.everything()}
        beside: dict[str, dict[str, list[torch.Tensor]]] = {
            kind: {name: [] for name in sets.everything()} for kind in (UNSEEN, SEEN)
        }
        counts: dict[str, tuple[int, int]] = {}
        most = [min(map(len, both)) for both in zip(real.val.by_class, real.train.by_class, strict=True)]
        for r, own in enumerate(by_replicate(networks, sets)):
            view = _View(own, real.test, scores, self.neighbours)
            kinds = {UNSEEN: (real.val, key.fold("unseen", r)), SEEN: (real.train, key.fold("seen", r))}
            # Sets of the same size share their real images.
            found: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
            for name, many in sets.everything().items():
                if r >= len(many):
                    continue
                data = many[r].dataset()
                kept = data.take(data.drawn(most, key.fold("thin", r)))
                sizes = tuple(map(len, kept.by_class))
                counts.setdefault(name, (len(data), len(kept)))
                values[name].append(view.measured(kept))
                if sizes not in found:
                    found[sizes] = {
                        kind: view.measured(split.take(split.drawn(sizes, place)))
                        for kind, (split, place) in kinds.items()
                    }
                for kind, figures in found[sizes].items():
                    beside[kind][name].append(figures)
        return CoverageResult(
            tuple(sets.distilled),
            real.train.classes,
            self.neighbours,
            early,
            {name: torch.stack(many, 1) for name, many in values.items()},
            {
                kind: {name: torch.stack(many, 1) for name, many in rows.items()}
                for kind, rows in beside.items()
            },
            counts,
        )

    def _check(self, real: Splits) -> None:
        for name, test, val in zip(real.test.classes, real.test.by_class, real.val.by_class, strict=True):
            if len(test) <= self.neighbours:
                raise UserError(
                    f"coverage: {self.neighbours} neighbours of each real image were asked for",
                    got=f"{len(test)} test images of class {name!r}",
                    fix=f"set neighbours to at most {len(test) - 1}",
                )
            if not len(val):
                raise UserError(
                    "coverage: the real images beside a set come from the validation split",
                    got=f"none of class {name!r} there",
                    fix="make the validation split larger",
                )


def _el2n(networks: Population, flat: torch.Tensor, data: Dataset) -> torch.Tensor:
    """The mean length [n] of the error of the probabilities, over the parameters ``flat`` [m, P]."""
    logits = networks.logits(data, flat)
    wanted = F.one_hot(data.labels.hard(), data.k)
    lengths: torch.Tensor = (logits.double().softmax(-1) - wanted).norm(dim=-1)
    return lengths.mean(0).cpu()


class _View:
    """The real data as the networks of a replicate see it, and what they see of a set beside it."""

    def __init__(self, networks: Population, real: Dataset, scores: torch.Tensor, neighbours: int) -> None:
        self.networks, self.neighbours = networks, neighbours
        own = networks.features(real)
        self.classes = [own[:, members.cpu()] for members in real.by_class]
        self.among = [_distances(one, one) for one in self.classes]
        self.scores = [scores[members.cpu()] for members in real.by_class]

    def measured(self, data: Dataset) -> torch.Tensor:
        """All ``FIGURES`` of a set, [figures, networks, classes]."""
        own = self.networks.features(data)
        found = torch.full((len(FIGURES), len(own), data.k), torch.nan, dtype=torch.float64)
        for c, members in enumerate(data.by_class):
            mine = own[:, members.cpu()]
            across, within = _distances(self.classes[c], mine), _distances(mine, mine)
            for j in range(len(own)):
                places = measured(self.among[c][j], across[j], within[j], self.scores[c], self.neighbours)
                found[:-1, j, c] = places
                found[-1, j, c] = cmi(mine[j])
        return found


def _distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Distances [m, n, n'] between points [m, n, d] and [m, n', d]; exactly zero between equal ones."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def measured(
    among: torch.Tensor, across: torch.Tensor, within: torch.Tensor, scores: torch.Tensor, neighbours: int
) -> torch.Tensor:
    """All ``FIGURES`` but the last, of one class, from distances between N real images and n of a set.

    ``among`` [N, N] are those between real images, ``across`` [N, n] those to the set's, ``within`` [n, n]
    those between these; ``scores`` [N] the real images' EL2N. A class without images covers nothing; what
    is not defined for it, or for a single image, is NaN.
    """
    found = torch.full((len(FIGURES) - 1,), torch.nan, dtype=torch.float64)
    n = within.shape[0]
    if not n:
        found[0] = 0.0
        return found
    others = _without_self(among)
    scale = others.min(1).values.mean()
    near = across < others.kthvalue(neighbours, dim=1).values[:, None]
    found[0] = near.any(1).double().mean()
    found[1] = near.double().sum() / (neighbours * n)
    found[2] = across.min(1).values.max() / scale
    if n > 1:
        found[3] = _without_self(within).min(1).values.mean() / scale
        width = others[others.isfinite()].median()
        found[4] = vendi((-0.5 * (within / width).square()).exp())
    nearest = across.topk(neighbours, dim=0, largest=False).indices
    found[5] = scores[nearest].mean()
    return found


def _without_self(distances: torch.Tensor) -> torch.Tensor:
    """Square distances with an infinite diagonal."""
    others = distances.clone()
    others.fill_diagonal_(math.inf)
    return others


def vendi(similarity: torch.Tensor) -> torch.Tensor:
    """The effective number of images by their similarity [n, n], which is 1 on the diagonal: 1 to n."""
    values = torch.linalg.eigvalsh(similarity / len(similarity)).clamp(min=0)
    score: torch.Tensor = torch.special.entr(values).sum().exp()
    return score


def cmi(points: torch.Tensor) -> torch.Tensor:
    """The mean Kullback-Leibler divergence of softmax(features) [n, d] from their mean; NaN without images."""
    logs = points.log_softmax(1)
    middle = logs.logsumexp(0) - math.log(max(1, len(points)))
    return (logs.exp() * (logs - middle)).sum(1).mean()


@dataclass(frozen=True, eq=False)
class CoverageResult(Result):
    """Every figure [figures, replicates, networks, classes] of each set, and of real images of either kind ``beside`` it.

    ``early`` is the number of updates after which EL2N was taken; ``counts`` are a set's images, and those looked at.
    """

    analysis: ClassVar[str] = "representativeness/coverage"
    title: ClassVar[str] = "Real images covered"
    question: ClassVar[str] = Coverage.question

    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    neighbours: int
    early: int
    values: Mapping[str, torch.Tensor]
    beside: Mapping[str, Mapping[str, torch.Tensor]]
    counts: Mapping[str, tuple[int, int]]

    def figure(self, name: str, figure: str) -> Estimate | None:
        """The mean over classes; ``UNSEEN`` and ``SEEN`` are those beside the first set. None where it is not defined."""
        values = self.beside[name][self._first] if name in self.beside else self.values[name]
        return _estimate(values[FIGURES.index(figure)])

    def above_real(self, name: str, figure: str, kind: str = UNSEEN, c: int | None = None) -> Estimate | None:
        """A figure minus that of the real images of a kind beside the set, paired; of one class, or their mean."""
        apart = (self.values[name] - self.beside[kind][name])[FIGURES.index(figure)]
        return _estimate(apart if c is None else apart[..., c : c + 1])

    @property
    def _first(self) -> str:
        return next(iter(self.distilled))

    def headline(self) -> dict[str, Estimate]:
        """Coverage of each distilled set and of real images, unseen and seen."""
        found = {name: self.figure(name, "coverage") for name in (*self.distilled, *self.beside)}
        return {name: estimate for name, estimate in found.items() if estimate is not None}

    def claims(self) -> tuple[Claim, ...]:
        """Covers less, or more, than as many real images; lies closer together; stands among easy real images."""
        asked: tuple[tuple[str, str, str, Literal["greater", "less"], str], ...] = (
            (
                "covers less than real",
                "it covers less of its classes' real images than as many real ones do",
                "coverage",
                "less",
                "one real image of each class, repeated",
            ),
            (
                "covers more than real",
                "it covers more of its classes' real images than as many real ones do",
                "coverage",
                "greater",
                "real images chosen to cover the most",
            ),
            (
                "closer together than real",
                "its images lie nearer to one another than as many real ones of a class do",
                "spacing",
                "less",
                "one real image of each class, repeated",
            ),
            (
                "among easy images",
                "the real images nearest to it are easier than those nearest to as many real ones",
                "difficulty",
                "less",
                "the real images whose neighbours are easiest",
            ),
        )
        claims = []
        for name in self.distilled:
            for title, statement, figure, direction, plant in asked:
                unseen, seen = (self.above_real(name, figure, kind) for kind in (UNSEEN, SEEN))
                if unseen is None or seen is None:
                    continue
                claims.append(
                    Claim(
                        title,
                        name,
                        f"{statement}: both unseen and training images (the weaker contrast of the two)",
                        weaker(direction, unseen, seen),
                        direction,
                        0.0,
                        "other unseen real images, or random training images, in the set's place",
                        plant,
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """All figures, each minus that of real images of either kind, and coverage class by class."""
        names = list(self.values)
        cells = [(name, *(self.figure(name, f) or "" for f in FIGURES)) for name in (*names, *self.beside)]
        classes = range(len(self.classes))
        by_class = [
            (name, *(self.above_real(name, "coverage", c=c) or "" for c in classes)) for name in names
        ]
        return (
            Table("Means over classes", ("set", *FIGURES), tuple(cells)),
            self._apart("Above as many unseen real images of each class", UNSEEN),
            self._apart("Above as many random training images of each class", SEEN),
            Table("Coverage above unseen real images, by class", ("set", *self.classes), tuple(by_class)),
        )

    def _apart(self, title: str, kind: str) -> Table:
        rows = [(name, *(self.above_real(name, f, kind) or "" for f in FIGURES)) for name in self.values]
        return Table(title, ("set", *FIGURES), tuple(rows))

    def notes(self) -> tuple[str, ...]:
        """What the networks have seen, and where a figure says nothing."""
        found = [
            f"The networks were trained on all training images, among them those of real subsets and {SEEN!r}; only {UNSEEN!r} is "
            "unseen. A claim must hold beside both. The unseen images come from the validation split: the intervals "
            "cover sets and networks, not other such splits.",
            f"Difficulty is the EL2N score after {self.early} updates.",
        ]
        if all(bool(many[FIGURES.index("spacing")].isnan().all()) for many in self.values.values()):
            found.append("With one image a class nothing can repeat itself: CMI is zero by definition.")
        thinned = [f"{name} ({seen} of {all_})" for name, (all_, seen) in self.counts.items() if seen < all_]
        if thinned:
            found.append(
                f"Some images stand for all, as many a class as the real images to compare with: {', '.join(thinned)}."
            )
        bare = [
            f"{name} (no image of {', '.join(c for c, gone in zip(self.classes, empty, strict=True) if gone)})"
            for name, many in self.values.items()
            if any(empty := many[FIGURES.index("radius")].isnan().flatten(0, 1).any(0).tolist())
        ]
        if bare:
            found.append(f"Classes without images count as covered by nothing: {', '.join(bare)}.")
        return tuple(found)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Coverage of each set, and where it is above or below that of real images, by class."""
        return {self.title: self.plot, "Coverage above unseen real images, by class": self.plot_classes}

    def plot(self, ax: Axes) -> None:
        """Each set's coverage with its interval, and that of unseen and of training images beside it."""
        names = list(self.values)
        pale = "#999999"
        for x, name in enumerate(names):
            tint = colour(name)
            for shift, values, marker, line, face in (
                (-0.16, self.values, "o", tint, tint),
                (0.06, self.beside[UNSEEN], "o", pale, "white"),
                (0.2, self.beside[SEEN], "s", pale, "white"),
            ):
                found = _estimate(values[name][0])
                if found is None:
                    continue
                if math.isfinite(found.low):
                    ax.plot([x + shift] * 2, [found.low, found.high], color=line, lw=1.4)
                ax.plot([x + shift], [found.value], marker, ms=6, mfc=face, mec=line, color=line)
        ax.plot([], [], "o", color="#555555", label="the set")
        ax.plot([], [], "o", mfc="white", mec=pale, color=pale, label="as many unseen real images")
        ax.plot([], [], "s", mfc="white", mec=pale, color=pale, label="as many training images")
        ax.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_ylabel("share of real test images covered")
        legend_above(ax, 3)

    def plot_classes(self, ax: Axes) -> None:
        """A cell a set and class."""
        names = list(self.values)
        cells = torch.stack([(self.values[n] - self.beside[UNSEEN][n])[0].mean((0, 1)) for n in names])
        most = max(0.05, float(cells.abs().max()))
        shown = ax.imshow(cells.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        if len(self.classes) <= 20:
            ax.set_xticks(range(len(self.classes)), list(self.classes), fontsize=8)
        else:
            ax.set_xlabel("class")
        ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        figure = ax.get_figure()
        assert figure is not None
        figure.colorbar(shown, ax=ax, label="coverage above unseen real")


def _estimate(values: torch.Tensor) -> Estimate | None:
    """The mean of [replicates, networks, classes] over classes, replicates the units; None where not defined."""
    means = values.nanmean(2)
    if bool(means.isnan().any()):
        return None
    found, unit = units(means)
    return Estimate.mean(found, unit)
