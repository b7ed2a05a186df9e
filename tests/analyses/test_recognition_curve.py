"""representativeness/recognition_curve: its figures against counting by hand, its claims' nulls and plants."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from distillens.analyses.representativeness._beside import (
    SEEN,
    TEST,
    UNSEEN,
    answers,
    first_at,
    of_test,
    seen,
    sooner,
    unseen,
    updates,
)
from distillens.analyses.representativeness.recognition_curve import (
    RecognitionCurve,
    RecognitionCurveResult,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.labels import Hard, Probabilities
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK, REPLICATE, Claim, Estimate, weaker
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from tests.analyses.by_hand import class_means, subsets_at

KEY = Key(1106, ("recognition curve",))
DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SHORT = Recipe(steps=60, batch=256, lr=0.05)
NET = ConvNet(2, 8)


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    """Which images are right [trajectories, moments, n], their labels, and which of them are training images."""
    tensors = read_tensors(Path(__file__).parents[1] / "bank" / "recognition_curve.safetensors")[0]
    labels = [tensors[f"labels.{kind}"].long() for kind in ("unseen", "seen")]
    right = [
        torch.from_numpy(np.unpackbits(tensors[f"right.{kind}"].numpy(), axis=-1)[..., : len(own)]).double()
        for kind, own in zip(("unseen", "seen"), labels, strict=True)
    ]
    trained = torch.arange(sum(map(len, labels))) >= len(labels[0])
    return {**tensors, "right": torch.cat(right, -1), "labels": torch.cat(labels), "trained": trained}


def of_bank(
    bank: dict[str, torch.Tensor], places: dict[str, list[torch.Tensor]], who: torch.Tensor
) -> RecognitionCurveResult:
    """The result with sets of the bank's images, one trajectory a replicate."""
    accuracy = {
        name: torch.stack([bank["right"][j][:, at].mean(-1)[None] for j, at in zip(who, many, strict=True)])
        for name, many in places.items()
    }
    moments = tuple(bank["moments"].tolist())
    names = tuple(name for name in places if name not in (UNSEEN, SEEN))
    return RecognitionCurveResult(names, 10, moments, 0.9, bank["final"][who][:, None], accuracy, accuracy)


def stratified(labels: torch.Tensor, per_class: int, key: Key, among: torch.Tensor) -> torch.Tensor:
    order = key.permutation(len(labels))
    order = order[among[order]]
    own = labels[order]
    return torch.cat([order[(own == c).nonzero().flatten()[:per_class]] for c in range(10)])


