"""What a network, a method and an analysis must offer. Implementations need not inherit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset, Splits
from distillens.core.result import Result
from distillens.core.rng import Key
from distillens.core.space import Space, same_space
from distillens.core.storage import read_tensors, write_tensors

# Names of what stands beside distilled sets.
RANDOM = "random_subset"
FULL = "full data"

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

    @property
    def mixes_examples(self) -> bool:
        """Whether training mode lets one image change another's output, with these settings."""

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


@runtime_checkable
class Stackable(Protocol):
    """A network that can be many at once, faster than ``torch.vmap`` makes it so."""

    def many(
        self, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
    ) -> tuple[torch.Tensor, Buffers]:
        """Logits [m, n, k] of m networks with parameters [m, ...]: on images [n, c, h, w] that all see, or [m, n, c, h, w]."""


@runtime_checkable
class Unmoved(Stackable, Protocol):
    """A network of which each of many can be trained to the bit as it is alone."""

    def same_in_company(self, like: Like, kernels: str) -> bool:
        """Whether it is so on such images, by these kernels."""


def logits_of_many(
    net: Net, params: Params, buffers: Buffers, x: torch.Tensor, mode: Mode = "evaluate"
) -> tuple[torch.Tensor, Buffers]:
    """Logits [m, n, k] of m networks with parameters [m, ...], in the network's own way or by ``torch.vmap``."""
    if isinstance(net, Stackable):
        return net.many(params, buffers, x, mode)

    def one(p: Params, b: Buffers, own: torch.Tensor) -> tuple[torch.Tensor, Buffers]:
        return net.logits(p, b, own, mode)

    stacked = torch.vmap(one, in_dims=(0, 0, None if x.ndim == 4 else 0), randomness="error")
    found: tuple[torch.Tensor, Buffers] = stacked(params, buffers, x)
    return found


@dataclass(frozen=True, eq=False)
class Problem:
    """What a distiller is asked: which real data, how many images a class, with which randomness.

    ``inputs`` holds what the method declared in ``needs`` (expert trajectories, an embedding). What is trained for
    it draws from ``shared``, which all methods and sizes of a replicate have in common: its experts serve them all.
    """

    real: Dataset
    ipc: int
    key: Key
    inputs: Mapping[str, Any] = field(default_factory=dict)
    shared: Key = Key(0, ("shared",))

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
        write_tensors(path, self.tensors, {"values": json.dumps(self.values)})

    @staticmethod
    def load(path: Path) -> State:
        """The state that ``save`` wrote."""
        tensors, metadata = read_tensors(path)
        return State(tensors, json.loads(metadata["values"]))


class Distiller(Protocol):
    """A distillation method: a frozen dataclass whose fields are settings in the authors' units.

    All three steps are pure: they change neither the problem nor the state they are given, and step i
    draws only from ``problem.key.fold("step", i)``. So a run that is killed after any step and loaded
    again ends in the same bytes (contract test, every method).

    A method whose steps can be shared out among real images has a setting ``donors``, off by default: the set then says which images
    it came from. It changes no image. A method without says why in ``lacks``, a class attribute: names of settings that others
    have, with the reason that a user is told.
    """

    paper: ClassVar[str]  # who published it
    family: ClassVar[str]  # gradient | distribution | trajectory | unrolled | kernel | coreset
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
        """The real trainings the method starts from, by name (``train.Training`` or ``experts.Experts`` values)."""

    def start(self, problem: Problem) -> State:
        """The state before the first step."""

    def step(self, problem: Problem, state: State, i: int) -> tuple[State, Log]:
        """The state after step i, and what to show of it."""

    def work(self, problem: Problem) -> float:
        """Forward passes of one image that all steps cost together: what a forecast starts from."""

    def memory(self, problem: Problem) -> float:
        """Bytes that a step needs at its peak, beside the data: what a refusal starts from."""

    def finish(self, problem: Problem, state: State) -> DistilledDataset:
        """The distilled set; the pipeline adds its provenance."""


