"""Accuracy of networks trained from scratch on distilled data, beside what it must beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.result import Claim, Estimate, Result, Table, paired, units
from distillens.core.rng import Key
from distillens.evaluation.protocol import WDDL, Protocol
from distillens.evaluation.trials import choose, of_full, of_sets, trials
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training, networks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Accuracy:
    """The test accuracy that each set gives under one protocol.

    Beside every distilled set: a random real subset (pairs share the replicate's network keys), the set
    it started from under the same recipe, the other baselines, and the full training data in batches of 256.
    """

    question: ClassVar[str] = "How well do networks do that were trained on the distilled set alone?"
    scales: ClassVar[tuple[str, ...]] = ("protocol.recipe.steps", "protocol.moments")

    protocol: Protocol = WDDL
    net: Net = field(default_factory=ConvNet)

    @classmethod
    def defaults(cls, like: Dataset) -> Accuracy:
        """The paper's protocol with the field's network for such images."""
        return cls(net=ConvNet.defaults(like))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One training a set, replicate and candidate, and the full data's."""
        flat = [t for many in self._of_sets(sets, key).values() for each in many for t in each]
        return flat + self._full(sets, real, key)

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> AccuracyResult:
        """The accuracies, with the claims against random subset and initialisation."""
        sets.check_against(real)
        runs.make(self.trainings(sets, real, key=key))
        values, chosen = {}, {}
        for name, replicates in self._of_sets(sets, key).items():
            judged = [choose(self.protocol, runs.get(*each), real) for each in replicates]
            values[name] = torch.stack([one.accuracy(real.test) for one in judged])
            chosen[name] = tuple(one.candidate for one in judged)
        full = [
            choose(self.protocol, [population], real).accuracy(real.test)
            for population in runs.get(*self._full(sets, real, key))
        ]
        storage = {name: _storage(many[0]) for name, many in sets.everything().items()}
        return AccuracyResult(
            self.protocol.name,
            self.protocol.source,
            type(self.net).__name__,
            tuple(sets.distilled),
            tuple(sets.baselines),
            values,
            torch.stack(full)[:, 0],
            chosen,
            storage,
        )

    def _of_sets(self, sets: Sets, key: Key) -> dict[str, list[list[Training]]]:
        found = of_sets(self.protocol, self.net, sets.everything(), key)
        for name, begun in sets.initial.items():
            # The initialisation is trained with the step size that its set learned: the gain is the pixels'.
            learned = sets.distilled.get(name, begun)
            found[_initial(name)] = [
                trials(self.protocol, one, self.net, networks(key, r, self.protocol.nets), of=learned[r])
                for r, one in enumerate(begun)
            ]
        return found

    def _full(self, sets: Sets, real: Splits, key: Key) -> list[Training]:
        return of_full(self.protocol, self.net, real, max(map(len, sets.everything().values())), key)


@dataclass(frozen=True, eq=False)
class AccuracyResult(Result):
    """Test accuracies [replicates, nets] by set, and of the full data [networks]."""

    analysis: ClassVar[str] = "behaviour/accuracy"
    title: ClassVar[str] = "Accuracy after training on the set"
    question: ClassVar[str] = Accuracy.question

    protocol: str
    source: str
    net: str
    distilled: tuple[str, ...]
    baselines: tuple[str, ...]
    values: Mapping[str, torch.Tensor]
    full: torch.Tensor
    chosen: Mapping[str, tuple[str, ...]]
    storage: Mapping[str, str]

    def estimate(self, name: str) -> Estimate:
        """The accuracy of one set, over replicates (over networks where there is one replicate)."""
        values, unit = units(self.values[name])
        return Estimate.mean(values, unit)

    def contrast(self, name: str, against: str) -> Estimate | None:
        """The accuracy of one set minus another's, paired; None where the other is not there."""
        if against not in self.values:
            return None
        pairs = min(len(self.values[name]), len(self.values[against]))
        first, unit = units(self.values[name][:pairs])
        second, _ = units(self.values[against][:pairs])
        return paired(first, second, unit)

    def headline(self) -> dict[str, Estimate]:
        """Accuracy of each set and of the full data."""
        names = [*self.distilled, *self.baselines]
        shown = {name: self.estimate(name) for name in names}
        return {**shown, "full data": Estimate.mean(self.full.tolist(), "network")}

    def claims(self) -> tuple[Claim, ...]:
        """Each distilled set beats the random subset, and beats what it started from."""
        claims = []
        for name in self.distilled:
            against_random = self.contrast(name, "random_subset")
            if against_random is not None:
                claims.append(
                    Claim(
                        "beats random",
                        name,
                        "trains better networks than a random real subset of its size, under the same recipe",
                        against_random,
                        "greater",
                        0.0,
                        "a second random subset in the set's place",
                        "the same number of real images taken near their class means, in the set's place",
                        "paper T3",
                    )
                )
            against_start = self.contrast(name, _initial(name))
            if against_start is not None:
                claims.append(
                    Claim(
                        "beats its start",
                        name,
                        "trains better networks than the images it started from, same recipe and step size",
                        against_start,
                        "greater",
                        0.0,
                        "the initialisation itself in the set's place, under fresh network keys",
                        "random images as the start of a real subset",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Accuracy, gains and storage of each set."""
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in [*self.distilled, *self.baselines]:
            gain = self.contrast(name, "random_subset") if name != "random_subset" else None
            start = self.contrast(name, _initial(name))
            rows.append((name, self.estimate(name), gain or "", start or "", self.storage[name]))
        rows.append(("full data", Estimate.mean(self.full.tolist(), "network"), "", "", ""))
        tables = [
            Table(
                f"Test accuracy, protocol {self.protocol}, {self.net}",
                ("set", "accuracy", "gain over random", "gain over its start", "storage"),
                tuple(rows),
            )
        ]
        if any(any(choices) for choices in self.chosen.values()):
            picked = tuple(
                (name, "; ".join(choices)) for name, choices in self.chosen.items() if name in self.storage
            )
            tables.append(Table("Chosen on validation, replicate by replicate", ("set", "candidate"), picked))
        return tuple(tables)

    def notes(self) -> tuple[str, ...]:
        """The protocol, and what an interval covers."""
        single = [name for name in self.distilled if len(self.values[name]) == 1]
        covers = [f"{', '.join(single)}: one set, the interval covers training only."] if single else []
        return (f"Protocol {self.protocol}: {self.source}.", *covers)

    def plot(self, ax: Axes) -> None:
        """Accuracy of each set with its interval and replicates, full data as a line."""
        names = [*self.distilled, *self.baselines]
        for x, name in enumerate(names):
            values, _ = units(self.values[name])
            e = self.estimate(name)
            ax.scatter([x + 0.16] * len(values), values, s=14, color=colour(name), alpha=0.45, linewidths=0)
            if e.n > 1:
                ax.errorbar(
                    x,
                    e.value,
                    [[e.value - e.low], [e.high - e.value]],
                    fmt="o",
                    color=colour(name),
                    capsize=4,
                )
            start = self.values.get(_initial(name))
            if start is not None:
                ax.plot(x, float(start.mean()), marker="_", ms=16, color=colour(name), alpha=0.7)
        ax.axhline(float(self.full.mean()), color="black", lw=1, ls=":")
        ax.annotate(
            "full data", (len(names) - 0.5, float(self.full.mean())), ha="right", va="bottom", fontsize=9
        )
        ax.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.set_ylabel("test accuracy (bars: where the set started)")
        ax.spines[["top", "right"]].set_visible(False)


def _initial(name: str) -> str:
    return f"{name}, its start"


def _storage(distilled: DistilledDataset) -> str:
    used = distilled.storage()
    teacher = f", teacher {used.teacher_bytes:,} bytes" if used.teacher_bytes else ""
    return f"{used.floats:,} floats, {used.bits:,} bits, {used.images:,} images{teacher}"
