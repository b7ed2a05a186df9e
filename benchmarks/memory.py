"""Memory that a process really takes for an unroll, beside the law that a refusal rests on.

    python -m benchmarks.memory      # writes benchmarks/results/memory.json

ConvNet-D3-W128, 32 px, 20 images a step; the peak of the resident memory of a fresh process, less what it holds before
the unroll. A slope between two lengths leaves fixed costs out. Medians of three processes.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.environment import environment
from distillens import Key
from distillens.core.storage import write_json
from distillens.core.vector import Shapes
from distillens.cost import cost
from distillens.engine.workers import settle_process
from distillens.nets.convnet import ConvNet
from distillens.unroll import Mode, Momentum, unroll

IMAGES = 20
LENGTHS: dict[Mode, tuple[int, int]] = {"graph": (5, 10), "adjoint": (10, 40)}


@dataclass(frozen=True)
class Like:
    shape: tuple[int, int, int] = (3, 32, 32)
    k: int = 10


def grown(mode: Mode, steps: int) -> int:
    """Bytes by which this process grows in one unroll."""
    settle_process()
    torch.set_num_threads(1)
    net = ConvNet()
    params, _ = net.init(Like(), Key(0))
    shapes = Shapes.of(params)
    x, y = Key(1).normal(IMAGES, *Like().shape), torch.arange(IMAGES) % 10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unroll(
        lambda flat, learned, t: F.cross_entropy(net.logits(shapes.unflatten(flat), {}, learned[0])[0], y),
        lambda flat: flat.square().sum(),
        shapes.flatten(params),
        [x],
        torch.full((steps,), 0.01),
        rule=Momentum(0.9),
        mode=mode,
    )
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    law = cost(ConvNet(), Like())
    figures = {}
    for mode, (short, long) in LENGTHS.items():
        sizes = {}
        for steps in (short, long):
            command = [sys.executable, "-m", "benchmarks.memory", mode, str(steps)]
            runs = [
                int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                for _ in range(3)
            ]
            sizes[steps] = statistics.median(runs)
        measured = (sizes[long] - sizes[short]) / (long - short)
        by_law = (law.unrolled(IMAGES, long, mode) - law.unrolled(IMAGES, short, mode)) / (long - short)
        figures[mode] = {
            "steps": [short, long],
            "peak_mb": [round(size / 1e6) for size in sizes.values()],
            "mb_a_step": round(measured / 1e6, 2),
            "law_mb_a_step": round(by_law / 1e6, 2),
            "ratio": round(measured / by_law, 2),
            "n": 3,
        }
        print(mode, json.dumps(figures[mode]), flush=True)
    write_json(
        Path(__file__).parent / "results" / "memory.json",
        {"images": IMAGES, "figures": figures, "environment": environment()},
    )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(grown(sys.argv[1], int(sys.argv[2])))  # type: ignore[arg-type]  # main names the mode
    else:
        main()
