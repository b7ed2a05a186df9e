"""Where models of distilled data lie on the loss surface of real training: barriers, a plane, and likeness of features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.representativeness._drawing import axis_of_updates, legend_above
from distillens.analyses.representativeness._trajectory import (
    TRAJECTORIES,
    along,
    by_replicate,
    mean_of_known,
    real_recipe,
    shown,
)
from distillens.core.checks import at_least
from distillens.core.contracts import RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, units
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population, Training, networks, on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STABLE = 0.02  # two models are connected where the error rises by less than this between them (Frankle et al. 2020)
OTHER = "real, two starts"
TO = ("early-stopped", "fully trained")
MEASURES = ("loss", "error")


@dataclass(frozen=True)
class Landscape:
    """Whether models of each set are connected with the real trajectory from the same initialisation, and alike it when.

    A set's model is matched with the trajectory's moment nearest to it in validation accuracy (the early-stopped model)
    and with its end (the fully trained one).

    - **Barrier**: along the straight line between two models, the most by which loss or error on test images exceeds the
      straight line between the two ends (Frankle et al. 2020). Below two points of error the models are in one basin.
    - **Likeness of features**: linear CKA (Kornblith et al. 2019) between the last hidden layers on validation images, which
      neither model was trained on, at every moment. Its debiased estimator: the plain one is high for any two
      layers with more features than images tell apart. The arc cosine of CKA is a distance: it says where between its early-stopped and its
      fully trained model a model's features stand, from 1 to -1, however far these are from each other.
    - **Plane**: through the initialisation, the real optimum and the set's, loss and error on real validation images and
      loss on the set, for the first replicate.

    A random subset's models do the same beside them. All start at one initialisation: ``real, two starts`` shows what the barrier
    between models of two is. ``images`` is the most that either split gives.

    Not in the paper.
    """

    question: ClassVar[str] = (
        "Do models trained on distilled data lie in the basin of real training, and where?"
    )
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "own.steps", "trajectories", "grid")

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=392, batch=256)
    own: Recipe = Recipe(steps=300)
    moments: int = 48
    trajectories: int = TRAJECTORIES
    points: int = 11
    grid: int = 21
    images: int = 1000

    def __post_init__(self) -> None:
        at_least(1, "landscape", trajectories=self.trajectories)
        at_least(2, "landscape", moments=self.moments, grid=self.grid)
        at_least(3, "landscape", points=self.points)
        at_least(4, "landscape", images=self.images)  # of fewer there is no debiased CKA

    @classmethod
    def defaults(cls, like: Dataset) -> Landscape:
        """The real trajectories that all analyses of this question share, and the paper's way to train on a set."""
        return cls(ConvNet.defaults(like), real_recipe(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The real trajectories, then the sets' own models from the same initialisations."""
        trajectories = along(self.net, self.recipe, self.moments, self.trajectories, sets, real, key)
        own = self._own(sets, len(trajectories.keys), key)
        return [trajectories, *(one for many in own.values() for one in many)]

    def _own(self, sets: Sets, trajectories: int, key: Key) -> dict[str, list[Training]]:
        named = sets.everything()
        each = trajectories // max(map(len, named.values()))
        return {
            name: [on(one, self.net, self.own, networks(key, r, each)) for r, one in enumerate(many)]
            for name, many in named.items()
        }

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> LandscapeResult:
        """Barriers, likenesses and planes."""
        sets.check_against(real)
        trajectories, *_ = asked = self.trainings(sets, real, key=key)
        runs.make(asked)
        (population,) = runs.get(trajectories)
        place = key.fold("landscape")
        val, test = (
            some(data, self.images, place.fold(name))
            for name, data in (("val", real.val), ("test", real.test))
        )
        parts = by_replicate(population, sets)
        known = [along_the_way(models, val) for models in parts]
        found: dict[str, list[Beside]] = {}
        planes, spans, corners = {}, {}, {}
        for name, trainings in self._own(sets, len(population), key).items():
            owns = runs.get(*trainings)
            found[name] = [
                beside(own.final, models, way, val, test, self.points)
                for own, models, way in zip(owns, parts, known, strict=False)
            ]
            early = parts[0].at(int(found[name][0].matched[0]))[0]
            ends = [parts[0].at(0)[0], parts[0].final[0], owns[0].final[0], early]
            data = shown(sets.everything()[name][0].dataset())
            planes[name], spans[name], corners[name] = surface(parts[0], ends, val, data, self.grid)
        pairs = len(population) if len(population) > 1 else 0
        others = [
            profile(population, population.final[j], population.final[(j + 1) % pairs], test, self.points)
            for j in range(pairs)
        ]

        def stacked(take: Callable[[Beside], torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: torch.stack([take(one) for one in many]) for name, many in found.items()}

        return LandscapeResult(
            tuple(sets.distilled),
            population.moments,
            stacked(lambda one: one.accuracy),
            stacked(lambda one: one.matched),
            stacked(lambda one: one.profiles),
            stacked(lambda one: one.alike),
            stacked(lambda one: one.leaning),
            torch.stack(others) if others else torch.zeros(0, 2, self.points),
            planes,
            spans,
            corners,
        )


@dataclass(frozen=True, eq=False)
class Way:
    """What a replicate's trajectories are at their moments: accuracy [m, t] and features [m, t, n, d]."""

    accuracy: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True, eq=False)
class Beside:
    """Models beside their trajectories: accuracy [m], matched update [m], profiles [m, 2, 2, points], likeness [m, t], leaning [m].

    Profiles are those to the early-stopped and to the fully trained model, of loss and of error.
    """

    accuracy: torch.Tensor
    matched: torch.Tensor
    profiles: torch.Tensor
    alike: torch.Tensor
    leaning: torch.Tensor


def some(data: Dataset, most: int, key: Key) -> Dataset:
    """At most so many images, drawn at random."""
    return data.take(key.permutation(len(data))[:most].to(data.device)) if len(data) > most else data


def along_the_way(models: Population, data: Dataset) -> Way:
    """Accuracy and features of a replicate's trajectories at their moments."""
    accuracy = [1 - measured(models, flats, data)[1] for flats in models.snapshots]
    seen = [models.features(data, flats) for flats in models.snapshots]
    return Way(torch.stack(accuracy), torch.stack(seen))


def beside(
    own: torch.Tensor, models: Population, way: Way, val: Dataset, test: Dataset, points: int
) -> Beside:
    """Models ``own`` [m, P] beside the m trajectories ``models``."""
    accuracy = 1 - measured(models, own, val)[1]
    matched = (way.accuracy - accuracy[:, None]).abs().argmin(1)
    profiles, alike, leanings = [], [], []
    for j, flat in enumerate(own):
        ends = (models.snapshots[j, matched[j]], models.final[j])
        profiles.append(torch.stack([profile(models, flat, end, test, points) for end in ends]))
        (seen,) = models.features(val, flat[None])
        alike.append(torch.stack([likeness(seen, theirs) for theirs in way.features[j]]))
        early, full = way.features[j, matched[j]], way.features[j, -1]
        leanings.append(leaning(alike[-1][matched[j]], alike[-1][-1], likeness(early, full)))
    updates = torch.tensor(models.moments)[matched].double()
    return Beside(accuracy, updates, torch.stack(profiles), torch.stack(alike), torch.stack(leanings))


def measured(models: Population, flat: torch.Tensor, data: Dataset) -> torch.Tensor:
    """Mean loss and error [2, m] of the parameters ``flat`` [m, P] on data."""
    logits = models.logits(data, flat)
    loss = torch.stack([data.labels.loss(one).double().mean() for one in logits])
    error = (logits.argmax(-1) != data.labels.hard()).double().mean(1)
    return torch.stack([loss, error]).cpu()


def profile(
    models: Population, first: torch.Tensor, last: torch.Tensor, data: Dataset, points: int
) -> torch.Tensor:
    """Loss and error [2, points] on the straight line from one model [P] to another."""
    share = torch.linspace(0, 1, points, dtype=first.dtype, device=first.device)[:, None]
    return measured(models, torch.lerp(first, last, share), data)


def barrier(profiles: torch.Tensor) -> torch.Tensor:
    """The most [...] by which a profile [..., points] exceeds the straight line between its ends; at least 0."""
    share = torch.linspace(0, 1, profiles.shape[-1], dtype=profiles.dtype)
    straight = profiles[..., :1] * (1 - share) + profiles[..., -1:] * share
    # The ends exceed it by nothing, but for rounding.
    return (profiles - straight)[..., 1:-1].amax(-1).clamp(min=0)


def likeness(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Linear CKA between features [n, d] and [n, d'] of the same images, debiased: 1 if alike, about 0 if unrelated.

    Source: Kornblith et al. 2019 with Song et al. 2012's unbiased estimator of HSIC, as Nguyen et al. 2021 use it.
    """
    grams = []
    for seen in (first.double(), second.double()):
        gram = (seen - seen.mean(0)) @ (seen - seen.mean(0)).T
        grams.append(gram.fill_diagonal_(0))
    a, b = grams
    tiny = torch.finfo(torch.float64).tiny
    return _hsic(a, b) / (_hsic(a, a) * _hsic(b, b)).clamp(min=tiny).sqrt()


def leaning(early: torch.Tensor, full: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
    """Where a model stands, 1 at the early-stopped model to -1 at the fully trained one, from likenesses with and between them.

    NaN where these two are the same.
    """
    first, last, whole = (one.clamp(-1, 1).arccos() for one in (early, full, between))
    return torch.where(whole > 1e-6, (last - first) / whole, torch.nan)


def _hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    n = len(a)
    sums = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a.sum(0) @ b.sum(0)) / (n - 2)
    return ((a * b).sum() + sums) / (n * (n - 3))


def plane(ends: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Axes [2, P] of length 1 of the plane through the first three points [P], and the coordinates [points, 2] of all.

    The first axis goes from the first to the second. A point outside of the plane stands at its foot.
    """
    start = ends[0]
    across = ends[1] - start
    across = across / torch.linalg.vector_norm(across).clamp(min=1e-12)
    up = ends[2] - start
    up = up - (up @ across) * across
    up = up / torch.linalg.vector_norm(up).clamp(min=1e-12)
    axes = torch.stack([across, up])
    return axes, torch.stack([axes @ (end - start) for end in ends])


def surface(
    models: Population, ends: list[torch.Tensor], real: Dataset, own: Dataset, grid: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Real loss, real error and the set's loss [3, grid, grid] (rows: second axis) on the plane, its ticks [2, grid], the corners.

    The plane goes a third of its length beyond the outermost corners.
    """
    axes, corners = plane(ends)
    low, high = corners.amin(0), corners.amax(0)
    margin = ((high - low) / 3).clamp(min=1e-6)
    ticks = torch.stack(
        [torch.linspace(float(a), float(b), grid) for a, b in zip(low - margin, high + margin, strict=True)]
    ).to(ends[0])
    places = torch.cartesian_prod(ticks[1], ticks[0]).flip(1)
    found = []
    for some_places in torch.split(places, 64):  # each is a whole network
        flat = ends[0] + some_places @ axes
        loss, error = measured(models, flat, real)
        found.append(torch.stack([loss, error, measured(models, flat, own)[0]]))
    return torch.cat(found, 1).reshape(3, grid, grid).float(), ticks.cpu(), corners.cpu()


@dataclass(frozen=True)
class LandscapeResult(Result):
    """By name [replicates, trajectories, ...]: accuracy, matched update, profiles [2, 2, points], likeness [moments], leaning.

    ``others`` [pairs, 2, points] are the profiles between fully trained models of two initialisations. ``planes`` hold real loss,
    real error and the set's loss [3, grid, grid] over ``spans`` [2, grid]; ``corners`` [4, 2] are the initialisation, the real
    optimum, the set's, and the foot of the early-stopped model.
    """

    analysis: ClassVar[str] = "representativeness/landscape"
    title: ClassVar[str] = "Likeness (CKA) of features with a real model's through its training"
    question: ClassVar[str] = Landscape.question

    distilled: tuple[str, ...]
    moments: tuple[int, ...]
    accuracy: Mapping[str, torch.Tensor]
    matched: Mapping[str, torch.Tensor]
    profiles: Mapping[str, torch.Tensor]
    alike: Mapping[str, torch.Tensor]
    leanings: Mapping[str, torch.Tensor]
    others: torch.Tensor
    planes: Mapping[str, torch.Tensor]
    spans: Mapping[str, torch.Tensor]
    corners: Mapping[str, torch.Tensor]

    def barrier(self, name: str, to: int = 1, measure: int = 1) -> Estimate:
        """The barrier to the early-stopped (0) or fully trained (1) model, in loss (0) or error (1)."""
        return Estimate.mean(*units(barrier(self.profiles[name][:, :, to, measure])))

    def alike_when(self, name: str) -> torch.Tensor:
        """Likeness with the matched moment and with the end, [replicates, trajectories, 2]."""
        places = (self.matched[name][..., None] == torch.tensor(self.moments)).double().argmax(-1)
        there = self.alike[name].gather(2, places[..., None])
        return torch.cat([there, self.alike[name][..., -1:]], 2)

    def leaning(self, name: str) -> Estimate | None:
        """Where its features stand between the early-stopped (1) and the fully trained model (-1); None if these are one."""
        return mean_of_known(self.leanings[name])

    def beyond_random(self, name: str) -> Estimate | None:
        """The leaning to the early-stopped model beyond that of a random subset's models, paired."""
        count = min(len(self.leanings[name]), len(self.leanings[RANDOM]))
        return mean_of_known(self.leanings[name][:count] - self.leanings[RANDOM][:count])

    def greatest(self, name: str) -> Estimate:
        """The update at which the real model's features are most alike."""
        updates = torch.tensor(self.moments).double()[self.alike[name].argmax(2)]
        return Estimate.mean(*units(updates))

    def headline(self) -> dict[str, Estimate]:
        """The error barrier to the fully trained model."""
        return {name: self.barrier(name) for name in self.distilled}

    def claims(self) -> tuple[Claim, ...]:
        """In the basin of real training; with the features of its early part."""
        claims = []
        for name in self.distilled:
            claims.append(
                Claim(
                    "in the real basin",
                    name,
                    "between its model and the fully trained one from the same start the error rises by less than two points",
                    self.barrier(name),
                    "same",
                    STABLE,
                    "models of another initialisation",
                    "other moments of the real trajectory",
                )
            )
            beyond = self.beyond_random(name) if RANDOM in self.leanings else None
            if beyond is not None:
                claims.append(
                    Claim(
                        "early features",
                        name,
                        "its model's features lean to the early-stopped model's more than a random subset's model's do",
                        beyond,
                        "greater",
                        0.0,
                        "another random real subset",
                        "early moments of the real trajectory",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Barriers in error and loss, and likeness."""
        rows: list[tuple[str | int | Estimate, ...]] = []
        likenesses: list[tuple[str | int | Estimate, ...]] = []
        for name in self.profiles:
            found = [self.barrier(name, to, measure) for measure in (1, 0) for to in (0, 1)]
            rows.append((name, Estimate.mean(*units(self.accuracy[name])), *found))
            when = self.alike_when(name)
            likenesses.append(
                (
                    name,
                    Estimate.mean(*units(self.matched[name])),
                    *(Estimate.mean(*units(when[..., i])) for i in (0, 1)),
                    self.leaning(name) or "",
                    self.greatest(name),
                    Estimate.mean(*units(self.alike[name].amax(2))),
                )
            )
        if len(self.others):
            apart = [
                Estimate.mean(barrier(self.others[:, m]).tolist(), "pair of trajectories") for m in (1, 0)
            ]
            rows.append((OTHER, "", "", apart[0], "", apart[1]))
        columns = tuple(f"{measure} to {to}" for measure in reversed(MEASURES) for to in TO)
        return (
            Table("Barriers on test images", ("set", "validation accuracy", *columns), tuple(rows)),
            Table(
                "Likeness (CKA) of features on validation images",
                (
                    "set",
                    "matched after updates",
                    *(f"with {to}" for to in TO),
                    "leaning",
                    "greatest after updates",
                    "greatest",
                ),
                tuple(likenesses),
            ),
        )

    def notes(self) -> tuple[str, ...]:
        """What a small barrier says, and what an interval covers."""
        notes = [
            "All models of a pair start at one initialisation. In easy tasks real subsets' models stay in the real basin too: see "
            "theirs beside the sets'.",
            "Leaning: 1 where the features are the early-stopped model's, -1 where they are the fully trained one's. The update of "
            "the greatest likeness is one of the moments looked at.",
        ]
        single = [name for name in self.distilled if len(self.matched[name]) == 1]
        if single:
            notes.append(f"{', '.join(single)}: one set, the interval covers training only.")
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Likeness through training, profiles, and a plane a set."""
        panels: dict[str, Callable[[Axes], None]] = {
            self.title: self.plot,
            "Test error on the straight line to the fully trained model": self.plot_lines,
        }
        for name in self.planes:
            panels[f"The plane through the start, the real optimum and that of {name}"] = partial(
                self.plot_plane, name=name
            )
        return panels

    def plot(self, ax: Axes) -> None:
        """A line a set, the mean over replicates; upright: where it is matched in accuracy."""
        for name, alike in self.alike.items():
            own = alike.mean(1)
            ax.plot(self.moments, own.mean(0), color=colour(name), lw=1.6, label=name)
            if len(own) > 1:
                ax.fill_between(self.moments, own.amin(0), own.amax(0), color=colour(name), alpha=0.12, lw=0)
            ax.axvline(float(self.matched[name].mean()), color=colour(name), lw=0.8, ls=":")
        axis_of_updates(ax, self.moments[-1])
        ax.set_ylabel("CKA of the last hidden layer\n(dotted: matched in validation accuracy)")
        legend_above(ax, len(self.alike))

    def plot_lines(self, ax: Axes) -> None:
        """A line a set, the mean over replicates; dashed: between fully trained models of two initialisations."""
        share = torch.linspace(0, 1, self.others.shape[-1])
        for name, profiles in self.profiles.items():
            own = profiles[:, :, 1, 1].mean(1)
            ax.plot(share, own.mean(0), color=colour(name), lw=1.6, label=name)
        if len(self.others):
            ax.plot(share, self.others[:, 1].mean(0), "--", color=colour("real"), lw=1.4, label=OTHER)
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("share of the way from the set's model to the fully trained one")
        ax.set_ylabel("error on test images")
        legend_above(ax, len(self.profiles) + bool(len(self.others)))

    def plot_plane(self, ax: Axes, name: str) -> None:
        """Real loss (filled), the set's loss (lines), and where real error is within two points of the real optimum's."""
        real, error, own = self.planes[name]
        x, y = self.spans[name]
        filled = ax.contourf(x, y, real.clamp(min=1e-3).log10(), levels=16, cmap="Greys")
        ax.figure.colorbar(filled, ax=ax, label="loss on real images, log10")
        ax.contour(
            x, y, own.clamp(min=1e-3).log10(), levels=8, colors=colour(name), linewidths=0.9, linestyles="-"
        )
        if float(error.min()) < float(error.min()) + STABLE < float(error.max()):
            ax.contour(x, y, error, levels=[float(error.min()) + STABLE], colors="#C00000", linewidths=1.6)
        points = zip(("start", "real", name, "early-stopped"), self.corners[name].tolist(), strict=True)
        for (label, (a, b)), marker in zip(points, ("s", "*", "o", "^"), strict=True):
            ax.scatter(
                [a], [b], marker=marker, s=50, color="white", edgecolors="black", zorder=3, label=label
            )
        ax.plot([], [], color=colour(name), lw=0.9, label="loss on the set")
        ax.plot([], [], color="#C00000", lw=1.6, label="least real error + 0.02")
        ax.set_xlabel("towards the real optimum")
        ax.set_ylabel("away from its line")
        legend_above(ax, 6)
