"""When real training begins to recognise distilled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.representativeness._beside import (
    SEEN,
    TEST,
    UNSEEN,
    answers,
    first_at,
    of_test,
    seen,
    sooner,
    unseen,
    updates,
)
from distillens.analyses.representativeness._drawing import axis_of_updates, dashes, legend_above, tint
from distillens.analyses.representativeness._trajectory import (
    EVERY,
    TRAJECTORIES,
    along,
    by_replicate,
    real_recipe,
)
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table, paired, units, weaker
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEARLY_ALL = 0.99


@dataclass(frozen=True)
class RecognitionCurve:
    """Accuracy and loss on each set through real training, beside the test split and real images of its number.

    These are random for each replicate, unseen ones of the validation split and seen ones of the training split. Those are
    recognised earlier because the networks learn them, and a set may hold them or be made from them: it is recognised early
    or well if it is so beside both. A claim's estimate is the contrast of the two that says less for it, and it
    is supported where both are (an intersection-union test, Berger 1982: no correction is due). A set is
    recognised at the moment from which the accuracy on it lies at ``level`` of the way from chance to the
    trajectories' final validation accuracy. The curve of one trajectory on a hundred images jumps: the moment is read
    from the curve that only rises and lies nearest to it (isotonic regression), so that a lucky jump is none. ``tested``
    test images are looked at, or all there are.

    Source: Yang et al. 2024, section 4.2 (one network, one run; the losses are recorded there and not shown).
    """

    question: ClassVar[str] = "When does real training recognise distilled images?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "trajectories")

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=392, batch=256)
    moments: int = 48
    trajectories: int = TRAJECTORIES
    # 0.9: at half of the way the paper's own curves of sets and test images still lie on each other.
    level: float = 0.9
    tested: int = 2000

    def __post_init__(self) -> None:
        at_least(1, "recognition_curve", steps=self.recipe.steps, trajectories=self.trajectories)
        at_least(2, "recognition_curve", moments=self.moments)
        at_least(1, "recognition_curve", tested=self.tested)
        if not 0 < self.level <= 1:
            raise UserError(
                "recognition_curve: the level is a share of the way from chance to the final accuracy",
                got=repr(self.level),
                expected="above 0, up to 1",
            )

    @classmethod
    def defaults(cls, like: Dataset) -> RecognitionCurve:
        """The real trajectories that all analyses of this question share."""
        return cls(ConvNet.defaults(like), real_recipe(like))

    @classmethod
    def as_published(cls, like: Dataset) -> RecognitionCurve:
        """The paper's protocol: one trajectory a replicate, looked at after every update on all test images.

        Where we differ: each replicate of the sets has a trajectory of its own, where the paper has one run of all. Unseen
        real images of the sets' number and the random subset stand beside, and the validation split is left out
        of the training.
        """
        return cls(ConvNet.defaults(like), real_recipe(like), moments=EVERY, trajectories=1, tested=1_000_000)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The real trajectories."""
        return [along(self.net, self.recipe, self.moments, self.trajectories, sets, real, key)]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> RecognitionCurveResult:
        """The curves.

        Raises:
            UserError: the sets do not belong to the data, or the network remembers more than its parameters.
        """
        sets.check_against(real)
        (population,) = runs.get(*self.trainings(sets, real, key=key))
        trajectories = by_replicate(population, sets)
        test = of_test(real, self.tested, key)
        shown = {name: tuple(one.dataset() for one in many) for name, many in sets.everything().items()} | {
            UNSEEN: unseen(sets, real, key),
            SEEN: seen(sets, real, key),
            TEST: (test,) * len(trajectories),
        }
        accuracy, loss = {}, {}
        for name, datasets in shown.items():
            both = [
                _curves(answers(own, data, population.moments), data)
                for own, data in zip(trajectories, datasets, strict=False)
            ]
            accuracy[name], loss[name] = map(torch.stack, zip(*both, strict=True))
        final = torch.stack([own.accuracy(real.val) for own in trajectories])
        return RecognitionCurveResult(
            tuple(sets.distilled), real.train.k, population.moments, self.level, final, accuracy, loss
        )


