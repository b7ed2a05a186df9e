"""Leave-one-out: retraining is what it says, what it claims of noise and of planted influence, whole groups, errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from distillens.analyses.pointwise._retrained import moved_losses
from distillens.analyses.pointwise.leave_one_out import (
    LeaveOneOut,
    LeaveOneOutResult,
    needed,
    own_class_share,
    point_agreement,
    self_agreement,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.result import Claim, Estimate, Result
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import on, train
from tests.analyses.by_hand import class_means, subset, subsets_at

DRAWS, ALARMS = 1000, 70
SEED = Key(20241123)
KEY = Key(99, ("end to end",))
SHORT = Recipe(steps=60, lr=0.03)
TINY = ConvNet(depth=2, width=8)


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "leave_one_out.safetensors")[0]


def subsets(real: Splits, name: str, count: int = 3, ipc: int = 1) -> tuple[DistilledDataset, ...]:
    return subsets_at(KEY.fold(name), real, count, ipc)


def claims(result: Result) -> dict[tuple[str, str], str]:
    return {(claim.subject, claim.name): claim.verdict for claim in result.claims()}


def supported(claims: list[Claim]) -> int:
    return sum(claim.verdict == "supported" for claim in claims)


def made(
    influence: Mapping[str, torch.Tensor], real: Splits, **parts: Mapping[str, torch.Tensor]
) -> LeaveOneOutResult:
    """A result of given influences [inits, P, n], the same number of points a class."""
    labels = {name: torch.arange(10).repeat_interleave(x.shape[1] // 10) for name, x in influence.items()}
    nothing = {name: torch.zeros(len(x), x.shape[2]) for name, x in influence.items()}
    whole = {
        "agreement": {name: self_agreement(x) for name, x in influence.items()},
        "shared": {
            name: own_class_share(x.mean(0), labels[name], real.test) for name, x in influence.items()
        },
    } | parts
    return LeaveOneOutResult(
        distilled=tuple(name for name in influence if name != "random_subset"),
        classes=real.test.classes,
        test_labels=real.test.labels.hard(),
        top=9,
        labels=labels,
        influence=influence,
        correctness={name: torch.zeros_like(x, dtype=torch.int8) for name, x in influence.items()},
        rounding=nothing,
        group_names=dict.fromkeys(influence, ()),
        grouped={name: x[:, :0] for name, x in influence.items()},
        members=dict.fromkeys(influence, ()),
        points={},
        most_test={},
        most_train={},
        **whole,
    )


def influence_claims(influence: torch.Tensor, real: Splits) -> dict[str, Claim]:
    return {claim.name: claim for claim in made({"dm": influence}, real).claims()}


def test_influences_of_noise_neither_repeat_nor_stay_in_class(digits: Splits) -> None:
    n = 100
    small = Splits(digits.train, digits.val, digits.test.take(torch.arange(n)))
    claims = [influence_claims(SEED.fold("influence", i).normal(3, 10, n), small) for i in range(DRAWS)]
    assert supported([c["influence repeats"] for c in claims]) <= ALARMS
    assert supported([c["influence stays in class"] for c in claims]) <= ALARMS
    assert supported([c["the most moved are of its class"] for c in claims]) <= ALARMS


def test_planted_influence_repeats_and_stays_in_class(digits: Splits) -> None:
    own = (torch.arange(10)[:, None] == digits.test.labels.hard()[None]).float()
    noise = SEED.fold("planted influence").normal(3, 10, len(digits.test))
    common = SEED.fold("common").normal(1, 10, len(digits.test))
    claims = influence_claims(own + common + 0.3 * noise, digits)
    assert claims["influence repeats"].verdict == "supported"
    assert claims["influence stays in class"].verdict == "supported"
    strong = influence_claims(3 * own + common + 0.3 * noise, digits)
    assert strong["the most moved are of its class"].verdict == "supported"


def test_the_most_moved_images_are_counted_by_class(digits: Splits) -> None:
    """Of nine images that point 0 helps most six are made to be of its class; the others' are all of another."""
    classes = digits.test.labels.hard()
    own, other = (classes == 0).nonzero()[:6, 0], (classes == 1).nonzero()[:3, 0]
    influence = torch.zeros(1, 10, len(classes))
    influence[0, 0, own], influence[0, 0, other] = 1.0, 2.0
    for j in range(1, 10):
        influence[0, j, (classes == 0).nonzero()[:9, 0]] = 1.0
    found = made({"dm": influence}, digits).most_moved("dm")
    assert found.value == pytest.approx((6 / 9) / 10) and found.n == 10
    assert found.low == 0  # a share, whatever Student's interval would be


