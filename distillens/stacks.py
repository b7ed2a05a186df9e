"""Trainings of different data in one stack, each ending in the bits that it ends in alone.

A study trains one small network on every set. Alone, each is too little work for a processor's vectors and too many calls for the
interpreter; side by side they are the population that a training of several models is. Because no bit depends on who stands
beside whom, what is trained together is settled by what is missing and by how many workers there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distillens.core.config import describe
from distillens.core.contracts import Unmoved
from distillens.core.labels import Teacher
from distillens.core.storage import fingerprint
from distillens.engine.plan import Plan
from distillens.train import Population, Training, train_chunk


def together(parts: Sequence[Training], plan: Plan, workers: int = 1) -> list[tuple[int, ...]]:
    """Which chunks (``train.chunks``) train side by side, by their places; the others are alone.

    Alike are those of one network, recipe and number of images. A stack holds no more models than the plan says, and is no
    more than about one worker's share of the work.
    """
    groups: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(_kind(part, plan) or f"alone {i}", []).append(i)
    share = sum(part.image_steps for part in parts) / workers
    stacks: list[tuple[int, ...]] = []
    for places in groups.values():
        first = parts[places[0]]
        work = sum(parts[i].image_steps for i in places)
        left = sum(len(parts[i].keys) for i in places)
        most = plan.models_together(min(first.recipe.batch or first.sizes[0], first.sizes[0]))
        pieces = max(math.ceil(left / most), math.ceil(work / share) if share else 1)
        stack: list[int] = []
        models = 0
        for i in places:
            count = len(parts[i].keys)
            # In about equal stacks: a short last one would leave the other workers waiting for the long ones.
            if stack and models + count > min(most, math.ceil(left / pieces)):
                stacks.append(tuple(stack))
                left, pieces, stack, models = left - models, max(1, pieces - 1), [], 0
            stack.append(i)
            models += count
        stacks.append(tuple(stack))
    return stacks


def train_stack(parts: Sequence[Training], plan: Plan) -> list[Population]:
    """The populations of chunks that train together."""
    if len(parts) == 1:
        return [train_chunk(parts[0], plan)]
    counts = [len(part.keys) for part in parts]
    ends = torch.tensor(counts).cumsum(0).tolist()
    whole = train_chunk(_merged(parts), plan)
    # Copies: a view would be sent, and kept, with all that it is a view of.
    return [whole.taken(torch.arange(end - count, end)) for count, end in zip(counts, ends, strict=True)]


def _kind(part: Training, plan: Plan) -> str | None:
    """A name that trainings share which fit in one stack; None where one keeps its bits only alone.

    Not what is watched, weighted or ordered, nor CutMix, flat minima and views with labels of their own: they are more than a network
    and its batches.
    """
    net, recipe, data = part.net, part.recipe, part.data
    special = part.observe or part.order or recipe.cutmix or recipe.rho or isinstance(data.labels, Teacher)
    if special or part.weights is not None or plan.precision != "float32" or data.device.type != "cpu":
        return None
    if not (isinstance(net, Unmoved) and net.same_in_company(data, plan.kernels)):
        return None
    if len(set(part.sizes)) > 1:  # short batches are filled up to those beside them, and weighed
        return None
    return fingerprint(
        [describe(net), describe(recipe), part.sizes[0], list(part.snapshots)],
        [list(data.classes), data.space.describe(), list(data.shape)],
        [data.labels.kind, data.labels.settings()],
    )


def _merged(parts: Sequence[Training]) -> Training:
    """One training on the data of all, each model on its own part."""
    data = {part.data.fingerprint: part.data for part in parts}
    starts, start = {}, 0
    for name, each in data.items():
        starts[name] = start
        start += len(each)
    first, *others = data.values()
    subsets = [
        own + starts[part.data.fingerprint]
        for part in parts
        for own in part.subsets or [torch.arange(len(part.data))] * len(part.keys)
    ]
    return Training(
        first.joined(*others),
        parts[0].net,
        parts[0].recipe,
        tuple(key for part in parts for key in part.keys),
        subsets=tuple(subsets),
        snapshots=parts[0].snapshots,
    )
