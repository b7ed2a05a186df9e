"""Make the bank of barriers and leanings that the null rates of the landscape are resampled from.

    python tests/bank/make_landscape.py

Models of random real subsets beside the real trajectory from their own initialisation, and beside one from another.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.analyses.representativeness._trajectory import along, by_replicate
from distillens.analyses.representativeness.landscape import (
    Landscape,
    along_the_way,
    barrier,
    beside,
    profile,
)
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Problem, Sets
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.distillers.random_subset import RandomSubset
from distillens.sessions import session
from distillens.train import networks, on

TRAJECTORIES, SUBSETS = 10, 8  # subsets of ten images a class for each


def main() -> None:
    real = load("digits")
    key = Key(2027, ("bank", "landscape"))
    method = RandomSubset()

    def subset(place: Key) -> DistilledDataset:
        problem = Problem(real.train, 10, place)
        return method.finish(problem, method.start(problem))

    many = [[subset(key.fold("subset", r, i)) for i in range(SUBSETS)] for r in range(TRAJECTORIES)]
    sets = Sets({"null": tuple(row[0] for row in many)})
    analysis = Landscape.defaults(real.train)
    found: dict[str, list[torch.Tensor]] = {"own": [], "other": [], "leaning": []}
    with session(real) as runs:
        (population,) = runs.get(
            along(analysis.net, analysis.recipe, analysis.moments, TRAJECTORIES, sets, real, key)
        )
        for r, models in enumerate(by_replicate(population, sets)):
            way = along_the_way(models, real.val)
            keys = networks(key, r, 1)
            owns = runs.get(*(on(one, analysis.net, analysis.own, keys) for one in many[r]))
            seen = [beside(own.final, models, way, real.val, real.test, analysis.points) for own in owns]
            away = population.final[(r + 1) % TRAJECTORIES]
            others = [profile(models, own.final[0], away, real.test, analysis.points)[1] for own in owns]
            found["own"].append(torch.stack([barrier(one.profiles[0, 1, 1]) for one in seen]))
            found["other"].append(torch.stack([barrier(one) for one in others]))
            found["leaning"].append(torch.stack([one.leaning[0] for one in seen]))
    tensors = {name: torch.stack(rows).float() for name, rows in found.items()}
    write_tensors(Path(__file__).with_name("landscape.safetensors"), tensors)


if __name__ == "__main__":
    main()
