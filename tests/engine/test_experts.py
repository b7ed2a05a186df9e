"""Expert trajectories are trained once, read where they lie, and made again or refused where they are damaged."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from distillens.core.checks import UserError
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.core.storage import write_json, write_pieces
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine
from distillens.experts import Experts, Listing, Trajectories
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import Training, train

PLAN = Plan("stacked", 2)  # three experts are two chunks
NET = ConvNet(depth=1, width=4)
PLAIN = Recipe(batch=4, lr=0.1, momentum=0.5, augment="flip")
FLAT = PLAIN.but(rho=0.01, gsam_alpha=0.3)


def data(place: str = "data", n: int = 9) -> Dataset:
    return Dataset(
        Key(1).fold(place).normal(n, 1, 8, 12), Hard(torch.arange(n) % 3), ("a", "b", "c"), Pixel()
    )


def experts(passes: int, seed: int = 0, count: int = 3, recipe: Recipe = PLAIN) -> Experts:
    return Experts(data(), NET, recipe, Key(seed).split(count), passes)


def numbers(found: Trajectories) -> torch.Tensor:
    """Everything [experts, passes + 1, P] that can be read."""
    return torch.stack(
        [torch.stack([found.at(e, t) for t in range(found.passes + 1)]) for e in range(len(found))]
    )


def expected(asked: Experts, plan: Plan = PLAN) -> torch.Tensor:
    return train(asked.training, plan).snapshots


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def once(*asked: Experts) -> dict[str, int]:
    """The count of what was trained, where each of these was trained once."""
    return dict.fromkeys([name for each in asked for name in each.training.identities()], 1)


@pytest.fixture(params=["memory", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "store" if request.param == "folder" else None


# ---- values ----


def test_experts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="experts: passes must be at least 1; got 0"):
        experts(0)
    with pytest.raises(UserError, match="experts: experts must be at least 1; got 0"):
        experts(1, count=0)
    with pytest.raises(UserError, match="experts need a constant schedule; got cosine"):
        experts(1, recipe=PLAIN.but(schedule="cosine"))


def test_a_look_outside_is_refused(place: Path | None) -> None:
    found = Runs(PLAN, folder=place).trajectories(experts(2))
    for expert, passes in ((3, 0), (-1, 0), (0, 3), (0, -1)):
        with pytest.raises(UserError) as error:
            found.at(expert, passes)
        assert str(error.value) == (
            f"there is no such stretch of an expert; got expert {expert}, pass {passes}; "
            "expected experts 0 to 2, passes 0 to 2"
        )


# ---- the store ----


@pytest.mark.parametrize("recipe", [PLAIN, FLAT], ids=["plain", "gsam"])
def test_trajectories_are_what_training_gives(place: Path | None, recipe: Recipe) -> None:
    asked = experts(3, recipe=recipe)
    runs = Runs(PLAN, folder=place)
    found = runs.trajectories(asked)
    assert torch.equal(numbers(found), expected(asked))
    assert (found.net, found.passes, found.sizes, found.fingerprint) == (NET, 3, (2, 1), "")
    assert found.shapes == Shapes.of(NET.init(asked.data, Key(0))[0])
    assert runs.trained == once(asked)


def test_flat_minima_are_other_experts(place: Path | None) -> None:
    runs = Runs(PLAN, folder=place)
    plain, flat = (numbers(runs.trajectories(experts(2, recipe=recipe))) for recipe in (PLAIN, FLAT))
    assert torch.equal(plain[:, 0], flat[:, 0])
    assert not torch.isclose(plain[:, 1:], flat[:, 1:]).all()
    assert bool(flat.isfinite().all())


@pytest.mark.parametrize("recipe", [PLAIN, FLAT], ids=["plain", "gsam"])
def test_the_longest_serve_all(place: Path | None, recipe: Recipe) -> None:
    short, long = experts(1, recipe=recipe), experts(3, recipe=recipe)
    runs = Runs(PLAN, folder=place)
    assert [
        (len(part.keys), part.passes) for part in runs.missing([short, long]) if isinstance(part, Experts)
    ] == [
        (2, 3),
        (1, 3),
    ]
    runs.make([short, long, short])
    assert runs.trained == once(long)
    assert torch.equal(numbers(runs.trajectories(short)), expected(short))
    assert torch.equal(numbers(runs.trajectories(long)), expected(long))
    assert runs.trained == once(long)


def test_longer_ones_are_trained_again_and_shorter_ones_are_not(place: Path | None) -> None:
    runs = Runs(PLAN, folder=place)
    first = runs.trajectories(experts(2))
    assert runs.missing([experts(1), experts(2)]) == []
    runs.trajectories(experts(3))
    assert runs.trained == once(experts(2), experts(3))
    for passes in (1, 2, 3):
        assert torch.equal(numbers(runs.trajectories(experts(passes))), expected(experts(passes)))
    assert torch.equal(numbers(first), expected(experts(2)))  # what was handed out before stays
    assert runs.trained == once(experts(2), experts(3))


def test_another_process_finds_them(tmp_path: Path) -> None:
    Runs(PLAN, folder=tmp_path).trajectories(experts(3))
    before = files(tmp_path)
    assert len(before) == 2
    later = Runs(PLAN, folder=tmp_path)
    assert torch.equal(numbers(later.trajectories(experts(2))), expected(experts(2)))
    assert not later.trained
    assert files(tmp_path) == before


@pytest.mark.parametrize("change", ["plan", "precision", "torch", "data", "recipe", "gsam", "net", "keys"])
def test_what_changes_the_bytes_is_another_entry(
    place: Path | None, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plan = experts(2), PLAN
    runs = Runs(plan, folder=place)
    runs.trajectories(asked)
    if change == "plan":
        runs.plan = Plan("stacked", 4)
    elif change == "precision":
        runs.plan = Plan("stacked", 2, precision="float64")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    else:
        changes: dict[str, dict[str, Any]] = {
            "data": {"data": data("other")},
            "recipe": {"recipe": PLAIN.but(lr=0.2)},
            "gsam": {"recipe": FLAT},
            "net": {"net": replace(NET, pooling="max")},
            "keys": {"keys": Key(1).split(3)},
        }
        asked = replace(asked, **changes[change])
    runs.trained.clear()
    found = numbers(runs.trajectories(asked))
    assert found.dtype == runs.plan.dtype
    assert torch.equal(found, expected(asked, runs.plan))
    assert runs.trained == once(asked)


def test_populations_and_experts_do_not_mix(place: Path | None) -> None:
    runs = Runs(PLAN, folder=place)
    asked = experts(2)
    (population,) = runs.get(asked.training)
    found = runs.trajectories(asked)
    assert torch.equal(numbers(found), population.snapshots)
    assert set(runs.trained.values()) == {2}
    assert torch.equal(runs.get(asked.training)[0].final, population.final)


def rewritten(
    change: Callable[[torch.Tensor], torch.Tensor], name: str = "snapshots"
) -> Callable[[bytes], bytes]:
    def rewrite(whole: bytes) -> bytes:
        return save({name: change(load(whole)["snapshots"]).contiguous()})

    return rewrite


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-4],
    "cut short": lambda whole: whole[:20],
    "grown": lambda whole: whole + b"\0",
    "text": lambda whole: b"not tensors at all",
    "an expert short": rewritten(lambda snapshots: snapshots[1:]),
    "a pass short": rewritten(lambda snapshots: snapshots[:, 1:]),
    "a parameter short": rewritten(lambda snapshots: snapshots[..., 1:]),
    "another name": rewritten(lambda snapshots: snapshots, "final"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("passes", [2, 1])
def test_a_damaged_file_is_made_again_and_only_that(tmp_path: Path, damage: str, passes: int) -> None:
    """Already when the trajectories are asked for, also where shorter ones are."""
    Runs(PLAN, folder=tmp_path).trajectories(experts(2))
    before = files(tmp_path)
    hurt = next(name for name in sorted(before) if load(before[name])["snapshots"].shape[0] == 2)
    (tmp_path / hurt).write_bytes(DAMAGES[damage](before[hurt]))
    later = Runs(PLAN, folder=tmp_path)
    found = later.trajectories(experts(passes))
    assert sum(later.trained.values()) == 2
    assert torch.equal(numbers(found), expected(experts(passes)))
    if passes == 2:
        assert files(tmp_path) == before


def test_a_damaged_longer_file_is_no_loss_to_shorter_ones(tmp_path: Path) -> None:
    Runs(PLAN, folder=tmp_path).trajectories(experts(1))
    Runs(PLAN, folder=tmp_path).trajectories(experts(3))
    for path in (tmp_path / "experts").glob("*.000003.safetensors"):
        path.write_bytes(b"")
    later = Runs(PLAN, folder=tmp_path)
    assert later.missing([experts(1)]) == []
    assert [part.passes for part in later.missing([experts(2)]) if isinstance(part, Experts)] == [2, 2]
    assert {path.name.split(".")[1] for path in (tmp_path / "experts").iterdir()} == {"000001"}


def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    Runs(PLAN, folder=tmp_path).trajectories(experts(1))
    path = next((tmp_path / "experts").iterdir())
    copy = path.with_name(path.name.replace(".000001.", ".000001 (copy)."))
    copy.write_bytes(b"")
    later = Runs(PLAN, folder=tmp_path)
    assert len(later.trajectories(experts(2))) == 3
    assert copy.is_file()


class StoppedError(Exception):
    pass


def test_an_interrupted_request_goes_on_where_it_stopped(tmp_path: Path) -> None:
    Runs(PLAN, folder=tmp_path / "whole").trajectories(experts(2))

    def report(done: int, total: int) -> None:
        assert total == 3
        raise StoppedError

    stopped = Runs(PLAN, folder=tmp_path / "stopped")
    with pytest.raises(StoppedError):
        stopped.trajectories(experts(2), report=report)
    assert len(files(tmp_path / "stopped")) == 1
    later = Runs(PLAN, folder=tmp_path / "stopped")
    later.trajectories(experts(2))
    assert sum(stopped.trained.values()) + sum(later.trained.values()) == 3
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_failing_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="the disk is full"):
            Runs(PLAN, folder=tmp_path).trajectories(experts(1))
    assert files(tmp_path) == {}
    assert len(Runs(PLAN, folder=tmp_path).trajectories(experts(1))) == 3


def test_a_file_that_another_process_clears_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(PLAN, folder=tmp_path)
    make, cleared = runs.make, []

    def clearing(requests: Any, **options: Any) -> None:
        make(requests, **options)
        if not cleared:
            for path in (tmp_path / "experts").iterdir():
                path.unlink()
                cleared.append(path)

    monkeypatch.setattr(runs, "make", clearing)
    assert torch.equal(numbers(runs.trajectories(experts(1))), expected(experts(1)))
    assert set(runs.trained.values()) == {2}


def test_files_that_vanish_again_and_again_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(PLAN, folder=tmp_path)
    monkeypatch.setattr(runs, "_save", lambda *_: None)
    with pytest.raises(
        UserError, match=r"experts in .* are removed while they are in use; give each process a store"
    ):
        runs.trajectories(experts(1))


def test_a_file_that_goes_later_is_told(tmp_path: Path) -> None:
    found = Runs(PLAN, folder=tmp_path).trajectories(experts(1))
    for path in (tmp_path / "experts").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"there is no file .*000001.safetensors"):
        found.at(0, 0)


@pytest.mark.parametrize("recipe", [PLAIN, FLAT], ids=["plain", "gsam"])
def test_two_workers_give_the_bytes_of_one(tmp_path: Path, recipe: Recipe) -> None:
    asked = [experts(2, recipe=recipe), experts(1, 7, recipe=recipe)]
    Runs(PLAN, folder=tmp_path / "here").make(asked)
    with Engine(2) as engine:
        runs = Runs(PLAN, engine, tmp_path / "there")
        runs.make(asked)
        memory = Runs(PLAN, engine).trajectories(asked[0])
    assert runs.trained == once(*asked)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert torch.equal(numbers(memory), numbers(runs.trajectories(asked[0])))


def test_trajectories_travel_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = Runs(PLAN, folder=Path("store")).trajectories(experts(2))
    packed = pickle.dumps(found)
    assert len(packed) < 2000
    assert found.shapes.size * 3 * 3 * 4 > 10_000
    monkeypatch.chdir("/")  # a worker may stand elsewhere
    assert torch.equal(numbers(pickle.loads(packed)), expected(experts(2)))


# ---- the bound on the store ----


def test_experts_count_against_the_limit_and_go_by_age(tmp_path: Path) -> None:
    def kept() -> list[int]:
        names = {path.name for path in (tmp_path / "experts").iterdir()}
        return [seed for seed, name in enumerate(made) if name in names]

    made: list[str] = []
    for seed in range(3):
        Runs(PLAN, folder=tmp_path).make([experts(1, seed, 1)])
        (new,) = {path for path in (tmp_path / "experts").iterdir() if path.name not in made}
        os.utime(new, (seed * 60, seed * 60))
        made.append(new.name)
    size = (tmp_path / "experts" / made[0]).stat().st_size
    Runs(PLAN, folder=tmp_path).trajectories(experts(1, 0, 1))  # reading makes young again
    assert kept() == [0, 1, 2]
    population = Training(data(), NET, PLAIN.but(steps=1), Key(9).split(1))
    other = Runs(PLAN, folder=tmp_path, limit=2 * size + 1)
    other.get(population)  # a population drives experts out
    assert kept() == [0]
    assert not other.missing([population])


def test_what_this_process_used_is_never_lost(tmp_path: Path) -> None:
    Runs(PLAN, folder=tmp_path).make([experts(1, seed) for seed in range(3)])
    runs = Runs(PLAN, folder=tmp_path, limit=1)
    asked, made = runs.trajectories(experts(1, 1)), runs.trajectories(experts(2, 3))
    runs.get(Training(data(), NET, PLAIN.but(steps=1), Key(9).split(1)))
    assert torch.equal(numbers(asked), expected(experts(1, 1)))
    assert torch.equal(numbers(made), expected(experts(2, 3)))
    assert runs.trained == once(experts(2, 3)) | dict.fromkeys(
        Training(data(), NET, PLAIN.but(steps=1), Key(9).split(1)).identities(), 1
    )
    later = Runs(PLAN, folder=tmp_path)
    assert [bool(later.missing([experts(1, seed)])) for seed in range(4)] == [True, False, True, False]


# ---- a folder of imported experts ----


def imported(folder: Path, seed: int = 0, experts: tuple[int, ...] = (2, 1), passes: int = 2) -> torch.Tensor:
    """Write an import as a reader of a foreign layout does; all its numbers [experts, passes + 1, P]."""
    shapes = Shapes.of(NET.init(data(), Key(0))[0])
    parts = [Key(seed).fold(i).normal(size, passes + 1, shapes.size) for i, size in enumerate(experts)]
    digests = tuple(f"{seed}{i}" for i in range(len(parts)))
    listing = Listing(NET, shapes, passes, experts, digests, (1, 8, 12), 3, "theirs/")
    for part, path, digest in zip(parts, listing.paths(folder), digests, strict=True):
        write_pieces(path, "snapshots", tuple(part.shape), part, {"sha256": digest})
    listing.save(folder)
    return torch.cat(parts)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        Trajectories.load(folder)
    return str(error.value)


def test_an_import_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = imported(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    found = Trajectories.load(Path("in"))
    assert (len(found), found.passes, found.net, found.sizes) == (3, 2, NET, (2, 1))
    packed = pickle.dumps(found)
    assert len(packed) < 2000
    monkeypatch.chdir("/")
    assert torch.equal(numbers(found), written)
    assert torch.equal(numbers(pickle.loads(packed)), written)


def test_opening_reads_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is one hole of 2 GB is opened like any other."""
    imported(tmp_path)
    about = json.loads((tmp_path / "experts.json").read_text())
    size = Shapes.of(NET.init(data(), Key(0))[0]).size
    count = (2 << 30) // (4 * 3 * size)
    digests, shapes = tuple(about["digests"]), Trajectories.load(tmp_path).shapes
    Listing(NET, shapes, 2, (count, 1), digests, (1, 8, 12), 3, "theirs/").save(tmp_path)
    span = count * 3 * size * 4
    header = json.dumps(
        {
            "__metadata__": {"sha256": digests[0]},
            "snapshots": {"dtype": "F32", "shape": [count, 3, size], "data_offsets": [0, span]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with (tmp_path / "experts-000.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + span)
    found = Trajectories.load(tmp_path)
    assert len(found) == count + 1
    assert not found.at(count - 1, 2).any()


def test_the_fingerprint_of_an_import_is_that_of_its_contents(tmp_path: Path) -> None:
    for name, options in {
        "a": {},
        "b": {},
        "c": {"seed": 1},
        "d": {"passes": 3},
        "e": {"experts": (1, 2)},
    }.items():
        imported(tmp_path / name, **options)  # type: ignore[arg-type]
    found = {name: Trajectories.load(tmp_path / name).fingerprint for name in "abcde"}
    assert found["a"] == found["b"]
    assert len({*found.values()}) == 4
    assert all(len(each) == 64 for each in found.values())


def test_a_folder_that_is_no_import_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone") == (
        f"there are no imported experts in {tmp_path / 'gone'}; got no such folder; "
        "import them into it: an import that was interrupted is run again"
    )
    imported(tmp_path / "in")
    (tmp_path / "in" / "experts.json").unlink()
    assert "got no experts.json" in refusal(tmp_path / "in")


def test_a_damaged_list_is_refused(tmp_path: Path) -> None:
    imported(tmp_path)
    path = tmp_path / "experts.json"
    whole = json.loads(path.read_text())
    path.write_text("{")
    assert "experts.json is not valid JSON" in refusal(tmp_path)
    for damaged in ([], {}, 3, {**whole, "fingerprint": None, "sizes": None}, {**whole, "net": 3}):
        write_json(path, damaged)
        assert str(path) in refusal(tmp_path)
    write_json(path, {name: value for name, value in whole.items() if name != "sizes"})
    assert "settings do not fit Listing; got " in refusal(tmp_path)
    write_json(path, {**whole, "format": 7})
    assert refusal(tmp_path) == f"{tmp_path} was written by another version; got format 7; expected 1"
    for name, value in {"passes": 1, "k": 4, "digests": ["x", "y"], "sizes": [2]}.items():
        write_json(path, {**whole, name: value})
        assert refusal(tmp_path) == f"{path} was changed after it was made; import it again"
    write_json(path, {**whole, "source": "elsewhere"})
    assert Trajectories.load(tmp_path).fingerprint == whole["fingerprint"]


def test_a_missing_or_damaged_part_is_refused(tmp_path: Path) -> None:
    imported(tmp_path)
    path = tmp_path / "experts-001.safetensors"
    whole = path.read_bytes()
    for damage in ("empty", "cut", "cut short", "grown", "text", "another name"):
        path.write_bytes(DAMAGES[damage](whole))
        assert f"{path} is not a whole safetensors file; got " in refusal(tmp_path)
    path.unlink()
    assert f"there is no file {path}" in refusal(tmp_path)


def test_a_part_of_another_import_is_refused(tmp_path: Path) -> None:
    imported(tmp_path / "a")
    imported(tmp_path / "b", seed=1)  # the same shapes
    imported(tmp_path / "c", passes=3)
    path = tmp_path / "a" / "experts-001.safetensors"
    for other, said in (
        ("b", "sha256 11; expected F32 "),
        ("c", "[1, 4, 339], sha256 01; expected F32 [1, 3, 339]"),
    ):
        path.write_bytes((tmp_path / other / path.name).read_bytes())
        message = refusal(tmp_path / "a")
        assert message.startswith(
            f"{path} is not the file that {tmp_path / 'a' / 'experts.json'} was written for; got"
        )
        assert said in message
        assert message.endswith("import it again")


def test_a_part_that_changes_later_is_told(tmp_path: Path) -> None:
    imported(tmp_path)
    found = Trajectories.load(tmp_path)
    path = tmp_path / "experts-001.safetensors"
    path.write_bytes(rewritten(lambda snapshots: snapshots[:, :2])(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"experts-001.safetensors is not a whole safetensors file; got index 2 is out"
    ):
        found.at(2, 2)
