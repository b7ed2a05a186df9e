"""What the images that one distilled image helps most have in common, beyond their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from distillens.analyses.pointwise import _semantics_figures as figures
from distillens.analyses.pointwise import _semantics_tables as tables
from distillens.analyses.pointwise._enrichment import Enrichment
from distillens.analyses.pointwise._most_helped import all_counts, base_counts, by_class, most_helped
from distillens.analyses.pointwise._retrained import chosen, first_copy, moved_losses, without_each
from distillens.analyses.pointwise._shares import difference_of_shares, interval
from distillens.analyses.pointwise._shuffled_words import shuffled
from distillens.attributes import Source
from distillens.attributes.vision import Vision
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINT = "distilled point"
STRONGEST, SHOWN = 6, 9  # points of a figure, and images beside each
LEAST = 0.05  # the smallest excess that matters: one point in twenty


@dataclass(frozen=True)
class Semantics:
    """Whether the test images that a distilled image helps most share an attribute beyond their class.

    Influence is that of leave-one-out: a test image's loss without the point minus its loss with all, averaged over initialisations. Of the
    test images of the point's class the ``top`` most helped are taken, and for each word of each attribute of ``source`` they are compared with all
    images of the class: a hypergeometric tail. Benjamini and Hochberg's rule holds the false discovery rate at ``rate`` over all points and words of a
    set. A finding *repeats* where both halves of the initialisations have it too, each with a tail of at most ``rate``.

    Nothing is called semantics for being significant. It is compared with the same pipeline after the images' attributes have changed places
    within their class (``shuffles`` times: all points' lists, their overlaps and the words that go together stay as they are), and with
    the points of the random real subset.

    Replicate 0 of each set is taken; its trainings are those of ``pointwise/leave_one_out``. ``only`` keeps the named sets (all where empty).

    Source: Yang et al. 2024, section 5: LLaVA's answers on influenced images. Its questions, statistics and figures are not
    known: its code has none of it.
    """

    question: ClassVar[str] = (
        "Do the images that one distilled image helps most share something beyond their class?"
    )
    scales: ClassVar[tuple[str, ...]] = ("recipe.steps", "inits")

    net: Net = field(default_factory=ConvNet)
    recipe: Recipe = Recipe(steps=300)
    inits: int = 3
    source: Source = Vision()
    top: int = 50
    rate: float = 0.05
    shuffles: int = 1000
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(2, "semantics", inits=self.inits)  # one has no halves
        at_least(1, "semantics", top=self.top)
        at_least(100, "semantics", shuffles=self.shuffles)
        if not 0 < self.rate < 0.5:
            raise UserError(
                "semantics: rate is a false discovery rate", got=repr(self.rate), expected="0 to 0.5"
            )

    @classmethod
    def defaults(cls, like: Dataset) -> Semantics:
        """The paper's training with the field's network, measured attributes; 15 images of some 45 a class on digits' scale, else 50."""
        small = like.shape[1] * like.shape[2] <= 256
        return cls(ConvNet.defaults(like), top=15 if small else 50)

    @classmethod
    def as_published(cls, like: Dataset) -> Semantics:
        """What is known of it: the paper's leave-one-out training, from two initialisations as there.

        What the images are asked is not known. Attributes are measured, so that no model is needed; ``source=vlm`` asks one of
        the paper's kind.
        """
        return replace(cls.defaults(like), inits=2)

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> list[Training]:
        """The populations of each set, the same as in leave-one-out."""
        return [self._training(one, key) for one in self._chosen(sets).values()]

    def __call__(self, sets: Sets, real: Splits, runs: Runs, *, key: Key) -> SemanticsResult:
        """The findings.

        Raises:
            UserError: sets and data do not fit, a class has too few test images for ``top``, or the attributes cannot be had.
        """
        sets.check_against(real)
        self._check_classes(real.test)
        attributes = self.source(real.test, real.val)  # first: it is what most often cannot be had
        runs.make(self.trainings(sets, real, key=key))
        classes = real.test.labels.hard()
        sizes = torch.bincount(classes, minlength=real.test.k)
        base = base_counts(attributes, classes, real.test.k)
        found: dict[str, dict[str, Any]] = {}
        for name, one in self._chosen(sets).items():
            (population,) = runs.get(self._training(one, key))
            effect, labels = moved_losses(population, self.inits, real.test), one.labels.hard()
            parts = by_class(effect, labels, classes, attributes, self.top)
            tests = Enrichment.of(sizes, base, labels, self.top, self.rate)
            counts = all_counts(parts)
            # Findings or not, so that there is something to look at.
            best = tests.strongest(counts[0])[:STRONGEST]
            most = most_helped(effect.mean(0), labels, classes, self.top)[best, :SHOWN]
            images = real.test.images[most.flatten()]
            found[name] = {
                "counts": counts,
                "shuffled": shuffled(parts, tests, self.shuffles, key),
                "labels": labels,
                "strongest": best,
                "points": one.dataset().pixels()[first_copy(one)[best]],
                "helped": real.test.space.to_pixels(images).view(*most.shape, *real.test.shape),
            }
        return SemanticsResult(
            distilled=tuple(name for name in sets.distilled if name in found),
            classes=real.test.classes,
            source=type(self.source).__name__.lower(),
            words=attributes.each,
            sizes=sizes,
            base=base,
            known=tuple(float((column >= 0).double().mean()) for column in attributes.values.T),
            top=self.top,
            rate=self.rate,
            **{part: {name: one[part] for name, one in found.items()} for part in next(iter(found.values()))},
        )

    def _check_classes(self, test: Dataset) -> None:
        sizes = [len(members) for members in test.by_class]
        least = min(range(test.k), key=sizes.__getitem__)
        if sizes[least] < 2 * self.top:
            raise UserError(
                f"semantics: class {test.classes[least]!r} has {sizes[least]} test images, too few to tell {self.top} from the rest",
                expected=f"{2 * self.top} or more",
                fix=f"set top to at most {sizes[least] // 2}" if sizes[least] > 1 else "leave the class out",
            )

    def _chosen(self, sets: Sets) -> dict[str, DistilledDataset]:
        return chosen(sets, self.only, "semantics")

    def _training(self, one: DistilledDataset, key: Key) -> Training:
        return without_each(one, self.net, self.recipe, self.inits, key)


@dataclass(frozen=True, eq=False)
class SemanticsResult(Result):
    """How often each word stands among each point's most helped images, and what the same finds after shuffling.

    ``counts`` [3, P, words] by set (all initialisations, two halves), ``base`` [k, words] and ``sizes`` [k] of the test images, ``shuffled``
    [shuffles, 3] findings, points with one, findings that repeat.
    """

    analysis: ClassVar[str] = "pointwise/semantics"
    title: ClassVar[str] = "Semantics of single images"
    question: ClassVar[str] = Semantics.question

    distilled: tuple[str, ...]
    classes: tuple[str, ...]
    source: str
    words: tuple[tuple[str, str], ...]
    sizes: torch.Tensor
    base: torch.Tensor
    known: tuple[float, ...]
    top: int
    rate: float
    counts: Mapping[str, torch.Tensor]
    shuffled: Mapping[str, torch.Tensor]
    labels: Mapping[str, torch.Tensor]
    strongest: Mapping[str, torch.Tensor]
    points: Mapping[str, torch.Tensor]
    helped: Mapping[str, torch.Tensor]

    @cached_property
    def tests(self) -> dict[str, Enrichment]:
        """The tests of each set's points."""
        return {
            name: Enrichment.of(self.sizes, self.base, labels, self.top, self.rate)
            for name, labels in self.labels.items()
        }

    @cached_property
    def found(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The findings [P, words] of each set, and those that repeat."""
        return {name: tests.found(self.counts[name]) for name, tests in self.tests.items()}

    def carriers(self, name: str) -> int:
        """Points with a finding."""
        return int(self.found[name][0].any(1).sum())

    def chance(self, name: str) -> float:
        """How likely shuffled attributes give as many points with a finding: the exact permutation p-value."""
        as_many = int((self.shuffled[name][:, 1] >= self.carriers(name)).sum())
        return (1 + as_many) / (1 + len(self.shuffled[name]))

    def beyond_shuffled(self, name: str) -> Estimate:
        """The share of points with a finding minus what shuffled attributes give on average.

        The wider of two intervals: the share less what 95 % of the shuffles give, and Clopper and Pearson's of the share less the
        shuffles' mean. Where few points are looked at, none with a finding says little.
        """
        found, p = self.carriers(name), len(self.labels[name])
        null = self.shuffled[name][:, 1].double() / p
        quantiles = torch.quantile(
            null, torch.tensor([0.025, 0.975], dtype=null.dtype), interpolation="higher"
        )
        least, most = quantiles.tolist()
        (exact_low, exact_high), chance = interval(found, p), float(null.mean())
        low = min(found / p - most, exact_low - chance)
        high = max(found / p - least, exact_high - chance)
        return Estimate(found / p - chance, low, high, p, POINT)

    def beyond_real(self, name: str) -> Estimate | None:
        """The share of points with a finding minus that of the random subset's points; None where there is no subset.

        The wider of two intervals: Newcombe's for points that are independent, and Student's t over the classes' differences, since points of
        one class choose among the same images.
        """
        if RANDOM not in self.counts:
            return None
        own, real = (self.found[n][0].any(1) for n in (name, RANDOM))
        value = float(own.double().mean() - real.double().mean())
        low, high = difference_of_shares(int(own.sum()), len(own), int(real.sum()), len(real))
        differences = [
            float(
                own[self.labels[name] == c].double().mean() - real[self.labels[RANDOM] == c].double().mean()
            )
            for c in sorted(set(self.labels[name].tolist()) & set(self.labels[RANDOM].tolist()))
        ]
        if len(differences) > 1:
            by_class = Estimate.mean(differences, "class")
            half = (by_class.high - by_class.low) / 2
            low, high = min(low, value - half), max(high, value + half)
        return Estimate(value, low, high, len(own), POINT)

    def repeats(self, name: str) -> Estimate | None:
        """The share of findings that both halves of the initialisations have too, with Clopper and Pearson's interval; None without findings."""
        of_all, both = (int(part.sum()) for part in self.found[name])
        if not of_all:
            return None
        return Estimate(both / of_all, *interval(both, of_all), of_all, "finding")

    def lift(self, name: str, point: int, word: int) -> Estimate:
        """The word's share among the most helped images over its share in the class.

        Wilson's interval of the first; the second is that of all test images of the class. Findings were chosen for being large: so
        many are chosen of so many that the level is 1 - rate * chosen / tested (Benjamini and Yekutieli 2005).
        """
        chosen_now, tested = int(self.found[name][0].sum()), int(self.tests[name].tested.sum())
        level = 1 - self.rate * max(chosen_now, 1) / max(tested, 1)
        c = int(self.labels[name][point])
        base = float(self.base[c, word]) / float(self.sizes[c])
        count = int(self.counts[name][0, point, word])
        low, high = interval(count, self.top, level, "wilson")
        unit = "image among the most helped"
        return Estimate(count / self.top / base, low / base, high / base, self.top, unit, level)

    def headline(self) -> dict[str, Estimate]:
        """Points with a finding beyond shuffled attributes, and beyond real points."""
        found = {f"{n}: points with semantics beyond shuffled": self.beyond_shuffled(n) for n in self.counts}
        for name in self.distilled:
            beyond = self.beyond_real(name)
            if beyond is not None:
                found[f"{name}: points with semantics beyond real points"] = beyond
        return found

    def claims(self) -> tuple[Claim, ...]:
        """More points have a finding than shuffled attributes give, and than real points have."""
        claims = []
        for name in self.distilled:
            claims.append(
                Claim(
                    "semantics beyond class",
                    name,
                    "the images that a point helps most share an attribute beyond their class, for more points than "
                    "with the attributes shuffled within classes (by one in twenty)",
                    self.beyond_shuffled(name),
                    "greater",
                    LEAST,
                    "influences that have nothing to do with the attributes",
                    "points that help images with a coloured corner, on half of a class",
                    "paper, section 5",
                )
            )
            beyond = self.beyond_real(name)
            if beyond is not None:
                claims.append(
                    Claim(
                        "more semantics than real points",
                        name,
                        "more of its points have such an attribute than of the random real images in their place",
                        beyond,
                        "greater",
                        0.0,
                        "other points of the same influences in the set's place",
                        "points that each help images of one word, beside real ones that help at random",
                    )
                )
        return tuple(claims)

    def tables(self) -> tuple[Table, ...]:
        """Findings and what they exceed, the strongest, the smallest detectable lift, the attributes."""
        listed = (tables.strongest_findings(self, name) for name in self.counts)
        return (
            tables.counted(self),
            *(table for table in listed if table is not None),
            tables.power(self),
            tables.attributes(self),
        )

    def notes(self) -> tuple[str, ...]:
        """What is looked at, and what a finding does not say."""
        return (
            "Of each set replicate 0 is looked at: units are its distilled points, and nothing is said of other distillations.",
            "What real points show too may be the images' doing: hard ones are moved by every point, and look alike. "
            "The comparison with the random subset is there for this.",
            "Halves of the initialisations are tried on the same test images: a repeated finding is no accident of the initialisation.",
        )

    def panels(self) -> dict[str, Callable[[Axes], None]]:
        """Shares of points, attributes by set, and each set's strongest points with the images that they help most."""
        panels: dict[str, Callable[[Axes], None]] = {
            "Points with a finding; grey: the same with the attributes shuffled (95 % of them)": self.plot,
            "Share of points with a finding in each attribute": lambda ax: figures.shares_of_attributes(
                self, ax
            ),
        }
        for name in self.distilled:
            caption = f"{name}: the points with the smallest tails and the images that they help most"
            panels[caption] = figures.strongest_points(self, name)
        return panels

    def plot(self, ax: Axes) -> None:
        """A bar a set, and what shuffled attributes give."""
        figures.shares_of_points(self, ax)