def supported(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


@pytest.mark.parametrize("per_class", [1, 10])
def test_other_real_images_are_not_recognised_early_more_often_than_stated(
    bank: dict[str, torch.Tensor], per_class: int
) -> None:
    found: dict[tuple[str, str], list[Claim]] = {}
    among = {
        "other": ~bank["trained"],
        UNSEEN: ~bank["trained"],
        "trained": bank["trained"],
        SEEN: bank["trained"],
    }
    for i in range(DRAWS):
        place = KEY.fold("null", per_class, i)
        who = place.fold("who").permutation(len(bank["right"]))[:REPLICATES]
        places = {
            name: [
                stratified(bank["labels"], per_class, place.fold(name, r), those) for r in range(REPLICATES)
            ]
            for name, those in among.items()
        }
        for claim in of_bank(bank, places, who).claims():
            found.setdefault((claim.subject, claim.name), []).append(claim)
    assert len(found) == 4 and all(len(many) == DRAWS for many in found.values())
    counts = {which: supported(many) for which, many in found.items()}
    assert max(counts.values()) <= ALARMS, counts


def test_easy_images_are_early_and_hard_ones_are_late(bank: dict[str, torch.Tensor]) -> None:
    ease, trained = bank["right"].mean((0, 1)), bank["trained"]
    among = {UNSEEN: ~trained, SEEN: trained}
    for kind, those in (("unseen", ~trained), ("trained", trained)):
        middle = ease[those].median()
        among |= {f"easy {kind}": those & (ease > middle), f"hard {kind}": those & (ease < middle)}
    early: dict[str, list[Claim]] = {"unseen": [], "trained": []}
    late = 0
    for i in range(100):
        place = KEY.fold("plant", i)
        who = place.fold("who").permutation(len(bank["right"]))[:REPLICATES]
        places = {
            name: [stratified(bank["labels"], 10, place.fold(name, r), those) for r in range(REPLICATES)]
            for name, those in among.items()
        }
        claims = {(c.subject, c.name): c for c in of_bank(bank, places, who).claims()}
        for kind in early:
            hard = claims[f"hard {kind}", "recognised early"]
            assert hard.verdict != "supported"
            early[kind].append(claims[f"easy {kind}", "recognised early"])
            # Hard training images are learned too: how late these are is not asked.
            late += kind == "unseen" and hard.verdict == "not supported"
    assert min(map(supported, early.values())) >= 95, {k: supported(many) for k, many in early.items()}
    assert late >= 80


def test_class_means_are_recognised_early_and_better(digits: Splits) -> None:
    sets = Sets(
        {"means": (class_means(digits),) * 5}, {"random_subset": subsets_at(KEY.fold("base"), digits, 5, 1)}
    )
    # Several trajectories a replicate: one on ten images is too coarse.
    result = RecognitionCurve(NET, SHORT, trajectories=20)(sets, digits, Runs(Plan()), key=KEY)
    verdicts = {claim.name: claim.verdict for claim in result.claims()}
    assert verdicts == {"recognised early": "supported", "recognised better": "supported"}
    assert result.headline()["means"].value < result.headline()[UNSEEN].value
    assert result.headline()["means"].unit == REPLICATE
    assert result.accuracy["means"].shape == (5, 4, len(result.moments))


def test_curves_are_what_asking_each_network_gives(digits: Splits) -> None:
    (plain,) = subsets_at(KEY.fold("soft"), digits, 1, 2)
    soft = Probabilities(F.one_hot(plain.dataset().labels.hard(), 10) * 0.8 + 0.02)
    sets = Sets({"a": (replace(plain, labels=soft),)})
    runs = Runs(Plan())
    analysis = RecognitionCurve(NET, SHORT, moments=5, trajectories=2)
    (training,) = analysis.trainings(sets, digits, key=KEY)
    result = analysis(sets, digits, runs, key=KEY)
    (population,) = runs.get(training)
    data = plain.dataset()
    for j in range(2):
        for t in range(len(population.moments)):
            flat = population.snapshots[j, t]
            logits, _ = NET.logits(population.shapes.unflatten(flat), {}, data.images)
            losses = F.cross_entropy(logits, data.labels.hard())
            hits = sum(int(row.argmax()) == int(y) for row, y in zip(logits, data.labels.hard(), strict=True))
            assert float(result.accuracy["a"][0, j, t]) == pytest.approx(hits / 20)
            assert float(result.loss["a"][0, j, t]) == pytest.approx(float(losses), rel=1e-4)
    assert result.final.shape == (1, 2)
    assert result.headline()["a"].unit == NETWORK
    assert any("One replicate" in note for note in result.notes())


def test_what_is_unseen_is_in_no_training_what_is_seen_is_and_both_are_of_the_sets_size(
    digits: Splits,
) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("a"), digits, 2, 3)})
    (training,) = RecognitionCurve(NET, SHORT).trainings(sets, digits, key=KEY)
    trained = {image.numpy().tobytes() for image in training.data.images}
    for found, overlap in ((unseen(sets, digits, KEY), 0), (seen(sets, digits, KEY), 30)):
        assert len(found) == 2
        for data in found:
            assert data.labels.hard().bincount().tolist() == [3] * 10
            assert sum(image.numpy().tobytes() in trained for image in data.images) == overlap
        assert not torch.equal(found[0].images, found[1].images)
    assert len(of_test(digits, 50, KEY)) == 50 and of_test(digits, 5000, KEY) is digits.test


