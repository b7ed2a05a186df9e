"""Shapley values of distilled points: closed forms, what is trained, nulls and plants.

Nulls are 1,000 resampled draws from the committed bank (tests/bank): at most 70 may be called supported.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distillens import making, pipeline
from distillens.analyses.pointwise.shapley import ROUND, Shapley, ShapleyResult, relative_error, values_of
from distillens.core.artefact import DistilledDataset, Order
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import read_tensors
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.studies.work import train_for_all
from distillens.train import Training, train
from tests.analyses.by_hand import class_means, subset

KEY = Key(99, ("shapley",))
SEED = Key(20241124)
SHORT = Recipe(steps=60, lr=0.05)
TINY = ConvNet(depth=2, width=8)
DRAWS, ALARMS = 1000, 70


@pytest.fixture(scope="module")
def bank() -> dict[str, torch.Tensor]:
    return read_tensors(Path(__file__).parents[1] / "bank" / "shapley.safetensors")[0]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def more_points(one: DistilledDataset, image: torch.Tensor, label: int) -> DistilledDataset:
    """A set with one point more, the last."""
    images = torch.cat([one.stored["images"], image[None]])
    return replace(
        one, stored={"images": images}, labels=Hard(torch.cat([one.labels.hard(), torch.tensor([label])]))
    )


def exact(utility: dict[frozenset[int], float], points: int) -> list[float]:
    """Shapley values by their definition, over all subsets."""
    values = []
    for i in range(points):
        others = [j for j in range(points) if j != i]
        total = 0.0
        for size in range(points):
            for inside in combinations(others, size):
                weight = math.factorial(size) * math.factorial(points - size - 1) / math.factorial(points)
                total += weight * (utility[frozenset((*inside, i))] - utility[frozenset(inside)])
        values.append(total)
    return values


def game(points: int, key: Key) -> dict[frozenset[int], float]:
    """A random utility of every subset."""
    subsets = [frozenset(s) for size in range(points + 1) for s in combinations(range(points), size)]
    return dict(zip(subsets, key.uniform(len(subsets)).tolist(), strict=True))


def walked(
    utility: dict[frozenset[int], float], orders: list[tuple[int, ...]], sizes: list[int]
) -> torch.Tensor:
    """The utilities along both ways of each order."""
    curves = [
        [[utility[frozenset(way[:size])] for size in sizes] for way in (order, order[::-1])]
        for order in orders
    ]
    return torch.tensor(curves, dtype=torch.float64)


# Closed forms


def test_all_permutations_give_the_exact_values() -> None:
    utility = game(4, KEY.fold("game"))
    orders = list(permutations(range(4)))
    sizes = [1, 2, 3, 4]
    empty = utility[frozenset()]
    cuts = torch.full((len(orders),), 3)
    found = values_of(walked(utility, orders, sizes), torch.tensor(orders), sizes, cuts, empty)
    assert found.mean(0).tolist() == pytest.approx(exact(utility, 4))
    # And every permutation by itself adds up to the whole set's utility beyond that of none.
    assert found.sum(1).tolist() == pytest.approx([utility[frozenset(range(4))] - empty] * len(orders))


@pytest.mark.parametrize("sizes", [[2, 4, 6], [3, 6], [1, 4, 6]])
def test_blocks_are_exact_where_points_add_up(sizes: list[int]) -> None:
    worth = KEY.fold("worth").normal(6).double().tolist()
    subsets = [frozenset(s) for size in range(7) for s in combinations(range(6), size)]
    utility = {s: 0.1 + sum(worth[i] for i in s) for s in subsets}
    orders = list(permutations(range(6)))
    cuts = torch.full((len(orders),), len(sizes) - 1)
    found = values_of(walked(utility, orders, sizes), torch.tensor(orders), sizes, cuts, 0.1)
    assert found.mean(0).tolist() == pytest.approx(worth, abs=1e-6)


def test_one_block_of_all_points_is_shared_evenly() -> None:
    curves = torch.tensor([[[0.7], [0.7]]]).double()
    found = values_of(curves, torch.tensor([[1, 0]]), [2], torch.tensor([0]), 0.1)
    assert found.tolist() == [pytest.approx([0.3, 0.3])]


def test_a_cut_walk_shares_what_is_left_and_still_adds_up() -> None:
    curves = torch.tensor([[[0.3, torch.nan, torch.nan, 0.6], [0.2, torch.nan, torch.nan, 0.6]]]).double()
    found = values_of(curves, torch.tensor([[2, 0, 1, 3]]), [1, 2, 3, 4], torch.tensor([1]), 0.1)
    # From the one end 2 brings 0.2 and the others 0.1 each; from the other end 3 brings 0.1 and the others 0.4 / 3.
    assert found[0].tolist() == pytest.approx(
        [(0.1 + 0.4 / 3) / 2, (0.1 + 0.4 / 3) / 2, (0.2 + 0.4 / 3) / 2, (0.1 + 0.1) / 2]
    )
    assert float(found.sum()) == pytest.approx(0.5)


def test_the_relative_error_is_that_of_the_mean() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).double()
    assert relative_error(values) == pytest.approx(math.sqrt((2 / 2 + 0) / 2) / 2)
    assert relative_error(torch.zeros(2, 2)) == math.inf


# What is trained


def test_a_coalition_is_a_training_on_these_points_alone(digits: Splits, runs: Runs) -> None:
    one = class_means(digits)
    analysis = Shapley(TINY, Recipe(steps=8, lr=0.05), permutations=1, strong=0)
    result = analysis(Sets({"a": (one,)}), digits, runs, key=KEY)
    order = KEY.fold("shapley", "order", 0).permutation(10)
    expected = []
    for size in range(1, 11):
        pair = []
        for way in (order, order.flip(0)):
            part = one.keep(way[:size].sort().values).dataset()
            keys = (KEY.fold("shapley", "init", 0),)
            pair.append(
                float(train(Training(part, TINY, analysis.recipe, keys), Plan()).accuracy(digits.val))
            )
        expected.append(sum(pair) / 2)
    assert result.curves["a"][0].tolist() == pytest.approx(expected)
    assert result.total("a").value == pytest.approx(expected[-1] - 0.1)


def test_it_stops_where_the_error_is_small_enough(digits: Splits) -> None:
    sets = Sets({"a": (class_means(digits),)})
    short = Shapley(TINY, Recipe(steps=5, lr=0.05), permutations=ROUND + 2, strong=0)
    rough = replace(short, error=1e6)(sets, digits, Runs(Plan()), key=KEY)
    fine = replace(short, error=1e-6)(sets, digits, Runs(Plan()), key=KEY)
    assert len(rough.values["a"]) == ROUND and len(fine.values["a"]) == ROUND + 2
    torch.testing.assert_close(fine.values["a"][:ROUND], rough.values["a"])
    assert "standard error of 1e-06 of the mean value" in fine.notes()[1] and len(rough.notes()) == 1
    assert f"a ({relative_error(fine.values['a']):.2g} after {ROUND + 2})" in fine.notes()[1]
    cheap = replace(short, error=1e-6, budget=1)
    poor = cheap(sets, digits, Runs(Plan()), key=KEY)
    # The first round is walked whatever it costs; what ended the walks is said.
    torch.testing.assert_close(poor.values["a"], rough.values["a"])
    assert "ended by the budget" in poor.notes()[2] and not any("budget" in note for note in fine.notes())
    assert len(cheap.trainings(sets, digits, key=KEY)[0].keys) == ROUND * 19


def test_a_walk_stops_at_every_size_or_at_equal_ratios() -> None:
    assert Shapley()._sizes(10) == list(range(1, 11))
    assert Shapley()._sizes(11) == [*range(1, 10), 11]
    assert Shapley()._sizes(100) == [2, 3, 5, 7, 11, 17, 26, 41, 64, 100]
    assert Shapley(stops=1)._sizes(100) == [100]
    assert Shapley(stops=3)._sizes(1000) == [10, 100, 1000] and Shapley()._sizes(2) == [1, 2]
    # 452 images a permutation of 100 points, 100 of ten.
    assert Shapley()._most(100) == 4 and Shapley()._most(10) == 8


def test_walks_are_cut_where_nothing_is_left_to_gain(digits: Splits) -> None:
    sets = Sets({"a": (class_means(digits),)})
    whole, cut = Runs(Plan()), Runs(Plan())
    short = Shapley(TINY, Recipe(steps=20, lr=0.05), permutations=ROUND + 1, error=1e-6, strong=0)
    long = replace(short, tolerance=0.0)(sets, digits, whole, key=KEY)
    found = replace(short, tolerance=0.5)(sets, digits, cut, key=KEY)
    assert sum(cut.trained.values()) < sum(whole.trained.values()) == (ROUND + 1) * 19
    assert found.cuts["a"].tolist()[:ROUND] == [9] * ROUND
    after = set(found.cuts["a"].tolist()[ROUND:])
    assert len(after) == 1 and max(after) < 9
    assert found.total("a").value == pytest.approx(long.total("a").value)


def test_ordered_steps_are_walked_too(digits: Splits) -> None:
    steps = torch.arange(10).view(5, 2)
    one = replace(class_means(digits), order=Order(steps, torch.full((5,), 0.1)))
    result = Shapley(TINY, permutations=2, strong=2, contexts=2)(
        Sets({"a": (one,)}), digits, Runs(Plan()), key=KEY
    )
    assert result.values["a"].shape == (2, 10) and bool(result.values["a"].isfinite().all())


# Plants


def test_a_mislabelled_point_is_worth_least(digits: Splits, runs: Runs) -> None:
    means = class_means(digits)
    sets = Sets({"a": (more_points(means, means.stored["images"][3], 8),)})
    result = Shapley(TINY, SHORT, permutations=12, stops=11, strong=0)(sets, digits, runs, key=KEY)
    assert result.order("a")[-1] == 10
    assert result.value("a", 10).high < 0
    (claim,) = result.claims()
    assert claim.name == "values repeat" and claim.verdict == "supported"


def test_the_same_image_twice_stands_in_for_itself(digits: Splits, runs: Runs) -> None:
    means = class_means(digits)
    sets = Sets({"a": (more_points(means, means.stored["images"][3], 3),)})
    result = Shapley(TINY, SHORT, permutations=1, strong=0, contexts=12, pairs=((3, 10),))(
        sets, digits, runs, key=KEY
    )
    (claim,) = [claim for claim in result.claims() if claim.name != "values repeat"]
    assert claim.verdict == "supported"
    assert result.pairs["a"] == ((3, 10),)


# Nulls


def result_of(values: torch.Tensor, interactions: torch.Tensor) -> ShapleyResult:
    points = values.shape[1]
    return ShapleyResult(
        ("a",),
        tuple("0123456789"),
        0.1,
        len(values),
        {"a": torch.arange(points)},
        {"a": values.double()},
        {"a": torch.zeros(len(values), points).double()},
        {"a": tuple(range(1, points + 1))},
        {"a": torch.full((len(values),), points - 1)},
        {"a": ((0, 1), (0, 2), (1, 2))},
        {"a": interactions.double()},
    )


def test_values_that_share_nothing_do_not_repeat(bank: dict[str, torch.Tensor]) -> None:
    values, alarms = bank["values"], 0
    for i in range(DRAWS):
        place = SEED.fold("repeat", i)
        one = values[int(place.integers(len(values), 1))].clone()
        one[1::2] = one[1::2][:, place.fold("order").permutation(one.shape[1])]
        claim = result_of(one, bank["interactions"][0]).claims()[0]
        assert claim.name == "values repeat"
        alarms += claim.verdict == "supported"
    assert alarms <= ALARMS


def test_random_signs_are_no_interaction(bank: dict[str, torch.Tensor]) -> None:
    found, alarms = bank["interactions"], 0
    for i in range(DRAWS):
        place = SEED.fold("signs", i)
        one = found[int(place.integers(len(found), 1))]
        one = one * (2 * place.fold("sign").integers(2, one.shape[1]) - 1)
        claim = result_of(bank["values"][0], one).claims()[1]
        assert claim.name == "strong points stand in for each other"
        alarms += claim.verdict == "supported"
    assert alarms <= ALARMS


# Messages and corner cases


def test_it_says_what_does_not_fit(digits: Splits) -> None:
    with pytest.raises(UserError, match="a pair names two points by their numbers"):
        Shapley(pairs=((2, 2),))
    sets = Sets({"a": (subset(digits, KEY),)})
    # A pair that is asked about is trained once, whatever way round it is named, and never in place of another.
    asked = Shapley(TINY, permutations=1, strong=2, pairs=((0, 1), (1, 0))).trainings(sets, digits, key=KEY)
    assert len(asked) == 1 + 2
    with pytest.raises(UserError, match=r"a pair does not fit the set.*\(0, 10\).*points 0 to 9"):
        Shapley(TINY, pairs=((0, 10),)).trainings(sets, digits, key=KEY)


def test_one_permutation_says_nothing_of_the_error(digits: Splits) -> None:
    sets = Sets({"a": (class_means(digits),)})
    result = Shapley(TINY, Recipe(steps=2), permutations=1, strong=0, stops=5)(
        sets, digits, Runs(Plan()), key=KEY
    )
    assert result.repeats("a").n == 0 and result.needed("a") == "one is not enough to know"
    assert [claim.verdict for claim in result.claims()] == ["inconclusive"]
    assert "several at a time" in result.notes()[-1]


def test_nothing_is_trained_beforehand_for_what_decides_on_the_way(
    digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def announced(*args: object, **kwargs: object) -> list[Training]:
        raise AssertionError("stand-ins were asked for")

    monkeypatch.setattr(Shapley, "trainings", announced)
    sets, runs = Sets({"a": (class_means(digits),)}), Runs(Plan())
    small = Shapley(TINY, Recipe(steps=2), permutations=1, strong=0)
    study: Any = SimpleNamespace(seed=0, real=digits, questions=lambda ipc: [small])
    train_for_all(study, {1: sets}, runs, making.silent)
    assert not runs.trained
    settings = ["net.width=8", "recipe.steps=2", "permutations=1", "strong=0", "only=a"]
    result = pipeline.ask("pointwise/shapley", {"a": class_means(digits)}, digits, settings=settings)
    assert isinstance(result, ShapleyResult) and tuple(result.values) == ("a",)
