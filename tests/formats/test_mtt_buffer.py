"""Buffers of the authors' code come in number by number, or are refused in words."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from distillens import formats
from distillens.core.checks import UserError
from distillens.core.contracts import Buffers, Like, Params, Problem
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Pixel
from distillens.core.storage import read_tensors
from distillens.core.vector import Shapes
from distillens.distillers.mtt import MTT
from distillens.engine.plan import Plan
from distillens.experts import Experts, Listing, Trajectories
from distillens.formats.mtt_buffer import MTTBuffer
from distillens.nets.convnet import ConvNet
from distillens.nets.mlp import MLP
from distillens.runs import Runs

NET = ConvNet(depth=1, width=4)
LIKE = Dataset(Key(1).fold("data").normal(9, 1, 8, 12), Hard(torch.arange(9) % 3), ("a", "b", "c"), Pixel())
SHAPES = Shapes.of(NET.init(LIKE, Key(0))[0])

Lists = list[list[list[torch.Tensor]]]


def numbers(experts: int = 2, snapshots: int = 4, seed: int = 0, net: ConvNet = NET) -> Lists:
    """A buffer's lists, full of random numbers."""
    shapes = Shapes.of(net.init(LIKE, Key(0))[0]).shapes
    return [
        [[Key(seed).fold(e, t, i).normal(*shape) for i, shape in enumerate(shapes)] for t in range(snapshots)]
        for e in range(experts)
    ]


