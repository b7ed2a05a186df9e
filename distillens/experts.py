"""Expert trajectories: networks trained on real data, kept after every pass, read where they lie.

Our own lie in the store (``runs.Runs``). Imported ones (``formats``) lie in a folder with one
``experts-NNN.safetensors`` (tensor ``snapshots`` [e, t, P], float32) a source file and, written last,
``experts.json``: a folder without it is not an import.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distillens.core.checks import UserError, at_least
from distillens.core.config import describe, restore
from distillens.core.contracts import Net
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import fingerprint, read_header, read_json, read_slice, write_json
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.train import Training, chunks

FORMAT = 1  # of experts.json


@dataclass(frozen=True, eq=False)
class Experts:
    """Experts to train: one a key, for ``passes`` passes over the data, kept before the first and after each.

    The steps of ``recipe`` do not count. Experts that differ in ``passes`` alone are the same up to the shorter
    one's end: the store trains the longest once and serves all (``runs.Runs``).

    Raises:
        UserError: the schedule is not constant, so that a longer training is another one.
    """

    data: Dataset
    net: Net
    recipe: Recipe
    keys: tuple[Key, ...]
    passes: int

    def __post_init__(self) -> None:
        at_least(1, "experts", passes=self.passes, experts=len(self.keys))
        if self.recipe.schedule != "constant":
            raise UserError("experts need a constant schedule", got=self.recipe.schedule)

    @property
    def pass_steps(self) -> int:
        """Optimiser steps in a pass over the data."""
        return math.ceil(len(self.data) / (self.recipe.batch or len(self.data)))

    @cached_property
    def training(self) -> Training:
        """All of it as one training with a snapshot a pass."""
        moments = tuple(e * self.pass_steps for e in range(self.passes + 1))
        return Training(self.data, self.net, self.recipe.but(steps=moments[-1]), self.keys, snapshots=moments)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of what is trained and kept."""
        return self.training.fingerprint

    @cached_property
    def shapes(self) -> Shapes:
        """Names and shapes of a network's parameters."""
        return Shapes.of(self.net.init(self.data, self.keys[0])[0])

    def lasting(self, passes: int) -> Experts:
        """The same experts over more or fewer passes."""
        return replace(self, passes=passes)

    def cut(self, plan: Plan) -> list[Experts]:
        """The experts in the chunks that the plan trains together."""
        return [replace(self, keys=part.keys) for part in chunks(self.training, plan)]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Parameters [P] of trained experts after each pass, read one at a time.

    ``parts`` [experts, passes + 1, P] are files or tensors, ``sizes`` the experts in each. A file is memory-mapped: a
    look at one expert's pass reads P numbers, whatever the file holds; it travels to a worker by name.
    ``fingerprint`` stands for the contents of imported ones; ours have their training's.
    """

    net: Net
    shapes: Shapes
    passes: int
    parts: tuple[Path | torch.Tensor, ...]
    sizes: tuple[int, ...]
    fingerprint: str = ""

    def __len__(self) -> int:
        return sum(self.sizes)

    @staticmethod
    def load(folder: Path) -> Trajectories:
        """The imported experts in ``folder``. Of their files the headers are read, nothing more.

        Raises:
            UserError: there is no import, or a file of it is missing, damaged or another import's.
        """
        listing = Listing.load(folder)
        listing.check(folder)
        # A worker may stand in another folder than this process.
        parts = tuple(path.absolute() for path in listing.paths(folder))
        return Trajectories(
            listing.net, listing.shapes, listing.passes, parts, listing.sizes, listing.fingerprint
        )

    def at(self, expert: int, passes: int) -> torch.Tensor:
        """The parameters [P] of one expert after so many passes.

        Raises:
            UserError: there is no such expert or pass, or its file has gone.
        """
        if not (0 <= expert < len(self) and 0 <= passes <= self.passes):
            raise UserError(
                "there is no such stretch of an expert",
                got=f"expert {expert}, pass {passes}",
                expected=f"experts 0 to {len(self) - 1}, passes 0 to {self.passes}",
            )
        for part, size in zip(self.parts, self.sizes, strict=True):
            if expert < size:
                if isinstance(part, torch.Tensor):
                    return part[expert, passes]
                return read_slice(part, "snapshots", expert, passes)
            expert -= size
        raise AssertionError("sizes add up")


@dataclass(frozen=True)
class Listing:
    """What a folder of imported experts holds: the contents of its ``experts.json``.

    ``sizes`` are the experts in each part and ``digests`` the SHA-256 of its numbers, which the part's header
    repeats: a part that was swapped for another's is noticed without reading it. ``image`` [c, h, w] and ``k``
    classes are what the network was made for; ``source`` says where from and is no part of the fingerprint.
    """

    net: Net
    shapes: Shapes
    passes: int
    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    image: tuple[int, int, int]
    k: int
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of network and numbers."""
        return fingerprint({name: value for name, value in self._about().items() if name != "source"})

    def _about(self) -> dict[str, Any]:
        described = describe(self)
        del described["is"]
        return {"format": FORMAT, **described}

    def shape(self, part: int) -> tuple[int, int, int]:
        """Experts, snapshots and parameters [e, t, P] of a part."""
        return self.sizes[part], self.passes + 1, self.shapes.size

    def paths(self, folder: Path) -> list[Path]:
        """The parts in ``folder``, in order."""
        return [folder / f"experts-{part:03d}.safetensors" for part in range(len(self.sizes))]

    def save(self, folder: Path) -> None:
        """Write ``experts.json``: from now on the folder is an import."""
        write_json(folder / "experts.json", {**self._about(), "fingerprint": self.fingerprint})

    @staticmethod
    def load(folder: Path) -> Listing:
        """The listing that ``save`` wrote; the parts are not looked at.

        Raises:
            UserError: there is none, it is damaged, changed, or of another version.
        """
        if not (folder / "experts.json").is_file():
            raise UserError(
                f"there are no imported experts in {folder}",
                got="no experts.json" if folder.is_dir() else "no such folder",
                fix="import them into it: an import that was interrupted is run again",
            )
        saved = read_json(folder / "experts.json")
        try:
            about = dict(saved)
            said, version = about.pop("fingerprint"), about.pop("format")
            if version != FORMAT:
                raise UserError(
                    f"{folder} was written by another version", got=f"format {version}", expected=str(FORMAT)
                )
            found: Listing = restore({"is": f"{__name__}.{Listing.__name__}", **about})
            # In JSON a shape is a list, and restored a tuple: what was written is what is written again.
            if found.fingerprint != said or len(found.sizes) != len(found.digests):
                raise UserError(
                    f"{folder / 'experts.json'} was changed after it was made", fix="import it again"
                )
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder / 'experts.json'} does not list imported experts",
                got=repr(error),
                fix="import them again",
            ) from error
        return found

    def check(self, folder: Path) -> None:
        """Refuse a folder whose parts are not those of the listing, by their headers.

        Raises:
            UserError: a part is missing, damaged or another import's.
        """
        for part, path in enumerate(self.paths(folder)):
            kind, shape, metadata = read_header(path, "snapshots")
            if (kind, shape, metadata.get("sha256")) != ("F32", self.shape(part), self.digests[part]):
                raise UserError(
                    f"{path} is not the file that {folder / 'experts.json'} was written for",
                    got=f"{kind} {list(shape)}, sha256 {metadata.get('sha256', 'none')[:12]}",
                    expected=f"F32 {list(self.shape(part))}, sha256 {self.digests[part][:12]}",
                    fix="import it again",
                )