def test_moments_are_read_between_two_looks_along_the_logarithm() -> None:
    moments = (0, 1, 3, 7)
    values = torch.tensor([[0.0, 0.2, 0.6, 1.0], [0.5, 0.1, 0.9, 0.0], [0.1, 0.1, 0.1, 0.1]]).double()
    found = first_at(values, 0.4, moments)
    logs = [math.log(1), math.log(2), math.log(4), math.log(8)]
    assert float(found[0]) == pytest.approx((logs[1] + logs[2]) / 2)
    assert float(found[1]) == 0.0
    assert math.isinf(float(found[2]))
    assert first_at(values, torch.tensor([1.0, 0.9, 0.1]), moments).tolist() == pytest.approx(
        [logs[3], logs[2], 0.0]
    )


def test_what_never_comes_counts_as_the_last_moment_and_leaves_the_interval_open() -> None:
    logs = torch.tensor([[math.log(10)], [math.log(40)], [math.inf]])
    found = updates(logs, 99)
    assert found.value == pytest.approx((10 * 40 * 100) ** (1 / 3) - 1)
    assert found.high == math.inf and 0 <= found.low < found.value
    assert updates(logs[:2], 99).high < math.inf
    gap = sooner(logs, torch.tensor([[math.log(20)], [math.inf], [math.inf], [0.0]]), 99)
    wanted = [math.log(10 / 20), math.log(40 / 100), 0.0]
    assert gap.value == pytest.approx(sum(wanted) / 3) and gap.n == 3


def test_the_weaker_of_two_contrasts_is_supported_where_both_are() -> None:
    ends = [-math.inf, -1.0, 1.0, 2.0]
    estimates = [Estimate((a + b) / 2, a, b, 5, REPLICATE) for a in ends for b in [*ends, math.inf] if a < b]
    directions: tuple[Literal["greater", "less"], ...] = ("greater", "less")

    def verdict(one: Estimate, direction: Literal["greater", "less"]) -> str:
        return Claim("c", "a", "s", one, direction, 0.0, "n", "p").verdict

    for direction, first, second in product(directions, estimates, estimates):
        chosen = weaker(direction, first, second)
        assert chosen in (first, second)
        both = {verdict(one, direction) for one in (first, second)} == {"supported"}
        assert (verdict(chosen, direction) == "supported") == both
    single = [Estimate(v, -math.inf, math.inf, 1, REPLICATE) for v in (-2.0, 3.0)]
    assert weaker("greater", *single).value == -2 and weaker("less", *single).value == 3


def made_of(curves: dict[str, list[list[float]]]) -> RecognitionCurveResult:
    accuracy = {name: torch.tensor(rows).double()[:, None] for name, rows in curves.items()}
    return RecognitionCurveResult(("a",), 2, (0, 1, 3, 7), 0.9, torch.tensor([[1.0]] * 2), accuracy, accuracy)


