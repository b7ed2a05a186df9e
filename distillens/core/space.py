"""The units that images are in: a tensor file is meaningless without them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol
from weakref import WeakValueDictionary

import torch

from distillens.core.checks import UserError, at_least, one_of, positive
from distillens.core.storage import fingerprint
from distillens.core.threads import pinned_threads


class Space(Protocol):
    """A map between pixels in [0, 1] and the units that networks see."""

    @property
    def name(self) -> str:
        """What the command calls it: ``--space NAME``."""

    @property
    def invertible(self) -> bool:
        """Whether ``to_pixels`` gives back what ``from_pixels`` was given; else a likeness to look at."""

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

    name: ClassVar[str] = "pixel"
    invertible: ClassVar[bool] = True

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

    name: ClassVar[str] = "standardised"
    invertible: ClassVar[bool] = True

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


Kind = Literal["kornia", "kip", "frepo"]
KINDS: tuple[Kind, ...] = ("kornia", "kip", "frepo")
ROWS = (
    1024  # images that are moved at a time: what lies in memory beside them does not grow with their number
)
BLOCK = 512  # columns of a covariance summed at a time: what is below its diagonal blocks is left out


@dataclass(frozen=True, eq=False)
class Zca:
    """Whitened images: ``(x - mean) / scale`` of flattened pixels, times a symmetric ``matrix`` [d, d].

    The matrix is ``(cov + r I)^(-1/2)``, fitted on real training images; it travels with the data. Three kinds are
    in use, and a set of one is nothing to a network that was trained in another:

    - ``kornia``: pixels in [0, 1] as they are (``scale`` is 1), cov over n - 1, r = 0.1.
    - ``kip``: each image loses its own mean and is brought to length 1; cov is the mean of x x' (no feature mean is
      removed), r = 0.1 of its mean eigenvalue. What an image was brought from is lost: ``mean`` and ``scale`` are
      the averages of the images of the fit, and ``to_pixels`` gives every image their brightness and contrast.
    - ``frepo``: each channel over its standard deviation (``scale``), cov over n, r = 0.1 of its mean eigenvalue.

    ``mean`` [d] and ``scale`` [c] are in pixels. Fit and map take one thread: the same images give the same bytes
    wherever they are loaded.

    Source: ``kornia.enhance.ZCAWhitening``; ``preprocess`` of RTP and RaT-BPTT (KIP's notebook standardises the
    channels before); FRePo's ``lib/dataset/ops.py``. Where we differ: with fewer images than numbers in one, KIP and
    FRePo multiply directions that no image has by 1, we whiten all by the formula; an image of one level has no
    length and becomes 0, where theirs is not a number.
    """

    kind: Kind
    shape: tuple[int, int, int]
    mean: torch.Tensor
    scale: torch.Tensor
    matrix: torch.Tensor

    @staticmethod
    def fit(
        pixels: torch.Tensor | Iterable[torch.Tensor], kind: Kind = "kornia", regulariser: float = 0.1
    ) -> Zca:
        """The whitening of pixels [n, c, h, w] in [0, 1], or of pieces of them that never lie in memory together.

        One pass in float64. Memory is a few matrices [d, d], whatever the number of images.

        Raises:
            UserError: there is no image, the kind is unknown, or the images have nothing to whiten: one value in a
                channel (``frepo``), one level in each image (``kip``).
        """
        one_of("kind of whitening", kind, KINDS)
        at_least(1e-8, "zca", regulariser=regulariser)
        pieces = torch.split(pixels, ROWS) if isinstance(pixels, torch.Tensor) else pixels
        with pinned_threads(1):
            seen = _sums(pieces, kind)
            mean = seen.mean
            if kind == "kip":
                cov, scale = seen.second.div_(seen.n), mean.new_full((seen.shape[0],), seen.contrast)
                mean = mean.new_full(mean.shape, seen.brightness)
            else:
                cov = seen.second.addr_(mean, mean, alpha=-seen.n).div_(
                    max(seen.n - 1, 1) if kind == "kornia" else seen.n
                )
                scale = mean.new_ones(seen.shape[0])
            if kind == "frepo":
                scale = _deviations(mean, cov.diagonal(), seen.shape[0])
                each = scale.repeat_interleave(len(mean) // len(scale))
                cov.div_(each).div_(each[:, None])
            if kind != "kornia":
                regulariser *= float(cov.diagonal().mean())
                positive("images of one level have nothing to whiten: the mean eigenvalue", found=regulariser)
            values, vectors = torch.linalg.eigh(cov, UPLO="U")
            shape = seen.shape
            del cov, seen
            vectors *= (values.clamp(min=0) + regulariser) ** -0.25
            matrix = (vectors @ vectors.T).float().cpu()
        # Symmetric by its formula, and now to the last bit.
        return Zca(kind, shape, mean.float().cpu(), scale.float().cpu(), matrix.triu() + matrix.triu(1).T)

    def __post_init__(self) -> None:
        one_of("kind of whitening", self.kind, KINDS)
        c, h, w = self.shape
        d = c * h * w
        if self.mean.shape != (d,) or self.scale.shape != (c,) or self.matrix.shape != (d, d):
            raise UserError(
                "a whitening matrix does not fit its image shape",
                got=f"mean {tuple(self.mean.shape)}, scale {tuple(self.scale.shape)}, "
                f"matrix {tuple(self.matrix.shape)}",
                expected=f"[{d}], [{c}] and [{d}, {d}] for images {self.shape}",
            )
        if not torch.equal(self.matrix, self.matrix.T):
            raise UserError("a whitening matrix is not symmetric", fix="make the file again")

    def __getstate__(self) -> dict[str, Any]:
        # The inverse is as large as the matrix, and can be made again where it is needed.
        return {name: value for name, value in self.__dict__.items() if name != "inverse"}

    @property
    def name(self) -> str:
        """``zca``, ``zca-kip`` or ``zca-frepo``."""
        return "zca" if self.kind == "kornia" else f"zca-{self.kind}"

    @property
    def invertible(self) -> bool:
        """Whether pixels come back: not from ``kip``."""
        return self.kind != "kip"

    @cached_property
    def inverse(self) -> torch.Tensor:
        """The inverse of the matrix [d, d]: made when it is asked for, not stored."""
        with pinned_threads(1):
            # Of a positive symmetric matrix: half the work of an inverse, and exactly symmetric again.
            return torch.cholesky_inverse(torch.linalg.cholesky(self.matrix.double())).float()

    def from_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Whitened images."""
        mean, scale, matrix = self._like(images, self.matrix)
        if self.kind == "kip":
            return self._each(images, lambda flat: _unit(flat)[0] @ matrix)
        return self._each(images, lambda flat: ((flat - mean) / scale) @ matrix)

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels again; of ``kip`` the images with the average brightness and contrast."""
        mean, scale, inverse = self._like(images, self.inverse)
        return self._each(images, lambda flat: (flat @ inverse) * scale + mean)

    def _like(self, images: torch.Tensor, matrix: torch.Tensor) -> list[torch.Tensor]:
        """Mean [d], scale [d] and a matrix, as numbers of the images' kind where they live."""
        scale = self.scale.repeat_interleave(self.shape[1] * self.shape[2])
        return [tensor.to(images) for tensor in (self.mean, scale, matrix)]

    def _each(self, images: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if tuple(images.shape[1:]) != self.shape:
            raise UserError(
                "images do not fit their space",
                got=f"shape {tuple(images.shape)}",
                expected=f"[n, {self.shape}]",
            )
        with pinned_threads(1):
            return change(images.flatten(1)).reshape(images.shape)

    def describe(self) -> dict[str, Any]:
        """Kind, shape and the fingerprint of the fit."""
        return {"kind": "zca", "zca": self.kind, "shape": list(self.shape), "fit": self._fit}

    @cached_property
    def _fit(self) -> str:
        return fingerprint(*self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Mean, scale, and the matrix row by row from its diagonal on: half of it says all."""
        triangle = torch.cat([self.matrix[i, i:] for i in range(len(self.matrix))])
        return {"mean": self.mean, "scale": self.scale, "triangle": triangle}


@dataclass(eq=False)
class _Sums:
    """What one pass over images leaves: numbers in float64, ``second`` right on and above its diagonal only."""

    n: int
    shape: tuple[int, int, int]
    mean: torch.Tensor
    second: torch.Tensor
    brightness: float = 0.0
    contrast: float = 0.0


def _sums(pieces: Iterable[torch.Tensor], kind: Kind) -> _Sums:
    """Mean [d] of the images and sum of x x' [d, d]; for ``kip`` of the images brought to length 1."""
    seen: _Sums | None = None
    for part in (part for piece in pieces for part in torch.split(piece, ROWS)):
        if seen is None:
            c, h, w = part.shape[1:]
            empty = torch.zeros(c * h * w, dtype=torch.float64, device=part.device)
            seen = _Sums(0, (c, h, w), empty, empty.new_zeros(len(empty), len(empty)))
        flat = part.flatten(1).double()
        if kind == "kip":
            flat, level, length = _unit(flat)
            seen.brightness += float(level.sum())
            seen.contrast += float(length.sum())
        seen.n += len(flat)
        seen.mean += flat.sum(0)
        for i in range(0, flat.shape[1], BLOCK):
            seen.second[i : i + BLOCK, i:].addmm_(flat[:, i : i + BLOCK].T, flat[:, i:])
    if seen is None or not seen.n:
        raise UserError("there are no images to fit a whitening on")
    seen.mean /= seen.n
    seen.brightness /= seen.n
    seen.contrast /= seen.n
    return seen


def _unit(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [n, d] without their own mean at length 1, and those means and lengths [n, 1]."""
    level = flat.mean(1, keepdim=True)
    centred = flat - level
    length = centred.norm(dim=1, keepdim=True)
    # An image of one level is 0 but for rounding, which is no direction.
    return torch.where(length > 1e-5 * (1 + level.abs()), centred / length.clamp(min=1e-12), 0), level, length


def _deviations(mean: torch.Tensor, variances: torch.Tensor, channels: int) -> torch.Tensor:
    """The standard deviation of each channel [c], over its images and pixels."""
    means, within = mean.view(channels, -1), variances.view(channels, -1)
    scale = (within.mean(1) + means.var(1, correction=0)).clamp(min=0).sqrt()
    for c, one in enumerate(scale.tolist()):
        if one < 1e-6:
            raise UserError(
                f"channel {c} has one value in all training images, so it cannot be whitened",
                got=f"{float(means[c, 0]):g}",
                fix="leave the channel out",
            )
    return scale


# Sets of one study have one whitening: in memory it is there once, with one inverse, for as long as a set uses it.
_restored: WeakValueDictionary[str, Zca] = WeakValueDictionary()


def restore_space(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Space:
    """The space that ``describe`` and ``tensors`` wrote.

    Raises:
        UserError: the kind is unknown, or the matrix is another than the one that was recorded.
    """
    kind = description.get("kind")
    if kind == "pixel":
        return Pixel()
    if kind == "standardised":
        return Standardised(tuple(description["mean"]), tuple(description["std"]))
    if kind == "zca":
        return _restored_zca(description, tensors)
    raise UserError("unknown space", got=repr(kind), expected="pixel, standardised or zca")


def _restored_zca(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Zca:
    if "inverse" in tensors:
        raise UserError("a whitened set of an earlier version stores another matrix", fix="make it again")
    mean, scale, triangle = (tensors[name] for name in ("mean", "scale", "triangle"))
    if fingerprint(mean, scale, triangle) != description["fit"]:
        raise UserError(
            "a whitening matrix differs from the one that was recorded", fix="make the file again"
        )
    name = json.dumps(description, sort_keys=True)
    if (known := _restored.get(name)) is not None:
        return known
    c, h, w = description["shape"]
    d = len(mean)
    if triangle.shape != (d * (d + 1) // 2,):
        raise UserError("a whitening matrix does not fit its mean", got=f"{len(triangle)} numbers for {d}")
    matrix = triangle.new_empty(d, d)
    for i, row in enumerate(torch.split(triangle, list(range(d, 0, -1)))):
        matrix[i, i:] = row
        matrix[i:, i] = row
    _restored[name] = space = Zca(description["zca"], (c, h, w), mean, scale, matrix)
    return space


def same_space(first: Space, second: Space) -> bool:
    """Whether two spaces are the same units."""
    return first is second or first.describe() == second.describe()
