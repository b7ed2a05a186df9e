"""Which moment of real training a distilled set, each class of it and each of its images correspond to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.representativeness._beside import (
    SEEN,
    UNSEEN,
    of_test,
    seen,
    sooner,
    unseen,
    updates,
)
from distillens.analyses.representativeness._drawing import axis_of_updates, dashes, legend_above, tint
from distillens.analyses.representativeness._instruments import (
    INSTRUMENTS,
    OF_POINTS,
    Readings,
    ages_of,
    read,
    real_directions,
    smooth,
)
from distillens.analyses.representativeness._trajectory import (
    TRAJECTORIES,
    along,
    by_replicate,
    looks_of,
    real_recipe,
)
from distillens.core.checks import at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.ranks import rank_correlation
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, units, weaker
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training, networks, on

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Clock:
    """The training age of each set, class and image by four instruments, in updates of real training.

    The age is the moment at which real training is done with what the set has to teach:

    - *agreement*: models trained on the set agree most with the real model (Cohen's kappa on test images);
    - *recognition*: the share of its images that the real model has right comes to 95 % of its own greatest;
    - *gradients*: the cosine of the gradient on it and on real test images has fallen to half of its greatest;
    - *curvature*: the trace of the Hessian of the loss on it has fallen to half of its greatest.

    What has not happened by the last moment counts as the last moment, and so does a reading that is never
    worth speaking of. Readings are taken at ``looks`` of the moments that the shared trajectories keep, smoothed over
    neighbours (1/4, 1/2, 1/4), and read between two looks along the logarithm. ``probes`` random directions a
    replicate estimate the trace, the same for all sets and moments. A class agrees on the test images of that class; a
    single image has no agreement. Of a teacher's views the mean is the label.

    Beside the sets stand unseen real images and random training images of their number, as in ``recognition_curve``: they get models
    of their own too. Training is done with its own images sooner, so a set is younger than real images if it is beside both:
    the estimate is the contrast that says less for it (an intersection-union test, Berger 1982: no correction is due).

    Source: none of the whole; the instruments are those of Yang et al. 2024, section 4.
    """

    question: ClassVar[str] = "Which moment of real training does a distilled set correspond to?"
    scales: ClassVar[tuple[str, ...]] = (
        "recipe.steps",
        "own_recipe.steps",
        "trajectories",
        "looks",
        "probes",
    )

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=392, batch=256)
    own_recipe: Recipe = Recipe(steps=300)
    moments: int = 48
    trajectories: int = TRAJECTORIES
    looks: int = 12
    probes: int = 2
    tested: int = 500

    def __post_init__(self) -> None:
        at_least(1, "clock", steps=self.recipe.steps, trajectories=self.trajectories)
        at_least(2, "clock", moments=self.moments, looks=self.looks)
        at_least(1, "clock", probes=self.probes, tested=self.tested)

    @classmethod
    def defaults(cls, like: Dataset) -> Clock:
        """The real trajectories that all analyses of this question share."""
        return cls(ConvNet.defaults(like), real_recipe(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The real trajectories, then models of each set and of real images, unseen and seen."""
        return [
            self._along(sets, real, key),
            *(t for many in self._own(sets, real, key).values() for t in many),
        ]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> ClockResult:
        """The ages.

        Raises:
            UserError: the sets do not belong to the data, or the network remembers more than its parameters.
        """
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        (population,) = runs.get(self._along(sets, real, key))
        moments = looks_of(population.moments, self.looks)
        test = of_test(real, self.tested, key)
        probes = [
            torch.stack([key.fold("probe", r, q).uniform(population.shapes.size) for q in range(self.probes)])
            .sub(0.5)
            .sign()
            for r in range(len(by_replicate(population, sets)))
        ]
        trajectories = by_replicate(population, sets)
        directions = [real_directions(own, moments, test) for own in trajectories]
        shown = {name: [one.dataset() for one in many] for name, many in sets.everything().items()} | {
            name: list(many) for name, many in _beside(sets, real, key).items()
        }
        readings: dict[str, list[Readings]] = {}
        for name, trainings in self._own(sets, real, key).items():
            readings[name] = [
                read(trajectories[r], moments, directions[r], probes[r], data, model, test)
                for r, (data, model) in enumerate(zip(shown[name], runs.get(*trainings), strict=True))
            ]
        return ClockResult(
            tuple(sets.distilled),
            real.train.classes,
            moments,
            {name: torch.stack([one.whole for one in many]) for name, many in readings.items()},
            {
                name: torch.stack([ages_of(one.whole, moments) for one in many])
                for name, many in readings.items()
            },
            {
                name: torch.stack([ages_of(one.classes, moments) for one in many])
                for name, many in readings.items()
            },
            {name: tuple(ages_of(one.points, moments) for one in many) for name, many in readings.items()},
            {name: tuple(data.labels.hard().cpu() for data in many) for name, many in shown.items()},
        )

    def _along(self, sets: Sets, real: Splits, key: Key) -> Training:
        return along(self.net, self.recipe, self.moments, self.trajectories, sets, real, key)

    def _own(self, sets: Sets, real: Splits, key: Key) -> dict[str, list[Training]]:
        beside = _beside(sets, real, key)
        each = -(-self.trajectories // len(beside[UNSEEN]))

        def keys(r: int) -> tuple[Key, ...]:
            return networks(key, r, each)

        found = {
            name: [on(one, self.net, self.own_recipe, keys(r)) for r, one in enumerate(many)]
            for name, many in sets.everything().items()
        }
        for name, datasets in beside.items():
            found[name] = [
                Training(data, self.net, self.own_recipe, keys(r)) for r, data in enumerate(datasets)
            ]
        return found


def _beside(sets: Sets, real: Splits, key: Key) -> dict[str, tuple[Dataset, ...]]:
    """The real images that sets are compared with."""
    return {UNSEEN: unseen(sets, real, key), SEEN: seen(sets, real, key)}


@dataclass(frozen=True, eq=False)
class ClockResult(Result):
    """Ages by name as log(1 + updates), infinite where not reached: of sets [replicates, trajectories, 4] and their parts.

    Classes have [replicates, trajectories, 4, k]; points [trajectories, 3, n] and their classes [n] for each replicate.
    ``readings`` [replicates, trajectories, 4, looks] are those of the sets, not smoothed.
    """

    analysis: ClassVar[str] = "representativeness/clock"
    title: ClassVar[str] = "Training age"
    question: ClassVar[str] = Clock.question

    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    moments: tuple[int, ...]
    readings: Mapping[str, torch.Tensor]
    ages: Mapping[str, torch.Tensor]
    class_ages: Mapping[str, torch.Tensor]
    point_ages: Mapping[str, tuple[torch.Tensor, ...]]
    labels: Mapping[str, tuple[torch.Tensor, ...]]

    @property
    def last(self) -> int:
        """The last moment."""
        return self.moments[-1]

    def age(self, name: str, instrument: str) -> Estimate:
        """The age of a set by one instrument, in updates; open above where it is not reached in each replicate."""
        return updates(self.ages[name][..., INSTRUMENTS.index(instrument)], self.last)

    def overall(self, name: str) -> Estimate:
        """The geometric mean of a set's four ages; open above where one is not reached in each replicate."""
        found = updates(self._over(name), self.last)
        if bool(self.ages[name].isinf().any()):
            return Estimate(found.value, found.low, math.inf, found.n, found.unit)
        return found

    def younger(self, name: str, instrument: str = "", kind: str = UNSEEN) -> Estimate:
        """The log of a set's age minus that of real images of a kind, paired; the mean of all instruments, or one."""
        if not instrument:
            return sooner(self._over(name), self._over(kind), self.last)
        i = INSTRUMENTS.index(instrument)
        return sooner(self.ages[name][..., i], self.ages[kind][..., i], self.last)

    def apart(self, name: str, first: str, second: str) -> Estimate:
        """The log of a set's age by one instrument minus that by another."""
        a, b = (self.ages[name][..., INSTRUMENTS.index(each)] for each in (first, second))
        return sooner(a, b, self.last)

    def alike(self, name: str, first: str = "", second: str = "") -> Estimate:
        """The rank correlation over a set's points of their ages by two instruments, or the mean of the three pairs."""
        pairs = [(first, second)] if first else list(combinations(OF_POINTS, 2))
        values = torch.stack(
            [torch.stack([_alike(one, a, b) for a, b in pairs]).mean(0) for one in self.point_ages[name]]
        )
        return Estimate.mean(*units(values))

    def of_class(self, name: str, c: int) -> Estimate:
        """The geometric mean of the four ages of one class; open above where one is not reached."""
        ages = self.class_ages[name][..., c]
        found = updates(ages.clamp(max=math.log1p(self.last)).mean(-1), self.last)
        high = math.inf if bool(ages.isinf().any()) else found.high
        return Estimate(found.value, found.low, high, found.n, found.unit)

    def _over(self, name: str) -> torch.Tensor:
        """The mean log age over instruments, not reached counting as the last moment."""
        return self.ages[name].clamp(max=math.log1p(self.last)).mean(-1)

    def headline(self) -> dict[str, Estimate]:
        """The age of each set, and of real images of either kind, over all instruments."""
        return {name: self.overall(name) for name in (*self.distilled, UNSEEN, SEEN)}

    def claims(self) -> tuple[Claim, ...]:
        """Younger than real images, unseen and seen, over all instruments; the instruments agree on the points."""
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    "holds early training",
                    name,
                    "its training age is below that of as many real images, unseen and training ones (difference of "
                    "logarithms, mean of four instruments, the weaker of the two)",
                    weaker("less", self.younger(name), self.younger(name, kind=SEEN)),
                    "less",
                    0.0,
                    "other unseen real images, or random training images, in the set's place",
                    "images under the labels that only an early model gives them",
                ),
                Claim(
                    "instruments agree",
                    name,
                    "recognition, gradients and curvature put its images in the same order of age (mean rank correlation)",
                    self.alike(name),
                    "greater",
                    0.0,
                    "each instrument's ages of the points shuffled",
                    "real images, easy and hard ones together",
                ),
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Ages, their ratios to those of real images, what was not reached, how far instruments lie apart, and classes."""
        names = list(self.ages)
        pairs = list(combinations(INSTRUMENTS, 2))
        of_points = list(combinations(OF_POINTS, 2))

        def table(
            title: str,
            columns: Sequence[str],
            rows: Mapping[str, Sequence[str | Estimate]],
            first: str = "images",
        ) -> Table:
            return Table(title, (first, *columns), tuple((name, *cells) for name, cells in rows.items()))

        return (
            table(
                "Training age in updates, by instrument",
                (*INSTRUMENTS, "all"),
                {name: [*(self.age(name, i) for i in INSTRUMENTS), self.overall(name)] for name in names},
            ),
            *(
                table(
                    f"Log ratio to the age of {what}",
                    (*INSTRUMENTS, "all"),
                    {
                        name: [self.younger(name, i, kind) for i in (*INSTRUMENTS, "")]
                        for name in names
                        if name not in (UNSEEN, SEEN)
                    },
                )
                for kind, what in {UNSEEN: "unseen real images", SEEN: "random training images"}.items()
            ),
            table(
                f"Not reached within {self.last} updates",
                INSTRUMENTS,
                {name: self._late(name) for name in names},
            ),
            table(
                "Log ratio of a set's ages by two instruments",
                [f"{a} / {b}" for a, b in pairs],
                {name: [self.apart(name, a, b) for a, b in pairs] for name in names},
            ),
            table(
                "Rank correlation of the images' ages",
                [*(f"{a}, {b}" for a, b in of_points), "mean"],
                {name: [*(self.alike(name, a, b) for a, b in of_points), self.alike(name)] for name in names},
            ),
            table(
                "Training age in updates by class, all instruments",
                names,
                {label: [self.of_class(name, c) for name in names] for c, label in enumerate(self.classes)},
                "class",
            ),
        )

    def _late(self, name: str) -> list[str]:
        ages = self.ages[name].flatten(0, 1)
        return [f"{int(own.isinf().sum())} of {len(own)}" for own in ages.unbind(1)]

    def notes(self) -> tuple[str, ...]:
        """What an age is, and how what is not reached counts."""
        notes = [
            "Age: agreement and recognition at their greatest (recognition at 95 % of it), gradients and curvature fallen to "
            "half of their greatest. Instruments differ in what they call done, so their ages of one set differ on real "
            "images too: compare sets, not instruments.",
            f"What is not reached within {self.last} updates counts as {self.last}; an interval is then open above, and the "
            "claims are about what happens up to there.",
            "A single image has no agreement: no model is trained on it alone.",
        ]
        if len(self.ages[UNSEEN]) == 1:
            notes.append("One replicate: the interval covers training only.")
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Ages by instrument, ages of single images by class, and the readings of each instrument."""
        panels: dict[str, Callable[[Axes], None]] = {
            "Training age by instrument": self.plot,
            "Training age of single images by class (first replicate, mean of three instruments)": self.plot_points,
        }
        for i, name in enumerate(INSTRUMENTS):
            panels[f"Reading along real training: {name}"] = _Readings(self, i)
        return panels

    def plot(self, ax: Axes) -> None:
        """A dot a set and instrument with its interval, hollow for training images; an arrow where it is open above."""
        names = list(self.ages)
        columns = (*INSTRUMENTS, "all")
        for i, name in enumerate(names):
            face = "white" if name == SEEN else tint(name)
            for place, instrument in enumerate(columns):
                e = self.overall(name) if instrument == "all" else self.age(name, instrument)
                y = place + 0.7 * (i / max(1, len(names) - 1) - 0.5)
                low, high = max(e.low, 0.0), min(e.high, self.last)
                ax.plot([low, high], [y, y], color=tint(name), lw=1.2)
                marker = ">" if math.isinf(e.high) and e.n > 1 else "o"
                ax.plot(e.value, y, marker, color=tint(name), mfc=face, ms=5)
            ax.plot([], [], "o", color=tint(name), mfc=face, ms=5, label=name)
        ax.set_yticks(range(len(columns)), columns)
        ax.invert_yaxis()
        axis_of_updates(ax, self.last)
        legend_above(ax, len(names))

    def plot_points(self, ax: Axes) -> None:
        """A dot an image of each distilled set and of the unseen real ones."""
        names = [*self.distilled, UNSEEN]
        for i, name in enumerate(names):
            ages, labels = self.point_ages[name][0], self.labels[name][0]
            mean = ages.clamp(max=math.log1p(self.last)).mean((0, 1)).expm1()
            y = labels + 0.7 * (i / max(1, len(names) - 1) - 0.5)
            ax.scatter(mean, y, s=9, color=tint(name), alpha=0.7, lw=0, label=name)
        ax.set_yticks(range(len(self.classes)), self.classes)
        ax.set_ylabel("class")
        ax.invert_yaxis()
        axis_of_updates(ax, self.last)
        legend_above(ax, len(names))


@dataclass(frozen=True)
class _Readings:
    """Draws what one instrument read along training."""

    result: ClockResult
    instrument: int

    def __call__(self, ax: Axes) -> None:
        result = self.result
        for name, readings in result.readings.items():
            mean = smooth(readings[:, :, self.instrument]).mean((0, 1))
            ax.plot(result.moments, mean, dashes(name), color=tint(name), lw=1.4, label=name)
        ax.set_ylabel(
            ("kappa", "share right, above chance", "cosine", "trace of the Hessian")[self.instrument]
        )
        axis_of_updates(ax, result.last)
        legend_above(ax, len(result.readings))


def _alike(ages: torch.Tensor, first: str, second: str) -> torch.Tensor:
    """Spearman's correlation over points of ages [m, 3, n] by two instruments, [m]; 0 where one tells no order."""
    return rank_correlation(*(ages[:, OF_POINTS.index(each)] for each in (first, second)))
