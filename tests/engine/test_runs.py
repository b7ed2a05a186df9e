from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from distillens.core.contracts import Buffers, Like, Mode, Params
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine, pinned_threads
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Observe, Population, Training, train

PLAN = Plan("stacked", 2)  # five models are three chunks
MODELS = 5


def data(place: str = "data", n: int = 9) -> Dataset:
    return Dataset(
        Key(1).fold(place).normal(n, 1, 8, 12), Hard(torch.arange(n) % 3), ("a", "b", "c"), Pixel()
    )


def training(seed: int = 0, models: int = MODELS) -> Training:
    return Training(
        data(),
        ConvNet(depth=1, width=4),
        Recipe(steps=4, lr=0.1, batch=5),
        Key(seed).split(models),
        snapshots=(0, 2),
        observe=Observe((1, 4), {"watched": data("watched", 7)}),
    )


def same(found: Population, expected: Population) -> bool:
    pairs = [(found.final, expected.final), (found.snapshots, expected.snapshots)]
    for a, b in ((found.seen, expected.seen), (found.buffers, expected.buffers)):
        if a.keys() != b.keys():
            return False
        pairs += [(a[name], b[name]) for name in a]
    said = [(p.net, p.shapes, p.moments, p.seen_moments) for p in (found, expected)]
    return said[0] == said[1] and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(params=["memory", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "store" if request.param == "folder" else None


def test_what_is_asked_for_is_what_training_gives(place: Path | None) -> None:
    asked = [training(0), training(1, 1), training(2, 4)]
    found = Runs(PLAN, folder=place).get(*asked)
    for population, one in zip(found, asked, strict=True):
        assert same(population, train(one, PLAN))


def test_nothing_is_trained_twice(place: Path | None) -> None:
    runs = Runs(PLAN, folder=place)
    first, second = training(0), training(1)
    runs.get(first, first)
    runs.make([first, second])
    runs.get(second, first)
    runs.get(training(0))  # equal, not the same object
    assert runs.trained == dict.fromkeys([*first.identities(), *second.identities()], 1)


def test_what_is_missing_can_be_counted_before_it_is_made(place: Path | None) -> None:
    runs = Runs(PLAN, folder=place)
    runs.get(training(0))
    todo = runs.missing([training(0), training(1), training(1)])
    assert [part.keys for part in todo] == [Key(1).split(5)[i : i + 2] for i in (0, 2, 4)]
    assert sum(runs.trained.values()) == 5


def test_progress_counts_models(place: Path | None) -> None:
    told: list[tuple[int, int]] = []
    runs = Runs(PLAN, folder=place)
    runs.get(training(0), report=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    runs.get(training(0), report=lambda done, total: told.append((done, total)))
    assert len(told) == 3


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Runs(PLAN).get(training(0))
    assert list(tmp_path.iterdir()) == []
    other = Runs(PLAN)
    other.get(training(0))
    assert sum(other.trained.values()) == 5


def test_another_process_finds_what_was_made(tmp_path: Path) -> None:
    (made,) = Runs(PLAN, folder=tmp_path).get(training(0))
    before = files(tmp_path)
    assert len(before) == 3
    later = Runs(PLAN, folder=tmp_path)
    (found,) = later.get(training(0))
    assert same(found, made)
    assert not later.trained
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "change", ["plan", "precision", "torch", "data", "recipe", "net", "snapshots", "watched"]
)
def test_what_changes_the_bytes_is_another_entry(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plan = training(0), PLAN
    Runs(plan, folder=tmp_path).get(asked)
    if change == "plan":
        plan = Plan("stacked", 2, threads=2)
    elif change == "precision":
        plan = Plan("stacked", 2, precision="float64")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif change == "data":
        asked = replace(asked, data=data("other"))
    elif change == "recipe":
        asked = replace(asked, recipe=asked.recipe.but(lr=0.2))
    elif change == "net":
        asked = replace(asked, net=ConvNet(depth=1, width=5))
    elif change == "snapshots":
        asked = replace(asked, snapshots=(0, 3))
    else:
        asked = replace(asked, observe=Observe((1, 4), {"watched": data("elsewhere", 7)}))
    other = Runs(plan, folder=tmp_path)
    (found,) = other.get(asked)
    assert sum(other.trained.values()) == 5
    with pinned_threads(plan.threads):
        assert same(found, train(asked, plan))


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "no metadata"])
def test_a_damaged_file_is_made_again_and_only_that(tmp_path: Path, damage: str) -> None:
    (made,) = Runs(PLAN, folder=tmp_path).get(training(0))
    before = files(tmp_path)
    hurt = sorted(before)[1]
    whole = before[hurt]
    content = {"empty": b"", "cut": whole[:-9], "text": b"not tensors at all"}.get(damage)
    if content is None:
        from safetensors.torch import load, save

        content = save(load(whole))
    (tmp_path / hurt).write_bytes(content)
    later = Runs(PLAN, folder=tmp_path)
    (found,) = later.get(training(0))
    assert same(found, made)
    assert 1 <= sum(later.trained.values()) <= 2
    assert files(tmp_path) == before


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_request_goes_on_where_it_stopped(tmp_path: Path, after: int) -> None:
    (whole,) = Runs(PLAN, folder=tmp_path / "whole").get(training(0))
    stopped = Runs(PLAN, folder=tmp_path / "stopped")
    told: list[int] = []

    def report(done: int, total: int) -> None:
        told.append(done)
        if len(told) == after:
            raise StoppedError

    with pytest.raises(StoppedError):
        stopped.get(training(0), report=report)
    assert len(files(tmp_path / "stopped")) == after
    later = Runs(PLAN, folder=tmp_path / "stopped")
    (found,) = later.get(training(0))
    assert same(found, whole)
    assert sum(later.trained.values()) == 5 - sum(stopped.trained.values())
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_the_order_of_asking_changes_nothing(tmp_path: Path) -> None:
    asked = [training(0), training(1, 1), training(2, 3)]
    Runs(PLAN, folder=tmp_path / "one").get(*asked)
    other = Runs(PLAN, folder=tmp_path / "other")
    for each in asked[::-1]:
        other.get(each)
    assert files(tmp_path / "one") == files(tmp_path / "other")


def test_two_workers_give_the_bytes_of_one(tmp_path: Path) -> None:
    asked = [training(0), replace(training(1), net=BatchNorm())]
    here = Runs(PLAN, folder=tmp_path / "here").get(*asked)
    with Engine(2) as engine:
        runs = Runs(PLAN, engine, tmp_path / "there")
        there = runs.get(*asked)
        (memory,) = Runs(PLAN, engine).get(asked[0])
    assert sum(runs.trained.values()) == 10
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    assert same(memory, here[0])
    assert files(tmp_path / "here") == files(tmp_path / "there")


@dataclass(frozen=True)
class BatchNorm:
    """A network with buffers: they must come back with the parameters."""

    mixes_examples: ClassVar[bool] = True

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        return {"weight": key.normal(like.k, 96), "bias": torch.zeros(like.k)}, {"mean": torch.zeros(96)}

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        x = x.flatten(1)
        if mode == "evaluate":
            return x - buffers["mean"], buffers
        return x - x.mean(0), {"mean": 0.9 * buffers["mean"] + 0.1 * x.mean(0)}

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        features, buffers = self.features(params, buffers, x, mode)
        return F.linear(features, params["weight"], params["bias"]), buffers


def test_buffers_come_back(place: Path | None) -> None:
    asked = replace(training(0), net=BatchNorm())
    (found,) = Runs(PLAN, folder=place).get(asked)
    assert found.buffers["mean"].shape == (5, 96)
    assert float(found.buffers["mean"].abs().sum()) > 0
    assert same(found, train(asked, PLAN))


# ---- what is a moment of another ----


def lasting(steps: int, *snapshots: int, **other: object) -> Training:
    """A training of so many steps, nothing watched."""
    changed = training(0).recipe.but(steps=steps, **other)
    return replace(training(0), recipe=changed, snapshots=snapshots, observe=None)


def test_a_moment_that_a_longer_training_keeps_is_not_trained(place: Path | None) -> None:
    asked = [lasting(4), lasting(6, 2, 4, 6), lasting(6, 4), lasting(2, 2)]
    told: list[tuple[int, int]] = []
    runs = Runs(PLAN, folder=place)
    runs.make(asked, report=lambda done, total: told.append((done, total)))
    assert runs.trained == dict.fromkeys(asked[1].identities(), 1)
    assert told[-1] == (MODELS, MODELS)
    found = runs.get(*asked)
    assert all(same(one, train(wanted, PLAN)) for one, wanted in zip(found, asked, strict=True))
    assert sum(runs.trained.values()) == MODELS


def test_read_off_or_trained_the_bytes_are_the_same(tmp_path: Path) -> None:
    asked = [lasting(4, 0, 4), lasting(6, 0, 4)]
    Runs(PLAN, folder=tmp_path / "together").make(asked)
    for one in asked:
        Runs(PLAN, folder=tmp_path / "apart").make([one])
    assert files(tmp_path / "together") == files(tmp_path / "apart")


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param((lasting(4), lasting(6, 2)), id="a moment that is not kept"),
        pytest.param((lasting(4, 1), lasting(6, 4)), id="a snapshot that is not kept"),
        pytest.param((lasting(4), lasting(6, 4, batch=4)), id="another batch"),
        pytest.param((lasting(4), lasting(6, 4).some([1, 0, 2, 3, 4])), id="other keys"),
        pytest.param(
            (lasting(4, schedule="cosine"), lasting(6, 4, schedule="cosine")), id="a rate that knows the end"
        ),
        pytest.param(
            tuple(replace(lasting(n, *at), net=BatchNorm()) for n, at in ((4, ()), (6, (4,)))),
            id="running means",
        ),
        pytest.param(
            tuple(replace(lasting(n, *at), observe=training().observe) for n, at in ((4, ()), (6, (4,)))),
            id="watched",
        ),
    ],
)
def test_what_is_more_than_a_moment_is_trained(pair: tuple[Training, Training]) -> None:
    runs = Runs(Plan("stacked", MODELS))
    found = runs.get(*pair)
    assert sum(runs.trained.values()) == 2 * MODELS
    assert all(same(one, train(wanted, runs.plan)) for one, wanted in zip(found, pair, strict=True))


