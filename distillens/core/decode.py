"""How stored tensors become images, and which stored point each image came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from distillens.core.checks import UserError, at_least

Stored = Mapping[str, torch.Tensor]


class Decode(Protocol):
    """A pure, differentiable map from stored tensors to images. A *point* is a stored item."""

    def points(self, stored: Stored) -> int:
        """How many stored items there are; labels belong to them."""

    def images(self, stored: Stored) -> torch.Tensor:
        """The images to train on, [n', c, h, w]."""

    def origin(self, stored: Stored) -> torch.Tensor:
        """For each decoded image the point it came from, int64 [n']."""

    def keep(self, stored: Stored, points: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of some points only (what they share stays)."""

    def describe(self) -> dict[str, Any]:
        """The decoder as JSON."""


def _one(stored: Stored, *names: str) -> None:
    if set(stored) != set(names):
        raise UserError(
            "the stored tensors do not fit their decoder",
            got=", ".join(sorted(stored)),
            expected=", ".join(names),
        )


@dataclass(frozen=True)
class Pixels:
    """Images stored as they are: ``images`` [n, c, h, w]."""

    def points(self, stored: Stored) -> int:
        """n."""
        _one(stored, "images")
        return stored["images"].shape[0]

    def images(self, stored: Stored) -> torch.Tensor:
        """The stored images."""
        return stored["images"]

    def origin(self, stored: Stored) -> torch.Tensor:
        """0 .. n-1."""
        return torch.arange(self.points(stored))

    def keep(self, stored: Stored, points: torch.Tensor) -> dict[str, torch.Tensor]:
        """Some rows."""
        return {"images": stored["images"][points]}

    def describe(self) -> dict[str, Any]:
        """Kind."""
        return {"kind": "pixels"}


@dataclass(frozen=True)
class MultiFormation:
    """Each stored image is factor^2 patches, each enlarged to full size (IDC, Kim et al. 2022).

    Decoded order: patch index outside, as IDC's code does: all images of patch 0, then of patch 1.
    Patches that do not divide the image are cut at rounded borders; enlargement is bilinear.
    """

    factor: int

    def __post_init__(self) -> None:
        at_least(1, "multi_formation", factor=self.factor)

    def points(self, stored: Stored) -> int:
        """n."""
        _one(stored, "images")
        return stored["images"].shape[0]

    def images(self, stored: Stored) -> torch.Tensor:
        """[factor^2 * n, c, h, w]."""
        whole = stored["images"]
        h, w = whole.shape[2:]
        if self.factor == 1:
            return whole
        patches = [
            F.interpolate(whole[:, :, rows, columns], size=(h, w), mode="bilinear", align_corners=False)
            for rows, columns in self.patches(h, w)
        ]
        return torch.cat(patches)

    def patches(self, h: int, w: int) -> list[tuple[slice, slice]]:
        """Rows and columns of each patch of an image of that height and width."""
        f = self.factor
        rows = [round(i * h / f) for i in range(f + 1)]
        columns = [round(i * w / f) for i in range(f + 1)]
        return [
            (slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1]))
            for i in range(f)
            for j in range(f)
        ]

    def origin(self, stored: Stored) -> torch.Tensor:
        """0 .. n-1, repeated factor^2 times."""
        return torch.arange(self.points(stored)).repeat(self.factor**2)

    def keep(self, stored: Stored, points: torch.Tensor) -> dict[str, torch.Tensor]:
        """Some rows."""
        return {"images": stored["images"][points]}

    def describe(self) -> dict[str, Any]:
        """Kind and factor."""
        return {"kind": "multi_formation", "factor": self.factor}


@dataclass(frozen=True)
class Bases:
    """Images as combinations of shared bases (memory addressing, Deng & Russakovsky 2022).

    Stored: ``bases`` [b, c, h', w'] and ``coefficients`` [n, b]; image = coefficients @ bases,
    enlarged bilinearly to ``size``. A point is a row of coefficients.
    """

    size: tuple[int, int]

    def points(self, stored: Stored) -> int:
        """n."""
        _one(stored, "bases", "coefficients")
        return stored["coefficients"].shape[0]

    def images(self, stored: Stored) -> torch.Tensor:
        """[n, c, h, w]."""
        bases = stored["bases"]
        small = (stored["coefficients"] @ bases.flatten(1)).view(-1, *bases.shape[1:])
        if tuple(small.shape[2:]) == self.size:
            return small
        return F.interpolate(small, size=self.size, mode="bilinear", align_corners=False)

    def origin(self, stored: Stored) -> torch.Tensor:
        """0 .. n-1."""
        return torch.arange(self.points(stored))

    def keep(self, stored: Stored, points: torch.Tensor) -> dict[str, torch.Tensor]:
        """Some rows of coefficients, all bases."""
        return {"bases": stored["bases"], "coefficients": stored["coefficients"][points]}

    def describe(self) -> dict[str, Any]:
        """Kind and image size."""
        return {"kind": "bases", "size": list(self.size)}


def restore_decode(description: Mapping[str, Any]) -> Decode:
    """The decoder that ``describe`` wrote."""
    kind = description.get("kind")
    if kind == "pixels":
        return Pixels()
    if kind == "multi_formation":
        return MultiFormation(int(description["factor"]))
    if kind == "bases":
        h, w = description["size"]
        return Bases((int(h), int(w)))
    raise UserError("unknown decoder", got=repr(kind), expected="pixels, multi_formation or bases")
