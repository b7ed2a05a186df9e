"""Expert trajectories as ``buffer.py`` of MTT leaves them, and TESLA, FTD and DATM after it.

``replay_buffer_{n}.pt`` is a list of experts; an expert is a list of snapshots, one before training and one after
each pass; a snapshot is the list of a network's ``parameters()``, float32, without names. Data augmentation, space and
learning rate are not in it. Source: Cazenavette et al. 2022, ``buffer.py``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from distillens.core.checks import UserError
from distillens.core.config import describe, restore
from distillens.core.contracts import Like, Net
from distillens.core.rng import Key
from distillens.core.storage import sweep, write_pieces
from distillens.core.vector import Shapes
from distillens.engine.workers import pinned_threads
from distillens.experts import Listing, Trajectories
from distillens.formats._torch_file import loaded

_NAME = re.compile(r"replay_buffer_(\d+)\.pt")
_OURS = re.compile(r"experts-\d+\.safetensors|experts\.json|\..*\.part")
_WHAT = "a buffer of expert trajectories"
_EXPECTED = "a list of experts, each a list of snapshots, each a list of float32 tensors"

Buffer = Sequence[Sequence[Sequence[torch.Tensor]]]  # expert, snapshot, parameter


@dataclass(frozen=True)
class MTTBuffer:
    """Expert trajectories of MTT, TESLA, FTD and DATM: replay_buffer_N.pt."""

    holds: ClassVar[Literal["experts"]] = "experts"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether this is such a file, or a folder of such files, by their names."""
        return bool(_NAME.fullmatch(path.name) if path.is_file() else _numbered(path))

    @staticmethod
    def read(path: Path, net: Net, like: Like, to: Path, *, force: bool = False) -> Trajectories:
        """The experts of ``net`` in a file, or in all ``replay_buffer_N.pt`` of a folder by rising N.

        They are written to ``to`` as ``experts.Trajectories.load`` reads them; all files are checked before the first
        is written. One file at a time is mapped into memory, one snapshot copied. Where ``to`` holds these very
        experts already nothing is written. ``like`` is the data they were trained on.

        Raises:
            UserError: there is no buffer, it would run code, it is not of this network, its numbers are of no use,
                or ``to`` holds something else (``force`` writes all the same).
        """
        shapes = _shapes(net, like)
        files = _files(path)
        with pinned_threads(1):  # small work: 8 times as fast as two threads on two busy cores
            surveys = [_survey(file, shapes) for file in files]
        _check_lengths(files, surveys)
        listing = Listing(
            net,
            shapes,
            surveys[0].lengths[0] - 1,
            tuple(len(survey.lengths) for survey in surveys),
            tuple(survey.digest for survey in surveys),
            like.shape,
            like.k,
            str(path),
        )
        if not _is_there(listing, to, force):
            with pinned_threads(1):
                _write(listing, files, to)
        return Trajectories.load(to)


def _shapes(net: Net, like: Like) -> Shapes:
    """Names and shapes of the parameters, of a network that can be written down and has nothing else."""
    try:
        known = restore(describe(net)) == net
    except (UserError, TypeError):
        known = False
    if not known:
        raise UserError(
            "experts can be imported for the networks of distillens alone",
            got=type(net).__name__,
            fix="distillens list nets",
        )
    params, buffers = net.init(like, Key(0))
    if buffers:
        raise UserError(
            f"{type(net).__name__} has buffers, which are not in a file of parameters",
            got=next(iter(buffers)),
            fix="choose a network without batch norm",
        )
    return Shapes.of(params)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f"there is no file or folder {path}",
            fix="check the spelling; a relative path starts in the folder where the command runs",
        )
    found = _numbered(path)
    if not found:
        # The authors' code writes to BUFFERS/DATASET[_NO_ZCA]/MODEL, two folders further down.
        below = sorted(
            {str(file.parent) for depth in ("*", "*/*") for file in path.glob(f"{depth}/replay_buffer_*.pt")}
        )
        inside = sorted(item.name for item in path.iterdir())[:3]
        raise UserError(
            f"there are no buffers in {path}",
            got=", ".join(inside) or "an empty folder",
            expected="replay_buffer_0.pt, replay_buffer_1.pt ...",
            fix=f"there are some in {below[0]}" if below else "name the folder that holds them",
        )
    return found


def _numbered(folder: Path) -> list[Path]:
    """The buffers in a folder by number: 10 comes after 9."""
    matches = {file: _NAME.fullmatch(file.name) for file in folder.glob("replay_buffer_*.pt")}
    return sorted(
        (file for file, match in matches.items() if match),
        key=lambda file: (int(_NAME.fullmatch(file.name)[1]), file.name),  # type: ignore[index]  # it matches
    )


def _load(file: Path) -> Buffer:
    """The lists in a file, its tensors mapped from the disk where the file allows it."""
    found = loaded(file, _WHAT, _EXPECTED)
    _check_nesting(file, found)
    experts: Buffer = found
    return experts


