"""Which real images the steps of a distilled set came from, as its method wrote it down."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distillens.core.checks import UserError

HALVES = 2  # steps of even and of odd number


@dataclass(frozen=True, eq=False)
class Donors:
    """What each real training image gave to the way of the distilled images of its class.

    Of each step on record counts what its gradient adds to the distance from the start; that is shared out among the real images of its batch. An
    image's part is what it contributed, along the way so far, before learning rate, momentum and what an optimiser makes of it, in units of the
    data's space. Parts have a sign.
    ``parts`` [2, p, n] sums them: entry (h, j, i) is what real training image i gave to the j-th of the p distilled images of
    *its class*, in steps of even (h = 0) and of odd number. Of other classes' images nothing comes: methods that keep this record match class by
    class. ``met`` [2, n] int64 counts the batches on record that image i was in.
    """

    parts: torch.Tensor
    met: torch.Tensor

    def __post_init__(self) -> None:
        n = self.met.shape[-1]
        fits = self.parts.ndim == 3 and self.parts.shape[::2] == self.met.shape == (HALVES, n)
        if not fits or not self.parts.is_floating_point() or self.met.dtype != torch.int64:
            raise UserError(
                "a record of donors needs a number for each point of a class and real image, and a count an image",
                got=f"{self.parts.dtype} {list(self.parts.shape)}, {self.met.dtype} {list(self.met.shape)}",
                expected="parts [2, p, n] and int64 counts [2, n]",
            )
