"""Accuracy of networks trained from scratch on distilled data, beside what it must beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import FULL, RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.result import Claim, Estimate, Result, Table, paired, units
from distillens.core.rng import Key
from distillens.evaluation.protocol import SCALES, WDDL, Protocol
from distillens.evaluation.teaching import check_labels
from distillens.evaluation.trials import best_on_test, choose, longest, of_full, of_sets, trials
from distillens.nets.convnet import ConvNet
from distillens.paper import ORDER
from distillens.runs import Runs
from distillens.train import Training, networks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Accuracy:
    """The test accuracy that each set gives under one protocol.

    Beside every distilled set: a random real subset (pairs share the replicate's network keys), the set
    it started from under the same recipe, the other baselines, and the full training data in batches of 256, for as
    many steps as the longest training on a set. ``order`` are names of sets, best first, written down before anything
    ran: that each does better than the next becomes a claim.
    """

    question: ClassVar[str] = "How well do networks do that were trained on the distilled set alone?"
    scales: ClassVar[tuple[str, ...]] = SCALES

    protocol: Protocol = WDDL
    net: Net = field(default_factory=ConvNet)
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.order)) != len(self.order):
            raise UserError("an order names each set once", got=", ".join(self.order))

    @classmethod
    def defaults(cls, like: Dataset) -> Accuracy:
        """The paper's protocol with the field's network for such images."""
        return cls(net=ConvNet.defaults(like))

    @classmethod
    def as_published(cls, like: Dataset) -> Accuracy:
        """The paper's protocol and order of methods; its network is the field's for CIFAR-10's images."""
        return cls(WDDL, ConvNet.defaults(like), (*ORDER, RANDOM))

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """One training a set, replicate and candidate, and the full data's."""
        by_name = self._of_sets(sets, key)
        full = self._full(sets, real, key, longest(by_name))
        return [t for many in (*by_name.values(), full) for each in many for t in each]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> AccuracyResult:
        """The accuracies, with the claims against random subset and initialisation.

        Raises:
            UserError: the sets do not belong to the data, or lack the labels of the protocol's teacher.
        """
        sets.check_against(real)
        check_labels(self.protocol.teaching, self.protocol.name, sets)
        runs.make(self.trainings(sets, real, key=key))
        values, best, chosen, seen = {}, {}, {}, {}
        by_name = self._of_sets(sets, key)
        for name, replicates in by_name.items():
            populations = [runs.get(*each) for each in replicates]
            judged = [choose(self.protocol, each, real) for each in populations]
            values[name] = torch.stack([one.accuracy(real.test) for one in judged])
            chosen[name] = tuple(one.candidate for one in judged)
            shown = [one.seen(each[0]) for one, each in zip(judged, replicates, strict=True)]
            seen[name] = round(sum(shown) / len(shown))
            if self.protocol.selection == "best_test":
                best[name] = torch.stack([best_on_test(each[-1], real) for each in populations])
        asked = self._full(sets, real, key, longest(by_name))
        full = [choose(self.protocol, runs.get(*each), real) for each in asked]
        shown = [one.seen(each[0]) for one, each in zip(full, asked, strict=True)]
        seen[FULL] = round(sum(shown) / len(shown))
        everything = {name: many[0] for name, many in sets.everything().items()}
        whole = real.train.images
        return AccuracyResult(
            self.protocol.name,
            self.protocol.source,
            type(self.net).__name__,
            tuple(sets.distilled),
            tuple(sets.baselines),
            values,
            torch.stack([one.accuracy(real.test) for one in full])[:, 0],
            chosen,
            {name: _storage(one) for name, one in everything.items()},
            {name: one.storage().bits for name, one in everything.items()}
            | {FULL: whole.numel() * whole.element_size() * 8},
            seen,
            best,
            len(set(self.protocol.moments)),
            tuple(name for name in self.order if name in values),
            self.protocol.quirks,
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

    def _full(self, sets: Sets, real: Splits, key: Key, steps: int | None) -> list[list[Training]]:
        replicates = max(map(len, sets.everything().values()))
        return of_full(self.protocol, self.net, real, replicates, key, steps=steps)


@dataclass(frozen=True, eq=False)
class AccuracyResult(Result):
    """Test accuracies [replicates, nets] by set, and of the full data [networks].

    ``bits`` stored and images ``seen`` by a network in its training go by set. ``best`` [replicates, nets] is what the
    best of ``looks`` at the test split would give: it is in a table of its own and in nothing else.
    """

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
    bits: Mapping[str, int] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)
    best: Mapping[str, torch.Tensor] = field(default_factory=dict)
    looks: int = 0
    order: tuple[str, ...] = ()
    quirks: tuple[str, ...] = ()

    def estimate(self, name: str) -> Estimate:
        """The accuracy of one set, over replicates (over networks where there is one replicate)."""
        values, unit = units(self.values[name])
        return Estimate.mean(values, unit)

    def optimism(self, name: str) -> Estimate:
        """How much the best look at the test split gives above the last, paired network by network."""
        best, unit = units(self.best[name])
        last, _ = units(self.values[name])
        return paired(best, last, unit)

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
        return {**shown, FULL: Estimate.mean(self.full.tolist(), "network")}

    def claims(self) -> tuple[Claim, ...]:
        """Each distilled set beats the random subset, and what it started from; each of ``order`` beats the next."""
        claims = []
        for name in self.distilled:
            against_random = self.contrast(name, RANDOM)
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
        for better, worse in pairwise(self.order):
            difference = self.contrast(better, worse)
            if difference is not None:
                claims.append(
                    Claim(
                        f"better than {worse}",
                        better,
                        f"{better} trains better networks than {worse}, under the same recipe",
                        difference,
                        "greater",
                        0.0,
                        "two random subsets in the places of the two",
                        "a real subset before the same kind of subset with its labels shuffled",
                        "paper T3",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Accuracy, gains, storage and images seen of each set; the published selection beside ``last``, if it has one."""
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in [*self.distilled, *self.baselines]:
            gain = self.contrast(name, RANDOM) if name != RANDOM else None
            start = self.contrast(name, _initial(name))
            cost = (self.bits.get(name, ""), self.seen.get(name, ""), self.storage[name])
            rows.append((name, self.estimate(name), gain or "", start or "", *cost))
        cost = (self.bits.get(FULL, ""), self.seen.get(FULL, ""), "")
        rows.append((FULL, Estimate.mean(self.full.tolist(), "network"), "", "", *cost))
        columns = (
            *("set", "accuracy", "gain over random", "gain over its start"),
            *("bits stored", "images seen", "storage"),
        )
        tables = [
            Table(f"Test accuracy, protocol {self.protocol}, {self.net}", columns, tuple(rows)),
        ]
        if any(any(choices) for choices in self.chosen.values()):
            picked = tuple(
                (name, "; ".join(choices)) for name, choices in self.chosen.items() if name in self.storage
            )
            tables.append(Table("Chosen on validation, replicate by replicate", ("set", "candidate"), picked))
        if self.best:
            names = [name for name in [*self.distilled, *self.baselines] if name in self.best]
            compared = tuple(
                (
                    name,
                    self.estimate(name),
                    Estimate.mean(*units(self.best[name])),
                    self.optimism(name),
                )
                for name in names
            )
            tables.append(
                Table(
                    f"As published: each network at the best of {self.looks} looks at the test split",
                    ("set", "last", "best on test", "optimism"),
                    compared,
                )
            )
        return tuple(tables)

    def notes(self) -> tuple[str, ...]:
        """The protocol with what differs from the published one, and what an interval covers."""
        single = [name for name in self.distilled if len(self.values[name]) == 1]
        covers = [f"{', '.join(single)}: one set, the interval covers training only."] if single else []
        selected = (
            [
                f"The paper of {self.protocol} reports the best of {self.looks} looks at the test split: that stands in a table "
                "of its own. Accuracies, claims and figure are those after the last step."
            ]
            if self.best
            else []
        )
        return (f"Protocol {self.protocol}: {self.source}.", *self.quirks, *selected, *covers)

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
        ax.annotate(FULL, (len(names) - 0.5, float(self.full.mean())), ha="right", va="bottom", fontsize=9)
        ax.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.set_ylabel("test accuracy (bars: where the set started)")
        ax.spines[["top", "right"]].set_visible(False)


def _initial(name: str) -> str:
    return f"{name}, its start"


def _storage(distilled: DistilledDataset) -> str:
    used = distilled.storage()
    teacher = f", teacher {used.teacher_bytes:,} bytes" if used.teacher_bytes else ""
    return f"{used.floats:,} floats, {used.images:,} images{teacher}"
