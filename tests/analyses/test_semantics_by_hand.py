"""Semantics against a slow twin of the whole analysis, in plain Python, and a result whose figures are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import beta, norm, t

from distillens.analyses.pointwise import _shuffled_words
from distillens.analyses.pointwise import semantics as module
from distillens.analyses.pointwise._detectable import detectable
from distillens.analyses.pointwise._enrichment import Enrichment
from distillens.analyses.pointwise.semantics import LEAST, SHOWN, STRONGEST, Semantics, SemanticsResult
from distillens.attributes import Attributes
from distillens.core.contracts import RANDOM, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.result import Estimate
from distillens.core.rng import Key
from tests.analyses.by_hand import subset

SEED = Key(20261126, ("semantics by hand",))

# The slow twin: images and words one by one.

Found = set[tuple[int, int]]  # (point, word)


def tail(count: int, size: int, base: int, top: int) -> float:
    """How likely ``top`` of ``size`` images have ``count`` or more of the ``base`` that have a word."""
    ways = sum(math.comb(base, i) * math.comb(size - base, top - i) for i in range(count, top + 1))
    return ways / math.comb(size, top)


@dataclass
class Twin:
    """What is found for lists of images [halves][points], given which images have each word [words]."""

    labels: list[int]
    classes: list[int]
    top: int
    rate: float

    def lists(self, effect: torch.Tensor) -> list[list[set[int]]]:
        """The most helped images of each point, by all initialisations and by every other one."""
        found = []
        for inits in (range(len(effect)), range(0, len(effect), 2), range(1, len(effect), 2)):
            lists = []
            for j, c in enumerate(self.labels):
                own = [i for i, one in enumerate(self.classes) if one == c]
                own.sort(key=lambda i: -sum(float(effect[s, j, i]) for s in inits))
                lists.append(set(own[: self.top]))
            found.append(lists)
        return found

    def counts(self, lists: list[list[set[int]]], having: list[set[int]]) -> list[list[list[int]]]:
        return [[[len(one & has) for has in having] for one in half] for half in lists]

    def tails(self, counts: list[list[int]], having: list[set[int]]) -> dict[tuple[int, int], float]:
        """The tails of all points and words that could be found on the fullest list."""
        found = {}
        for j, c in enumerate(self.labels):
            own = {i for i, one in enumerate(self.classes) if one == c}
            for w, has in enumerate(having):
                base = len(own & has)
                if base and tail(min(base, self.top), len(own), base, self.top) <= self.rate:
                    found[j, w] = tail(counts[j][w], len(own), base, self.top)
        return found

    def found(self, lists: list[list[set[int]]], having: list[set[int]]) -> tuple[Found, Found]:
        """Findings, and those that both halves have too."""
        of_all, first, second = (self.tails(part, having) for part in self.counts(lists, having))
        ordered = sorted(of_all, key=of_all.__getitem__)
        most = max(
            (i for i, at in enumerate(ordered, 1) if of_all[at] <= self.rate * i / len(ordered)), default=0
        )
        findings = set(ordered[:most])
        return findings, {at for at in findings if first[at] <= self.rate and second[at] <= self.rate}


@dataclass(frozen=True)
class Given:
    """A source that knows the words of the test images, and is told where measures are cut."""

    words: Any
    values: torch.Tensor
    real: Splits

    def __call__(self, data: Dataset, fit: Dataset) -> Attributes:
        assert data is self.real.test
        assert fit is self.real.val
        return Attributes(self.words, self.values)


class Trained:
    """A store whose populations are influences, set by set."""

    def __init__(self, effects: Sequence[torch.Tensor]) -> None:
        self.effects = list(effects)

    def make(self, requests: Sequence[Any]) -> None:
        assert len(requests) == len(self.effects)

    def get(self, _: Any) -> tuple[torch.Tensor]:
        return (self.effects.pop(0),)


def test_the_analysis_is_that_of_a_slow_twin(planted: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets, an attribute that is not always known, a word of one image, words that go together."""
    planted = replace(planted, val=planted.val.take(torch.arange(100)))  # of other sizes than the test images
    n, inits, top, rate, shuffles = len(planted.test), 3, 9, 0.2, 100
    helps = SEED.fold("shape").integers(3, n)
    values = torch.stack(
        [SEED.fold("size").integers(2, n), helps, helps, SEED.fold("light").integers(2, n)], 1
    )
    values[::5, 0] = -1
    values[:, 3] = 0
    values[planted.test.by_class[1][:1], 3] = 1
    words = {"size": ("x", "y"), "shape": ("u", "v", "w"), "form": ("p", "q", "r"), "light": ("on", "off")}
    real = Sets({"a": (subset(planted, SEED.fold("a"), 3),)}, {RANDOM: (subset(planted, SEED, 3),)})
    sets = {name: real.everything()[name][0] for name in ("a", RANDOM)}
    effects = {}
    for name, one in sets.items():
        noise = SEED.fold(name).normal(inits, len(one), n) + SEED.fold(name, "own").normal(len(one), n)
        strong = torch.arange(len(one)) % 3 < (2 if name == "a" else 1)
        plant = 4.0 * strong[:, None] * (helps == torch.arange(len(one))[:, None] % 3)
        plant = plant.expand(inits, -1, -1).clone()
        plant[1, 0] = 0  # the second half does not have the first point's
        effects[name] = noise + plant

    def moved(population: torch.Tensor, count: int, data: Dataset) -> torch.Tensor:
        assert count == inits
        assert data is planted.test
        return population

    monkeypatch.setattr(module, "moved_losses", moved)
    monkeypatch.setattr(_shuffled_words, "CELLS", 2000)  # so that shuffles are counted a few at a time
    asked = Semantics(
        inits=inits, source=Given(words, values, planted), top=top, rate=rate, shuffles=shuffles
    )
    store: Any = Trained(list(effects.values()))
    result = asked(real, planted, store, key=SEED)

    assert result.distilled == ("a",)
    assert result.words == tuple((name, word) for name, many in words.items() for word in many)
    assert result.known == (0.8, 1.0, 1.0, 1.0)
    classes = planted.test.labels.hard().tolist()
    places = [(a, w) for a, many in enumerate(words.values()) for w in range(len(many))]
    having = [{i for i in range(n) if int(values[i, a]) == w} for a, w in places]
    for c in range(3):
        own = {i for i in range(n) if classes[i] == c}
        assert int(result.sizes[c]) == len(own)
        assert result.base[c].tolist() == [len(own & has) for has in having]
    pixels = planted.test.pixels()
    for name, one in sets.items():
        twin = Twin(one.labels.hard().tolist(), classes, top, rate)
        lists = twin.lists(effects[name])
        counts = twin.counts(lists, having)
        of_all, both = twin.found(lists, having)
        assert result.counts[name].tolist() == counts
        assert {tuple(at) for at in result.found[name][0].nonzero().tolist()} == of_all
        assert {tuple(at) for at in result.found[name][1].nonzero().tolist()} == both
        assert result.labels[name].tolist() == twin.labels
        tested = twin.tails(counts[0], having)
        assert {tuple(at) for at in result.tests[name].tested.nonzero().tolist()} == set(tested)
        assert len(result.shuffled[name]) == shuffles
        # The null: each image takes the words of another of its class, the same for all points, words and halves.
        orders = {c: SEED.fold("shuffle", c).uniform(shuffles, classes.count(c)).argsort(1) for c in range(3)}
        for s in range(shuffles):
            source = {}
            for c in range(3):
                own = [i for i in range(n) if classes[i] == c]
                source |= {i: own[o] for i, o in zip(own, orders[c][s].tolist(), strict=True)}
            moved_words = [{i for i in range(n) if source[i] in has} for has in having]
            null, again = twin.found(lists, moved_words)
            assert result.shuffled[name][s].tolist() == [len(null), len({j for j, _ in null}), len(again)]
        # What is shown: the points with the smallest tails, and the images that they help most, as pixels.
        smallest = [min(value for (j, _), value in tested.items() if j == i) for i in range(len(one))]
        strongest = result.strongest[name].tolist()
        assert strongest == sorted(range(len(one)), key=smallest.__getitem__)[:STRONGEST]
        for row, j in enumerate(strongest):
            assert torch.equal(result.points[name][row], one.dataset().pixels()[j])
            own = [i for i in range(n) if classes[i] == twin.labels[j]]
            own.sort(key=lambda i: -float(effects[name][:, j, i].mean()))
            for image, i in zip(result.helped[name][row], own[: min(SHOWN, top)], strict=True):
                assert torch.allclose(image, pixels[i])
    assert len(result.found["a"][0].nonzero()) > len(result.found[RANDOM][0].nonzero()) > 0
    assert 0 < int(result.found["a"][1].sum()) < int(result.found["a"][0].sum())
    assert int(result.shuffled["a"].min()) < int(result.shuffled["a"].max())