def test_points_that_agree_on_the_most_moved_leave_room_for_error(digits: Splits) -> None:
    classes = digits.test.labels.hard()
    # Each point helps its class, and nothing else.
    influence = (torch.arange(10)[:, None] == classes).float()[None]
    found = made({"dm": influence}, digits).most_moved("dm")
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.9 < found.low < 1.0


def test_real_noise_with_a_weak_common_part_is_not_called_reliable(digits: Splits) -> None:
    noise = SEED.fold("weak").normal(3, 10, len(digits.test))
    common = 0.3 * SEED.fold("weak common").normal(1, 10, len(digits.test))
    assert influence_claims(noise + common, digits)["influence repeats"].verdict == "not supported"


def test_influence_of_real_points_stays_in_class(digits: Splits, runs: Runs) -> None:
    # The claim's positive control: it is as true of a real subset.
    result = LeaveOneOut(TINY, SHORT, inits=2)(Sets({"a": subsets(digits, "c", 1)}), digits, runs, key=KEY)
    assert claims(result)["a", "influence stays in class"] == "supported"
    assert claims(result)["a", "the most moved are of its class"] == "supported"


def test_leave_one_out_equals_retraining_on_the_smaller_set(digits: Splits, runs: Runs) -> None:
    one = subset(digits, KEY.fold("loo"))
    analysis = LeaveOneOut(TINY, Recipe(steps=15, lr=0.05), inits=2)
    training, *_ = analysis.trainings(Sets({"a": (one,)}), digits, key=KEY)
    double = Plan(precision="float64")
    population = train(training, double)
    influence = moved_losses(population, 2, digits.test)
    for s, j in ((0, 0), (1, 7)):
        key = (KEY.fold("init", s),)
        without = train(on(one.without(j), TINY, analysis.recipe, key), double).losses(digits.test)
        whole = train(on(one, TINY, analysis.recipe, key), double).losses(digits.test)
        assert torch.allclose(influence[s, j], (without - whole)[0], atol=1e-9)


def test_leave_one_out_shows_the_images_that_it_names(digits: Splits, runs: Runs) -> None:
    analysis = LeaveOneOut(TINY, SHORT, inits=3, top=4)
    sets = Sets({"means": (class_means(digits),)}, {"random_subset": subsets(digits, "b", 1)})
    result = analysis(sets, digits, runs, key=KEY)
    mean = result.mean_influence("means")
    best = mean[3].argmax()
    shown = digits.space.from_pixels(result.most_test["means"][3, :1])
    assert torch.allclose(shown[0], digits.test.images[best], atol=1e-5)
    assert result.influence["random_subset"].shape == (3, 10, len(digits.test))
    assert claims(result)["means", "influence stays in class"] == "supported"
    assert torch.isfinite(result.standard_error("means")).all()


def test_a_mislabelled_point_is_the_most_harmful(digits: Splits, runs: Runs) -> None:
    base = subset(digits, KEY.fold("mislabel"), ipc=2)
    labels = base.labels.hard().clone()
    labels[5] = 9
    wrong = replace(base, labels=Hard(labels))
    result = LeaveOneOut(TINY, Recipe(steps=150, lr=0.03), inits=3)(
        Sets({"a": (wrong,)}), digits, runs, key=KEY
    )
    assert int(result.mean_influence("a").mean(1).argmin()) == 5


def test_real_subsets_repeat_more_than_others_no_more_often_than_stated(
    bank: dict[str, torch.Tensor], digits: Splits
) -> None:
    # Subsets that share their initialisations, one in the set's place and one in that of the random subset.
    agreement = bank["agreement"]
    zeros = torch.zeros(2, 10, len(digits.test))
    found = []
    for i in range(DRAWS):
        group = agreement[int(SEED.fold("group", i).integers(len(agreement), 1))]
        first, second = SEED.fold("pair", i).permutation(len(group))[:2].tolist()
        parts = {"dm": group[first], "random_subset": group[second]}
        shared = {name: torch.zeros(10) for name in parts}
        result = made(dict.fromkeys(parts, zeros), digits, agreement=parts, shared=shared)
        found += [claim for claim in result.claims() if claim.name == "repeats more than real"]
    assert len(found) == DRAWS
    assert supported(found) <= ALARMS


def test_influence_of_little_noise_repeats_more_than_a_noisy_one(digits: Splits) -> None:
    n = len(digits.test)
    common, noise = SEED.fold("common part").normal(2, 1, 10, n), SEED.fold("own noise").normal(2, 3, 10, n)
    influence = {"dm": common[0] + 0.5 * noise[0], "random_subset": common[1] + noise[1]}
    found = made(influence, digits)
    assert claims(found)["dm", "repeats more than real"] == "supported"
    swapped = made({"dm": influence["random_subset"], "random_subset": influence["dm"]}, digits)
    assert claims(swapped)["dm", "repeats more than real"] == "not supported"