def _curves(answered: tuple[torch.Tensor, torch.Tensor], data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Accuracy and mean loss [m, t] from what was answered."""
    predicted, sure = answered
    return (predicted == data.labels.hard().cpu()).double().mean(-1), -sure.mean(-1)


@dataclass(frozen=True, eq=False)
class RecognitionCurveResult(Result):
    """Accuracy and loss [replicates, trajectories, moments] by name, ``final`` validation accuracy [replicates, trajectories]."""

    analysis: ClassVar[str] = "representativeness/recognition_curve"
    title: ClassVar[str] = "Recognition through real training"
    question: ClassVar[str] = RecognitionCurve.question

    distilled: tuple[str, ...]
    k: int
    moments: tuple[int, ...]
    level: float
    final: torch.Tensor
    accuracy: Mapping[str, torch.Tensor]
    loss: Mapping[str, torch.Tensor]

    @property
    def bar(self) -> float:
        """The accuracy at which a set is recognised: the same for all sets and trajectories."""
        return 1 / self.k + self.level * (float(self.final.mean()) - 1 / self.k)

    @property
    def last(self) -> int:
        """The last moment."""
        return self.moments[-1]

    @cached_property
    def rising(self) -> dict[str, torch.Tensor]:
        """The curves that only rise and lie nearest to those of the accuracy."""
        return {name: _rising(curves) for name, curves in self.accuracy.items()}

    def reached(self, name: str, accuracy: float) -> torch.Tensor:
        """When the accuracy on a set lies at so much, as log(1 + updates) [replicates, trajectories]; infinite where never."""
        return first_at(self.rising[name], accuracy, self.moments)

    def recognised(self, name: str) -> Estimate:
        """After how many updates a set is recognised; open above where it is not in each replicate."""
        return updates(self.reached(name, self.bar), self.last)

    def earlier(self, name: str, kind: str = UNSEEN) -> Estimate:
        """The log of the updates to a set's recognition minus that of the real images of a kind, paired."""
        return sooner(self.reached(name, self.bar), self.reached(kind, self.bar), self.last)

    def better(self, name: str, kind: str = UNSEEN) -> Estimate:
        """How much higher its accuracy is than that on real images of a kind, averaged over the log of the updates."""
        own, other = (_over_logs(self.accuracy[each], self.moments) for each in (name, kind))
        pairs = min(len(own), len(other))
        (first, unit), (second, _) = units(own[:pairs]), units(other[:pairs])
        return paired(first, second, unit)

    def half_way(self, name: str) -> Estimate:
        """The accuracy on a set when that on the test split is half of its way from chance to its end."""
        tests = self.rising[TEST][: len(self.accuracy[name])]
        when = first_at(tests, (tests[..., -1] + 1 / self.k) / 2, self.moments)
        values, unit = units(_at(self.accuracy[name], when, self.moments))
        return Estimate.mean(values, unit)

    def headline(self) -> dict[str, Estimate]:
        """The updates after which each set, and real images of either kind, are recognised."""
        return {name: self.recognised(name) for name in (*self.distilled, UNSEEN, SEEN)}

    def claims(self) -> tuple[Claim, ...]:
        """Recognised earlier, and better, than real images of the same number, unseen and seen."""
        null = "other unseen real images, or random training images, in the set's place"
        claims = []
        for name in self.distilled:
            claims += [
                Claim(
                    "recognised early",
                    name,
                    f"real training recognises it ({self.bar:.2f} of its images) after fewer updates than as many real "
                    "images, unseen and training ones (difference of logarithms, the weaker of the two)",
                    weaker("less", self.earlier(name), self.earlier(name, SEEN)),
                    "less",
                    0.0,
                    null,
                    "the mean training image of each class",
                    "paper T7",
                ),
                Claim(
                    "recognised better",
                    name,
                    "through real training it is recognised better than as many real images, unseen and training ones (mean "
                    "over the logarithm of the updates, the weaker of the two)",
                    weaker("greater", self.better(name), self.better(name, SEEN)),
                    "greater",
                    0.0,
                    null,
                    "the mean training image of each class",
                    "paper T7",
                ),
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """For each set its moment, what is recognised when test images half are and at the end, and when nearly all is."""
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in self.accuracy:
            end, unit = units(self.accuracy[name][..., -1])
            compared = () if name in (UNSEEN, SEEN, TEST) else (UNSEEN, SEEN)
            rows.append(
                (
                    name,
                    self._moment(name, self.bar),
                    *([self.earlier(name, kind) for kind in compared] or ("", "")),
                    *([self.better(name, kind) for kind in compared] or ("", "")),
                    self.half_way(name),
                    Estimate.mean(end, unit),
                    self._moment(name, NEARLY_ALL),
                    Estimate.mean(*self._end(self.loss[name])),
                )
            )
        columns = (
            "images",
            "recognised after updates",
            "log ratio to unseen",
            "log ratio to seen",
            "accuracy above unseen",
            "accuracy above seen",
            "accuracy when test is half-way",
            "accuracy at the end",
            f"{NEARLY_ALL:g} after updates",
            "loss at the end",
        )
        return (Table(f"Recognised: an accuracy of {self.bar:.3f}", columns, tuple(rows)),)

    def _end(self, curves: torch.Tensor) -> tuple[list[float], str]:
        return units(curves[..., -1])

    def _moment(self, name: str, accuracy: float) -> str | Estimate:
        logs = self.reached(name, accuracy)
        missed = int(logs.isinf().sum())
        return f"not reached in {missed} of {logs.numel()}" if missed else updates(logs, self.last)

    def notes(self) -> tuple[str, ...]:
        """How the moment is read, and what was not reached."""
        notes = [
            f"Recognised: {self.level:.0%} of the way from chance to the trajectories' final validation accuracy, read from "
            "the rising curve nearest to each trajectory's. Loss: that of the likeliest class of a label.",
            f"{SEEN!r}: random training images, as many as a set's, which the trajectories learn; so they do the random subset's. "
            "A claim must hold beside these and beside unseen ones.",
        ]
        late = [n for n in (*self.distilled, UNSEEN, SEEN) if bool(self.reached(n, self.bar).isinf().any())]
        if late:
            notes.append(
                f"Not recognised within {self.last} updates in every replicate: {', '.join(late)}. There the last moment "
                "counts, so the claim is about what happens up to it."
            )
        if len(self.final) == 1:
            notes.append("One replicate: the interval covers real training only.")
        return tuple(notes)

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Accuracy and loss."""
        return {self.title: self.plot, "Loss through real training": self.plot_loss}

    def plot(self, ax: Axes) -> None:
        """The accuracy on each set against the updates; a dot where it is recognised."""
        self._draw(ax, self.accuracy)
        ax.axhline(self.bar, color="grey", lw=1, ls=":")
        for name in (*self.distilled, UNSEEN, SEEN):
            moment = self.recognised(name)
            if math.isfinite(moment.high) or moment.n == 1:
                ax.plot(moment.value, self.bar, "o", color=tint(name), ms=6, mec="white", zorder=5)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("accuracy (dotted: recognised)")

    def plot_loss(self, ax: Axes) -> None:
        """The loss on each set against the updates."""
        self._draw(ax, self.loss)
        ax.set_yscale("log")
        ax.set_ylabel("loss")

    def _draw(self, ax: Axes, curves: Mapping[str, torch.Tensor]) -> None:
        for name, values in curves.items():
            mean, width = values.mean((0, 1)), 2 if name == TEST else 1.4
            ax.plot(self.moments, mean, dashes(name), color=tint(name), lw=width, label=name)
        axis_of_updates(ax, self.last)
        legend_above(ax, len(curves))


def _rising(curves: torch.Tensor) -> torch.Tensor:
    """The curves [..., t] that only rise and lie nearest to these."""
    from scipy.optimize import isotonic_regression

    flat = curves.double().reshape(-1, curves.shape[-1])
    return torch.stack([torch.from_numpy(isotonic_regression(one.numpy()).x) for one in flat]).view(
        curves.shape
    )


def _over_logs(curves: torch.Tensor, moments: tuple[int, ...]) -> torch.Tensor:
    """The mean of curves [..., t] over log(1 + updates)."""
    logs = torch.tensor(moments, dtype=torch.float64).log1p()
    return torch.trapezoid(curves.double(), logs) / (logs[-1] - logs[0])


def _at(curves: torch.Tensor, when: torch.Tensor, moments: tuple[int, ...]) -> torch.Tensor:
    """Curves [..., t] at the log moments ``when`` [...], between two moments in proportion along the logarithm."""
    logs = torch.tensor(moments, dtype=torch.float64).log1p()
    after = torch.searchsorted(logs, when.clamp(max=float(logs[-1]))).clamp(1, len(logs) - 1)
    low, high = (curves.double().gather(-1, i[..., None])[..., 0] for i in (after - 1, after))
    return low + (high - low) * (when.clamp(max=float(logs[-1])) - logs[after - 1]) / (
        logs[after] - logs[after - 1]
    )
