"""Files are whole or absent, readable without running anything, and the same each time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distillens.core.checks import UserError
from distillens.core.storage import (
    ALIGNED,
    fingerprint,
    read_header,
    read_json,
    read_slice,
    read_tensors,
    sweep,
    write_bytes,
    write_json,
    write_pieces,
    write_tensors,
)

TENSORS = {
    "double": torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7,
    "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "whole": torch.tensor([[1, -1]]),
    "yes": torch.tensor([True, False]),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "not finite": torch.tensor([float("inf"), float("nan")]),
}


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_bytes_are_written_into_new_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full: free some space and run the command again"),
        (errno.EDQUOT, "the disk quota is used up: free some space and run the command again"),
        (errno.EROFS, "the file system is read-only: choose another folder with --to"),
        (errno.EACCES, "there is no permission to write there: choose another folder with --to"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
@pytest.mark.parametrize("where", [(os, "fsync"), (Path, "replace"), (Path, "open")], ids=lambda w: w[1])
def test_a_failing_write_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, where: tuple[Any, str], number: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    with monkeypatch.context() as patch:
        patch.setattr(*where, failing(number))
        with pytest.raises(UserError) as error:
            write_bytes(path, b"later")
    assert str(error.value).startswith(f"cannot write {path}; {advice}")
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("inside", ["file/new", "file/folder/new"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"cannot write .*new; a part of the path is a file, not a folder: choose another folder with --to",
    ):
        write_bytes(tmp_path / inside, b"x")


def test_an_interrupted_write_leaves_nothing_at_the_name(tmp_path: Path) -> None:
    """A reader that looks while a file is being written sees no file, or the earlier one."""
    seen: list[list[str]] = []
    replace = Path.replace

    def looking(self: Path, target: Path) -> None:
        seen.append([p.name for p in tmp_path.iterdir() if p.name == "file"])
        replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", looking)
        write_bytes(tmp_path / "file", b"x")
    assert seen == [[]]
    assert (tmp_path / "file").read_bytes() == b"x"


def test_json_comes_back_and_its_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True, "é"], "a": {"y": 1e-300, "x": "\n"}}
    write_json(tmp_path / "first", value)
    write_json(tmp_path / "second", {"a": {"x": "\n", "y": 1e-300}, "b": value["b"]})
    assert read_json(tmp_path / "first") == value
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), [float("inf")]])
def test_numbers_that_json_cannot_hold_are_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(tmp_path / "file", value)
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(UserError, match=r"there is no file .*file.json"):
        read_json(path)
    for damaged in (b"", b'{"a": ', b"\xff\xfe\x00"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"file.json is not valid JSON; got .+; make it again"):
            read_json(path)


def test_tensors_come_back_bit_by_bit(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS, {"about": "é"})
    tensors, metadata = read_tensors(tmp_path / "file")
    assert metadata == {"about": "é"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_what_is_read_lies_in_memory_as_what_is_computed(tmp_path: Path) -> None:
    # Of sizes after which the next would begin anywhere; a library's sums follow the place of the numbers.
    written = {str(n): torch.arange(float(n)) for n in (1, 3, 7, 50)}
    write_tensors(tmp_path / "ours", written)
    save_file(written, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert all(t.data_ptr() % ALIGNED == 0 for t in read_tensors(tmp_path / name)[0].values())


@pytest.mark.parametrize("length", range(0, 70, 3))
def test_the_numbers_of_a_file_begin_where_a_map_of_it_is_aligned(tmp_path: Path, length: int) -> None:
    write_tensors(tmp_path / "file", {"a": torch.ones(5)}, {"about": "x" * length})
    head = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert (8 + head) % ALIGNED == 0
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.ones(5))


def test_no_metadata_is_an_empty_mapping(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS)
    assert read_tensors(tmp_path / "file")[1] == {}
    save_file({"a": torch.ones(2)}, tmp_path / "theirs")
    assert read_tensors(tmp_path / "theirs")[1] == {}


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "first", {"a": base, "b": base.T, "c": base[1:]}, {"about": "x"})
    again = {"c": base[1:].clone(), "b": base.T.contiguous(), "a": base.clone().requires_grad_()}
    write_tensors(tmp_path / "second", again, {"about": "x"})
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert torch.equal(read_tensors(tmp_path / "first")[0]["b"], base.T)


def test_a_file_of_tensors_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(UserError, match=r"there is no file .*file.safetensors"):
        read_tensors(path)
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], b"\0" * 100, b"\x80\x04" + whole):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"file.safetensors is not a whole safetensors file; got .+; make it again"
        ):
            read_tensors(path)


@pytest.mark.parametrize("metadata", [{"sha256": "0123"}, {"a": "bc"}, {}])
def test_pieces_give_the_bytes_of_the_whole(tmp_path: Path, metadata: dict[str, str]) -> None:
    whole = torch.arange(2 * 3 * 5.0).reshape(2, 3, 5) / 7
    write_tensors(tmp_path / "whole", {"numbers": whole}, metadata)
    write_pieces(tmp_path / "pieces", "numbers", (2, 3, 5), (row for row in whole.view(6, 5)), metadata)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("count", [5, 7])
def test_pieces_that_do_not_add_up_are_not_written(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=rf"{20 * count} bytes for a tensor \[2, 3, 5\] of 120"):
        write_pieces(tmp_path / "file", "numbers", (2, 3, 5), torch.zeros(count, 5), {})
    assert not list(tmp_path.iterdir())


def test_pieces_that_stop_half_way_leave_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    def stopping() -> Iterator[torch.Tensor]:
        yield torch.zeros(5)
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt):
        write_pieces(tmp_path / "file", "numbers", (2, 5), stopping(), {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"earlier")]


def test_a_header_says_kind_shape_and_metadata(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS, {"about": "x"})
    assert read_header(tmp_path / "file", "double") == ("F64", (2, 3), {"about": "x"})
    assert read_header(tmp_path / "file", "scalar") == ("F32", (), {"about": "x"})
    with pytest.raises(
        UserError, match=r"file is not a whole safetensors file; got .*nothing.*; make it again"
    ):
        read_header(tmp_path / "file", "nothing")


def test_a_header_notices_a_file_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(UserError, match=r"there is no file .*file.safetensors"):
        read_header(path, "whole")
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], whole + b"\0"):
        path.write_bytes(damaged)
        for look in (lambda: read_header(path, "whole"), lambda: read_slice(path, "whole", 0)):
            with pytest.raises(UserError, match=r"file.safetensors is not a whole safetensors file; got .+"):
                look()


def test_a_slice_is_an_entry_of_its_own(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS)
    row = read_slice(tmp_path / "file", "double", 1)
    assert torch.equal(row, TENSORS["double"][1])
    row.zero_()
    assert torch.equal(read_slice(tmp_path / "file", "double", 1, 2), TENSORS["double"][1, 2])
    for name, index in (("double", (2,)), ("double", (0, 3)), ("nothing", (0,))):
        with pytest.raises(UserError, match=r"is not a whole safetensors file; got .+; make it again"):
            read_slice(tmp_path / "file", name, *index)


LARGE = """
import re, sys
from pathlib import Path
import torch
from distillens.core.storage import read_header, read_slice

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