# ---- the bound on the store ----


def one(seed: int) -> Training:
    """A training of a single model: one file."""
    return training(seed, 1)


def kept(folder: Path, seeds: range) -> list[int]:
    runs = Runs(PLAN, folder=folder)
    return [seed for seed in seeds if not runs.missing([one(seed)])]


def age(folder: Path, *seeds: int) -> int:
    """Make the files of these trainings, each a minute younger than the one before; a file's size."""
    sizes = []
    for place, seed in enumerate(seeds):
        before = set(folder.rglob("*.safetensors"))
        Runs(PLAN, folder=folder).get(one(seed))
        (new,) = set(folder.rglob("*.safetensors")) - before
        os.utime(new, (place * 60, place * 60))
        sizes.append(new.stat().st_size)
    assert len(set(sizes)) == 1
    return sizes[0]


def test_a_store_over_its_limit_loses_what_was_used_longest_ago(tmp_path: Path) -> None:
    size = age(tmp_path, 0, 1, 2, 3)
    Runs(PLAN, folder=tmp_path, limit=3 * size).get(one(4))
    assert kept(tmp_path, range(5)) == [2, 3, 4]


def test_a_store_at_its_limit_loses_nothing(tmp_path: Path) -> None:
    size = age(tmp_path, 0, 1)
    Runs(PLAN, folder=tmp_path, limit=3 * size).get(one(2))
    assert kept(tmp_path, range(3)) == [0, 1, 2]


def test_reading_makes_young_again(tmp_path: Path) -> None:
    size = age(tmp_path, 0, 1, 2)
    Runs(PLAN, folder=tmp_path).get(one(0))
    Runs(PLAN, folder=tmp_path, limit=2 * size).get(one(3))
    assert kept(tmp_path, range(4)) == [0, 3]


def test_what_this_process_used_is_never_lost(tmp_path: Path) -> None:
    age(tmp_path, 0, 1, 2)
    runs = Runs(PLAN, folder=tmp_path, limit=1)
    runs.make([one(1)])
    runs.get(one(3), one(4))
    assert kept(tmp_path, range(5)) == [1, 3, 4]
    assert runs.trained == dict.fromkeys([*one(3).identities(), *one(4).identities()], 1)
