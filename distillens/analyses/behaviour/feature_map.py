"""Where distilled images lie among real ones in the features of networks that were trained on real data."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from distillens.analyses.behaviour._judges import (
    SEEN,
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
from distillens.nets import label
from distillens.nets.convnet import ConvNet
from distillens.nets.resnet18 import ResNet18
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REAL = "real, test split"
OFF = math.log(1.5)  # fixed before the first run: half as far again from the real images as a real image is
PLAIN = 0.1  # how far above permuted labels the share of neighbours must be, as in recognition
STATE = 42  # of the embedding: the paper's
LEAST = 1e-12  # a distance below this is none
MARKERS = "^osDPXv*"


@dataclass(frozen=True)
class FeatureMap:
    """Distilled images among the real test images, in the last hidden layer of real-trained networks: numbers and a map.

    - *Neighbours of its class*: the share of an image's nearest real test images that are of its own class.
    - *Distance to the real images*: how far its last nearest real test image is, as a multiple of what is usual (the
      median) for real images of its class that no network has seen: the whole validation split. 1 is like a real image.

    Both are averaged over seeds for each image. Beside the sets: unseen real images, as many as a set holds, cut from
    the validation split for each replicate, and the random subset, which the networks were trained on.

    The map is one embedding of the first replicates of all distilled sets among ``shown`` real test images, by the
    features of the first seed: UMAP where it is installed, else t-SNE.

    Source: Yang et al. 2024, section 3, figure 2 (a map of two methods, no number).
    """

    question: ClassVar[str] = (
        "Where do distilled images lie among real ones, as real-trained networks see them?"
    )
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "seeds")

    net: Net = ConvNet()
    recipe: Recipe = Recipe(steps=7840, batch=256, optimiser="adam", lr=0.001, schedule="cosine")
    seeds: int = 3
    neighbours: int = 5
    shown: int = 2000

    def __post_init__(self) -> None:
        at_least(1, "feature_map", seeds=self.seeds, neighbours=self.neighbours, shown=self.shown)

    @classmethod
    def defaults(cls, like: Dataset) -> FeatureMap:
        """The field's network, trained as the judge of ``behaviour/recognition`` that it is."""
        return cls(ConvNet.defaults(like), recipe(like))

    @classmethod
    def as_published(cls, like: Dataset) -> FeatureMap:
        """The 512 features of one ResNet-18, 5 neighbours, all 10,000 test images on the map.

        Its network was downloaded and nothing is known of its training: here it is trained as the paper's ConvNet is.
        """
        net = replace(ResNet18.defaults(like), norm="batch")
        return cls(net, published(like), seeds=1, shown=10_000)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One population, on all real training data."""
        return [training(real, self.net, self.recipe, self.seeds, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> FeatureMapResult:
        """Neighbours, distances and the map.

        Raises:
            UserError: there are fewer real test images than neighbours are asked for.
        """
        sets.check_against(real)
        if len(real.test) < self.neighbours:
            raise UserError(
                f"feature_map: {self.neighbours} neighbours were asked for",
                got=f"{len(real.test)} real test images",
                fix=f"set neighbours to at most {len(real.test)}",
            )
        (networks,) = runs.get(*self.trainings(sets, real, key=key))
        among, classes = networks.features(real.test), real.test.labels.hard()
        usual = _usual(among, networks.features(real.val), real.val, self.neighbours)
        asked = shown(sets, real, key)
        labels = {name: tuple(data.labels.hard() for data in many) for name, many in asked.items()}
        same: dict[str, tuple[torch.Tensor, ...]] = {}
        far: dict[str, tuple[torch.Tensor, ...]] = {}
        by_chance: dict[str, tuple[float, ...]] = {}
        on_map = {REAL: among[0]}
        for name, many in asked.items():
            rows = []
            for r, data in enumerate(many):
                own, y = networks.features(data), labels[name][r]
                if r == 0 and name in sets.distilled:
                    on_map[name] = own[0]
                distances, index = _nearest(among, own, self.neighbours)
                found = classes[index]  # [seeds, n, neighbours]
                multiple = (distances.clamp(min=LEAST) / usual[:, y]).log().mean(0)
                expected = float(chance(found.flatten(1)[None], y, real.train.k))
                rows.append(((found == y[:, None]).double().mean((0, 2)), multiple, expected))
            same[name], far[name], by_chance[name] = zip(*rows, strict=True)
        pick = key.fold("map").permutation(len(real.test))[: self.shown].sort().values
        on_map[REAL] = on_map[REAL][pick]
        map_labels = [classes[pick], *(labels[name][0] for name in on_map if name != REAL)]
        places, method = _embedded(torch.cat(list(on_map.values())), self.neighbours)
        return FeatureMapResult(
            label(self.net),
            self.neighbours,
            tuple(sets.distilled),
            real.train.classes,
            len(real.test),
            same,
            far,
            by_chance,
            labels,
            method,
            dict(zip(on_map, torch.split(places, [len(one) for one in on_map.values()]), strict=True)),
            dict(zip(on_map, map_labels, strict=True)),
        )


def _nearest(among: torch.Tensor, points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance [m, n] to the k-th nearest of ``among`` [m, t, d], and the k nearest's indices [m, n, k]."""
    from sklearn.neighbors import NearestNeighbors

    distances, index = [], []
    for real, own in zip(among.numpy(), points.numpy(), strict=True):
        found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(real).kneighbors(own)
        distances.append(torch.from_numpy(found[0][:, -1].copy()))
        index.append(torch.from_numpy(found[1].astype(np.int64)))
    return torch.stack(distances), torch.stack(index)