path = Path(sys.argv[1])
read_slice(path.with_name("small"), "numbers", 0, 0).sum()  # what is imported on first use stays out of the count
before = peak()
read_header(path, "numbers")
assert read_slice(path, "numbers", 7, 30).tolist() == [2.5] * 100_000
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of memory is read from Linux")
def test_a_slice_of_a_large_file_reads_its_own_bytes(tmp_path: Path) -> None:
    """A file of 204 MB, all holes but for one entry of 0.4 MB."""
    write_tensors(tmp_path / "small", {"numbers": torch.zeros(1, 1, 9)})
    path, shape, row = tmp_path / "large", (10, 51, 100_000), 400_000
    header = f'{{"numbers":{{"dtype":"F32","shape":{list(shape)},"data_offsets":[0,{510 * row}]}}}}'.encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek((7 * 51 + 30) * row, os.SEEK_CUR)
        file.write(torch.full((100_000,), 2.5).numpy().tobytes())
        file.truncate(8 + len(header) + 510 * row)
    done = subprocess.run([sys.executable, "-c", LARGE, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # kB


def test_a_fingerprint_is_a_sha_256_of_parts_in_order() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    assert len(fingerprint(a)) == 64
    assert fingerprint(a, b) == fingerprint(a.clone(), b.clone()) != fingerprint(b, a)
    assert fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1})


def test_a_fingerprint_does_not_depend_on_the_process() -> None:
    program = (
        "import torch; from distillens.core.storage import fingerprint;"
        "print(fingerprint(torch.arange(6.0).reshape(2, 3), 'a', {'x': [1, 'y'], 'b': None}, b'c'))"
    )
    here = fingerprint(torch.arange(6.0).reshape(2, 3), "a", {"x": [1, "y"], "b": None}, b"c")
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here


def test_different_parts_have_different_fingerprints() -> None:
    parts: list[tuple[Any, ...]] = [
        (),
        (torch.zeros(4),),
        (torch.zeros(2, 2),),
        (torch.zeros(4, dtype=torch.int32),),  # the same bytes
        (torch.zeros(2, dtype=torch.float64),),
        (torch.zeros(2), torch.zeros(2)),
        (-torch.zeros(4),),
        (torch.zeros(0),),
        (torch.zeros(0, 3),),
        (torch.tensor(0.0),),
        ("a", "b"),
        ("ab",),
        (["a", "b"],),
        ("1",),
        (1,),
        (1, 5),
        (15,),
        (1.5,),
        (None,),
        (True,),
        (b"a",),
        (b"a", b"b"),
    ]
    assert len({fingerprint(*part) for part in parts}) == len(parts)


def test_a_fingerprint_reads_values_not_memory_layout() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(base.T) == fingerprint(base.T.contiguous()) != fingerprint(base)
    assert fingerprint(base.clone().requires_grad_()) == fingerprint(base)


def test_sweep_removes_what_a_dead_writer_left_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / "a" / f".data.json.{dead.pid}.part"
    left.parent.mkdir()
    left.write_text("{")
    writing = tmp_path / "a" / f".data.json.{os.getpid()}.part"
    writing.write_text("{")
    whole = tmp_path / "a" / "data.json"
    whole.write_text("{}")
    sweep(tmp_path)
    assert sorted(tmp_path.rglob("*.*")) == sorted([writing, whole])