def saved(path: Path, lists: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(lists, path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(path: Path, to: Path, net: Any = NET, like: Any = LIKE) -> Trajectories:
    return MTTBuffer.read(path, net, like, to)


def refusal(path: Path, to: Path, net: Any = NET) -> str:
    """What is said of a file that is refused; nothing of it is written."""
    with pytest.raises(UserError) as error:
        read(path, to, net)
    assert not to.exists()
    return str(error.value)


# ---- the room ----


def test_the_room_finds_the_layout_by_name() -> None:
    assert formats.room.names() == ["dc", "mtt_buffer", "wddl"]
    assert formats.room.find("mtt_buffer") is MTTBuffer
    with pytest.raises(UserError, match=r"unknown format 'mtt_bufer'; Did you mean 'mtt_buffer'\?"):
        formats.room.find("mtt_bufer")


def test_a_path_is_recognised_by_its_name(tmp_path: Path) -> None:
    file = saved(tmp_path / "folder" / "replay_buffer_3.pt", numbers())
    other = saved(tmp_path / "other" / "images_best.pt", torch.zeros(2))
    assert [MTTBuffer.recognises(path) for path in (file, file.parent)] == [True, True]
    assert [MTTBuffer.recognises(path) for path in (other, other.parent, tmp_path / "gone")] == [False] * 3


# ---- what comes in ----


class Theirs(torch.nn.Module):
    """Their ConvNet of depth 1: the order of its parameters is the order in their files."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1),
            torch.nn.GroupNorm(4, 4, affine=True),
            torch.nn.ReLU(),
            torch.nn.AvgPool2d(2, 2),
        )
        self.classifier = torch.nn.Linear(4 * 4 * 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.classifier(self.features(x).flatten(1))
        return out


def trained(copy: bool) -> tuple[Lists, list[torch.Tensor]]:
    """One expert as their buffer.py trains and keeps it, and its logits after each of three passes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Theirs()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    timestamps, logits = [], []
    for epoch in range(4):
        if epoch:
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(LIKE.images), LIKE.labels.hard()).backward()
            optimiser.step()
        kept = [p.detach().cpu() for p in net.parameters()]
        timestamps.append([p.clone() for p in kept] if copy else kept)
        logits.append(net(LIKE.images).detach())
    return [timestamps], logits


def test_their_trained_networks_say_the_same_in_ours(tmp_path: Path) -> None:
    lists, logits = trained(copy=True)
    found = read(saved(tmp_path / "replay_buffer_0.pt", lists), tmp_path / "to")
    assert (len(found), found.passes, found.net, found.shapes) == (1, 3, NET, SHAPES)
    for passes, expected in enumerate(logits):
        params = found.shapes.unflatten(found.at(0, passes))
        torch.testing.assert_close(NET.logits(params, {}, LIKE.images)[0], expected)


def test_every_number_comes_in_bit_by_bit(tmp_path: Path) -> None:
    lists = numbers(experts=3)
    found = read(saved(tmp_path / "replay_buffer_0.pt", lists), tmp_path / "to")
    for e, expert in enumerate(lists):
        for t, snapshot in enumerate(expert):
            assert torch.equal(found.at(e, t), torch.cat([tensor.flatten() for tensor in snapshot]))
    (snapshots,) = read_tensors(tmp_path / "to" / "experts-000.safetensors")[0].values()
    assert (snapshots.shape, snapshots.dtype) == ((3, 4, SHAPES.size), torch.float32)


def test_a_folder_comes_in_by_number(tmp_path: Path) -> None:
    """10 comes after 9, and what is no buffer is left alone."""
    for n in (10, 9, 0):
        saved(tmp_path / "from" / f"replay_buffer_{n}.pt", numbers(seed=n, experts=1 + (n == 9)))
    saved(tmp_path / "from" / "replay_buffer_last.pt", torch.zeros(2))
    found = read(tmp_path / "from", tmp_path / "to")
    assert found.sizes == (1, 2, 1)
    for expert, (n, e) in enumerate([(0, 0), (9, 0), (9, 1), (10, 0)]):
        expected = torch.cat([tensor.flatten() for tensor in numbers(seed=n, experts=2)[e][2]])
        assert torch.equal(found.at(expert, 2), expected)
    parts = [f"experts-00{i}.safetensors" for i in range(3)]
    assert sorted(files(tmp_path / "to")) == [*parts, "experts.json"]


@pytest.mark.parametrize("how", ["parameters", "tuples", "old file", "views"])
def test_other_ways_of_writing_the_same_numbers_come_in_the_same(tmp_path: Path, how: str) -> None:
    lists: Any = numbers()
    read(saved(tmp_path / "one" / "replay_buffer_0.pt", lists), tmp_path / "a")
    path = tmp_path / "other" / "replay_buffer_0.pt"
    if how == "parameters":
        saved(path, [[[torch.nn.Parameter(p) for p in s] for s in e] for e in lists])
    elif how == "tuples":
        saved(path, tuple(tuple(tuple(s) for s in e) for e in lists))
    elif how == "views":
        saved(
            path, [[[p.clone().T.contiguous().T if p.ndim == 2 else p for p in s] for s in e] for e in lists]
        )
    else:
        path.parent.mkdir()
        torch.save(lists, path, _use_new_zipfile_serialization=False)
    read(path, tmp_path / "b")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a["experts-000.safetensors"] == b["experts-000.safetensors"]
    assert Trajectories.load(tmp_path / "a").fingerprint == Trajectories.load(tmp_path / "b").fingerprint


def test_the_list_says_what_is_there_and_where_from(tmp_path: Path) -> None:
    path = saved(tmp_path / "replay_buffer_0.pt", numbers())
    found = read(path, tmp_path / "to")
    about = json.loads((tmp_path / "to" / "experts.json").read_text())
    assert about["net"] == {
        "is": "distillens.nets.convnet.ConvNet",
        "depth": 1,
        "width": 4,
        "norm": "group",
        "pooling": "average",
    }
    assert about["shapes"]["names"] == list(SHAPES.names)
    assert about["shapes"]["shapes"] == [list(shape) for shape in SHAPES.shapes]
    assert (about["passes"], about["sizes"]) == (3, [2])
    assert (about["image"], about["k"], about["source"]) == ([1, 8, 12], 3, str(path))
    assert about["fingerprint"] == found.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", found.fingerprint)


def test_the_fingerprint_is_of_network_and_numbers_not_of_the_place(tmp_path: Path) -> None:
    def of(name: str, lists: Lists, net: ConvNet = NET) -> str:
        return read(
            saved(tmp_path / name / "replay_buffer_0.pt", lists), tmp_path / name / "to", net
        ).fingerprint

    first, other = numbers(), numbers()
    other[1][3][0][0] += 1
    maximum = replace(NET, pooling="max")
    assert of("a", first) == of("b", first)
    assert len({of("c", first), of("d", other), of("e", first[::-1]), of("f", first, maximum)}) == 4


def test_one_file_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        saved(tmp_path / "from" / f"replay_buffer_{n}.pt", numbers(seed=n))
    alive: list[weakref.ref[torch.Tensor]] = []
    load = torch.load

    def watched(*arguments: Any, **options: Any) -> Any:
        assert options["weights_only"] is True
        assert not any(reference() is not None for reference in alive)
        found = load(*arguments, **options)
        alive.extend(weakref.ref(snapshot[0]) for expert in found for snapshot in expert)
        return found

    monkeypatch.setattr(torch, "load", watched)
    read(tmp_path / "from", tmp_path / "to")
    assert len(alive) == 2 * 3 * 2 * 4  # each file is looked through, then copied


def test_a_step_on_imported_experts_is_the_step_on_ours(tmp_path: Path) -> None:
    method = MTT(steps=2, net=NET, experts=2, syn_steps=2, expert_epochs=1, max_start_epoch=2)
    ours = Runs(Plan()).trajectories(Experts(LIKE, NET, Recipe(batch=4, lr=0.05), Key(3).split(2), 2))
    lists = [[list(SHAPES.unflatten(ours.at(e, t)).values()) for t in range(3)] for e in range(2)]
    found = read(saved(tmp_path / "replay_buffer_0.pt", lists), tmp_path / "to")
    states = []
    for experts in (ours, found):
        problem = Problem(LIKE, 1, Key(0), {"experts": experts})
        states.append(method.step(problem, method.start(problem), 0)[0])
    assert all(torch.equal(value, states[1].tensors[name]) for name, value in states[0].tensors.items())
    assert states[0].values == states[1].values


# ---- running it again ----


def test_a_finished_import_is_left_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "replay_buffer_0.pt", numbers())
    first = read(path, tmp_path / "to")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "to").iterdir()}
    assert read(path, tmp_path / "to").fingerprint == first.fingerprint
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "to").iterdir()}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_import_is_none_and_goes_on_to_the_same_bytes(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillens.formats import mtt_buffer

    for n in range(3):
        saved(tmp_path / "from" / f"replay_buffer_{n}.pt", numbers(seed=n))
    read(tmp_path / "from", tmp_path / "whole")
    done: list[Path] = []
    write = mtt_buffer.write_pieces

    def stopping(path: Path, *rest: Any) -> None:
        if len(done) == after:
            raise StoppedError
        done.append(path)
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(mtt_buffer, "write_pieces", stopping)
        with pytest.raises(StoppedError):
            read(tmp_path / "from", tmp_path / "to")
    with pytest.raises(UserError, match=r"there are no imported experts in .*to; got no "):
        Trajectories.load(tmp_path / "to")
    read(tmp_path / "from", tmp_path / "to")
    assert files(tmp_path / "to") == files(tmp_path / "whole")


def test_a_damaged_import_is_mended_by_the_same_command(tmp_path: Path) -> None:
    path = saved(tmp_path / "replay_buffer_0.pt", numbers())
    read(path, tmp_path / "to")
    before = files(tmp_path / "to")
    part = tmp_path / "to" / "experts-000.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    read(path, tmp_path / "to")
    assert files(tmp_path / "to") == before
    (tmp_path / "to" / "experts.json").write_text("{")
    read(path, tmp_path / "to")
    assert files(tmp_path / "to") == before


def test_another_import_is_replaced_only_by_force(tmp_path: Path) -> None:
    for n in range(2):
        saved(tmp_path / "two" / f"replay_buffer_{n}.pt", numbers(seed=n))
    one = saved(tmp_path / "one" / "replay_buffer_0.pt", numbers(seed=7))
    read(tmp_path / "two", tmp_path / "to")
    before = files(tmp_path / "to")
    with pytest.raises(
        UserError,
        match=r"to holds other imported experts; got those of .*two; choose another folder with --to",
    ):
        read(one, tmp_path / "to")
    assert files(tmp_path / "to") == before
    found = MTTBuffer.read(one, NET, LIKE, tmp_path / "to", force=True)
    assert len(found) == 2
    assert sorted(files(tmp_path / "to")) == ["experts-000.safetensors", "experts.json"]


def test_a_forced_import_that_stops_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of the old one would stand beside the new one's numbers."""
    read(saved(tmp_path / "one" / "replay_buffer_0.pt", numbers()), tmp_path / "to")
    other = saved(tmp_path / "other" / "replay_buffer_0.pt", numbers(seed=1))
    monkeypatch.setattr(Listing, "save", lambda *_: None)
    with pytest.raises(UserError, match="there are no imported experts"):
        MTTBuffer.read(other, NET, LIKE, tmp_path / "to", force=True)
    assert not (tmp_path / "to" / "experts.json").exists()


def test_a_folder_of_other_things_is_not_written_to(tmp_path: Path) -> None:
    path = saved(tmp_path / "replay_buffer_0.pt", numbers())
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "thesis.tex").write_text("precious")
    with pytest.raises(
        UserError,
        match=r"to holds files that are not imported experts; got thesis.tex; choose another folder",
    ):
        read(path, tmp_path / "to")
    assert sorted(files(tmp_path / "to")) == ["thesis.tex"]
    MTTBuffer.read(path, NET, LIKE, tmp_path / "to", force=True)
    assert (tmp_path / "to" / "thesis.tex").read_text() == "precious"