def _usual(among: torch.Tensor, unseen: torch.Tensor, data: Dataset, k: int) -> torch.Tensor:
    """The median distance of unseen real images of each class to their k-th nearest of ``among``, [m, classes].

    A class that has no unseen images takes the median of all.
    """
    distances, _ = _nearest(among, unseen, k)
    of_classes = [distances[:, members] if len(members) else distances for members in data.by_class]
    return torch.stack([one.median(1).values for one in of_classes], 1).clamp(min=LEAST)


def _embedded(points: torch.Tensor, neighbours: int) -> tuple[torch.Tensor, str]:
    """Places [n, 2] of points [n, d] on one map, and how it was made; the same points give the same map."""
    values = points.numpy()
    neighbours = max(2, min(neighbours, len(points) - 1))
    try:
        umap = importlib.import_module("umap")
    except ImportError:
        from sklearn.manifold import TSNE

        wide = min(30.0, (len(points) - 1) / 3)
        made = TSNE(perplexity=wide, init="pca", random_state=STATE).fit_transform(values)
        return torch.from_numpy(made).float(), f"t-SNE, perplexity {wide:g}"
    made = umap.UMAP(n_neighbors=neighbours, random_state=STATE, n_jobs=1).fit_transform(values)
    return torch.from_numpy(np.asarray(made)).float(), f"UMAP, {neighbours} neighbours"


