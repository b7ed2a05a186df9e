"""Accuracy of a set when one thing about the training is changed at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from distillens.analyses.behaviour._lengths import after, check_schedule, lengths
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, one_of, positive, unknown
from distillens.core.config import override
from distillens.core.contracts import FULL, RANDOM, Net, Sets
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

SMOOTHING = 0.1  # how much of each label is spread over all classes (Szegedy et al. 2016)
LABELS = ("hard", "smoothed")
FULL_BATCH = 256  # full batches of a whole dataset are nobody's practice

_RECIPE = tuple(each.name for each in fields(Recipe))
_TIMES = re.compile(r"x(\d+(?:\.\d+)?)(?:/(\d+))?")
_PLUS = re.compile(r"[+-]\d+")

FIELD = (
    ("optimiser", "adam lr=0.001"),
    ("lr", "x0.1"),
    ("lr", "x0.3"),
    ("lr", "x3"),
    ("lr", "x10"),
    ("batch", "x1/2"),
    ("batch", "x1/8"),
    ("steps", "x1/3"),
    ("steps", "x3"),
    ("augment", "color_crop_cutout_flip_scale_rotate"),
    ("labels", "hard"),
    ("labels", "smoothed"),
    ("width", "x1/2"),
    ("width", "x2"),
    ("depth", "-1"),
    ("depth", "+1"),
)
# Digits have no mirror images. One level a factor where two would take minutes, the cheaper of the two.
SMALL = (
    ("optimiser", "adam lr=0.001"),
    ("lr", "x0.1"),
    ("lr", "x10"),
    ("batch", "x1/4"),
    ("steps", "x1/3"),
    ("steps", "x1.5"),
    ("augment", "color_crop_cutout_scale_rotate"),
    ("labels", "hard"),
    ("labels", "smoothed"),
    ("width", "x1/2"),
    ("depth", "-1"),
)

Levels = tuple[tuple[str, str], ...]
Cell = tuple[Training, int | None]  # a training, and the moment of it to look at (None: its end)
BASE = ("base", "")


@dataclass(frozen=True)
class Sensitivity:
    """Test accuracy at a base and where one factor of it is changed at a time; every set under the same settings.

    The base is ``recipe`` with ``net`` and the set's own labels. ``levels`` are pairs (factor, level). A factor is a field
    of the recipe or of the network, or ``labels``. A level is what the field becomes: a value, ``x0.1`` or ``x1/3`` times the
    base's number, ``+1`` or ``-1`` beside it; behind a space other fields of the recipe that go with it (``adam lr=0.001``). A
    batch is relative to the whole set. Labels are ``hard`` (the likeliest class, where the set has softer ones) or
    ``smoothed`` (a tenth spread over all classes): labels that every set can have. ``factors`` keeps some factors only.

    The full training data go through the same settings in batches of 256, with ``full`` networks. A network that has no
    such field, or an image that is too small for a level, leaves the level out; the report says so.

    *Narrow*: the gain over the random subset at the base minus the mean gain over it in all other settings, each level
    of equal weight. Below ``smallest_effect`` it does not matter.

    Source: ours. The paper trains at the base only, the home setting of one of its four methods (``reference``: 300
    full-batch steps of SGD 0.01, momentum 0.9). A learned step size is not used: all sets are seen at the same rates.
    """

    question: ClassVar[str] = "How narrow is the setting in which the distilled set works?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "full")

    levels: Levels = FIELD
    factors: tuple[str, ...] = ()
    recipe: Recipe = Recipe(steps=300)
    net: Net = field(default_factory=ConvNet)
    nets: int = 1
    full: int = 2
    smallest_effect: float = 0.01

    def __post_init__(self) -> None:
        at_least(1, "sensitivity", nets=self.nets, full=self.full)
        positive("sensitivity", smallest_effect=self.smallest_effect)
        known = (*_RECIPE, *(each.name for each in fields(self.net)), "width", "depth", "labels")  # type: ignore[arg-type]  # every network is a dataclass
        for factor, level in self.levels:
            if factor not in known:
                raise unknown("factor", factor, known)
            if factor == "labels":
                one_of("kind of label", level, LABELS)
            elif factor in _RECIPE:
                self._recipe(factor, level, self.recipe, 100)  # a level that cannot be read is refused now
        if len(set(self.levels)) < len(self.levels) or not self.levels:
            raise UserError("sensitivity: levels must hold a level and none twice", got=repr(self.levels))
        for name in self.factors:
            if name not in dict(self.levels):
                raise unknown("factor", name, dict(self.levels))
        check_schedule("sensitivity", self.recipe, self._counts(self.recipe))

    @classmethod
    def defaults(cls, like: Dataset) -> Sensitivity:
        """Both sides of the base for each factor; on digits' scale fewer levels and no mirror images."""
        small = like.shape[1] * like.shape[2] <= 256
        return cls(SMALL if small else FIELD, net=ConvNet.defaults(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One training a setting, set and replicate, and the full data's; several counts of steps are moments of one."""
        grid = self._grid(sets, real, key)
        return [training for many in grid.values() for cells in many for training, _ in cells.values()]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> SensitivityResult:
        """Accuracy of every set in every setting."""
        sets.check_against(real)
        grid = self._grid(sets, real, key)
        runs.make([training for many in grid.values() for cells in many for training, _ in cells.values()])
        there = {each for many in grid.values() for cells in many for each in cells}
        settings = tuple(each for each in (BASE, *self._asked) if each in there)
        values = {}
        for name, replicates in grid.items():
            rows = []
            for cells in replicates:
                at = {each: after(runs, *cell).accuracy(real.test) for each, cell in cells.items()}
                unchanged = torch.full_like(at[BASE], math.nan)
                rows.append(torch.stack([at.get(each, unchanged) for each in settings], 1))
            values[name] = torch.stack(rows)
        return SensitivityResult(
            tuple(name for name in sets.distilled if name in values),
            settings,
            values,
            self.smallest_effect,
            f"{self.recipe.steps} steps of {self.recipe.optimiser} at a rate of {self.recipe.lr:g}, "
            f"{type(self.net).__name__}",
            tuple(name for name in sets.distilled if name not in values),
            tuple(each for each in self._asked if self._net(*each, real.train) is None),
        )

    @property
    def _asked(self) -> Levels:
        return tuple(each for each in self.levels if not self.factors or each[0] in self.factors)

    def _grid(self, sets: Sets, real: Splits, key: Key) -> dict[str, list[dict[tuple[str, str], Cell]]]:
        """For each set and replicate the training of each setting, and the moment of it to look at."""
        named = {name: many for name, many in sets.distilled.items() if _varies(many[0])}
        if sets.random:
            named[RANDOM] = sets.random
        grid = {
            name: [
                self._cells(one.dataset(), networks(key, r, self.nets), self.recipe)
                for r, one in enumerate(many)
            ]
            for name, many in named.items()
        }
        batched = self.recipe.but(batch=min(self.recipe.batch or FULL_BATCH, len(real.train)))
        keys = tuple(networks(key, r, 1)[0] for r in range(self.full))
        grid[FULL] = [self._cells(real.train, (one,), batched) for one in keys]
        return grid

    def _cells(self, data: Dataset, keys: tuple[Key, ...], base: Recipe) -> dict[tuple[str, str], Cell]:
        steps = lengths(Training(data, self.net, base, keys), self._counts(base))
        cells: dict[tuple[str, str], Cell] = {BASE: steps[base.steps]}
        for factor, level in self._asked:
            if factor == "steps":
                cells[factor, level] = steps[self._recipe(factor, level, base, len(data)).steps]
            elif factor == "labels":
                labels = relabelled(data.labels, level, data.k)
                if labels is not None:
                    changed = Dataset(data.images, labels, data.classes, data.space)
                    cells[factor, level] = Training(changed, self.net, base, keys), None
            elif factor in _RECIPE:
                cells[factor, level] = (
                    Training(data, self.net, self._recipe(factor, level, base, len(data)), keys),
                    None,
                )
            else:
                net = self._net(factor, level, data)
                if net is not None:
                    cells[factor, level] = Training(data, net, base, keys), None
        return cells

    def _counts(self, base: Recipe) -> tuple[int, ...]:
        """The base's count of steps and its levels'."""
        others = (
            self._recipe(factor, level, base, 1).steps for factor, level in self._asked if factor == "steps"
        )
        return tuple(sorted({base.steps, *others}))

    def _recipe(self, factor: str, level: str, base: Recipe, images: int) -> Recipe:
        """The base with a level in it, for a set of so many images."""
        value, *others = level.split() or [""]
        present = min(base.batch or images, images) if factor == "batch" else getattr(base, factor)
        return override(base, [f"{factor}={_changed(factor, present, value)}", *others])

    def _net(self, factor: str, level: str, like: Dataset) -> Net | None:
        """The network with a level in it, itself for other factors; None where it has no such field or cannot go there."""
        if factor in _RECIPE or factor == "labels":
            return self.net
        if not hasattr(self.net, factor):
            return None
        value = _changed(factor, getattr(self.net, factor), level)
        try:
            net = override(self.net, [f"{factor}={value}"])
            net.init(like, Key(0))
        except UserError:
            if value == level:  # named outright, not counted from the base
                raise
            return None
        return net


def _changed(factor: str, present: Any, level: str) -> str:
    """The value that a level stands for, as text, where the base has the value ``present``."""
    times, plus = _TIMES.fullmatch(level), _PLUS.fullmatch(level)
    if not times and not plus:
        return level
    if not isinstance(present, int | float):
        raise UserError(
            f"sensitivity: {factor} has no number to start from",
            got=f"{present!r} at the base, level {level!r}",
        )
    if plus:
        return str(present + int(level))
    assert times is not None
    scaled = float(Fraction(times[1]) / int(times[2] or 1) * Fraction(present))
    return str(max(1, round(scaled)) if isinstance(present, int) else scaled)


def relabelled(labels: Labels, level: str, k: int) -> Labels | None:
    """The labels made hard or smoothed; None where that leaves them as they are.

    Smoothing takes a tenth of each label and spreads it over all classes; a regression target's goes to its mean.
    """
    if level == "hard":
        return None if labels.kind == "hard" else Hard(labels.hard())
    if labels.kind == "hard":
        values = F.one_hot(labels.hard(), k).float()
    else:
        (values,) = labels.tensors().values()
    if labels.kind == "targets":
        return Targets((1 - SMOOTHING) * values + SMOOTHING * values.mean(-1, keepdim=True))
    soft = values.softmax(-1) if labels.kind == "logits" else values
    return Probabilities((1 - SMOOTHING) * soft + SMOOTHING / k)


def _varies(distilled: DistilledDataset) -> bool:
    """Whether a set can be trained on in other ways than its own."""
    return distilled.order is None and distilled.labels.kind != "teacher"


@dataclass(frozen=True, eq=False)
class SensitivityResult(Result):
    """Test accuracy [replicates, networks, settings] by set, of the full data [networks, 1, settings] beside them.

    The first setting is the base. NaN: the setting leaves that set as it is (hard labels made hard).
    """

    analysis: ClassVar[str] = "behaviour/sensitivity"
    title: ClassVar[str] = "Other ways of training"
    question: ClassVar[str] = Sensitivity.question

    distilled: tuple[str, ...]
    settings: Levels
    values: Mapping[str, torch.Tensor]
    smallest_effect: float
    base: str = ""
    bound: tuple[str, ...] = ()
    unfit: Levels = ()

    @property
    def factors(self) -> tuple[str, ...]:
        """The factors, in their order."""
        return tuple(dict.fromkeys(factor for factor, _ in self.settings[1:]))

    def accuracy(self, name: str, setting: int) -> Estimate | None:
        """Accuracy in one setting; None where it leaves the set as it is."""
        return self._mean(name, self.values[name][..., setting])

    def change(self, name: str, setting: int) -> Estimate | None:
        """Accuracy in one setting minus accuracy at the base, paired."""
        return self._mean(name, self.values[name][..., setting] - self.values[name][..., 0])

    def span(self, name: str, factor: str) -> Estimate | None:
        """The highest accuracy minus the lowest over the levels of a factor and the base, within a replicate."""
        values = self.values[name].mean(1, keepdim=True) if len(self.values[name]) > 1 else self.values[name]
        levels = values[..., [0, *self._of(factor)]]
        levels = torch.where(
            levels.isnan(), levels[..., :1], levels
        )  # a level that changes nothing is the base
        return self._mean(name, levels.amax(-1) - levels.amin(-1))

    def gains(self, name: str) -> torch.Tensor:
        """Accuracy minus the random subset's [pairs, networks, settings], in the same setting and from the same networks."""
        own, theirs = self.values[name], self.values[RANDOM]
        theirs = torch.where(theirs.isnan(), theirs[..., :1], theirs)
        pairs = min(len(own), len(theirs))
        return own[:pairs] - theirs[:pairs]

    def gain(self, name: str, setting: int) -> Estimate | None:
        """The mean gain over the random subset in one setting."""
        return self._mean(name, self.gains(name)[..., setting])

    def lost(self, name: str, factor: str = "") -> Estimate | None:
        """The gain over random at the base minus the mean gain in the settings of a factor (of all: how narrow it is).

        None without a random subset, or where no such setting changes the set.
        """
        if RANDOM not in self.values:
            return None
        gains = self.gains(name)
        others = self._of(factor) if factor else list(range(1, len(self.settings)))
        return self._mean(name, gains[..., 0] - gains[..., others].nanmean(-1))

    def _of(self, factor: str) -> list[int]:
        return [i for i, (one, _) in enumerate(self.settings) if i and one == factor]

    def _mean(self, name: str, values: torch.Tensor) -> Estimate | None:
        if bool(values.isnan().any()):
            return None
        if name == FULL:
            return Estimate.mean(values[:, 0].tolist(), "network")
        return Estimate.mean(*units(values))

    def headline(self) -> dict[str, Estimate]:
        """How narrow each set is; its accuracy at the base where there is no random subset beside it."""
        found = {name: self.lost(name) or self.accuracy(name, 0) for name in self.distilled}
        return {name: estimate for name, estimate in found.items() if estimate is not None}

    def claims(self) -> tuple[Claim, ...]:
        """The setting in which the set works is narrow."""
        found = {name: self.lost(name) for name in self.distilled}
        return tuple(
            Claim(
                "narrow setting",
                name,
                "gains less over a random subset, on average, when one thing about the training is changed",
                estimate,
                "greater",
                self.smallest_effect,
                "a second random subset in the set's place",
                "a set that trains at one learning rate only",
            )
            for name, estimate in found.items()
            if estimate is not None
        )

    def tables(self) -> tuple[Table, ...]:
        """Accuracy, change and gain in each setting; what each factor takes of the gain, and how far it moves accuracy."""
        names = tuple(self.values)
        every = range(len(self.settings))

        def by_setting(
            title: str, columns: tuple[str, ...], cell: Callable[[str, int], Estimate | None], first: int
        ) -> Table:
            rows = tuple(
                (*self.settings[i], *(cell(name, i) or "as at the base" for name in columns))
                for i in every[first:]
            )
            return Table(title, ("factor", "level", *columns), rows)

        def by_factor(
            title: str, columns: tuple[str, ...], cell: Callable[[str, str], Estimate | None]
        ) -> Table:
            rows = tuple((f, *(cell(name, f) or "" for name in columns)) for f in self.factors)
            return Table(title, ("factor", *columns), rows)

        tables = [
            by_setting("Test accuracy in each setting", names, self.accuracy, 0),
            by_setting("Main effects: accuracy minus accuracy at the base", names, self.change, 1),
            by_factor("Range: highest minus lowest accuracy over a factor's levels", names, self.span),
        ]
        if RANDOM in self.values and self.distilled:
            tables.append(by_setting("Gain over the random subset", self.distilled, self.gain, 0))
            tables.append(
                by_factor("What a factor takes of the gain over the random subset", self.distilled, self.lost)
            )
        return tuple(tables)

    def notes(self) -> tuple[str, ...]:
        """The base, what takes most, what is not here, how to read a range."""
        notes = [
            f"The base: {self.base}. One thing is changed at a time; networks keep their initialisations."
        ]
        for name in self.distilled:
            lost = {factor: self.lost(name, factor) for factor in self.factors}
            known = {factor: estimate for factor, estimate in lost.items() if estimate is not None}
            if known:
                most = max(known, key=lambda one: known[one].value)
                notes.append(
                    f"Of the gain of {name} over random most is taken by {most}: {known[most].text()}."
                )
        notes.append("A range is above 0 by chance alone: read it beside the random subset's.")
        notes.append(f"The full data: {len(self.values[FULL])} networks in each setting, in batches.")
        if self.bound:
            notes.append(
                f"Not for {', '.join(self.bound)}: ordered steps or a teacher's views are the training themselves."
            )
        if self.unfit:
            left = ", ".join(" ".join(each) for each in self.unfit)
            notes.append(f"Left out, for the network or the images do not allow it: {left}.")
        return tuple(notes)

    def plot(self, ax: Axes) -> None:
        """Gain over the random subset in each setting; accuracy where there is none."""
        if RANDOM in self.values and self.distilled:
            self._draw(ax, self.distilled, self.gain, "gain over the random subset")
            ax.axhline(0.0, color="0.5", lw=0.8, zorder=0)
        else:
            self._accuracies(ax)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Gains, and the accuracies that they come from."""
        return {self.title: self.plot, f"{self.title}: accuracy": self._accuracies}

    def _accuracies(self, ax: Axes) -> None:
        self._draw(ax, tuple(self.values), self.accuracy, "test accuracy")

    def _draw(
        self, ax: Axes, names: tuple[str, ...], cell: Callable[[str, int], Estimate | None], label: str
    ) -> None:
        """One column a setting, lines between factors; dotted: each set at the base."""
        step = 0.7 / max(1, len(names))
        for i, name in enumerate(names):
            shift = step * (i - (len(names) - 1) / 2)
            drawn = [(x, cell(name, x)) for x in range(len(self.settings))]
            shown = [(x + shift, e) for x, e in drawn if e is not None]
            places, values = [x for x, _ in shown], [e.value for _, e in shown]
            ax.plot(places, values, "o", ms=4, color=colour(name), label=name)
            if shown[0][1].n > 1:
                ends = [[e.value - e.low for _, e in shown], [e.high - e.value for _, e in shown]]
                ax.errorbar(places, values, ends, fmt="none", ecolor=colour(name), elinewidth=1, alpha=0.5)
            ax.axhline(values[0], color=colour(name), lw=0.8, ls=":", zorder=0)
        for x in range(1, len(self.settings)):
            if self.settings[x][0] != self.settings[x - 1][0]:
                ax.axvline(x - 0.5, color="0.85", lw=0.8, zorder=0)
        ticks = [_tick(*each) for each in self.settings]
        ax.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        ax.set_xlim(-0.6, len(ticks) - 0.4)
        ax.set_ylabel(label)
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.spines[["top", "right"]].set_visible(False)


def _tick(factor: str, level: str) -> str:
    """A setting's name on an axis: a level that speaks for itself goes alone, a long one is cut."""
    value = level.split()[0] if level else ""
    if factor == "augment":
        return "augmented" if value else "no augmentation"
    return value if factor == "optimiser" else f"{factor} {value}".strip()
