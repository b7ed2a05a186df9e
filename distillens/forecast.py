"""What a distillation will cost, before it runs: memory by law, time from a few timed steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from distillens.core.checks import DivergedError, UserError
from distillens.core.config import override, settings_of
from distillens.core.contracts import Distiller, Problem
from distillens.core.rng import Key
from distillens.core.vector import Shapes
from distillens.cost import free_bytes, size_in_words
from distillens.engine.plan import Plan, wait_for
from distillens.experts import Experts, Trajectories
from distillens.train import Training, train

SLACK = 1.25  # allocators and workspaces add to what autograd keeps: 1.22 in benchmarks/results/memory.json
STEPS = 3  # steps that are timed, the first of which warms up
BUDGET = 5.0  # seconds after which no further one is

# What a method that does not fit might do otherwise, the least harm first.
SMALLER = (("mode=adjoint",), ("mode=adjoint", "states=recomputed"))
# The gradient's own accuracy is untouched by the above; these change the method.
KNOBS = ("batch_syn", "batch_real", "syn_steps", "inner_steps", "window", "net.width")


@dataclass(frozen=True)
class Outlook:
    """What one distillation will cost: models to train first, steps, seconds of either, bytes at its peak."""

    models: int
    steps: int
    seconds_before: float
    seconds: float
    memory: float
    free: float

    def text(self) -> str:
        """One line."""
        before = f"{self.models} models to train first, about {duration(self.seconds_before)}; "
        size = f"memory about {size_in_words(self.memory)}"
        if math.isfinite(self.free):
            size += f" of {size_in_words(self.free)} free"
        return f"{before if self.models else ''}{self.steps:,} steps, about {duration(self.seconds)}; {size}"


def duration(seconds: float) -> str:
    """Seconds for a reader: 3 s, 12 min, 5 h, 58 days."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "1 s"


def check_fits(name: str, distiller: Distiller, problem: Problem, *, at_once: int = 1) -> float:
    """Bytes that ``at_once`` distillations need at their peak.

    Raises:
        UserError: they do not fit into the free memory; the message names a setting that would, where there is one.
    """
    need = at_once * SLACK * distiller.memory(problem)
    device = problem.real.device
    free = free_bytes(device)
    if need <= free:
        return need
    raise UserError(
        f"{name} does not fit into memory",
        got=f"about {size_in_words(need)} needed"
        + (f" by {at_once} at once" if at_once > 1 else "")
        + f", {size_in_words(free)} free on {device.type}",
        fix=_advice(distiller, problem, free, at_once),
    )


def _advice(distiller: Distiller, problem: Problem, free: float, at_once: int) -> str:
    known = settings_of(distiller)
    for changes in SMALLER:
        if not all(change.partition("=")[0] in known for change in changes):
            continue
        other = override(distiller, changes)
        need = at_once * SLACK * other.memory(problem)
        if need <= free and other != distiller:
            settings = " ".join(f"--set {change}" for change in changes)
            return f"use {settings}: the same gradient in about {size_in_words(need)}"
    knobs = [
        knob for knob in KNOBS if known.get(knob) is not None or (knob in ("batch_syn",) and knob in known)
    ]
    fewer = " or fewer --workers" if at_once > 1 else ""
    return f"use a smaller --set {', '.join(knobs)}{fewer}, or a machine with more memory"


def outlook(name: str, distiller: Distiller, problem: Problem, plan: Plan, workers: int = 1) -> Outlook:
    """What a distillation will cost here.

    Raises:
        UserError: it does not fit into the free memory.
    """
    memory = check_fits(name, distiller, problem)
    needs = distiller.needs(problem)
    trainings = trainings_of(need for name, need in needs.items() if name not in problem.inputs)
    pass_seconds = max((seconds_a_pass(training, plan) for training in trainings), default=0.0)
    passes = sum(2.93 * training.image_steps for training in trainings)
    with plan.pinned():
        each = seconds_a_step(distiller, problem) or pass_seconds * distiller.work(problem) / max(
            distiller.steps, 1
        )
    return Outlook(
        sum(len(training.keys) for training in trainings),
        distiller.steps,
        passes * pass_seconds / workers,
        distiller.steps * each,
        memory,
        free_bytes(problem.real.device),
    )


def trainings_of(needs: Iterable[Any]) -> list[Training]:
    """The trainings behind what methods need."""
    return [need.training if isinstance(need, Experts) else need for need in needs]


def seconds_a_step(distiller: Distiller, problem: Problem) -> float | None:
    """Seconds of one step, from the first few with random experts; None where there are no steps to time."""
    asked = standing_in(distiller, problem)
    if not distiller.steps or asked is None:
        return None
    times: list[float] = []
    try:
        state = distiller.start(asked)
        for i in range(min(STEPS, distiller.steps)):
            begun = time.perf_counter()
            state, _ = distiller.step(asked, state, i)
            wait_for(problem.real.device)
            times.append(time.perf_counter() - begun)
            if sum(times) > BUDGET:
                break
    except DivergedError:  # random experts lead nowhere: what was timed until then counts
        pass
    return min(times) if times else None


def standing_in(distiller: Distiller, problem: Problem) -> Problem | None:
    """The problem with stand-ins for experts that are not there yet; None where a method needs something else."""
    needs = {name: need for name, need in distiller.needs(problem).items() if name not in problem.inputs}
    if not all(isinstance(need, Experts) for need in needs.values()):
        return None
    return replace(problem, inputs={**_stand_ins(problem, needs), **problem.inputs})


def _stand_ins(problem: Problem, needs: Mapping[str, Experts]) -> dict[str, Trajectories]:
    """Experts that walk straight ahead: a step past them takes as long as past real ones."""
    found = {}
    for name, need in needs.items():
        params, _ = need.net.init(problem.real, Key(0, ("stand-in",)))
        shapes = Shapes.of(params)
        start, away = shapes.flatten(params), Key(0, ("stand-in", "away")).normal(shapes.size)
        way = torch.stack([start + 0.01 * t * away for t in range(need.passes + 1)])
        found[name] = Trajectories(need.net, shapes, need.passes, (way[None],), (1,))
    return found


def seconds_a_pass(training: Training, plan: Plan) -> float:
    """Seconds of one forward pass of one image, from a few training steps of one model on a hundred images."""
    data = training.data.take(torch.arange(min(100, len(training.data)), device=training.data.device))
    recipe = training.recipe.but(steps=4, batch=None, schedule="constant", rho=0.0, gsam_alpha=0.0)
    short = Training(data, training.net, recipe, training.keys[:1])
    times: list[float] = []
    with plan.pinned():
        while len(times) < 4 and sum(times) < BUDGET:  # the fastest is the least disturbed
            begun = time.perf_counter()
            train(short, plan)
            wait_for(data.device)
            times.append(time.perf_counter() - begun)
    return min(times) / (2.93 * short.image_steps)
