"""Distilled sets that are there already: run folders of ours, and files of anybody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits


@dataclass(frozen=True, eq=False)
class Given:
    """Sets of one size by name, each with its replicates, and the places they were named by."""

    sets: Mapping[str, tuple[DistilledDataset, ...]] = field(default_factory=dict)
    places: tuple[str, ...] = ()

    @property
    def ipc(self) -> int:
        """Images a class."""
        return round(next(iter(self.sets.values()))[0].ipc)

    @property
    def replicates(self) -> int:
        """Those of the name that has most."""
        return max(map(len, self.sets.values()))

    def folders(self) -> list[tuple[str, DistilledDataset]]:
        """Every set with its place in a study's folder."""
        return [
            (f"sets/ipc{self.ipc}/{name}/{r}", one)
            for name, many in self.sets.items()
            for r, one in enumerate(many)
        ]


def bring(places: Sequence[str], real: Splits) -> Given:
    """The sets in some places, each ``PATH`` or ``NAME=PATH``; a set of ours is named by its method.

    Raises:
        UserError: there is no set, it does not belong to the data, or sizes or spaces differ.
    """
    found: dict[str, list[DistilledDataset]] = {}
    for place in places:
        name, _, path = place.rpartition("=")
        one = _one(Path(path).expanduser(), real, name)
        assert one.provenance is not None
        found.setdefault(name or one.provenance.method, []).append(one)
    if not found:
        return Given()
    sets = {name: tuple(many) for name, many in found.items()}
    for name, many in sets.items():
        if len({one.fingerprint for one in many}) != len(many):
            raise UserError(f"the set {name!r} is given twice", fix="name each replicate once")
    sizes = {round(one.ipc) for many in sets.values() for one in many}
    if len(sizes) > 1:
        raise UserError(
            "the given sets are of several sizes",
            got=f"{', '.join(map(str, sorted(sizes)))} images a class",
            fix="a study of each size",
        )
    Sets(sets).check_against(real)
    return Given(sets, tuple(places))


def _one(path: Path, real: Splits, name: str) -> DistilledDataset:
    return DistilledDataset.load(path)
