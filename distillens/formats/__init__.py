"""Layouts that others write. A layout is a file here; its class has the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from distillens.core.contracts import Like, Net
from distillens.core.registry import Room
from distillens.experts import Trajectories


class Format(Protocol):
    """A foreign layout of expert trajectories. Nothing in a file that it reads can run."""

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a path looks like this layout, by names alone."""

    @staticmethod
    def read(path: Path, net: Net, like: Like, to: Path, *, force: bool = False) -> Trajectories:
        """The experts in ``path``, now in our own layout in the folder ``to``."""


room: Room[type[Format]] = Room("distillens.formats", "format")
