"""How evenly networks trained on the set serve the classes, and whether their confidence can be believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.behaviour._trained import (
    asked,
    by_replicate,
    difference,
    judged,
    single,
)
from distillens.core.checks import at_least
from distillens.core.contracts import FULL, RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.result import Claim, Estimate, Result, Table, units
from distillens.core.rng import Key
from distillens.evaluation.protocol import SCALES, WDDL, Protocol
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDER, WORSE = 0.02, 0.01  # the smallest differences that matter: of class gaps, of calibration errors


@dataclass(frozen=True)
class Fairness:
    """Accuracy class by class, and calibration, of the networks of behaviour/accuracy on the test split.

    Classes: the gap between the best and the worst, the standard deviation over classes, the worst. Calibration: expected
    calibration error over ``bins`` equal bins of confidence, negative log-likelihood, Brier score.

    Source: Guo et al. 2017, equation 3 (15 bins), Brier 1950 (the sum over classes). The paper has no such experiment.
    """

    question: ClassVar[str] = (
        "Do networks that were trained on the set serve all classes, and know what they do not know?"
    )
    scales: ClassVar[tuple[str, ...]] = SCALES

    protocol: Protocol = WDDL
    net: Net = field(default_factory=ConvNet)
    bins: int = 15

    def __post_init__(self) -> None:
        at_least(1, "fairness", bins=self.bins)

    @classmethod
    def defaults(cls, like: Dataset) -> Fairness:
        """The paper's protocol with the field's network for such images."""
        return cls(net=ConvNet.defaults(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """Those of behaviour/accuracy on sets, baselines and full data."""
        return asked(self.protocol, self.net, sets, real, key)

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> FairnessResult:
        """Class accuracies and calibration."""
        sets.check_against(real)
        found = judged(self.protocol, self.net, sets, real, runs, key)
        labels = real.test.labels.hard()
        shown = [c for c, members in enumerate(real.test.by_class) if len(members)]
        replicates = max(map(len, sets.everything().values()))
        logits = {name: [one.logits(real.test).double() for one in many] for name, many in found.items()}

        def each(measure: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
            return {
                name: by_replicate(name, [measure(one).cpu() for one in many], replicates)
                for name, many in logits.items()
            }

        return FairnessResult(
            self.protocol.name,
            type(self.net).__name__,
            tuple(sets.distilled),
            tuple(sets.baselines),
            tuple(real.test.classes[c] for c in shown),
            len(labels),
            tuple(
                name for name, many in sets.everything().items() if many[0].dataset().labels.kind == "targets"
            ),
            each(lambda one: class_accuracy(one, labels)[:, shown]),
            each(lambda one: reliability(one, labels, self.bins)),
            each(lambda one: likelihood(one, labels)),
            each(lambda one: brier(one, labels)),
        )


@dataclass(frozen=True, eq=False)
class FairnessResult(Result):
    """By set: accuracy [replicates, networks, classes], reliability [..., bins, 3], log-likelihood, Brier score [...].

    Reliability holds for each bin of confidence the share of images in it and, summed over them and divided by all
    images, confidence and accuracy.
    """

    analysis: ClassVar[str] = "behaviour/fairness"
    title: ClassVar[str] = "Class gaps and calibration"
    question: ClassVar[str] = Fairness.question

    protocol: str
    net: str
    distilled: tuple[str, ...]
    baselines: tuple[str, ...]
    classes: tuple[str, ...]
    images: int
    regressed: tuple[str, ...]
    by_class: Mapping[str, torch.Tensor]
    reliability: Mapping[str, torch.Tensor]
    likelihood: Mapping[str, torch.Tensor]
    brier: Mapping[str, torch.Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """Sets, baselines, the full data."""
        return (*self.distilled, *self.baselines, FULL)

    def gap(self) -> dict[str, torch.Tensor]:
        """The best class's accuracy minus the worst's, [replicates, networks] by set."""
        return {name: values.amax(-1) - values.amin(-1) for name, values in self.by_class.items()}

    def calibration_error(self) -> dict[str, torch.Tensor]:
        """The expected calibration error, [replicates, networks] by set."""
        return {name: expected_error(bins) for name, bins in self.reliability.items()}

    def headline(self) -> dict[str, Estimate]:
        """The expected calibration error."""
        return {name: Estimate.mean(*units(self.calibration_error()[name])) for name in self.names}

    def claims(self) -> tuple[Claim, ...]:
        """A wider class gap than a random subset's networks; worse calibrated than they."""
        claims = []
        for name in self.distilled:
            wider = difference(self.gap(), name, RANDOM)
            worse = difference(self.calibration_error(), name, RANDOM)
            if wider is None or worse is None:
                continue
            claims += [
                Claim(
                    "wider class gap than random",
                    name,
                    "the accuracies of its networks' best and worst classes lie further apart than after training on a "
                    "random real subset of its size",
                    wider,
                    "greater",
                    WIDER,
                    "a second random real subset in the set's place",
                    "a real subset of which one class carries another's label",
                ),
                Claim(
                    "worse calibrated than random",
                    name,
                    "the confidence of its networks lies further from their accuracy (expected calibration error) than "
                    "after training on a random real subset of its size",
                    worse,
                    "greater",
                    WORSE,
                    "a second random real subset in the set's place",
                    "a real subset whose labels are smoothed almost flat",
                ),
            ]
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Classes, calibration, and each class."""
        gap, error = self.gap(), self.calibration_error()
        classes: list[tuple[str | int | Estimate, ...]] = []
        confidence: list[tuple[str | int | Estimate, ...]] = []
        for name in self.names:
            own = self.by_class[name]
            classes.append(
                (
                    name,
                    Estimate.mean(*units(own.mean(-1))),
                    Estimate.mean(*units(own.amin(-1))),
                    Estimate.mean(*units(own.std(-1))),
                    Estimate.mean(*units(gap[name])),
                    *_against(gap, name),
                )
            )
            measured = (error[name], self.likelihood[name], self.brier[name])
            confidence.append(
                (name, *(Estimate.mean(*units(one)) for one in measured), *_against(error, name))
            )
        each: list[tuple[str | int | Estimate, ...]] = [
            (name, *(Estimate.mean(*units(one)) for one in self.by_class[name].unbind(-1)))
            for name in self.names
        ]
        more = ("more than random", "more than full data")
        trained = f"protocol {self.protocol}, {self.net}"
        return (
            Table(
                f"Test accuracy over classes, {trained}",
                ("set", "mean", "worst class", "spread over classes", "best minus worst", *more),
                tuple(classes),
            ),
            Table(
                f"Calibration, {trained}",
                ("set", "calibration error", "negative log-likelihood", "Brier score", *more),
                tuple(confidence),
            ),
            Table("Test accuracy of each class", ("set", *self.classes), tuple(each)),
        )

    def notes(self) -> tuple[str, ...]:
        """What is biased, and what confidence is."""
        notes = [
            f"Best minus worst class and calibration error grow with the noise of a small test split ({self.images:,} "
            "images): neither is read but as a paired difference at the same split.",
        ]
        if self.regressed:
            notes.append(
                f"{', '.join(self.regressed)}: labels are regression targets, so their networks' outputs were never "
                "trained to be read as probabilities; calibration says how far they are from it."
            )
        return (*notes, *single(self.by_class, self.distilled))

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Reliability; classes."""
        return {
            "Reliability: accuracy against confidence (bins that hold a hundredth of the images or more)": self.plot,
            "Test accuracy of each class, mean over replicates": self.plot_classes,
        }

    def plot(self, ax: Axes) -> None:
        """Accuracy against confidence, bin by bin; on the diagonal confidence can be believed."""
        ax.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
        for name in self.names:
            share, confidence, hits = self.reliability[name].mean((0, 1)).unbind(-1)
            held = share >= 0.01
            x, y = (confidence[held] / share[held]).tolist(), (hits[held] / share[held]).tolist()
            error = float(self.calibration_error()[name].mean())
            ax.plot(x, y, marker="o", ms=4, lw=1.4, color=colour(name), label=f"{name} (error {error:.3f})")
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_xlabel("confidence")
        ax.set_ylabel("accuracy")
        ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        ax.spines[["top", "right"]].set_visible(False)

    def plot_classes(self, ax: Axes) -> None:
        """A point a class and set, the line of each set from its worst to its best class."""
        spread = 0.6 / len(self.names)
        for i, name in enumerate(self.names):
            values = self.by_class[name].mean((0, 1))
            x = [j + (i - (len(self.names) - 1) / 2) * spread for j in range(len(self.classes))]
            ax.plot(x, values.tolist(), "o", ms=4, color=colour(name), label=name)
        many = len(self.classes) > 20
        ax.set_xticks(
            range(len(self.classes)), self.classes, rotation=90 if many else 0, fontsize=6 if many else 9
        )
        ax.set_xlabel("class")
        ax.set_ylabel("test accuracy")
        ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        ax.spines[["top", "right"]].set_visible(False)


