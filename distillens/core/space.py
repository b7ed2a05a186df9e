"""The units that images are in: a tensor file is meaningless without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distillens.core.checks import UserError, at_least, positive
from distillens.core.storage import fingerprint


class Space(Protocol):
    """An affine map between pixels in [0, 1] and the units that networks see."""

    def from_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels [n, c, h, w] in this space."""

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, c, h, w] of this space as pixels (distilled ones may leave [0, 1])."""

    def describe(self) -> dict[str, Any]:
        """The space as JSON; equal descriptions are equal spaces."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What JSON cannot hold (a fitted matrix)."""


@dataclass(frozen=True)
class Pixel:
    """Pixels as they are, in [0, 1]."""

    def from_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """The images themselves."""
        return images

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """The images themselves."""
        return images

    def describe(self) -> dict[str, Any]:
        """``{"kind": "pixel"}``."""
        return {"kind": "pixel"}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Standardised:
    """Each channel minus its mean, over its standard deviation (both in pixel units)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise UserError(
                "a standardised space needs one mean and one std a channel",
                got=f"{len(self.mean)} means and {len(self.std)} stds",
            )
        for std in self.std:
            positive("a standardised space", std=std)

    def _columns(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise UserError(
                "images do not fit their space",
                got=f"shape {tuple(images.shape)}",
                expected=f"[n, {len(self.mean)}, h, w]",
            )
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device)
        return mean[:, None, None], std[:, None, None]

    def from_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """``(images - mean) / std``."""
        mean, std = self._columns(images)
        return (images - mean) / std

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """``images * std + mean``."""
        mean, std = self._columns(images)
        return images * std + mean

    def describe(self) -> dict[str, Any]:
        """Kind and constants."""
        return {"kind": "standardised", "mean": list(self.mean), "std": list(self.std)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}


@dataclass(frozen=True, eq=False)
class Zca:
    """Whitened images: ``(x - mean) @ matrix`` on flattened pixels, with the inverse stored.

    ``kornia`` is the kind of the trajectory-matching papers: pixels in [0, 1], no channel
    normalisation, ``matrix = (cov + regulariser * I)^(-1/2)`` with 0.1 and the covariance over n - 1.
    The matrix is fitted on real training images and travels with the data.
    """

    kind: str
    shape: tuple[int, int, int]
    mean: torch.Tensor
    matrix: torch.Tensor
    inverse: torch.Tensor

    @staticmethod
    def fit(pixels: torch.Tensor, regulariser: float = 0.1) -> Zca:
        """The kornia kind, fitted on pixels [n, c, h, w] in [0, 1]."""
        at_least(1e-8, "zca", regulariser=regulariser)
        n, c, h, w = pixels.shape
        flat = pixels.reshape(n, -1).double()
        mean = flat.mean(0)
        centred = flat - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / max(n - 1, 1))
        scale = (values.clamp(min=0) + regulariser).sqrt()
        matrix = (vectors / scale) @ vectors.T
        inverse = (vectors * scale) @ vectors.T
        return Zca("kornia", (c, h, w), mean.float(), matrix.float(), inverse.float())

    def __post_init__(self) -> None:
        d = self.shape[0] * self.shape[1] * self.shape[2]
        if self.mean.shape != (d,) or self.matrix.shape != (d, d) or self.inverse.shape != (d, d):
            raise UserError(
                "a whitening matrix does not fit its image shape",
                got=f"mean {tuple(self.mean.shape)}, matrix {tuple(self.matrix.shape)}",
                expected=f"[{d}] and [{d}, {d}] for images {self.shape}",
            )

    def from_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Whitened images."""
        return self._apply(images, -self.mean, self.matrix, 0 * self.mean)

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels again."""
        return self._apply(images, 0 * self.mean, self.inverse, self.mean)

    def _apply(
        self, images: torch.Tensor, before: torch.Tensor, matrix: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        if tuple(images.shape[1:]) != self.shape:
            raise UserError(
                "images do not fit their space",
                got=f"shape {tuple(images.shape)}",
                expected=f"[n, {self.shape}]",
            )
        flat = images.flatten(1)
        moved = (flat + before.to(flat)) @ matrix.to(flat) + after.to(flat)
        return moved.reshape(images.shape)

    def describe(self) -> dict[str, Any]:
        """Kind, shape and the fingerprint of the fit."""
        fit = fingerprint(self.mean, self.matrix, self.inverse)
        return {"kind": "zca", "zca": self.kind, "shape": list(self.shape), "fit": fit}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Mean, matrix and inverse."""
        return {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}


def restore_space(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Space:
    """The space that ``describe`` and ``tensors`` wrote."""
    kind = description.get("kind")
    if kind == "pixel":
        return Pixel()
    if kind == "standardised":
        return Standardised(tuple(description["mean"]), tuple(description["std"]))
    if kind == "zca":
        c, h, w = description["shape"]
        space = Zca(description["zca"], (c, h, w), tensors["mean"], tensors["matrix"], tensors["inverse"])
        if space.describe() != description:
            raise UserError(
                "a whitening matrix differs from the one that was recorded", fix="make the file again"
            )
        return space
    raise UserError("unknown space", got=repr(kind), expected="pixel, standardised or zca")


def same_space(first: Space, second: Space) -> bool:
    """Whether two spaces are the same units."""
    return first.describe() == second.describe()
