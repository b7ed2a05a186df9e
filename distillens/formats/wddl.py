"""Distilled sets as "What is Dataset Distillation Learning?" keeps them: ``DD_data/0.pt`` and the like.

``torch.save`` of ``{"data": float [n, c, h, w], "label": int64 [n]}``, the images normalised, saved on whatever device
and perhaps with gradients. Method, size, data and constants are not in it. Source: Yang et al. 2024, official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.dataset import Splits
from distillens.formats._torch_file import CIFAR_MEAN, CIFAR_STD, distilled, loaded

_EXPECTED = 'a dict {"data": images [n, channels, height, width], "label": classes [n]}'


@dataclass(frozen=True)
class WDDL:
    """A distilled set of the paper's files: {"data": images, "label": classes}.

    ``mean`` and ``std`` are the constants that the file's images were normalised with, in pixels.
    """

    holds: ClassVar[Literal["sets"]] = "sets"

    mean: tuple[float, ...] = CIFAR_MEAN
    std: tuple[float, ...] = CIFAR_STD

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether this is such a file, by its name: a number as the paper's, ``0.pt`` to ``3.pt``."""
        return path.suffix == ".pt" and path.stem.isdecimal()

    def read(self, path: Path, real: Splits) -> DistilledDataset:
        """The set in a file, in the space of the real data that it was made from.

        Raises:
            UserError: it is no such file, it would run code, or it does not fit the data.
        """
        found = loaded(path, "a distilled set", _EXPECTED)
        if not isinstance(found, dict) or not {"data", "label"} <= found.keys():
            kind = f"a dict of {', '.join(map(repr, found)) or 'nothing'}" if isinstance(found, dict) else ""
            raise UserError(
                f"{path} is not a distilled set", got=kind or f"a {type(found).__name__}", expected=_EXPECTED
            )
        return distilled(path, found["data"], found["label"], real, self.mean, self.std)
