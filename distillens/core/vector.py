"""Parameters as one flat vector: what optimisers, trajectories and unrolls work on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shapes:
    """Names and shapes of parameters, in order: the key to a flat vector [..., P]."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(params: Mapping[str, torch.Tensor]) -> Shapes:
        """The shapes of one model's parameters."""
        return Shapes(tuple(params), tuple(tuple(t.shape) for t in params.values()))

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Parameters with equal leading axes [...] as [..., P]."""
        pieces = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = params[name]
            pieces.append(tensor.reshape(*tensor.shape[: tensor.ndim - len(shape)], -1))
        return torch.cat(pieces, -1)

    def unflatten(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of [..., P] under their names and shapes; gradients flow through."""
        pieces = torch.split(flat, [math.prod(shape) for shape in self.shapes], -1)
        return {
            name: piece.reshape((*flat.shape[:-1], *shape))
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }
