"""Which moment of real training a distilled set, each class of it and each of its images correspond to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from distillens.analyses.representativeness._beside import (
    UNSEEN,
    answers,
    first_at,
    of_test,
    sooner,
    unseen,
    updates,
)
from distillens.analyses.representativeness._trajectory import (
    TRAJECTORIES,
    along,
    by_replicate,
    real_recipe,
)
from distillens.attribution import example_gradients, mean_gradient
from distillens.core.checks import at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Probabilities, Teacher
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, units
from distillens.core.rng import Key
from distillens.curvature import quadratic_forms
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population, Training, networks, on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INSTRUMENTS = ("agreement", "recognition", "gradients", "curvature")
OF_POINTS = INSTRUMENTS[1:]  # no model is trained on a single point, so none can agree
REACHED, LEFT = 0.95, 0.5  # shares of the greatest reading
LEAST = 0.1  # a reading that never gets so far (of at most 1) tells no age


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

    Beside the sets stand unseen real images of their number, as in ``recognition_curve``: they get models of their own too.

    Source: none of the whole; the instruments are those of Yang et al. 2024, section 4.
    """

    question: ClassVar[str] = "Which moment of real training does a distilled set correspond to?"
    scales: ClassVar[tuple[str, ...]] = (
        "recipe.steps",
        "own_recipe.steps",
        "moments",
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
        """The real trajectories, then models of each set and of unseen real images."""
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
        moments = _some(population.moments, self.looks)
        test = of_test(real, self.tested, key)
        probes = [
            torch.stack([key.fold("probe", r, q).uniform(population.shapes.size) for q in range(self.probes)])
            .sub(0.5)
            .sign()
            for r in range(len(by_replicate(population, sets)))
        ]
        trajectories = by_replicate(population, sets)
        directions = [_real(own, moments, test) for own in trajectories]
        shown = {name: [one.dataset() for one in many] for name, many in sets.everything().items()} | {
            UNSEEN: list(unseen(sets, real, key))
        }
        readings: dict[str, list[Readings]] = {}
        for name, trainings in self._own(sets, real, key).items():
            readings[name] = [
                _read(trajectories[r], moments, directions[r], probes[r], data, model, test)
                for r, (data, model) in enumerate(zip(shown[name], runs.get(*trainings), strict=True))
            ]
        return ClockResult(
            tuple(sets.distilled),
            real.train.classes,
            moments,
            {name: torch.stack([one.whole for one in many]) for name, many in readings.items()},
            {
                name: torch.stack([_ages(one.whole, moments) for one in many])
                for name, many in readings.items()
            },
            {
                name: torch.stack([_ages(one.classes, moments) for one in many])
                for name, many in readings.items()
            },
            {name: tuple(_ages(one.points, moments) for one in many) for name, many in readings.items()},
            {name: tuple(data.labels.hard().cpu() for data in many) for name, many in shown.items()},
        )

    def _along(self, sets: Sets, real: Splits, key: Key) -> Training:
        return along(self.net, self.recipe, self.moments, self.trajectories, sets, real, key)

    def _own(self, sets: Sets, real: Splits, key: Key) -> dict[str, list[Training]]:
        beside = unseen(sets, real, key)
        each = -(-self.trajectories // len(beside))

        def keys(r: int) -> tuple[Key, ...]:
            return networks(key, r, each)

        found = {
            name: [on(one, self.net, self.own_recipe, keys(r)) for r, one in enumerate(many)]
            for name, many in sets.everything().items()
        }
        found[UNSEEN] = [Training(data, self.net, self.own_recipe, keys(r)) for r, data in enumerate(beside)]
        return found


@dataclass(frozen=True, eq=False)
class Readings:
    """What the instruments say at each moment, of one set: ``whole`` [m, 4, t], ``classes`` [m, 4, k, t], ``points`` [m, 3, n, t]."""

    whole: torch.Tensor
    classes: torch.Tensor
    points: torch.Tensor


def _some(moments: tuple[int, ...], looks: int) -> tuple[int, ...]:
    """So many of the moments, evenly spread over their order, first and last among them; all where there are no more."""
    if looks >= len(moments):
        return moments
    return tuple(moments[i] for i in torch.linspace(0, len(moments) - 1, looks).round().long().tolist())


def _real(population: Population, moments: tuple[int, ...], data: Dataset) -> torch.Tensor:
    """The gradient of the loss on real data at each moment, of length 1, [m, t, P]."""
    rows = [
        torch.stack([mean_gradient(population.net, population.shapes, flat, data) for flat in own])
        for own in torch.stack([population.at(moment) for moment in moments], 1)
    ]
    return F.normalize(torch.stack(rows), dim=-1)


def _read(
    population: Population,
    moments: tuple[int, ...],
    directions: torch.Tensor,
    probes: torch.Tensor,
    data: Dataset,
    model: Population,
    test: Dataset,
) -> Readings:
    """All readings of one set along its replicate's trajectories; model j of the set goes with trajectory j."""
    data = _of_one_view(data)
    labels = data.labels.hard().cpu()
    members = F.one_hot(labels, data.k).double().T  # [k, n]
    members = members / members.sum(1, keepdim=True).clamp(min=1)
    right = (answers(population, data, moments)[0] == labels).double()  # [m, t, n]
    right = (right - 1 / data.k) / (1 - 1 / data.k)
    agreed, agreed_by_class = _agreement(
        answers(population, test, moments)[0], model.predictions(test).cpu(), test
    )
    cosine: list[list[tuple[torch.Tensor, ...]]] = []
    trace: list[list[torch.Tensor]] = []
    for j in range(len(population)):
        steps = [population.at(moment)[j] for moment in moments]
        cosine.append(
            [_cosines(population, flat, data, members, directions[j, t]) for t, flat in enumerate(steps)]
        )
        trace.append(
            [
                quadratic_forms(population.net, population.shapes, flat, data, probes.to(flat))
                .mean(0)
                .double()
                .cpu()
                for flat in steps
            ]
        )
    curvature = torch.stack([torch.stack(own) for own in trace])  # [m, t, n]
    cosines = [torch.stack([torch.stack([at[i] for at in own]) for own in cosine]) for i in range(3)]
    whole = torch.stack([agreed, right.mean(-1), cosines[0], curvature.mean(-1)], 1)
    classes = torch.stack([agreed_by_class, right @ members.T, cosines[1], curvature @ members.T], 1)
    points = torch.stack([right, cosines[2], curvature], 1)
    return Readings(whole, classes.transpose(-1, -2), points.transpose(-1, -2))


def _of_one_view(data: Dataset) -> Dataset:
    """The data with one label an image: of a teacher's views the mean."""
    labels = data.labels
    if not isinstance(labels, Teacher):
        return data
    mean = (labels.views / labels.temperature).softmax(-1).mean(0)
    return Dataset(data.images, Probabilities(mean), data.classes, data.space)


def _agreement(theirs: torch.Tensor, own: torch.Tensor, test: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Cohen's kappa of a set's models [m, n] and real ones [m, t, n] on test images, [m, t], and by class [m, t, k].

    What two models would agree by chance goes by the classes that they name on all test images, for one class too: on the
    images of one class alone both name little else, and every agreement would pass for chance.
    """
    labels = test.labels.hard().cpu()
    members = F.one_hot(labels, test.k).double()
    members = members / members.sum(0).clamp(min=1)
    same = (theirs == own[:, None]).double()
    named = F.one_hot(theirs, test.k).double().mean(2) * F.one_hot(own, test.k).double().mean(1)[:, None]
    chance = named.sum(-1)
    room = (1 - chance).clamp(min=1e-12)  # two models that name one and the same class alone
    return (same.mean(-1) - chance) / room, (same @ members - chance[..., None]) / room[..., None]


def _cosines(
    population: Population, flat: torch.Tensor, data: Dataset, members: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cosine with a direction [P] of length 1: of the gradient on all images, on each class [k], on each image [n].

    ``members`` [k, n] averages over classes. The images' gradients are held some at a time.
    """
    points, at = [], 0
    whole = torch.zeros_like(flat)
    classes = flat.new_zeros(data.k, len(flat))
    for part in example_gradients(population.net, population.shapes, flat, data):
        whole += part.sum(0) / len(data)
        classes += members[:, at : at + len(part)].to(part) @ part
        points.append(_along(part, direction))
        at += len(part)
    return _along(whole, direction), _along(classes, direction), torch.cat(points)


def _along(gradients: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return (F.normalize(gradients, dim=-1) @ direction).double().cpu()


def smooth(readings: torch.Tensor) -> torch.Tensor:
    """Readings [..., t] averaged with their neighbours: 1/4, 1/2, 1/4; the ends count for what is missing."""
    before = torch.cat([readings[..., :1], readings[..., :-1]], -1)
    after = torch.cat([readings[..., 1:], readings[..., -1:]], -1)
    return before / 4 + readings / 2 + after / 4


def highest(readings: torch.Tensor, moments: tuple[int, ...]) -> torch.Tensor:
    """When readings [..., t] are greatest, as log(1 + updates): the top of the parabola through three; infinite at the end.

    Of equals the first.
    """
    logs = torch.tensor(moments, dtype=torch.float64).log1p()
    top = readings.argmax(-1)
    inner = top.clamp(1, max(1, len(moments) - 2))
    x0, x1, x2 = (logs[(inner + i).clamp(max=len(moments) - 1)] for i in (-1, 0, 1))
    y0, y1, y2 = (
        readings.gather(-1, (inner + i).clamp(max=len(moments) - 1)[..., None])[..., 0] for i in (-1, 0, 1)
    )
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    peak = x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)
    age = torch.where(top == 0, logs[0], peak)
    return torch.where(top == len(moments) - 1, math.inf, age)


def fallen(readings: torch.Tensor, share: float, moments: tuple[int, ...]) -> torch.Tensor:
    """When readings [..., t], once past their greatest, first are at a share of it or below, as log(1 + updates)."""
    most, top = readings.max(-1)
    early = torch.arange(len(moments)) < top[..., None]
    return first_at((-readings).masked_fill(early, -math.inf), -share * most, moments)


def _ages(readings: torch.Tensor, moments: tuple[int, ...]) -> torch.Tensor:
    """The ages [m, instruments, ...] from readings [m, instruments, ..., t], the last instruments where there are fewer than 4.

    Infinite where it has not come by the last moment, or the reading never was worth speaking of.
    """
    readings = smooth(readings)
    found = []
    for name, own in zip(INSTRUMENTS[-readings.shape[1] :], readings.unbind(1), strict=True):
        most = own.max(-1).values
        if name == "agreement":
            age = highest(own, moments)
        elif name == "recognition":
            age = first_at(own, REACHED * most, moments)
        else:
            age = fallen(own, LEFT, moments)
        found.append(age.masked_fill(most < (0 if name == "curvature" else LEAST), math.inf))
    return torch.stack(found, 1)


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

    def younger(self, name: str, instrument: str = "") -> Estimate:
        """The log of a set's age minus that of unseen real images, paired; the mean of all instruments, or one."""
        if not instrument:
            return sooner(self._over(name), self._over(UNSEEN), self.last)
        i = INSTRUMENTS.index(instrument)
        return sooner(self.ages[name][..., i], self.ages[UNSEEN][..., i], self.last)

    def apart(self, name: str, first: str, second: str) -> Estimate:
        """The log of a set's age by one instrument minus that by another."""
        a, b = (self.ages[name][..., INSTRUMENTS.index(each)] for each in (first, second))
        return sooner(a, b, self.last)

    def alike(self, name: str, first: str = "", second: str = "") -> Estimate:
        """The rank correlation over a set's points of their ages by two instruments, or the mean of the three pairs."""
        pairs = [(first, second)] if first else list(combinations(OF_POINTS, 2))
        values = torch.stack(
            [
                torch.stack([_rank_correlation(one, a, b) for a, b in pairs]).mean(0)
                for one in self.point_ages[name]
            ]
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
        """The age of each set, and of unseen real images, over all instruments."""
        return {name: self.overall(name) for name in (*self.distilled, UNSEEN)}

    def claims(self) -> tuple[Claim, ...]:
        """Younger than unseen real images over all instruments; the instruments agree on the points."""
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    "holds early training",
                    name,
                    "its training age is below that of as many unseen real images (difference of logarithms, mean of four "
                    "instruments)",
                    self.younger(name),
                    "less",
                    0.0,
                    "other unseen real images in the set's place",
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
        """Ages, their ratios to unseen images, what was not reached, how far instruments lie apart, and classes."""
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
            table(
                "Log ratio to the age of unseen real images",
                (*INSTRUMENTS, "all"),
                {
                    name: [*(self.younger(name, i) for i in INSTRUMENTS), self.younger(name)]
                    for name in names
                    if name != UNSEEN
                },
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
        """A dot a set and instrument with its interval; an arrow where it is open above."""
        names = list(self.ages)
        columns = (*INSTRUMENTS, "all")
        for i, name in enumerate(names):
            for place, instrument in enumerate(columns):
                e = self.overall(name) if instrument == "all" else self.age(name, instrument)
                y = place + 0.7 * (i / max(1, len(names) - 1) - 0.5)
                low, high = max(e.low, 0.0), min(e.high, self.last)
                ax.plot([low, high], [y, y], color=_tint(name), lw=1.2)
                marker = ">" if math.isinf(e.high) and e.n > 1 else "o"
                ax.plot(e.value, y, marker, color=_tint(name), ms=5)
            ax.plot([], [], "o", color=_tint(name), ms=5, label=name)
        ax.set_yticks(range(len(columns)), columns)
        ax.invert_yaxis()
        self._log_axis(ax)
        _legend(ax, len(names))

    def plot_points(self, ax: Axes) -> None:
        """A dot an image of each distilled set and of the unseen real ones."""
        names = [*self.distilled, UNSEEN]
        for i, name in enumerate(names):
            ages, labels = self.point_ages[name][0], self.labels[name][0]
            mean = ages.clamp(max=math.log1p(self.last)).mean((0, 1)).expm1()
            y = labels + 0.7 * (i / max(1, len(names) - 1) - 0.5)
            ax.scatter(mean, y, s=9, color=_tint(name), alpha=0.7, lw=0, label=name)
        ax.set_yticks(range(len(self.classes)), self.classes)
        ax.set_ylabel("class")
        ax.invert_yaxis()
        self._log_axis(ax)
        _legend(ax, len(names))

    def _log_axis(self, ax: Axes) -> None:
        ax.set_xscale("symlog", linthresh=8)
        ticks = [t for t in (0, 4, 8, 16, 32, 64, 128, 256, 512) if t <= self.last]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set_xlim(-0.2, self.last * 1.05)
        ax.set_xlabel("updates of real training")


@dataclass(frozen=True)
class _Readings:
    """Draws what one instrument read along training."""

    result: ClockResult
    instrument: int

    def __call__(self, ax: Axes) -> None:
        result = self.result
        for name, readings in result.readings.items():
            mean = smooth(readings[:, :, self.instrument]).mean((0, 1))
            style = "--" if name == UNSEEN else "-"
            ax.plot(result.moments, mean, color=_tint(name), ls=style, lw=1.4, label=name)
        ax.set_ylabel(
            ("kappa", "share right, above chance", "cosine", "trace of the Hessian")[self.instrument]
        )
        result._log_axis(ax)
        _legend(ax, len(result.readings))


def _rank_correlation(ages: torch.Tensor, first: str, second: str) -> torch.Tensor:
    """Spearman's correlation over points of ages [m, 3, n] by two instruments, [m]; 0 where one tells no order."""
    a, b = (_ranks(ages[:, OF_POINTS.index(each)]) for each in (first, second))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(-1) / scale.clamp(min=1e-12), 0.0)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks along the last axis; equals share the mean of theirs."""
    below = (values[..., None, :] < values[..., None]).double().sum(-1)
    equal = (values[..., None, :] == values[..., None]).double().sum(-1)
    return below + (equal - 1) / 2


def _tint(name: str) -> str:
    return colour("real" if name == UNSEEN else name)


def _legend(ax: Axes, entries: int) -> None:
    columns = min(entries, 4)
    ax.legend(frameon=False, fontsize=8, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.spines[["top", "right"]].set_visible(False)
