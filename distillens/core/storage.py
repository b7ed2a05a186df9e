"""Files that are whole or absent, and fingerprints of what they hold."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillens.core.checks import UserError

if TYPE_CHECKING:
    import torch

ALIGNED = 64  # bytes: where what PyTorch computes begins, and the numbers of a file of ours
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and run the command again, it goes on where it stopped",
    errno.EDQUOT: "the disk quota is used up: free some space and run the command again",
    errno.EFBIG: "a file of that size is not allowed here (ulimit -f): raise the limit and run the command again",
    errno.EROFS: "the file system is read-only: choose another folder with --to",
    errno.EACCES: "there is no permission to write there: choose another folder with --to",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another folder with --to",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another folder with --to",
    errno.ENOENT: "the folder has gone while the command was running",
}


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary name beside it, then a rename.

    Raises:
        UserError: the disk is full, read-only, or not ours to write; the earlier file is untouched.
    """
    _write(path, [data])


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    # The process number keeps two writers on one folder apart; the last rename wins, whole.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # the folder itself may be out of reach: the first error says why
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> UserError:
    advice = _DISK_ERRORS.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot write {path}", fix=advice)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder to this process for a while, making it where there is none.

    The lock is the system's, on the folder itself: it leaves nothing behind and ends with the process, however that
    ends. Where the system has none (Windows, some network disks) the folder is not kept.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", expected="a folder to write to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another command is at work in {folder}",
                fix="wait until it ends, or choose another folder with --to",
            ) from None
        except (ImportError, OSError):
            pass
        yield
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove half-written files that a killed process has left below ``folder``."""
    for part in folder.rglob(".*.part"):
        writer = part.name.split(".")[-2]
        if writer.isdigit() and not _alive(int(writer)):
            part.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that the same value gives the same bytes."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value in ``path``.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON", got=str(error), fix="make it again") from error


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors: the same tensors give the same bytes.

    Raises:
        UserError: the file cannot be written.
        ValueError: more than one metadata entry, which the format writes in no fixed order.
    """
    if metadata is not None and len(metadata) > 1:
        raise ValueError("one metadata entry at most: put JSON into it")
    from safetensors.torch import save

    # Views of one memory are refused by the format: each tensor gets its own.
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    data = memoryview(save(whole, dict(metadata or {})))
    end = 8 + int.from_bytes(data[:8], "little")
    _write(path, [*_head(bytes(data[8:end])), data[end:]])


def _head(header: bytes) -> tuple[bytes, bytes]:
    """The length of a safetensors header and the header, so filled up that the numbers begin at a multiple of ``ALIGNED``."""
    header += b" " * (-(8 + len(header)) % ALIGNED)
    return len(header).to_bytes(8, "little"), header


def write_pieces(
    path: Path, name: str, shape: tuple[int, ...], pieces: Iterable[torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one float32 tensor of ``shape`` from contiguous pieces that never lie in memory together.

    The bytes are those of ``write_tensors`` (tested), which holds the whole tensor several times over.

    Raises:
        UserError: the file cannot be written.
        ValueError: the pieces do not add up to the shape; nothing is written.
    """
    size = 4 * math.prod(shape)
    about = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": dict(metadata), name: about}, separators=(",", ":")).encode()

    def everything() -> Iterator[bytes | memoryview]:
        yield from _head(header)
        written = 0
        for piece in pieces:
            data = piece.numpy().data.cast("B")
            written += len(data)
            yield data
        if written != size:
            raise ValueError(f"{written} bytes for a tensor {list(shape)} of {size}")

    _write(path, everything())


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata in a safetensors file; nothing in it can run.

    Each in memory of its own, as what was computed is: libraries take numbers that lie elsewhere in another order, and a run that
    was stopped would go on in other last bits.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


def read_header(path: Path, name: str) -> tuple[str, tuple[int, ...], dict[str, str]]:
    """Kind of number (``F32``) and shape of a tensor in a safetensors file, and the metadata; no number is read.

    The format checks the file's size against its header: what was cut short or grew is refused.

    Raises:
        UserError: there is no such file or tensor, or it is damaged.
    """
    with _opened(path) as file:
        entry = file.get_slice(name)
        return entry.get_dtype(), tuple(entry.get_shape()), dict(file.metadata() or {})


def read_slice(path: Path, name: str, *index: int) -> torch.Tensor:
    """One entry of a tensor in a safetensors file; only its own bytes are read.

    Raises:
        UserError: there is no such file, tensor or entry, or it is damaged.
    """
    with _opened(path) as file:
        entry: torch.Tensor = file.get_slice(name)[index]
        return entry.clone()  # what is read lies in the file's map until it is copied


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped; what goes wrong inside is told as the user's error."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError, IndexError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file", got=str(error), fix="make it again"
        ) from error


def fingerprint(*parts: Any) -> str:
    """A SHA-256 of tensors (kind, shape, bytes), strings, bytes and JSON values, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if hasattr(part, "detach"):
            flat = part.detach().cpu().contiguous()
            digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
            digest.update(memoryview(flat.numpy()).cast("B") if flat.numel() else b"")
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(json.dumps(part, sort_keys=True, allow_nan=False).encode())
        digest.update(b"\0")
    return digest.hexdigest()
