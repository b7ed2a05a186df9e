"""Real images added to distilled data: help or harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from distillens.analyses.behaviour._lengths import Lengths, after, check_schedule, lengths
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least, positive
from distillens.core.contracts import RANDOM, Net, Sets
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


@dataclass(frozen=True)
class Mixing:
    """Accuracy after training on a set with k real images of each class added, for several k.

    Replicate r of every set gets the same real images and the same initialisations. The real images are nested
    (those of a smaller k are among those of a larger) and none of them is in the random baseline's own set.

    Every curve is read twice, so that the amount of data and the effort are not confounded: after ``recipe.steps``, and
    after as many steps as are best on validation for that replicate, set and amount. ``efforts`` are the counts to choose
    from, as multiples of ``recipe.steps``; both readings are moments of one training. Without efforts there is only the first.

    The claims are read where as many real images a class are added as the set holds (the paper's +10 at 10), fixed
    beforehand: the lowest point of a curve would be chosen by its noise. At the largest amount a set counts as good
    as the random subset where they differ by less than ``margin``.

    Batches, where the recipe has a size for them, are never smaller than the set: without real images it is seen whole.

    Source: Yang et al. 2024, section 3, figure 3 (k = 0, 2, 10, 50, 250 of 5,000; full batches; one run a cell; draws
    that may overlap the baseline's; one count of steps).
    """

    question: ClassVar[str] = "Does adding real images to distilled data help or hurt?"
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps",)

    real_per_class: tuple[int, ...] = (0, 2, 10, 50, 250)
    recipe: Recipe = Recipe(steps=300)
    net: Net = field(default_factory=ConvNet)
    nets: int = 1
    efforts: tuple[float, ...] = (1 / 3, 1, 3)
    margin: float = 0.02

    def __post_init__(self) -> None:
        at_least(1, "mixing", nets=self.nets)
        if 0 not in self.real_per_class or len(set(self.real_per_class)) != len(self.real_per_class):
            raise UserError(
                "mixing: real_per_class must hold 0 and no number twice", got=repr(self.real_per_class)
            )
        at_least(0, "mixing", real_per_class=min(self.real_per_class))
        positive("mixing", margin=self.margin, **{f"effort {i}": each for i, each in enumerate(self.efforts)})
        check_schedule("mixing", self.recipe, self._moments)

    @classmethod
    def defaults(cls, like: Dataset) -> Mixing:
        """The paper's amounts; on digits' scale up to half of the data, in batches of 100."""
        net = ConvNet.defaults(like)
        if like.shape[1] * like.shape[2] > 256:
            return cls(_at_most(min(map(len, like.by_class))), net=net)
        return cls((0, 1, 10, 50), Recipe(steps=300, batch=100), net, efforts=(1 / 3, 1, 1.5))

    @classmethod
    def as_published(cls, like: Dataset) -> Mixing:
        """The paper's: 300 full-batch steps, one network, and those of its amounts that the data has."""
        return cls(_at_most(min(map(len, like.by_class))), net=ConvNet.defaults(like), efforts=())

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One training a set, replicate and amount."""
        rows = [row for many in self._grid(sets, real, key).values() for row in many]
        return [training for row in rows for at in row for training, _ in at.values()]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> MixingResult:
        """The curves."""
        sets.check_against(real)
        grid = self._grid(sets, real, key)
        runs.make([t for many in grid.values() for row in many for at in row for t, _ in at.values()])
        curves, tuned, chosen = {}, {}, {}
        for name, replicates in grid.items():
            read = [[self._read(at, real, runs) for at in row] for row in replicates]
            curves[name] = torch.stack([torch.stack([fixed for fixed, _, _ in row], 1) for row in read])
            if len(self._moments) > 1:
                tuned[name] = torch.stack([torch.stack([best for _, best, _ in row], 1) for row in read])
                chosen[name] = torch.tensor([[steps for _, _, steps in row] for row in read])
        shown = sets.distilled or sets.everything()
        ipc = round(next(iter(shown.values()))[0].ipc)
        added = [k for k in self.real_per_class if k]
        at = min(added, key=lambda k: (abs(k - ipc), k)) if added else 0
        return MixingResult(
            tuple(name for name in sets.distilled if name in grid),
            self.real_per_class,
            at,
            curves,
            tuned,
            chosen,
            self.recipe.steps,
            self.margin,
            tuple(name for name in sets.distilled if name not in grid),
        )

    @property
    def _moments(self) -> tuple[int, ...]:
        """The counts of steps to read at, the fixed one among them."""
        steps = self.recipe.steps
        return tuple(sorted({steps, *(max(1, round(each * steps)) for each in self.efforts)}))

    def _read(self, at: Lengths, real: Splits, runs: Runs) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Test accuracy [networks] at the fixed count and at that which is best on validation, and that count."""
        models = {steps: after(runs, training, moment) for steps, (training, moment) in at.items()}
        on_validation = {steps: float(one.accuracy(real.val).mean()) for steps, one in models.items()}
        best = max(models, key=on_validation.__getitem__)  # of equals the shortest
        return models[self.recipe.steps].accuracy(real.test), models[best].accuracy(real.test), best

    def _grid(self, sets: Sets, real: Splits, key: Key) -> dict[str, list[list[Lengths]]]:
        """For each set, replicate and amount the trainings, by their count of steps."""
        named = {name: many for name, many in sets.distilled.items() if many[0].order is None}
        if sets.random:
            named[RANDOM] = sets.random
        return {
            name: [
                [
                    self._training(one, self._mixed(one, real, sets, key, r, k), networks(key, r, self.nets))
                    for k in self.real_per_class
                ]
                for r, one in enumerate(many)
            ]
            for name, many in named.items()
        }

    def _training(self, one: DistilledDataset, data: Dataset, keys: tuple[Key, ...]) -> Lengths:
        recipe = self.recipe
        if recipe.batch is not None:
            # Never smaller than the set alone; and a batch of everything goes by the name that others know it by.
            batch = max(recipe.batch, len(one.dataset()))
            recipe = recipe.but(batch=batch if batch < len(data) else None)
        return lengths(Training(data, self.net, recipe, keys), self._moments)

    def _mixed(
        self, distilled: DistilledDataset, real: Splits, sets: Sets, key: Key, r: int, k: int
    ) -> Dataset:
        data = distilled.dataset()
        if not k:
            return data
        added = self._added(
            real.train, sets.random[r] if r < len(sets.random) else None, key.fold("added", r), k
        )
        own, theirs = _of_one_kind(data.labels, added.labels.hard(), data.k)
        ours = Dataset(data.images, own, data.classes, data.space)
        return ours.joined(Dataset(added.images, theirs, added.classes, added.space))

    def _added(self, train: Dataset, baseline: DistilledDataset | None, key: Key, k: int) -> Dataset:
        taken = set() if baseline is None else set(map(_bytes, baseline.dataset().images))
        index = []
        for c, members in enumerate(train.by_class):
            free = members[key.fold(c).permutation(len(members))].tolist()
            chosen: list[int] = []
            for i in free:
                if len(chosen) == k:
                    break
                if _bytes(train.images[i]) not in taken:
                    chosen.append(i)
            if len(chosen) < k:
                raise UserError(
                    f"mixing: class {train.classes[c]!r} has {len(chosen)} images beside the baseline's, "
                    f"{k} were asked for",
                    fix=f"set real_per_class to at most {len(chosen)}",
                )
            index += chosen
        return train.take(torch.tensor(index))


def _of_one_kind(labels: Labels, real: torch.Tensor, k: int) -> tuple[Labels, Labels]:
    """Distilled labels, and the real classes [n], as labels of one kind.

    Beside regression targets a class is centred one-hot, as kernel methods code it, as long as theirs are on average.

    Raises:
        UserError: a teacher's labels belong to views of their own images.
    """
    if labels.kind == "hard":
        return labels, Hard(real)
    if labels.kind not in ("probabilities", "logits", "targets"):
        raise UserError(f"mixing: {labels.kind} labels cannot stand beside real hard labels")
    (values,) = labels.tensors().values()
    one_hot = F.one_hot(real, k).to(values)
    if labels.kind != "targets":
        soft = values.softmax(-1) if labels.kind == "logits" else values
        return Probabilities(soft), Probabilities(one_hot)
    coded = F.one_hot(labels.hard(), k).to(values) - 1 / k
    length = (values * coded).sum() / coded.square().sum()
    return labels, Targets(length * (one_hot - 1 / k))


@dataclass(frozen=True, eq=False)
class MixingResult(Result):
    """Test accuracy [replicates, networks, amounts] by set, at the fixed count of steps and at the tuned one.

    ``chosen`` [replicates, amounts] are the tuned counts; it and ``tuned`` are empty where nothing was tuned.
    """

    analysis: ClassVar[str] = "behaviour/mixing"
    title: ClassVar[str] = "Real images mixed in"
    question: ClassVar[str] = Mixing.question

    distilled: tuple[str, ...]
    real_per_class: tuple[int, ...]
    at: int
    curves: Mapping[str, torch.Tensor]
    tuned: Mapping[str, torch.Tensor] = field(default_factory=dict)
    chosen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 300
    margin: float = 0.02
    ordered: tuple[str, ...] = ()

    @property
    def largest(self) -> int:
        """The largest amount."""
        return max(self.real_per_class)

    def accuracy(self, name: str, k: int) -> Estimate:
        """Accuracy with k real images a class added, at the fixed count of steps."""
        return Estimate.mean(*units(self._at(self.curves, name, k)))

    def change(self, name: str, k: int, since: int = 0) -> Estimate:
        """Accuracy with k real images a class minus accuracy with ``since``, paired, at the fixed count."""
        return self._change(self.curves, name, k, since)

    def tuned_change(self, name: str, k: int, since: int = 0) -> Estimate:
        """As ``change``, each of the two after its own tuned count of steps."""
        return self._change(self.tuned, name, k, since)

    def lead(self, name: str) -> Estimate | None:
        """Accuracy minus the random subset's, paired, with the largest amount added to both; None without a random one."""
        return self._lead(self.curves, name)

    def _change(self, curves: Mapping[str, torch.Tensor], name: str, k: int, since: int) -> Estimate:
        return Estimate.mean(*units(self._at(curves, name, k) - self._at(curves, name, since)))

    def _lead(self, curves: Mapping[str, torch.Tensor], name: str) -> Estimate | None:
        if RANDOM not in curves or name == RANDOM:
            return None
        own, theirs = (self._at(curves, one, self.largest) for one in (name, RANDOM))
        pairs = min(len(own), len(theirs))
        return Estimate.mean(*units(own[:pairs] - theirs[:pairs]))

    def _at(self, curves: Mapping[str, torch.Tensor], name: str, k: int) -> torch.Tensor:
        """Accuracies [replicates, networks] at one amount."""
        return curves[name][..., self.real_per_class.index(k)]

    def headline(self) -> dict[str, Estimate]:
        """The change at the amount that was fixed beforehand."""
        return {name: self.change(name, self.at) for name in self.curves}

    def claims(self) -> tuple[Claim, ...]:
        """Adding real images hurts, at a fixed and at a tuned count; more of them make it good; then all are alike."""
        claims = []
        for name in self.distilled if self.at else ():
            claims.append(
                Claim(
                    "real data hurts",
                    name,
                    "adding about as many real images as it holds lowers its accuracy",
                    self.change(name, self.at),
                    "less",
                    0.0,
                    "a random real subset in the set's place",
                    "mislabelled real images as what is added",
                    "paper T4",
                )
            )
            if self.tuned:
                claims.append(
                    Claim(
                        "real data hurts at a tuned count",
                        name,
                        "adding about as many real images as it holds lowers its accuracy, the steps chosen for each",
                        self.tuned_change(name, self.at),
                        "less",
                        0.0,
                        "a random real subset in the set's place",
                        "mislabelled real images as what is added",
                        "paper T4",
                    )
                )
            if self.largest > self.at:
                claims.append(
                    Claim(
                        "recovers",
                        name,
                        "the largest amount of real images gives more than about as many as it holds",
                        self.change(name, self.largest, self.at),
                        "greater",
                        0.0,
                        "the same set trained twice in the place of the two amounts",
                        "a random real subset in the set's place",
                    )
                )
            lead = self.lead(name)
            if lead is not None:
                claims.append(
                    Claim(
                        "converges",
                        name,
                        "with the largest amount of real images it does as well as a random subset with them",
                        lead,
                        "same",
                        self.margin,
                        "a set whose lead is as large as the margin",
                        "another random real subset in the set's place",
                        "paper T5",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """All curves, drop and recovery, and the steps that were chosen."""
        amounts = sorted(self.real_per_class)
        columns = ("set", *(f"+{k}" for k in amounts))
        readings = {f"after {self.steps} steps": self.curves}
        if self.tuned:
            readings["after the steps that are best on validation"] = self.tuned
        tables = []
        for when, curves in readings.items():
            rows: list[tuple[str | int | Estimate, ...]] = [
                (name, *(Estimate.mean(*units(self._at(curves, name, k))) for k in amounts))
                for name in curves
            ]
            tables.append(
                Table(f"Test accuracy with k real images a class added, {when}", columns, tuple(rows))
            )
        for when, curves in readings.items() if self.at else ():
            rows = [
                (
                    name,
                    self._change(curves, name, self.at, 0),
                    self._change(curves, name, self.largest, self.at),
                    self._lead(curves, name) or "",
                )
                for name in curves
            ]
            named = (
                "set",
                f"drop or gain, +{self.at} against +0",
                f"recovery, +{self.largest} against +{self.at}",
                f"lead over random at +{self.largest}",
            )
            tables.append(Table(f"Drop and recovery {when}", named, tuple(rows)))
        if self.chosen:
            place = self.real_per_class.index
            rows = [
                (
                    name,
                    *(Estimate.mean(counts[:, place(k)].tolist(), "replicate") for k in amounts),
                )
                for name, counts in self.chosen.items()
            ]
            tables.append(Table("Steps that are best on validation", columns, tuple(rows)))
        return tuple(tables)

    def notes(self) -> tuple[str, ...]:
        """Where the claims are read, what is confounded, who is not here."""
        notes = [f"The claims are read at {self.at} real images a class, fixed beforehand."]
        if not self.tuned:
            notes.append(
                "The number of steps is fixed: a larger set is further from fitted after them, so the amount of data and "
                "the effort are confounded."
            )
        if self.ordered:
            notes.append(f"Not for {', '.join(self.ordered)}: real images have no place among ordered steps.")
        return tuple(notes)

    def plot(self, ax: Axes) -> None:
        """Accuracy against the amount added, at the fixed count of steps."""
        self._draw(ax, self.curves, f"test accuracy after {self.steps} steps")

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Both readings, on one scale."""
        panels: dict[str, Callable[[Axes], None]] = {f"{self.title}: a fixed count of steps": self.plot}
        if self.tuned:
            drawn = partial(self._draw, curves=self.tuned, label="test accuracy after the best steps")
            panels[f"{self.title}: steps chosen on validation"] = drawn
        return panels

    def _draw(self, ax: Axes, curves: Mapping[str, torch.Tensor], label: str) -> None:
        amounts = sorted(self.real_per_class)
        lowest, highest = 1.0, 0.0
        for readings in (self.curves, self.tuned):
            for name in readings:
                means = [float(self._at(readings, name, k).mean()) for k in amounts]
                lowest, highest = min(lowest, *means), max(highest, *means)
        # In the order of the lines at their left end, where they are furthest apart.
        for i, name in enumerate(sorted(curves, key=lambda one: -float(self._at(curves, one, 0).mean()))):
            points = [Estimate.mean(*units(self._at(curves, name, k))) for k in amounts]
            places = [x + 0.05 * (i - (len(curves) - 1) / 2) for x in range(len(amounts))]
            values = [p.value for p in points]
            style = "--" if name == RANDOM else "-"
            ax.plot(places, values, style, marker="o", ms=4, lw=1.5, color=colour(name), label=name)
            if points[0].n > 1:
                lows = [p.value - p.low for p in points]
                ax.errorbar(places, values, lows, fmt="none", ecolor=colour(name), elinewidth=1, alpha=0.6)
        room = 0.08 * (highest - lowest) + 0.005
        ax.set_ylim(max(0.0, lowest - 2 * room), min(1.0, highest + 2 * room))
        ax.set_xticks(range(len(amounts)), [f"+{k}" for k in amounts])
        ax.set_xlabel("real images a class added")
        ax.set_ylabel(label)
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.spines[["top", "right"]].set_visible(False)


def _at_most(smallest: int) -> tuple[int, ...]:
    """The paper's amounts, as far as a class of so many images has them beside ten of the baseline's."""
    return tuple(k for k in (0, 2, 10, 50, 250) if k + 10 <= smallest or not k)


def _bytes(image: torch.Tensor) -> bytes:
    return image.contiguous().numpy(force=True).tobytes()
