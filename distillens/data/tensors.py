"""Tensors in memory as real data, and what every source does on the way there: cut and standardise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distillens.core.checks import UserError
from distillens.core.dataset import Dataset, Splits, stratified
from distillens.core.labels import Hard
from distillens.core.rng import Key
from distillens.core.space import Pixel, Space, Standardised

Pair = tuple[torch.Tensor, torch.Tensor]

# Thousandths of the images, for a split that was not given.
SHARES: Mapping[str, int] = {"val": 100, "test": 200}


def from_tensors(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    classes: Sequence[str] | None = None,
    test: Pair | None = None,
    val: Pair | None = None,
    key: Key = Key(0),  # a key is frozen
    space: Space | None = None,
) -> Splits:
    """Tensors as real data, float32, cut in three.

    ``images`` [n, c, h, w] or [n, h, w] are either uint8, which are pixels times 255, or float: pixels in
    [0, 1], unless ``space`` says that they are in its units already. ``labels`` [n] are whole numbers;
    ``classes`` names them, "0" .. "k-1" where it is left out. ``val`` and ``test`` are pairs of the same kind;
    a missing one is cut from the images, class by class, by ``key.fold("split")``: 10 % for validation,
    20 % for testing. The result is in ``space``, or in pixels.

    >>> images = Key(0).uniform(30, 1, 8, 8)
    >>> splits = from_tensors(images, torch.arange(30) % 3)
    >>> len(splits.train), len(splits.val), len(splits.test)
    (21, 3, 6)

    Raises:
        UserError: shapes, kinds or ranges do not fit, a split would be empty, or the labels leave out a number
            and ``classes`` is not given.
    """
    given = {"train": (images, labels)} | {
        n: pair for n, pair in (("val", val), ("test", test)) if pair is not None
    }
    parts = {name: _checked(name, *pair) for name, pair in given.items()}
    names = numbered(*(label for _, label in parts.values())) if classes is None else tuple(classes)
    absent = {name: share for name, share in SHARES.items() if name not in parts}
    if absent:
        parts |= cut(*parts["train"], absent, key)
    datasets = {
        name: Dataset(_in_space(part, space), Hard(label), names, space or Pixel())
        for name, (part, label) in parts.items()
    }
    return Splits(datasets["train"], datasets["val"], datasets["test"])


def cut(images: torch.Tensor, labels: torch.Tensor, shares: Mapping[str, int], key: Key) -> dict[str, Pair]:
    """The images cut class by class at ``key.fold("split")``, by name: ``train`` is what no share takes.

    ``shares`` are in thousandths of each class. Indices ascend within a part.

    Raises:
        UserError: a part would be empty.
    """
    hard = labels.cpu()
    order = key.fold("split").permutation(len(hard))
    indices = stratified(hard, int(hard.max()) + 1 if len(hard) else 0, tuple(shares.values()), order)
    parts = dict(zip((*shares, "train"), indices, strict=True))
    for name, share in shares.items():
        if not len(parts[name]):
            raise UserError(
                f"there are too few images a class to cut a {name} split from",
                got=f"{len(hard)} images",
                expected=f"enough for {share / 10:g} % of a class to be one image",
                fix=f"give the {name} split itself",
            )
    return {name: (images[index], labels[index]) for name, index in parts.items()}


def numbered(*labels: torch.Tensor) -> tuple[str, ...]:
    """Class names for labels that have none: "0" .. "k-1".

    Raises:
        UserError: the labels do not run from 0 without a gap (counted from 1, or not class numbers at all).
    """
    found: list[int] = torch.unique(torch.cat([label.cpu() for label in labels])).tolist()
    if found != list(range(len(found))):
        gap = next(i for i, label in enumerate(found) if i != label)
        raise UserError(
            "class numbers run from 0 without a gap",
            got=f"{len(found)} different labels, {found[0]} to {found[-1]}, "
            + (f"but no {gap}" if found[0] >= 0 else "some below 0"),
            fix="number the classes 0, 1, 2, ..., or name them all",
        )
    return tuple(str(i) for i in range(len(found)))


def standardised(levels: torch.Tensor, top: int) -> Standardised:
    """The space in which images [n, c, h, w] of whole-number levels 0 .. ``top`` have mean 0, std 1 a channel.

    Raises:
        UserError: a channel has one value everywhere.
    """
    mean, std = [], []
    for c in range(levels.shape[1]):
        channel = levels[:, c].int()
        # Sums of whole numbers are exact: the constants depend neither on threads nor on the order of images.
        n, first, second = channel.numel(), int(channel.sum()), int(channel.square().sum())
        variance = n * second - first**2  # times n^2
        if not variance:
            raise UserError(
                f"channel {c} has one value in all training images, so it cannot be standardised",
                got=f"{first / n / top:g}",
                fix="leave the channel out",
            )
        mean.append(first / n / top)
        std.append(variance**0.5 / n / top)
    return Standardised(tuple(mean), tuple(std))


def _checked(name: str, images: torch.Tensor, labels: torch.Tensor) -> Pair:
    """The pair with a channel axis and int64 labels."""
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise UserError(
            f"the {name} images do not fit",
            got=f"{images.dtype} of shape {tuple(images.shape)}",
            expected="uint8 or float numbers of shape [n, c, h, w] or [n, h, w]",
        )
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(
            f"the {name} labels are not whole numbers, one an image",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
            expected="class numbers of shape [n]",
        )
    if len(images) != len(labels):
        raise UserError(
            f"every {name} image needs one label", got=f"{len(images)} images and {len(labels)} labels"
        )
    if not len(images):
        raise UserError(f"there are no {name} images")
    return images, labels.long()


def _in_space(images: torch.Tensor, space: Space | None) -> torch.Tensor:
    """Images [n, c, h, w] as float32 in ``space``, pixels where it is None."""
    if images.dtype == torch.uint8:
        target = space or Pixel()
        done = torch.empty(images.shape, device=images.device)
        # In blocks of 2**15 numbers temporaries stay in the processor's cache, and torch does not share out
        # so little among threads: a quarter of the time and half the memory of one piece (measured, CIFAR-10).
        rows = max(1, 2**15 // max(1, images[0].numel()))
        for part, out in zip(torch.split(images, rows), torch.split(done, rows), strict=True):
            out.copy_(target.from_pixels(part.float().div_(255)))
        return done
    low, high = (float(bound) for bound in images.aminmax())
    if space is None and (low < 0 or high > 1):
        raise UserError(
            "float images without a space are pixels in [0, 1]",
            got=f"numbers from {low:.3g} to {high:.3g}",
            fix="divide by 255, or name their units with space=",
        )
    return images.float()
