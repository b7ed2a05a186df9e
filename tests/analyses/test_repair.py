"""Repair of the weakest points and orders of points: closed forms, slow twins, nulls and plants.

Nulls are 1,000 resampled draws from the committed bank (tests/bank): at most 70 may be called supported.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distillens.analyses.pointwise._gradients import along, mean_gradients
from distillens.analyses.pointwise._orders import by_ridge, in_rounds
from distillens.analyses.pointwise._repair_estimates import area, beyond
from distillens.analyses.pointwise._repair_relabel import as_table, foretold, relabelled
from distillens.analyses.pointwise._repair_reoptimise import Way
from distillens.analyses.pointwise._repair_replace import assigned
from distillens.analyses.pointwise._retrained import without_each
from distillens.analyses.pointwise.repair import POLICIES, Repair, RepairResult
from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.decode import MultiFormation
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.result import paired
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Population, on, train
from tests.analyses.by_hand import class_means, subset

KEY = Key(77, ("repair",))
SEED = Key(20261126)
SHORT = Recipe(steps=60, lr=0.05)
TINY = ConvNet(depth=2, width=8)
QUICK = Repair(TINY, Recipe(steps=2), inits=1, fresh=1, draws=2, kept=(0.5,), pixel_steps=1)
DRAWS, ALARMS = 1000, 70
FAST = Plan(chunk=32, images=1600)


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "repair.safetensors")[0]


@pytest.fixture(scope="module")
def trained(digits: Splits) -> Population:
    """Networks on all class means and without each, from two initialisations."""
    return train(without_each(class_means(digits), TINY, Recipe(steps=15, lr=0.05), 2, KEY), Plan())


def mislabelled(one: DistilledDataset, *points: int) -> DistilledDataset:
    """The set with some points in a class that is not theirs."""
    labels = one.labels.hard().clone()
    labels[list(points)] = (labels[list(points)] + 3) % 10
    return replace(one, labels=Hard(labels), chosen=None)


# Closed forms


def test_how_far_a_value_lies_beyond_random_draws() -> None:
    found = beyond(0.9, [0.1, 0.3, 0.5])
    assert found.value == pytest.approx(0.6) and found.n == 3
    assert found.high - found.value == pytest.approx(4.302653 * 0.2 * math.sqrt(4 / 3), rel=1e-5)
    assert beyond(0.5, [0.2]).low == -math.inf


def test_the_area_is_the_mean_height_up_to_all_points() -> None:
    curve = torch.tensor([[0.2, 0.4], [0.5, 0.5]]).double()
    found = area(curve, (2, 4), 8, torch.tensor([0.8, 0.5]).double())
    assert found.tolist() == pytest.approx([(2 * 0.3 + 4 * 0.6) / 6, 0.5])


def test_rounds_take_every_class_once_before_any_twice() -> None:
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert in_rounds(values, torch.tensor([0, 0, 0, 1, 2])).tolist() == [0, 3, 4, 1, 2]


def test_no_donor_serves_twice() -> None:
    scores = [torch.tensor([3.0, 2.0, 1.0, -torch.inf]), torch.tensor([3.0, -torch.inf, 1.0, 2.0])]
    assert assigned(scores, [1, 2]) == [[0], [3, 2]]
    assert assigned(scores, [2, 1]) == [[0, 1], [3]]


# Slow twins


def test_the_greedy_order_is_that_of_regressions_fitted_again() -> None:
    key = KEY.fold("ridge")
    points, val = key.fold("points").normal(9, 5).double(), key.fold("val").normal(30, 5).double()
    targets, truth = key.fold("targets").normal(9, 3).double(), key.fold("truth").normal(30, 3).double()
    classes = torch.tensor([0, 1, 2] * 3)
    expected: list[int] = []
    for _ in range(9):
        fewest = min(sum(int(classes[i]) == c for i in expected) for c in range(3))
        errors = {}
        for j in range(9):
            if j in expected or sum(int(classes[i]) == int(classes[j]) for i in expected) > fewest:
                continue
            x, y = points[[*expected, j]], targets[[*expected, j]]
            weights = torch.linalg.solve(x.T @ x + 0.3 * torch.eye(5).double(), x.T @ y)
            errors[j] = float((val @ weights - truth).square().sum())
        expected.append(min(errors, key=errors.__getitem__))
    assert by_ridge(points, targets, classes, val, truth, 0.3).tolist() == expected


def test_products_with_a_direction_are_those_of_single_gradients(digits: Splits, trained: Population) -> None:
    data, flat = digits.val.take(torch.arange(7)), trained.final[:3].double()
    data = replace(data, images=data.images.double())
    directions = KEY.fold("direction").normal(*flat.shape).double()
    expected, means = torch.zeros(3, 7).double(), []
    for m in range(3):
        rows = []
        for i in range(7):
            leaf = flat[m].clone().requires_grad_()
            logits, _ = TINY.logits(trained.shapes.unflatten(leaf), {}, data.images[i : i + 1])
            loss = F.cross_entropy(logits, data.labels.hard()[i : i + 1])
            rows.append(torch.autograd.grad(loss, leaf)[0])
            expected[m, i] = rows[-1] @ directions[m]
        means.append(torch.stack(rows).mean(0))
    torch.testing.assert_close(along(trained, flat, directions, data), expected)
    torch.testing.assert_close(mean_gradients(trained, flat, data), torch.stack(means))


def test_what_is_said_of_a_point_comes_from_networks_without_it(digits: Splits, trained: Population) -> None:
    data, origin = class_means(digits).dataset(), torch.arange(10)
    said = foretold(trained, 2, data, origin)
    logits = trained.logits(data)
    for j in range(10):
        own = (logits[1 + j, j].softmax(-1) + logits[11 + 1 + j, j].softmax(-1)) / 2
        torch.testing.assert_close(said[j], own)


def test_the_slope_of_the_gap_is_that_of_finite_differences(digits: Splits) -> None:
    one = class_means(digits).dataset()
    data = replace(one, images=one.images.double())
    training = replace(on(class_means(digits), TINY, Recipe(steps=6, lr=0.05), (KEY,)), snapshots=(0, 3, 6))
    population = train(training, Plan())
    population = replace(population, snapshots=population.snapshots.double(), final=population.final.double())
    real = digits.train.take(torch.arange(40))
    way = Way.of(population, data, replace(real, images=real.images.double()))
    rows = torch.tensor([2, 7])
    others = way.others(data, rows)

    def gap(images: torch.Tensor) -> float:
        changed = data.images.clone()
        changed[rows] = images
        own = mean_gradients(population, way.flat, replace(data, images=changed))
        return float(((own - way.real).square().sum(1) / way.real.square().sum(1)).mean())

    images = data.images[rows] + 0.1
    value, slope = way.gap(data, rows, images, others)
    assert value == pytest.approx(gap(images))
    step = torch.zeros_like(images)
    step[1, 0, 3, 4] = 1e-5
    assert float(slope[1, 0, 3, 4]) == pytest.approx(
        (gap(images + step) - gap(images - step)) / 2e-5, rel=1e-4
    )
    better = way.better(data, rows, 10, 0.02)
    assert way.gap(data, rows, better, others)[0] < way.gap(data, rows, data.images[rows], others)[0]


@pytest.mark.parametrize(
    "labels",
    [
        Hard(torch.tensor([0, 1, 2])),
        Probabilities(torch.eye(3)),
        Logits(torch.eye(3)),
        Targets(torch.eye(3) - 1 / 3),
    ],
    ids=lambda labels: labels.kind,
)
def test_labels_of_every_kind_can_be_changed(labels: Labels) -> None:
    said = torch.tensor([[0.2, 0.5, 0.3]])
    found = relabelled(labels, torch.tensor([2]), said)
    table = as_table(found, 3)
    torch.testing.assert_close(table[:2], as_table(labels, 3)[:2])
    torch.testing.assert_close(table[2:], said)
    assert found.kind == ("probabilities" if labels.kind == "hard" else labels.kind)


# Plants


def test_mislabelled_points_are_found_and_mended(digits: Splits) -> None:
    wrong = {0, 7, 13, 16, 20, 28}
    one = mislabelled(subset(digits, KEY.fold("plant"), 3), *wrong)
    analysis = Repair(TINY, SHORT, inits=3, fresh=6, kept=(0.5,), share=0.2)
    result = analysis(Sets({"a": (one,)}), digits, Runs(FAST), key=KEY)
    weak = result.weak["a"].tolist()
    assert len(wrong & set(weak)) >= 4
    verdicts = {claim.name: claim.verdict for claim in result.claims()}
    for doing in ("dropping", "relabelling", "replacing", "re-optimising"):
        assert verdicts[f"{doing} the weakest helps"] == "supported"
    # Where networks without a mislabelled point do not agree with its label, they mostly know the right one.
    said = {j: int(row.argmax()) for j, row in zip(weak, result.said["a"], strict=True)}
    assert sum(said[j] == j // 3 for j in wrong & set(weak)) >= 3
    # A donor is of the class that the label says, a real image that was not there.
    data = result.set_of("a", "replace", one)
    changed = (data.stored["images"] != one.stored["images"]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(weak)
    for j in weak:
        same = (digits.train.images == data.stored["images"][j]).flatten(1).all(1).nonzero().flatten()
        assert int(digits.train.labels.hard()[same[0]]) == int(one.labels.hard()[j])
    assert len(result.set_of("a", "drop", one)) == 24
    assert result.set_of("a", "relabel", one).labels.kind == "probabilities"
    assert result.set_of("a", "reoptimise", one).chosen is None


def test_good_points_come_before_wrong_ones(digits: Splits) -> None:
    one = mislabelled(subset(digits, KEY.fold("half"), 4), *range(0, 40, 2))
    analysis = Repair(TINY, SHORT, inits=2, fresh=3, kept=(0.25, 0.5), policies=())
    result = analysis(Sets({"a": (one,)}), digits, Runs(FAST), key=KEY)
    (claim,) = result.claims()
    assert claim.name == "first k are better than random" and claim.verdict == "supported"


# Nulls


def result_of(untouched: torch.Tensor, repaired: torch.Tensor, curves: torch.Tensor) -> RepairResult:
    return RepairResult(
        ("a",),
        tuple("0123456789"),
        POLICIES,
        {"a": torch.arange(20) % 10},
        {"a": torch.zeros(1, 20)},
        {"a": torch.arange(2)},
        {"a": torch.zeros(2, 10)},
        {"a": untouched.double()},
        {"a": repaired.double()},
        {"a": (6, 12)},
        {"a": torch.arange(20).expand(2, -1)},
        {"a": curves.double()},
        {"a": torch.arange(2)},
        {"a": {}},
        {"a": torch.zeros(1, 2, 1, 8, 8)},
    )


def test_random_points_in_the_place_of_the_weakest_are_no_finding(bank: dict[str, torch.Tensor]) -> None:
    both, beyonds, orders = torch.zeros(4), torch.zeros(4), 0
    for i in range(DRAWS):
        place = SEED.fold("exchanged", i)
        s = int(place.integers(len(bank["untouched"]), 1))
        groups = place.fold("groups").permutation(bank["repaired"].shape[2])[:6]
        ways = place.fold("orders").permutation(bank["curves"].shape[1])
        curves = bank["curves"][s][torch.cat([ways[:1], ways[:6]])]  # the second is the one by influence
        result = result_of(bank["untouched"][s], bank["repaired"][s][:, groups], curves)
        *repairs, order = result.claims()
        both += torch.tensor([claim.verdict == "supported" for claim in repairs])
        beyonds += torch.tensor([result.beyond_random("a", p).low > 0 for p in POLICIES])
        orders += order.verdict == "supported"
    assert float(both.max()) <= ALARMS and float(beyonds.max()) <= ALARMS
    assert orders <= ALARMS


def test_gains_with_random_signs_are_no_finding(bank: dict[str, torch.Tensor]) -> None:
    alarms = torch.zeros(4)
    for i in range(DRAWS):
        place = SEED.fold("signs", i)
        s = int(place.integers(len(bank["untouched"]), 1))
        g = int(place.fold("group").integers(bank["repaired"].shape[2], 1))
        gains = bank["repaired"][s, :, g] - bank["untouched"][s]
        signs = 2 * place.fold("sign").integers(2, gains.shape[1]) - 1
        for p, row in enumerate(gains * signs):
            alarms[p] += paired(row.tolist(), [0.0] * len(row), "fresh initialisation").low > 0
    assert float(alarms.max()) <= ALARMS


# What is trained, messages and corner cases


def test_random_groups_are_others_and_share_no_point(digits: Splits) -> None:
    one = subset(digits, KEY, 2)
    groups = replace(QUICK, draws=10)._draws(one, (3, 4), KEY)
    first = [j for group in groups[:9] for j in group]
    assert sorted(first) == [j for j in range(20) if j not in (3, 4)]
    assert not {3, 4} & set(groups[9])


def test_networks_that_measure_choose_nothing(digits: Splits) -> None:
    """The same points, donors and orders whatever the test split says."""
    one = subset(digits, KEY, 1)
    other = digits.test.take(KEY.fold("shuffled").permutation(len(digits.test)))
    shuffled = replace(digits, test=Dataset(digits.test.images, other.labels, other.classes, other.space))
    a, b = (QUICK(Sets({"a": (one,)}), real, Runs(Plan()), key=KEY) for real in (digits, shuffled))
    assert torch.equal(a.weak["a"], b.weak["a"]) and torch.equal(a.orders["a"], b.orders["a"])
    assert all(torch.equal(a.mended["a"][p], b.mended["a"][p]) for p in a.mended["a"])
    measured = set(QUICK._fresh(KEY))
    assert not measured & {*QUICK._each(one, KEY).keys, *QUICK._way(one, KEY).keys}


@pytest.mark.parametrize("kind", ["patches", "ordered", "targets"])
def test_sets_that_are_no_plain_images_are_mended_too(digits: Splits, kind: str) -> None:
    means = class_means(digits)
    one = {
        "patches": replace(means, decode=MultiFormation(2), labels=Probabilities(torch.eye(10))),
        "ordered": replace(means, order=Order(torch.arange(10).view(5, 2), torch.full((5,), 0.1))),
        "targets": replace(means, labels=Targets(torch.eye(10) - 0.1)),
    }[kind]
    result = QUICK(Sets({"a": (one,)}), digits, Runs(Plan()), key=KEY)
    assert bool(result.repaired["a"].isfinite().all()) and result.repaired["a"].shape == (4, 3, 1)
    copies = 4 if kind == "patches" else 1
    assert result.mended["a"]["replace"].shape == (copies, 1, 8, 8)
    assert len(result.set_of("a", "relabel", one)) == 10
    if kind == "patches":
        assert "more storage: a" in result.notes()[-1]
        with pytest.raises(UserError, match=r"replace gives whole images.*multi_formation"):
            result.set_of("a", "replace", one)
    with pytest.raises(UserError, match="unknown policy of this result 'mend'"):
        result.set_of("a", "mend", one)


def test_it_says_what_does_not_fit(digits: Splits) -> None:
    with pytest.raises(UserError, match=r"the weakest are at most half.*share 0\.6"):
        Repair(share=0.6)
    with pytest.raises(UserError, match=r"kept are shares of the points.*got 0\.5, 1;"):
        Repair(kept=(0.5, 1.0))
    with pytest.raises(UserError, match=r"a policy is named twice.*drop, drop"):
        Repair(policies=("drop", "drop"))
    with pytest.raises(UserError, match="unknown repair 'mend'"):
        Repair(policies=("mend",))
    views = Teacher("t", torch.zeros(2, 10, 10), 0)
    sets = Sets({"a": (replace(class_means(digits), labels=views),)})
    with pytest.raises(UserError, match="repair: a is labelled by a teacher"):
        QUICK.trainings(sets, digits, key=KEY)
    few = replace(digits, train=digits.train.take(digits.train.drawn(1, KEY)))
    one = replace(subset(few, KEY, 1), chosen=torch.arange(10))
    with pytest.raises(UserError, match=r"has too few training images to replace points by.*got 0 beside"):
        QUICK(Sets({"a": (one,)}), few, Runs(Plan()), key=KEY)
