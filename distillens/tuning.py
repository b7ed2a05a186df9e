"""The plan of this machine for this work, by measurement: made once, kept, and taken again.

Times are noisy, bytes must not be: what was measured is kept in the user's cache folder under a name made from the
processor, the versions, the images and the network, so that the same command takes the same plan on the same machine.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from distillens import kernels
from distillens.core.checks import UserError
from distillens.core.config import describe, restore
from distillens.core.contracts import Net
from distillens.core.dataset import Dataset
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.core.storage import fingerprint, read_json, write_json
from distillens.engine.plan import Plan, Precision, cores, wait_for
from distillens.kernels import compiled
from distillens.train import Training, train_chunk

BATCHES = (10, 100)  # images a step that the field's small sets come in: 1 and 10 a class
STACKS = (1, 2, 4, 8, 16, 32)
STACK_PIXELS = 1 << 16  # of a model's step: more fill the caches alone, and a stack of them only takes memory
FEW = 4  # models in a stack by which kernels are compared
ENOUGH = 1.02  # a smaller stack is taken unless a larger is faster by more
TOO_SLOW = 1.3  # times as slow as the fastest, and a stack has left the caches: larger ones are not tried
ROUNDS = 9  # in which candidates are timed in turn, so that what else the machine does strikes all alike
BUDGET = 1.5  # seconds after which there is no further round
GAIN = 1.2  # times as fast as float32, or bfloat16 is not taken unasked
SHOWN = 32  # the longest side of images on which bfloat16 is shown to train as well (docs/engine.md)


def plan_for(
    like: Dataset,
    net: Net,
    *,
    jobs: int = 1,
    precision: Precision | None = None,
    threads: int | None = None,
) -> Plan:
    """The fastest plan for training such networks on such images, ``jobs`` at a time, or with so many ``threads`` each.

    Measured for a number of threads: kernels, and models in a stack at 10 and at 100 images a step; then the threads of
    one job alone. Where no precision is asked for it is float32, or bfloat16 if ``may_round`` says so and it is
    clearly faster here.
    """
    if precision is None and may_round(like):
        exact, rounded = (_fastest(like, net, jobs, each, threads) for each in ("float32", "bfloat16"))
        return rounded[0] if GAIN * rounded[1] < exact[1] else exact[0]
    return _fastest(like, net, jobs, precision or "float32", threads)[0]


def may_round(like: Dataset) -> bool:
    """Whether training on such images may be in bfloat16 unasked: on a CPU, where it is shown to train as well.

    Not on the smallest, where convolutions are too little of the work for it to gain.
    """
    h, w = like.shape[1:]
    return like.device.type == "cpu" and max(h, w) <= SHOWN and h * w > 256


def wish(plan: Plan, like: Dataset) -> list[str]:
    """The option of a command on such images that asks for this plan's precision; none where it is taken unasked."""
    return [] if plan.precision == "float32" and not may_round(like) else [f"--precision {plan.precision}"]


def _fastest(
    like: Dataset, net: Net, jobs: int, precision: Precision, threads: int | None
) -> tuple[Plan, float]:
    most = threads or Plan.resolve(like, jobs).threads
    measured = [_measured(_Asked(like, net, n, precision)) for n in sorted({threads or 1, most})]
    return min(measured, key=lambda one: one[1])


class _Asked:
    """What is measured for, known by what it depends on."""

    def __init__(self, like: Dataset, net: Net, threads: int, precision: Precision) -> None:
        self.like, self.net, self.threads, self.precision = like, net, threads, precision
        self.name = fingerprint(
            [
                version("distillens"),
                str(torch.__version__),
                compiled.processor(),
                cores(),
                _name(like.device),
            ],
            [kernels.available(), list(like.shape), like.k, describe(net), threads, precision],
            compiled.sources(),
            Path(__file__).read_bytes(),
        )

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self.name == other.name


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _measured(asked: _Asked) -> tuple[Plan, float]:
    """The best plan with so many threads, and its seconds for a step of one model at the larger batch."""
    path = compiled.folder() / f"plan-{asked.name[:32]}.json"
    if (known := _kept(path)) is not None:
        return known
    plan, seconds = _measure(asked)
    if (known := _kept(path)) is not None:
        return known  # another process has measured meanwhile: the first one's word holds for all
    with suppress(UserError):  # a full disk does not keep a plan from being used
        write_json(path, {"plan": describe(plan), "seconds": seconds})
    return plan, seconds