def _check_nesting(file: Path, found: Any) -> None:
    def is_list(item: Any) -> bool:
        return isinstance(item, list | tuple) and len(item) > 0

    def kind(item: Any) -> str:
        return "an empty list" if isinstance(item, list | tuple) else f"a {type(item).__name__}"

    if not is_list(found):
        raise _no_buffer(file, kind(found))
    for e, expert in enumerate(found):
        if not is_list(expert):
            raise _no_buffer(file, f"{kind(expert)} for expert {e}")
        for t, snapshot in enumerate(expert):
            if not is_list(snapshot):
                raise _no_buffer(file, f"{kind(snapshot)} for snapshot {t} of expert {e}")
            for tensor in snapshot:
                where = f"in snapshot {t} of expert {e}"
                if not isinstance(tensor, torch.Tensor):
                    raise _no_buffer(file, f"a {type(tensor).__name__} {where}")
                if tensor.dtype != torch.float32 or tensor.layout != torch.strided:
                    raise _no_buffer(file, f"a tensor of {tensor.dtype}, {tensor.layout} {where}")


def _no_buffer(file: Path, got: str) -> UserError:
    return UserError(f"{file} is not {_WHAT}", got=got, expected=_EXPECTED)


@dataclass(frozen=True)
class _Survey:
    """Of one file: snapshots of each expert, and the SHA-256 of all numbers in order."""

    lengths: tuple[int, ...]
    digest: str


def _survey(file: Path, shapes: Shapes) -> _Survey:
    """Look at every number of a file once.

    Raises:
        UserError: it is no buffer, does not fit, or a number or an expert in it is of no use.
    """
    digest = hashlib.sha256()
    lengths = []
    for e, expert in enumerate(_load(file)):
        first, moved = _flat(expert[0]), False
        for t, snapshot in enumerate(expert):
            _check_fit(file, f"snapshot {t} of expert {e}", snapshot, shapes)
            flat = _flat(snapshot)
            if not bool(flat.isfinite().all()):
                name = next(
                    n for n, v in zip(shapes.names, snapshot, strict=True) if not bool(v.isfinite().all())
                )
                raise UserError(
                    f"{file}: an expert's numbers are not finite",
                    got=f"nan or inf in {name} in snapshot {t} of expert {e}",
                    fix="leave the file out, or train its experts again with a smaller rate",
                )
            moved = moved or not torch.equal(flat, first)
            digest.update(flat.numpy().data)
        if len(expert) > 1 and not moved:
            raise UserError(
                f"{file}: all {len(expert)} snapshots of expert {e} are the same",
                fix="on a CPU buffer.py keeps the live weights without copying them, so that only the last are left: "
                "write p.detach().cpu().clone() there and make the buffer again",
            )
        lengths.append(len(expert))
    return _Survey(tuple(lengths), digest.hexdigest())


def _flat(snapshot: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parameters [P] in their order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in snapshot])


def _check_fit(file: Path, where: str, snapshot: Sequence[torch.Tensor], shapes: Shapes) -> None:
    for name, shape, tensor in zip_longest(shapes.names, shapes.shapes, snapshot):
        got = None if tensor is None else tuple(tensor.shape)
        if got != shape:
            raise UserError(
                f"{file}: {where} is of another network",
                got=f"{name or 'a further parameter'} of shape {got or 'none'} ({len(snapshot)} tensors)",
                expected=f"{shape or 'none'} ({len(shapes.names)} tensors)",
                fix="choose the experts' network with net.width, net.depth ..., and what they were trained on with --data",
            )


def _check_lengths(files: Sequence[Path], surveys: Sequence[_Survey]) -> None:
    """All experts need as many snapshots, and two at least."""
    expected = surveys[0].lengths[0]
    for file, survey in zip(files, surveys, strict=True):
        for e, length in enumerate(survey.lengths):
            if length != expected:
                raise UserError(
                    "the experts have unequal numbers of snapshots",
                    got=f"{length} in expert {e} of {file}",
                    expected=f"{expected}, as in expert 0 of {files[0]}",
                    fix="leave out what was cut short, or make it again",
                )
    if expected < 2:
        raise UserError(
            f"{files[0]}: an expert needs a snapshot before training and one after each pass",
            got="1 snapshot",
            expected="2 or more",
        )


def _is_there(listing: Listing, to: Path, force: bool) -> bool:
    """Whether ``to`` holds these very experts, whole.

    Raises:
        UserError: it holds something else.
    """
    if to.is_dir() and not force:
        foreign = sorted(item.name for item in to.iterdir() if not _OURS.fullmatch(item.name))
        if foreign:
            raise UserError(
                f"{to} holds files that are not imported experts",
                got=", ".join(foreign[:3]),
                fix="choose another folder with --to",
            )
    try:
        before = Listing.load(to)
    except UserError:  # there is none, or none of use
        return False
    if before.fingerprint != listing.fingerprint:
        if force:
            return False
        raise UserError(
            f"{to} holds other imported experts",
            got=f"those of {before.source}",
            fix="choose another folder with --to, or redo it with --force",
        )
    try:
        before.check(to)
    except UserError:
        return False
    return True


def _write(listing: Listing, files: Sequence[Path], to: Path) -> None:
    if to.is_dir():
        sweep(to)
        # The listing goes first and comes back last: in between the folder is no import.
        (to / "experts.json").unlink(missing_ok=True)
        for old in to.glob("experts-*.safetensors"):
            old.unlink()
    for part, (file, path) in enumerate(zip(files, listing.paths(to), strict=True)):
        write_pieces(path, "snapshots", listing.shape(part), _pieces(file), {"sha256": listing.digests[part]})
    listing.save(to)


def _pieces(file: Path) -> Iterator[torch.Tensor]:
    for expert in _load(file):
        for snapshot in expert:
            yield _flat(snapshot)
