"""The kinds of label that distilled data carries. Each one names its loss.

Shapes: n items, k classes; leading axes before them are kept, so that a population of
models [m, n, k] is scored in one call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from distillens.core.checks import UserError, positive


class Labels(ABC):
    """One label an item. Abstract: the kinds below are final."""

    kind: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """How many items are labelled."""

    @abstractmethod
    def take(self, index: torch.Tensor) -> Labels:
        """The labels of the items ``index``, in its shape."""

    @abstractmethod
    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The loss of each item, [..., n], for logits [..., n, k]."""

    @abstractmethod
    def hard(self) -> torch.Tensor:
        """The likeliest class of each item, int64."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file keeps."""

    @abstractmethod
    def check(self, classes: int) -> None:
        """Refuse labels that do not fit ``classes`` classes."""

    def settings(self) -> dict[str, Any]:
        """What a file keeps besides tensors."""
        return {}

    def to(self, device: torch.device) -> Labels:
        """The same labels on a device."""
        return restore_labels(
            self.kind, {k: v.to(device) for k, v in self.tensors().items()}, self.settings()
        )

    def joined(self, others: Sequence[Labels]) -> Labels:
        """These labels followed by others of the same kind."""
        for other in others:
            if other.kind != self.kind or other.settings() != self.settings():
                raise UserError("labels of two kinds cannot be joined", got=f"{self.kind} and {other.kind}")
        axis = 1 if isinstance(self, Teacher) else 0
        pieces = {
            name: torch.cat([tensor, *(other.tensors()[name] for other in others)], axis)
            for name, tensor in self.tensors().items()
        }
        return restore_labels(self.kind, pieces, self.settings())


@dataclass(frozen=True, eq=False)
class Hard(Labels):
    """A class index an item, int64 [n]. Loss: cross-entropy."""

    kind = "hard"
    index: torch.Tensor

    def __len__(self) -> int:
        return self.index.shape[-1]

    def take(self, index: torch.Tensor) -> Hard:
        """The labels of some items."""
        return Hard(self.index[index])

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """``-log softmax(logits)[label]``."""
        target = self.index.expand(logits.shape[:-1])
        return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(
            logits.shape[:-1]
        )

    def hard(self) -> torch.Tensor:
        """The indices."""
        return self.index

    def tensors(self) -> dict[str, torch.Tensor]:
        """``index``."""
        return {"index": self.index}

    def check(self, classes: int) -> None:
        """Refuse what is not int64 in [0, classes)."""
        if self.index.ndim != 1 or self.index.dtype != torch.int64:
            raise UserError(
                "hard labels are whole numbers, one an image",
                got=f"{self.index.dtype} of shape {tuple(self.index.shape)}",
                expected="int64 [n]",
            )
        if len(self) and (int(self.index.min()) < 0 or int(self.index.max()) >= classes):
            raise UserError(
                "a label is outside the classes",
                got=f"labels {int(self.index.min())} to {int(self.index.max())}",
                expected=f"0 to {classes - 1}",
            )


