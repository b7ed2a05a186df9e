"""Make the bank of training ages that the null rates of the clock are resampled from.

    python tests/bank/make_clock.py

Pairs of disjoint sets of real images, of some that no trajectory was trained on and of training images, each with models of its
own, along ten trajectories: no distilled set, so there is nothing to find.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.analyses.representativeness.clock import Clock
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.sessions import session

TRAJECTORIES, PAIRS, PER_CLASS = 10, 2, 10


def pair(data: Dataset, key: Key) -> list[DistilledDataset]:
    """Two disjoint random sets."""
    orders = [members[key.fold(c).permutation(len(members))] for c, members in enumerate(data.by_class)]
    found = []
    for i in range(2):
        part = data.take(torch.cat([order[i * PER_CLASS : (i + 1) * PER_CLASS] for order in orders]))
        found.append(DistilledDataset({"images": part.images}, part.labels, part.classes, part.space))
    return found


def main() -> None:
    real = load("digits")
    key = Key(2025, ("bank", "clock"))
    kinds = {"unseen": (real.val, key.fold("pair")), "seen": (real.train, key.fold("seen pair"))}
    pairs = {
        f"{kind}{p}": [pair(data, place.fold(p, r)) for r in range(TRAJECTORIES)]
        for kind, (data, place) in kinds.items()
        for p in range(PAIRS)
    }
    sets = Sets({f"{p}{'ab'[i]}": tuple(two[i] for two in many) for p, many in pairs.items() for i in (0, 1)})
    like = Clock.defaults(real.train)
    analysis = Clock(like.net, like.recipe, trajectories=TRAJECTORIES)
    with session(real) as runs:
        result = analysis(sets, real, runs, key=key)
    points = torch.stack([one[0] for one in result.point_ages["unseen0a"]])
    tensors = {
        f"ages.{kind}": torch.stack(  # [trajectories, pairs, 2, instruments]
            [torch.stack([result.ages[f"{kind}{p}{i}"][:, 0] for i in "ab"], 1) for p in range(PAIRS)],
            1,
        ).float()
        for kind in kinds
    } | {
        "points": points.half(),  # [trajectories, instruments, images]
        "moments": torch.tensor(result.moments),
    }
    write_tensors(Path(__file__).with_name("clock.safetensors"), tensors)


if __name__ == "__main__":
    main()
