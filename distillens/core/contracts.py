"""What a network, a method and an analysis must offer. Implementations need not inherit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.dataset import Dataset, Splits
from distillens.core.result import Result
from distillens.core.rng import Key
from distillens.core.storage import read_tensors, write_tensors

Params = dict[str, torch.Tensor]
Buffers = dict[str, torch.Tensor]
Mode = Literal["train", "evaluate"]
Log = dict[str, float]


class Like(Protocol):
    """What a network must know of the data: image shape and number of classes."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""

    @property
    def k(self) -> int:
        """Classes."""


class Net(Protocol):
    """A network as pure functions; a frozen dataclass whose fields are its settings.

    Evaluation of an image never depends on the images beside it. ``buffers`` is empty where nothing is
    remembered between steps; otherwise the new buffers are returned, the old ones left alone.
    """

    mixes_examples: ClassVar[bool]  # whether training mode lets one image change another's output

    def init(self, like: Like, key: Key) -> tuple[Params, Buffers]:
        """Fresh parameters, float32 on the CPU."""

    def features(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """The last hidden layer [n, d] for images [n, c, h, w]."""

    def logits(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [n, k] for images [n, c, h, w]."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a distiller is asked: which real data, how many images a class, with which randomness.

    ``inputs`` holds what the method declared in ``needs`` (expert trajectories, an embedding).
    """

    real: Dataset
    ipc: int
    key: Key
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def by_class(self) -> tuple[torch.Tensor, ...]:
        """Indices of each class in ``real``."""
        return self.real.by_class

    def labels(self) -> torch.Tensor:
        """Class-major hard labels [k * ipc] of a set with ``ipc`` images a class."""
        return torch.arange(self.real.k).repeat_interleave(self.ipc)


@dataclass(frozen=True, eq=False)
class State:
    """Everything a run must remember between steps: tensors by name, and JSON values."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, float | int | str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the state whole or not at all."""
        import json

        write_tensors(path, self.tensors, {"values": json.dumps(self.values)})

    @staticmethod
    def load(path: Path) -> State:
        """The state that ``save`` wrote."""
        import json

        tensors, metadata = read_tensors(path)
        return State(tensors, json.loads(metadata["values"]))


class Distiller(Protocol):
    """A distillation method: a frozen dataclass whose fields are settings in the authors' units.

    All three steps are pure: they change neither the problem nor the state they are given, and step i
    draws only from ``problem.key.fold("step", i)``. So a run that is killed after any step and loaded
    again ends in the same bytes (contract test, every method).
    """

    paper: ClassVar[str]  # who published it
    family: ClassVar[str]  # gradient | distribution | trajectory | unrolled | coreset
    selects: ClassVar[bool]  # whether the points are real images, chosen
    soft_labels: ClassVar[bool]
    learns_lr: ClassVar[bool]
    needs_experts: ClassVar[bool]

    @property
    def steps(self) -> int:
        """How many times ``step`` is called."""

    @classmethod
    def defaults(cls, like: Dataset, ipc: int) -> Distiller:
        """Settings that fit the data: quick and good on small images, the authors' on theirs."""

    def needs(self, problem: Problem) -> Mapping[str, Any]:
        """The real trainings the method starts from, by name (``train.Training`` values)."""

    def start(self, problem: Problem) -> State:
        """The state before the first step."""

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """The state after step i, and what to show of it."""

    def work(self, problem: Problem) -> float:
        """Forward passes of one image that all steps cost together: what a forecast starts from."""

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The distilled set; the pipeline adds its provenance."""


R_co = TypeVar("R_co", bound=Result, covariant=True)
Sets = Mapping[str, tuple[DistilledDataset, ...]]


class Analysis(Protocol[R_co]):
    """A question about distilled sets: a frozen dataclass whose fields are its settings.

    ``sets`` maps a name to the set's replicates, one distillation key each: n counts those. An analysis
    sees sets, never a method's settings; ``runs`` makes and remembers every training.
    """

    question: ClassVar[str]

    @classmethod
    def defaults(cls, like: Dataset) -> Analysis[R_co]:
        """Settings that fit the data."""

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> Sequence[Any]:
        """Every training that the answer needs (``train.Training`` values).

        Known before any of it runs, so that a study can count them, forecast its time, train them all
        together and none of them twice.
        """

    def __call__(self, sets: Sets, real: Splits, runs: Any, *, key: Key) -> R_co:
        """The answer. It trains nothing but ``trainings``, through ``runs``."""
