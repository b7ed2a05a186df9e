"""Datasets: images in a known space, with labels and class names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from distillens.core.checks import UserError
from distillens.core.labels import Labels
from distillens.core.rng import Key
from distillens.core.space import ROWS, Space, same_space
from distillens.core.storage import fingerprint


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images [n, c, h, w] (float) in ``space``, labels, class names. Checked at birth, never changed.

    The device is where the images live.

    Raises:
        UserError: shapes, kinds or ranges do not fit, or an image holds a number that is not finite.
    """

    images: torch.Tensor
    labels: Labels
    classes: tuple[str, ...]
    space: Space

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or not self.images.is_floating_point():
            raise UserError(
                "images do not fit",
                got=f"{self.images.dtype} of shape {tuple(self.images.shape)}",
                expected="float numbers of shape [n, channels, height, width]",
                fix="whole numbers 0..255 become float with images / 255",
            )
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise UserError("class names must be two or more, all different", got=repr(self.classes))
        if len(self.labels) != len(self.images):
            raise UserError(
                "every image needs one label", got=f"{len(self.images)} images and {len(self.labels)} labels"
            )
        self.labels.check(len(self.classes))
        self._check_finite()

    def _check_finite(self) -> None:
        # The extremes carry NaN and infinities along, and cost no temporary as large as the data.
        if not self.images.numel() or bool(torch.isfinite(torch.stack(self.images.aminmax())).all()):
            return
        bad = (~torch.isfinite(self.images)).flatten(1).any(1).nonzero().flatten()
        raise UserError(
            f"{len(bad)} images hold numbers that are not finite", got=f"image {int(bad[0])}, the first"
        )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    @property
    def k(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        """Where the images live."""
        return self.images.device

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of images, labels, class names and space."""
        return fingerprint(
            self.images,
            self.labels.kind,
            self.labels.settings(),
            *self.labels.tensors().values(),
            list(self.classes),
            self.space.describe(),
        )

    @cached_property
    def by_class(self) -> tuple[torch.Tensor, ...]:
        """For each class the indices of its images, ascending."""
        hard = self.labels.hard()
        return tuple((hard == c).nonzero().flatten() for c in range(self.k))

    def take(self, index: torch.Tensor) -> Dataset:
        """The images ``index`` [n'], in that order."""
        return Dataset(self.images[index], self.labels.take(index), self.classes, self.space)

    def drawn(self, per_class: int | Sequence[int], key: Key) -> torch.Tensor:
        """Class-major indices of random images, so many of each class or all there are; more of them begin with the same."""
        counts = [per_class] * self.k if isinstance(per_class, int) else per_class
        return torch.cat(
            [
                members[key.fold(c).permutation(len(members))[:count].to(members.device)]
                for c, (members, count) in enumerate(zip(self.by_class, counts, strict=True))
            ]
        )

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on a device."""
        target = torch.device(device)
        return Dataset(self.images.to(target), self.labels.to(target), self.classes, self.space)

    def joined(self, *others: Dataset) -> Dataset:
        """These images followed by others of the same classes and space."""
        for other in others:
            if not same_space(self.space, other.space):
                raise UserError(
                    "images of two spaces cannot be mixed",
                    got=f"{self.space.name} and {other.space.name}"
                    if self.space.name != other.space.name
                    else "two sets of constants",
                    fix="bring them into one space with to_space",
                )
            if other.classes != self.classes or other.shape != self.shape:
                raise UserError(
                    "these datasets do not fit together",
                    got=f"{self.shape}, {self.k} classes and {other.shape}, {other.k} classes",
                )
        return Dataset(
            torch.cat([self.images, *(other.images for other in others)]),
            self.labels.joined([other.labels for other in others]),
            self.classes,
            self.space,
        )

    def to_space(self, space: Space) -> Dataset:
        """The same images in other units.

        Raises:
            UserError: the images cannot be brought out of their space.
        """
        if same_space(space, self.space):
            return self
        moved = torch.empty_like(self.images)
        at = 0
        for part in self.exact_pixels():
            moved[at : at + len(part)] = space.from_pixels(part)
            at += len(part)
        return Dataset(moved, self.labels, self.classes, space)

    def exact_pixels(self) -> Iterator[torch.Tensor]:
        """The images as pixels, some at a time: all of them need not lie in memory twice.

        Raises:
            UserError: the images cannot be brought out of their space.
        """
        if not self.space.invertible:
            raise UserError(
                f"images cannot be brought out of the space {self.space.name}",
                got="images that have lost their brightness and contrast",
                fix="load the real data again, in the space that is wanted",
            )
        for i in range(0, len(self), ROWS):
            yield self.space.to_pixels(self.images[i : i + ROWS])

    def pixels(self) -> torch.Tensor:
        """The images as pixels, or their likeness where the space keeps no more; distilled ones may leave [0, 1]."""
        return self.space.to_pixels(self.images)


@dataclass(frozen=True, eq=False)
class Splits:
    """Real data cut in three. ``val`` comes out of the training data by a key; ``test`` chooses nothing."""

    train: Dataset
    val: Dataset
    test: Dataset
    source: str = "memory"

    def __post_init__(self) -> None:
        for name, part in (("train", self.train), ("val", self.val), ("test", self.test)):
            if part.classes != self.train.classes or part.shape != self.train.shape:
                raise UserError(
                    f"the {name} split differs from the training split",
                    got=f"{part.shape}, {part.k} classes",
                    expected=f"{self.train.shape}, {self.train.k} classes",
                )
            if not same_space(part.space, self.train.space):
                raise UserError(f"the {name} split is in another space than the training split")
            if not len(part):
                raise UserError(f"the {name} split is empty")
            if part.labels.kind != "hard":
                raise UserError("real data carries hard labels", got=f"{part.labels.kind} in {name}")

    @property
    def space(self) -> Space:
        """The units of all three."""
        return self.train.space

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of the three splits."""
        return fingerprint(self.train.fingerprint, self.val.fingerprint, self.test.fingerprint)

    def to(self, device: torch.device | str) -> Splits:
        """The same data on a device."""
        return Splits(self.train.to(device), self.val.to(device), self.test.to(device), self.source)

    def to_space(self, space: Space) -> Splits:
        """The same data in other units."""
        train, val, test = (part.to_space(space) for part in (self.train, self.val, self.test))
        return Splits(train, val, test, self.source)


def check_per_class(data: Dataset, wanted: int, what: str = "images per class") -> None:
    """Refuse to draw more images of a class than it has.

    Raises:
        UserError: a class is too small; the message names it and its size.
    """
    if wanted < 1:
        raise UserError(f"{what} must be at least 1", got=str(wanted))
    sizes = [len(index) for index in data.by_class]
    least = min(range(data.k), key=sizes.__getitem__)
    if sizes[least] < wanted:
        raise UserError(
            f"class {data.classes[least]!r} has {sizes[least]} images, {wanted} were asked for",
            fix=f"ask for at most {sizes[least]} {what}",
        )


def stratified(
    labels: torch.Tensor, classes: int, counts: Sequence[int], order: torch.Tensor
) -> list[torch.Tensor]:
    """Cut items into parts, class by class, following ``order`` (a permutation of all items).

    ``counts[p]`` is the share of part p in thousandths; the last part takes what remains.
    Returned indices ascend within a part.
    """
    parts: list[list[torch.Tensor]] = [[] for _ in range(len(counts) + 1)]
    for c in range(classes):
        members = order[labels[order] == c]
        start = 0
        for part, share in zip(parts, counts, strict=False):
            size = round(len(members) * share / 1000)
            part.append(members[start : start + size])
            start += size
        parts[-1].append(members[start:])
    return [torch.cat(part).sort().values for part in parts]