@dataclass(frozen=True, eq=False)
class FeatureMapResult(Result):
    """Image by image [n] for each replicate of each set: neighbours of its class, log of the distance's multiple.

    ``by_chance`` is the share of neighbours that permuted labels would give, for each replicate. The map holds places
    [n, 2] and classes [n] of real test images and of the first replicates.
    """

    analysis: ClassVar[str] = "behaviour/feature_map"
    title: ClassVar[str] = "Distilled images among real ones, as real-trained networks see them"
    question: ClassVar[str] = FeatureMap.question

    net: str
    neighbours: int
    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    references: int
    same: Mapping[str, tuple[torch.Tensor, ...]]
    far: Mapping[str, tuple[torch.Tensor, ...]]
    by_chance: Mapping[str, tuple[float, ...]]
    labels: Mapping[str, tuple[torch.Tensor, ...]]
    method: str
    places: Mapping[str, torch.Tensor]
    place_labels: Mapping[str, torch.Tensor]

    def of_its_class(self, name: str) -> Estimate:
        """The share of nearest real images that are of an image's own class."""
        return _share(self.same[name])

    def multiple(self, name: str) -> Estimate:
        """The distance to the real images as a multiple of what is usual: the geometric mean over a set's images."""
        return _multiple(self.far[name])

    def above_chance(self, name: str) -> Estimate:
        """The share of neighbours of its class minus what permuted labels would give."""
        return above_chance(self.same[name], self.by_chance[name])

    def farther_than_real(self, name: str) -> Estimate:
        """The log of how many times farther from the real test images a set lies than unseen real images do, paired."""
        return difference(self.far[name], self.far[UNSEEN])

    def _names(self) -> list[str]:
        return [*self.distilled, *(name for name in (SEEN, UNSEEN) if name in self.same)]

    def headline(self) -> dict[str, Estimate]:
        """The distance of each set and of unseen real images, as multiples of what is usual."""
        return {name: self.multiple(name) for name in [*self.distilled, UNSEEN]}

    def claims(self) -> tuple[Claim, ...]:
        """Off the real images; among those of its class."""
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    "off the manifold",
                    name,
                    "it lies more than 1.5 times as far from the real test images as unseen real images do (in logs)",
                    self.farther_than_real(name),
                    "greater",
                    OFF,
                    "another random set of unseen real images",
                    "real images under noise of three standard deviations",
                    "paper, section 3",
                ),
                Claim(
                    "neighbours of its class",
                    name,
                    "the real images nearest to it are of its class far more often than permuted labels would give",
                    self.above_chance(name),
                    "greater",
                    PLAIN,
                    "the same images with permuted labels",
                    "unseen real images (the positive control)",
                    "paper, section 3",
                ),
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Set by set, then class by class."""
        names = self._names()
        rows = tuple(
            (name, self.of_its_class(name), self.above_chance(name), self.multiple(name)) for name in names
        )
        nearest = f"share of the {self.neighbours} nearest real test images that are of its class"
        distance = f"distance to the nearest real test image number {self.neighbours}, 1: usual for unseen real images"
        return (
            Table(
                f"Among {self.references} real test images",
                ("images", "of its class", "above chance", "distance"),
                rows,
            ),
            self._by_class(f"By class: {nearest}", self.same, _share),
            self._by_class(f"By class: {distance}", self.far, _multiple),
        )

    def _by_class(
        self,
        title: str,
        values: Mapping[str, tuple[torch.Tensor, ...]],
        estimate: Callable[[Sequence[torch.Tensor]], Estimate],
    ) -> Table:
        def cell(name: str, c: int) -> str | Estimate:
            found = of_class(values[name], self.labels[name], c)
            return estimate(found) if found else ""

        names = self._names()
        rows = tuple((word, *(cell(name, c) for name in names)) for c, word in enumerate(self.classes))
        return Table(title, ("class", *names), rows)

    def notes(self) -> tuple[str, ...]:
        """How the map was made, and what an interval covers."""
        notes = [
            f"Features: the last hidden layer of {self.net}. Distances are geometric means over a set's images; the "
            "claim is on their logs.",
            f"The map: {self.method}; {len(self.places[REAL])} of {self.references} real test images, the first "
            "replicate of each set, the first network. Distances on a map mean little: read the numbers.",
        ]
        single = [name for name in self.distilled if len(self.far[name]) == 1]
        if single:
            notes.append(f"{', '.join(single)}: one set, the interval is that over its images.")
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """The map, a map a set where there are several, and the numbers."""
        on = f"{len(self.places[REAL])} real test images, {self.method}"
        panels: dict[str, Callable[[Axes], None]] = {f"{self.title} ({on})": self.plot}
        if len(self.distilled) > 1:
            panels |= {
                f"{name} alone on the same map": partial(self._map, names=(name,)) for name in self.distilled
            }
        panels["Distance to the real images and neighbours of its class"] = self.plot_numbers
        return panels

    def plot(self, ax: Axes) -> None:
        """All sets on one map: colours are classes, dots are real images."""
        self._map(ax, self.distilled)

    def _map(self, ax: Axes, names: Sequence[str]) -> None:
        from matplotlib import colormaps
        from matplotlib.lines import Line2D

        k = len(self.classes)
        # The paper's rainbow; neighbouring classes of more than ten look alike in any palette.
        shades = [colormaps["tab10"](c) if k <= 10 else colormaps["turbo"](c / (k - 1)) for c in range(k)]
        for name in (REAL, *names):
            x, y = self.places[name].T.numpy()
            tints = [shades[c] for c in self.place_labels[name].tolist()]
            if name == REAL:
                ax.scatter(x, y, c=tints, s=5, alpha=0.35, linewidths=0)
                continue
            marker = MARKERS[self.distilled.index(name) % len(MARKERS)]
            ax.scatter(x, y, c=tints, s=30, marker=marker, edgecolors="black", linewidths=0.6)
        entries = [Line2D([], [], ls="", marker=".", color="grey", label="real")]
        entries += [
            Line2D([], [], ls="", marker=m, mfc="white", mec="black", label=name)
            for name, m in zip(
                self.distilled, MARKERS * (1 + len(self.distilled) // len(MARKERS)), strict=False
            )
            if name in names
        ]
        if k <= 10:
            entries += [
                Line2D([], [], ls="", marker="s", color=shade, label=word)
                for word, shade in zip(self.classes, shades, strict=True)
            ]
        ax.legend(handles=entries, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.set_xticks([])
        ax.set_yticks([])

    def plot_numbers(self, ax: Axes) -> None:
        """A point a set: how far from the real images it lies, and how many of its neighbours are of its class."""
        for name in self._names():
            x, y = self.multiple(name), self.of_its_class(name)
            tint = colour({UNSEEN: "real", SEEN: "random_subset"}.get(name, name))
            bars = [
                [[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]] if math.isfinite(e.high) else None
                for e in (x, y)
            ]
            ax.errorbar(
                x.value, y.value, bars[1], bars[0], color=tint, marker="o", ms=5, lw=1, ls="", label=name
            )
        ax.axvline(1, color="grey", lw=1, ls=":")
        ax.axvline(math.exp(OFF), color="grey", lw=1, ls="--")
        ax.set_xscale("log")
        ticks = [
            t for t in (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50) if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]
        ]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("distance to the real test images (dotted: unseen real images, dashed: 1.5 times)")
        ax.set_ylabel("nearest real images of its class")
        ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        ax.spines[["top", "right"]].set_visible(False)


def _share(values: Sequence[torch.Tensor]) -> Estimate:
    """The mean of shares, image by image [n] for each replicate."""
    return Estimate.share([float(one.mean()) for one in values], len(values[0]), REPLICATE)


def _multiple(values: Sequence[torch.Tensor]) -> Estimate:
    """The geometric mean of multiples whose logs are given, image by image [n] for each replicate."""
    e = difference(values, [torch.zeros_like(one) for one in values])
    value, low, high = torch.tensor([e.value, e.low, e.high], dtype=torch.float64).exp().tolist()
    return Estimate(value, low, high, e.n, e.unit, e.level)
