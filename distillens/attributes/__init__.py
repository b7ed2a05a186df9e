"""What can be seen on an image, in words of closed sets. A source is a file here; its class has the file's name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from distillens.core.checks import UserError
from distillens.core.dataset import Dataset
from distillens.core.registry import Room

MISSING = -1


@dataclass(frozen=True, eq=False)
class Attributes:
    """Attributes of n images: for each its words, and for each image the word's place [n, attributes] (-1: not known).

    Raises:
        UserError: an attribute has no two words, or a value is none of its words.
    """

    words: Mapping[str, tuple[str, ...]]
    values: torch.Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.words):
            raise UserError(
                "every attribute needs a column of values",
                got=f"shape {tuple(self.values.shape)} for {len(self.words)} attributes",
            )
        for (name, words), column in zip(self.words.items(), self.values.T, strict=True):
            if len(words) < 2 or len(set(words)) != len(words):
                raise UserError(
                    f"the attribute {name!r} needs two words or more, all different", got=repr(words)
                )
            if len(column) and not (int(column.min()) >= MISSING and int(column.max()) < len(words)):
                raise UserError(
                    f"the attribute {name!r} has values that are none of its words",
                    got=f"{int(column.min())} to {int(column.max())}",
                    expected=f"-1 (not known) to {len(words) - 1}",
                )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def each(self) -> tuple[tuple[str, str], ...]:
        """All words with their attributes, in order: (attribute, word)."""
        return tuple((name, word) for name, words in self.words.items() for word in words)

    def has(self) -> torch.Tensor:
        """Whether each image has each word [n, words], bool; an image of which an attribute is not known has none of its words."""
        columns = [
            self.values[:, i, None] == torch.arange(len(words)) for i, words in enumerate(self.words.values())
        ]
        return torch.cat(columns, 1)


class Source(Protocol):
    """Where attributes come from: a frozen dataclass whose fields are its settings."""

    def __call__(self, data: Dataset, fit: Dataset) -> Attributes:
        """The attributes of ``data``; a measure is cut into words where ``fit`` says, never where ``data`` does."""


room: Room[type[Source]] = Room("distillens.attributes", "attribute source")


def named(text: str, like: object = None) -> Source:
    """The source of that name with the settings it has by itself: ``vision``; the data ``like`` changes none of them.

    Raises:
        UserError: there is no such source; the nearest name is suggested.
    """
    return room.find(text)()


def fingerprints(data: Dataset) -> tuple[str, ...]:
    """A name for each image by what is on it: 16 hexadecimal digits of the SHA-256 of its shape and 8-bit pixels.

    The same in every space, split and order: by it a file of attributes or a stored answer finds its image again.
    """
    # Not rounded at the half: 8-bit values such as 127.5 would depend on the last bits of a space's constants.
    levels = (data.pixels().clamp(0, 1) * 255 + 0.501).floor().to(torch.uint8).cpu()
    shape = repr(data.shape).encode()
    return tuple(hashlib.sha256(shape + image.numpy().tobytes()).hexdigest()[:16] for image in levels)
