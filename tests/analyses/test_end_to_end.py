"""Whole analyses on real digits: nulls made of random subsets, plants made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distillens import pipeline
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.analyses.behaviour.mixing import Mixing
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.result import Result
from distillens.core.rng import Key
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import NEUTRAL, Protocol
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from tests.analyses.by_hand import class_means, subset, subsets_at

KEY = Key(99, ("end to end",))
SHORT = Recipe(steps=60, lr=0.03)
TINY = ConvNet(depth=2, width=8)


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def subsets(real: Splits, name: str, count: int = 3, ipc: int = 1) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def claims(result: Result) -> dict[tuple[str, str], str]:
    return {(claim.subject, claim.name): claim.verdict for claim in result.claims()}


def test_class_means_beat_random_subsets(digits: Splits, runs: Runs) -> None:
    sets = Sets({"means": (class_means(digits),) * 5}, {"random_subset": subsets(digits, "base", 5)})
    analysis = Accuracy(Protocol("short", "", SHORT), TINY)
    result = analysis(sets, digits, runs, key=KEY)
    assert claims(result)["means", "beats random"] == "supported"
    assert result.values["means"].shape == (5, 1)
    assert result.headline()["full data"].value > result.headline()["means"].value


def test_real_images_beat_the_noise_that_a_set_started_from(digits: Splits, runs: Runs) -> None:
    own = subsets(digits, "own", 5)
    noise = tuple(
        replace(one, stored={"images": KEY.fold("noise", r).normal(10, 1, 8, 8)}) for r, one in enumerate(own)
    )
    sets = Sets({"a": own}, {"random_subset": subsets(digits, "base", 5)}, {"a": noise})
    result = Accuracy(Protocol("short", "", SHORT), TINY)(sets, digits, runs, key=KEY)
    assert claims(result)["a", "beats its start"] == "supported"


def test_neutral_chooses_on_validation_and_never_on_test(digits: Splits, runs: Runs) -> None:
    short = replace(NEUTRAL, recipe=Recipe(steps=40, batch=256), rates=(1e-4, 0.05), moments=(10, 40))
    analysis = Accuracy(short, TINY)
    sets = Sets({"a": subsets(digits, "a", 2)}, {"random_subset": subsets(digits, "base", 2)})
    honest = analysis(sets, digits, runs, key=KEY)
    assert all("rate 0.05" in choice for choice in honest.chosen["a"])
    shuffled = Dataset(
        digits.test.images,
        Hard(digits.test.labels.hard()[KEY.fold("shuffle").permutation(len(digits.test))]),
        digits.test.classes,
        digits.space,
    )
    permuted = analysis(sets, Splits(digits.train, digits.val, shuffled), runs, key=KEY)
    assert permuted.chosen == honest.chosen
    assert permuted.values["a"].mean() < honest.values["a"].mean()


def test_one_set_says_that_its_interval_covers_training_only(digits: Splits, runs: Runs) -> None:
    sets = Sets({"a": subsets(digits, "a", 1)}, {"random_subset": subsets(digits, "base", 1)})
    result = Accuracy(Protocol("short", "", SHORT, nets=3), TINY)(sets, digits, runs, key=KEY)
    estimate = result.headline()["a"]
    assert estimate.n == 3
    assert "covers training only" in estimate.unit
    assert any("one set" in note for note in result.notes())


def test_the_learned_rate_is_that_of_the_set_and_of_its_start(digits: Splits) -> None:
    learned = replace(class_means(digits), recipe=Recipe(lr=0.123))
    start = subset(digits, KEY.fold("start"))
    protocol = Protocol("own", "", SHORT, learned_rate=True)
    sets = Sets({"a": (learned,)}, {"random_subset": (start,)}, {"a": (start,)})
    rates = [t.recipe.lr for t in Accuracy(protocol, TINY).trainings(sets, digits, key=KEY)]
    assert rates[:3] == [0.123, SHORT.lr, 0.123]


@pytest.mark.slow
def test_twenty_nulls_end_to_end(digits: Splits, runs: Runs) -> None:
    """Random subsets in the place of distilled sets, everything else as a study does it: at 2.5 % a claim."""
    alarms = 0
    for i in range(20):
        sets = Sets(
            {"null": tuple(subset(digits, KEY.fold("null", i, r)) for r in range(5))},
            {"random_subset": tuple(subset(digits, KEY.fold("base", i, r)) for r in range(5))},
        )
        key = KEY.fold("null study", i)
        found = claims(Accuracy.defaults(digits.train)(sets, digits, runs, key=key))
        mixing = Mixing((0, 1), Recipe(steps=300), ConvNet(2, 32), efforts=())
        found |= claims(mixing(sets, digits, runs, key=key))
        del found["null", "converges"]  # true of random subsets
        alarms += sum(verdict == "supported" for verdict in found.values())
    assert alarms <= 4  # 40 claims at 2.5 %: P(5 or more) is below 0.4 %


def test_ordered_steps_are_replayed_under_any_protocol(digits: Splits) -> None:
    """Of a set that is a training by itself a protocol chooses nothing: neither rate nor moment."""
    settings = ["steps=2", "net.width=8", "init=real", "distill_epochs=2"]
    made = pipeline.distill("wang2018", digits, ipc=1, settings=settings)
    scores = []
    several = replace(NEUTRAL, recipe=Recipe(steps=40, batch=256), moments=(10, 40))
    for protocol in (several, Protocol("short", "", SHORT)):
        analysis = Accuracy(replace(protocol, nets=2), TINY)
        result = analysis(Sets({"wang2018": (made,)}), digits, Runs(Plan()), key=KEY)
        scores.append(result.values["wang2018"])
        assert result.chosen["wang2018"] == ("",)
    assert torch.equal(*scores)