def test_agreements_are_rank_correlations() -> None:
    effect = SEED.fold("ranks").normal(2, 6, 30)
    over_images = [spearmanr(effect[0, j], effect[1, j]).statistic for j in range(6)]
    over_points = [spearmanr(effect[0, :, i], effect[1, :, i]).statistic for i in range(30)]
    assert self_agreement(effect).tolist() == pytest.approx(over_images)
    assert point_agreement(effect).tolist() == pytest.approx(over_points)
    assert not len(point_agreement(effect[:1]))


def test_so_many_initialisations_reach_the_asked_agreement() -> None:
    # Means of n noisy copies of one truth: signal 1, noise of variance v, so single copies correlate at 1 / (1 + v).
    assert needed(0.8) == 1.0
    assert needed(0.05) == pytest.approx(76)
    assert needed(0.0) == math.inf
    truth, v = SEED.fold("truth").normal(20000), 3.0
    n = round(needed(1 / (1 + v)))
    means = [truth + v**0.5 * SEED.fold("copies", half).normal(n, 20000).mean(0) for half in range(2)]
    assert float(torch.corrcoef(torch.stack(means))[0, 1]) == pytest.approx(0.8, abs=0.01)


def test_a_class_left_out_is_retraining_without_its_points(digits: Splits) -> None:
    one = subset(digits, KEY.fold("group"), ipc=2)
    analysis = LeaveOneOut(TINY, Recipe(steps=10, lr=0.05), inits=2, groups=((0, 5, 19),))
    double = Runs(Plan(precision="float64"))
    result = analysis(Sets({"a": (one,)}), digits, double, key=KEY)
    assert result.group_names["a"] == (*digits.test.classes, "points 0 5 19")
    for g, members in ((3, (6, 7)), (10, (0, 5, 19))):
        kept = [j for j in range(20) if j not in members]
        smaller = one
        for j in reversed(members):
            smaller = smaller.without(j)
        assert len(smaller) == len(kept)
        key = (KEY.fold("init", 1),)
        losses = [
            train(on(x, TINY, analysis.recipe, key), Plan(precision="float64")).losses(digits.test)[0]
            for x in (smaller, one)
        ]
        assert torch.allclose(result.grouped["a"][1, g], losses[0] - losses[1], atol=1e-9)


def test_rounding_alone_moves_far_less_than_a_point(digits: Splits, runs: Runs) -> None:
    result = LeaveOneOut(TINY, SHORT, inits=2)(
        Sets({"a": subsets(digits, "floor", 1)}), digits, runs, key=KEY
    )
    floor = result.floor("a")
    assert 0 < float(floor.mean()) < 0.01 * float(result.mean_influence("a").abs().mean())
    assert torch.allclose(floor, result.rounding["a"].square().mean(0).sqrt() / 2**0.5)
    trust, entries, *_ = result.tables()
    assert trust.columns[4] == "initialisations for 0.8"
    assert all(isinstance(cell, Estimate | str | int) for row in entries.rows for cell in row)


def test_correctness_counts_images_lost_and_gained(digits: Splits, runs: Runs) -> None:
    analysis = LeaveOneOut(TINY, SHORT, inits=2)
    sets = Sets({"a": subsets(digits, "hits", 1)})
    result = analysis(sets, digits, runs, key=KEY)
    population = runs.get(analysis.trainings(sets, digits, key=KEY)[0])[0]
    hits = (population.predictions(digits.test) == digits.test.labels.hard()).view(2, 11, -1)
    assert int(result.correctness["a"][1, 4].sum()) == int(hits[1, 0].sum()) - int(hits[1, 5].sum())


def test_groups_that_do_not_fit_are_refused(digits: Splits) -> None:
    with pytest.raises(UserError, match=r"two points or more.*\(3,\)"):
        LeaveOneOut(groups=((3,),))
    sets = Sets({"a": subsets(digits, "few", 1)})
    with pytest.raises(UserError, match=r"does not fit the set.*\(0, 10\).*points 0 to 9"):
        LeaveOneOut(TINY, groups=((0, 10),)).trainings(sets, digits, key=KEY)
    same = LeaveOneOut(TINY, groups=((0, 1), (1, 0)), inits=1).trainings(sets, digits, key=KEY)
    assert len(same[-1].keys) == 1
