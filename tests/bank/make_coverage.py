"""Make the bank of distances that the null rates of coverage are resampled from.

    python tests/bank/make_coverage.py

Real images, no distilled set: distances within each class between some test images, between these and some validation
("val") or training ("train") images, and between those of one split, as five real-trained networks see them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from distillens.analyses.representativeness.coverage import Coverage, _distances, _el2n
from distillens.core.contracts import Problem, Sets
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.distillers.random_subset import RandomSubset
from distillens.sessions import session

NETWORKS = 5
TEST, OWN = 28, 24  # images of a class: enough for two sets of ten of either split


def upper(square: torch.Tensor) -> torch.Tensor:
    """What is above the diagonal of symmetric [m, n, n]."""
    rows, columns = torch.triu_indices(*square.shape[1:], offset=1)
    return square[:, rows, columns]


def main() -> None:
    real = load("digits")
    key = Key(2026, ("bank", "coverage"))
    problem, method = Problem(real.train, 1, key), RandomSubset()
    sets = Sets({"null": (method.finish(problem, method.start(problem)),)})
    analysis = replace(Coverage.defaults(real.train), trajectories=NETWORKS)
    with session(real) as runs:
        (networks,) = runs.get(*analysis.trainings(sets, real, key=key))
    early = min(networks.moments, key=lambda t: abs(t - analysis.early * analysis.recipe.steps))
    scores = _el2n(networks, networks.at(early), real.test)
    tensors = {}
    test = networks.features(real.test)
    for c, members in enumerate(real.test.by_class):
        theirs = members[key.fold("test", c).permutation(len(members))[:TEST]]
        tensors[f"among.{c}"] = upper(_distances(test[:, theirs], test[:, theirs])).half()
        tensors[f"scores.{c}"] = scores[theirs].float()
        for name, split in {"val": real.val, "train": real.train}.items():
            of_class = split.by_class[c]
            place = key.fold(name, c)
            own = networks.features(split.take(of_class[place.permutation(len(of_class))[:OWN]]))
            tensors[f"across.{name}.{c}"] = _distances(test[:, theirs], own).half()
            tensors[f"within.{name}.{c}"] = upper(_distances(own, own)).half()
    write_tensors(Path(__file__).with_name("coverage.safetensors"), tensors)


if __name__ == "__main__":
    main()
