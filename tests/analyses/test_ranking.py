"""DD-Ranking's scores: the formulas in plain Python, nulls and plants of the claims, and whose labels and rates are used."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from scipy.stats import t

from distillens import pipeline
from distillens.analyses.behaviour.ranking import Ranking, RankingResult, score
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Logits
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from tests.analyses.by_hand import class_means, subsets_at

DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SEED = Key(20251125)
KEY = Key(98, ("ranking",))
SHORT = Recipe(steps=40)
TINY = Ranking(ConvNet(2, 8), SHORT, (0.01, 0.1), augment="crop_scale")


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "ranking.safetensors")[0]


def result(
    own: torch.Tensor,
    random: torch.Tensor,
    augmented: torch.Tensor,
    random_augmented: torch.Tensor,
    hard: torch.Tensor | None = None,
    full: torch.Tensor | None = None,
) -> RankingResult:
    """Hand-made accuracies [replicates, networks] of one set and the random subset beside it."""
    names = ("dm", "random_subset")
    return RankingResult(
        ("dm",),
        names,
        {"dm": own, "random_subset": random},
        {"dm": own if hard is None else hard, "random_subset": random},
        {"dm": augmented, "random_subset": random_augmented},
        dict.fromkeys(names, random),
        dict.fromkeys(names, random_augmented),
        torch.ones(len(own), 1) if full is None else full,
        dict.fromkeys(names, ()),
        (),
        (),
        0.5,
        0.5,
    )


def subsets(real: Splits, name: str, count: int, ipc: int = 1) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


# ---- the formulas ----

OWN = [[0.71, 0.75], [0.64, 0.66], [0.70, 0.69]]
HARD = [[0.61, 0.63], [0.58, 0.52], [0.66, 0.60]]
AUGMENTED = [[0.72, 0.70], [0.69, 0.65], [0.73, 0.70]]
RANDOM = [[0.60, 0.58], [0.62, 0.68], [0.55, 0.57]]
RANDOM_AUGMENTED = [[0.65, 0.66], [0.67, 0.60], [0.61, 0.64]]
FULL = [[0.95], [0.93], [0.96]]


def hand_made(replicates: int = 3) -> RankingResult:
    own, random, augmented, random_augmented, hard, full = (
        torch.tensor(values[:replicates], dtype=torch.float64)
        for values in (OWN, RANDOM, AUGMENTED, RANDOM_AUGMENTED, HARD, FULL)
    )
    return result(own, random, augmented, random_augmented, hard, full)


def interval(values: list[float], level: float = 0.95) -> tuple[float, float, float]:
    half = float(t.ppf(0.5 + level / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def plain_score(x: float) -> float:
    return (math.e**x - 1 / math.e) / (math.e - 1 / math.e)


@pytest.mark.parametrize("w", [0.0, 0.3, 0.5, 1.0])
def test_scores_are_those_of_the_formulas(w: float) -> None:
    hlr, ior, lrs, ars = [], [], [], []
    for r in range(3):
        syn, hard, aug, rdm, rdm_aug = (mean(x[r]) for x in (OWN, HARD, AUGMENTED, RANDOM, RANDOM_AUGMENTED))
        hlr.append(FULL[r][0] - hard)
        ior.append(syn - rdm)
        lrs.append(plain_score(w * ior[-1] - (1 - w) * hlr[-1]))
        ars.append(plain_score(w * (aug - rdm_aug) + (1 - w) * (syn - rdm)))
    found = hand_made()
    for estimate, values in (
        (found.hlr("dm"), hlr),
        (found.ior("dm"), ior),
        (found.lrs("dm", w), lrs),
        (found.ars("dm", w), ars),
    ):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(interval(values))
        assert (estimate.n, estimate.unit) == (3, "replicate")
    if w == 0.5:
        assert found.headline() == {"dm, LRS": found.lrs("dm", w), "dm, ARS": found.ars("dm", w)}


def test_the_score_of_a_replicate_comes_before_the_mean() -> None:
    ior = [mean(OWN[r]) - mean(RANDOM[r]) for r in range(3)]
    estimate = hand_made().lrs("dm", 1.0)
    assert estimate.value == pytest.approx(mean(plain_score(x) for x in ior), abs=1e-12)
    assert estimate.value > plain_score(mean(ior)) + 1e-5, "the normalisation is convex"


def test_of_one_replicate_the_networks_are_the_units() -> None:
    estimate = hand_made(1).lrs("dm")
    values = [
        plain_score(0.5 * (OWN[0][j] - RANDOM[0][j]) - 0.5 * (FULL[0][0] - HARD[0][j])) for j in range(2)
    ]
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(interval(values))
    assert estimate.unit == NETWORK


def test_scores_stay_in_the_unit_interval_where_percentages_do_not() -> None:
    """The defect of DD-Ranking 0.2.0: with HLR 11 and IOR -3 in percent its score is -0.156."""
    assert (score(-1), score(0), score(1)) == pytest.approx((0, 0.26894, 1), abs=1e-5)
    for own in (0.0, 1.0):
        for other in (0.0, 1.0):
            for full in (0.0, 1.0):
                a, b, f = (torch.full((2, 1), x) for x in (own, other, full))
                found = result(a, b, a, b, full=f)
                for x in (0.0, 0.5, 1.0):
                    assert 0 <= found.lrs("dm", x).value <= 1
                    assert 0 <= found.ars("dm", x).value <= 1
    ours = result(
        *(torch.full((2, 1), x) for x in (0.57, 0.60, 0.57, 0.60)),
        hard=torch.full((2, 1), 0.80),
        full=torch.full((2, 1), 0.91),
    )
    assert ours.lrs("dm").value == pytest.approx(plain_score(0.5 * -0.03 - 0.5 * 0.11), abs=1e-6)
    assert plain_score(0.5 * -3 - 0.5 * 11) == pytest.approx(-0.156, abs=5e-4)


def several() -> RankingResult:
    """Three sets: the first clearly ahead, the others alike; w turns the second and third around."""
    base = torch.tensor([[0.50], [0.52], [0.49], [0.51], [0.50]], dtype=torch.float64)
    noise = torch.tensor([[0.01], [-0.01], [0.0], [0.02], [-0.02]], dtype=torch.float64)
    own = {"a": base + 0.3, "b": base + 0.02 + noise, "c": base + 0.01, "random_subset": base}
    hard = {"a": base + 0.3, "b": base, "c": base + 0.01, "random_subset": base}
    return RankingResult(
        ("c", "b", "a"),
        ("c", "b", "a", "random_subset"),
        own,
        hard,
        own,
        dict.fromkeys(own, base),
        dict.fromkeys(own, base),
        base + 0.4,
        dict.fromkeys(own, ()),
        ("b",),
        ("c",),
        0.5,
        0.5,
    )


def test_the_order_says_what_is_separated_for_all_pairs_together() -> None:
    found = several()
    assert found.order(1.0) == ["a", "b", "c"] and found.order(0.0) == ["a", "c", "b"]
    apart = found.separated()
    for (better, other), separate in apart.items():
        differences = [
            x - y for x, y in zip(found._lrs(better, 0.5)[0], found._lrs(other, 0.5)[0], strict=True)
        ]
        assert separate == (interval(differences, 1 - 0.05 / 3)[1] > 0)
    assert sum(apart.values()) == 2
    rows = {row[1]: row[3] for row in found.tables()[2].rows}
    assert set(str(rows["a"]).split(", ")) == {"b", "c"}
    assert [row for name, row in rows.items() if name != "a"] == ["none", "none"]
    notes = " ".join(found.notes())
    assert "Of 3 pairs of sets 2 are separated in LRS" in notes
    assert "The order depends on w: 2 different ones at five weights." in notes
    assert "b: soft labels." in notes and "c: ordered steps" in notes


def test_weights_move_the_scores_in_a_table() -> None:
    found = several()
    by_title = {table.title: table for table in found.tables()}
    lrs = by_title["LRS at other weights w of IOR against HLR"]
    assert lrs.columns == ("set", "w = 0", "w = 0.25", "w = 0.5", "w = 0.75", "w = 1")
    assert [row[0] for row in lrs.rows] == ["c", "b", "a"]
    assert lrs.rows[0][1] == found.lrs("c", 0.0) and lrs.rows[0][5] == found.lrs("c", 1.0)
    ars = by_title["ARS at other weights g of training with augmentation"]
    assert ars.rows[1][2] == found.ars("b", 0.25)


# ---- nulls and plants ----


@pytest.mark.parametrize("ipc", [1, 10])
@pytest.mark.parametrize("claim", [0, 1])
def test_a_second_random_subset_beats_random_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], ipc: int, claim: int
) -> None:
    own, augmented = bank[f"own.{ipc}"][:, None], bank[f"augmented.{ipc}"][:, None]
    alarms = 0
    for i in range(DRAWS):
        order = SEED.fold("null", ipc, i).permutation(len(own))
        first, second = order[:REPLICATES], order[REPLICATES : 2 * REPLICATES]
        found = result(own[first], own[second], augmented[first], augmented[second])
        alarms += found.claims()[claim].verdict == "supported"
    assert alarms <= ALARMS


def test_class_means_beat_random_with_and_without_augmentation(digits: Splits) -> None:
    sets = Sets({"means": (class_means(digits),) * 5}, {"random_subset": subsets(digits, "base", 5)})
    found = TINY(sets, digits, Runs(Plan()), key=KEY)
    assert [claim.verdict for claim in found.claims()] == ["supported", "supported"]
    assert [claim.name for claim in found.claims()] == [
        "beats random under its own labels",
        "beats random with augmentation",
    ]
    assert found.lrs("means").low > found.lrs("random_subset").value
    assert found.hlr("means").value > 0
    assert found.full.shape == (5, 1)


# ---- whose labels, whose rate ----


def test_hard_labels_own_labels_and_step_sizes_are_each_sets_own(digits: Splits) -> None:
    soft = Logits(5 * torch.eye(10) + Key(7).normal(10, 10))
    learned = replace(class_means(digits), labels=soft, recipe=Recipe(lr=0.123))
    (base,) = subsets(digits, "base", 1)
    asked = TINY._asked(Sets({"a": (learned,)}, {"random_subset": (base,)}), KEY)

    def of(way: str, name: str) -> list[tuple[str, float, str]]:
        return [(t.data.labels.kind, t.recipe.lr, t.recipe.augment) for t in asked[way, name][0]]

    assert of("own", "a") == [("logits", 0.123, "")]
    assert of("augmented", "a") == [("logits", 0.123, "crop_scale")]
    assert of("hard", "a") == [("hard", 0.01, ""), ("hard", 0.1, "")]
    assert of("own", "random_subset") == [("hard", 0.01, ""), ("hard", 0.1, "")]
    assert of("own, random", "a") == [("logits", 0.01, ""), ("logits", 0.1, "")]
    assert of("augmented, random", "a") == [("logits", 0.01, "crop_scale"), ("logits", 0.1, "crop_scale")]
    assert torch.equal(asked["hard", "a"][0][0].data.labels.hard(), soft.values.argmax(1))
    assert len({t.keys for each in asked.values() for many in each for t in many}) == 1, (
        "pairs share their keys"
    )


def test_random_images_borrow_labels_in_order_within_each_class(digits: Splits) -> None:
    shuffled = Key(8).permutation(20)
    values = (5 * torch.eye(10).repeat(2, 1) + 0.1 * Key(9).normal(20, 10))[shuffled]
    images = Key(9).fold("images").normal(20, 1, 8, 8)
    lender = DistilledDataset({"images": images}, Logits(values), digits.train.classes, digits.space)
    (base,) = subsets(digits, "base", 1, ipc=2)
    asked = TINY._asked(Sets({"a": (lender,)}, {"random_subset": (base,)}), KEY)
    data = asked["own, random", "a"][0][0].data
    assert torch.equal(data.images, base.dataset().images)
    (lent,) = data.labels.tensors().values()
    for i, c in enumerate(base.labels.hard().tolist()):
        offered = [row for row in values if int(row.argmax()) == c]
        place = base.labels.hard()[:i].tolist().count(c)
        assert torch.equal(lent[i], offered[place])
    one_class = replace(lender, labels=Logits(5 * torch.eye(10)[torch.zeros(20, dtype=torch.int64)]))
    without = TINY._asked(Sets({"a": (one_class,)}, {"random_subset": (base,)}), KEY)
    assert ("own, random", "a") not in without


def test_random_under_soft_labels_is_the_better_on_validation(digits: Splits) -> None:
    """Labels that say nothing do not help random images: their hard ones are taken."""
    flat = Logits(0.01 * torch.eye(10))
    sets = Sets(
        {"a": (replace(class_means(digits), labels=flat),)}, {"random_subset": subsets(digits, "base", 1)}
    )
    found = TINY(sets, digits, Runs(Plan()), key=KEY)
    assert torch.equal(found.random["a"], found.own["random_subset"])
    assert found.soft == ("a",)


def test_rates_are_chosen_on_validation_and_never_on_test(digits: Splits) -> None:
    runs = Runs(Plan())
    analysis = replace(TINY, rates=(1e-4, 0.1))
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    honest = analysis(sets, digits, runs, key=KEY)
    assert all("rate 0.1" in one for one in honest.chosen["a"])
    mixed = digits.test.labels.hard()[KEY.fold("shuffle").permutation(len(digits.test))]
    shuffled = Dataset(digits.test.images, Hard(mixed), digits.test.classes, digits.space)
    permuted = analysis(sets, Splits(digits.train, digits.val, shuffled), runs, key=KEY)
    assert permuted.chosen == honest.chosen
    assert permuted.own["a"].mean() < honest.own["a"].mean()


def test_every_set_and_the_full_data_see_the_same_grid(digits: Splits) -> None:
    sets = Sets({"a": subsets(digits, "a", 1)}, {"random_subset": subsets(digits, "base", 1)})
    rates: dict[str, set[float]] = {}
    for training in TINY.trainings(sets, digits, key=KEY):
        rates.setdefault(training.data.fingerprint, set()).add(training.recipe.lr)
    assert len(rates) == 3 and set(map(frozenset, rates.values())) == {frozenset({0.01, 0.1})}


def test_ordered_steps_are_replayed_and_named(digits: Splits) -> None:
    made = pipeline.distill(
        "wang2018", digits, ipc=1, settings=["steps=2", "net.width=8", "init=real", "distill_epochs=2"]
    )
    sets = Sets({"wang2018": (made,)}, {"random_subset": subsets(digits, "base", 1)})
    found = replace(TINY, recipe=Recipe(steps=5))(sets, digits, Runs(Plan()), key=KEY)
    assert torch.equal(found.own["wang2018"], found.augmented["wang2018"])
    assert any(note.startswith("wang2018: ordered steps") for note in found.notes())


# ---- messages ----


def test_what_it_cannot_do_is_told(digits: Splits) -> None:
    with pytest.raises(
        UserError, match="ranking needs a random subset beside the sets; add one as random_subset"
    ):
        TINY(Sets({"a": subsets(digits, "a", 1)}), digits, Runs(Plan()), key=KEY)
    with pytest.raises(UserError, match=r"ranking: w is a weight; got 1.5; expected 0 to 1"):
        replace(TINY, w=1.5)
    with pytest.raises(UserError, match=r"ranking: g is a weight; got -0.1; expected 0 to 1"):
        replace(TINY, g=-0.1)
    with pytest.raises(
        UserError, match="training with augmentation is set against training without; got augment=''"
    ):
        replace(TINY, augment="")
    with pytest.raises(
        UserError, match=r"got augment='crop_scale', recipe.augment='crop'; name the strategy in augment"
    ):
        replace(TINY, recipe=Recipe(augment="crop"))
