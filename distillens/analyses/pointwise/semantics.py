"""What the images that one distilled image helps most have in common, beyond their class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from distillens.analyses.pointwise._retrained import chosen, first_copy, moved_losses, without_each
from distillens.attributes import Attributes, Source
from distillens.attributes.vision import Vision
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError, at_least
from distillens.core.contracts import RANDOM, Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.palette import colour
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result, Table
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINT = "distilled point"
POWER = 0.8
SHARES = (0.05, 0.1, 0.2, 1 / 3, 0.5)  # base shares that the smallest detectable lift is stated for
SHOWN, STRONGEST, LISTED = 9, 6, 12  # images and points of a figure, findings of a table
LEAST = 0.05  # the smallest excess that matters: one point in twenty
CHUNK = 64  # shuffles counted together
HALVES = ("all", "first", "second")  # initialisations that influences are averaged over


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
        found: dict[str, dict[str, Any]] = {}
        for name, one in self._chosen(sets).items():
            (population,) = runs.get(self._training(one, key))
            effect = moved_losses(population, self.inits, real.test)
            labels = one.labels.hard()
            counted = enriched(
                effect, labels, real.test.labels.hard(), attributes, self.top, self.rate, self.shuffles, key
            )
            best = strongest(
                counted["counts"][0], labels, attributes, real.test.labels.hard(), self.top, self.rate
            )
            most = most_helped(effect.mean(0), labels, real.test.labels.hard(), self.top)[best, :SHOWN]
            images = real.test.images[most.flatten()]
            found[name] = {
                **counted,
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
            sizes=torch.bincount(real.test.labels.hard(), minlength=real.test.k),
            base=base_counts(attributes, real.test.labels.hard(), real.test.k),
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


def most_helped(effect: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor, top: int) -> torch.Tensor:
    """The images [P, top] of each point's class with the largest influence [P, n], the largest first."""
    own = labels[:, None] == classes[None]
    return effect.masked_fill(~own, -math.inf).topk(top, dim=1).indices


def base_counts(attributes: Attributes, classes: torch.Tensor, k: int) -> torch.Tensor:
    """How many images of each class have each word [k, words]."""
    has = attributes.has()
    return torch.stack([has[classes == c].sum(0) for c in range(k)])


def tails(size: int, base: torch.Tensor, top: int) -> torch.Tensor:
    """For each word [words, 1 + top]: how likely ``top`` of ``size`` images have 0, 1, ... or more of the ``base`` [words] that have it."""
    return torch.tensor([_tail(size, having, top) for having in base.tolist()], dtype=torch.float64)


@lru_cache(maxsize=10_000)
def _tail(size: int, having: int, top: int) -> tuple[float, ...]:
    from scipy.stats import hypergeom

    return tuple(min(1.0, float(hypergeom.sf(count - 1, size, having, top))) for count in range(top + 1))


def findings(tail: torch.Tensor, tested: torch.Tensor, rate: float) -> torch.Tensor:
    """Which tails [..., P, words] are findings: Benjamini and Hochberg 1995 over the ``tested`` [P, words] ones."""
    from scipy.stats import false_discovery_control

    found = torch.zeros(tail.shape, dtype=torch.bool)
    if bool(tested.any()):
        adjusted = false_discovery_control(tail[..., tested].numpy(), axis=-1)
        found[..., tested] = torch.from_numpy(adjusted <= rate)
    return found


