"""Run folders: taken for one request, recognised by it, emptied so that an interruption leaves an unfinished run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillens.core.checks import UserError
from distillens.core.storage import read_json, write_json

FINISHED = ("report.html", "provenance.json")  # a study's or a set's last file


def claim(folder: Path, request: Mapping[str, Any], *, force: bool = False) -> None:
    """Take a run folder for a request, or recognise the one it was made for.

    Raises:
        UserError: the folder holds something else; the message names what differs.
    """
    note = folder / "request.json"
    if note.is_file() and not force:
        before = read_json(note)
        if before != request:
            raise UserError(
                f"{folder} was made with other settings",
                got=_difference(before, dict(request)),
                fix="choose another folder with --to, or redo it with --force",
            )
        return
    if folder.is_dir() and not note.is_file() and any(folder.iterdir()):
        raise UserError(
            f"{folder} holds files that are not a run of distillens", fix="choose another with --to"
        )
    if force and note.is_file():
        _empty(folder)
    write_json(note, request)


def _difference(before: Any, now: Any, place: str = "") -> str:
    """The first place where two JSON values differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        # Fingerprints last: whatever else differs says more.
        for name in sorted({*before, *now}, key=lambda name: (name.endswith("fingerprint"), name)):
            if before.get(name) != now.get(name):
                return _difference(before.get(name), now.get(name), f"{place}.{name}" if place else name)
    return f"{place} {before!r} there, {now!r} asked for"


def _empty(folder: Path) -> None:
    """Remove a run's own files: what says that it is finished first of all, the request last.

    Whoever is interrupted in between has an unfinished run, which goes on.
    """
    for item in sorted(
        folder.iterdir(), key=lambda path: (path.name not in FINISHED, path.name == "request.json")
    ):
        remove(item)


def remove(item: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if item.is_dir():
        shutil.rmtree(item)
    else:
        item.unlink(missing_ok=True)
