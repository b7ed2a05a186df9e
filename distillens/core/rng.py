"""Randomness as a value: a draw belongs to a named place, never to the order of calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distillens.core.checks import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Key:
    """A place where random numbers are drawn: a seed and a path of names below it.

    A key is never consumed: the same key always gives the same numbers, on the CPU, whatever
    was drawn before. A draw belongs to one item (a model, a step), so that adding an item
    leaves the draws of the others alone.

    >>> Key(0).fold("view", 3) == Key(0, ("view", 3))
    True
    >>> bool((Key(0).normal(2) == Key(0).normal(2)).all())
    True
    """

    seed: int
    path: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UserError("a seed is a whole number from 0", got=repr(self.seed), fix="use --seed 0, say")

    def fold(self, *names: str | int) -> Key:
        """The key of a place below this one."""
        return Key(self.seed, self.path + names)

    def split(self, n: int) -> tuple[Key, ...]:
        """``n`` keys, one an item: ``fold(0) .. fold(n - 1)``."""
        return tuple(self.fold(i) for i in range(n))

    def number(self) -> int:
        """A whole number in [0, 2**63) that stands for this place (SHA-256 of seed and path)."""
        # JSON keeps the name "1" and the number 1 apart.
        text = json.dumps([self.seed, *self.path]).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def generator(self) -> torch.Generator:
        """A fresh CPU generator at this place; the global generator is neither read nor written."""
        import torch

        generator = torch.Generator()
        generator.manual_seed(self.number())
        return generator

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, float32."""
        import torch

        return torch.randn(shape, generator=self.generator())

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Uniform numbers in [low, high), float32."""
        import torch

        return low + (high - low) * torch.rand(shape, generator=self.generator())

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Whole numbers in [0, high), int64."""
        import torch

        return torch.randint(high, shape, generator=self.generator())

    def permutation(self, n: int) -> torch.Tensor:
        """A permutation of 0 .. n-1, int64."""
        import torch

        return torch.randperm(n, generator=self.generator())

    def to_json(self) -> list[str | int]:
        """``[seed, *path]``."""
        return [self.seed, *self.path]

    @staticmethod
    def from_json(value: Sequence[str | int]) -> Key:
        """The key that ``to_json`` wrote."""
        seed, *path = value
        return Key(int(seed), tuple(path))