class _Table(Labels):
    """Labels that are one row of numbers an item, [n, k]."""

    values: torch.Tensor

    def __len__(self) -> int:
        return self.values.shape[-2]

    def hard(self) -> torch.Tensor:
        """The largest entry of each row."""
        return self.values.argmax(-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """``values``."""
        return {"values": self.values}

    def check(self, classes: int) -> None:
        """Refuse what is not a finite [n, classes] table."""
        if self.values.ndim != 2 or self.values.shape[1] != classes:
            raise UserError(
                f"{self.kind} labels are one row an image",
                got=f"shape {tuple(self.values.shape)}",
                expected=f"[n, {classes}]",
            )
        if not bool(torch.isfinite(self.values).all()):
            raise UserError(f"{self.kind} labels hold numbers that are not finite")


@dataclass(frozen=True, eq=False)
class Probabilities(_Table):
    """A distribution over the classes an item, [n, k]. Loss: cross-entropy against it."""

    kind = "probabilities"
    values: torch.Tensor

    def take(self, index: torch.Tensor) -> Probabilities:
        """The labels of some items."""
        return Probabilities(self.values[index])

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """``-sum_k p_k log softmax(logits)_k``."""
        return -(self.values * logits.log_softmax(-1)).sum(-1)

    def check(self, classes: int) -> None:
        """Refuse rows that are not distributions."""
        super().check(classes)
        if len(self) and (
            float(self.values.min()) < -1e-6 or float((self.values.sum(-1) - 1).abs().max()) > 1e-3
        ):
            raise UserError(
                "probability labels are not distributions",
                got=f"rows that sum to {float(self.values.sum(-1).min()):.3g} to "
                f"{float(self.values.sum(-1).max()):.3g}, least entry {float(self.values.min()):.3g}",
                expected="rows from 0 up that sum to 1",
                fix="learned logits are the kind 'logits', regression targets the kind 'targets'",
            )


@dataclass(frozen=True, eq=False)
class Logits(_Table):
    """Learned logits an item, [n, k], as DATM stores them. Loss: cross-entropy against their softmax."""

    kind = "logits"
    values: torch.Tensor

    def take(self, index: torch.Tensor) -> Logits:
        """The labels of some items."""
        return Logits(self.values[index])

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """``-sum_k softmax(y)_k log softmax(logits)_k``."""
        return -(self.values.softmax(-1) * logits.log_softmax(-1)).sum(-1)


@dataclass(frozen=True, eq=False)
class Targets(_Table):
    """Regression targets an item, [n, k], as the kernel methods learn. Loss: half the squared error."""

    kind = "targets"
    values: torch.Tensor

    def take(self, index: torch.Tensor) -> Targets:
        """The labels of some items."""
        return Targets(self.values[index])

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """``1/2 sum_k (logits_k - y_k)^2``."""
        return 0.5 * (logits - self.values).square().sum(-1)


@dataclass(frozen=True, eq=False)
class Teacher(Labels):
    """A teacher's logits for every augmented view, [views, n, k], as SRe2L and RDED need.

    Training step i uses view ``i % views``: its augmentation is drawn at
    ``Key(seed).fold("view", view)``, so that the label belongs to what the network sees.
    ``ref`` is the teacher's fingerprint; ``teacher_bytes`` its size, which belongs to the set's storage.
    Loss: Kullback-Leibler divergence at a temperature (no T^2 factor, as in SRe2L's code).
    """

    kind = "teacher"
    ref: str
    views: torch.Tensor
    seed: int
    temperature: float = 1.0
    teacher_bytes: int = 0

    def __len__(self) -> int:
        return self.views.shape[-2]

    def view(self, index: int) -> Teacher:
        """The labels of one view, still a table of views (of one)."""
        return Teacher(
            self.ref, self.views[index : index + 1], self.seed, self.temperature, self.teacher_bytes
        )

    def take(self, index: torch.Tensor) -> Teacher:
        """The labels of some items, all views."""
        return Teacher(self.ref, self.views[:, index], self.seed, self.temperature, self.teacher_bytes)

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """``KL(softmax(y / T) || softmax(logits / T))``, for labels of one view."""
        if self.views.shape[0] != 1:
            raise ValueError("choose a view before the loss: labels.view(i)")
        log_q = (self.views[0] / self.temperature).log_softmax(-1)
        log_p = (logits / self.temperature).log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def hard(self) -> torch.Tensor:
        """The class that the views favour on average."""
        return self.views.softmax(-1).mean(0).argmax(-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """``views``."""
        return {"views": self.views}

    def settings(self) -> dict[str, Any]:
        """Reference, seed of the views, temperature and teacher's size."""
        return {
            "ref": self.ref,
            "seed": self.seed,
            "temperature": self.temperature,
            "teacher_bytes": self.teacher_bytes,
        }

    def check(self, classes: int) -> None:
        """Refuse what is not a finite [views, n, classes] table."""
        positive("teacher labels", temperature=self.temperature)
        if self.views.ndim != 3 or self.views.shape[2] != classes or not self.views.shape[0]:
            raise UserError(
                "teacher labels are one row a view and image",
                got=f"shape {tuple(self.views.shape)}",
                expected=f"[views, n, {classes}]",
            )
        if not bool(torch.isfinite(self.views).all()):
            raise UserError("teacher labels hold numbers that are not finite")


def restore_labels(kind: str, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Labels:
    """The labels that ``kind``, ``tensors()`` and ``settings()`` wrote."""
    kinds: dict[str, type[Labels]] = {c.kind: c for c in (Hard, Probabilities, Logits, Targets, Teacher)}
    if kind not in kinds:
        raise UserError("unknown kind of label", got=repr(kind), expected=", ".join(kinds))
    try:
        return kinds[kind](**tensors, **settings)
    except TypeError as error:
        raise UserError(f"{kind} labels are damaged", got=str(error), fix="make the file again") from error
