"""Accuracy: the order of methods as claims (null and plant), what stands beside each figure, whom it shares models with."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from distillens.analyses.behaviour.accuracy import Accuracy, AccuracyResult
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import RANDOM, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Logits
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Result
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import NEUTRAL, WDDL, Protocol
from distillens.nets.convnet import ConvNet
from distillens.paper import ORDER
from distillens.runs import Runs
from distillens.train import networks, on
from tests.analyses.by_hand import subsets_at

DRAWS, ALARMS, REPLICATES = 1000, 70, 5
KEY = Key(20261125, ("accuracy",))
NET = ConvNet(depth=2, width=8)
SHORT = Protocol("short", "", Recipe(steps=60, lr=0.03))


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def subsets(real: Splits, name: str, count: int = REPLICATES) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, 1)


def shuffled(sets: tuple[DistilledDataset, ...]) -> tuple[DistilledDataset, ...]:
    """The same images, each under a label that is not its own."""
    return tuple(replace(one, labels=Hard((one.labels.hard() + 1 + r) % 10)) for r, one in enumerate(sets))


def ordered(result: Result) -> list[Claim]:
    return [claim for claim in result.claims() if claim.name.startswith("better than")]


# ---- the claim ----


@pytest.mark.parametrize("ipc", [1, 10])
def test_random_subsets_stand_in_no_order_more_often_than_stated(ipc: int) -> None:
    values = read_tensors(Path(__file__).parents[1] / "bank" / "digits.safetensors")[0][f"accuracy.{ipc}"]
    supported = 0
    for i in range(DRAWS):
        rows = KEY.fold("order", ipc, i).permutation(len(values))
        first, second = values[rows[:REPLICATES], :1], values[rows[REPLICATES : 2 * REPLICATES], :1]
        result = AccuracyResult(
            *("wddl", "", "ConvNet", ("a", "b"), (), {"a": first, "b": second}, first[:, 0], {}),
            {"a": "", "b": ""},
            order=("a", "b"),
        )
        (claim,) = ordered(result)
        supported += claim.verdict == "supported"
    assert supported <= ALARMS


def test_right_labels_come_before_shuffled_ones(digits: Splits, runs: Runs) -> None:
    real = subsets(digits, "right")
    sets = Sets({"right": real, "wrong": shuffled(real)}, {"random_subset": subsets(digits, "base")})
    found = ordered(Accuracy(SHORT, NET, order=("right", "wrong"))(sets, digits, runs, key=KEY))
    assert [(claim.subject, claim.verdict, claim.source) for claim in found] == [
        ("right", "supported", "paper T3")
    ]
    assert found[0].statement == "right trains better networks than wrong, under the same recipe"
    (backwards,) = ordered(Accuracy(SHORT, NET, order=("wrong", "right"))(sets, digits, runs, key=KEY))
    assert backwards.verdict == "not supported"


def test_an_order_passes_over_names_that_are_not_there(digits: Splits, runs: Runs) -> None:
    sets = Sets(
        {name: subsets(digits, name, 2) for name in ("mtt", "dm")},
        {"random_subset": subsets(digits, "base", 2)},
    )
    result = Accuracy(SHORT, NET, order=(*ORDER, RANDOM))(sets, digits, runs, key=KEY)
    assert result.order == ("mtt", "dm", "random_subset")
    found = ordered(result)
    assert [claim.subject for claim in found] == ["mtt", "dm"]
    for claim, (better, worse) in zip(found, pairwise(result.order), strict=True):
        expected = (result.values[better] - result.values[worse]).mean()
        assert claim.estimate.value == pytest.approx(float(expected))
        assert better in claim.statement and worse in claim.statement
    assert ordered(Accuracy(SHORT, NET)(sets, digits, runs, key=KEY)) == []


def test_an_order_names_each_set_once() -> None:
    with pytest.raises(UserError, match="an order names each set once; got dm, mtt, dm"):
        Accuracy(order=("dm", "mtt", "dm"))


def test_the_papers_protocol_is_the_papers(digits: Splits, like_cifar: Dataset) -> None:
    published = Accuracy.as_published(like_cifar)
    assert published.protocol == WDDL
    assert published.protocol.recipe == Recipe(steps=300, lr=0.01, momentum=0.9)
    assert published.net == ConvNet(depth=3, width=128, norm="group", pooling="average")
    assert published.order == ("bptt", "mtt", "dc", "dm", "random_subset")
    assert Accuracy.as_published(digits.train).net == ConvNet.defaults(digits.train)


# ---- what stands beside a figure ----


def test_bits_and_images_seen_stand_beside_every_accuracy(digits: Splits, runs: Runs) -> None:
    soft = tuple(replace(one, labels=Logits(5 * torch.eye(10))) for one in subsets(digits, "soft", 2))
    sets = Sets(
        {"soft": soft, "plain": subsets(digits, "plain", 2)}, {"random_subset": subsets(digits, "base", 2)}
    )
    result = Accuracy(SHORT, NET)(sets, digits, runs, key=KEY)
    rows = {str(row[0]): row[4:] for row in result.tables()[0].rows}
    images = 10 * 64
    assert rows["soft"] == (32 * (images + 100), 60 * 10, "740 floats, 10 images")
    assert rows["plain"] == rows["random_subset"] == (32 * images, 60 * 10, "640 floats, 10 images")
    n = len(digits.train)
    short = n % 256 or 256
    shown = sum(256 if (step + 1) % -(-n // 256) else short for step in range(60))
    assert rows["full data"] == (32 * 64 * n, shown, "")


def test_images_seen_are_those_till_the_moment_that_was_chosen(digits: Splits, runs: Runs) -> None:
    protocol = replace(NEUTRAL, recipe=Recipe(steps=40, batch=4), rates=(0.05,), moments=(1, 40))
    sets = Sets({"a": subsets(digits, "a", 2), "wrong": shuffled(subsets(digits, "a", 2))})
    result = Accuracy(protocol, NET)(sets, digits, runs, key=KEY)
    for name, choices in result.chosen.items():
        steps = [int(choice.split()[2]) for choice in choices]
        shown = [
            sum((4, 4, 2)[step % 3] for step in range(n)) for n in steps
        ]  # ten images in batches of four
        assert result.seen[name] == round(sum(shown) / 2)
        assert all(choice.startswith("rate 0.05, ") for choice in choices)


def test_the_full_data_have_the_same_rates_to_try(digits: Splits, runs: Runs) -> None:
    """Under a rate that is far too small they would lose to any set."""
    protocol = replace(NEUTRAL, recipe=Recipe(steps=40, batch=256), rates=(1e-5, 0.05), moments=(40,))
    analysis = Accuracy(protocol, NET)
    sets = Sets({"a": subsets(digits, "a", 2)})
    asked = [t for t in analysis.trainings(sets, digits, key=KEY) if t.data is digits.train]
    assert sorted(t.recipe.lr for t in asked) == [1e-5, 1e-5, 0.05, 0.05]
    result = analysis(sets, digits, runs, key=KEY)
    assert result.headline()["full data"].value > result.headline()["a"].value


def test_the_full_data_are_trained_as_long_as_the_longest_set(digits: Splits) -> None:
    passes = Protocol("own", "", Recipe(steps=3, batch=4), passes=3)
    asked = Accuracy(passes, NET).trainings(Sets({"a": subsets(digits, "a", 1)}), digits, key=KEY)
    assert [t.steps for t in asked] == [9, 9]
    assert asked[1].data is digits.train and asked[1].recipe.batch == 4


def test_the_papers_models_are_those_that_other_analyses_train(digits: Splits) -> None:
    """Same data, recipe and keys, so the same identity: they are trained once for all."""
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    ours = {i for t in Accuracy(WDDL, NET).trainings(sets, digits, key=KEY) for i in t.identities()}
    for replicates in sets.everything().values():
        for r, one in enumerate(replicates):
            by_hand = on(one, NET, Recipe(steps=300, lr=0.01, momentum=0.9), networks(KEY, r, 1))
            assert set(by_hand.identities()) <= ours
