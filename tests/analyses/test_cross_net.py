"""The matrix of sets and networks: its figures in plain Python, the null and the plant of its claim."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t

from distillens import pipeline
from distillens.analyses.behaviour.cross_net import FULL, CrossNet, CrossNetResult
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.checks import UserError
from distillens.core.config import describe
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.result import Estimate
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.nets.lenet import LeNet
from distillens.nets.mlp import MLP
from distillens.runs import Runs
from tests.analyses.by_hand import subsets_at

DRAWS, ALARMS, REPLICATES = 1000, 70, 5
SEED = Key(20251126)
KEY = Key(97, ("cross net",))
QUICK = Recipe(steps=40, optimiser="adam")
SMALL, LINES = ConvNet(2, 8), MLP(1, 32)


def subsets(real: Splits, name: str, count: int, ipc: int = 1) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def made_on(net: Net, one: DistilledDataset) -> DistilledDataset:
    """The set with a provenance that names a network."""
    about = Provenance("dm", {"net": describe(net)}, max(1, round(one.ipc)), KEY, "", "")
    return replace(one, provenance=about)


def result(
    own: torch.Tensor, random: torch.Tensor, distances: list[list[int]], weak: tuple[str, ...] = ()
) -> CrossNetResult:
    """Hand-made accuracies [replicates, kinds, networks] of one set and of the random subset."""
    names = tuple(f"Net {j}" for j in range(own.shape[1]))
    return CrossNetResult(
        names,
        ("dm",),
        ("dm", "random_subset"),
        {"dm": names[0]},
        {"dm": own, "random_subset": random, FULL: torch.ones(2, own.shape[1], 1)},
        {"dm": torch.tensor(distances)},
        {"dm": ("",) * own.shape[1], "random_subset": ("",) * own.shape[1]},
        weak,
        (),
        0.01,
    )


def interval(values: list[float]) -> tuple[float, float, float]:
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def same(estimate: Estimate | None, values: list[float]) -> bool:
    assert estimate is not None
    return (estimate.value, estimate.low, estimate.high) == pytest.approx(interval(values))


# ---- the figures ----


def accuracies() -> tuple[torch.Tensor, torch.Tensor]:
    own = Key(1).uniform(4, 5, 2, low=0.4, high=0.9).double()
    random = Key(2).uniform(4, 5, 2, low=0.3, high=0.8).double()
    return own, random


def test_the_figures_are_those_of_plain_python() -> None:
    own, random = accuracies()
    at = [0, 1, 2, 3, 3]
    found = result(own, random, [at] * 4)
    gains = [
        [mean(a) - mean(b) for a, b in zip(x, y, strict=True)]
        for x, y in zip(own.tolist(), random.tolist(), strict=True)
    ]
    assert same(found.accuracy("dm", "Net 2"), [mean(row[2]) for row in own.tolist()])
    assert same(found.gain("dm", "Net 1"), [row[1] for row in gains])
    assert same(found.at_home("dm"), [row[0] for row in gains])
    assert same(found.away("dm"), [mean(row[1:]) for row in gains])
    assert same(found.loss("dm"), [row[0] - mean(row[1:]) for row in gains])
    assert same(found.slope("dm"), [float(np.polyfit(at, row, 1)[0]) for row in gains])
    assert same(found.everywhere("dm"), [mean(row) for row in gains])
    assert found.headline() == {
        "dm, gain over random": found.everywhere("dm"),
        "dm, loss off its network": found.loss("dm"),
    }
    assert same(found.at_distance("dm", 3), [mean(row[3:]) for row in gains])
    (claim,) = found.claims()
    assert (claim.estimate, claim.smallest_effect, claim.direction) == (found.loss("dm"), 0.01, "greater")


def test_weak_networks_are_shown_and_not_counted() -> None:
    own, random = accuracies()
    found = result(own, random, [[0, 1, 2, 3, 3]] * 4, weak=("Net 1", "Net 4"))
    kept = [0, 2, 3]
    rest = result(own[:, kept], random[:, kept], [[0, 2, 3]] * 4)
    for name in ("at_home", "away", "loss", "slope"):
        assert getattr(found, name)("dm") == getattr(rest, name)("dm")
    assert found.at_distance("dm", 1) is None
    assert "Net 1" in found.tables()[0].columns
    assert any(note.startswith("Weak networks") and "Net 1, Net 4" in note for note in found.notes())
    assert found.everywhere("dm") == rest.everywhere("dm")
    none = result(own, random, [[0, 1, 2, 3, 3]] * 4, weak=found.nets)
    assert none.claims() == () and list(none.headline()) == ["dm, gain over random"]


def test_the_nearest_network_stands_in_where_the_own_is_absent() -> None:
    own, random = accuracies()
    found = result(own, random, [[1, 1, 2, 3, 3]] * 4)
    gains = (own - random).mean(2).tolist()
    assert same(found.loss("dm"), [mean(row[:2]) - mean(row[2:]) for row in gains])
    assert any("the nearest stands in: dm" in note for note in found.notes())


def test_replicates_of_several_networks_have_each_their_own_distances() -> None:
    own, random = accuracies()
    found = result(own, random, [[0, 1, 2, 3, 3], [3, 3, 3, 0, 1]] * 2)
    gains = (own - random).mean(2).tolist()
    expected = [
        row[0] - mean(row[1:]) if r % 2 == 0 else row[3] - mean([*row[:3], row[4]])
        for r, row in enumerate(gains)
    ]
    assert same(found.loss("dm"), expected)
    assert found.at_distance("dm", 2) is None, "half of the replicates have none there"


def test_nothing_further_away_is_no_claim() -> None:
    own, random = accuracies()
    found = result(own, random, [[3] * 5] * 4)
    assert found.claims() == () and found.slope("dm") is None
    assert list(found.panels()) == [CrossNetResult.title]


# ---- null and plant ----


@pytest.mark.parametrize("ipc", [1, 10])
@pytest.mark.parametrize("home", range(5))
def test_a_random_subset_is_tied_to_a_network_no_more_often_than_stated(ipc: int, home: int) -> None:
    bank = read_tensors(Path(__file__).parents[1] / "bank" / "ranking.safetensors")[0][f"cross.{ipc}"]
    at = [[3 * (j != home) for j in range(bank.shape[1])]] * REPLICATES
    alarms = 0
    for i in range(DRAWS):
        order = SEED.fold("null", ipc, home, i).permutation(len(bank))
        first, second = bank[order[:REPLICATES]], bank[order[REPLICATES : 2 * REPLICATES]]
        (claim,) = result(first[..., None], second[..., None], at).claims()
        alarms += claim.verdict == "supported"
    assert alarms <= ALARMS


def test_a_set_that_serves_its_own_network_alone_is_found(digits: Splits) -> None:
    """Real images moved by a pixel: pooling forgives that, a perceptron does not."""
    moved = tuple(
        made_on(SMALL, replace(one, stored={"images": one.stored["images"].roll(1, 3)}))
        for one in subsets(digits, "own", 5, ipc=3)
    )
    sets = Sets({"moved": moved}, {"random_subset": subsets(digits, "base", 5, ipc=3)})
    analysis = CrossNet((SMALL, LINES), QUICK, (0.01,))
    found = analysis(sets, digits, Runs(Plan()), key=KEY)
    (claim,) = found.claims()
    assert claim.verdict == "supported"
    assert found.weak == ()
    assert found.distances["moved"].tolist() == [[0, 3]] * 5
    loss, slope = found.loss("moved"), found.slope("moved")
    assert loss is not None and slope is not None
    assert slope.value == pytest.approx(-loss.value / 3)


# ---- whose network, whose rate ----


def test_sets_of_several_networks_stand_side_by_side(digits: Splits) -> None:
    a, b, c, d = subsets(digits, "own", 4)
    sets = Sets(
        {
            "dm": (made_on(SMALL, a), made_on(SMALL, b)),
            "dm on lenet": (made_on(LeNet(), c), made_on(LeNet(), d)),
            "theirs": (a, made_on(SMALL, b)),
        },
        {"random_subset": subsets(digits, "base", 2)},
    )
    found = CrossNet((SMALL, LINES), QUICK, (0.01,))(sets, digits, Runs(Plan()), key=KEY)
    assert found.origins == {"dm": "ConvNet w8", "dm on lenet": "LeNet w6", "theirs": "ConvNet w8"}
    assert {name: each.tolist() for name, each in found.distances.items()} == {
        "dm": [[0, 3]] * 2,
        "dm on lenet": [[2, 3]] * 2,
    }
    assert any("on which network these were distilled: theirs" in note for note in found.notes())
    assert {claim.subject for claim in found.claims()} == {"dm", "dm on lenet"}


def test_rates_and_weak_networks_are_judged_on_validation(digits: Splits) -> None:
    runs = Runs(Plan())
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    analysis = CrossNet((SMALL, MLP(6, 4)), Recipe(steps=20), (1e-4, 0.1))
    honest = analysis(sets, digits, runs, key=KEY)
    assert honest.weak == ("MLP w4",)
    mixed = digits.test.labels.hard()[KEY.fold("shuffle").permutation(len(digits.test))]
    shuffled = Dataset(digits.test.images, Hard(mixed), digits.test.classes, digits.space)
    permuted = analysis(sets, Splits(digits.train, digits.val, shuffled), runs, key=KEY)
    assert (permuted.chosen, permuted.weak) == (honest.chosen, honest.weak)
    assert permuted.values["a"][:, 0].mean() < honest.values["a"][:, 0].mean()


def test_ordered_steps_are_replayed_on_every_network(digits: Splits) -> None:
    made = pipeline.distill(
        "wang2018", digits, ipc=1, settings=["steps=2", "net.width=8", "init=real", "distill_epochs=2"]
    )
    sets = Sets({"wang2018": (made,)}, {"random_subset": subsets(digits, "base", 1)})
    analysis = CrossNet((SMALL, LINES), Recipe(steps=5), (0.01, 0.1))
    asked: Any = analysis._asked(sets, LINES, KEY)
    assert [len(each) for each in (asked["wang2018"][0], asked["random_subset"][0])] == [1, 2]
    found = analysis(sets, digits, Runs(Plan()), key=KEY)
    assert found.chosen["wang2018"] == ("", "")
    assert any(note.startswith("wang2018: ordered steps at rates of their own") for note in found.notes())


# ---- messages ----


def test_what_it_cannot_do_is_told(digits: Splits) -> None:
    analysis = CrossNet((SMALL, LINES), Recipe(steps=5), (0.01,))
    with pytest.raises(
        UserError, match="cross_net needs a random subset beside the sets; add one as random_subset"
    ):
        analysis(Sets({"a": subsets(digits, "a", 1)}), digits, Runs(Plan()), key=KEY)
    with pytest.raises(
        UserError, match=r"networks must be two or more, all different; got ConvNet w8 .*, ConvNet w8"
    ):
        replace(analysis, nets=(SMALL, SMALL))
    with pytest.raises(UserError, match="cross_net: margin must be at least 0; got -1"):
        replace(analysis, margin=-1)