# ---- what is refused ----


class Evil:
    """Pickled, it is a call of a function with an effect that can be seen."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("how", ["zip", "old file", "among tensors"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, how: str) -> None:
    path, trace = tmp_path / "replay_buffer_0.pt", tmp_path / "trace"
    bad: Any = [Evil(trace)]
    if how == "among tensors":
        bad = numbers()
        bad[1][2][0] = Evil(trace)
    torch.save(bad, path, _use_new_zipfile_serialization=how != "old file")
    said = refusal(path, tmp_path / "to")
    assert said.startswith(
        f"{path} is refused: reading it would run code from the file; got a call of posix.mkdir; "
    )
    assert "use a file from another source" in said
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_that_would_run_code_runs_none(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "replay_buffer_0.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps([Evil(trace)], protocol))
    assert str(path) in refusal(path, tmp_path / "to")
    assert not trace.exists()


def test_arrays_and_modules_are_refused_by_name(tmp_path: Path) -> None:
    said = refusal(saved(tmp_path / "a" / "replay_buffer_0.pt", torch.nn.Linear(2, 2)), tmp_path / "to")
    assert "a call of torch.nn.modules.linear.Linear; expected a list of experts" in said


@pytest.mark.parametrize(
    ("lists", "got"),
    [
        (torch.zeros(2, 3), "a Tensor"),
        ({"data": [torch.zeros(2)]}, "a dict"),
        ([], "an empty list"),
        ([[]], "an empty list for expert 0"),
        ([torch.zeros(2)], "a Tensor for expert 0"),
        ([[torch.zeros(2)]], "a Tensor for snapshot 0 of expert 0"),
        ([[[torch.zeros(2)], {}]], "a dict for snapshot 1 of expert 0"),
        ([[["weight"]]], "a str in snapshot 0 of expert 0"),
        ([[[torch.zeros(2).double()]]], "a tensor of torch.float64, torch.strided in snapshot 0 of expert 0"),
        ([[[torch.zeros(2).to_sparse()]]], "a tensor of torch.float32, torch.sparse_coo in snapshot 0 of"),
    ],
)
def test_other_nesting_is_no_buffer(tmp_path: Path, lists: Any, got: str) -> None:
    path = saved(tmp_path / "replay_buffer_0.pt", lists)
    said = refusal(path, tmp_path / "to")
    assert said.startswith(f"{path} is not a buffer of expert trajectories; got {got}")
    assert said.endswith(
        "expected a list of experts, each a list of snapshots, each a list of float32 tensors"
    )


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "cut short", "zip"])
def test_other_bytes_are_no_buffer(tmp_path: Path, damage: str) -> None:
    path = saved(tmp_path / "replay_buffer_0.pt", numbers())
    whole = path.read_bytes()
    if damage == "zip":
        path.unlink()
        shutil.make_archive(str(path), "zip", tmp_path)
        path.with_name(f"{path.name}.zip").rename(path)
    else:
        path.write_bytes(
            {"empty": b"", "text": b"hello, this is text", "cut": whole[:-99]}.get(damage, whole[:20])
        )
    said = refusal(path, tmp_path / "to")
    assert f"{path} is not a buffer of expert trajectories; got a file that torch.load cannot read" in said


def test_no_such_file_or_folder(tmp_path: Path) -> None:
    said = refusal(tmp_path / "gone", tmp_path / "to")
    assert said.startswith(f"there is no file or folder {tmp_path / 'gone'}; check the spelling")


def test_a_folder_without_buffers(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    said = refusal(tmp_path / "from", tmp_path / "to")
    assert (
        f"there are no buffers in {tmp_path / 'from'}; got an empty folder; expected replay_buffer_0.pt"
        in said
    )
    saved(tmp_path / "from" / "images_best.pt", torch.zeros(2))
    assert "got images_best.pt; " in refusal(tmp_path / "from", tmp_path / "to")
    below = saved(tmp_path / "from" / "CIFAR10" / "ConvNet" / "replay_buffer_0.pt", numbers())
    assert refusal(tmp_path / "from", tmp_path / "to").endswith(f"there are some in {below.parent}")


@pytest.mark.parametrize(
    ("net", "got", "expected"),
    [
        (
            ConvNet(depth=1, width=8),
            r"conv0.weight of shape \(4, 1, 3, 3\) \(6 tensors\)",
            r"\(8, 1, 3, 3\) \(6 tensors\)",
        ),
        (
            ConvNet(depth=2, width=4),
            r"conv1.weight of shape \(3, 96\) \(6 tensors\)",
            r"\(4, 4, 3, 3\) \(10 tensors\)",
        ),
        (
            ConvNet(depth=1, width=4, norm="none"),
            r"linear.weight of shape \(4,\) \(6",
            r"\(3, 96\) \(4 tensors\)",
        ),
        (MLP(), r"\S+ of shape \(4, 1, 3, 3\) \(6 tensors\)", r"\(\d+, 96\)"),
    ],
)
def test_experts_of_another_network_are_refused_by_parameter(
    tmp_path: Path, net: Any, got: str, expected: str
) -> None:
    said = refusal(saved(tmp_path / "replay_buffer_0.pt", numbers()), tmp_path / "to", net)
    assert re.search(
        rf"snapshot 0 of expert 0 is of another network; got {got}.*; expected {expected}.*; choose the experts' network "
        r"with net.width, net.depth ..., and what they were trained on with --data$",
        said,
    )


def test_a_missing_or_further_parameter_is_named(tmp_path: Path) -> None:
    short, long = numbers(), numbers()
    short[1][2].pop()
    long[0][3].append(torch.zeros(7))
    said = refusal(saved(tmp_path / "short" / "replay_buffer_0.pt", short), tmp_path / "to")
    assert "snapshot 2 of expert 1 is of another network; got linear.bias of shape none (5 tensors); " in said
    said = refusal(saved(tmp_path / "long" / "replay_buffer_0.pt", long), tmp_path / "to")
    assert "got a further parameter of shape (7,) (7 tensors); expected none (6 tensors)" in said


def test_unequal_numbers_of_snapshots_are_refused(tmp_path: Path) -> None:
    for n in range(2):
        saved(tmp_path / "from" / f"replay_buffer_{n}.pt", numbers())
    lists = numbers(seed=2)
    lists[1].pop()
    saved(tmp_path / "from" / "replay_buffer_2.pt", lists)
    said = refusal(tmp_path / "from", tmp_path / "to")
    assert said == (
        "the experts have unequal numbers of snapshots; "
        f"got 3 in expert 1 of {tmp_path / 'from' / 'replay_buffer_2.pt'}; "
        f"expected 4, as in expert 0 of {tmp_path / 'from' / 'replay_buffer_0.pt'}; "
        "leave out what was cut short, or make it again"
    )


def test_a_single_snapshot_is_too_few(tmp_path: Path) -> None:
    said = refusal(saved(tmp_path / "replay_buffer_0.pt", numbers(snapshots=1)), tmp_path / "to")
    assert (
        "needs a snapshot before training and one after each pass; got 1 snapshot; expected 2 or more" in said
    )


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    lists = numbers()
    lists[1][3][2][1] = bad
    said = refusal(saved(tmp_path / "replay_buffer_0.pt", lists), tmp_path / "to")
    assert (
        "an expert's numbers are not finite; got nan or inf in norm0.weight in snapshot 3 of expert 1; "
        in said
    )


def test_snapshots_that_share_the_live_weights_are_refused(tmp_path: Path) -> None:
    """On a CPU ``p.detach().cpu()`` copies nothing: the authors' code keeps the last weights all the time."""
    lists, _ = trained(copy=False)
    said = refusal(saved(tmp_path / "replay_buffer_0.pt", lists), tmp_path / "to")
    assert "all 4 snapshots of expert 0 are the same; on a CPU buffer.py keeps the live weights" in said
    assert "write p.detach().cpu().clone() there and make the buffer again" in said


@dataclass(frozen=True)
class BatchNorm(ConvNet):
    mixes_examples: ClassVar[bool] = True

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        return super().init(like, key)[0], {"mean": torch.zeros(4)}


def test_networks_that_cannot_be_loaded_again_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "replay_buffer_0.pt", numbers())
    said = refusal(path, tmp_path / "to", BatchNorm())
    assert said.startswith("experts can be imported for the networks of distillens alone; got BatchNorm; ")
    monkeypatch.setattr(ConvNet, "init", lambda *_: ({}, {"running_mean": torch.zeros(4)}))
    said = refusal(path, tmp_path / "to")
    assert said.startswith("ConvNet has buffers, which are not in a file of parameters; got running_mean; ")


def test_a_full_disk_leaves_no_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "replay_buffer_0.pt", numbers())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*experts-000.safetensors; the disk is full"):
        read(path, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
