"""Make the bank of distances that the null rates of coverage are resampled from.

    python tests/bank/make_coverage.py

Real images that no network was trained on, no distilled set: distances within each class between test images, between
these and validation images, and between validation images, as five real-trained networks see them.
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
    test, val = networks.features(real.test), networks.features(real.val)
    tensors = {}
    for c, (theirs, own) in enumerate(zip(real.test.by_class, real.val.by_class, strict=True)):
        first, second = test[:, theirs], val[:, own]
        tensors[f"among.{c}"] = upper(_distances(first, first)).half()
        tensors[f"across.{c}"] = _distances(first, second).half()
        tensors[f"within.{c}"] = upper(_distances(second, second)).half()
        tensors[f"scores.{c}"] = scores[theirs].float()
    write_tensors(Path(__file__).with_name("coverage.safetensors"), tensors)


if __name__ == "__main__":
    main()