def class_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of each class's images [n] that networks get right, [m, k] of logits [m, n, k]."""
    named = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits)
    hits = (logits.argmax(-1) == labels).to(logits)
    return hits @ named / named.sum(0).clamp(min=1)


def reliability(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> torch.Tensor:
    """Share of images, summed confidence and summed hits over n in each bin of confidence, [m, bins, 3].

    Bin b of ``bins`` is (b / bins, (b + 1) / bins]; confidence is the largest probability.
    """
    confidence, said = logits.softmax(-1).max(-1)
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    held = torch.nn.functional.one_hot(place, bins).to(logits)  # [m, n, bins]
    what = torch.stack([torch.ones_like(confidence), confidence, (said == labels).to(logits)], -1)
    return held.mT @ what / len(labels)


def expected_error(bins: torch.Tensor) -> torch.Tensor:
    """The expected calibration error [...] of a reliability [..., bins, 3]: |accuracy - confidence|, weighed by images."""
    return (bins[..., 2] - bins[..., 1]).abs().sum(-1)


def likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood in nats, [m]."""
    return -logits.log_softmax(-1).gather(-1, labels.expand(len(logits), -1)[..., None]).mean((1, 2))


def brier(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over images of the squared distance of probabilities to the one-hot label, summed over classes, [m]."""
    named = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits)
    return (logits.softmax(-1) - named).square().sum(-1).mean(-1)


def _against(values: Mapping[str, torch.Tensor], name: str) -> tuple[Estimate | str, Estimate | str]:
    """A set's value minus that of random and of full data, where it is another."""
    random, full = (None if name == one else difference(values, name, one) for one in (RANDOM, FULL))
    return random or "", full or ""
