"""Real trajectories that all analyses of question 2 share: when they are looked at, by which keys they are trained."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from distillens.analyses.representativeness._trajectory import (
    EVERY,
    along,
    by_replicate,
    mean_of_known,
    moments_of,
    real_recipe,
    replicates,
    shown,
)
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Probabilities, Teacher
from distillens.core.recipe import Recipe
from distillens.core.result import NETWORK, REPLICATE
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import networks, on
from tests.analyses.by_hand import subsets_at

KEY = Key(512, ("trajectory",))
NET = ConvNet(depth=2, width=8)
RECIPE = Recipe(steps=6, batch=256)


def sets_of(real: Splits, distilled: int, random: int) -> Sets:
    return Sets(
        {"a": subsets_at(KEY.fold("a"), real, distilled, 1)},
        {"random_subset": subsets_at(KEY.fold("base"), real, random, 1)},
    )


@pytest.mark.parametrize("steps", [0, 1, 40, 300, 392, 5000])
@pytest.mark.parametrize("about", [0, 1, 2, 12, 48, EVERY])
def test_moments_go_from_the_start_to_the_end(steps: int, about: int) -> None:
    moments = moments_of(steps, about)
    assert list(moments) == sorted(set(moments))
    assert moments[-1] == steps and moments[0] == (0 if about else moments[0])
    assert len(moments) <= max(about, 1) + 1
    if about > steps:
        assert moments == tuple(range(steps + 1))


def test_moments_are_dense_early() -> None:
    moments = moments_of(300, 48)
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert len(moments) >= 40 and gaps[:4] == [1, 1, 1, 1]
    # Rounding aside each gap is at least the one before.
    assert all(b >= a - 1 for a, b in itertools.pairwise(gaps))
    # Half of them lie before the 42nd update: (1 + 300/8)^(1/2) = 6.2 times 8, less 8.
    assert moments[len(moments) // 2] == pytest.approx(42, abs=8)


def test_the_papers_length_and_digits(digits: Splits, like_cifar: Dataset) -> None:
    assert real_recipe(like_cifar) == Recipe(steps=392, batch=256)
    assert real_recipe(digits.train) == Recipe(steps=300, batch=256)


def test_replicates_are_the_most_of_any_set(digits: Splits) -> None:
    assert replicates(sets_of(digits, 3, 2)) == 3
    assert replicates(sets_of(digits, 1, 4)) == 4


@pytest.mark.parametrize(("trajectories", "each"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_every_replicate_has_as_many_and_the_keys_of_the_sets_own_networks(
    digits: Splits, trajectories: int, each: int
) -> None:
    sets = sets_of(digits, 3, 2)
    asked = along(NET, RECIPE, 4, trajectories, sets, digits, KEY)
    assert asked.data is digits.train
    assert asked.snapshots == moments_of(6, 4)
    assert asked.keys == tuple(key for r in range(3) for key in networks(KEY, r, each))


def test_a_trajectory_starts_where_the_sets_network_starts(digits: Splits) -> None:
    sets, runs = sets_of(digits, 2, 2), Runs(Plan())
    (real,) = runs.get(along(NET, RECIPE, 3, 4, sets, digits, KEY))
    parts = by_replicate(real, sets)
    assert [len(part) for part in parts] == [2, 2]
    torch.testing.assert_close(torch.cat([part.snapshots for part in parts]), real.snapshots, rtol=0, atol=0)
    for r, part in enumerate(parts):
        untrained = on(sets.distilled["a"][r], NET, Recipe(steps=0), networks(KEY, r, 2))
        (own,) = runs.get(untrained)
        assert bool((part.at(0) == own.final).all())
        assert bool((part.at(6) == part.final).all()) and not bool((part.at(6) == part.at(0)).all())
    assert not bool((parts[0].at(0) == parts[1].at(0)).all(1).any())


def test_two_askers_share_one_training(digits: Splits) -> None:
    sets, runs = sets_of(digits, 2, 2), Runs(Plan())
    asked = [along(NET, RECIPE, 3, 2, sets, digits, KEY) for _ in range(2)]
    runs.get(asked[0])
    assert runs.missing([asked[1]]) == []
    runs.get(asked[1])
    assert set(runs.trained.values()) == {1} and len(runs.trained) == 2
    # What stands beside the sets is none of its business.
    assert runs.missing([along(NET, RECIPE, 3, 2, sets_of(digits, 2, 1), digits, KEY)]) == []


def test_the_labels_of_a_teacher_are_the_mean_of_its_views() -> None:
    views = KEY.fold("views").normal(3, 4, 2)
    data = Dataset(torch.zeros(4, 1, 8, 8), Teacher("t", views, 0, 2.0), ("a", "b"), Pixel())
    labels = shown(data).labels
    assert isinstance(labels, Probabilities)
    slow = sum(F.softmax(view / 2, 1) for view in views) / 3
    torch.testing.assert_close(labels.values, slow)
    hard = Dataset(data.images, Hard(torch.zeros(4, dtype=torch.int64)), ("a", "b"), data.space)
    assert shown(hard) is hard


def test_a_network_with_running_statistics_is_refused(digits: Splits) -> None:
    batch = ConvNet(depth=2, width=4, norm="batch")
    with pytest.raises(
        UserError, match=r"cannot be followed through training; got ConvNet, which remembers norm0.mean"
    ):
        along(batch, RECIPE, 3, 2, sets_of(digits, 2, 1), digits, KEY)


def test_what_is_not_known_is_left_out_of_a_mean() -> None:
    nan = float("nan")
    found = mean_of_known(torch.tensor([[1.0, nan], [2.0, 4.0], [nan, nan]]))
    assert found is not None and (found.value, found.n, found.unit) == (2.0, 2, REPLICATE)
    left = mean_of_known(torch.tensor([[1.0], [nan]]))
    assert left is not None and (left.n, left.unit, left.high) == (1, REPLICATE, float("inf"))
    single = mean_of_known(torch.tensor([[1.0, nan, 3.0]]))
    assert single is not None and (single.value, single.n, single.unit) == (2.0, 2, NETWORK)
    assert mean_of_known(torch.full((2, 2), nan)) is None
