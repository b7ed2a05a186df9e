"""What differentiating through a network costs in memory, known before it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from distillens import kernels
from distillens.core.contracts import Like, Net
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.unroll import Mode, States

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Cost:
    """Bytes that autograd keeps for one network and image shape, in float32.

    ``first`` an image where a loss is differentiated once; ``second`` an image and ``fixed`` a step where the
    gradient itself is to be differentiated; ``parameters`` numbers.
    """

    first: float
    second: float
    fixed: float
    parameters: int

    def step(self, images: float) -> float:
        """Bytes of one inner step's graph over so many images."""
        return images * self.second + self.fixed

    def unrolled(
        self, images: float, steps: int, mode: Mode, *, vectors: int = 2, states: States = "stored"
    ) -> float:
        """Bytes of an unroll over so many steps: linear in them with the graph, else one step's graph.

        The adjoint adds a vector of parameters a step, or about the square root of that many.
        """
        vector = FLOAT * self.parameters
        if mode == "graph":
            return steps * self.step(images)
        if mode == "tesla":
            return self.step(images) + 4 * vector
        stride = max(1, math.isqrt(max(steps, 1)))
        whole_states = vectors * (math.ceil(steps / stride) + stride)
        gradients = steps if states == "stored" else stride
        return self.step(images) + (whole_states + gradients) * vector


@dataclass(frozen=True)
class _Images:
    shape: tuple[int, int, int]
    k: int


def cost(net: Net, like: Like) -> Cost:
    """The cost of a network on such images, by the kernels in use: counted, by what autograd saves for one and three."""
    known: Any = net  # a frozen dataclass: it can be looked up
    return _cost(known, _Images(like.shape, like.k), kernels.current())


@lru_cache(maxsize=64)
def _cost(net: Any, like: _Images, setting: kernels.Setting) -> Cost:
    params, buffers = net.init(like, Key(0))
    shapes = Shapes.of(params)
    flat = shapes.flatten(params).requires_grad_()

    def run(images: int, twice: bool) -> float:
        x = Key(1).normal(images, *like.shape).requires_grad_()

        def work() -> object:
            logits, _ = net.logits(shapes.unflatten(flat), buffers, x, "train")
            loss = logits.log_softmax(1).mean()
            return torch.autograd.grad(loss, flat, create_graph=True) if twice else loss

        return saved_bytes(work)

    one, three = run(1, True), run(3, True)
    second = (three - one) / 2
    # Each step of an unroll also leaves the parameters that it moved to.
    fixed = max(0.0, one - second) + FLOAT * shapes.size
    return Cost((run(3, False) - run(1, False)) / 2, second, fixed, shapes.size)


def saved_bytes(work: Callable[[], object]) -> float:
    """Bytes of the distinct memory that autograd keeps while ``work``'s result is alive."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    total = float(sum(storage.nbytes() for storage in kept.values()))
    del result
    return total


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a device, within the limits of this process's control group; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = math.inf
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = float((group / "memory.max").read_text())  # "max" is no number: no limit
        free = min(free, limit - float((group / "memory.current").read_text()))
    return free


def size_in_words(count: float) -> str:
    """Bytes for a reader: 0.4 GB, 12 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{max(1.0, count / 1e6):.0f} MB"
