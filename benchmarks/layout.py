"""The measurements that the engine's defaults rest on, as ratios within one run.

    python benchmarks/layout.py      # writes benchmarks/results/layout.json

Pooling 8 x 8 images by a product against ``avg_pool2d``, forward and backward; training steps of models
stacked eight at a time against one by one, and networks on 25 sets of their own in stacks against each alone, at 10 and
at 100 images a step. One thread, medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.environment import environment
from distillens import Key, Recipe, load
from distillens.core.storage import write_json
from distillens.engine.plan import Plan
from distillens.engine.workers import pinned_threads, settle_process
from distillens.kernels.conv_block import average_pool
from distillens.nets.convnet import ConvNet
from distillens.stacks import together, train_stack
from distillens.train import Training, train_chunk
from distillens.tuning import plan_for

REPEATS = 15


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratio(plain: Callable[[], object], ours: Callable[[], object]) -> dict[str, float]:
    """How many times faster ours is: the two alternate, so that noise falls on both."""
    plain(), ours()
    pairs = [(seconds(plain), seconds(ours)) for _ in range(REPEATS)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[REPEATS // 4], 3),
        "high": round(ratios[-1 - REPEATS // 4], 3),
        "plain_ms": round(1e3 * statistics.median(a for a, _ in pairs), 3),
        "ours_ms": round(1e3 * statistics.median(b for _, b in pairs), 3),
        "n": REPEATS,
    }


def pooling() -> dict[str, float]:
    x = Key(0).normal(100, 32, 8, 8).requires_grad_()
    g = Key(1).normal(100, 32, 4, 4)
    return ratio(
        lambda: torch.autograd.grad(F.avg_pool2d(x, 2), x, g),
        lambda: torch.autograd.grad(average_pool(x), x, g),
    )


def stacking(images: int) -> dict[str, float]:
    data = load("digits").train.take(torch.arange(images))
    training = Training(data, ConvNet.defaults(data), Recipe(steps=5), Key(2).split(8))
    plan = Plan()

    def one_by_one() -> None:
        for j in range(8):
            train_chunk(training.models(j, j + 1), plan)

    return ratio(one_by_one, lambda: train_chunk(training, plan))


def sets(images: int) -> dict[str, float]:
    real = load("digits")
    net = ConvNet.defaults(real.train)
    plan = plan_for(real.train, net, threads=1)
    parts = [
        Training(real.train.take(key.permutation(len(real.train))[:images]), net, Recipe(steps=5), (key,))
        for key in Key(3).split(25)
    ]
    stacks = [[parts[i] for i in stack] for stack in together(parts, plan)]

    def alone() -> None:
        for part in parts:
            train_chunk(part, plan)

    def beside() -> None:
        for stack in stacks:
            train_stack(stack, plan)

    return ratio(alone, beside)


def main() -> None:
    settle_process()
    with pinned_threads(1):
        figures = {
            "pooling 8 x 8 by a product, over avg_pool2d": pooling(),
            "eight models stacked, over one by one, 10 images a step": stacking(10),
            "eight models stacked, over one by one, 100 images a step": stacking(100),
            "25 sets in stacks, over each alone, 10 images a step": sets(10),
            "25 sets in stacks, over each alone, 100 images a step": sets(100),
        }
    path = Path(__file__).parent / "results" / "layout.json"
    write_json(path, {"figures": figures, "environment": environment()})
    for name, figure in figures.items():
        print(f"{name}: {figure['ratio']} times [{figure['low']}, {figure['high']}]")


if __name__ == "__main__":
    main()
