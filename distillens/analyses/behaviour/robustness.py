"""Accuracy of networks trained on the set when test images are corrupted or attacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.analyses.behaviour._trained import (
    asked,
    by_replicate,
    difference,
    judged,
    single,
)
from distillens.attacks import Logits, fgsm, pgd
from distillens.core.checks import UserError, at_least, one_of, positive
from distillens.core.contracts import FULL, RANDOM, Net, Sets, logits_of_many
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.result import Claim, Estimate, Result, Table, units
from distillens.core.rng import Key
from distillens.core.space import Space
from distillens.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from distillens.evaluation.protocol import SCALES, WDDL, Protocol
from distillens.evaluation.trials import Judged
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import TOGETHER, Population, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARGIN = 0.01


@dataclass(frozen=True)
class Robustness:
    """What is left of the test accuracy under common corruptions and under FGSM and PGD, by the set trained on.

    The networks are those of behaviour/accuracy, on every set, baseline and the full data. All corruptions are done in pixel
    space, cut to [0, 1] and brought back; all networks see the same corrupted images. ``eps`` are the half sides of
    the attacks' boxes, in pixel units; PGD takes ``steps`` steps from a random start. ``attacked`` test images are attacked,
    or all there are: the same for all networks.

    Source: corruptions of Hendrycks & Dietterich 2019 (``distillens.corruptions``), attacks of Goodfellow et al. 2015 and Madry
    et al. 2018 with the boxes of DD-RobustBench (2/255) and of adversarial training (8/255). The paper has no such experiment.
    """

    question: ClassVar[str] = "Are networks that were trained on the set more fragile than others?"
    scales: ClassVar[tuple[str, ...]] = (*SCALES, "attacked")

    protocol: Protocol = WDDL
    net: Net = field(default_factory=ConvNet)
    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    severities: tuple[int, ...] = SEVERITIES
    eps: tuple[float, ...] = (2 / 255, 8 / 255)
    steps: int = 10
    attacked: int = 1000

    def __post_init__(self) -> None:
        for name in self.corruptions:
            one_of("corruption", name, CORRUPTIONS)
        if not (self.corruptions and self.severities and self.eps):
            raise UserError(
                "robustness needs a corruption, a severity and an eps",
                got=f"{len(self.corruptions)}, {len(self.severities)} and {len(self.eps)}",
            )
        if not set(self.severities) <= set(SEVERITIES):
            raise UserError(
                "robustness: a severity is one of five", got=repr(self.severities), expected="1 to 5"
            )
        for eps in self.eps:
            positive("robustness", eps=eps)
        at_least(1, "robustness", steps=self.steps, attacked=self.attacked)

    @classmethod
    def defaults(cls, like: Dataset) -> Robustness:
        """The paper's protocol with the field's network; 200 images attacked where they are small."""
        small = like.shape[1] * like.shape[2] <= 256
        return cls(net=ConvNet.defaults(like), attacked=200 if small else 1000)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """Those of behaviour/accuracy on sets, baselines and full data."""
        return asked(self.protocol, self.net, sets, real, key)

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> RobustnessResult:
        """Accuracies clean, corrupted and attacked."""
        sets.check_against(real)
        found = judged(self.protocol, self.net, sets, real, runs, key)
        models = _together([one for many in found.values() for one in many])
        labels = real.test.labels.hard()
        clean = _hits(models, real.test)
        corrupted = torch.stack(
            [
                torch.stack([self._right(models, real.test, name, level, key) for level in self.severities])
                for name in self.corruptions
            ]
        )  # [corruptions, severities, models]
        chosen = key.fold("attacked").permutation(len(labels))[: self.attacked].sort().values
        victims = real.test.take(chosen.to(labels.device))
        start = key.fold("pgd").uniform(len(victims), *victims.shape, low=-1.0)
        attacked = torch.stack(
            [_hits_under(models, victims, eps, steps, start) for eps, steps in self._attacks().values()]
        )  # [attacks, models, n]
        replicates = max(map(len, sets.everything().values()))

        def by_set(values: torch.Tensor) -> dict[str, torch.Tensor]:
            """Values [models, ...] as [replicates, networks, ...] by set."""
            each = iter(torch.split(values.cpu(), [len(one.flat) for many in found.values() for one in many]))
            return {
                name: by_replicate(name, [next(each) for _ in many], replicates)
                for name, many in found.items()
            }

        return RobustnessResult(
            self.protocol.name,
            type(self.net).__name__,
            tuple(sets.distilled),
            tuple(sets.baselines),
            self.corruptions,
            self.severities,
            tuple(self._attacks()),
            (len(labels), len(victims)),
            sets.space.invertible,
            by_set(clean.mean(-1)),
            by_set(corrupted.movedim(-1, 0)),
            by_set(clean[:, chosen.to(clean.device)].mean(-1)),
            by_set(attacked.mean(-1).T),
        )

    def _right(self, models: Population, data: Dataset, name: str, severity: int, key: Key) -> torch.Tensor:
        """The accuracy of each network [m] under one corruption, the same images for all."""
        pixels = corrupt(data.pixels().clamp(0, 1), name, severity, key.fold("corruption", name, severity))
        shown = Dataset(data.space.from_pixels(pixels), data.labels, data.classes, data.space)
        return _hits(models, shown).mean(-1)

    def _attacks(self) -> dict[str, tuple[float, int]]:
        """Half side of the box and steps, by name; FGSM has none."""
        quick = {f"FGSM {255 * eps:.3g}/255": (eps, 0) for eps in self.eps}
        return quick | {f"PGD-{self.steps} {255 * eps:.3g}/255": (eps, self.steps) for eps in self.eps}


@dataclass(frozen=True, eq=False)
class RobustnessResult(Result):
    """Accuracies by set: ``clean`` [replicates, networks], ``corrupted`` [..., corruptions, severities].

    On the images that were attacked: ``untouched`` [replicates, networks] and ``attacked`` [..., attacks]. ``images`` are test
    images in all and attacked ones.
    """

    analysis: ClassVar[str] = "behaviour/robustness"
    title: ClassVar[str] = "Accuracy under corruption and attack"
    question: ClassVar[str] = Robustness.question

    protocol: str
    net: str
    distilled: tuple[str, ...]
    baselines: tuple[str, ...]
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    attacks: tuple[str, ...]
    images: tuple[int, int]
    exact: bool
    clean: Mapping[str, torch.Tensor]
    corrupted: Mapping[str, torch.Tensor]
    untouched: Mapping[str, torch.Tensor]
    attacked: Mapping[str, torch.Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """Sets, baselines, the full data."""
        return (*self.distilled, *self.baselines, FULL)

    def lost_to_corruption(self) -> dict[str, torch.Tensor]:
        """1 - accuracy under corruption (mean of all) / clean accuracy, [replicates, networks] by set."""
        return {name: _lost(self.corrupted[name].mean((-1, -2)), self.clean[name]) for name in self.clean}

    def lost_to_attack(self) -> dict[str, torch.Tensor]:
        """1 - accuracy under attack (mean of all) / clean accuracy on the same images, [replicates, networks] by set."""
        return {name: _lost(self.attacked[name].mean(-1), self.untouched[name]) for name in self.attacked}

    def headline(self) -> dict[str, Estimate]:
        """The share of the clean accuracy that corruptions leave."""
        lost = self.lost_to_corruption()
        return {name: Estimate.mean(*units(1 - lost[name])) for name in self.names}

    def claims(self) -> tuple[Claim, ...]:
        """More fragile than a random subset's networks, under corruption and under attack."""
        claims = []
        for name in self.distilled:
            kinds = (
                ("fragile under corruption", "common corruptions", self.lost_to_corruption()),
                ("fragile under attack", "FGSM and PGD", self.lost_to_attack()),
            )
            for title, by_what, lost in kinds:
                more = difference(lost, name, RANDOM)
                if more is not None:
                    claims.append(
                        Claim(
                            title,
                            name,
                            f"its networks lose a larger share of their accuracy to {by_what} than those of a random "
                            "real subset of its size",
                            more,
                            "greater",
                            MARGIN,
                            "a second random real subset in the set's place",
                            "a set whose labels are told by a faint fine pattern alone",
                        )
                    )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Accuracy in all conditions, what is lost against random and full data, and each corruption."""
        columns = ("set", "clean", "corrupted", *self.attacks)
        rows: list[tuple[str | int | Estimate, ...]] = []
        losses: list[tuple[str | int | Estimate, ...]] = []
        corruption, attack = self.lost_to_corruption(), self.lost_to_attack()
        for name in self.names:
            corrupted, attacked = self.corrupted[name].mean((-1, -2)), self.attacked[name]
            shown = (self.clean[name], corrupted, *attacked.unbind(-1))
            rows.append((name, *(Estimate.mean(*units(one)) for one in shown)))
            cells: list[str | int | Estimate] = [name]
            for lost in (corruption, attack):
                cells.append(Estimate.mean(*units(lost[name])))
                for against in (RANDOM, FULL):
                    more = None if name == against else difference(lost, name, against)
                    cells.append(more or "")
            losses.append(tuple(cells))
        kinds: list[tuple[str | int | Estimate, ...]] = [
            (name, *(Estimate.mean(*units(one)) for one in self.corrupted[name].mean(-1).unbind(-1)))
            for name in self.names
        ]
        words = ("lost", "more than random", "more than full data")
        return (
            Table(f"Test accuracy, protocol {self.protocol}, {self.net}", columns, tuple(rows)),
            Table(
                "Share of the clean accuracy that is lost",
                ("set", *(f"{word} to {what}" for what in ("corruption", "attack") for word in words)),
                tuple(losses),
            ),
            Table("Accuracy by corruption, mean over severities", ("set", *self.corruptions), tuple(kinds)),
        )

    def notes(self) -> tuple[str, ...]:
        """How corrupted and attacked, and how to read a share of little."""
        levels = ", ".join(map(str, self.severities))
        notes = [
            f"{len(self.corruptions)} corruptions at severities {levels} of CIFAR-10-C on {self.images[0]:,} test "
            f"images; attacks on {self.images[1]:,} of them, white box, in pixels. What is lost is a share of the clean "
            "accuracy: networks near chance have little to lose, so read it beside the clean accuracy.",
        ]
        if not self.exact:
            notes.append(
                "The space keeps no exact pixels: corruptions and attacks change likenesses with the average "
                "brightness and contrast, cut to [0, 1]."
            )
        return (*notes, *single(self.clean, self.distilled))

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Accuracies; shares that are left."""
        return {
            "Test accuracy clean, corrupted (mean of all) and attacked": self.plot,
            "Accuracy under each corruption as a share of the clean accuracy, mean over severities": self.plot_shares,
        }

    def plot(self, ax: Axes) -> None:
        """A group a condition, a bar a set."""
        conditions = ("clean", "corrupted", *self.attacks)
        width = 0.84 / len(self.names)
        for i, name in enumerate(self.names):
            shown = (self.clean[name], self.corrupted[name].mean((-1, -2)), *self.attacked[name].unbind(-1))
            for j, values in enumerate(shown):
                e = Estimate.mean(*units(values))
                x = j + (i - (len(self.names) - 1) / 2) * width
                ax.bar(x, e.value, width * 0.9, color=colour(name), label=name if j == 0 else None)
                if e.n > 1:
                    ax.errorbar(x, e.value, [[e.value - e.low], [e.high - e.value]], color="#777777", lw=0.9)
        ax.set_xticks(range(len(conditions)), [c.replace(" ", "\n") for c in conditions])
        ax.set_ylim(0, 1)
        ax.set_ylabel("test accuracy")
        ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        ax.spines[["top", "right"]].set_visible(False)

    def plot_shares(self, ax: Axes) -> None:
        """A point a corruption and set."""
        spread = 0.6 / len(self.names)
        for i, name in enumerate(self.names):
            left = 1 - _lost(self.corrupted[name].mean(-1), self.clean[name][..., None])
            for j, values in enumerate(left.unbind(-1)):
                e = Estimate.mean(*units(values))
                x = j + (i - (len(self.names) - 1) / 2) * spread
                ax.plot(x, e.value, "o", ms=4, color=colour(name), label=name if j == 0 else None)
                if e.n > 1:
                    ax.plot([x, x], [e.low, e.high], color=colour(name), lw=1)
        ax.axhline(1, color="grey", lw=0.8, ls=":")
        ax.set_xticks(
            range(len(self.corruptions)), [c.replace("_", "\n") for c in self.corruptions], fontsize=8
        )
        ax.set_ylabel("share of the clean accuracy")
        ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        ax.spines[["top", "right"]].set_visible(False)


