"""Semantics of single distilled images: closed forms, twins, false discoveries, nulls and plants.

Nulls are 1,000 resampled draws of simulated influences: at most 70 may be called supported. The planted attribute is
resampled 100 times.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from distillens.analyses.pointwise._detectable import detectable
from distillens.analyses.pointwise._enrichment import Enrichment, findings, tails
from distillens.analyses.pointwise._most_helped import all_counts, base_counts, by_class, most_helped
from distillens.analyses.pointwise._shares import difference_of_shares
from distillens.analyses.pointwise._shuffled_words import shuffled
from distillens.analyses.pointwise.semantics import Semantics, SemanticsResult
from distillens.attributes import Attributes, fingerprints
from distillens.attributes.clip import Clip
from distillens.attributes.labels import Labels
from distillens.attributes.vision import Vision
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.config import override
from distillens.core.contracts import RANDOM, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from tests.analyses.by_hand import subset

SEED = Key(20261125, ("semantics",))
DRAWS, ALARMS, REPETITIONS = 1000, 70, 100
RATE, TOP, SHUFFLES = 0.05, 15, 100
CLASSES, IMAGES, POINTS, INITS = 3, 45, 8, 4  # of digits' scale: images and points a class


def noisy(key: Key, classes: int = CLASSES, images: int = IMAGES, attributes: int = 5) -> Attributes:
    """Attributes of three words each, thirds of numbers that hang together by half."""
    common = key.fold("common").normal(classes * images, 1)
    numbers = common + key.fold("own").normal(classes * images, attributes)
    edges = torch.quantile(numbers, torch.tensor([1 / 3, 2 / 3]))
    return Attributes(
        {f"noise {a}": ("low", "middle", "high") for a in range(attributes)},
        torch.bucketize(numbers, edges),
    )


def influences(key: Key, points: int = POINTS, classes: int = CLASSES, images: int = IMAGES) -> torch.Tensor:
    """Influences [inits, P, n] that nothing on an image explains: hard images that all points move, a point's own, an initialisation's."""
    n, p = classes * images, classes * points
    hard, own, init = (
        key.fold("hard").normal(n),
        key.fold("own").normal(p, n),
        key.fold("init").normal(INITS, p, n),
    )
    return hard + own + init


def enriched(
    effect: torch.Tensor,
    labels: torch.Tensor,
    classes: torch.Tensor,
    attributes: Attributes,
    top: int,
    rate: float,
    shuffles: int,
    key: Key,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and what shuffles find, for influences [inits, P, n]; without any shuffle, nothing."""
    k = int(classes.max()) + 1
    parts = by_class(effect, labels, classes, attributes, top)
    sizes, base = torch.bincount(classes, minlength=k), base_counts(attributes, classes, k)
    tests = Enrichment.of(sizes, base, labels, top, rate)
    null = shuffled(parts, tests, shuffles, key) if shuffles else torch.zeros(1, 3, dtype=torch.int32)
    return all_counts(parts), null