@dataclass(frozen=True, eq=False)
class Sets:
    """Distilled sets of one size by name, and what stands beside them. A tuple holds replicates.

    A replicate has its own distillation key. ``distilled["dm"][r]``, ``baselines["random_subset"][r]`` and
    ``initial["dm"][r]`` (what the method started from) share replicate r's network keys, so they are pairs.
    """

    distilled: Mapping[str, tuple[DistilledDataset, ...]]
    baselines: Mapping[str, tuple[DistilledDataset, ...]] = field(default_factory=dict)
    initial: Mapping[str, tuple[DistilledDataset, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = [*self.distilled.items(), *self.baselines.items(), *self.initial.items()]
        if not groups or not all(replicates for _, replicates in groups):
            raise UserError("an analysis needs at least one distilled set")
        first = groups[0][1][0].dataset()
        for name, replicates in groups:
            for one in replicates:
                data = one.dataset()
                if data.shape != first.shape or data.classes != first.classes:
                    raise UserError(
                        f"the set {name!r} does not fit the others",
                        got=f"images {data.shape}, {data.k} classes",
                        expected=f"images {first.shape}, {first.k} classes",
                    )
                if not same_space(data.space, first.space):
                    kinds = first.space.name, data.space.name
                    raise UserError(
                        f"the set {name!r} is in another space than the others",
                        got=f"{kinds[0]} and {kinds[1]}"
                        if kinds[0] != kinds[1]
                        else f"two fits of {kinds[0]}",
                        fix="ask about it on its own",
                    )

    @property
    def random(self) -> tuple[DistilledDataset, ...]:
        """The random real subsets; empty where there are none."""
        return self.baselines.get(RANDOM, ())

    def everything(self) -> dict[str, tuple[DistilledDataset, ...]]:
        """Distilled sets, then baselines, by name."""
        return {**self.distilled, **self.baselines}

    @property
    def space(self) -> Space:
        """The units of all of them."""
        return next(iter(self.everything().values()))[0].space

    def check_fits(self, real: Splits) -> None:
        """Refuse real data of other classes or shape than the sets."""
        data = next(iter(self.everything().values()))[0].dataset()
        if data.shape != real.train.shape or data.classes != real.train.classes:
            raise UserError(
                "the distilled sets do not belong to this data",
                got=f"images {data.shape}, {data.k} classes",
                expected=f"images {real.train.shape}, {real.train.k} classes",
                fix="name the data they were made from with --data",
            )

    def check_against(self, real: Splits) -> None:
        """Refuse real data of other classes, shape or space than the sets."""
        self.check_fits(real)
        if not same_space(self.space, real.space):
            raise UserError(
                "the distilled sets are in another space than this data",
                got=f"sets in {self.space.name}, data in {real.space.name}",
                fix="bring the real data into theirs: real.to_space(sets.space)",
            )


R_co = TypeVar("R_co", bound=Result, covariant=True)


class Analysis(Protocol[R_co]):
    """A question about distilled sets: a frozen dataclass whose fields are its settings.

    An analysis sees sets, never a method's settings; ``runs`` makes and remembers every training. One that the paper
    has too offers ``as_published(like)`` beside ``defaults``: the paper's protocol to the letter.

    One that decides on the way what to train next (it stops when an error is small enough, or looks at the points that
    proved weak) sets ``adaptive = True`` as a class attribute. What it announces is then the most that it costs: it
    trains no more models than these and sees no more images. It asks ``runs`` for them itself, a round at a time.
    """

    question: ClassVar[str]
    scales: ClassVar[tuple[str, ...]]  # settings that count steps or models: what a study's scale shrinks

    @classmethod
    def defaults(cls, like: Dataset) -> Analysis[R_co]:
        """Settings that fit the data."""

    def trainings(self, sets: Sets, real: Splits, *, key: Key) -> Sequence[Any]:
        """Every training that the answer needs (``train.Training`` values).

        Known before any of it runs, so that a study can count them, forecast its time, train them all
        together and none of them twice. Of an adaptive analysis: as many models of the same sizes.
        """

    def __call__(self, sets: Sets, real: Splits, runs: Any, *, key: Key) -> R_co:
        """The answer. It trains nothing but ``trainings``, through ``runs``."""


def is_adaptive(analysis: Analysis[Any]) -> bool:
    """Whether an analysis decides on the way what to train, so that nothing can be trained for it beforehand."""
    return bool(getattr(analysis, "adaptive", False))