def test_points_are_ordered_by_words_that_could_be_found() -> None:
    """One image of ten has the first word: on a list of three its tail is 0.3 at least, and is not looked at."""
    tests = Enrichment.of(
        torch.tensor([10]), torch.tensor([[1, 3]]), torch.zeros(2, dtype=torch.long), 3, 0.05
    )
    assert tests.tested.tolist() == [[False, True]] * 2
    counts = torch.tensor([[1, 0], [0, 1]])
    assert tests.tail(counts).tolist() == [
        pytest.approx([tail(a, 10, 1, 3), tail(b, 10, 3, 3)]) for a, b in counts.tolist()
    ]
    assert tests.strongest(counts).tolist() == [1, 0]


# A result whose figures are known: of ten most helped images ten, seven or an ordinary count have a word.

TOP, RATE = 10, 0.05
SIZES, BASE = [40, 60, 50], [[10, 30, 20, 20], [20, 40, 30, 30], [10, 40, 25, 25]]


@pytest.fixture
def known() -> SemanticsResult:
    """Four of nine points of ``a`` have a finding, one of them two, and one of the random subset's."""
    labels = torch.arange(3).repeat_interleave(3)
    ordinary = torch.tensor([[2, 8, 5, 5], [3, 7, 5, 5], [2, 8, 5, 5]])[labels]
    own, real = (torch.stack([ordinary] * 3) for _ in range(2))
    own[:, 0, 0] = 10
    own[:, 0, 2] = torch.tensor([10, 10, 6])  # the second half does not have it
    own[:, 1, 0] = 10
    own[:, 4, 2] = 10
    own[:, 6, 0] = torch.tensor([10, 4, 10])
    real[:, 8, 3] = 10
    null = torch.zeros(200, 3, dtype=torch.int32)
    null[:40, :2], null[:8, 0], null[:4, 1], null[0] = 1, 5, 4, torch.tensor([9, 6, 2])
    picture = torch.zeros(1, 1, 4, 4)
    return SemanticsResult(
        distilled=("a",),
        classes=("cat", "dog", "hen"),
        source="made",
        words=(("size", "small"), ("size", "big"), ("light", "on"), ("light", "off")),
        sizes=torch.tensor(SIZES),
        base=torch.tensor(BASE),
        known=(0.9, 1.0),
        top=TOP,
        rate=RATE,
        counts={"a": own, RANDOM: real},
        shuffled={"a": null, RANDOM: null},
        labels={"a": labels, RANDOM: labels},
        strongest=dict.fromkeys(("a", RANDOM), torch.tensor([4])),
        points=dict.fromkeys(("a", RANDOM), picture),
        helped=dict.fromkeys(("a", RANDOM), picture[None]),
    )


