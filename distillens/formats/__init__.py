"""Layouts that others write. A layout is a file here; its class has the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Protocol

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Like, Net
from distillens.core.dataset import Splits
from distillens.core.registry import Room
from distillens.experts import Trajectories


class Format(Protocol):
    """A foreign layout: a frozen dataclass whose fields are what its files do not say. Nothing in a file can run.

    What it ``holds`` says how it reads: ``ExpertFormat`` or ``SetFormat``.
    """

    holds: ClassVar[Literal["experts", "sets"]]

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a path looks like this layout, by names alone."""


class ExpertFormat(Format, Protocol):
    """A layout of expert trajectories."""

    @staticmethod
    def read(path: Path, net: Net, like: Like, to: Path, *, force: bool = False) -> Trajectories:
        """The experts in ``path``, now in our own layout in the folder ``to``."""


class SetFormat(Format, Protocol):
    """A layout of distilled sets."""

    def read(self, path: Path, real: Splits) -> DistilledDataset:
        """The set in ``path``, in the space of the real data that it was made from; its provenance is the caller's."""


room: Room[type[Format]] = Room("distillens.formats", "format")
