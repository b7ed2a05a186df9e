"""Make the bank that the null rates of ``behaviour/ranking`` and ``behaviour/cross_net`` are resampled from.

    python tests/bank/make_ranking.py

Random subsets of real digits alone: every entry is what a claim sees when there is nothing to find.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from distillens import pipeline
from distillens.analyses.behaviour.cross_net import CrossNet
from distillens.analyses.behaviour.ranking import Ranking
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Net, Problem
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.evaluation.protocol import Protocol
from distillens.evaluation.trials import choose, of_sets
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.sessions import session

SUBSETS = 40
SIZES = (1, 10)
KEY = Key(2025, ("bank of ranking",))


def subset(real: Splits, ipc: int, r: int) -> DistilledDataset:
    problem = Problem(real.train, ipc, KEY.fold("subset", ipc, r))
    method = pipeline.distillers.room.find("random_subset").defaults(real.train, ipc)
    return method.finish(problem, method.start(problem))


def accuracies(
    grid: Protocol, net: Net, subsets: tuple[DistilledDataset, ...], real: Splits, runs: Runs
) -> torch.Tensor:
    """Test accuracies [subsets] at the rates that are best on validation."""
    asked = of_sets(grid, net, {"null": subsets}, KEY)["null"]
    runs.make(t for each in asked for t in each)
    return torch.cat([choose(grid, runs.get(*each), real).accuracy(real.test) for each in asked]).float()


def main() -> None:
    real = load("digits")
    # Fewer candidates than the defaults have, so that it is made in minutes: still chosen on validation.
    ranking = replace(Ranking.defaults(real.train), net=ConvNet(2, 16), rates=(0.01, 0.05))
    cross = replace(CrossNet.defaults(real.train), rates=(0.01,))
    tensors = {}
    with session(real) as runs:
        for ipc in SIZES:
            subsets = tuple(subset(real, ipc, r) for r in range(SUBSETS))
            plain, augmented = ranking._grid(), ranking._grid(augment=ranking.augment)
            tensors[f"own.{ipc}"] = accuracies(plain, ranking.net, subsets, real, runs)
            tensors[f"augmented.{ipc}"] = accuracies(augmented, ranking.net, subsets, real, runs)
            columns = [accuracies(cross._grid(), net, subsets, real, runs) for net in cross.nets]
            tensors[f"cross.{ipc}"] = torch.stack(columns, 1)
    write_tensors(Path(__file__).with_name("ranking.safetensors"), tensors)


if __name__ == "__main__":
    main()