def exact(count: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's interval, by the beta distribution."""
    low = float(beta.ppf(0.025, count, n - count + 1)) if count else 0.0
    return low, float(beta.ppf(0.975, count + 1, n - count)) if count < n else 1.0


def wilson(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    z, p = float(norm.ppf(0.5 + level / 2)), count / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def same(found: Estimate | None, value: float, low: float, high: float, n: int, unit: str) -> None:
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high), abs=1e-9)
    assert (found.n, found.unit) == (n, unit)


def test_findings_points_and_their_chance(known: SemanticsResult) -> None:
    of_all, both = ({tuple(at) for at in part.nonzero().tolist()} for part in known.found["a"])
    assert of_all == {(0, 0), (0, 2), (1, 0), (4, 2), (6, 0)}
    assert both == {(0, 0), (1, 0), (4, 2)}
    assert (known.carriers("a"), known.carriers(RANDOM)) == (4, 1)
    assert known.chance("a") == (1 + 4) / 201  # as many or more, itself among them
    assert known.chance(RANDOM) == (1 + 40) / 201
    same(known.repeats("a"), 3 / 5, *exact(3, 5), 5, "finding")


def test_points_beyond_shuffled_have_the_wider_of_two_intervals(known: SemanticsResult) -> None:
    """200 shuffles: 160 without a point, 36 with one, three with four, one with six; a fortieth of them are five."""
    mean = (36 + 3 * 4 + 6) / 200 / 9
    low, high = exact(4, 9)
    assert low - mean < 4 / 9 - 1 / 9  # the upper 2.5 % of the shuffles begin at one point
    same(known.beyond_shuffled("a"), 4 / 9 - mean, low - mean, high - mean, 9, "distilled point")
    # Where a twenty-fifth of the shuffles give all points, or none, chance is the wider one.
    for few, rest in ((9, 0), (0, 9)):
        null = known.shuffled["a"].clone()
        null[:8, 1], null[8:, 1] = few, rest
        mean = (8 * few + 192 * rest) / 200 / 9
        value = replace(known, shuffled={"a": null, RANDOM: null}).beyond_shuffled("a")
        ends = (4 / 9 - 1, high - mean) if few else (low - mean, 4 / 9)
        same(value, 4 / 9 - mean, *ends, 9, "distilled point")