def answer(
    sets: dict[str, torch.Tensor], attributes: Attributes, key: Key, shuffles: int = SHUFFLES, top: int = TOP
) -> SemanticsResult:
    """The result for influences by set, points and images class-major."""
    n, p = len(attributes), next(iter(sets.values())).shape[1]
    classes = torch.arange(CLASSES).repeat_interleave(n // CLASSES)
    labels = torch.arange(CLASSES).repeat_interleave(p // CLASSES)
    counted = {
        name: enriched(effect, labels, classes, attributes, top, RATE, shuffles, key.fold(name))
        for name, effect in sets.items()
    }
    picture = torch.zeros(1, 1, 4, 4)
    return SemanticsResult(
        distilled=tuple(name for name in sets if name != RANDOM),
        classes=tuple("abc"),
        source="made",
        words=attributes.each,
        sizes=torch.bincount(classes),
        base=base_counts(attributes, classes, CLASSES),
        known=(1.0,) * len(attributes.words),
        top=top,
        rate=RATE,
        counts={name: counts for name, (counts, _) in counted.items()},
        shuffled={name: null for name, (_, null) in counted.items()},
        labels=dict.fromkeys(sets, labels),
        strongest=dict.fromkeys(sets, torch.zeros(1, dtype=torch.long)),
        points=dict.fromkeys(sets, picture),
        helped=dict.fromkeys(sets, picture[None]),
    )


# Closed forms and slow twins.


def test_tails_are_sums_of_exact_shares() -> None:
    size, top = 12, 5
    for base in range(size + 1):
        found = tails(size, torch.tensor([base]), top)[0]
        for count in range(top + 1):
            ways = sum(math.comb(base, i) * math.comb(size - base, top - i) for i in range(count, top + 1))
            assert float(found[count]) == pytest.approx(ways / math.comb(size, top), abs=1e-12)


def test_findings_follow_the_rule_step_by_step() -> None:
    tail = SEED.fold("rule").uniform(20, 4, 6).double() ** 3
    tested = SEED.fold("tested").uniform(4, 6) > 0.3
    found = findings(tail, tested, 0.1)
    for one, mine in zip(tail, found, strict=True):
        ordered = sorted(float(t) for t in one[tested])
        bound = max((t for i, t in enumerate(ordered, 1) if t <= 0.1 * i / len(ordered)), default=-1.0)
        assert mine.tolist() == [
            [bool(known) and float(t) <= bound for t, known in zip(*rows, strict=True)]
            for rows in zip(one, tested, strict=True)
        ]
    assert not findings(tail, torch.zeros(4, 6, dtype=torch.bool), 0.1).any()


def test_counts_are_those_of_a_slow_loop() -> None:
    key = SEED.fold("loop")
    attributes, effect = noisy(key), influences(key)
    attributes.values[::7, 2] = -1  # not known
    classes = torch.arange(CLASSES).repeat_interleave(IMAGES)
    labels = torch.arange(CLASSES).repeat_interleave(POINTS)
    order = key.fold("order").permutation(len(classes))  # images of a class need not stand together
    attributes = Attributes(attributes.words, attributes.values[order])
    found = enriched(effect, labels, classes[order], attributes, TOP, RATE, 100, key)[0]
    for half, inits in enumerate(([0, 1, 2, 3], [0, 2], [1, 3])):
        for j in range(len(labels)):
            own = [i for i in range(len(classes)) if classes[order][i] == labels[j]]
            own.sort(key=lambda i: -float(effect[inits, j, i].mean()))
            for w, (name, word) in enumerate(attributes.each):
                place, a = attributes.words[name].index(word), list(attributes.words).index(name)
                assert int(found[half, j, w]) == sum(int(attributes.values[i, a]) == place for i in own[:TOP])
    assert most_helped(effect.mean(0), labels, classes[order], TOP).shape == (len(labels), TOP)


def test_shuffled_attributes_find_what_the_same_pipeline_finds_on_them() -> None:
    """The counts of shuffles have the mean and the spread of the hypergeometric law; order of points changes nothing."""
    key = SEED.fold("shuffles")
    attributes, effect = noisy(key), influences(key)
    classes = torch.arange(CLASSES).repeat_interleave(IMAGES)
    labels = torch.arange(CLASSES).repeat_interleave(POINTS)
    turned = key.fold("turn").permutation(len(labels))
    one = enriched(effect, labels, classes, attributes, TOP, 0.3, 400, key)
    other = enriched(effect[:, turned], labels[turned], classes, attributes, TOP, 0.3, 400, key)
    assert torch.equal(one[0][:, turned], other[0])
    assert torch.equal(one[1], other[1])
    # Shuffling the table and asking is one more shuffle: its findings lie among the others.
    moved = torch.cat([c * IMAGES + key.fold("by hand", c).permutation(IMAGES) for c in range(CLASSES)])
    by_hand = [
        int(
            answer({"a": effect}, Attributes(attributes.words, attributes.values[moved.roll(0)[m]]), key)
            .found["a"][0]
            .sum()
        )
        for m in [
            torch.cat([c * IMAGES + key.fold("again", c, i).permutation(IMAGES) for c in range(CLASSES)])
            for i in range(60)
        ]
    ]
    null = enriched(effect, labels, classes, attributes, TOP, RATE, 1000, key)[1][:, 0].double()
    error = float(null.std()) / 60**0.5
    assert abs(sum(by_hand) / 60 - float(null.mean())) < 4 * error + 0.05


@pytest.mark.parametrize(("size", "base", "top", "threshold"), [(45, 1 / 3, 15, 1e-3), (1000, 0.1, 50, 1e-4)])
def test_the_smallest_detectable_lift_is_found_with_the_stated_probability(
    size: int, base: float, top: int, threshold: float
) -> None:
    lift = detectable(size, base, top, threshold)
    having = round(base * size)
    share = lift * having / size
    least = next(c for c in range(top + 1) if tails(size, torch.tensor([having]), top)[0, c] <= threshold)
    power = sum(math.comb(top, c) * share**c * (1 - share) ** (top - c) for c in range(least, top + 1))
    assert power == pytest.approx(0.8, abs=1e-9)
    assert detectable(size, 0.5, 3, 1e-9) == math.inf


def test_the_difference_of_two_shares_has_newcombes_interval() -> None:
    """His example: 56 of 70 against 48 of 80."""
    low, high = difference_of_shares(56, 70, 48, 80)
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


# False discoveries, nulls and plants.


def planted(i: int) -> tuple[dict[str, torch.Tensor], Attributes, torch.Tensor]:
    """A coloured corner on half of the first class, and points of which half help images with it, half those without."""
    key = SEED.fold("plant", i)
    attributes, effect = noisy(key), influences(key)
    corner = torch.zeros(len(attributes), dtype=torch.long)
    corner[key.fold("corner").permutation(IMAGES)[: IMAGES // 2]] = 1
    half = POINTS // 2
    effect[:, :half, :IMAGES] += 4.0 * corner[:IMAGES]
    effect[:, half:POINTS, :IMAGES] += 4.0 * (1 - corner[:IMAGES])
    words = {**attributes.words, "corner": ("plain", "coloured")}
    both = Attributes(words, torch.cat([attributes.values, corner[:, None]], 1))
    truth = torch.zeros(effect.shape[1], len(both.each), dtype=torch.bool)
    truth[:half, both.each.index(("corner", "coloured"))] = True
    truth[half:POINTS, both.each.index(("corner", "plain"))] = True
    return {"a": effect}, both, truth


@cache
def of_planted(i: int) -> tuple[SemanticsResult, torch.Tensor]:
    """What is found of a plant, and the truth: two tests look at the same repetitions."""
    sets, attributes, truth = planted(i)
    return answer(sets, attributes, SEED.fold("plant shuffles", i)), truth


def test_a_planted_attribute_is_found_and_nothing_else_at_the_stated_rate() -> None:
    false_share, found_share, claimed, repeated = [], [], 0, []
    for i in range(REPETITIONS):
        result, truth = of_planted(i)
        found, both = result.found["a"]
        false_share.append(float((found & ~truth).sum()) / max(1, int(found.sum())))
        found_share.append(float((found & truth).sum() / truth.sum()))
        repeated.append(float((both & truth).sum() / (found & truth).sum().clamp(min=1)))
        claimed += result.claims()[0].verdict == "supported"
    assert sum(found_share) / REPETITIONS > 0.95
    assert sum(false_share) / REPETITIONS <= RATE
    assert sum(repeated) / REPETITIONS > 0.9
    assert claimed >= 98


def test_without_a_plant_no_more_is_found_than_the_rate_allows() -> None:
    """With nothing to be found every finding is false: the share of draws with any is the rate. The first claim is not supported."""
    any_found = alarms = 0
    small = []
    for i in range(DRAWS):
        key = SEED.fold("null", i)
        result = answer({"a": influences(key, points=4)}, noisy(key), key)
        any_found += bool(result.found["a"][0].any())
        alarms += result.claims()[0].verdict == "supported"
        small.append(result.chance("a"))
    assert any_found <= ALARMS
    assert alarms <= ALARMS
    # The permutation p-value is exact: it lies below 5 % in at most 5 % of the draws.
    assert sum(p <= 0.05 for p in small) <= ALARMS


def with_words(key: Key, attributes: Attributes, share: float, points: int) -> torch.Tensor:
    """Influences of points of which a share help the images of a word of their own."""
    effect = influences(key, points)
    has = attributes.has().float()
    own = key.fold("which").integers(has.shape[1], effect.shape[1])
    strong = (key.fold("whether").uniform(effect.shape[1]) < share).float()
    effect += 4.0 * strong[:, None] * has[:, own].T
    return effect


def test_real_points_in_a_sets_place_are_no_more_semantic_than_real_points() -> None:
    alarms = 0
    for i in range(DRAWS):
        key = SEED.fold("real null", i)
        attributes = noisy(key)
        sets = {name: with_words(key.fold(name), attributes, 0.5, 4) for name in ("a", RANDOM)}
        claim = answer(sets, attributes, key, shuffles=0).claims()[1]  # it looks at none
        assert claim.name == "more semantics than real points"
        alarms += claim.verdict == "supported"
    assert alarms <= ALARMS


def test_points_that_help_images_of_a_word_are_told_from_real_ones() -> None:
    supported = 0
    for i in range(20):
        key = SEED.fold("real plant", i)
        attributes = noisy(key)
        sets = {"a": with_words(key, attributes, 1.0, POINTS), RANDOM: influences(key.fold("real"))}
        supported += answer(sets, attributes, key, shuffles=0).claims()[1].verdict == "supported"
    assert supported == 20


def test_intervals_of_lifts_hold_the_truth_after_selection() -> None:
    """Of the findings' lifts at most 5 % miss the true one, on average over repetitions (false coverage)."""
    missed, true_lift = [], _true_lifts()
    for i in range(REPETITIONS):
        result, truth = of_planted(i)
        found, _ = result.found["a"]
        # What a list of the 15 largest of 45 holds on average, over many draws of the noise.
        wrong = 0
        for point, word in found.nonzero().tolist():
            lift = result.lift("a", point, word)
            true = true_lift[result.words[word][1]] if truth[point, word] else 1.0
            wrong += not lift.low <= true <= lift.high
        missed.append(wrong / max(1, int(found.sum())))
    assert sum(missed) / REPETITIONS <= 0.05


def _true_lifts() -> dict[str, float]:
    shares: dict[str, list[float]] = {"coloured": [], "plain": []}
    for i in range(REPETITIONS, 4 * REPETITIONS):
        sets, attributes, truth = planted(i)
        classes = torch.arange(CLASSES).repeat_interleave(IMAGES)
        labels = torch.arange(CLASSES).repeat_interleave(POINTS)
        lists = most_helped(sets["a"].mean(0), labels, classes, TOP)
        for point, word in truth.nonzero().tolist():
            has = attributes.has()[:, word]
            shares[attributes.each[word][1]].append(
                float(has[lists[point]].double().mean()) * IMAGES / int(has[:IMAGES].sum())
            )
    return {name: sum(values) / len(values) for name, values in shares.items()}


# End to end, on real digits with tiny networks.

NET = ConvNet(depth=2, width=8)
PER_CLASS = 2


def with_corner(data: Dataset, key: Key, share: float = 0.5) -> tuple[Dataset, torch.Tensor]:
    """Digits in three channels, a red corner on half of the first class's; and which have it."""
    images = data.images.expand(-1, 3, -1, -1).clone() if data.shape[0] == 1 else data.images.clone()
    marked = torch.zeros(len(data), dtype=torch.bool)
    members = data.by_class[0]
    marked[members[key.permutation(len(members))[: round(share * len(members))]]] = True
    images[marked, :, :3, :3] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    return Dataset(images, data.labels, data.classes, data.space), marked


@pytest.fixture(scope="module")
def cornered(digits: Splits) -> tuple[Splits, DistilledDataset, torch.Tensor]:
    """Two classes of digits with the plant, two points a class of which one of the first class's has the corner; and which test images have it."""

    def two(data: Dataset) -> Dataset:
        pixels = data.to_space(Pixel())
        kept = (data.labels.hard() < 2).nonzero()[:, 0]
        return Dataset(pixels.images[kept], Hard(data.labels.hard()[kept]), ("0", "1"), Pixel())

    key = SEED.fold("corner")
    parts = [with_corner(two(getattr(digits, name)), key.fold(name)) for name in ("train", "val", "test")]
    real = Splits(*(data for data, _ in parts))
    train, marked = parts[0]
    images = []
    for members in train.by_class:
        with_it, without = members[marked[members]], members[~marked[members]]
        for own in (with_it, without) if len(with_it) else (without[::2], without[1::2]):
            images.append(train.images[own].mean(0))
    labels = torch.arange(2).repeat_interleave(PER_CLASS)
    return (
        real,
        DistilledDataset({"images": torch.stack(images)}, Hard(labels), real.train.classes, Pixel()),
        parts[2][1],
    )


def test_the_corner_is_found_end_to_end(
    cornered: tuple[Splits, DistilledDataset, torch.Tensor], tmp_path: Path
) -> None:
    """By real networks and a file of attributes, beside four attributes of no meaning that are drawn 20 times."""
    real, distilled, marked = cornered
    sets = Sets({"a": (distilled,)}, {RANDOM: (subset(real, SEED.fold("real"), PER_CLASS),)})
    runs, path = Runs(Plan(chunk=20)), tmp_path / "attributes.csv"
    semantics = Semantics(NET, inits=4, source=Labels(str(path)), top=15, shuffles=200)
    truth, false_share = {(0, "corner", "red"), (1, "corner", "plain")}, []
    for draw in range(20):
        other = SEED.fold("other", draw).integers(3, len(real.test), 4).tolist()
        rows = [
            [name, "red" if mark else "plain", *map(str, numbers)]
            for name, mark, numbers in zip(fingerprints(real.test), marked.tolist(), other, strict=True)
        ]
        head = ["fingerprint", "corner", *(f"other {a}" for a in range(4))]
        path.write_text("\n".join(",".join(row) for row in [head, *rows]), encoding="utf-8")
        result = semantics(sets, real, runs, key=SEED)
        found, both = result.found["a"]
        names = {(point, *result.words[word]) for point, word in found.nonzero().tolist()}
        assert truth <= names
        false_share.append(len(names - truth) / len(names))
        assert both.sum() >= 2
        assert result.chance("a") < 0.02
        assert {c.name: c.verdict for c in result.claims()}["semantics beyond class"] == "supported"
    assert sum(false_share) / len(false_share) <= RATE
    assert set(runs.trained.values()) == {1}


def test_classes_without_enough_test_images_are_named(digits: Splits) -> None:
    sets = Sets({"a": (subset(digits, SEED),)})
    with pytest.raises(
        UserError,
        match=r"class '\d' has 44 test images, too few to tell 30 from the rest.*set top to at most 22",
    ):
        Semantics(NET, Recipe(steps=1), top=30)(sets, digits, Runs(Plan()), key=SEED)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rate": 0.0}, "semantics: rate is a false discovery rate; got 0.0; expected 0 to 0.5"),
        ({"inits": 1}, "semantics: inits must be at least 2"),
        ({"top": 0}, "semantics: top must be at least 1"),
        ({"shuffles": 10}, "semantics: shuffles must be at least 100"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(Semantics(), **settings)


def test_a_source_is_set_by_name_with_settings_of_its_own() -> None:
    assert override(Semantics(), ["source=labels(path=attributes.csv)"]).source == Labels("attributes.csv")
    assert override(Semantics(), ["source=vision", "source.measures=slant, stroke_width"]).source == Vision(
        ("slant", "stroke_width")
    )
    several = override(
        Semantics(), ["source=clip(model=here batch=8)", "source.prompts=a (a {} b): x, y|z w"]
    )
    assert several.source == Clip("here", "a (a {} b): x, y|z w", 8)
    with pytest.raises(UserError, match=r"unknown attribute source 'vison'.*Did you mean 'vision'"):
        override(Semantics(), ["source=vison"])
