"""Distilled sets as the code of DC, DSA and DM leaves them: ``res_DC_CIFAR10_ConvNet_10ipc.pt``.

``torch.save`` of ``{"data": [[images, classes], ...], "accs_all_exps": ...}``, an item an experiment, the images
normalised. The accuracies may be numbers of numpy. Source: Zhao et al. 2021, official code.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.dataset import Splits
from distillens.formats._torch_file import CIFAR_MEAN, CIFAR_STD, distilled, loaded

_EXPECTED = 'a dict {"data": [[images [n, channels, height, width], classes [n]], ...], ...}'


@dataclass(frozen=True)
class DC:
    """A distilled set of DC's, DSA's or DM's files: {"data": [[images, classes], ...]}.

    ``item`` is the experiment, the last by default. ``mean`` and ``std`` are the constants that the file's images were
    normalised with, in pixels.
    """

    holds: ClassVar[Literal["sets"]] = "sets"

    item: int = -1
    mean: tuple[float, ...] = CIFAR_MEAN
    std: tuple[float, ...] = CIFAR_STD

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether this is such a file, by its name."""
        return path.suffix == ".pt" and path.name.startswith("res_")

    def read(self, path: Path, real: Splits) -> DistilledDataset:
        """The set in a file, in the space of the real data that it was made from.

        Raises:
            UserError: it is no such file, it would run code, there is no such item, or it does not fit the data.
        """
        found = loaded(path, "a distilled set", _EXPECTED, allowed=_numbers())
        items = found.get("data") if isinstance(found, dict) else None
        pairs = isinstance(items, list | tuple) and all(
            isinstance(i, list | tuple) and len(i) == 2 for i in items
        )
        if not pairs or not items:
            kind = f"a dict of {', '.join(map(repr, found)) or 'nothing'}" if isinstance(found, dict) else ""
            raise UserError(
                f"{path} is not a distilled set", got=kind or f"a {type(found).__name__}", expected=_EXPECTED
            )
        if not -len(items) <= self.item < len(items):
            raise UserError(
                f"{path} has no such item",
                got=str(self.item),
                expected=f"0 to {len(items) - 1}, or -1 for the last",
            )
        images, labels = items[self.item]
        return distilled(path, images, labels, real, self.mean, self.std)


def _numbers() -> list[Any]:
    """What rebuilds numpy's float64 in a file, under the names of its versions before 2 and since."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, np.dtypes.Float64DType, codecs.encode]