def test_points_beyond_real_ones_have_the_wider_of_two_intervals(known: SemanticsResult) -> None:
    """Shares by class: 2/3, 1/3 and 1/3 of the set's, none, none and 1/3 of the real ones'."""
    differences = [2 / 3, 1 / 3, 0.0]
    value = sum(differences) / 3
    spread = math.sqrt(sum((d - value) ** 2 for d in differences) / 2 / 3)
    half = float(t.ppf(0.975, 2)) * spread
    (own_low, own_high), (real_low, real_high) = wilson(4, 9), wilson(1, 9)
    low = value - math.hypot(4 / 9 - own_low, real_high - 1 / 9)
    high = value + math.hypot(own_high - 4 / 9, 1 / 9 - real_low)
    assert half > value - low  # here the classes differ by more
    same(known.beyond_real("a"), value, value - half, max(high, value + half), 9, "distilled point")
    # The real points' labels are their own: turned round, with one carrier of another class, all classes differ alike.
    counts = {"a": known.counts["a"], RANDOM: known.counts["a"].flip(1)}
    labels = {"a": known.labels["a"], RANDOM: known.labels["a"].flip(0)}
    turned = replace(known, counts=counts, labels=labels)
    low = -math.hypot(4 / 9 - own_low, own_high - 4 / 9)
    same(turned.beyond_real("a"), 0.0, low, -low, 9, "distilled point")
    alone = replace(known, counts={"a": known.counts["a"]}, labels={"a": known.labels["a"]})
    assert alone.beyond_real("a") is None


def test_a_lift_is_a_ratio_of_shares_whose_level_is_raised_for_the_choice(known: SemanticsResult) -> None:
    tested = int(known.tests["a"].tested.sum())
    for point, word, base in ((0, 2, 20 / 40), (4, 2, 30 / 60), (6, 0, 10 / 50), (7, 1, 40 / 50)):
        count = int(known.counts["a"][0, point, word])
        found = known.lift("a", point, word)
        level = 1 - RATE * 5 / tested
        low, high = wilson(count, TOP, level)
        same(found, count / TOP / base, low / base, high / base, TOP, "image among the most helped")
        assert found.level == pytest.approx(level)


def test_claims_say_what_they_contrast(known: SemanticsResult) -> None:
    beyond, real = known.claims()
    assert (beyond.name, real.name) == ("semantics beyond class", "more semantics than real points")
    assert (beyond.subject, real.subject) == ("a", "a")
    assert (beyond.direction, real.direction) == ("greater", "greater")
    assert (beyond.smallest_effect, real.smallest_effect) == (LEAST, 0.0) == (0.05, 0.0)
    assert beyond.estimate == known.beyond_shuffled("a")
    assert real.estimate == known.beyond_real("a")
    assert beyond.source == "paper, section 5"
    assert "nothing to do with the attributes" in beyond.null
    assert "coloured corner" in beyond.plant
    assert "same influences" in real.null
    assert "each help images of one word" in real.plant
    assert known.headline() == {
        "a: points with semantics beyond shuffled": known.beyond_shuffled("a"),
        f"{RANDOM}: points with semantics beyond shuffled": known.beyond_shuffled(RANDOM),
        "a: points with semantics beyond real points": known.beyond_real("a"),
    }


