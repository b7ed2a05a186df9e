"""Trainings of different data in one stack: the same bits as alone, and who stands beside whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distillens import kernels
from distillens.core.artefact import Order
from distillens.core.contracts import Net
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard, Labels, Logits, Probabilities, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel, Standardised
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine
from distillens.nets import named
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.stacks import together, train_stack
from distillens.train import Observe, Population, Training, chunks, train_chunk

PLAN = Plan("stacked", 32, 10_000, kernels="winograd")
NET = ConvNet(depth=2, width=32)
CLASSES = 10
compiled = pytest.mark.skipif(
    "winograd" not in kernels.available(), reason="no C++ compiler for kernels of our own"
)


KINDS: dict[str, Callable[[torch.Tensor], Labels]] = {
    "hard": lambda values: Hard(torch.arange(len(values)) % CLASSES),
    "probabilities": lambda values: Probabilities(values.softmax(-1)),
    "logits": lambda values: Logits(values),
    "targets": lambda values: Targets(values),
}


def data(place: int, n: int, shape: tuple[int, int, int] = (1, 8, 8), kind: str = "hard") -> Dataset:
    key = Key(3).fold("set", place)
    classes = tuple(map(str, range(CLASSES)))
    return Dataset(
        key.normal(n, *shape), KINDS[kind](key.fold("values").normal(n, CLASSES)), classes, Pixel()
    )


def trainings(
    count: int, n: int, recipe: Recipe, net: Net = NET, models: int = 1, **wishes: Any
) -> list[Training]:
    return [
        Training(data(j, n, **wishes), net, recipe, Key(4).fold("set", j).split(models), snapshots=(0, 2))
        for j in range(count)
    ]


def same(found: Sequence[Population], parts: Sequence[Training], plan: Plan = PLAN) -> bool:
    alone = [train_chunk(part, plan) for part in parts]
    return len(found) == len(parts) and all(
        torch.equal(a.final, b.final)
        and torch.equal(a.snapshots, b.snapshots)
        and (a.moments, a.shapes, a.net) == (b.moments, b.shapes, b.net)
        for a, b in zip(found, alone, strict=True)
    )


@compiled
# Below and above the eight groups from which the kernels share their work out otherwise.
@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 13])
@pytest.mark.parametrize(
    ("n", "batch"), [(10, None), (37, None), (100, None), (110, 100), (120, 50), (450, None)]
)
def test_bits_are_those_of_each_alone(count: int, n: int, batch: int | None) -> None:
    parts = trainings(count, n, Recipe(steps=4, lr=0.05, batch=batch))
    assert together(parts, PLAN) == [tuple(range(count))]
    assert same(train_stack(parts, PLAN), parts)


CASES: dict[str, list[Training]] = {
    "probabilities": trainings(9, 20, Recipe(steps=3), kind="probabilities"),
    "logits": trainings(9, 20, Recipe(steps=3), kind="logits"),
    "targets": trainings(9, 20, Recipe(steps=3, lr=0.001), kind="targets"),
    "adam": trainings(9, 20, Recipe(steps=3, optimiser="adam", weight_decay=0.01)),
    "adamw": trainings(3, 20, Recipe(steps=3, optimiser="adamw", schedule="cosine")),
    "augmented": trainings(9, 20, Recipe(steps=3, augment="color_crop_cutout_flip_scale_rotate")),
    "several models a set": trainings(4, 30, Recipe(steps=3), models=3),
    "colours": trainings(9, 12, Recipe(steps=3), shape=(3, 16, 16)),
    "32 px": trainings(3, 10, Recipe(steps=3), net=ConvNet(width=16), shape=(3, 32, 32)),
    "few channels": trainings(9, 25, Recipe(steps=3), net=ConvNet(depth=2, width=8)),
    "one block": trainings(9, 25, Recipe(steps=3), net=ConvNet(depth=1, width=24)),
}


@compiled
@pytest.mark.parametrize("case", CASES)
def test_bits_are_kept_whatever_is_trained(case: str) -> None:
    parts = CASES[case]
    assert together(parts, PLAN) == [tuple(range(len(parts)))]
    assert same(train_stack(parts, PLAN), parts)


@compiled
def test_models_on_subsets_of_one_dataset_stand_beside_others() -> None:
    whole, recipe = data(0, 60), Recipe(steps=3)
    own = tuple(Key(5).fold(j).permutation(60)[:20] for j in range(4))
    subsets = Training(whole, NET, recipe, Key(6).split(4), subsets=own, snapshots=(0, 2))
    parts = [subsets, *trainings(3, 20, recipe), replace(subsets, keys=Key(7).split(4))]
    assert together(parts, PLAN) == [(0, 1, 2, 3, 4)]
    assert same(train_stack(parts, PLAN), parts)


@compiled
def test_a_population_of_a_stack_keeps_no_other_alive() -> None:
    parts = trainings(5, 10, Recipe(steps=2))
    for population in train_stack(parts, PLAN):
        assert population.final.untyped_storage().nbytes() == 4 * population.final.numel()


def alone(**changes: Any) -> Training:
    return replace(trainings(1, 20, Recipe(steps=2))[0], **changes)


ONE = alone()
LONELY: dict[str, Training] = {
    "recipe": alone(recipe=Recipe(steps=3)),
    "size": trainings(1, 21, Recipe(steps=2))[0],
    "network": alone(net=ConvNet(depth=2, width=16)),
    "snapshots": alone(snapshots=(1,)),
    "labels": trainings(1, 20, Recipe(steps=2), kind="probabilities")[0],
    "units": alone(data=replace(ONE.data, space=Standardised((0.5,), (0.5,)))),
}


@compiled
@pytest.mark.parametrize("what", LONELY)
def test_what_differs_is_not_put_together(what: str) -> None:
    assert together([ONE, LONELY[what], ONE], PLAN) == [(0, 2), (1,)]


def views(n: int) -> Dataset:
    seen = Key(8).normal(2, n, CLASSES)
    return replace(data(0, n), labels=Teacher("a teacher", seen, 5, 1.0, 0))


BY_THEMSELVES: dict[str, Training] = {
    "weighted": alone(weights=torch.ones(1, 20)),
    "watched": alone(observe=Observe((1,), {"watched": data(9, 5)})),
    "ordered": alone(order=Order(torch.zeros(2, 1, dtype=torch.int64), torch.full((2,), 0.1))),
    "cutmix": alone(recipe=Recipe(steps=2, cutmix=0.5)),
    "flat minima": alone(recipe=Recipe(steps=2, rho=0.1)),
    "views": alone(data=views(20)),
    "batch norm": alone(net=ConvNet(depth=2, width=32, norm="batch")),
    "largest of each": alone(net=ConvNet(depth=2, width=32, pooling="max")),
    "odd channels": alone(net=ConvNet(depth=2, width=20)),
    "later planes": alone(net=ConvNet(depth=3, width=32)),
    "another network": alone(net=named("mlp", ONE.data)),
    "odd planes": trainings(1, 20, Recipe(steps=2), shape=(1, 8, 12))[0],
    "subsets of two sizes": replace(ONE, keys=Key(1).split(2), subsets=(torch.arange(9), torch.arange(10))),
}


@compiled
@pytest.mark.parametrize("what", BY_THEMSELVES)
def test_what_keeps_its_bits_only_alone_is_left_alone(what: str) -> None:
    assert together([BY_THEMSELVES[what]] * 2, PLAN) == [(0,), (1,)]


@pytest.mark.parametrize(
    "plan",
    [replace(PLAN, kernels="plain"), replace(PLAN, kernels="fused"), replace(PLAN, precision="bfloat16")],
    ids=lambda plan: f"{plan.kernels} {plan.precision}",
)
def test_other_kernels_and_precisions_promise_nothing(plan: Plan) -> None:
    assert together([ONE, ONE], plan) == [(0,), (1,)]


@compiled
def test_a_stack_holds_what_the_plan_says_and_a_workers_share() -> None:
    parts = trainings(10, 20, Recipe(steps=2))
    sizes = [len(stack) for stack in together(parts, replace(PLAN, chunk=4))]
    assert sizes == [4, 3, 3]
    assert [len(stack) for stack in together(parts, replace(PLAN, images=100))] == [5, 5]
    assert [len(stack) for stack in together(parts, PLAN, workers=2)] == [5, 5]
    assert [len(stack) for stack in together(parts, PLAN, workers=64)] == [1] * 10
    assert [len(stack) for stack in together(parts, replace(PLAN, layout="loop"))] == [1] * 10
    # A group that is a small part of the whole stays together, however many workers there are.
    more = [*parts[:3], *trainings(8, 200, Recipe(steps=2))]
    assert together(more, PLAN, workers=4)[0] == (0, 1, 2)
    assert together([], PLAN) == []
    # Of chunks that two of are too much, and one of which is more than the plan would cut.
    large = trainings(3, 20, Recipe(steps=2), models=20)
    assert [len(stack) for stack in together(large, PLAN)] == [1, 1, 1]
    assert [len(stack) for stack in together(large, replace(PLAN, chunk=8))] == [1, 1, 1]
    assert [len(stack) for stack in together(large, replace(PLAN, chunk=40))] == [1, 2]


@compiled
def test_every_chunk_is_trained_once_wherever_it_stands() -> None:
    parts = [
        part
        for training in [*trainings(5, 20, Recipe(steps=2), models=5), *trainings(7, 10, Recipe(steps=2))]
        for part in chunks(training, replace(PLAN, chunk=3))
    ]
    stacks = together([*parts, *BY_THEMSELVES.values()], replace(PLAN, chunk=3), workers=3)
    assert sorted(i for stack in stacks for i in stack) == list(range(len(parts) + len(BY_THEMSELVES)))


@compiled
def test_the_store_ends_in_the_same_bytes_whatever_was_missing(tmp_path: Path) -> None:
    asked = [*trainings(9, 20, Recipe(steps=2)), BY_THEMSELVES["weighted"], BY_THEMSELVES["another network"]]

    def stored(folder: str) -> dict[str, bytes]:
        root = tmp_path / folder
        return {str(one.relative_to(root)): one.read_bytes() for one in root.rglob("*.safetensors")}

    Runs(PLAN, folder=tmp_path / "at once").make(asked)
    for one in asked:
        Runs(PLAN, folder=tmp_path / "one by one").make([one])
    bits = Runs(PLAN, folder=tmp_path / "in parts")
    bits.make(asked[3:6])
    bits.make(asked)
    assert bits.trained == dict.fromkeys([name for one in asked for name in one.identities()], 1)
    with Engine(2) as engine:
        Runs(PLAN, engine, folder=tmp_path / "by two workers").make(asked)
    assert len(stored("at once")) == len(asked)
    for other in ("one by one", "in parts", "by two workers"):
        assert stored(other) == stored("at once")


@compiled
def test_long_stacks_go_first(tmp_path: Path) -> None:
    class Watched(Engine):
        def map(self, function: Any, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
            self.work = [sum(part.image_steps for part in parts) for parts, _ in jobs]
            return super().map(function, jobs)

    engine = Watched()
    short, long = trainings(2, 10, Recipe(steps=2)), trainings(2, 40, Recipe(steps=2))
    Runs(PLAN, engine, folder=tmp_path).make([short[0], long[0], short[1], long[1]])
    assert engine.work == [160, 40]
