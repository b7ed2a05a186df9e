"""The layout of many trainings, decided once and kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from distillens import kernels
from distillens.core.checks import UserError, at_least, one_of
from distillens.core.contracts import Like
from distillens.engine.workers import pinned_threads

Precision = Literal["float32", "float64", "bfloat16"]
PRECISIONS = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """How models are trained together. The same plan, machine and versions give the same bytes.

    ``stacked`` trains up to ``chunk`` models as one, as long as they see no more than ``images`` images a step
    together; ``loop`` one after another. ``threads`` are those of each worker. Chunks are cut from a request before any
    work starts, so that neither the number of workers nor an interruption changes a single bit.

    ``precision`` is that of training. In bfloat16 the products of convolutions are rounded to it; parameters, sums,
    norms and optimisers stay in float32, and so does all that distils or predicts. ``targets`` is the precision of what real data is only looked at for (the
    features that DM matches, the gradients that DC matches). ``kernels`` are compiled ones (winograd, fused) or
    PyTorch's (plain). ``traced`` says whether the loss of a training step and its gradient are one graph of
    ``torch.compile`` each, which a GPU replays without being told every operation (CUDA graphs).
    """

    layout: Literal["stacked", "loop"] = "stacked"
    chunk: int = 8
    images: int = 128
    threads: int = 1
    precision: Precision = "float32"
    targets: Literal["float32", "bfloat16"] = "float32"
    kernels: kernels.Kernels = "plain"
    traced: bool = False

    def __post_init__(self) -> None:
        one_of("layout", self.layout, ("stacked", "loop"))
        one_of("precision", self.precision, PRECISIONS)
        one_of("targets", self.targets, ("float32", "bfloat16"))
        one_of("kernels", self.kernels, ("winograd", "fused", "plain"))
        at_least(1, "plan", chunk=self.chunk, images=self.images, threads=self.threads)

    @property
    def dtype(self) -> torch.dtype:
        """The kind of number that parameters are."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def models_together(self, batch: int) -> int:
        """How many models share a chunk when each sees ``batch`` images a step."""
        if self.layout == "loop":
            return 1
        return max(1, min(self.chunk, self.images // max(batch, 1)))

    @contextmanager
    def training(self) -> Iterator[None]:
        """As ``pinned``, with products rounded as far as ``precision`` says: while networks are trained."""
        products = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        with self.pinned(), kernels.using(replace(kernels.current(), products=products)):
            yield

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Threads, kernels and the precision of targets in this process as the plan says, for a while.

        Raises:
            UserError: the plan is another machine's: its kernels cannot be had here.
        """
        if self.kernels not in kernels.available():
            raise UserError(
                "this work was planned with compiled kernels",
                got="no C++ compiler that makes them here",
                fix="install one (g++ or clang), or start the work again in another folder",
            )
        targets = torch.bfloat16 if self.targets == "bfloat16" else torch.float32
        with pinned_threads(self.threads), kernels.using(kernels.Setting(self.kernels, targets=targets)):
            yield

    @staticmethod
    def resolve(like: Like, jobs: int = 1) -> Plan:
        """The plan for such images and so many jobs at a time, where nothing was measured (``tuning`` does).

        Small images are stacked, one thread a worker. Large ones are trained one at a time; the cores are shared
        out among the jobs, for one thread each in many processes beats many threads in one.
        """
        compiled: kernels.Kernels = "fused" if "fused" in kernels.available() else "plain"
        if like.shape[1] * like.shape[2] <= 256:
            return Plan(kernels=compiled)
        return Plan("loop", 1, threads=max(1, cores() // max(1, jobs)), kernels=compiled)


def wait_for(device: torch.device) -> None:
    """Return when a device has done what it was told: until then a clock shows nothing but the telling."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
