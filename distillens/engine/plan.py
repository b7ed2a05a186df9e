"""The layout of many trainings, decided once and kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from distillens.core.checks import at_least, one_of
from distillens.core.contracts import Like


@dataclass(frozen=True)
class Plan:
    """How models are trained together. The same plan, machine and versions give the same bytes.

    ``stacked`` trains up to ``chunk`` models as one (torch.vmap); ``loop`` one after another. ``threads``
    are those of each worker. Chunks are cut from a request before any work starts, so that neither the
    number of workers nor an interruption changes a single bit.
    """

    layout: Literal["stacked", "loop"] = "stacked"
    chunk: int = 8
    threads: int = 1
    precision: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        one_of("layout", self.layout, ("stacked", "loop"))
        one_of("precision", self.precision, ("float32", "float64"))
        at_least(1, "plan", chunk=self.chunk, threads=self.threads)

    @property
    def dtype(self) -> torch.dtype:
        """The kind of number that training uses."""
        return torch.float32 if self.precision == "float32" else torch.float64

    def models_together(self, batch: int) -> int:
        """How many models share a chunk when each sees ``batch`` images a step.

        Stacking pays where a step is small and fixed costs rule; from about 100 images of 8 x 8 on the arithmetic
        rules, and a stack leaves the caches (``benchmarks/results/layout.json``, one thread).
        """
        if self.layout == "loop":
            return 1
        return max(1, min(self.chunk, 128 // max(batch, 1)))

    @staticmethod
    def resolve(like: Like, jobs: int = 1) -> Plan:
        """The plan for such images and so many jobs at a time.

        Small images are stacked, one thread a worker. Large ones are trained one at a time; the cores are shared
        out among the jobs, for one thread each in many processes beats many threads in one.
        """
        if like.shape[1] * like.shape[2] <= 256:
            return Plan()
        return Plan("loop", 1, max(1, cores() // max(1, jobs)))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