def _lost(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """``1 - after / before``; where nothing was right before, nothing is lost."""
    return torch.where(before > 0, 1 - after / before.clamp(min=1e-12), 0.0)


def _together(judges: list[Judged]) -> Population:
    """All networks as one population, those that count as its final ones."""
    bare = [
        replace(one.population, final=one.flat, moments=(), snapshots=one.flat[:, None][:, :0], seen={})
        for one in judges
    ]
    return Population.joined(bare)


def _hits(models: Population, data: Dataset) -> torch.Tensor:
    """Whether each network is right on each image, [m, n] as 0 and 1."""
    return (models.predictions(data) == data.labels.hard()).double()


def _hits_under(
    models: Population, data: Dataset, eps: float, steps: int, start: torch.Tensor
) -> torch.Tensor:
    """Whether each network is right on each image under an attack on itself, [m, n] as 0 and 1.

    A quarter of the networks and images at a time that are only looked at: the way back needs what the way there made.
    """
    labels, start = data.labels.hard(), start.to(models.final)
    pixels = data.pixels().clamp(0, 1).to(models.final)
    held = TOGETHER // 4 // pixels[0, 0].numel()
    together = max(1, min(len(models), held // min(len(pixels), 64)))
    batch = max(1, held // together)
    found = []
    for first in range(0, len(models), together):
        some = models.taken(torch.arange(first, min(first + together, len(models))))
        logits = _seen_in_pixels(some, data.space)
        hits = []
        for part in torch.split(torch.arange(len(pixels), device=pixels.device), batch):
            own, named = pixels[part].expand(len(some), -1, -1, -1, -1), labels[part]
            if steps:
                fooled = pgd(logits, own, named, eps, steps, start[part])
            else:
                fooled = fgsm(logits, own, named, eps)
            with torch.no_grad():
                hits.append((logits(fooled).argmax(-1) == named).double())
        found.append(torch.cat(hits, 1))
    return torch.cat(found)


def _seen_in_pixels(models: Population, space: Space) -> Logits:
    """The logits [m, n, k] of images [m, n, c, h, w] in pixels, each network's own."""
    params = models.shapes.unflatten(models.final)

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        own = space.from_pixels(pixels.flatten(0, 1)).view(pixels.shape)
        return logits_of_many(models.net, params, dict(models.buffers), own)[0]

    return logits