@dataclass(frozen=True)
class _Tests:
    """The tails of all points and words by their counts, and which of them can be found at all."""

    table: torch.Tensor  # [P, words, 1 + top]
    tested: torch.Tensor  # [P, words]

    @staticmethod
    def of(sizes: torch.Tensor, base: torch.Tensor, labels: torch.Tensor, top: int, rate: float) -> _Tests:
        """A word is tested where the fullest list would have a tail of at most ``rate``: Tarone 1990; the margins alone decide."""
        by_class = {c: tails(int(sizes[c]), base[c], top) for c in sorted(set(labels.tolist()))}
        table = torch.stack([by_class[c] for c in labels.tolist()])
        most = base[labels].clamp(max=top)
        return _Tests(table, (table.gather(2, most[..., None])[..., 0] <= rate) & (most > 0))

    def tail(self, counts: torch.Tensor) -> torch.Tensor:
        """The tails [..., P, words] of counts."""
        return self.table.expand(*counts.shape, -1).gather(-1, counts[..., None])[..., 0]

    def found(self, counts: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """For counts [3, ..., P, words] of all initialisations and of two halves: the findings, and those that repeat."""
        of_all = findings(self.tail(counts[0]), self.tested, rate)
        both = (self.tail(counts[1]) <= rate) & (self.tail(counts[2]) <= rate)
        return of_all, of_all & both


def enriched(
    effect: torch.Tensor,
    labels: torch.Tensor,
    classes: torch.Tensor,
    attributes: Attributes,
    top: int,
    rate: float,
    shuffles: int,
    key: Key,
) -> dict[str, torch.Tensor]:
    """Counts of words among each point's most helped images, and what shuffled attributes find.

    ``effect`` [inits, P, n] are influences of points with ``labels`` [P] on images of ``classes`` [n]. Returns ``counts``
    [3, P, words] (all initialisations, and every other one from the first and from the second) and ``shuffled`` [shuffles, 3]:
    findings, points with one, findings that repeat.
    """
    halves = (effect, effect[::2], effect[1::2])
    lists = [most_helped(part.mean(0), labels, classes, top) for part in halves]
    listed = torch.stack([torch.zeros(effect.shape[1:]).scatter_(1, one, 1.0) for one in lists])
    has = attributes.has()
    k = int(classes.max()) + 1
    sizes, base = torch.bincount(classes, minlength=k), base_counts(attributes, classes, k)
    tests = _Tests.of(sizes, base, labels, top, rate)
    # Of each class in the set: its points, its images, their lists [3, P, N] and words [N, words].
    parts = []
    for c in sorted(set(labels.tolist())):
        points, images = (labels == c).nonzero()[:, 0], (classes == c).nonzero()[:, 0]
        parts.append((c, points, listed[:, points][:, :, images], has[images].float()))
    counts = torch.zeros(len(HALVES), len(labels), has.shape[1], dtype=torch.long)
    for _, points, own, words in parts:
        counts[:, points] = (own @ words).long()
    orders = [key.fold("shuffle", c).uniform(shuffles, len(words)).argsort(1) for c, _, _, words in parts]
    shuffled = torch.zeros(shuffles, 3, dtype=torch.int32)
    for chunk in torch.split(torch.arange(shuffles), CHUNK):
        moved = torch.zeros(len(HALVES), len(chunk), *counts.shape[1:], dtype=torch.long)
        for (_, points, own, words), places in zip(parts, orders, strict=True):
            moved[:, :, points] = (own[:, None] @ words[places[chunk]][None]).long()
        of_all, repeated = tests.found(moved, rate)
        shuffled[chunk] = torch.stack(
            [of_all.sum((1, 2)), of_all.any(2).sum(1), repeated.sum((1, 2))], 1
        ).int()
    return {"counts": counts, "shuffled": shuffled}


def strongest(
    counts: torch.Tensor,
    labels: torch.Tensor,
    attributes: Attributes,
    classes: torch.Tensor,
    top: int,
    rate: float,
) -> torch.Tensor:
    """The points [s] with the smallest tails, the smallest first; findings or not, so that there is something to look at."""
    k = int(classes.max()) + 1
    sizes, base = torch.bincount(classes, minlength=k), base_counts(attributes, classes, k)
    tests = _Tests.of(sizes, base, labels, top, rate)
    smallest = tests.tail(counts).masked_fill(~tests.tested, 1.0).min(1).values
    return smallest.argsort(stable=True)[:STRONGEST]


def detectable(size: int, base: float, top: int, threshold: float) -> float:
    """The smallest lift found with probability POWER, where a tail of at most ``threshold`` is a finding; infinite where none is.

    ``base`` is the share of the class's ``size`` images that have the word. The ``top`` are taken as independent draws: the share s
    that has P(Binomial(top, s) >= c) = POWER is a quantile of the beta distribution, with c the smallest count that is a finding.
    """
    from scipy.special import betaincinv

    having = round(base * size)
    tail = tails(size, torch.tensor([having]), top)[0]
    least = int((tail > threshold).sum())
    if least > min(top, having):
        return math.inf
    share = float(betaincinv(least, top - least + 1, POWER)) if least else 0.0
    return share * size / having if share * top <= having else math.inf


def difference_of_shares(first: int, n: int, second: int, m: int) -> tuple[float, float]:
    """The interval of first/n - second/m: Newcombe 1998, method 10, from Wilson's intervals."""
    from scipy.stats import binomtest

    p, q = first / n, second / m
    one, other = (binomtest(a, b).proportion_ci(0.95, method="wilson") for a, b in ((first, n), (second, m)))
    low = p - q - math.hypot(p - one.low, other.high - q)
    return low, p - q + math.hypot(one.high - p, q - other.low)


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

    def tests(self, name: str) -> _Tests:
        """The tests of a set's points."""
        return _Tests.of(self.sizes, self.base, self.labels[name], self.top, self.rate)

    def found(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The findings [P, words] of a set, and those that repeat."""
        return self.tests(name).found(self.counts[name], self.rate)

    def carriers(self, name: str) -> int:
        """Points with a finding."""
        return int(self.found(name)[0].any(1).sum())

    def chance(self, name: str) -> float:
        """How likely shuffled attributes give as many points with a finding: the exact permutation p-value."""
        as_many = int((self.shuffled[name][:, 1] >= self.carriers(name)).sum())
        return (1 + as_many) / (1 + len(self.shuffled[name]))

    def beyond_shuffled(self, name: str) -> Estimate:
        """The share of points with a finding minus what shuffled attributes give on average.

        The wider of two intervals: the share less what 95 % of the shuffles give, and Clopper and Pearson's of the share less the
        shuffles' mean. Where few points are looked at, none with a finding says little.
        """
        from scipy.stats import binomtest

        found, p = self.carriers(name), len(self.labels[name])
        null = self.shuffled[name][:, 1].double() / p
        quantiles = torch.quantile(
            null, torch.tensor([0.025, 0.975], dtype=null.dtype), interpolation="higher"
        )
        least, most = quantiles.tolist()
        exact, chance = binomtest(found, p).proportion_ci(0.95), float(null.mean())
        low = min(found / p - most, float(exact.low) - chance)
        high = max(found / p - least, float(exact.high) - chance)
        return Estimate(found / p - chance, low, high, p, POINT)

    def beyond_real(self, name: str) -> Estimate | None:
        """The share of points with a finding minus that of the random subset's points; None where there is no subset.

        The wider of two intervals: Newcombe's for points that are independent, and Student's t over the classes' differences, since points of
        one class choose among the same images.
        """
        if RANDOM not in self.counts:
            return None
        own, real = (self.found(n)[0].any(1) for n in (name, RANDOM))
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
        from scipy.stats import binomtest

        of_all, both = (int(part.sum()) for part in self.found(name))
        if not of_all:
            return None
        exact = binomtest(both, of_all).proportion_ci(0.95)
        return Estimate(both / of_all, float(exact.low), float(exact.high), of_all, "finding")

    def lift(self, name: str, point: int, word: int) -> Estimate:
        """The word's share among the most helped images over its share in the class.

        Wilson's interval of the first; the second is that of all test images of the class. Findings were chosen for being large: so
        many are chosen of so many that the level is 1 - rate * chosen / tested (Benjamini and Yekutieli 2005).
        """
        from scipy.stats import binomtest

        chosen_now, tested = int(self.found(name)[0].sum()), int(self.tests(name).tested.sum())
        level = 1 - self.rate * max(chosen_now, 1) / max(tested, 1)
        c = int(self.labels[name][point])
        base = float(self.base[c, word]) / float(self.sizes[c])
        count = int(self.counts[name][0, point, word])
        interval = binomtest(count, self.top).proportion_ci(level, method="wilson")
        return Estimate(
            count / self.top / base,
            float(interval.low) / base,
            float(interval.high) / base,
            self.top,
            "image among the most helped",
            level,
        )

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
        return (
            self._counted(),
            *(table for name in self.counts if (table := self._listed(name)) is not None),
            self._power(),
            self._attributes(),
        )

    def _counted(self) -> Table:
        rows: list[tuple[str | int | Estimate, ...]] = []
        for name in self.counts:
            of_all, _ = self.found(name)
            null = self.shuffled[name].double()
            beyond = self.beyond_real(name) if name in self.distilled else None
            rows.append(
                (
                    name,
                    len(of_all),
                    int(self.tests(name).tested.sum()),
                    int(of_all.sum()),
                    _spread(null[:, 0]),
                    self.carriers(name),
                    _spread(null[:, 1]),
                    f"{self.chance(name):.3g}",
                    self.beyond_shuffled(name),
                    beyond if beyond is not None else "-",
                    self.repeats(name) or "no finding",
                    _spread(null[:, 2]),
                )
            )
        columns = (
            "set",
            "points",
            "tests",
            "findings",
            "of shuffled attributes",
            "points with one",
            "of shuffled attributes ",
            "p",
            "share of points beyond shuffled",
            "beyond real points",
            "share of findings that repeat",
            "repeated findings of shuffled",
        )
        return Table(f"Findings at a false discovery rate of {self.rate:g}", columns, tuple(rows))

    def _listed(self, name: str) -> Table | None:
        of_all, both = self.found(name)
        tail = self.tests(name).tail(self.counts[name][0])
        found = sorted(of_all.nonzero().tolist(), key=lambda at: float(tail[at[0], at[1]]))
        if not found:
            return None
        rows = []
        for point, word in found[:LISTED]:
            c = int(self.labels[name][point])
            rows.append(
                (
                    point,
                    self.classes[c],
                    ": ".join(self.words[word]),
                    f"{int(self.counts[name][0, point, word])} of {self.top}",
                    f"{int(self.base[c, word])} of {int(self.sizes[c])}",
                    self.lift(name, point, word),
                    f"{float(tail[point, word]):.2g}",
                    "yes" if bool(both[point, word]) else "no",
                )
            )
        columns = ("point", "class", "attribute", "most helped", "class images", "lift", "tail", "repeats")
        more = f" (the first {LISTED} of {len(found)})" if len(found) > LISTED else ""
        return Table(f"{name}: what the images that a point helps most share{more}", columns, tuple(rows))

    def _power(self) -> Table:
        sizes = self.sizes.tolist()
        size = sorted(sizes)[len(sizes) // 2]
        tested = max((int(self.tests(name).tested.sum()) for name in self.counts), default=1)
        rows = []
        for share in SHARES:
            alone, among = (
                detectable(size, share, self.top, threshold)
                for threshold in (self.rate / max(tested, 1), self.rate)
            )
            rows.append((f"{share:.2f}", _lift_text(alone), _lift_text(among), f"{1 / share:.1f}"))
        columns = ("share in the class", "as the only finding", "where all are findings", "largest possible")
        title = (
            f"The smallest lift found with probability {POWER:g}: {self.top} of {size} images, {tested} tests"
        )
        return Table(title, columns, tuple(rows))

    def _attributes(self) -> Table:
        total = self.base.sum(0)
        rows = []
        for place, name in enumerate(dict.fromkeys(attribute for attribute, _ in self.words)):
            shares = [
                f"{word} {float(total[i]) / float(self.sizes.sum()):.2f}"
                for i, (attribute, word) in enumerate(self.words)
                if attribute == name
            ]
            rows.append((name, ", ".join(shares), f"{self.known[place]:.2f}"))
        return Table(
            f"Attributes of the test images ({self.source})",
            ("attribute", "words and their shares", "share known"),
            tuple(rows),
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
            "Share of points with a finding in each attribute": self._plot_attributes,
        }
        for name in self.distilled:
            caption = f"{name}: the points with the smallest tails and the images that they help most"
            panels[caption] = self._grid_of(name)
        return panels

    def plot(self, ax: Axes) -> None:
        """A bar a set, and what shuffled attributes give."""
        for i, name in enumerate(self.counts):
            p = len(self.labels[name])
            ax.bar(i, self.carriers(name) / p, width=0.6, color=colour(name))
            null = self.shuffled[name][:, 1].double() / p
            low, middle, high = torch.quantile(
                null, torch.tensor([0.025, 0.5, 0.975], dtype=null.dtype)
            ).tolist()
            error = [[middle - low], [high - middle]]
            ax.errorbar(i + 0.38, middle, error, fmt="_", color="grey", capsize=4, lw=1.6, ms=8)
            ax.annotate(
                f"p = {self.chance(name):.2g}",
                (i, max(self.carriers(name) / p, high)),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        ax.set_xticks(range(len(self.counts)), list(self.counts), rotation=20 if len(self.counts) > 4 else 0)
        ax.set_ylim(0, max(0.1, 1.15 * ax.get_ylim()[1]))
        ax.set_ylabel("share of points with a finding")
        ax.spines[["top", "right"]].set_visible(False)

    def _plot_attributes(self, ax: Axes) -> None:
        names = list(dict.fromkeys(attribute for attribute, _ in self.words))
        shares = torch.zeros(len(self.counts), len(names))
        for row, name in enumerate(self.counts):
            of_all, _ = self.found(name)
            for column, attribute in enumerate(names):
                own = [i for i, (a, _) in enumerate(self.words) if a == attribute]
                shares[row, column] = of_all[:, own].any(1).double().mean()
        most = max(0.1, float(shares.max()))
        ax.imshow(shares.numpy(force=True), cmap="Blues", vmin=0, vmax=most, aspect="auto")
        for row in range(len(self.counts)):
            for column in range(len(names)):
                dark = float(shares[row, column]) > 0.6 * most
                ax.text(
                    column,
                    row,
                    f"{float(shares[row, column]):.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        ax.set_yticks(range(len(self.counts)), list(self.counts), fontsize=8)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)

    def _grid_of(self, name: str) -> Callable[[Axes], None]:
        """Draw the strongest points, a gap, the images that they help most, and the words in which these differ from their class."""
        points, helped = self.points[name], self.helped[name]
        of_all, both = self.found(name)
        tests = self.tests(name)
        tail = tests.tail(self.counts[name][0]).masked_fill(~tests.tested, 1.0)

        def draw(ax: Axes) -> None:
            c, h, w = points.shape[1:]
            gap, columns = w // 2, 1 + helped.shape[1]
            tile_h, tile_w = h + max(1, h // 6), w + max(1, w // 16)
            canvas = torch.ones(len(points) * tile_h, columns * tile_w + gap, 3)
            for row, j in enumerate(self.strongest[name].tolist()):
                for column, image in enumerate([points[row], *helped[row]]):
                    x = column * tile_w + (gap if column else 0)
                    shown = (image if c == 3 else image.mean(0, keepdim=True).expand(3, h, w)).clamp(0, 1)
                    canvas[row * tile_h : row * tile_h + h, x : x + w] = shown.permute(1, 2, 0)
                lines = [f"point {j}, {self.classes[int(self.labels[name][j])]}"]
                words = of_all[j].nonzero()[:, 0].tolist() or [int(tail[j].argmin())]
                for word in sorted(words, key=lambda i: float(tail[j, i]))[:2]:
                    mark = "" if bool(of_all[j, word]) else " (no finding)"
                    mark += ", repeats" if bool(both[j, word]) else ""
                    lines.append(
                        f"{': '.join(self.words[word])}  x{self.lift(name, j, word).value:.1f}{mark}"
                    )
                ax.text(
                    canvas.shape[1] + w / 4, row * tile_h + h / 2, "\n".join(lines), va="center", fontsize=7
                )
            ax.imshow(canvas.numpy(force=True), interpolation="nearest")
            ax.set_axis_off()

        return draw


def _spread(values: torch.Tensor) -> str:
    """A mean and the range of the middle 95 % of shuffles, as text: what chance gives is no estimate of a set."""
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return f"{float(values.mean()):.2f} ({low:.0f} to {high:.0f})"


def _lift_text(lift: float) -> str:
    return f"{lift:.2f}" if math.isfinite(lift) else "none"