def test_a_lucky_jump_is_no_recognition_and_the_table_says_what_was_not_reached() -> None:
    result = made_of(
        {
            "a": [[0.5, 1.0, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]],
            UNSEEN: [[0.5, 0.6, 0.7, 0.8]] * 2,
            SEEN: [[0.5, 0.6, 0.7, 1.0]] * 2,
            TEST: [[0.5, 0.6, 0.9, 0.9]] * 2,
        }
    )
    assert result.bar == pytest.approx(0.95)
    # The jump of the first replicate is spread over two moments (0.75 each): it is there at 0.95 later.
    first = math.log(4) + 0.8 * (math.log(8) - math.log(4))
    second = math.log(2) + 0.9 * (math.log(4) - math.log(2))
    assert result.reached("a", result.bar)[:, 0].tolist() == pytest.approx([first, second])
    (table,) = result.tables()
    rows = {str(row[0]): row for row in table.rows}
    assert rows[UNSEEN][1] == rows[TEST][1] == "not reached in 2 of 2"
    assert result.earlier("a").value == pytest.approx((first + second) / 2 - math.log(8))
    # Training images are there late in their last step.
    trained = math.log(4) + (0.95 - 0.7) / 0.3 * (math.log(8) - math.log(4))
    assert result.earlier("a", SEEN).value == pytest.approx((first + second) / 2 - trained)
    # Half of the test split's way from 0.5 to 0.9 is 0.7, a third of the way from 0.6 to 0.9.
    at = 1 / 3
    assert result.half_way("a").value == pytest.approx(((1 - 0.5 * at) + (0.5 + 0.5 * at)) / 2)
    assert any(UNSEEN in note for note in result.notes())
    # Trapezia over equal steps of the logarithm.
    own = [(0.25 + 1.0 + 0.5 + 0.5) / 3, (0.25 + 0.5 + 1.0 + 0.5) / 3]
    other = (0.25 + 0.6 + 0.7 + 0.4) / 3
    assert result.better("a").value == pytest.approx(sum(own) / 2 - other)


def test_the_figures_can_be_drawn_where_nothing_is_recognised() -> None:
    result = made_of(dict.fromkeys(("a", UNSEEN, SEEN, TEST), [[0.5] * 4] * 2))
    for draw in result.panels().values():
        draw(Figure().add_subplot())


def test_a_network_that_remembers_more_than_its_parameters_is_refused(digits: Splits) -> None:
    sets = Sets({"a": subsets_at(KEY.fold("a"), digits, 1, 1)})
    analysis = RecognitionCurve(ConvNet(2, 8, norm="batch"), SHORT)
    with pytest.raises(UserError, match="cannot be followed through training; got ConvNet, which remembers"):
        analysis(sets, digits, Runs(Plan()), key=KEY)


def test_a_level_that_is_no_share_is_refused() -> None:
    with pytest.raises(UserError, match="the level is a share of the way"):
        RecognitionCurve(level=1.5)


def test_the_published_protocol_looks_after_every_update(digits: Splits) -> None:
    analysis = RecognitionCurve.as_published(digits.train)
    sets = Sets({"a": subsets_at(KEY.fold("a"), digits, 3, 1)})
    (training,) = analysis.trainings(sets, digits, key=KEY)
    assert training.snapshots == tuple(range(analysis.recipe.steps + 1))
    assert len(training.keys) == 3


def test_decoded_images_are_what_is_looked_at(digits: Splits) -> None:
    (plain,) = subsets_at(KEY.fold("a"), digits, 1, 1)
    result = RecognitionCurve(NET, SHORT, moments=2, trajectories=1)(
        Sets({"a": (plain,)}), digits, Runs(Plan()), key=KEY
    )
    wrong = DistilledDataset(
        plain.stored,
        Hard((plain.dataset().labels.hard() + 1) % 10),
        plain.dataset().classes,
        plain.dataset().space,
    )
    other = RecognitionCurve(NET, SHORT, moments=2, trajectories=1)(
        Sets({"a": (wrong,)}), digits, Runs(Plan()), key=KEY
    )
    assert float(other.accuracy["a"][0, 0, -1]) < 0.3 < float(result.accuracy["a"][0, 0, -1])


def test_answers_hold_bounded_memory_and_are_the_same(
    digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = RecognitionCurve(NET, SHORT.but(steps=10), moments=6, trajectories=1)
    runs = Runs(Plan())
    sets = Sets({"a": subsets_at(KEY.fold("a"), digits, 1, 1)})
    (population,) = runs.get(*analysis.trainings(sets, digits, key=KEY))
    whole = answers(population, digits.val, population.moments)
    monkeypatch.setattr("distillens.analyses.representativeness._beside.TOGETHER", 1)
    parts = answers(population, digits.val, population.moments)
    assert torch.equal(whole[0], parts[0])
    assert torch.allclose(whole[1], parts[1], atol=1e-5)