def _kept(path: Path) -> tuple[Plan, float] | None:
    if not path.is_file():
        return None
    try:
        known = read_json(path)
        return restore(known["plan"]), float(known["seconds"])
    except (UserError, LookupError, TypeError, ValueError):
        path.unlink(missing_ok=True)  # a damaged measurement is worth no more than none
        return None


def _measure(asked: _Asked) -> tuple[Plan, float]:
    plan = Plan("loop", 1, 1, asked.threads, asked.precision)
    if asked.like.device.type == "cpu":
        candidates = [replace(plan, kernels=each) for each in kernels.available()]
    else:  # the kernels are a CPU's; what an accelerator waits for is to be told each operation
        candidates = [plan, *([replace(plan, traced=True)] if _can_be_traced(asked, plan) else [])]
    totals = dict.fromkeys(candidates, 1.0)
    for batch in BATCHES:  # which count alike: times are multiplied
        found = _in_turn(asked, [(one, batch, min(FEW, _stacks(asked, batch)[-1])) for one in candidates])
        totals = {one: total * each for (one, total), each in zip(totals.items(), found, strict=True)}
    best = min(candidates, key=totals.__getitem__)
    stacks = {batch: _stack(asked, best, batch) for batch in BATCHES}
    seconds = stacks[max(BATCHES)][1]
    models = {batch: count for batch, (count, _) in stacks.items()}
    if max(models.values()) == 1:
        return best, seconds
    images = max(batch * count for batch, count in models.items() if count > 1)
    return replace(best, layout="stacked", chunk=max(models.values()), images=images), seconds


def _can_be_traced(asked: _Asked, plan: Plan) -> bool:
    """Whether there is all that it takes to compile graphs for this device: a compiler, say."""
    try:
        _seconds(asked, replace(plan, traced=True), min(BATCHES), 1)
    except (RuntimeError, ImportError, OSError):  # what tracing, compiling, and the want of a compiler raise
        return False
    return True


def _stacks(asked: _Asked, batch: int) -> list[int]:
    """The stacks that are tried with so many images a step."""
    fills = batch * asked.like.shape[1] * asked.like.shape[2] > STACK_PIXELS
    return [1] if fills else list(STACKS)


def _stack(asked: _Asked, plan: Plan, batch: int) -> tuple[int, float]:
    """The smallest stack that is fast enough, and its seconds a model."""
    sizes = _stacks(asked, batch)
    times = dict(zip(sizes, _in_turn(asked, [(plan, batch, models) for models in sizes]), strict=False))
    return next((n, each) for n, each in times.items() if each <= ENOUGH * min(times.values()))


def _in_turn(asked: _Asked, candidates: list[tuple[Plan, int, int]]) -> list[float]:
    """Seconds a model of plans with so many images and models, the least disturbed of several rounds.

    Of stacks that grow, those are left out that come after one which is too slow.
    """
    best: list[float] = []
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for place, (plan, batch, models) in enumerate(candidates):
            stacked = replace(plan, layout="stacked", chunk=models, images=models * batch)
            each = _seconds(asked, stacked, batch, models) / models
            if place == len(best):
                # The first time warms up: what it says alone is not what a stack is left out by.
                each = min(each, _seconds(asked, stacked, batch, models) / models)
                best.append(each)
                larger = models > candidates[0][2]
                if larger and each > TOO_SLOW * min(best):
                    candidates = candidates[: place + 1]
                    break
            best[place] = min(best[place], each)
        if time.perf_counter() - begun > BUDGET:
            break
    return best


def _seconds(asked: _Asked, plan: Plan, batch: int, models: int) -> float:
    """Seconds of a training step of so many models."""
    data = asked.like.take(torch.arange(batch) % len(asked.like))
    training = Training(data, asked.net, Recipe(steps=3), Key(1).split(models))
    begun = time.perf_counter()
    train_chunk(training, plan)
    wait_for(data.device)
    return (time.perf_counter() - begun) / training.recipe.steps