def test_tables_hold_the_same_figures(known: SemanticsResult) -> None:
    counted, listed, of_random, power, attributes = known.tables()
    tested = int(known.tests["a"].tested.sum())
    assert counted.rows[0] == (
        *("a", 9, tested, 5, "0.38 (0 to 5)", 4, "0.27 (0 to 1)", "0.0249"),
        *(known.beyond_shuffled("a"), known.beyond_real("a"), known.repeats("a"), "0.01 (0 to 0)"),
    )
    assert counted.rows[1][9] == "-"  # real points are not beyond themselves
    assert len(counted.columns) == len(counted.rows[0])
    # The strongest first: the word of a quarter of its class, then of a fifth ...
    tails = {
        (j, w): tail(10, SIZES[c], BASE[c][w], TOP)
        for j, c, w in ((0, 0, 0), (0, 0, 2), (1, 0, 0), (4, 1, 2), (6, 2, 0))
    }
    order = sorted(tails, key=tails.__getitem__)
    assert [row[0] for row in listed.rows] == [j for j, _ in order]
    by_point = {(row[0], row[2]): row for row in listed.rows}
    assert by_point[4, "light: on"] == (
        *(4, "dog", "light: on", "10 of 10", "30 of 60", known.lift("a", 4, 2), f"{tails[4, 2]:.2g}", "yes"),
    )
    assert by_point[6, "size: small"][3:5] == ("10 of 10", "10 of 50")
    assert by_point[6, "size: small"][-1] == by_point[0, "light: on"][-1] == "no"
    assert of_random.title.startswith(RANDOM)
    assert [row[:3] for row in of_random.rows] == [(8, "hen", "light: off")]
    assert power.title == f"The smallest lift found with probability 0.8: 10 of 50 images, {tested} tests"
    for row, share in zip(power.rows, (0.05, 0.1, 0.2, 1 / 3, 0.5), strict=True):
        alone, among = (detectable(50, share, TOP, threshold) for threshold in (RATE / tested, RATE))
        assert row == (
            f"{share:.2f}",
            *(f"{lift:.2f}" if math.isfinite(lift) else "none" for lift in (alone, among)),
            f"{1 / share:.1f}",
        )
    assert attributes.rows == (
        ("size", "small 0.27, big 0.73", "0.90"),
        ("light", "on 0.50, off 0.50", "1.00"),
    )


def drawn(draw: Callable[[Axes], None]) -> Axes:
    figure = Figure()
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    draw(ax)
    return ax


def test_figures_show_the_same_figures(known: SemanticsResult) -> None:
    shares, attributes, _ = known.panels().values()
    ax = drawn(shares)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([4 / 9, 1 / 9])
    assert [text.get_text() for text in ax.texts] == ["p = 0.025", "p = 0.2"]
    for bars in ax.collections:  # 95 % of the shuffles
        assert [tuple(segment[:, 1]) for segment in bars.get_segments()] == [pytest.approx((0, 1 / 9))]
    ax = drawn(attributes)
    assert ax.images[0].get_array().tolist() == [pytest.approx([3 / 9, 2 / 9]), pytest.approx([0, 1 / 9])]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["size", "light"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", RANDOM]


def test_the_strongest_points_stand_beside_the_images_that_they_help(known: SemanticsResult) -> None:
    """Levels of grey say which image is where: a row a point, a gap of half an image, its images in order."""
    levels = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    tiles = levels[..., None, None, None].expand(2, 3, 1, 4, 4)
    shown = {name: torch.tensor([4, 3]) for name in known.labels}
    result = replace(
        known,
        strongest=shown,
        points=dict.fromkeys(shown, tiles[:, 0]),
        helped=dict.fromkeys(shown, tiles[:, 1:]),
    )
    ax = drawn(list(result.panels().values())[2])
    canvas = torch.tensor(ax.images[0].get_array())
    for row, across in enumerate(levels.tolist()):
        for left, level in zip((0, 7, 12), across, strict=True):
            assert canvas[5 * row : 5 * row + 4, left : left + 4].unique().tolist() == pytest.approx([level])
    strong, weak = (text.get_text().splitlines() for text in ax.texts)
    assert strong == ["point 4, dog", "light: on  x2.0, repeats"]
    assert weak[0] == "point 3, dog"
    assert weak[1].endswith("(no finding)")


def test_settings_go_with_the_size_of_the_data(digits: Splits, like_cifar: Dataset) -> None:
    assert (Semantics.defaults(digits.train).top, Semantics.defaults(like_cifar).top) == (15, 50)
    assert (Semantics.defaults(like_cifar).inits, Semantics.as_published(like_cifar).inits) == (3, 2)


def test_more_draws_than_there_are_images_with_the_word_are_no_lift() -> None:
    """Two of 45 images have the word: as independent draws the share that is found four times in five would need three."""
    assert detectable(45, 0.05, 15, 0.2) == math.inf
    assert detectable(45, 0.5, 15, 0.2) < 2
