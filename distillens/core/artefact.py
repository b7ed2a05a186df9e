"""Distilled datasets: stored tensors, how they decode, their labels, and where they came from."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distillens.core.checks import UserError
from distillens.core.config import describe, restore
from distillens.core.dataset import Dataset
from distillens.core.decode import Decode, Pixels, restore_decode
from distillens.core.donors import Donors
from distillens.core.labels import Labels, Teacher, restore_labels
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.space import Space, restore_space
from distillens.core.storage import (
    fingerprint,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)

FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """Where a distilled set came from. The same provenance gives the same bytes on the same machine.

    ``settings`` is the method as ``config.describe`` writes it; ``inputs`` maps what the method was
    given (experts, a teacher) to its fingerprint. Times and host names stay out: they would change the bytes.
    """

    method: str
    settings: Mapping[str, Any]
    ipc: int
    key: Key
    data: str
    data_fingerprint: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The provenance as JSON."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "ipc": self.ipc,
            "key": self.key.to_json(),
            "data": self.data,
            "data_fingerprint": self.data_fingerprint,
            "inputs": dict(self.inputs),
            "plan": dict(self.plan),
            "versions": dict(self.versions),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Provenance:
        """The provenance that ``to_json`` wrote."""
        return Provenance(**{**value, "key": Key.from_json(value["key"])})


@dataclass(frozen=True, eq=False)
class Order:
    """Training steps in a fixed order (Wang et al. 2018): what to see and how far to go.

    ``steps`` [s, b] int64 are decoded images, -1 for an absent one; ``lr`` [s] is each step's rate.
    """

    steps: torch.Tensor
    lr: torch.Tensor

    def __post_init__(self) -> None:
        if self.steps.ndim != 2 or self.lr.shape != self.steps.shape[:1]:
            raise UserError(
                "ordered steps need one row of images and one rate a step",
                got=f"steps {tuple(self.steps.shape)}, rates {tuple(self.lr.shape)}",
            )


@dataclass(frozen=True)
class Storage:
    """What a distilled set costs: numbers that make accuracies comparable."""

    floats: int
    bits: int
    teacher_bytes: int
    images: int


@dataclass(frozen=True, eq=False)
class DistilledDataset:
    """A distilled set as it is stored.

    A *point* is a stored item: leave-one-out removes points. ``labels`` has one label a point.
    ``recipe`` is the training that the set was made for, with a learned step size in it. A method leaves
    ``provenance`` empty: the pipeline writes it, and only a set that has one can be saved.
    ``chosen`` [points] int64 says which images of the real training split the points are, where they are real ones.
    ``donors`` says which of them the steps of the points came from, where the method was asked to write it down; it is of
    the whole set, so a part of the set has none.
    """

    stored: Mapping[str, torch.Tensor]
    labels: Labels
    classes: tuple[str, ...]
    space: Space
    decode: Decode = Pixels()
    recipe: Recipe | None = None
    order: Order | None = None
    provenance: Provenance | None = None
    chosen: torch.Tensor | None = None
    donors: Donors | None = None

    def __post_init__(self) -> None:
        points = self.decode.points(self.stored)
        if points != len(self.labels):
            raise UserError(
                "every stored point needs one label", got=f"{points} points, {len(self.labels)} labels"
            )
        data = self.dataset()
        if self.order is not None:
            named = self.order.steps
            absent = named[(named < -1) | (named >= len(data))]
            if len(absent):
                raise UserError(
                    "an ordered step names an image that is not there",
                    got=str(int(absent[0])),
                    expected=f"0 to {len(data) - 1}, or -1 for none",
                )
        if self.chosen is not None:
            if self.chosen.dtype != torch.int64 or tuple(self.chosen.shape) != (points,):
                raise UserError(
                    "chosen images need one index a point",
                    got=f"{self.chosen.dtype} of shape {tuple(self.chosen.shape)}",
                    expected=f"int64 [{points}]",
                )
            if points and int(self.chosen.min()) < 0:
                raise UserError(
                    "a chosen image has an index below 0", got=str(int(self.chosen.min())), expected="from 0"
                )
        if self.donors is not None:
            each = self.donors.parts.shape[1]
            if each * len(self.classes) != points:
                raise UserError(
                    "the record of donors does not fit the set",
                    got=f"{each} points a class in it, {points} points of {len(self.classes)} classes",
                )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ipc(self) -> float:
        """Images a class that the set counts as: the storage it was given, or points a class where nobody said.

        A method that stores bases trains on more images than these.
        """
        return float(self.provenance.ipc) if self.provenance else len(self) / len(self.classes)

    def dataset(self) -> Dataset:
        """The images to train on, with their labels."""
        return self._dataset

    @cached_property
    def _dataset(self) -> Dataset:
        images = self.decode.images(self.stored)
        labels = self.labels.take(self.decode.origin(self.stored).to(images.device))
        return Dataset(images, labels, self.classes, self.space)

    def storage(self) -> Storage:
        """Floats and bits stored (labels that are numbers count), bytes of a teacher, images decoded."""
        tensors = list(self.stored.values())
        if self.labels.kind != "hard":
            tensors += self.labels.tensors().values()
        if self.order is not None:
            tensors.append(self.order.lr)
        floats = sum(t.numel() for t in tensors)
        bits = sum(t.numel() * t.element_size() * 8 for t in tensors)
        teacher = self.labels.teacher_bytes if isinstance(self.labels, Teacher) else 0
        return Storage(floats, bits, teacher, len(self.dataset()))

    def keep(self, points: torch.Tensor) -> DistilledDataset:
        """The set with some points only."""
        order = self.order
        if order is not None:
            origin = self.decode.origin(self.stored)
            kept = torch.isin(origin, points)
            new = torch.full((len(origin) + 1,), -1)  # the last entry serves -1 itself
            stored = self.decode.keep(self.stored, points)
            renamed = {int(p): i for i, p in enumerate(points)}
            for old in kept.nonzero().flatten().tolist():
                copy = int((origin[:old] == origin[old]).sum())  # which of the point's images this is
                new_origin = self.decode.origin(stored)
                new[old] = (new_origin == renamed[int(origin[old])]).nonzero().flatten()[copy]
            order = Order(new[order.steps], order.lr)
        return replace(
            self,
            stored=self.decode.keep(self.stored, points),
            labels=self.labels.take(points),
            order=order,
            chosen=None if self.chosen is None else self.chosen[points.to(self.chosen.device)],
            donors=None,
        )

    def without(self, *points: int) -> DistilledDataset:
        """The set with some points left out.

        Raises:
            UserError: a point is not there.
        """
        for point in points:
            if not 0 <= point < len(self):
                raise UserError("there is no such point", got=str(point), expected=f"0 to {len(self) - 1}")
        rest = torch.tensor([i for i in range(len(self)) if i not in points], dtype=torch.int64)
        return self.keep(rest)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of everything but the provenance."""
        order = [] if self.order is None else [self.order.steps, self.order.lr]
        chosen = [] if self.chosen is None else ["chosen", self.chosen]
        donors = [] if self.donors is None else ["donors", self.donors.parts, self.donors.met]
        return fingerprint(
            *(part for name in sorted(self.stored) for part in (name, self.stored[name])),
            self.labels.kind,
            self.labels.settings(),
            *self.labels.tensors().values(),
            list(self.classes),
            self.space.describe(),
            self.decode.describe(),
            describe(self.recipe),
            *order,
            *chosen,
            *donors,
        )

    def save(self, folder: Path) -> None:
        """Write ``data.safetensors``, ``preview.png`` and, last, ``provenance.json`` into ``folder``.

        Raises:
            UserError: the folder cannot be written.
            ValueError: the set has no provenance.
        """
        if self.provenance is None:
            raise ValueError(
                "a distilled set is saved with its provenance: dataclasses.replace(set, provenance=...)"
            )
        tensors = {f"stored.{name}": tensor for name, tensor in self.stored.items()}
        tensors |= {f"labels.{name}": tensor for name, tensor in self.labels.tensors().items()}
        tensors |= {f"space.{name}": tensor for name, tensor in self.space.tensors().items()}
        if self.order is not None:
            tensors |= {"order.steps": self.order.steps, "order.lr": self.order.lr}
        if self.chosen is not None:
            tensors["chosen"] = self.chosen
        if self.donors is not None:
            tensors |= {"donors.parts": self.donors.parts, "donors.met": self.donors.met}
        about = {
            "format": FORMAT,
            "labels": {"kind": self.labels.kind, **self.labels.settings()},
            "classes": list(self.classes),
            "space": self.space.describe(),
            "decode": self.decode.describe(),
            "recipe": describe(self.recipe),
        }
        write_tensors(folder / "data.safetensors", tensors, {"distillens": json.dumps(about, sort_keys=True)})
        write_bytes(folder / "preview.png", preview(self.dataset()))
        write_json(folder / "provenance.json", {**self.provenance.to_json(), "fingerprint": self.fingerprint})

    @staticmethod
    def load(folder: Path) -> DistilledDataset:
        """The set that ``save`` wrote. Nothing in the files can run.

        Raises:
            UserError: a file is missing, damaged, or does not belong to the others.
        """
        if not (folder / "provenance.json").is_file():
            raise UserError(
                f"there is no distilled set in {folder}", fix="make one with: distillens distill METHOD"
            )
        saved = read_json(folder / "provenance.json")
        tensors, metadata = read_tensors(folder / "data.safetensors")
        try:
            about = json.loads(metadata["distillens"])
            if about["format"] != FORMAT:
                raise UserError(
                    f"{folder} was written by another version",
                    got=f"format {about['format']}",
                    expected=str(FORMAT),
                )
            chosen = tensors.pop("chosen", None)
            groups: dict[str, dict[str, torch.Tensor]] = {
                "stored": {},
                "labels": {},
                "space": {},
                "order": {},
                "donors": {},
            }
            for name, tensor in tensors.items():
                group, _, rest = name.partition(".")
                groups[group][rest] = tensor
            kind = about["labels"].pop("kind")
            loaded = DistilledDataset(
                groups["stored"],
                restore_labels(kind, groups["labels"], about["labels"]),
                tuple(about["classes"]),
                restore_space(about["space"], groups["space"]),
                restore_decode(about["decode"]),
                restore(about["recipe"]),
                Order(**groups["order"]) if groups["order"] else None,
                Provenance.from_json({k: v for k, v in saved.items() if k != "fingerprint"}),
                chosen,
                Donors(**groups["donors"]) if groups["donors"] else None,
            )
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{folder} is not a whole distilled set", got=repr(error), fix="make it again"
            ) from error
        if loaded.fingerprint != saved.get("fingerprint"):
            raise UserError(
                f"{folder} was changed after it was made: data.safetensors and provenance.json differ",
                fix="make it again, or import the tensors as a new set",
            )
        return loaded


def preview(data: Dataset, limit: int = 1000) -> bytes:
    """A PNG of the images in natural colours, cut to [0, 1]: a row a class, or one row where each class has one."""
    from PIL import Image

    pixels = data.pixels()[:limit].clamp(0, 1).cpu()
    hard = data.labels.hard()[:limit].cpu()
    rows = [(hard == c).nonzero().flatten().tolist() for c in range(data.k)]
    if max(map(len, rows)) == 1:
        rows = [[i for row in rows for i in row]]
    columns = max(1, max(len(row) for row in rows))
    c, h, w = data.shape
    canvas = torch.ones(3, len(rows) * (h + 1) + 1, columns * (w + 1) + 1)
    for r, row in enumerate(rows):
        for column, i in enumerate(row):
            shown = pixels[i] if c == 3 else pixels[i].mean(0, keepdim=True).expand(3, h, w)
            canvas[:, 1 + r * (h + 1) :, 1 + column * (w + 1) :][:, :h, :w] = shown
    array = (canvas * 255).round().byte().permute(1, 2, 0).numpy()
    zoom = max(1, 4 * 8 // h)
    picture = Image.fromarray(array)
    buffer = io.BytesIO()
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(
        buffer, "PNG"
    )
    return buffer.getvalue()
